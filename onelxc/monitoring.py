"""In which words does OpenNebula want it? Text out of numbers, no look at the host.

3.2.1 joins everything that the probes print to one line and turns commas into newlines, even inside of quotes, so no
value holds one, nor a quote of its own; `run_probes` echoes it without quotes, so no `*` or `?` either. monitord's
parser (src/monitor, HostShare) drops numbers with a fraction in the host's values, but takes them in a VM's.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Mapping

from onelxc.host import Cpu, Memory, Traffic
from onelxc.usage import Io, Net, Usage

HYPERVISOR = "lxc"
"""What schedulers, marketplaces and Sunstone look for, however the driver's directory is called."""

OS_KEYS = ("OS_ID", "OS_TYPE", "OS_VERSION", "OS_MACHINE", "OS_NAME")


def word(text: str) -> str:
    """A value in quotes, without the characters that one generation or the other would take for something else."""
    return f'"{_plain(text)}"'


def _plain(text: str) -> str:
    return " ".join("".join(" " if c in ",\"'\\*?[]`$" or not c.isprintable() else c for c in text).split())


def lines(values: Mapping[str, object]) -> str:
    """`KEY=VALUE` lines; in quotes only what needs them."""
    text = ""
    for key, value in values.items():
        plain = _plain(str(value))
        bare = plain.isascii() and plain.replace(".", "").replace("-", "").replace("_", "").isalnum()
        text += f"{key}={plain}\n" if bare else f'{key}="{plain}"\n'
    return text


def host_facts(cpu: Cpu, memory: Memory, speed_mhz: int) -> dict[str, object]:
    """What a host is: 100 for each core, MHz, KiB."""
    return {
        "HYPERVISOR": HYPERVISOR,
        "TOTALCPU": cpu.processors * 100,
        "CPUSPEED": speed_mhz,
        "TOTALMEMORY": memory.total_kib,
    }


def host_usage(cpu: Cpu, used_share: float, memory: Memory, traffic: Traffic) -> dict[str, object]:
    """What is in use of it. `used_share` is 0 to 1 of all processors."""
    used = round(cpu.processors * 100 * min(1.0, max(0.0, used_share)))
    return {
        "USEDMEMORY": memory.total_kib - memory.free_kib,
        "FREEMEMORY": memory.free_kib,
        "FREECPU": cpu.processors * 100 - used,
        "USEDCPU": used,
        "NETRX": traffic.received,
        "NETTX": traffic.sent,
    }


def poll(state: str, usage: Usage | None) -> str:
    """3.2.1's answer to `poll`: one line, no token without `=`. `state` is a (running) or d (gone)."""
    cpu, memory, net = (usage.cpu_percent, usage.memory_kib, usage.net) if usage else (0.0, 0, Net())
    if state == "d":
        return "STATE=d\n"
    return f"STATE={state} USEDCPU={cpu:.1f} USEDMEMORY={memory} NETRX={net.received} NETTX={net.sent}\n"


def vm_state(vm_id: int, deploy_id: str, state: str) -> str:
    """One VM for vm/status. States other than RUNNING, SUSPENDED, POWEROFF, FAILURE change nothing in oned
    (InformationManager.cc, test_and_trigger), but keep the VM from being taken for missing.
    """
    return f'VM = [ ID="{vm_id}", DEPLOY_ID="{deploy_id}", STATE="{state}" ]\n'


def all_states() -> str:
    """Says that every VM of the host follows; those that do not are off."""
    return "SYNC_STATE=yes\nMISSING_STATE=POWEROFF\n"


def vm_monitor(vm_id: int, deploy_id: str, values: str) -> str:
    """One VM for vm/monitor and vm/snapshot; `values` are its lines."""
    return f'VM = [ ID="{vm_id}", DEPLOY_ID="{deploy_id}", MONITOR="{base64(values)}" ]\n'


def vm_usage(usage: Usage) -> str:
    """A container's numbers, in the words of OpenNebula's own probes (im/lib/domain.rb), and some more."""
    io: Io = usage.io
    values: dict[str, object] = {
        "MEMORY": usage.memory_kib,
        "NETRX": usage.net.received,
        "NETTX": usage.net.sent,
        "DISKRDBYTES": io.read_bytes,
        "DISKWRBYTES": io.written_bytes,
        "DISKRDIOPS": io.reads,
        "DISKWRIOPS": io.writes,
        "OOM_KILLS": usage.oom_kills,
        "TASKS": usage.tasks,
    }
    text = f'CPU="{usage.cpu_percent:.2f}"\n' + lines(values)
    if usage.addresses:
        # a list in quotes, as KVM's guest agent gives it
        text += f'GUEST_IP="{usage.addresses[0]}"\nGUEST_IP_ADDRESSES="{",".join(usage.addresses)}"\n'
    return text


def guest_os(release: Mapping[str, str]) -> str:
    """What the guest's /etc/os-release says. It is the tenant's file: only harmless characters get through."""
    return lines({key: release[key] for key in OS_KEYS if release.get(key)})


def disk_sizes(sizes_mb: Iterable[tuple[int, int]]) -> str:
    """(disk id, MB taken on the datastore)."""
    return "".join(f"DISK_SIZE = [ ID={disk}, SIZE={size} ]\n" for disk, size in sizes_mb)


def snapshot_sizes(sizes_mb: Iterable[tuple[int, int, int]]) -> str:
    """(disk id, snapshot id, MB taken on the datastore)."""
    return "".join(f"SNAPSHOT_SIZE = [ ID={snap}, DISK_ID={disk}, SIZE={size} ]\n" for disk, snap, size in sizes_mb)


def wild(name: str, cores: float, memory_mb: int, arch: str) -> str:
    """A container that OpenNebula did not make, offered for import. Without ID="-1" oned drops it (Host.cc,
    update_wilds).
    """
    template = lines({"NAME": name, "VCPU": max(1, round(cores)), "MEMORY": memory_mb, "HYPERVISOR": HYPERVISOR})
    template += f'CPU="{cores:g}"\nDEPLOY_ID={word(name)}\nOS=[ARCH="{arch}"]\n'
    return f'VM = [ ID="-1", VM_NAME={word(name)}, DEPLOY_ID={word(name)}, IMPORT_TEMPLATE="{base64(template)}" ]\n'


def base64(text: str) -> str:
    return binascii.b2a_base64(text.encode(), newline=False).decode()
