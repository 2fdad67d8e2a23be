"""How is a command run in a container, cancelled, and its result told once? The verbs behind `exec` and vm/execution.

A command runs through all the namespaces of the container's init, as root of the container, in its control groups,
with no more capabilities than init has. No agent is needed in the guest. One command at a time for a VM, as
OpenNebula has it.

7.4 sets STATUS=EXECUTING when the *action* has been answered (LifeCycleStates.cc, trigger_exec_success), over whatever
was reported by then, so a result is held back for a moment. Files: see `executions`.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onelxc import command, containers, executions, jsontext, kernelfile, names, samples
from onelxc.errors import HypervisorError, NoSuchDomainError, NotSupportedError, TemplateError
from onelxc.model import VmPaths
from onelxc.root import apart, apparmor, cgroups, durable, freezer, named_group, orphans, syscalls
from onelxc.root.exec_runner import BEGUN, Result, Runner, Target
from onelxc.root.work import Work

if TYPE_CHECKING:
    from onelxc.config import HostConfig

HOLD_S = 4.0
BEGIN_S = 30.0
CANCEL_S = 30.0
NOBODY = 65534
COMMAND_LIMIT = 64 * 1024
STDIN_LIMIT = 1024 * 1024
ANSWER_LIMIT = 40 * 1024
"""Bytes of output in one answer of the probe, which has to fit a datagram of 64 KiB."""

_NAMESPACES = {
    "user": syscalls.CLONE_NEWUSER,
    "mnt": syscalls.CLONE_NEWNS,
    "pid": syscalls.CLONE_NEWPID,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
}


def start(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb `exec`: `{"command": text, "stdin": base64}`. Returns once the command has begun."""
    text, stdin = _asked(work.vm_id, request)
    if executions.running(work.vm_id):
        raise HypervisorError(
            f"Cannot execute in {names.deploy_id(work.vm_id)}: a command is still being executed there"
        )
    if freezer.reason(work.vm_id):
        raise HypervisorError(f"Cannot execute in {names.deploy_id(work.vm_id)}: it is suspended")
    forget(work.vm_id)
    begin(work.vm_id, text, stdin, work.config.exec_timeout_s)
    return {}


def cancel(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb `exec_cancel`: the command is killed, nothing is reported. No command is success."""
    runner = executions.running(work.vm_id)
    deadline = time.monotonic() + CANCEL_S
    while runner and executions.running(work.vm_id):
        try:
            os.kill(runner, signal.SIGTERM)
        except ProcessLookupError:
            break
        if time.monotonic() > deadline:
            raise HypervisorError(f"Cannot cancel the command in {names.deploy_id(work.vm_id)}: it does not end")
        time.sleep(0.02)
    forget(work.vm_id)
    return {}


def finished(config: HostConfig, request: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """The one-shot verb `executions`: `{"vms": [{"id", "pid", "status", "code", "stdout", "stderr"}]}`, each told once.

    stdout and stderr in base64. A result of a VM that no longer runs is dropped: oned has set CANCELLED by itself.
    """
    told: list[dict[str, Any]] = []
    size = 0
    for vm_id, path in executions.pending():
        if not _controller(vm_id):
            forget(vm_id)
            continue
        try:
            with open(path) as file:
                result = jsontext.loads(file.read()) if path.endswith(".done") else _lost()
        except (OSError, ValueError):
            result = _lost()
        size += len(result["stdout"]) + len(result["stderr"])
        if told and size > ANSWER_LIMIT:
            break
        forget(vm_id)
        told.append({"id": vm_id, **result})
    return {"vms": told}


def forget(vm_id: int) -> None:
    """Remove what is kept of the VM's last command. Also for `release`."""
    for kind in ("run", "done", "run.tmp", "done.tmp"):
        durable.remove(executions.path(vm_id, kind))


def begin(vm_id: int, text: str, stdin: bytes, limit_s: float, *, told: bool = True) -> None:
    """Start the command with a process that attends it. HypervisorError if it cannot be executed.

    One that is not to be `told` of is ours, not the user's: it leaves no result and is in no other's way.
    """
    target = find(vm_id)
    os.makedirs(executions.DIRECTORY, 0o755, exist_ok=True)
    begun, on_start = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            _daemon(vm_id, Runner(target, text, stdin, limit_s, BEGIN_S), on_start, told=told)
    finally:
        for fd in (on_start, target.pidfd, *target.groups):
            os.close(fd)
    os.waitpid(child, 0)
    with open(begun, "rb") as answer:
        said = answer.read().decode(errors="replace")
    if said != BEGUN:
        raise HypervisorError(f"Cannot execute in {names.deploy_id(vm_id)}: {said or 'its attendant died'}")


def _daemon(vm_id: int, runner: Runner, on_start: int, *, told: bool) -> None:
    """In a forked child: become the process that attends the command. Never returns."""
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGIO, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda _number, _frame: runner.cancel())
        apart.keep_only({on_start, runner.target.pidfd, *runner.target.groups})
        os.environ.clear()
        os.environ.update(command.ENVIRONMENT)
        if not told:
            runner.run(on_start)
            return
        who = f"{os.getpid()} {executions.start_time(os.getpid())}"
        try:
            durable.replace(executions.path(vm_id, "run"), who.encode(), mode=0o644, flush=False)
        except OSError as error:
            os.write(on_start, f"{executions.DIRECTORY}: {error.strerror}".encode())
            return
        not_before = samples.now_s() + HOLD_S
        result = runner.run(on_start)
        if result.begun and not result.cancelled and os.path.isdir(VmPaths(vm_id).state):
            # if that fails, the file of who attended it stays: it is told that there is no result
            at = max(not_before, samples.now_s())
            durable.replace(
                executions.path(vm_id, "done"), json.dumps(_told(result)).encode(), modified=at, flush=False
            )
        durable.remove(executions.path(vm_id, "run"))
    finally:
        os._exit(0)


def find(vm_id: int) -> Target:
    """The container's init, held so that a process number used anew is nobody else's."""
    name = names.deploy_id(vm_id)
    deadline = time.monotonic() + BEGIN_S
    while True:
        controller = _controller(vm_id)
        init = next(iter(orphans.children(controller)), 0) if controller else 0
        if init and _executed(init):
            break
        if not controller or time.monotonic() > deadline:
            raise NoSuchDomainError(f"Cannot execute in {name}: it does not run on this host")
        time.sleep(0.01)  # between create and the execution of init
    pidfd = os.pidfd_open(init)
    groups: list[int] = []
    try:
        spaces = _different_namespaces(init)
        if not spaces & syscalls.CLONE_NEWPID or not spaces & syscalls.CLONE_NEWNS:
            raise NotSupportedError(f"Cannot execute in {name}: it has no namespaces of its own")
        groups.extend(_groups(vm_id, controller, init))
        bounding = int(kernelfile.status(init, "CapBnd") or "0", 16)
        root = _root_of(init)
        profile = apparmor.label(init)
        limits = tuple((kind, resource.prlimit(init, kind)) for kind in _limit_kinds())
        if init not in orphans.children(controller):
            raise NoSuchDomainError(f"Cannot execute in {name}: it has just ended")
    except OSError as error:
        _close(pidfd, *groups)
        raise HypervisorError(f"Cannot execute in {name}: {error.filename}: {error.strerror}") from error
    except BaseException:
        _close(pidfd, *groups)
        raise
    return Target(
        init=init,
        pidfd=pidfd,
        groups=tuple(groups),
        namespaces=spaces,
        bounding=bounding,
        no_new_privileges=kernelfile.status(init, "NoNewPrivs") == "1",
        root=root,
        limits=limits,
        profile=profile,
    )


def _controller(vm_id: int) -> int:
    return next((one.controller for one in containers.running() if one.vm_id == vm_id), 0)


def _executed(init: int) -> bool:
    """Whether init is what the image brought, and no longer libvirt's own process about to execute it. By its name: to
    look at its program may wait for a file system that the tenant serves."""
    return orphans.comm(init) not in (orphans.CONTROLLER, "")


def _different_namespaces(init: int) -> int:
    """The kinds in which init is not where we are. Entering one's own user namespace is an error."""
    spaces = 0
    for kind, flag in _NAMESPACES.items():
        if not os.path.samestat(os.stat(f"/proc/self/ns/{kind}"), os.stat(f"/proc/{init}/ns/{kind}")):
            spaces |= flag
    return spaces


def _groups(vm_id: int, controller: int, init: int) -> list[int]:
    """cgroup.procs of the container's groups, open for writing.

    v1: the container's own in each hierarchy, wherever a privileged init has gone. v2: init's own, since a group that
    a systemd inside has divided takes no processes, if it lies in the container's; else the container's.
    """
    fds: list[int] = []
    for group in cgroups.groups(vm_id):
        if group.controller == controller:
            path = group.path if group.kind else _unified(group.path, init)
            fds.append(os.open(os.path.join(path, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC))
    if not fds:
        raise HypervisorError(f"Cannot execute in {names.deploy_id(vm_id)}: its control groups are not found")
    named = named_group.procs(vm_id)
    if named is not None:
        fds.append(os.open(named, os.O_WRONLY | os.O_CLOEXEC))
    return fds


def _unified(path: str, init: int) -> str:
    with open(f"/proc/{init}/cgroup", "rb") as file:
        own = next((os.fsdecode(line[3:-1]) for line in file if line.startswith(b"0::")), "")
    for point, kind in cgroups.hierarchies():
        whole = os.path.normpath(point + own)
        if not kind and whole.startswith(path + "/"):
            return whole
    return path


def _root_of(pid: int) -> tuple[int, int]:
    """The host's uid and gid of the container's root; nobody's for an init that made a namespace without one."""
    ids = []
    for kind in ("uid", "gid"):
        with open(f"/proc/{pid}/{kind}_map") as file:
            ids.append(next((int(line.split()[1]) for line in file if line.split()[0] == "0"), NOBODY))
    return ids[0], ids[1]


def _limit_kinds() -> list[int]:
    return sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})


def _asked(vm_id: int, request: dict[str, Any]) -> tuple[str, bytes]:
    text, stdin = request.get("command"), request.get("stdin", "")
    if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > COMMAND_LIMIT:
        raise TemplateError(f"Cannot execute in {names.deploy_id(vm_id)}: no command")
    try:
        data = base64.b64decode(stdin, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise TemplateError(f"Cannot execute in {names.deploy_id(vm_id)}: its input is not base64") from None
    if len(data) > STDIN_LIMIT:
        raise TemplateError(f"Cannot execute in {names.deploy_id(vm_id)}: more than {STDIN_LIMIT >> 10} KiB of input")
    return text, data


def _told(result: Result) -> dict[str, Any]:
    stderr = result.stderr + (f"onelxc: {result.error}\n".encode() if result.error else b"")
    return {
        "pid": result.pid,
        "status": "ERROR" if result.error else "DONE",
        "code": result.code,
        "stdout": base64.b64encode(result.stdout).decode(),
        "stderr": base64.b64encode(stderr).decode(),
    }


def _lost() -> dict[str, Any]:
    return _told(
        Result(
            0,
            137,
            b"",
            b"",
            "its result was lost: what attended the command was killed, or could not write to /run",
            begun=True,
        )
    )


def _close(*fds: int) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass
