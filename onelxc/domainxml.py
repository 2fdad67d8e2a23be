"""How does a VM read in libvirt's language? `Vm` and `Prepared` in, the text of a domain out.

Pure, and without policy: what stands in the model is written down. Function names are libvirt's element names. The
result has to pass libvirt's own schema, because domains are created with VIR_DOMAIN_START_VALIDATE: without it libvirt
drops silently what it does not know. Elements that its LXC driver accepts and ignores are not written at all.
"""

from __future__ import annotations

import dataclasses
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from onelxc import fragments
from onelxc.model import ID_RANGE, IoLimits, Mount, Nic, Prepared, Vm

PERIOD_US = 100_000
"""cpu.cfs_period_us; the quota is a multiple of it."""

DROPPED = ("sys_rawio", "mac_override", "syslog")
"""Capabilities that a privileged container, whose root is the host's, loses beyond libvirt's own choice
(sys_module, sys_time, mknod, audit_control, mac_admin)."""


def render(vm: Vm, prepared: Prepared) -> str:
    """The domain's XML. ConfigurationError or TemplateError if a fragment (RAW, profile) is no XML."""
    return _text(fragments.merge(domain(vm, prepared), prepared.profiles + vm.raw, f"VM {vm.vm_id}"))


def render_interface(nic: Nic) -> str:
    """The XML of one NIC, for attaching and detaching."""
    return _text(interface(nic))


def domain(vm: Vm, prepared: Prepared) -> Element:
    root = Element("domain", {"type": "lxc"})
    _leaf(root, "name", vm.deploy_id)
    if vm.uuid:
        _leaf(root, "uuid", vm.uuid)
    if vm.name:
        _leaf(root, "title", "".join(character for character in vm.name if character.isprintable()))
    _leaf(root, "memory", str(vm.memory_kib), unit="KiB")
    blkiotune(root, vm, prepared)
    memtune(root, vm, prepared)
    vcpu = _leaf(root, "vcpu", str(vm.vcpu))
    if vm.cpuset:
        vcpu.set("placement", "static")
        vcpu.set("cpuset", vm.cpuset)
    cputune(root, vm, prepared)
    if vm.nodeset:
        SubElement(SubElement(root, "numatune"), "memory", {"mode": "strict", "nodeset": vm.nodeset})
    os_(root, vm)
    if prepared.id_base is not None:
        idmap(root, prepared.id_base)
    features(root, vm, prepared)
    devices(root, vm, prepared)
    return root


def swap_hard_limit(vm: Vm, prepared: Prepared) -> int | None:
    """libvirt's limit of the name in KiB, memory and swap together (memory.memsw.limit_in_bytes of cgroup v1).

    None where the kernel counts no swap, and on v2, where it is the helper's (see `root.swap`).
    """
    if prepared.cgroup == 2 or not prepared.swap_accounting:
        return None
    return vm.memory_kib + vm.swap_kib


def cpu_shares(cpu: float, cgroup: int) -> int:
    """libvirt's <shares> for CPU cores. It goes unchanged into cpu.shares (v1, 1024 is the norm) or cpu.weight (v2, 100
    is the norm and 10000 the end, beyond which the container does not start)."""
    if cgroup == 2:
        return max(1, min(10_000, round(cpu * 100)))
    return max(2, min(262_144, round(cpu * 1024)))


def cpu_quota_us(vcpu: int) -> int:
    """The time that VCPU cores give in each period."""
    return vcpu * PERIOD_US


def memtune(root: Element, vm: Vm, prepared: Prepared) -> None:
    """A hard limit although <memory> sets the same: changed live, this one survives a reboot from inside."""
    element = SubElement(root, "memtune")
    _leaf(element, "hard_limit", str(vm.memory_kib), unit="KiB")
    swap = swap_hard_limit(vm, prepared)
    if swap is not None:
        _leaf(element, "swap_hard_limit", str(swap), unit="KiB")


def cputune(root: Element, vm: Vm, prepared: Prepared) -> None:
    element = SubElement(root, "cputune")
    _leaf(element, "shares", str(cpu_shares(vm.cpu, prepared.cgroup)))
    _leaf(element, "period", str(PERIOD_US))
    _leaf(element, "quota", str(cpu_quota_us(vm.vcpu)))


def blkiotune(root: Element, vm: Vm, prepared: Prepared) -> None:
    """I/O limits by block device; a total stands for reading and for writing, each."""
    named = dict(prepared.devices)
    limited = [(named[disk.disk_id], disk.limits) for disk in vm.disks if disk.disk_id in named]
    limited = [(device, limits) for device, limits in limited if limits != IoLimits()]
    if not limited:
        return
    element = SubElement(root, "blkiotune")
    for device, limits in limited:
        one = SubElement(element, "device")
        _leaf(one, "path", device)
        for name, value in (
            ("read_iops_sec", limits.read_iops_sec or limits.total_iops_sec),
            ("write_iops_sec", limits.write_iops_sec or limits.total_iops_sec),
            ("read_bytes_sec", limits.read_bytes_sec or limits.total_bytes_sec),
            ("write_bytes_sec", limits.write_bytes_sec or limits.total_bytes_sec),
        ):
            if value is not None:
                _leaf(one, name, str(value))


def os_(root: Element, vm: Vm) -> None:
    """i686 is the one architecture that is not the host's own and yet runs: as a personality."""
    element = SubElement(root, "os")
    _leaf(element, "type", "exe", **({"arch": "i686"} if vm.arch == "i686" else {}))
    _leaf(element, "init", vm.init)
    for argument in vm.init_arguments:
        _leaf(element, "initarg", argument)
    for name, value in vm.init_environment:
        _leaf(element, "initenv", value, name=name)


def idmap(root: Element, id_base: int) -> None:
    element = SubElement(root, "idmap")
    for name in ("uid", "gid"):
        SubElement(element, name, {"start": "0", "target": str(id_base), "count": str(ID_RANGE)})


def features(root: Element, vm: Vm, prepared: Prepared) -> None:
    """privnet always: without it a container that has no NIC sits in the host's own network."""
    element = SubElement(root, "features")
    states = dict.fromkeys(DROPPED, False) if prepared.id_base is None else {}
    states.update(vm.capabilities)
    if states:
        policy = SubElement(element, "capabilities", {"policy": "default"})
        for name, kept in sorted(states.items()):
            SubElement(policy, name, {"state": "on" if kept else "off"})
    SubElement(element, "privnet")


def devices(root: Element, vm: Vm, prepared: Prepared) -> None:
    element = SubElement(root, "devices")
    if prepared.controller:
        _leaf(element, "emulator", prepared.controller)
    element.append(filesystem(Mount(prepared.root, "/", vm.root_disk.read_only)))
    for mount in prepared.mounts:
        element.append(filesystem(mount))
    interfaces = dict(prepared.interfaces)
    for nic in vm.nics:
        if nic.nic_id in interfaces:
            element.append(hostdev(interfaces[nic.nic_id]))
        elif nic.nic_id in prepared.switches:
            element.append(interface(dataclasses.replace(nic, bridge_type="openvswitch")))
        else:
            element.append(interface(nic))
    SubElement(element, "console", {"type": "pty"})


def filesystem(mount: Mount) -> Element:
    element = Element("filesystem", {"type": "mount"})
    SubElement(element, "source", {"dir": mount.source})
    SubElement(element, "target", {"dir": mount.target})
    if mount.read_only:
        SubElement(element, "readonly")
    return element


def hostdev(name: str) -> Element:
    """An interface of the host that moves into the container (a PCI NIC)."""
    element = Element("hostdev", {"mode": "capabilities", "type": "net"})
    _leaf(SubElement(element, "source"), "interface", name)
    return element


def interface(nic: Nic) -> Element:
    """A NIC on a bridge. Bandwidth is not libvirt's here: its tc needs sch_sfq, which kernels may lack, and then the
    container does not start; VLANs are OpenNebula's network drivers'; MTU is ignored by libvirt's LXC."""
    element = Element("interface", {"type": "bridge"})
    if nic.mac:
        SubElement(element, "mac", {"address": nic.mac})
    SubElement(element, "source", {"bridge": nic.bridge})
    if nic.bridge_type == "openvswitch":
        SubElement(element, "virtualport", {"type": "openvswitch"})
        vlan(element, nic)
    SubElement(element, "target", {"dev": nic.device})
    if nic.guest_name:
        SubElement(element, "guest", {"dev": nic.guest_name})
    if nic.filter:
        SubElement(element, "filterref", {"filter": nic.filter})
    SubElement(element, "link", {"state": "up"})
    for family, address, prefix in (("ipv4", nic.ip, nic.prefix), ("ipv6", nic.ip6, nic.prefix6)):
        if address:
            SubElement(element, "ip", {"family": family, "address": address, "prefix": str(prefix)})
    for family, anywhere, gateway in (("ipv4", "0.0.0.0", nic.gateway), ("ipv6", "::", nic.gateway6)):
        if gateway:
            SubElement(element, "route", {"family": family, "address": anywhere, "prefix": "0", "gateway": gateway})
    return element


def vlan(root: Element, nic: Nic) -> None:
    """Of a port of Open vSwitch. OpenNebula writes it there too, but only after a deploy: a port that libvirt makes
    anew when the container reboots by itself would be a trunk of every VLAN."""
    trunk = [] if nic.cvlans else [number for number in nic.trunk if number != nic.vlan_id]
    if nic.vlan_id is None and not trunk:
        return
    element = SubElement(root, "vlan", {"trunk": "yes"} if trunk else {})
    if nic.vlan_id is not None:
        SubElement(element, "tag", {"id": str(nic.vlan_id), **({"nativeMode": "untagged"} if trunk else {})})
    for number in trunk:
        SubElement(element, "tag", {"id": str(number)})


def _leaf(parent: Element, tag: str, text: str, **attributes: str) -> Element:
    element = SubElement(parent, tag, attributes)
    element.text = text
    return element


def _text(element: Element) -> str:
    ElementTree.indent(element)
    return ElementTree.tostring(element, encoding="unicode") + "\n"
