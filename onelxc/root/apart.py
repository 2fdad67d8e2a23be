"""What a tenant can hold up is done in a child of its own, and given up when its time is over.

A look into a container waits for whoever holds a lease on the file, for the server of a FUSE or NFS mount on the way,
for a lock that a busy process has; and a task in such a wait (state D) does not die even when killed. So the child
keeps nothing that anybody else waits for: no lock, no pipe but its answer, no place in a process group. It is killed,
and reaped if it dies at once; else it ends when the wait does, at the latest with the container.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Union

from onelxc.errors import OneLxcError, StorageError, line
from onelxc.root import syscalls

MOST = 64 << 10
"""Bytes of an answer."""
_DIES_S = 0.2

Answer = Union[bytes, Exception]


@dataclass
class _Child:
    pid: int
    fd: int
    said: bytearray = field(default_factory=bytearray)


def run(step: Callable[[], bytes], *, limit_s: float, keep: Iterable[int] = (), most: int = MOST) -> bytes:
    """What `step` gives, done in a child that has the descriptors `keep` and no others.

    TimeoutError (an OSError) if there is no answer in time; OSError and StorageError as they were raised there.
    """
    answer = run_all([step], limit_s=limit_s, keep=keep, most=most)[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


def run_all(
    steps: Sequence[Callable[[], bytes]], *, limit_s: float, keep: Iterable[int] = (), most: int = MOST
) -> list[Answer]:
    """The same for several at once, each in a child of its own, with one limit for all: what each gave or raised."""
    deadline = time.monotonic() + limit_s
    kept = tuple(keep)
    children: list[_Child] = []
    try:
        children.extend(_start(step, kept) for step in steps)
        done = _listen(children, deadline, most)
        return [_answer(child) if child.fd in done else _late(limit_s) for child in children]
    finally:
        for child in children:
            os.close(child.fd)
        _end(children)


def _listen(children: Sequence[_Child], deadline: float, most: int) -> set[int]:
    """Read what they say; the descriptors of those who have said all."""
    poll = select.poll()
    waiting = {child.fd: child for child in children}
    done = set()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        for fd, _ in poll.poll(left * 1000):
            data = os.read(fd, 65536)
            waiting[fd].said += data
            if len(waiting[fd].said) > most:
                waiting[fd].said[:] = b"!its answer is too long"
            elif data:
                continue
            poll.unregister(fd)
            del waiting[fd]
            done.add(fd)
    return done


def _answer(child: _Child) -> Answer:
    kind, said = bytes(child.said[:1]), bytes(child.said[1:])
    if kind == b"+":
        return said
    if kind == b"-":
        number, _, text = said.decode(errors="replace").partition(" ")
        return OSError(int(number), text)
    return StorageError(said.decode(errors="replace") or "the helper's child died")


def _late(limit_s: float) -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, f"no answer within {limit_s:g} s")


def _start(step: Callable[[], bytes], keep: tuple[int, ...]) -> _Child:
    reader, writer = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        _work(step, writer, {writer, *keep}, parent)
    os.close(writer)
    return _Child(pid, reader)


def _work(step: Callable[[], bytes], writer: int, keep: set[int], parent: int) -> NoReturn:
    try:
        gc.disable()  # what our parent left to the collector is the parent's to end
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        syscalls.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        keep_only(keep)
        try:
            said = b"+" + step()
        except OSError as error:
            said = f"-{error.errno or errno.EIO} {error.strerror or line(str(error))}".encode(errors="replace")
        except OneLxcError as error:
            said = b"!" + str(error).encode(errors="replace")
        except BaseException as error:
            said = b"!" + line(f"internal error: {type(error).__name__}: {error}").encode(errors="replace")
        while said:
            said = said[os.write(writer, said) :]
    finally:
        os._exit(0)


def keep_only(fds: set[int]) -> None:
    """Close all others, the standard ones included: a lock or a protocol's pipe must not live on with a child."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    for entry in os.listdir("/proc/self/fd"):
        number = int(entry)
        if number > 2 and number not in fds:
            try:
                os.close(number)
            except OSError:
                pass  # that of the listing


def _end(children: Sequence[_Child]) -> None:
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + _DIES_S
    for child in children:
        while os.waitpid(child.pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
