"""How does a container end when nobody may be left to end it?

By its processes, as the kernel has them: whatever libvirt believes, what is in the VM's control groups, or sees the
VM's root file system as its own `/`, is killed; the controller last, since with libvirtd running it is what makes
libvirt clean up by itself. Frozen ones are thawed first, since a frozen process does not even die on cgroup v1.
Then the domain's name is freed in libvirt, where one that ended while libvirtd was away blocks it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator

from onelxc import command, kernelfile, names
from onelxc.errors import CommandError, HypervisorError, line
from onelxc.root import cgroups

VIRSH = ("virsh", "-q", "-c", "lxc:///")
CONTROLLER = "libvirt_lxc"
LIBVIRT_STATE = "/run/libvirt/lxc"
DEATH_S = 20.0
CONTROLLER_ENDS_S = 2.0


def end(vm_id: int) -> None:
    """End the VM's container: all its processes gone, its groups removed, its name free. HypervisorError if not."""
    deadline = time.monotonic() + DEATH_S
    controller_deadline = time.monotonic() + CONTROLLER_ENDS_S
    while True:
        found = cgroups.groups(vm_id)
        controllers = {group.controller for group in found if is_controller(group.controller)}
        # with init its namespace ends, and nobody is left who could make processes and groups while we look for them
        for controller in controllers:
            for init in children(controller):
                kill(init)
        running = set(_alive(found))
        if not running:
            break
        thaw(found)
        for pid in running - controllers:
            kill(pid)
        if time.monotonic() > controller_deadline:
            for pid in controllers:
                kill(pid)
        if time.monotonic() > deadline:
            left = ", ".join(map(describe, sorted(running)))
            raise HypervisorError(f"Cannot end {names.deploy_id(vm_id)}: these processes do not die: {left}")
        time.sleep(0.01)
    _forget_domain(vm_id)
    for group in cgroups.groups(vm_id):
        try:
            cgroups.remove(group.path)
        except OSError as error:
            raise HypervisorError(f"Cannot remove the control group {group.path}: {error.strerror}") from error


def alive(vm_id: int) -> bool:
    """Whether any process of the VM's container is there, its controller included."""
    return any(_alive(cgroups.groups(vm_id)))


def _alive(found: tuple[cgroups.Group, ...]) -> Iterator[int]:
    for group in found:
        try:
            yield from (pid for pid in cgroups.each_process(group.path) if not is_dead(pid))
        except TimeoutError as error:
            raise HypervisorError(f"Cannot look at the control group {group.path}: {error.strerror}") from error


def is_dead(pid: int) -> bool:
    """Gone, or a zombie that waits for a parent to ask for its exit code."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except OSError:
        return True


def thaw(found: tuple[cgroups.Group, ...]) -> None:
    """Let frozen groups go on."""
    for group in found:
        if group.kind == "freezer":
            cgroups.write_below(group.path, "freezer.state", "THAWED")
        elif not group.kind and os.path.exists(os.path.join(group.path, "cgroup.freeze")):
            cgroups.write_below(group.path, "cgroup.freeze", "0")


def children(pid: int) -> tuple[int, ...]:
    """The children of a process's main thread: of a controller, the container's init."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return tuple(int(child) for child in file.read().split())
    except OSError:
        return ()


def processes_of(groups: Iterable[cgroups.Group]) -> tuple[int, int] | None:
    """libvirt's controller of the container in these groups, and its process 1; None where it does not run."""
    for controller in {group.controller for group in groups}:
        if is_controller(controller):
            for child in children(controller):
                if not is_dead(child):
                    return controller, child
    return None


def is_controller(pid: int) -> bool:
    """Whether the process is libvirt's for a container, and none of a container's that calls itself so."""
    return comm(pid) == CONTROLLER and kernelfile.is_the_hosts(pid)


def comm(pid: int) -> str:
    """The name of a process, "" if it is gone."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return line(file.read().decode(errors="replace")) or "?"
    except OSError:
        return ""


def describe(pid: int) -> str:
    """`bash (4711)`, for an error's text."""
    return f"{comm(pid) or 'process'} ({pid})"


def kill(pid: int) -> None:
    """SIGKILL; who is gone already is fine."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _forget_domain(vm_id: int) -> None:
    """Free the name: wait until libvirt has noticed the end; a zombie, which it has no file of, goes by destroy.

    A libvirtd that does not run is no error; it must only not find the container in its files when it comes back, for
    that would be a zombie that keeps the name from a VM that is not ours any more. One that runs leaves them too, when
    its destroy failed: it forgets the container then without having cleaned up (lxcDomainDestroyFlags does not ask
    what virLXCProcessStop returned; seen on Debian 12, whose group went away while libvirt counted its tasks).
    """
    name = names.deploy_id(vm_id)
    noticed = time.monotonic() + CONTROLLER_ENDS_S
    while _has_state_file(name) and time.monotonic() < noticed:
        time.sleep(0.01)
    deadline = time.monotonic() + DEATH_S
    while True:
        try:
            command.run([*VIRSH, "destroy", name], timeout_s=DEATH_S, verb=f"have libvirt forget {name}")
        except CommandError as error:
            text = str(error)
            # a daemon that hangs is as good as none: it notices the end when it goes on
            if error.status is None or "failed to connect" in text or "failed to get domain" in text:
                _remove_state_files(name)
                return
            # "domain is not running" is how libvirt says that it has just removed the zombie
            if time.monotonic() > deadline:
                raise HypervisorError(f"Cannot end {name}: {error}") from error
        time.sleep(0.02)


def _remove_state_files(name: str) -> None:
    for suffix in ("xml", "pid"):
        try:
            os.unlink(os.path.join(LIBVIRT_STATE, f"{name}.{suffix}"))
        except FileNotFoundError:
            pass


def _has_state_file(name: str) -> bool:
    return any(os.path.exists(os.path.join(LIBVIRT_STATE, f"{name}.{suffix}")) for suffix in ("xml", "pid"))
