"""How is JSON read that somebody else wrote: a caller, a program, a file that may be damaged? Within bounds.

Whatever the text is, it is read or it is a ValueError. So is what is nested deeper than Python goes (a RecursionError),
numbers of so many digits that reading them takes a processor, `NaN` and `Infinity`, which no JSON has. Knows no field.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_DIGITS = 20
"""Of 64 bits; what is longer is no number of anything here."""


def loads(text: str | bytes) -> Any:
    """The value that the text stands for. ValueError says what is wrong."""
    try:
        return json.loads(text, parse_int=_whole, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")
