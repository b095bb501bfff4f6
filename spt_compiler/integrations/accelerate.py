"""Lets accelerate, and Hugging Face's `TrainingArguments(torch_compile_backend="spt")`, know the backend by name.

accelerate keeps a closed list of Dynamo backends. `enable()` opens it for "spt" in this process, and only when asked:

    from spt_compiler.integrations import accelerate
    accelerate.enable()
    accelerator = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="spt", options={"attention.density": 0.5}))

`TrainingArguments` has no place for options: give them as `SPT_*` environment variables, or let
`spt_compiler.integrations.transformers.SptCallback(options=...)` compile the model instead.
"""

from __future__ import annotations

from typing import Any

_NAME = "SPT"


def enable() -> None:
    """Makes `DynamoBackend("SPT")` a member of accelerate's list. Calling it again changes nothing.

    Raises: ModuleNotFoundError without accelerate.
    """
    from accelerate.utils import DynamoBackend

    if _NAME in DynamoBackend.__members__ or _NAME in DynamoBackend._value2member_map_:
        return  # enabled before, or an accelerate that knows us
    # An Enum's list of members is closed, but values that it lacks go through `_missing_`, which may return a member
    # made by hand; one object for good, as members are compared by identity.
    member: Any = str.__new__(DynamoBackend, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    before = DynamoBackend._missing_

    def missing(cls: type, value: object) -> Any:
        return member if isinstance(value, str) and value.upper() == _NAME else before(value)

    DynamoBackend._missing_ = classmethod(missing)
    DynamoBackend._value2member_map_[_NAME] = member


def disable() -> None:
    """Undoes `enable()`."""
    from accelerate.utils import DynamoBackend

    if _NAME in DynamoBackend.__members__:
        return
    DynamoBackend._value2member_map_.pop(_NAME, None)
    if "_missing_" in DynamoBackend.__dict__:
        del DynamoBackend._missing_
