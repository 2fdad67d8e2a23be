"""NICs on Open vSwitch: at the start, live, and gone from the switch when the container is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from onelxc.root import ports
from tests.node.test_nics import attach, detach, failure, host_links, link
from tests.support import machine, openvswitch
from tests.support.vms import MONITORD, PULL, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]


@pytest.fixture(scope="module")
def switch() -> Iterator[str]:
    with openvswitch.running("10.88.0.1/24") as bridge:
        yield bridge


def add_nic(one: Vm, switch: str, ip: str) -> str:
    return one.add_nic(switch, IP=ip, BRIDGE_TYPE="openvswitch", VN_MAD="ovswitch")


def reaches_host(one: Vm, device: str) -> bool:
    return "1 packets received" in one.inside(f"ping -c 1 -W 5 -I {device} 10.88.0.1", check=False)


def test_at_the_start_and_over_a_reboot(switch: str, vm: NewVm) -> None:
    one = vm()
    device = add_nic(one, switch, "10.88.0.10")
    one.deployed().booted()
    assert openvswitch.ports() == [device]
    wait_until(lambda: reaches_host(one, "eth0"), "the switch forwards")
    one.inside("reboot", check=False)
    one.booted(2)
    assert openvswitch.ports() == [device]
    wait_until(lambda: reaches_host(one, "eth0"), "the switch forwards")
    one.act("cancel").ok()
    assert openvswitch.ports() == []


@pytest.mark.parametrize("driver", [PULL], indirect=True)
def test_a_bridge_that_only_the_host_knows_to_be_a_switch(switch: str, vm: NewVm) -> None:
    """3.2.1 has no word for it in the template."""
    one = vm()
    device = one.add_nic(switch, IP="10.88.0.13", VLAN="NO")
    one.deployed().booted()
    assert openvswitch.ports() == [device]
    wait_until(lambda: reaches_host(one, "eth0"), "the switch forwards")


def test_a_tenant_does_not_leave_his_vlan_by_a_reboot(switch: str, vm: NewVm) -> None:
    """After a deploy OpenNebula's network driver writes VLANs and flows on the port, which a reboot makes anew."""
    one = vm()
    device = add_nic(one, switch, "10.88.0.14")
    one.template["NIC"][0].update({"VLAN_ID": 42, "VLAN_TAGGED_ID": "100-101"})
    one.deployed().booted()
    assert column("Port", device, "tag") == "42"
    # as OpenvSwitch.rb of release-7.4.0 does
    machine.command("ovs-vsctl", "set", "Port", device, "tag=42", "trunks=100,101", "vlan_mode=native-untagged")
    number = column("Interface", device, "ofport")
    note = ports.port_note(one.vm_id, 0)
    machine.command(
        "ovs-ofctl", "add-flow", switch, f"table=0,in_port={number},priority=100,actions=note:{note},resubmit(,10)"
    )
    # somebody takes the next number meanwhile, so that it is not the same by chance
    machine.command("ovs-vsctl", "add-port", switch, "other0", "--", "set", "Interface", "other0", "type=internal")
    before = host_links()[device]["ifindex"]
    try:
        one.inside("reboot", check=False)
        one.booted(2)
        assert host_links()[device]["ifindex"] != before
        assert column("Port", device, "tag") == "42"
        assert column("Port", device, "vlan_mode") == "native-untagged"
        wait_until(lambda: column("Interface", device, "ofport") == number, "its flows are for it again")
        wait_until(lambda: column("Port", device, "trunks") == "[100, 101]", "trunks are as they were")
    finally:
        machine.command("ovs-vsctl", "del-port", "other0")
        machine.command("ovs-ofctl", "del-flows", switch, f"in_port={number}")


def column(table: str, device: str, name: str) -> str:
    return machine.command("ovs-vsctl", "-t", "20", "get", table, device, name).strip().strip('"')


def test_live(switch: str, vm: NewVm) -> None:
    one = vm().deployed().booted()
    attach(one, switch, IP="10.88.0.11", BRIDGE_TYPE="openvswitch", VN_MAD="ovswitch", OUTBOUND_AVG_BW=1000).ok()
    assert openvswitch.ports() == [f"{one.name}-0"]
    assert "inet 10.88.0.11/24" in link(one, "eth0")
    wait_until(lambda: reaches_host(one, "eth0"), "the switch forwards")
    detach(one, 0).ok()
    assert openvswitch.ports() == []


def test_a_port_goes_even_when_the_container_ends_badly(switch: str, vm: NewVm) -> None:
    """Controller and container are killed while libvirtd is away, and the VM is cancelled before it is back."""
    one = vm()
    device = add_nic(one, switch, "10.88.0.12")
    one.deployed().booted()
    init = machine.init_pid(one.name)
    with open(f"/proc/{init}/stat") as stat:
        controller = int(stat.read().rpartition(")")[2].split()[1])
    with machine.libvirtd_away():
        os.kill(controller, signal.SIGKILL)
        os.kill(init, signal.SIGKILL)
        assert openvswitch.ports() == [device]
        one.act("cancel").ok()
        assert openvswitch.ports() == []


def test_a_switch_that_is_missing(switch: str, vm: NewVm) -> None:
    one = vm().deployed().booted()
    line = failure(one, attach(one, "noswitch", BRIDGE_TYPE="openvswitch", VN_MAD="ovswitch"))
    assert line == f"Cannot attach NIC 0 to VM {one.vm_id}: noswitch is no Open vSwitch of this host"
