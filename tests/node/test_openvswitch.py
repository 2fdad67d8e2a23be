"""NICs on Open vSwitch: at the start, live, and gone from the switch when the container is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.node.test_nics import attach, detach, failure, link
from tests.support import machine, openvswitch
from tests.support.vms import MONITORD, Vm
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
    libvirtd = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bin/libvirtd")
    init = machine.init_pid(one.name)
    with open(f"/proc/{init}/stat") as stat:
        controller = int(stat.read().rpartition(")")[2].split()[1])
    machine.command(libvirtd, "kill")
    os.kill(controller, signal.SIGKILL)
    os.kill(init, signal.SIGKILL)
    try:
        assert openvswitch.ports() == [device]
        one.act("cancel").ok()
        assert openvswitch.ports() == []
    finally:
        machine.command(libvirtd, "start")


def test_a_switch_that_is_missing(switch: str, vm: NewVm) -> None:
    one = vm().deployed().booted()
    line = failure(one, attach(one, "noswitch", BRIDGE_TYPE="openvswitch", VN_MAD="ovswitch"))
    assert line == f"Cannot attach NIC 0 to VM {one.vm_id}: noswitch is no Open vSwitch of this host"
