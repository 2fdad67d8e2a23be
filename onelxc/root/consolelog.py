"""What has a container said on its console? A bounded log per VM, written by the hub, quoted by a failed deploy.

The bytes are the tenant's, kept as they came, control bytes too; `tail` makes printable text of them. The log is at
most two files of LIMIT bytes (`one-N.log` and `one-N.log.1`), readable by root alone. A log is never followed through
a symbolic link and never a reason for a failure: on a full disk the bytes are lost, the container goes on.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Any

from onelxc.model import VmPaths, vm_id_of

if TYPE_CHECKING:
    from onelxc.root.work import Work

LIMIT = 1024 * 1024
KEEP_S = 14 * 24 * 3600
"""How long the log of a VM that is no longer here is kept."""
KEEP_BYTES = 256 << 20
"""How much of such logs is kept: a tenant who makes and deletes VMs fills two of LIMIT with each."""
HEARD_S = 0.5
"""How long the hub may take to write down what was said last."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


class ConsoleLog:
    """The open end of one VM's log."""

    def __init__(self, vm_id: int, limit: int = LIMIT) -> None:
        self.path = VmPaths(vm_id).console_log
        self._limit = limit
        self._fd = -1
        self._size = 0
        self._open()

    def _open(self) -> None:
        os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        self._size = os.fstat(self._fd).st_size

    def write(self, data: bytes) -> None:
        """Append; begins a new file where the limit is reached. Never raises."""
        try:
            while data:
                if self._size >= self._limit:
                    self.close()
                    os.replace(self.path, self.path + ".1")
                if self._fd < 0:
                    self._open()
                written = os.write(self._fd, data[: max(1, self._limit - self._size)])
                self._size += written
                data = data[written:]
        except OSError:
            return

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def begin(vm_id: int) -> None:
    """Put the log of an earlier run aside, so that what is quoted is said by this one."""
    path = VmPaths(vm_id).console_log
    try:
        os.replace(path, path + ".1")
    except OSError:
        pass  # there is none, or it goes on in the same one


def tail(vm_id: int, lines: int = 10) -> tuple[str, ...]:
    """The last lines of this run as plain text, empty ones left out; () if nothing was said."""
    try:
        with open(VmPaths(vm_id).console_log, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - 64 * 1024))
            data = log.read()
    except OSError:
        return ()
    text = _ESCAPES.sub("", data.decode(errors="replace")).replace("\r", "\n")
    plain = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.split("\n"))
    return tuple([line[:300] for line in plain if line][-lines:])


def verb(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"lines": [...]}`, for the error of a container that did not start."""
    deadline = time.monotonic() + HEARD_S
    while not (lines := tail(work.vm_id)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return {"lines": list(lines)}


def expire(now: float | None = None) -> None:
    """Remove the logs of VMs that are no longer here: the silent ones of KEEP_S, then the oldest beyond KEEP_BYTES."""
    directory = os.path.dirname(VmPaths(0).console_log)
    limit = (time.time() if now is None else now) - KEEP_S
    try:
        names = os.listdir(directory)
    except OSError:
        return
    old = []
    for name in names:
        vm_id = vm_id_of(name.split(".", 1)[0])
        if vm_id is not None and not os.path.isdir(VmPaths(vm_id).state):
            path = os.path.join(directory, name)
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                old.append((status.st_mtime, status.st_size, path))
    kept = 0
    for modified, size, path in sorted(old, reverse=True):
        kept += size
        if modified < limit or kept > KEEP_BYTES:
            with contextlib.suppress(OSError):
                os.unlink(path)
