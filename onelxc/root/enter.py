"""How does one process of root's become one of a container's, without bringing anything of the host with it?

A program of its own (`python3 -I -S enter.py DESCRIPTOR`), started by `exec_runner` with a JSON description on that
descriptor. It joins the container's control groups and namespaces, forks (a pid namespace begins with the child),
gives up what the container's init has not got, and executes the command. The parent stays outside of the pid
namespace, waits, and says on the report pipe what happened: `P <pid inside>`, then `X <status>`, or `E <why not>`.

What a hostile container could reach is the child between fork and exec, while it is in the container's /proc and still
the host's interpreter. Against that (CVE-2016-9962, CVE-2019-5736):

* It is not dumpable: `exe`, `fd`, `map_files`, `mem`, `environ` and ptrace are refused to whoever has no CAP_SYS_PTRACE
  on the *host*.
* A privileged container has that. So the interpreter, its libraries and everything else that was opened were opened
  through mounts that are read-only, in a mount namespace that nobody can enter any more.
* It has no descriptor but the command's three pipes and, until exec, the report pipe.
* Nothing is imported or opened by name once it has entered: names belong to the tenant then.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shlex
import signal
import sys
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))

from onelxc.root import syscalls

SHELL = "/bin/sh"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": SHELL,
    "LANG": "C.UTF-8",
    "container": "lxc-libvirt",
}

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_NR_KEYCTL = {"x86_64": 250, "aarch64": 219, "ppc64le": 271, "s390x": 280, "riscv64": 219}
_KEYCTL_JOIN_SESSION_KEYRING = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    ctypes.set_errno(0)
    if _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl {option}")


def _limit(kind: int, soft: int, hard: int) -> None:
    """Set a resource limit; where even root may not raise it (no CAP_SYS_RESOURCE), to the most that is left."""
    try:
        resource.setrlimit(kind, (soft, hard))
    except ValueError:
        most = resource.getrlimit(kind)[1]
        infinite = resource.RLIM_INFINITY
        resource.setrlimit(kind, (most if soft == infinite or soft > most != infinite else soft, most))


def main(argument: str) -> None:
    """Never returns."""
    descriptor = int(argument)
    spec = json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    os.close(descriptor)
    report = int(spec["report"])
    try:
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for kind, limits in spec["limits"]:
            _limit(kind, *limits)
        for group in spec["groups"]:
            os.write(group, b"0")
            os.close(group)
        keyctl = _NR_KEYCTL.get(os.uname().machine)
        if keyctl is not None:
            _libc.syscall(ctypes.c_long(keyctl), ctypes.c_int(_KEYCTL_JOIN_SESSION_KEYRING), None)
        os.set_inheritable(report, False)
        command = str(spec["command"])
        words = _words(command)
        syscalls.setns(spec["pidfd"], spec["namespaces"])
        os.close(spec["pidfd"])
        pid = os.fork()
    except BaseException as error:
        _fail(report, error)
    if pid == 0:
        _inside(spec, command, words, report)
    for stream in (0, 1, 2):
        os.close(stream)
    _, status = os.waitpid(pid, 0)
    code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    os.write(report, b"X %d\n" % code)
    os._exit(0)


def _inside(spec: dict[str, Any], command: str, words: list[str], report: int) -> None:
    """The child, which the container can see. Never returns."""
    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        _prctl(_PR_SET_DUMPABLE, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for capability in range(int(spec["last_capability"]) + 1):
            if not spec["bounding"] >> capability & 1:
                _prctl(_PR_CAPBSET_DROP, capability)
        if spec["no_new_privileges"]:
            _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        os.write(report, b"P %d\n" % os.getpid())
        try:
            os.execve(SHELL, ["sh", "-c", command], ENVIRONMENT)
        except FileNotFoundError:  # an image with nothing but its own program
            _execute(words)
    except BaseException as error:
        _fail(report, error)


def _execute(words: list[str]) -> None:
    """Without a shell in the image: the words as they are."""
    if "/" in words[0]:
        os.execve(words[0], words, ENVIRONMENT)
    for directory in ENVIRONMENT["PATH"].split(":"):
        try:
            os.execve(f"{directory}/{words[0]}", words, ENVIRONMENT)
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise FileNotFoundError(2, "neither the program nor /bin/sh is in the container", words[0])


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command) or [command]
    except ValueError:
        return [command]


def _fail(report: int, error: BaseException) -> None:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    try:
        os.write(report, b"E " + text.encode(errors="replace").replace(b"\n", b" ")[:500] + b"\n")
    finally:
        os._exit(126)


if __name__ == "__main__":
    main(sys.argv[1])
