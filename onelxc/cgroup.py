"""Where are a container's control groups, and what do they count? Version 1 and 2, both read only.

A container's groups are those of its controller process: no layout of libvirt's or systemd's has to be known. Under
systemd and version 2 the controller sits in `…scope/libvirt`, which counts memory and limits it; version 1 has one
directory for each controller.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from onelxc import kernelfile

_GROUPS = 500


class Groups(NamedTuple):
    """The directories of one process. `unified` is "" on version 1; `separate` has a directory for each controller."""

    unified: str
    separate: dict[str, str]


def mounts(root: str = "") -> Groups:
    """Where the hierarchies are mounted, in the same shape. A cgroup2 mount beside controllers of version 1 counts
    nothing (systemd's hybrid layout) and is left out.
    """
    unified = ""
    separate: dict[str, str] = {}
    for line in kernelfile.text(f"{root}/proc/mounts").splitlines():
        _, point, kind, options = line.split(" ")[:4]
        if kind == "cgroup2":
            unified = unified or root + point
        elif kind == "cgroup":
            for option in options.split(","):
                separate.setdefault(option, root + point)
    return Groups("", separate) if "memory" in separate or "cpuacct" in separate else Groups(unified, {})


def version(mounted: Groups) -> int:
    """1 or 2, as OpenNebula's CGROUPS_VERSION wants it."""
    return 2 if mounted.unified or not mounted.separate else 1


def of(pid: int, mounted: Groups, root: str = "") -> Groups:
    """The groups of a process; empty if it has gone."""
    unified = ""
    separate: dict[str, str] = {}
    for line in kernelfile.text(f"{root}/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            unified = mounted.unified and _whole(mounted.unified + path)
        for controller in filter(None, controllers.split(",")):
            if controller in mounted.separate and path != "/":
                separate[controller] = mounted.separate[controller] + path
    return Groups(unified, separate)


def _whole(path: str) -> str:
    """The group that holds the whole container: a controller may have been moved further down by a systemd guest."""
    head, found, tail = path.partition(".scope/")
    if not found:
        return path
    inner = f"{head}.scope/{tail.split('/')[0]}"
    return inner if os.path.exists(f"{inner}/memory.current") else f"{head}.scope"


def cpu_ns(groups: Groups) -> int | None:
    """CPU time used since the group was made."""
    if groups.unified:
        used = kernelfile.table(f"{groups.unified}/cpu.stat").get("usage_usec")
        return None if used is None else used * 1000
    return kernelfile.number(f"{groups.separate.get('cpuacct', '')}/cpuacct.usage")


def memory_kib(groups: Groups) -> int:
    """Memory in use, without the page cache that the kernel would give up at once (`inactive_file`)."""
    if groups.unified:
        used = kernelfile.number(f"{groups.unified}/memory.current")
        cache = kernelfile.table(f"{groups.unified}/memory.stat").get("inactive_file", 0)
    else:
        directory = groups.separate.get("memory", "")
        used = kernelfile.number(f"{directory}/memory.usage_in_bytes")
        cache = kernelfile.table(f"{directory}/memory.stat").get("total_inactive_file", 0)
    return max(0, (used or 0) - cache) // 1024


def memory_limit_kib(groups: Groups) -> int | None:
    """The memory limit, None if there is none."""
    if groups.unified:
        limit = kernelfile.number(f"{groups.unified}/memory.max")
    else:
        limit = kernelfile.number(f"{groups.separate.get('memory', '')}/memory.limit_in_bytes")
    # version 1 says "none" as the largest multiple of a page
    return None if limit is None or limit > 1 << 60 else limit // 1024


def cpu_quota(groups: Groups) -> float | None:
    """How many cores it may use, None if it may use all."""
    if groups.unified:
        words = kernelfile.text(f"{groups.unified}/cpu.max").split()
    else:
        directory = groups.separate.get("cpu", "")
        words = [kernelfile.text(f"{directory}/cpu.cfs_{name}_us") for name in ("quota", "period")]
    if len(words) != 2 or not words[0].isdigit() or not words[1].isdigit():
        return None
    return int(words[0]) / max(1, int(words[1]))


def oom_kills(groups: Groups) -> int:
    """How many processes the kernel has killed because the group's memory was used up."""
    if groups.unified:
        return kernelfile.table(f"{groups.unified}/memory.events").get("oom_kill", 0)
    return kernelfile.table(f"{groups.separate.get('memory', '')}/memory.oom_control").get("oom_kill", 0)


def tasks(groups: Groups) -> int:
    """How many tasks (processes and threads) live in it."""
    if groups.unified:
        current = kernelfile.number(f"{groups.unified}/pids.current")
        if current is not None:
            return current
    # libvirt uses no pids controller on version 1; a privileged systemd makes groups of its own below
    top = groups.unified or groups.separate.get("cpuacct", "")
    file = "cgroup.threads" if groups.unified else "tasks"
    return sum(len(kernelfile.text(f"{path}/{file}").split()) for path in _below(top)) if top else 0


def _below(top: str) -> list[str]:
    """A group and those below it, of which a tenant may make as many, and as deep, as he likes: the first."""
    found = [top]
    for path in found:
        try:
            with os.scandir(path) as entries:
                found += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        if len(found) > _GROUPS:
            break
    return found[:_GROUPS]


def frozen(groups: Groups) -> bool:
    """Whether the freezer holds it, whoever asked for that."""
    if groups.unified:
        # our helper freezes the scope, and a group's own file does not tell of its parents
        parent = os.path.dirname(groups.unified)
        return any(kernelfile.table(f"{path}/cgroup.events").get("frozen") == 1 for path in (groups.unified, parent))
    return kernelfile.text(f"{groups.separate.get('freezer', '')}/freezer.state") in ("FROZEN", "FREEZING")
