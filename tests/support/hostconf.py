"""The host's policy, /etc/onelxc/host.conf, changed for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

PATH = Path("/etc/onelxc/host.conf")


@contextlib.contextmanager
def with_line(line: str) -> Iterator[None]:
    """The policy with one line more."""
    before = PATH.read_text() if PATH.exists() else None
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(f"{before or ''}\n{line}\n")
    try:
        yield
    finally:
        if before is None:
            PATH.unlink()
        else:
            PATH.write_text(before)
