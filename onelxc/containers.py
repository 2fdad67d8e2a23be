"""Which containers does libvirt run on this host, and as which processes? All of them, ours and others.

libvirt keeps `/run/libvirt/lxc/NAME.pid` for each, with the number of its controller process, readable by everyone.
A stale file is told by the process it names. Asking libvirtd instead costs a probe five times as much, and a daemon
that hangs would take the monitoring with it. Says nothing of what a container uses: that is `usage`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from onelxc import kernelfile, names
from onelxc.errors import HypervisorError

DIRECTORY = "/run/libvirt/lxc"


class Container(NamedTuple):
    """One running container. `controller` is libvirt's process for it, and its libvirt id."""

    name: str
    controller: int

    @property
    def vm_id(self) -> int | None:
        """The VM's id, None if the name is not one of OpenNebula's."""
        return names.vm_id_of(self.name)

    @property
    def key(self) -> str:
        """What tells this run of the container from the one before its reboot."""
        return f"{self.name}/{self.controller}"


def running(root: str = "") -> list[Container]:
    """All running containers, by name. HypervisorError if libvirt's directory cannot be listed."""
    directory = root + DIRECTORY
    try:
        entries = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []  # libvirt's LXC driver has not run since the host started
    except OSError as error:
        raise HypervisorError(f"Cannot list the containers: {directory}: {error.strerror}") from error
    found = []
    for entry in entries:
        name, suffix = os.path.splitext(entry)
        controller = kernelfile.number(f"{directory}/{entry}") if suffix == ".pid" else None
        if controller and _is_controller_of(name, controller, root):
            found.append(Container(name, controller))
    return found


def _is_controller_of(name: str, pid: int, root: str) -> bool:
    """Whether it is still `libvirt_lxc --name NAME …` and not another process with a number used again."""
    if not kernelfile.is_the_hosts(pid, root):
        return False
    arguments = kernelfile.text(f"{root}/proc/{pid}/cmdline").split("\0")
    return arguments[0].endswith("libvirt_lxc") and name in arguments


def init_of(container: Container, root: str = "") -> int | None:
    """The container's first process, as the host numbers it; None while the container starts or ends."""
    pid = container.controller
    children = kernelfile.text(f"{root}/proc/{pid}/task/{pid}/children").split()
    return int(children[0]) if children else None


def started_s(container: Container, root: str = "") -> float:
    """When the controller was started, in seconds since the host's boot."""
    stat = kernelfile.text(f"{root}/proc/{container.controller}/stat").rpartition(")")[2].split()
    # field 22 of proc(5), in ticks; what follows the name begins with field 3
    return int(stat[19]) / os.sysconf("SC_CLK_TCK") if len(stat) > 19 else 0.0
