"""What is a VM, once its template has been read? Frozen data, and every name and path derived from it.

Made by `template` (and completed with the operator's defaults there); read by `domainxml` and sent, as plain JSON, to
the root helper. Touches no clock, disk or daemon. Sizes carry their unit in the name. OpenNebula's words.
"""

from __future__ import annotations

import dataclasses
import enum
import posixpath
from dataclasses import dataclass
from typing import Any

from onelxc import names
from onelxc.errors import TemplateError

# said in `names`, for those who cannot afford this module; here they belong to the words of the model
DOMAIN_PREFIX = names.DOMAIN_PREFIX
STATE = names.STATE
RUN = names.RUN
HOST_CONF = names.HOST_CONF
PROFILES = names.PROFILES
HELPER = names.HELPER
deploy_id = names.deploy_id
vm_id_of = names.vm_id_of
nic_device = names.nic_device

VETH_MTU = 1500
VLANS = 4096
"""So many there are; numbers, and parts of a list of them."""
ID_RANGE = 65536
"""User and group ids of one unprivileged container."""


class Init(enum.Enum):
    """How a running init is asked to stop or to reboot; found by the helper in the mounted root."""

    SYSTEMD = "systemd"
    SYSVINIT = "sysvinit"
    BUSYBOX = "busybox"
    OPENRC = "openrc"
    OTHER = "other"


@dataclass(frozen=True)
class IoLimits:
    """Bytes and operations a second; None is no limit. OpenNebula's {TOTAL,READ,WRITE}_{BYTES,IOPS}_SEC."""

    total_bytes_sec: int | None = None
    read_bytes_sec: int | None = None
    write_bytes_sec: int | None = None
    total_iops_sec: int | None = None
    read_iops_sec: int | None = None
    write_iops_sec: int | None = None


@dataclass(frozen=True)
class Disk:
    """One DISK. `path` is where it lies on the host; `kind` is "image", "fs" (volatile), "swap" or "context".

    The path of a Ceph disk is `rbd:<pool>/<image>`; `ceph_user` and `ceph_conf` then say how to map it.
    """

    disk_id: int
    path: str
    kind: str = "image"
    target: str = ""
    size_mb: int | None = None
    format: str = ""
    fs: str = ""
    read_only: bool = False
    persistent: bool = False
    attach: bool = False
    limits: IoLimits = IoLimits()
    source: str = ""
    """SOURCE: a path on the front-end, or `pool/image` of a Ceph disk; only for messages and for Ceph."""
    ceph_user: str = ""
    ceph_conf: str = ""
    beside: str = ""
    """Where a Ceph disk would lie if it were a file: its lease lies there."""
    registered: bool = False
    """Whether it is made from an image of OpenNebula's. Only then `source` is oned's word, and not its user's."""

    @property
    def mount_point(self) -> str:
        """Where a data disk appears inside: TARGET if it is a path, else /media/one-disk.N."""
        return self.target if self.target.startswith("/") else f"/media/one-disk.{self.disk_id}"


@dataclass(frozen=True)
class Bandwidth:
    """libvirt's <inbound>/<outbound>: average and peak in KiB/s, burst in KiB."""

    average_kib: int
    peak_kib: int | None = None
    burst_kib: int | None = None


@dataclass(frozen=True)
class Nic:
    """One NIC. `device` is its host side (`one-<vmid>-<nic id>`), `guest_name` the name inside, "" for libvirt's.

    `bridge_type` is "linux", "openvswitch", "none" (PCI), or "" where only the host knows.
    """

    nic_id: int
    device: str
    bridge: str
    mac: str = ""
    bridge_type: str = ""
    vn_mad: str = ""
    ip: str = ""
    prefix: int | None = None
    gateway: str = ""
    ip6: str = ""
    prefix6: int | None = None
    gateway6: str = ""
    mtu: int | None = None
    guest_name: str = ""
    filter: str = ""
    inbound: Bandwidth | None = None
    outbound: Bandwidth | None = None
    attach: bool = False
    pci_address: str = ""
    vlan_id: int | None = None
    vlan_tagged: str = ""
    """VLAN_TAGGED_ID, the trunk: "100,200-210"."""
    cvlans: str = ""
    """CVLANS, the inner VLANs of QinQ."""
    qinq_type: str = ""

    @property
    def trunk(self) -> tuple[int, ...]:
        """The VLANs of `vlan_tagged`, one by one."""
        return _numbers(self.vlan_tagged)

    @property
    def inner_vlans(self) -> tuple[int, ...]:
        """The VLANs of `cvlans`, one by one."""
        return _numbers(self.cvlans)

    @property
    def on_a_switched_port(self) -> bool:
        """Whether OpenNebula's network driver writes something on its port that a restart of the container loses."""
        return self.bridge_type == "openvswitch" or bool(self.vlan_tagged or self.cvlans)

    @property
    def beyond_libvirt(self) -> bool:
        """Whether its start leaves something to do that libvirt's LXC driver cannot: an MTU other than a veth's own,
        limits, name and addresses of a PCI card."""
        return self.mtu not in (None, VETH_MTU) or bool(self.inbound or self.outbound or self.pci_address)


def _numbers(ranges: str) -> tuple[int, ...]:
    """`1,3-5` as 1, 3, 4, 5. TemplateError for what is no list of VLANs, each at most once."""
    numbers: dict[int, None] = {}
    for part in filter(None, ranges.split(",", VLANS)):
        first, _, last = part.partition("-")
        if not (_is_vlan(first) and _is_vlan(last or first)):
            raise TemplateError(f"Cannot use the VLANs {ranges!r}: not numbers below {VLANS}, or too many")
        numbers.update(dict.fromkeys(range(int(first), int(last or first) + 1)))
    return tuple(numbers)


def _is_vlan(text: str) -> bool:
    return names.is_number(text) and int(text) < VLANS


@dataclass(frozen=True)
class Graphics:
    """GRAPHICS TYPE=VNC: OpenNebula's svncterm server shows the console on this port."""

    port: int
    listen: str = "0.0.0.0"
    password: str = ""
    keymap: str = ""


@dataclass(frozen=True)
class Vm:
    """One VM as it is to be on this host. CPU in cores (1.5), memory in KiB."""

    vm_id: int
    name: str = ""
    cpu: float = 1.0
    vcpu: int = 1
    memory_kib: int = 512 * 1024
    swap_kib: int = 0
    init: str = "/sbin/init"
    init_arguments: tuple[str, ...] = ()
    init_environment: tuple[tuple[str, str], ...] = ()
    arch: str = ""
    uuid: str = ""
    disks: tuple[Disk, ...] = ()
    context: Disk | None = None
    nics: tuple[Nic, ...] = ()
    privileged: bool = False
    cpuset: str = ""
    """Host CPUs of NUMA_NODE pinning, as "0,2-3"; "" for all."""
    nodeset: str = ""
    """Host memory nodes of NUMA_NODE pinning; "" for all."""
    capabilities: tuple[tuple[str, bool], ...] = ()
    """The administrator's: capabilities kept (True) or dropped (False) beyond libvirt's defaults."""
    graphics: Graphics | None = None
    raw: tuple[str, ...] = ()
    """Fragments of libvirt XML: the administrator's, and the template's where the administrator allows it."""
    profiles: tuple[str, ...] = ()
    """Names of files with fragments in the administrator's directory on the host."""
    notes: tuple[str, ...] = ()
    """What was tolerated or ignored in the template, a line each, for the log."""

    @property
    def deploy_id(self) -> str:
        """`one-<vmid>`: OpenNebula's network drivers look for this name, and the domain bears it."""
        return deploy_id(self.vm_id)

    @property
    def root_disk(self) -> Disk:
        """The disk with the lowest DISK_ID that is an image: the one that holds the root file system."""
        return next(disk for disk in self.disks if disk.kind == "image")

    @property
    def data_disks(self) -> tuple[Disk, ...]:
        """All the others that are mounted; swap is none of them."""
        root = self.root_disk
        return tuple(disk for disk in self.disks if disk is not root and disk.kind in ("image", "fs"))


@dataclass(frozen=True)
class Mount:
    """A file system that libvirt mounts in the container at its start: `source` is a directory of the host."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Prepared:
    """What the root helper made of a Vm's disks. `id_base` is the first id of the VM's range, None if privileged."""

    root: str
    id_base: int | None = None
    mounts: tuple[Mount, ...] = ()
    init: Init = Init.OTHER
    cgroup: int = 2
    """The host's cgroup version, 1 or 2."""
    profiles: tuple[str, ...] = ()
    """Contents of the administrator's fragments that `Vm.profiles` names."""
    devices: tuple[tuple[int, str], ...] = ()
    """(disk id, block device) of the disks whose I/O is limited."""
    interfaces: tuple[tuple[int, str], ...] = ()
    """(nic id, interface of the host) of PCI NICs, once the helper has seen that the host does not use them."""
    switches: tuple[int, ...] = ()
    """NIC ids whose bridge turned out to be an Open vSwitch, where the template does not say what it is."""
    swap_accounting: bool = True
    """False where the kernel counts no swap (cgroup v1 without memory.memsw.*): libvirt would refuse the limit."""
    controller: str = ""
    """The program that becomes libvirt's controller of the container, where AppArmor confines it; "" for libvirt's."""
    notes: tuple[str, ...] = ()


def to_json(value: Any) -> Any:
    """A dataclass (or a tuple, enum … of them) as plain JSON data."""
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


@dataclass(frozen=True)
class VmPaths:
    """Every path that belongs to one VM on the host."""

    vm_id: int

    @property
    def state(self) -> str:
        return posixpath.join(STATE, "vms", str(self.vm_id))

    @property
    def journal(self) -> str:
        """What was taken, a JSON object a line, written before it is taken."""
        return posixpath.join(self.state, "journal")

    @property
    def record(self) -> str:
        """What the VM was deployed with (JSON): read by reboot, the hub, the probes and the live actions."""
        return posixpath.join(self.state, "vm.json")

    @property
    def mounts(self) -> str:
        return posixpath.join(names.MOUNTS, str(self.vm_id))

    @property
    def root(self) -> str:
        """The root file system as libvirt is given it: idmapped, unless privileged."""
        return posixpath.join(self.mounts, "root")

    def disk(self, disk_id: int) -> str:
        """Where a data disk is mounted on the host."""
        return posixpath.join(self.mounts, f"disk.{disk_id}")

    @property
    def context(self) -> str:
        """The extracted context ISO."""
        return posixpath.join(self.mounts, "context")

    @property
    def lock(self) -> str:
        return posixpath.join(RUN, "lock", str(self.vm_id))

    @property
    def console_log(self) -> str:
        return posixpath.join("/var/log/onelxc", f"{deploy_id(self.vm_id)}.log")
