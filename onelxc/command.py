"""The one door for processes: how does a program run, and what does its failure read like?

Argument lists only, never a shell. A small environment of our own, stdin closed unless given, a time limit that
kills *and* reaps. Whatever outlives an action is started by `daemon`, with all descriptors on /dev/null, since
OpenNebula reads everything that is written to the action's own.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from onelxc.errors import CommandError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
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
        out, err = process.communicate(input, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise CommandError(f"Cannot {doing}: no end after {timeout_s:g} s: {shlex.join(argv)}") from None
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode in ok:
        return out
    text = err.decode(errors="replace").strip()
    said = " / ".join(line.strip() for line in text.splitlines()[-3:] if line.strip())
    if process.returncode < 0:
        cause = f"{argv[0]} was killed by signal {-process.returncode}"
    else:
        cause = said or f"{argv[0]} ended with exit code {process.returncode}"
    raise CommandError(f"Cannot {doing}: {cause}", status=process.returncode, stderr=text)


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
