"""May a VM's NICs be what they say they are, on this host? Looked at before they are made; nothing is changed here.

What an unprivileged caller wrote into a NIC ends up in command lines of root's, so that all of it is checked for its
form. Whether a bridge is an Open vSwitch, and which interface a PCI card has, only the host knows.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re

from onelxc.errors import ConfigurationError, HelperError
from onelxc.model import Nic, Vm, nic_device
from onelxc.root import pci, ports
from onelxc.root.links import Namespace

NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}\Z")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")
_BRIDGE = re.compile(r"[^\s/:-][^\s/:]{0,14}\Z")
_VLANS = re.compile(r"(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?\Z", re.ASCII)


def check(vm_id: int, nic: Nic) -> None:
    """HelperError unless all that is ever put into a command line has the form that it has to have."""
    addresses = [address for address in (nic.ip, nic.gateway, nic.ip6, nic.gateway6) if address]
    prefixes = [prefix for prefix in (nic.prefix, nic.prefix6) if prefix is not None]
    right = {
        f"device {nic.device!r}": nic.device == nic_device(vm_id, nic.nic_id) and NAME.match(nic.device),
        f"name {nic.guest_name!r}": NAME.match(nic.guest_name),
        f"MAC address {nic.mac!r}": not nic.mac or _MAC.match(nic.mac),
        f"MTU {nic.mtu}": nic.mtu is None or 68 <= nic.mtu <= 65535,
        f"bridge {nic.bridge!r}": not nic.bridge or _BRIDGE.match(nic.bridge),
        f"VLAN {nic.vlan_id}": nic.vlan_id is None or 0 <= nic.vlan_id <= 4095,
        f"VLANs {nic.vlan_tagged!r} {nic.cvlans!r}": _VLANS.match(nic.vlan_tagged) and _VLANS.match(nic.cvlans),
        f"QinQ {nic.qinq_type!r}": nic.qinq_type in ("", "802.1q", "802.1ad"),
        f"PCI address {nic.pci_address!r}": not nic.pci_address or pci.ADDRESS.match(nic.pci_address),
        f"addresses {addresses}": all(map(_is_address, addresses)),
        f"prefixes {prefixes}": all(0 <= prefix <= 128 for prefix in prefixes),
    }
    for what, is_right in right.items():
        if not is_right:
            raise HelperError(f"Cannot use NIC {nic.nic_id} of VM {vm_id}: not a NIC of ours: {what}")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def look_at_bridge(host: Namespace, vm_id: int, nic: Nic) -> None:
    """libvirt says no more of a missing bridge than the kernel's error number."""
    if nic.bridge_type == "openvswitch":
        if not ports.is_switch(nic.bridge):
            raise ConfigurationError(
                f"Cannot attach NIC {nic.nic_id} to VM {vm_id}: {nic.bridge} is no Open vSwitch of this host"
            )
    else:
        bridge = host.link(nic.bridge)
        if bridge is None or bridge.kind != "bridge":
            what = "no interface" if bridge is None else "no bridge"
            raise ConfigurationError(
                f"Cannot attach NIC {nic.nic_id} to VM {vm_id}: {nic.bridge} is {what} of this host"
            )


def switches(vm: Vm) -> tuple[int, ...]:
    """NIC ids of those whose bridge is an Open vSwitch although the template does not say so: 3.2.1's never does."""
    unknown = [nic for nic in vm.nics if not nic.bridge_type]
    found = {bridge: ports.is_switch(bridge) for bridge in {nic.bridge for nic in unknown}}
    return tuple(nic.nic_id for nic in unknown if found[nic.bridge])


def resolved(vm: Vm, on_switches: tuple[int, ...]) -> Vm:
    """The VM with each NIC's kind of bridge, as the record keeps it."""
    kinds = {nic.nic_id: "openvswitch" if nic.nic_id in on_switches else "linux" for nic in vm.nics}
    nics = (dataclasses.replace(nic, bridge_type=nic.bridge_type or kinds[nic.nic_id]) for nic in vm.nics)
    return dataclasses.replace(vm, nics=tuple(nics))


def interfaces(vm: Vm) -> tuple[tuple[int, str], ...]:
    """(NIC id, interface of the host) of the VM's PCI NICs; refused if the host uses one itself."""
    found = []
    for nic in vm.nics:
        if nic.pci_address:
            name = pci.interface(nic.pci_address)
            if not NAME.match(name):  # its last user may have named it
                raise ConfigurationError(
                    f"Cannot use the PCI device {nic.pci_address}: its interface is called {name!r}: rename it"
                )
            with Namespace() as host:
                refuse_used(host, name, f"NIC {nic.nic_id} of VM {vm.vm_id}")
            found.append((nic.nic_id, name))
    return tuple(found)


def refuse_used(host: Namespace, name: str, what: str) -> None:
    """An interface that the host itself uses must never leave it: the host would be gone from the network."""
    link = host.link(name)
    if link is None:
        raise ConfigurationError(f"Cannot use {name} as {what}: this host has no such interface (any more)")
    addresses = host.addresses(link.index)
    reason = ""
    if link.master:
        master = host.by_index(link.master)
        reason = f"it belongs to {master.name if master else 'another'}"
    elif addresses:
        reason = f"it has the address {addresses[0]}"
    elif host.has_routes(link.index):
        reason = "a route leads through it"
    elif any(other.peer == link.index and other.kind != "veth" for other in host.links()):
        reason = "another interface of the host is made on it"
    if reason:
        raise ConfigurationError(f"Cannot use {name} as {what}: this host uses it itself: {reason}")
