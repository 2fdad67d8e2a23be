"""How much of it since the last time? Counters only grow; the reading before is kept in a file, so nobody sleeps.

The file lies where the user that runs the probes may write and OpenNebula's rsync --delete does not reach:
/var/tmp/one_db, which monitord's client makes for the same purpose, or a directory of our own beside it. Losing it
costs one answer its exactness, never the answer: then it is the average since the thing began.
"""

from __future__ import annotations

import os
import time

from onelxc import kernelfile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DIRECTORY = "/var/tmp/one_db"
KEEP_S = 1.0
"""A reading younger than this stays: over a shorter time the kernel's ticks would show."""


def directory() -> str:
    """Where this user keeps such files: only a directory that is its own, since anybody may write in /var/tmp."""
    own = os.geteuid()
    for path in (DIRECTORY, f"/var/tmp/onelxc-{own}"):
        try:
            os.makedirs(path, 0o755, exist_ok=True)
            if os.lstat(path).st_uid == own and not os.path.islink(path):
                return path
        except OSError:
            continue
    return ""


def load(name: str) -> dict[str, Any]:
    """What `save` was last given under this name, {} if that is lost or from before the host's last boot."""
    from onelxc import jsontext

    where = directory()
    try:
        fd = os.open(f"{where}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            kept = jsontext.loads(file.read())
        return kept if isinstance(kept, dict) and kept.get("boot") == _boot() else {}
    except (OSError, ValueError):
        return {}


def save(name: str, values: dict[str, Any]) -> None:
    """Keep them; whole or not at all, and silently not at all where nothing can be written."""
    import json

    where = directory()
    temporary = f"{where}/.{name}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump({"boot": _boot(), **values}, file)
        os.rename(temporary, f"{where}/{name}")
    except OSError:
        forget(f".{name}.{os.getpid()}")


def forget(name: str) -> None:
    """Keep them no longer."""
    try:
        os.unlink(f"{directory()}/{name}")
    except OSError:
        pass


def _boot() -> str:
    return kernelfile.text("/proc/sys/kernel/random/boot_id")


def now_s() -> float:
    """Seconds since boot, sleep included: the clock that /proc/PID/stat tells a process's start in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Counters:
    """Readings of growing numbers. `add` each one, use what it gives, then `keep` them all."""

    def __init__(self, name: str, at_s: float | None = None) -> None:
        self.name = name
        self.at_s = now_s() if at_s is None else at_s
        self._last = load(name)
        self._new: dict[str, int] = {}

    def add(self, key: str, value: int) -> tuple[int, float] | None:
        """(growth, over how many seconds) since the last reading under this key; None if there is none to compare."""
        self._new[key] = value
        try:
            before, passed = int(self._last["values"][key]), self.at_s - float(self._last["at"])
        except (KeyError, TypeError, ValueError):
            return None
        return (value - before, passed) if value >= before and passed > 0.05 else None

    def keep(self) -> None:
        """Write the readings down for the next time. Keys not added again are forgotten."""
        at = self._last.get("at")
        young = isinstance(at, float) and 0 <= self.at_s - at < KEEP_S
        if not young:
            save(self.name, {"at": self.at_s, "values": self._new})
