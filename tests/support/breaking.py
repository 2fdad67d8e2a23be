"""Breaks an action off at a chosen moment: the N-th call by which it changes something on the host or asks libvirt to.

The kernel stops the action's processes at such calls (seccomp's user notification) and asks this module what becomes
of them, so that nothing in the product is there for the tests. Calls are counted over all processes of the action, the
executable as oneadmin, the helper and the programs it runs, in the order in which they come.

    moments = Breaker().count(lambda: one.act(...))                the calls of an undisturbed run, in words
    Breaker(5, "helper killed").over(one.driver) …                 broken off before the fifth of them
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import threading

from tests.support import machine, stopping
from tests.support.stopping import NUMBERS

HELPER_KILLED, CALLER_KILLED, PROCESS_KILLED, FAILS, FULL = (
    "helper killed",
    "caller killed",
    "process killed",
    "I/O error",
    "disk full from then on",
)
WAYS = (HELPER_KILLED, CALLER_KILLED, PROCESS_KILLED, FAILS, FULL)

_PATH_ARGUMENT = {"openat": 1, "mkdirat": 1, "unlinkat": 1, "renameat": 1, "renameat2": 1, "linkat": 1, "symlinkat": 0}
_PATH_ARGUMENT.update(dict.fromkeys(("rename", "mkdir", "rmdir", "link", "unlink", "symlink", "truncate"), 0))
_PATH_ARGUMENT.update({"mount": 1, "umount2": 0, "move_mount": 3})
_ON_DESCRIPTOR = ("write", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate", "ioctl")
_NEEDS_ROOM = ("write", "pwrite64", "openat", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "fallocate")
_NEVER_FAIL = ("kill", "pidfd_send_signal")
STATE = ("/var/lib/onelxc", "/run/onelxc")

_NOTIF_RECV, _NOTIF_SEND = 0xC0502100, 0xC0182101


class Breaker:
    """Stops the `at`-th moment of what is started `under` it, in one of WAYS; with `at` 0 it only counts."""

    def __init__(self, at: int = 0, way: str = "") -> None:
        self.at = at
        self.way = way
        self.moments: list[str] = []
        """The calls so far, in words."""
        self.failed: list[str] = []
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def launcher(self) -> list[str]:
        """What a command line begins with."""
        return [sys.executable, stopping.__file__, str(self._theirs.fileno())]

    @property
    def descriptor(self) -> int:
        return self._theirs.fileno()

    def close(self) -> None:
        """The action has ended. What it left running (a command in the container) is let go on for ever."""
        self._theirs.close()

    def _serve(self) -> None:
        _, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1)
        if not descriptors:
            return
        listener = descriptors[0]
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while not any(mask & select.POLLHUP for _, mask in poll.poll()):
            buffer = bytearray(80)
            try:
                fcntl.ioctl(listener, _NOTIF_RECV, buffer)
            except OSError:
                continue  # it was killed meanwhile
            identifier, pid, _, number = struct.unpack_from("QIIi", buffer)
            failure = self.decide(pid, NUMBERS[number], struct.unpack_from("6Q", buffer, 32))
            try:
                answer = struct.pack("QqiI", identifier, 0, -failure, 0 if failure else 1)
                fcntl.ioctl(listener, _NOTIF_SEND, bytearray(answer))
            except OSError:
                continue
        os.close(listener)
        self._ours.close()

    def decide(self, pid: int, name: str, arguments: tuple[int, ...]) -> int:
        """The errno that the call gets, 0: it goes on."""
        what = _described(pid, name, arguments)
        if what is None:
            return 0
        self.moments.append(what)
        if self.way == FULL and 0 < self.at <= len(self.moments):
            return self._fail(errno.ENOSPC, what) if name in _NEEDS_ROOM and _in_state(what) else 0
        if len(self.moments) != self.at:
            return 0
        if self.way == FAILS:
            return self._fail(errno.EIO, what) if name not in _NEVER_FAIL else 0
        for victim in (
            [pid] if self.way == PROCESS_KILLED else _processes("onelxc-root session", self.way == HELPER_KILLED)
        ):
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return 0

    def _fail(self, number: int, what: str) -> int:
        self.failed.append(what)
        return number


def _processes(helper: str, of_helper: bool) -> list[int]:
    """The helper's processes, or those of the executable that called it."""
    lines = {pid: machine.command_line(pid) for pid in machine.pids()}
    if of_helper:
        return [pid for pid, line in lines.items() if helper in line and not line.startswith("sudo")]
    return [pid for pid, line in lines.items() if line.startswith("/usr/bin/python3 /var/tmp/one/vmm/")]


def _described(pid: int, name: str, arguments: tuple[int, ...]) -> str | None:
    """The call in words; None for one that changes nothing of interest, or not of the action's."""
    line = machine.command_line(pid)
    program = os.path.basename(line.split(" ")[0])
    if program in ("bash", "sudo", "cat", "setpriv", "libvirt_lxc") or "onelxc-hub" in line or "stopping.py" in line:
        return None
    if _namespace(pid) != _namespace(os.getpid()):
        return None  # a command in the container
    place = ""
    if name in _PATH_ARGUMENT:
        place = text_of(pid, arguments[_PATH_ARGUMENT[name]])
    elif name == "ioctl" and arguments[1] & 0xFFFF == 0x4C05:
        return None  # LOOP_GET_STATUS64 only looks
    elif name in _ON_DESCRIPTOR:
        try:
            place = os.readlink(f"/proc/{pid}/fd/{arguments[0]}")
        except OSError:
            return None
        if place.startswith(("pipe:", "/memfd:", "/dev/null", "anon_inode:", "/proc/")):
            return None
    who = (
        "helper"
        if "onelxc-root" in line
        else "caller"
        if line.startswith("/usr/bin/python3 /var/tmp/one/")
        else program
    )
    if who == "caller" and not place.startswith("socket:"):
        return None
    return f"{who}: {name} {place.partition(':[')[0]}".strip()


def _in_state(what: str) -> bool:
    return any(place in what for place in STATE)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def text_of(pid: int, address: int) -> str:
    try:
        with open(f"/proc/{pid}/mem", "rb", 0) as memory:
            memory.seek(address)
            return memory.read(256).split(b"\0")[0].decode(errors="replace")
    except (OSError, ValueError, OverflowError):
        return ""
