"""What people write for a setting, in the form that its field takes: one for flags and for YAML.

Also the plain type that a field's flag has. Raises ValueError with what the field takes; whoever
validates says which field it was. Knows no sections.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, get_args, get_origin

# What people type for an optimiser (Hugging Face's and bitsandbytes' names among them).
OPTIMIZER_NAMES: dict[str, str] = {
    "adam": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw_bitsandbytes": "adamw_8bit",
    "paged_adamw": "adamw", "paged_adamw_32bit": "adamw",  # full precision: little to page
    "paged_adamw8bit": "paged_adamw_8bit", "paged_adamw_bnb_8bit": "paged_adamw_8bit",
}  # fmt: skip
ROLES = ("prompt", "answer", "system", "text")  # of --columns


def optimizer(value: Any) -> Any:
    """An optimiser's name, however it is written."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().replace("-", "_")
    return OPTIMIZER_NAMES.get(name, name)


def columns(value: Any) -> Any:
    """'prompt=question,answer=choice[label]' → {'prompt': 'question', 'answer': 'choice[label]'}.

    Raises:
        ValueError: a part without '=', or a role that is not one of these.
    """
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        value = {role.strip(): column.strip() for role, _, column in parts}
    if not isinstance(value, dict) or any(
        role not in ROLES or not column or not isinstance(column, str)
        for role, column in value.items()
    ):
        raise ValueError(
            "takes a list of role=column, such as prompt=question,answer=answer; roles: "
            + ", ".join(ROLES)
        )
    return value


def names(value: Any) -> Any:
    """'q_proj,v_proj' → ('q_proj', 'v_proj'); a single word stays one."""
    if isinstance(value, str) and "," in value:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def texts(value: Any) -> Any:
    """A single text → a list of one."""
    return (value,) if isinstance(value, str) else value


def day(value: Any) -> Any:
    """'2026-11-30' → that day.

    Raises:
        ValueError: anything else.
    """
    if value is None or type(value) is datetime.date:
        return value
    try:
        return datetime.date.fromisoformat(value.strip())
    except (AttributeError, ValueError):
        raise ValueError("takes a day such as 2026-11-30") from None


def plain_type(annotation: Any) -> tuple[Any, bool]:
    """(type without None, whether a flag of this type repeats); for generating flags."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_type(get_args(annotation)[0])
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if origin is Literal:
        return str if all(isinstance(a, str) for a in arguments) else int, False
    if origin is tuple:
        return arguments[0], True
    if origin is dict:
        return str, False
    if arguments and origin is not None:
        if str in arguments and len(arguments) > 1:
            return str, False
        return plain_type(arguments[0])
    return (str if annotation is datetime.date else annotation), False
