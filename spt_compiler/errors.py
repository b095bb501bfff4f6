"""Errors of the package, and `Reject`, the value by which a guard refuses a candidate."""

from __future__ import annotations

from dataclasses import dataclass


class SPTError(RuntimeError):
    """A fault of spt_compiler itself, or a demand that cannot be met.

    Args:
        message: what was expected, what came, and the remedy.
        site: name of the site it happened at, if known.
        stage: name of the stage of the pass ("match", "rewrite", ...), if known.
    """

    def __init__(self, message: str, *, site: str | None = None, stage: str | None = None):
        where = ", ".join(f"{k} {v}" for k, v in (("site", site), ("stage", stage)) if v)
        super().__init__(f"{message} [{where}]" if where else message)
        self.site = site
        self.stage = stage


class OptionError(SPTError, ValueError):
    """An option is unknown, has the wrong type, or is out of range."""


class StateError(SPTError, ValueError):
    """Learned state is missing, corrupt, or belongs to another model."""


class ExpressionError(SPTError, ValueError):
    """A text is not an expression of the closed language (see `expression.py`)."""


class KernelError(SPTError):
    """A generated kernel cannot be compiled for, or launched on, a device in one configuration; others may work.

    Args: kernel: its name.  configuration: what it was generated for.  cause: what the compiler or driver said.
    """

    def __init__(self, kernel: str, configuration: str, cause: str):
        super().__init__(f"kernel {kernel} ({configuration}): {cause}", stage="lower")
        self.kernel = kernel


@dataclass(frozen=True, init=False)
class Reject:
    """Refusal of a candidate: falsy, and formatted only when somebody reads it.

    Example:
        >>> str(Reject("head_dim {} not divisible by {}", 60, 8))
        'head_dim 60 not divisible by 8'
    """

    template: str
    arguments: tuple

    def __init__(self, template: str, *arguments: object):
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "arguments", arguments)

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.template.format(*self.arguments) if self.arguments else self.template
