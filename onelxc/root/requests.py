"""How does what an unprivileged caller asks come in? Lines of JSON on a descriptor, each within bounds.

Bounds of length, and of the time in which a line that has begun must end. What a verb then takes out of a request is
`wire`'s to look at, and what it may be `validate`'s.
"""

from __future__ import annotations

import os
import select
import time
from typing import Any

from onelxc import jsontext
from onelxc.errors import HelperError

LONGEST = 4 << 20
LINE_S = 60.0


class Lines:
    """The lines on a descriptor."""

    def __init__(self, fd: int, *, longest: int = LONGEST, limit_s: float = LINE_S, patient: bool = True) -> None:
        """`patient`: before it begins, a line may take as long as it likes."""
        self._fd = fd
        self._longest = longest
        self._limit_s = limit_s
        self._patient = patient
        self.rest = b""
        """What has come after the last whole line."""

    def next(self) -> bytes | None:
        """The next line, None where the caller has closed its end. HelperError where there can be no further one."""
        pieces = [self.rest]
        size = len(self.rest)
        deadline = time.monotonic() + self._limit_s if size or not self._patient else None
        while b"\n" not in pieces[-1]:
            if size > self._longest:
                raise HelperError(f"Cannot read a request: longer than {self._longest >> 10} KiB")
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left == 0 or not select.select([self._fd], [], [], left)[0]:
                raise HelperError(f"Cannot read a request: no end of the line after {self._limit_s:g} s")
            pieces.append(os.read(self._fd, 65536))
            size += len(pieces[-1])
            deadline = deadline or time.monotonic() + self._limit_s
            if not pieces[-1]:
                self.rest = b"".join(pieces)
                return None
        line, _, self.rest = b"".join(pieces).partition(b"\n")
        return line


def parse(line: bytes) -> dict[str, Any]:
    """A request: a JSON object. HelperError where it is none."""
    try:
        request = jsontext.loads(line)
    except ValueError as error:
        raise HelperError(f"Cannot read a request: {error}") from None
    if not isinstance(request, dict):
        raise HelperError("Cannot read a request: not an object")
    return request
