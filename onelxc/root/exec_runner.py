"""Who stays with a command while it runs in a container? One process of root's per command, outside of it.

It starts `enter` on mounts that are read-only, feeds stdin, keeps the beginning and the end of what is written, minds
the time limit, and leaves the result where `execution` reports it from. SIGTERM means cancel: the command is killed
and there is no result. It never enters the container itself.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from onelxc.root import apparmor, enter, syscalls

KEEP = 8 * 1024
"""Bytes kept of the beginning, and again of the end, of stdout and of stderr: the answer of a probe is one datagram."""
PACE_S = 0.002
"""After each piece (64 KiB) of what is left out: a tenant's `yes` is not to have a processor of the host's."""
AFTER_S = 0.5
"""How long the pipes are read on once the command has ended: a daemon that it started may hold them for ever."""
BEGUN = "begun"


@dataclass(frozen=True)
class Target:
    """The container's init, held by descriptors, and what a process must have to be its equal."""

    init: int
    pidfd: int
    groups: tuple[int, ...]
    """Descriptors of cgroup.procs, open for writing."""
    namespaces: int
    bounding: int
    no_new_privileges: bool
    limits: tuple[tuple[int, tuple[int, int]], ...]
    root: tuple[int, int]
    """The host's uid and gid of the container's root: the pipes are its own, or /dev/stdout could not be opened."""
    profile: str = ""
    """AppArmor's, of init."""


@dataclass(frozen=True)
class Result:
    """How a command ended. `code` as a shell tells it (128 + signal); `error` is "" or why there is no such code."""

    pid: int
    code: int
    stdout: bytes
    stderr: bytes
    error: str
    begun: bool
    cancelled: bool = False


class _Kept:
    """The beginning and the end of a stream."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""
        self._left_out = 0

    def add(self, data: bytes) -> None:
        room = KEEP - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room > 0 else data
        if len(self._tail) > KEEP:
            self._left_out += len(self._tail) - KEEP
            self._tail = self._tail[-KEEP:]
            time.sleep(PACE_S)

    def text(self) -> bytes:
        gap = b"\n[%d bytes left out]\n" % self._left_out if self._left_out else b""
        return self._head + gap + self._tail


class Runner:
    """One command."""

    def __init__(self, target: Target, command: str, stdin: bytes, limit_s: float, begin_s: float) -> None:
        self.target = target
        self._command = command
        self._stdin = memoryview(stdin)
        self._limit_s = limit_s
        self._begin_s = begin_s
        self._streams = {"out": _Kept(), "err": _Kept()}
        self._report = b""
        self._cancelled = False
        self._entrant = 0

    def cancel(self) -> None:
        """Kill the command as soon as the loop comes round."""
        self._cancelled = True

    def run(self, on_start: int) -> Result:
        """Run it to its end. Writes BEGUN, or why not, to the descriptor `on_start`, and closes it."""
        fds = self._start()
        try:
            return self._attend(fds, on_start)
        finally:
            self._kill()
            for fd in fds:
                os.close(fd)

    def _start(self) -> dict[int, str]:
        pipes = {name: os.pipe() for name in ("in", "out", "err", "report")}
        inner = {name: pair[0] if name == "in" else pair[1] for name, pair in pipes.items()}
        for name in ("in", "out", "err"):
            os.fchown(inner[name], *self.target.root)
        outer = {(pair[1] if name == "in" else pair[0]): name for name, pair in pipes.items()}
        pid = os.fork()
        if pid == 0:
            _become_entrant(self.target, self._command, inner)
        self._entrant = pid
        for fd in (*inner.values(), self.target.pidfd, *self.target.groups):
            os.close(fd)
        for fd in outer:
            os.set_blocking(fd, False)
        return outer

    def _attend(self, fds: dict[int, str], on_start: int) -> Result:
        poll = select.poll()
        for fd, name in fds.items():
            poll.register(fd, select.POLLOUT if name == "in" else select.POLLIN)
        began = time.monotonic()
        ended_at: float | None = None
        error = ""
        while True:
            now = time.monotonic()
            open_streams = any(name in ("out", "err") for name in fds.values())
            if ended_at is not None and (not open_streams or now > ended_at + AFTER_S):
                break
            if self._cancelled:
                break
            if now > began + self._limit_s:
                error = f"killed after {self._limit_s:g} s"
                break
            if on_start >= 0 and now > began + self._begin_s:
                error = f"it did not begin within {self._begin_s:g} s"  # a frozen control group, for one
                break
            for fd, _ in poll.poll(100):
                if self._serve(fd, fds[fd]):
                    poll.unregister(fd)
                    os.close(fd)
                    if fds.pop(fd) == "report":
                        ended_at = time.monotonic()
            if on_start >= 0 and self._report.startswith(b"P "):
                self._cancelled = not _tell(on_start, BEGUN)
                on_start = -1
        said = dict(line.split(b" ", 1) for line in self._report.split(b"\n") if b" " in line)
        if b"E" in said:
            error = said[b"E"].decode(errors="replace")
        elif b"X" not in said and not error:
            error = "the container ended"
        if on_start >= 0:
            _tell(on_start, error or "cancelled")
        return Result(
            pid=int(said.get(b"P", b"0")),
            code=126 if b"E" in said else int(said.get(b"X", b"137")),
            stdout=self._streams["out"].text(),
            stderr=self._streams["err"].text(),
            error=error,
            begun=b"P" in said,
            cancelled=self._cancelled,
        )

    def _serve(self, fd: int, name: str) -> bool:
        """Read or write what there is; True at its end."""
        try:
            if name == "in":
                if self._stdin:
                    self._stdin = self._stdin[os.write(fd, self._stdin[:4096]) :]
                return not self._stdin
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        except OSError:
            return True
        if name == "report":
            self._report += data
        else:
            self._streams[name].add(data)
        return not data

    def _kill(self) -> None:
        """Reap the entrant; before that, unless it has ended by itself, kill the command and what descends from it."""
        if b"\nX " not in self._report:
            # Stopped first, again and again until no new ones appear: who forks while being killed would get away.
            found: set[int] = set()
            while not found >= (now := _descendants(self._entrant)):
                found |= now
                for pid in now:
                    _signal(pid, signal.SIGSTOP)
            for pid in (*found, self._entrant):
                _signal(pid, signal.SIGKILL)
        os.waitpid(self._entrant, 0)


def _become_entrant(target: Target, command: str, inner: dict[str, int]) -> NoReturn:
    """In the forked child: on read-only mounts, with nothing but its pipes, execute `enter`."""
    try:
        for name, stream in (("in", 0), ("out", 1), ("err", 2)):
            os.dup2(inner[name], stream)
        spec = {
            "report": inner["report"],
            "pidfd": target.pidfd,
            "groups": target.groups,
            "namespaces": target.namespaces,
            "bounding": target.bounding,
            "last_capability": last_capability(),
            "no_new_privileges": target.no_new_privileges,
            "limits": target.limits,
            "command": command,
        }
        description = os.memfd_create("enter")
        os.write(description, json.dumps(spec).encode())
        for fd in (description, inner["report"], target.pidfd, *target.groups):
            os.set_inheritable(fd, True)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
        if target.profile:
            apparmor.enter_at_exec(target.profile)
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        syscalls.mount_setattr(root, set_=syscalls.ATTR_RDONLY, recursive=True)
        os.execve(sys.executable, [sys.executable, "-I", "-S", "-B", enter.__file__, str(description)], {})
    except BaseException as error:
        os.write(inner["report"], f"E {error}\n".encode(errors="replace"))
    finally:
        os._exit(126)


def last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def _descendants(pid: int) -> set[int]:
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        try:
            with open(f"/proc/{waiting[0]}/task/{waiting.pop(0)}/children", "rb") as file:
                children = {int(child) for child in file.read().split()} - found
        except OSError:
            continue
        found |= children
        waiting.extend(children)
    return found


def _tell(fd: int, text: str) -> bool:
    """Whether anybody heard it: an action that was broken off has told OpenNebula that nothing runs."""
    try:
        os.write(fd, text.encode())
    except BrokenPipeError:
        return False
    finally:
        os.close(fd)
    return True


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
