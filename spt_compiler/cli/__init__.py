"""The command `spt`: one thin file per subcommand, imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from spt_compiler.errors import SPTError

# Each module has `add_arguments(parser)` and `run(args) -> exit status`; its docstring's first line is the help.
COMMANDS = {
    "demo": "trains a small model dense and sparse, side by side: the first thing to run",
    "finetune": "fine-tunes your model on your text, dense and sparse, resumable",
    "explain": "shows which sites of a model become sparse, which do not, and why",
    "coverage": "counts sites over architectures of transformers, and compares each with its eager model",
    "kernels": "compiles the generated kernels for a GPU, without one, and reports registers, spills, shared memory",
    "bench": "measures overheads of the compiler pass and run time, and the gain in fine-tuning",
    "doctor": "checks this installation",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments without the program name; None means `sys.argv`.
    Returns: exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="spt",
        description="Makes fine-tuning of unmodified Transformers cheaper by approximate, sparse computation.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == wanted:  # the others' modules stay unread: `spt doctor` must work where they cannot be imported
            module = importlib.import_module(f"spt_compiler.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except (SPTError, ValueError, OSError) as error:
        sys.stderr.write(f"spt {args.command}: {error}\n")
        return 1
    except ModuleNotFoundError as error:
        remedy = missing_extra(error)
        if remedy is None:
            raise
        sys.stderr.write(f"spt {args.command}: {remedy}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"spt {args.command}: interrupted\n")
        return 130


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install if `error` names a package of one of our extras; None if it is something else."""
    extras = {"transformers": "hf", "peft": "hf", "accelerate": "hf", "matplotlib": "cli", "rich": "cli"}
    package = (error.name or "").partition(".")[0]
    return f"needs {package}: pip install 'spt_compiler[{extras[package]}]'" if package in extras else None
