"""What does one container use? CPU, memory, network, disks, addresses: from the kernel's files, as anybody may read.

Nothing here needs root, libvirt, or another process; a hundred containers cost some twenty milliseconds. What only root
can see (the guest's /etc/os-release, where its disks lie) comes from the helper: `helperinfo`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from onelxc import cgroup, containers, kernelfile, names, samples
from onelxc.containers import Container

_NET_BYTES = 256 << 10
_ADDRESSES = 32


class Net(NamedTuple):
    """Bytes, as the guest sees them."""

    received: int = 0
    sent: int = 0


class Io(NamedTuple):
    """Of all its disks, since they were mounted."""

    read_bytes: int = 0
    written_bytes: int = 0
    reads: int = 0
    writes: int = 0


class Usage(NamedTuple):
    """One container at one moment. `cpu_percent` is 100 for one core kept busy."""

    container: Container
    cpu_percent: float
    memory_kib: int
    net: Net
    io: Io
    addresses: tuple[str, ...]
    oom_kills: int
    tasks: int


class Readings:
    """What is read once for all containers, and kept till the next time under `name`."""

    def __init__(self, name: str, root: str = "") -> None:
        self.root = root
        self.mounted = cgroup.mounts(root)
        self.counters = samples.Counters(name)
        self._nics = _nics(root)
        self._devices = devices(root)

    def of(self, container: Container) -> Usage | None:
        """One container's usage; None if it has ended since it was listed."""
        groups = cgroup.of(container.controller, self.mounted, self.root)
        used_ns = cgroup.cpu_ns(groups)
        if used_ns is None:
            return None
        return Usage(
            container,
            self._cpu_percent(container, used_ns),
            cgroup.memory_kib(groups),
            self._net(container.vm_id),
            self._io(container.vm_id),
            addresses(container, self.root),
            cgroup.oom_kills(groups),
            cgroup.tasks(groups),
        )

    def keep(self) -> None:
        self.counters.keep()

    def _cpu_percent(self, container: Container, used_ns: int) -> float:
        since_last = self.counters.add(container.key, used_ns)
        if since_last:
            grown, passed = since_last
        else:
            grown, passed = used_ns, self.counters.at_s - containers.started_s(container, self.root)
        return grown / 1e7 / max(passed, 0.01)

    def _net(self, vm_id: int | None) -> Net:
        received = sent = 0
        for device in self._nics.get(vm_id, ()):
            base = f"{self.root}/sys/class/net/{device}/statistics"
            # this is the host's end of the veth pair: what it sends the guest receives
            received += kernelfile.number(f"{base}/tx_bytes") or 0
            sent += kernelfile.number(f"{base}/rx_bytes") or 0
        return Net(received, sent)

    def _io(self, vm_id: int | None) -> Io:
        total = Io()
        for device in self._devices.get(vm_id, ()):
            now = _io_counted(f"{self.root}/sys/dev/block/{device}/stat")
            before = _io_counted(f"{self.root}{names.IO_COUNTERS}/{device}")
            total = Io(*(sum_ + max(0, a - b) for sum_, a, b in zip(total, now, before)))
        return total


def addresses(container: Container, root: str = "") -> tuple[str, ...]:
    """The guest's addresses, IPv4 first, without loopback and link-local ones: /proc/PID/net is open to everybody. It
    may have a million: the first are told.
    """
    init = containers.init_of(container, root)
    if init is None:
        return ()
    found: dict[str, None] = {}
    address = ""
    for line in kernelfile.text(f"{root}/proc/{init}/net/fib_trie", _NET_BYTES).splitlines():
        words = line.split()
        if words[:1] == ["|--"] and len(words) > 1:
            address = words[1]
        elif words[:3] == ["/32", "host", "LOCAL"] and not address.startswith("127."):
            found[address] = None
    for line in kernelfile.text(f"{root}/proc/{init}/net/if_inet6", _NET_BYTES).splitlines():
        words = line.split()
        if len(words) >= 4 and words[3] not in ("10", "20"):
            found[_ipv6(words[0])] = None
    return tuple(found)[:_ADDRESSES]


def _ipv6(digits: str) -> str:
    import socket  # only where a guest has such an address

    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))


def _io_counted(path: str) -> Io:
    """Documentation/block/stat.rst: reads, merged, sectors of 512 bytes, ms, then the same of writes."""
    fields = [int(word) for word in kernelfile.text(path).split()[:7]]
    return Io(fields[2] * 512, fields[6] * 512, fields[0], fields[4]) if len(fields) == 7 else Io()


def _nics(root: str) -> dict[int | None, list[str]]:
    """The host's ends of the guests' NICs, `one-<vmid>-<nic>`, by VM."""
    found: dict[int | None, list[str]] = {}
    try:
        devices = os.listdir(f"{root}/sys/class/net")
    except OSError:
        devices = []
    for device in devices:
        domain, _, nic = device.rpartition("-")
        vm_id = names.vm_id_of(domain)
        if vm_id is not None and nic.isdigit():
            found.setdefault(vm_id, []).append(device)
    return found


def devices(root: str = "") -> dict[int | None, set[str]]:
    """Block devices (`major:minor`) that hold the VMs' mounted disks, by VM.

    Not blkio's or io.stat's counts: those see a loop device and the disk under it as two, and version 1 does not see
    what the page cache writes.
    """
    found: dict[int | None, set[str]] = {}
    for line in kernelfile.text(f"{root}/proc/self/mountinfo").split("\n"):
        if f" {names.MOUNTS}/" not in line:
            continue
        before, _, after = line.partition(" - ")
        words = before.split(" ")
        vm_id = words[4][len(names.MOUNTS) + 1 :].partition("/")[0]
        device = words[2]
        if device.startswith("0:"):  # btrfs numbers its subvolumes itself
            device = _number_of(after.split(" ")[1])
        if vm_id.isdigit() and device:
            found.setdefault(int(vm_id), set()).add(device)
    return found


def _number_of(path: str) -> str:
    try:
        number = os.stat(path).st_rdev
    except OSError:
        return ""
    return f"{os.major(number)}:{os.minor(number)}" if number else ""
