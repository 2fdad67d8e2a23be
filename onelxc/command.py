"""The one door for processes: how does a program run, and what does its failure read like?

Argument lists only, never a shell. A small environment of our own, stdin closed unless given, a time limit that
kills *and* reaps. Whatever outlives an action is started by `daemon`, with all descriptors on /dev/null, since
OpenNebula reads everything that is written to the action's own.
"""

from __future__ import annotations

import os
import selectors
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO

from onelxc.errors import CommandError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LONGEST_OUTPUT = 16 << 20
"""Of a program; a tenant may have a hundred thousand network interfaces to be listed."""
ENVIRONMENT: Mapping[str, str] = {"PATH": PATH, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "HOME": "/"}


def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,
    stdin: int | IO[bytes] | None = None,
    timeout_s: float | None = 60,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    ok: Sequence[int] = (0,),
    verb: str | None = None,
) -> bytes:
    """Run `argv`, give its stdout. CommandError when it cannot start, times out, or exits with a code not in `ok`.

    `verb` begins the error's text ("Cannot <verb>: …"); by default "run <program>".
    """
    doing = verb or f"run {os.path.basename(argv[0])}"
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE if input is not None else (stdin if stdin is not None else subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment if environment is not None else ENVIRONMENT),
            pass_fds=tuple(pass_fds),
        )
    except OSError as error:
        raise CommandError(f"Cannot {doing}: {argv[0]}: {error.strerror}") from error
    try:
        said = _gather(process, input, timeout_s)
    except subprocess.TimeoutExpired:
        raise CommandError(f"Cannot {doing}: no end after {timeout_s:g} s: {shlex.join(argv)}") from None
    except _TooMuchError:
        raise CommandError(f"Cannot {doing}: {argv[0]} wrote more than {LONGEST_OUTPUT >> 20} MiB") from None
    if process.returncode in ok:
        return bytes(said["out"])
    text = said["err"].decode(errors="replace").strip()
    last = " / ".join(line.strip() for line in text.splitlines()[-3:] if line.strip())
    if process.returncode < 0:
        cause = f"{argv[0]} was killed by signal {-process.returncode}"
    else:
        cause = last or f"{argv[0]} ended with exit code {process.returncode}"
    raise CommandError(f"Cannot {doing}: {cause}", status=process.returncode, stderr=text)


class _TooMuchError(Exception):
    """A program wrote more than anybody wants to know."""


def _gather(process: subprocess.Popen[bytes], input: bytes | None, timeout_s: float | None) -> dict[str, bytearray]:
    """What the program writes, until it has ended. It is killed and reaped where that takes too long or is too much."""
    said = {"out": bytearray(), "err": bytearray()}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    waiting = memoryview(input or b"")
    streams = ((process.stdout, "out"), (process.stderr, "err"), (process.stdin, "in"))
    try:
        with selectors.DefaultSelector() as selector:
            for stream, name in streams:
                if stream is not None:
                    os.set_blocking(stream.fileno(), False)
                    selector.register(stream, selectors.EVENT_WRITE if name == "in" else selectors.EVENT_READ, name)
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise subprocess.TimeoutExpired(process.args, timeout_s or 0)
                for key, _ in selector.select(left):
                    if key.data == "in":
                        waiting = waiting[_write(key.fd, waiting[:65536]) :]
                        ended = not waiting
                    else:
                        data = os.read(key.fd, 65536)
                        said[key.data] += data
                        ended = not data
                    if ended:
                        selector.unregister(key.fileobj)
                        next(stream for stream, name in streams if name == key.data and stream).close()
                if max(map(len, said.values())) > LONGEST_OUTPUT:
                    raise _TooMuchError
            process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        for stream, _ in streams:
            if stream is not None:
                stream.close()
    return said


def _write(fd: int, data: memoryview) -> int:
    """How much of it was taken; a program that does not want it takes all."""
    try:
        return os.write(fd, data) if data else 0
    except BrokenPipeError:
        return len(data)


def daemon(argv: Sequence[str]) -> None:
    """Start a program that outlives us: a session of its own, descriptors on /dev/null, no child of ours to reap."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        return
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        null = os.open(os.devnull, os.O_RDWR)
        for target in (0, 1, 2):
            os.dup2(null, target)
        os.closerange(3, 4096)
        os.chdir("/")
        os.execve(argv[0], list(argv), dict(ENVIRONMENT))
    finally:
        os._exit(127)
