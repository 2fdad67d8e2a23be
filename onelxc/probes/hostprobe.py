"""What is the host, and what is in use of it? host/system, host/monitor, and both in one for 3.2.1."""

from __future__ import annotations

import os
from collections.abc import Callable

from onelxc import __version__, cgroup, containers, host, monitoring, names, samples

GENERIC: dict[str, tuple[str, Callable[[], str]]] = {
    "architecture.sh": ("ARCH", host.architecture),
    "cpu.sh": ("MODELNAME", host.model_name),
    "name.sh": ("HOSTNAME", host.host_name),
}
"""Values that OpenNebula's own probes print, if they are there beside ours: twice would show twice."""


def pulled(state: str = "onelxc-host-pulled") -> str:
    """Everything at once: 3.2.1 has no other probe here."""
    cpu, memory = host.cpu(), host.memory()
    values = monitoring.host_facts(cpu, memory, host.cpu_speed_mhz())
    values.update(monitoring.host_usage(cpu, _used_share(cpu, state), memory, host.traffic()))
    values.update((key, tell()) for key, tell in GENERIC.values())
    return monitoring.lines(values)


def system(directory: str) -> str:
    """host/system; `directory` is where the probe lies, with OpenNebula's generic ones."""
    values = monitoring.host_facts(host.cpu(), host.memory(), host.cpu_speed_mhz())
    for file, (key, tell) in GENERIC.items():
        if not os.path.exists(f"{directory}/{file}"):
            values[key] = tell()
    mounted = cgroup.mounts()
    values["CGROUPS_VERSION"] = cgroup.version(mounted)
    values["ONELXC"] = __version__
    if not os.path.exists(names.HELPER):
        values["ONELXC_WARNING"] = f"{names.HELPER} is missing: run install.sh node on this host"
    return monitoring.lines(values) + _wilds(mounted)


def monitor(state: str = "onelxc-host-monitor") -> str:
    """host/monitor."""
    cpu, memory = host.cpu(), host.memory()
    values: dict[str, object] = {"HYPERVISOR": monitoring.HYPERVISOR}
    values.update(monitoring.host_usage(cpu, _used_share(cpu, state), memory, host.traffic()))
    return monitoring.lines(values)


def _used_share(cpu: host.Cpu, state: str) -> float:
    """0 to 1: since the last time, or since boot."""
    counters = samples.Counters(state)
    total, free = counters.add("total", cpu.total), counters.add("free", cpu.free)
    counters.keep()
    grown, idle = (total[0], free[0]) if total and free and total[0] > 0 else (cpu.total, cpu.free)
    return 1 - idle / max(1, grown)


def _wilds(mounted: cgroup.Groups) -> str:
    """Containers that OpenNebula did not make. Only looked at, never touched."""
    text = ""
    for container in containers.running():
        if container.vm_id is None:
            groups = cgroup.of(container.controller, mounted)
            cores = cgroup.cpu_quota(groups) or float(host.cpu().processors)
            limit_kib = cgroup.memory_limit_kib(groups) or host.memory().total_kib
            text += monitoring.wild(container.name, cores, limit_kib // 1024, host.architecture())
    return text


def beacon() -> str:
    """host/beacon: any text says that the host lives."""
    return f"{round(samples.now_s())}\n"
