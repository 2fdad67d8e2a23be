"""What did OpenNebula's network driver write on a NIC's port of its switch, and is it there again after a restart?

VLANs, trunks and the flows against spoofed addresses are written after a deploy, on the host side of the veth pair.
When a container reboots by itself libvirt makes a new pair, and all that is gone: on Open vSwitch a port without a tag
is a trunk of every VLAN, so that a tenant had only to reboot. libvirt gives the new port the VLAN of the template at
once (see `domainxml`); here the rest is put back, in the words of OpenNebula's own drivers (at release-7.4.0
src/vnm_mad/remotes/ovswitch/OpenvSwitch.rb: tag_vlan, tag_trunk_vlans, tag_qinq, port_note; lib/vnm_driver.rb:
set_vlan_filter). Only what the template says is known here; drivers of one's own are not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from onelxc import command
from onelxc.errors import CommandError
from onelxc.model import Nic
from onelxc.root.links import Namespace

_OVS_SOCKET = "/run/openvswitch/db.sock"
_FLOW = re.compile(r"in_port=(\d+)\b")


def is_switch(name: str) -> bool:
    """Whether an Open vSwitch of that name is on this host."""
    if not os.path.exists(_OVS_SOCKET):
        return False
    try:
        _vsctl("br-exists", name)
    except CommandError as error:
        if error.status == 2:
            return False
        raise
    return True


def remove(device: str) -> None:
    """Take a port out of its switch; where Open vSwitch does not run there is nothing to take out."""
    if os.path.exists(_OVS_SOCKET):
        _vsctl("--if-exists", "del-port", device)


def restore(host: Namespace, vm_id: int, nic: Nic, log: Callable[[str], None]) -> None:
    """Write on the new port of a NIC what was on the one before the container's restart."""
    try:
        if nic.bridge_type == "openvswitch":
            settings = port_settings(nic)
            if settings:
                _vsctl("set", "Port", nic.device, *settings)
            number = _flows_port(nic.bridge, port_note(vm_id, nic.nic_id))
            if number:
                _vsctl("set", "Interface", nic.device, f"ofport_request={number}")
        else:
            for words in bridge_vlans(nic):
                host.run("bridge", "vlan", "add", "dev", nic.device, *words, verb=f"set the VLANs of {nic.device}")
    except CommandError as error:
        log(f"NIC {nic.nic_id}: {error}")


def port_settings(nic: Nic) -> tuple[str, ...]:
    """Columns of an Open vSwitch port."""
    if nic.vlan_id is None and not nic.vlan_tagged:
        return ()
    if nic.cvlans:
        tunnel = ("vlan_mode=dot1q-tunnel", f"tag={nic.vlan_id}", f"cvlans={_list(nic.inner_vlans)}")
        return (*tunnel, f"other_config:qinq-ethtype={nic.qinq_type or '802.1q'}")
    mode = "trunk" if nic.vlan_id is None else "native-untagged"
    tag = "[]" if nic.vlan_id is None else str(nic.vlan_id)
    return (f"tag={tag}", f"trunks={_list(nic.trunk)}", f"vlan_mode={mode}")


def bridge_vlans(nic: Nic) -> tuple[tuple[str, ...], ...]:
    """Words of `bridge vlan add`: a Linux bridge filters by VLAN with trunks (bridge) or inner VLANs (802.1Q) only."""
    if nic.cvlans and nic.vlan_id is not None:
        inner = tuple(("vid", str(number)) for number in nic.inner_vlans)
        return (("vid", str(nic.vlan_id), "pvid", "untagged"), *inner)
    if nic.vlan_tagged and nic.vn_mad in ("bridge", "fw"):
        return tuple(("vid", str(number)) for number in nic.trunk)
    return ()


def port_note(vm_id: int, nic_id: int) -> str:
    """How the flows of a NIC are marked: VM and NIC in hexadecimal twins, `00.00.00.05.00.01`."""
    digits = f"{vm_id:08x}{nic_id:04x}"
    return ".".join(digits[place : place + 2] for place in range(0, len(digits), 2))


def _flows_port(bridge: str, note: str) -> str:
    """The number of the port that the flows against spoofing are for. They stay when the port goes."""
    flows = command.run(["ovs-ofctl", "--no-names", "dump-flows", bridge], verb=f"read the flows of {bridge}")
    for line in flows.decode(errors="replace").splitlines():
        port = _FLOW.search(line)
        if port and f"note:{note}" in line:
            return port.group(1)
    return ""


def _list(numbers: tuple[int, ...]) -> str:
    """A set in the words of ovs-vsctl."""
    return ",".join(map(str, numbers)) or "[]"


def _vsctl(*words: str) -> bytes:
    return command.run(["ovs-vsctl", "-t", "20", *words], verb="ask Open vSwitch")
