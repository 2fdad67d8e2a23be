"""How does plain JSON become the model again? Strictly: the helper reads here what an unprivileged caller wrote.

The counterpart of `model.to_json`. Every field has to have the type that the model declares for it, unknown fields
are refused, absent ones get the model's default. Annotations are read as text, because Python 3.9 cannot evaluate
`int | None`. It decides nothing about values: that is `root.validate`'s part.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, TypeVar

from onelxc import model
from onelxc.errors import HelperError

T = TypeVar("T")

_LONGEST_LIST = 4096
_WHOLE = range(-(2**63), 2**63)


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """`value` (from `jsontext`) as the dataclass `kind`. HelperError names the field that is wrong."""
    where = where or kind.__name__
    if not isinstance(value, dict):
        raise HelperError(f"Cannot read {where}: not an object")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(map(str, value)) - set(fields))
    if unknown:
        raise HelperError(f"Cannot read {where}: unknown field {unknown[0]!r}")
    given = {name: _value(str(fields[name].type), item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**given)
    except TypeError as error:
        raise HelperError(f"Cannot read {where}: {error}") from error


def number(request: dict[str, Any], name: str, *, least: int = 0, most: int = 2**62) -> int:
    """A whole number that a verb needs. HelperError where there is none."""
    value = _value("int", request.get(name), name)
    if not least <= value <= most:
        raise HelperError(f"Cannot read {name}: out of range: {value}")
    return int(value)


def _value(declared: str, value: Any, where: str) -> Any:
    if declared.endswith(" | None"):
        return None if value is None else _value(declared[: -len(" | None")], value, where)
    if declared.startswith("tuple["):
        return _tuple(_split(declared[len("tuple[") : -1]), value, where)
    if declared == "float" and type(value) is int and value in _WHOLE:
        return float(value)
    if declared in ("int", "float", "str", "bool"):
        if type(value).__name__ != declared:
            raise HelperError(f"Cannot read {where}: not {declared}: {value!r}")
        if not _is_plain(value):
            what = "a NUL" if isinstance(value, str) and "\0" in value else f"no {declared} of ours"
            raise HelperError(f"Cannot read {where}: {what} in {value!r}")
        return value
    named = getattr(model, declared)
    if issubclass(named, enum.Enum):
        try:
            return named(value)
        except ValueError as error:
            raise HelperError(f"Cannot read {where}: {error}") from error
    return decode(named, value, where)


def _is_plain(value: str | float) -> bool:
    """Whether the kernel can be told it: no NUL in a text, nor half a character; a number of 64 bits, and finite."""
    if isinstance(value, str):
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return False
        return "\0" not in value
    return math.isfinite(value) if isinstance(value, float) else value in _WHOLE


def _tuple(members: list[str], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise HelperError(f"Cannot read {where}: not a list")
    if len(value) > _LONGEST_LIST:
        raise HelperError(f"Cannot read {where}: {len(value)} items, {_LONGEST_LIST} at most")
    if members[-1] == "...":
        members = members[:1] * len(value)
    if len(members) != len(value):
        raise HelperError(f"Cannot read {where}: {len(value)} items instead of {len(members)}")
    pairs = zip(members, value)
    return tuple(_value(member, item, f"{where}[{index}]") for index, (member, item) in enumerate(pairs))


def _split(members: str) -> list[str]:
    """The members of `tuple[…]`, at commas outside of inner brackets."""
    parts, depth = [""], 0
    for character in members:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
