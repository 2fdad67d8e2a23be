"""Which NICs does the template ask for, and which address does each have?

The rule for addresses: a NIC with an IP gets it from libvirt before init runs, so that images without
contextualization have it too; beside one-context, which sets the same, it is harmless. The prefix comes from the NIC
or from CONTEXT (ETHn_MASK, ETHn_IP6_PREFIX_LENGTH), else it is one-context's own default, /24 and /64. A METHOD of dhcp
or skip leaves the address to the guest. It touches no network; whether a bridge exists is seen at the start.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace

from onelxc.config import Defaults
from onelxc.errors import NotSupportedError
from onelxc.fields import Fields
from onelxc.model import VLANS, Bandwidth, Nic, nic_device

_MOST = 256
NAME_LIMIT = 15
"""IFNAMSIZ - 1."""
_INTERFACE = re.compile(r"[^\s/:\x00-\x1f]{1,15}\Z")
_FILTER = re.compile(r"[\w.:-]+\Z")


def _one_default_route(found: list[Nic]) -> tuple[Nic, ...]:
    """Only the first gateway of each family stays: the kernel refuses a second default route of the same metric."""
    routed: list[Nic] = []
    for one in found:
        gateway = "" if any(before.gateway for before in routed) else one.gateway
        gateway6 = "" if any(before.gateway6 for before in routed) else one.gateway6
        routed.append(replace(one, gateway=gateway, gateway6=gateway6))
    return tuple(routed)


@dataclass(frozen=True)
class _Around:
    """What a NIC is read with: its VM, the operator's defaults, CONTEXT, and the list that notes go to."""

    vm_id: int
    defaults: Defaults
    context: Fields | None
    notes: list[str]


def nics(template: Fields, vm_id: int, defaults: Defaults, notes: list[str]) -> tuple[Nic, ...]:
    """All NICs and PCI NICs, by NIC_ID. One default route only: the kernel refuses a second one."""
    around = _Around(vm_id, defaults, template.sub("CONTEXT"), notes)
    found = []
    for number, element in enumerate(template.all("NIC", most=_MOST)):
        fields = Fields(element, f"{template.where}: NIC {element.findtext('NIC_ID') or number}")
        found.append(_nic(fields, number, around))
    for element in template.all("PCI", most=_MOST):
        fields = Fields(element, f"{template.where}: PCI {element.findtext('PCI_ID') or ''}".rstrip())
        found.append(_pci_nic(fields, around))
    found.sort(key=lambda one: one.nic_id)
    for before, after in zip(found, found[1:]):
        if before.nic_id == after.nic_id:
            raise template.error(f"NIC {after.nic_id} is there twice")
    return _one_default_route(found)


def _nic(fields: Fields, number: int, around: _Around) -> Nic:
    """One NIC; `number` stands for NIC_ID where 3.2.1 leaves it out."""
    nic_id = _nic_id(fields, number)
    device = nic_device(around.vm_id, nic_id)
    if len(device) > NAME_LIMIT:
        raise fields.error(f"the interface {device!r} has a longer name than the {NAME_LIMIT} characters of Linux")
    bridge = fields.text("BRIDGE", default=around.defaults.nic_bridge)
    if not bridge:
        raise fields.error("no BRIDGE: which bridge of the host does it belong to?")
    if not _INTERFACE.match(bridge):
        raise fields.error(f"BRIDGE is not a name of an interface: {bridge!r}")
    vn_mad = fields.text("VN_MAD").lower()
    known = {"": "", "ovswitch": "openvswitch", "ovswitch_vxlan": "openvswitch"}.get(vn_mad, "linux")
    bridge_type = fields.text("BRIDGE_TYPE").lower() or known
    if bridge_type not in ("", "linux", "openvswitch"):
        raise NotSupportedError(
            f"{fields.where}: BRIDGE_TYPE {bridge_type}: containers have linux and openvswitch only"
        )
    name = fields.text("FILTER", default=around.defaults.nic_filter)
    if name and not _FILTER.match(name):
        raise fields.error(f"FILTER is not a name: {name!r}")
    return _addressed(
        fields,
        around,
        Nic(
            nic_id=nic_id,
            device=device,
            bridge=bridge,
            mac=fields.mac("MAC"),
            bridge_type=bridge_type,
            vn_mad=vn_mad,
            guest_name=f"{around.defaults.nic_guest}{nic_id}",
            filter=name,
            inbound=_bandwidth(fields, "INBOUND"),
            outbound=_bandwidth(fields, "OUTBOUND"),
            attach=fields.yes("ATTACH"),
            vlan_id=_vlan_id(fields, vn_mad),
            vlan_tagged=_vlans(fields, "VLAN_TAGGED_ID"),
            cvlans=_vlans(fields, "CVLANS"),
            qinq_type=_qinq(fields),
        ),
    )


def _vlan_id(fields: Fields, vn_mad: str) -> int | None:
    """VLAN_ID where it is one: with vxlan it is the number of that network, and 3.2.1 has VLAN=NO beside it."""
    found = fields.whole("VLAN_ID", most=4095 if vn_mad != "vxlan" else 2**24 - 1)
    return found if vn_mad != "vxlan" and fields.yes("VLAN", True) else None


def _vlans(fields: Fields, name: str) -> str:
    """A list of numbers and ranges, "100,200-210"."""
    text = fields.text(name).replace(" ", "")
    for part in text.split(",", VLANS) if text else ():
        first, sign, last = part.partition("-")
        ends = [first, last] if sign else [first]
        if not all(re.match(r"[0-9]{1,4}\Z", end) and int(end) < VLANS for end in ends):
            raise fields.error(f"{name} is not a list of VLANs: {text!r}")
    return text


def _qinq(fields: Fields) -> str:
    text = fields.text("QINQ_TYPE").lower()
    if text and text not in ("802.1q", "802.1ad"):
        raise fields.error(f"QINQ_TYPE is neither 802.1q nor 802.1ad: {text!r}")
    return text


def _pci_nic(fields: Fields, around: _Around) -> Nic:
    """A PCI device with TYPE=NIC: the host's interface moves into the container. Other devices cannot."""
    if fields.text("TYPE").upper() != "NIC":
        raise NotSupportedError(f"{fields.where}: of PCI devices a container can have network interfaces only")
    address = fields.text("ADDRESS")
    match = re.match(r"(?:([0-9a-f]{4}):)?([0-9a-f]{2}):([0-9a-f]{2})[.:]([0-7])\Z", address.lower())
    if not match:
        raise fields.error(f"ADDRESS is not one of a PCI device: {address!r}")
    domain, bus, slot, function = match.groups()
    nic_id = _nic_id(fields, None)
    plain = Nic(
        nic_id=nic_id,
        device=nic_device(around.vm_id, nic_id),
        bridge="",
        mac=fields.mac("MAC"),
        bridge_type="none",
        vn_mad=fields.text("VN_MAD").lower(),
        guest_name=f"{around.defaults.nic_guest}{nic_id}",
        attach=fields.yes("ATTACH"),
        pci_address=f"{domain or '0000'}:{bus}:{slot}.{function}",
    )
    return _addressed(fields, around, plain)


def _nic_id(fields: Fields, number: int | None) -> int:
    found = fields.whole("NIC_ID", least=0, most=1_000_000)
    if found is not None:
        return found
    if number is None:
        raise fields.error("no NIC_ID")
    return number


def _addressed(fields: Fields, around: _Around, plain: Nic) -> Nic:
    """`plain` with addresses, gateways and MTU, each from the NIC, else from its part of CONTEXT."""
    prefix = f"ETH{plain.nic_id}_"
    eth = around.context or Fields(fields.element.makeelement("CONTEXT", {}), fields.where)
    values = vars(plain).copy()
    values["mtu"] = fields.whole("MTU", least=68, most=65535) or eth.whole(f"{prefix}MTU", least=68, most=65535)
    if fields.text("METHOD", default=eth.text(f"{prefix}METHOD")).lower() in ("", "static"):
        ip = fields.address("IP", version=4)
        if ip:
            values["ip"] = ip
            values["prefix"] = _prefix(fields, eth, prefix)
            gateway = fields.address("GATEWAY", "NETWORK_GATEWAY", version=4) or eth.address(
                f"{prefix}GATEWAY", version=4
            )
            values["gateway"] = _reachable(plain.nic_id, ip, values["prefix"], gateway, around.notes)
    if fields.text("IP6_METHOD", default=eth.text(f"{prefix}IP6_METHOD")).lower() in ("", "static"):
        ip6 = fields.address("IP6", "IP6_GLOBAL", "IP6_ULA", version=6)
        if ip6:
            length = fields.whole("PREFIX_LENGTH", most=128) or eth.whole(f"{prefix}IP6_PREFIX_LENGTH", most=128)
            values["ip6"] = ip6
            values["prefix6"] = length or 64
            gateway6 = fields.address("GATEWAY6", "IP6_GATEWAY", version=6) or eth.address(
                f"{prefix}IP6_GATEWAY", f"{prefix}GATEWAY6", version=6
            )
            # a link-local gateway is reachable by the interface alone
            local = bool(gateway6) and ipaddress.ip_address(gateway6).is_link_local
            values["gateway6"] = (
                gateway6 if local else _reachable(plain.nic_id, ip6, values["prefix6"], gateway6, around.notes)
            )
    return Nic(**values)


def _prefix(fields: Fields, eth: Fields, prefix: str) -> int:
    """The length of the network's prefix, from a mask or a length."""
    for place, name in ((fields, "NETWORK_MASK"), (fields, "NETMASK"), (eth, f"{prefix}MASK")):
        text = place.text(name)
        if text:
            try:
                return ipaddress.ip_network(f"0.0.0.0/{text}").prefixlen
            except ValueError:
                raise place.error(f"{name} is not a network mask: {text!r}") from None
    return 24


def _reachable(nic_id: int, ip: str, prefix: int, gateway: str, notes: list[str]) -> str:
    """The gateway, if the network has it: the kernel refuses another one, and the container would not start."""
    if not gateway:
        return ""
    network = ipaddress.ip_network(f"{ip}/{prefix}", strict=False)
    if ipaddress.ip_address(gateway) in network:
        return gateway
    notes.append(f"NIC {nic_id}: the gateway {gateway} is not in {network}: left to the guest")
    return ""


def _bandwidth(fields: Fields, direction: str) -> Bandwidth | None:
    """{INBOUND,OUTBOUND}_{AVG_BW,PEAK_BW,PEAK_KB}, in kilobytes; a limit needs an average."""
    average = fields.whole(f"{direction}_AVG_BW", "a number of KB/s", most=1 << 31)
    peak = fields.whole(f"{direction}_PEAK_BW", "a number of KB/s", most=1 << 31)
    burst = fields.whole(f"{direction}_PEAK_KB", "a number of KB", most=1 << 31)
    if not average:
        if peak or burst:
            raise fields.error(f"{direction}_PEAK_BW and {direction}_PEAK_KB need {direction}_AVG_BW")
        return None
    return Bandwidth(average_kib=average, peak_kib=peak or None, burst_kib=burst or None)
