"""NICs of 7.4.0 on real containers: at the start, attached and detached live, limited, over reboots and restarts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onelxc import domainxml, model, rootclient
from onelxc.errors import ConfigurationError, HelperError
from onelxc.hypervisor import Hypervisor
from onelxc.model import Nic
from onelxc.report import Report
from onelxc.root import nics
from onelxc.root.links import Namespace
from tests.support import hostconf, machine
from tests.support.stream import Outcome
from tests.support.vms import MONITORD, PULL, Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]

pytestmark = pytest.mark.generation(MONITORD)


@pytest.fixture
def running(vm: NewVm, form: dict[str, str], bridge: str) -> Vm:
    """A VM with one NIC, 10.77.0.10, in both forms."""
    one = vm(user_template=form)
    one.add_nic(bridge, IP="10.77.0.10")
    return one.deployed().booted()


@pytest.fixture
def plain(vm: NewVm, bridge: str) -> Vm:
    """The same, unprivileged only: for what has nothing to do with whose ids the container has."""
    one = vm()
    one.add_nic(bridge, IP="10.77.0.10")
    return one.deployed().booted()


def attach(one: Vm, bridge: str, **attributes: Any) -> Outcome:
    """What 7.4.0 sends; the NIC stays in the template, as it does in oned's when the action succeeds."""
    device = one.add_nic(bridge, ATTACH="YES", **attributes)
    nic = one.template["NIC"][-1]
    outcome = one.act("attach_nic", nic["MAC"], bridge, "-", "lxc", device, lcm_state=25)
    del nic["ATTACH"]
    return outcome


def detach(one: Vm, number: int) -> Outcome:
    nic = one.template["NIC"][number]
    nic["ATTACH"] = "YES"
    outcome = one.act("detach_nic", nic["MAC"], lcm_state=25)
    if outcome.code == 0:
        one.template["NIC"].remove(nic)
    return outcome


def link(one: Vm, name: str) -> str:
    return one.inside(f"ip link show dev {name}; ip address show dev {name}", check=False)


def host_links() -> dict[str, dict[str, Any]]:
    return {entry["ifname"]: entry for entry in json.loads(machine.command("ip", "-d", "-j", "link", "show"))}


def reaches_host(one: Vm, device: str) -> bool:
    return "1 packets received" in one.inside(f"ping -c 1 -W 2 -I {device} 10.77.0.1", check=False)


def seconds_to_send(one: Vm, size: int, *, port: int, outward: bool) -> float:
    """How long `size` bytes take between the host and the container, in the direction that is asked for."""
    with socket.create_server(("10.77.0.1", port)) as server:
        server.settimeout(60)
        shell = f"head -c {size} /dev/zero | nc 10.77.0.1 {port}" if outward else f"nc 10.77.0.1 {port} > /dev/null"
        pid = machine.init_pid(one.name)
        # the host's own nsenter into the network alone would do as well: what counts is the way of the packets
        argv = ["nsenter", "-t", str(pid), "-a", "-S0", "-G0", "/bin/sh", "-c", shell]
        if one.privileged:
            argv = ["nsenter", "-t", str(pid), "-m", "-u", "-i", "-n", "-p", "/bin/sh", "-c", shell]
        client = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        try:
            peer, _ = server.accept()
            peer.settimeout(60)
            began = time.monotonic()
            if outward:
                got = 0
                while got < size:
                    got += len(peer.recv(65536))
            else:
                peer.sendall(bytes(size))
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
                client.wait(60)
            took = time.monotonic() - began
            peer.close()
            return took
        finally:
            client.kill()
            client.wait()


def test_a_nic_has_its_address_without_contextualization(running: Vm, bridge: str) -> None:
    assert "inet 10.77.0.10/24" in link(running, "eth0")
    assert reaches_host(running, "eth0")
    assert host_links()[f"{running.name}-0"]["master"] == bridge


def test_attach_and_detach_live(running: Vm, bridge: str) -> None:
    outcome = attach(running, bridge, IP="10.77.0.11").ok()
    assert (outcome.out, outcome.err) == ("", "")
    seen = link(running, "eth1")
    assert "inet 10.77.0.11/24" in seen
    assert "LOWER_UP" in seen
    assert running.template["NIC"][1]["MAC"] in seen
    assert host_links()[f"{running.name}-1"]["master"] == bridge
    assert reaches_host(running, "eth1")
    outcome = detach(running, 1).ok()
    assert (outcome.out, outcome.err) == ("", "")
    assert "eth1" not in running.inside("ip link")
    assert f"{running.name}-1" not in host_links()
    assert reaches_host(running, "eth0")


def test_what_was_attached_is_still_there_after_a_reboot_from_inside(running: Vm, bridge: str) -> None:
    attach(running, bridge, IP="10.77.0.11", MTU=1400, OUTBOUND_AVG_BW=2000).ok()
    before = host_links()[f"{running.name}-1"]["ifindex"]
    running.inside("reboot", check=False)
    running.booted(2)
    assert "inet 10.77.0.11/24" in link(running, "eth1")
    assert host_links()[f"{running.name}-1"]["ifindex"] != before

    def settled() -> bool:
        links = host_links()
        device = links.get(f"{running.name}-1", {})
        return device.get("mtu") == 1400 and "ingress" in machine.command(
            "tc", "qdisc", "show", "dev", device["ifname"]
        )

    wait_until(settled, "MTU and limits are put back", timeout_s=60)
    wait_until(lambda: "mtu 1400" in link(running, "eth1"), "the MTU inside is put back", timeout_s=60)
    assert reaches_host(running, "eth1")
    detach(running, 1).ok()
    running.inside("reboot", check=False)
    running.booted(3)
    assert "eth1" not in running.inside("ip link")


def test_what_was_attached_is_still_there_after_a_restart_of_libvirtd(plain: Vm, bridge: str) -> None:
    one = plain
    attach(one, bridge, IP="10.77.0.11").ok()
    machine.restart_libvirtd()
    assert "inet 10.77.0.11/24" in link(one, "eth1")
    one.inside("reboot", check=False)
    one.booted(2)
    assert "inet 10.77.0.11/24" in link(one, "eth1")
    detach(one, 1).ok()
    assert "eth1" not in one.inside("ip link")


def test_mtu_at_the_start(vm: NewVm, bridge: str) -> None:
    one = vm()
    one.add_nic(bridge, IP="10.77.0.10", MTU=1400)
    one.deployed().booted()
    assert "mtu 1400" in link(one, "eth0")
    assert host_links()[f"{one.name}-0"]["mtu"] == 1400


WRONG: tuple[dict[str, Any], ...] = (
    {"device": "eth0"},
    {"device": "one-9-0"},
    {"guest_name": "-x"},
    {"guest_name": "eth0 up"},
    {"mac": "02:00:00:00:00:0g"},
    {"mac": ""},
    {"ip": "10.0.0.1 dev eth0"},
    {"gateway6": "fe80::1%eth0"},
    {"bridge": "-br"},
    {"mtu": 1},
    {"vlan_tagged": "1 2"},
    {"cvlans": "x"},
    {"qinq_type": "any"},
    {"pci_address": "../../x"},
)


def test_the_helper_takes_no_nic_with_words_of_its_own(installed: None) -> None:
    """What an unprivileged caller says ends up in root's command lines."""
    right: dict[str, Any] = {"nic_id": 0, "device": "one-5000-0", "bridge": "br0", "mac": "02:00:00:00:00:01"}
    right["guest_name"] = "eth0"
    refused = r"Cannot (use|attach) NIC 0 (of|to) VM 5000: (not a NIC of ours|it has no MAC)"
    with rootclient.open_session(5000, "attach_nic", Report("x", framed=False)) as host:
        for wrong in WRONG:
            with pytest.raises(HelperError, match=refused):
                host.call("new_nic", nic={**model.to_json(Nic(**right)), **wrong})
            if wrong == {"mac": ""}:
                continue  # libvirt makes one at the start
            vm = model.to_json(model.Vm(5000, disks=(model.Disk(0, "/var/lib/one/x"),), nics=(Nic(**right),)))
            vm["nics"][0].update(wrong)
            with pytest.raises(HelperError, match=refused):
                host.call("prepare", vm=vm)


def test_limits_are_kept_in_both_directions(running: Vm, bridge: str) -> None:
    """400 kB/s: what takes no time at all without limits takes more than a second, and not ten."""
    size = 800_000
    assert seconds_to_send(running, size, port=7001, outward=False) < 1.2
    limits = {"INBOUND_AVG_BW": 400, "OUTBOUND_AVG_BW": 400}
    detach(running, 0).ok()
    attach(running, bridge, IP="10.77.0.12", **limits).ok()
    assert 1.4 < seconds_to_send(running, size, port=7002, outward=False) < 15
    assert 1.4 < seconds_to_send(running, size, port=7003, outward=True) < 15


def test_limits_from_the_start_go_with_the_container(vm: NewVm, bridge: str) -> None:
    one = vm()
    device = one.add_nic(
        bridge, IP="10.77.0.10", INBOUND_AVG_BW=1000, INBOUND_PEAK_BW=3000, INBOUND_PEAK_KB=256, OUTBOUND_AVG_BW=500
    )
    one.deployed().booted()
    inbound = json.loads(machine.command("tc", "-j", "qdisc", "show", "dev", device))
    bucket = next(entry["options"] for entry in inbound if entry["kind"] == "tbf")
    assert (bucket["rate"], bucket["burst"]) == (1_000_000, 256 * 1024)
    ifb = f"onb-{one.vm_id}-0"
    assert host_links()[ifb]["linkinfo"]["info_kind"] == "ifb"
    assert '"rate":500000' in machine.command("tc", "-j", "qdisc", "show", "dev", ifb)
    one.act("cancel").ok()
    assert not {device, ifb} & set(host_links())


def test_a_name_that_is_taken_inside_stays_with_its_owner(plain: Vm, bridge: str) -> None:
    plain.inside("ip link add eth1 type veth peer name other")
    attach(plain, bridge, IP="10.77.0.11").ok()
    assert "10.77.0.11" not in link(plain, "eth1")
    assert "inet 10.77.0.11/24" in plain.inside("ip address")


def test_detaching_what_is_gone_is_success(plain: Vm, bridge: str) -> None:
    attach(plain, bridge, IP="10.77.0.11").ok()
    nic = dict(plain.template["NIC"][1])
    detach(plain, 1).ok()
    plain.template["NIC"].append(nic)
    assert detach(plain, 1).ok().err == ""


def test_the_tenant_deletes_his_end(plain: Vm, bridge: str) -> None:
    """The pair is gone with it; the NIC can be detached all the same, and the others go on."""
    attach(plain, bridge, IP="10.77.0.11", OUTBOUND_AVG_BW=500).ok()
    plain.inside("ip link delete dev eth1")
    assert f"{plain.name}-1" not in host_links()
    detach(plain, 1).ok()
    assert not [name for name in host_links() if name.startswith("onb-")]
    assert reaches_host(plain, "eth0")


def failure(one: Vm, outcome: Outcome) -> str:
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    return one.driver.message(outcome)


def test_a_bridge_that_is_missing(plain: Vm) -> None:
    line = failure(plain, attach(plain, "nobr", IP="10.77.0.11"))
    assert line == f"Cannot attach NIC 1 to VM {plain.vm_id}: nobr is no interface of this host"
    assert f"{plain.name}-1" not in host_links()


@pytest.mark.parametrize("driver", [PULL, MONITORD], indirect=True)
def test_a_bridge_that_is_missing_at_the_start(vm: NewVm) -> None:
    one = vm()
    one.add_nic("nobr", IP="10.77.0.10")
    line = failure(one, one.deploy())
    assert line == f"Cannot start {one.name}: Unable to add bridge nobr port {one.name}-0: No such device"
    assert one.name not in machine.domains()


def test_a_nic_that_is_there_already_is_attached_and_its_number_nobody_elses(plain: Vm, bridge: str) -> None:
    nic = plain.template["NIC"][0]
    nic["ATTACH"] = "YES"
    arguments = (bridge, "-", "lxc", f"{plain.name}-0")
    plain.act("attach_nic", nic["MAC"], *arguments, lcm_state=25).ok()
    assert reaches_host(plain, "eth0")
    mac, nic["MAC"] = nic["MAC"], "02:00:0a:4d:00:99"
    outcome = plain.act("attach_nic", nic["MAC"], *arguments, lcm_state=25)
    nic["MAC"] = mac
    del nic["ATTACH"]
    assert failure(plain, outcome) == f"Cannot attach NIC 0 to VM {plain.vm_id}: it has a NIC of that number"
    assert reaches_host(plain, "eth0")


def test_a_container_that_does_not_run(vm: NewVm, bridge: str) -> None:
    one = vm()
    outcome = attach(one, bridge, IP="10.77.0.11")
    assert failure(one, outcome) == f"Cannot find {one.name}: no such container on this host"
    one.template["NIC"].clear()


def test_a_pci_interface_is_refused_live(plain: Vm) -> None:
    plain.template["PCI"] = {"PCI_ID": 0, "NIC_ID": 1, "TYPE": "NIC", "ADDRESS": "0000:81:00:1", "ATTACH": "YES"}
    plain.template["PCI"]["MAC"] = "02:00:00:00:00:99"
    outcome = plain.act("attach_nic", "02:00:00:00:00:99", "-", "-", "lxc", "-", lcm_state=25)
    del plain.template["PCI"]
    assert failure(plain, outcome) == (
        f"Cannot attach NIC 1 to VM {plain.vm_id}: a PCI interface moves into a container only when it starts:"
        " power the VM off first"
    )


def test_a_pci_interface_that_is_not_there_fails_the_deploy(vm: NewVm) -> None:
    one = vm(template={"PCI": {"PCI_ID": 0, "NIC_ID": 1, "TYPE": "NIC", "ADDRESS": "0000:81:00:1"}})
    line = failure(one, one.deploy())
    assert line == (
        f"Cannot deploy VM {one.vm_id}: cannot use the PCI device 0000:81:00.1: it has no network interface (any more)"
    )


@pytest.fixture
def card() -> Iterator[str]:
    """A PCI network card as the kernel shows one, with a veth for its interface: /sys is this test's own meanwhile."""
    directory = "/sys/bus/pci/devices"
    machine.command("mount", "-t", "tmpfs", "tmpfs", directory)
    os.makedirs(f"{directory}/0000:81:00.1/net/card0")
    machine.command("ip", "link", "add", "card0", "type", "veth", "peer", "name", "wire0")
    machine.command("ip", "link", "set", "wire0", "up")
    yield "card0"
    machine.command("umount", directory)
    if "wire0" in host_links():
        machine.command("ip", "link", "delete", "wire0")


def test_a_pci_interface_moves_into_the_container(vm: NewVm, card: str) -> None:
    pci = {"PCI_ID": 0, "NIC_ID": 1, "TYPE": "NIC", "ADDRESS": "0000:81:00:1", "IP": "10.99.0.2"}
    with hostconf.with_line('PRIVILEGED = "yes"'):
        # the kernel lets no user namespace mount a /sys of which it hides a part here
        one = vm(template={"PCI": pci}, user_template={"LXC_UNPRIVILEGED": "no"}).deployed().booted()
        assert card not in host_links()
        assert "inet 10.99.0.2/24" in link(one, "eth1")
        assert "LOWER_UP" in link(one, "eth1")


def test_a_pci_interface_that_the_host_uses_fails_the_deploy(vm: NewVm, card: str) -> None:
    machine.command("ip", "address", "add", "10.99.0.1/24", "dev", card)
    one = vm(template={"PCI": {"PCI_ID": 0, "NIC_ID": 1, "TYPE": "NIC", "ADDRESS": "0000:81:00:1"}})
    line = failure(one, one.deploy())
    assert line.startswith("Cannot use card0 as NIC 1 of VM")
    assert line.endswith("this host uses it itself: it has the address 10.99.0.1/24")
    assert card in host_links()


def test_an_attach_that_is_killed_halfway_leaves_no_nic(plain: Vm, bridge: str) -> None:
    """libvirt has attached it, and then the action is gone: neither now nor after a reboot is it there."""
    nic = Nic(1, f"{plain.name}-1", bridge, mac="02:00:0a:4d:09:09", guest_name="eth1", outbound=model.Bandwidth(500))
    with Hypervisor() as libvirt, rootclient.open_session(plain.vm_id, "attach_nic", Report("x", framed=False)) as host:
        host.call("new_nic", nic=model.to_json(nic))
        libvirt.domain(plain.name).attach_device(domainxml.render_interface(nic))
        host.call("attach_nic", nic=model.to_json(nic))
        assert nic.device in host_links()
    assert not {nic.device, f"onb-{plain.vm_id}-1"} & set(host_links())
    assert nic.device not in machine.domain_xml(plain.name)
    attach(plain, bridge, IP="10.77.0.11").ok()
    assert reaches_host(plain, "eth1")


@pytest.fixture
def spare() -> Iterator[str]:
    """An interface of this host that nobody uses."""
    machine.command("ip", "link", "add", "spare0", "type", "veth", "peer", "name", "spare1")
    yield "spare0"
    machine.command("ip", "link", "delete", "spare0")


def used(name: str) -> str:
    with Namespace() as host, pytest.raises(ConfigurationError) as error:
        nics.refuse_used(host, name, "NIC 1 of VM 5")
    return str(error.value)


def test_an_interface_that_the_host_uses_stays_with_the_host(spare: str, bridge: str) -> None:
    with Namespace() as host:
        nics.refuse_used(host, spare, "NIC 1 of VM 5")
    begin = f"Cannot use {spare} as NIC 1 of VM 5: this host uses it itself: "
    machine.command("ip", "link", "set", spare, "up")
    machine.command("ip", "address", "add", "10.99.0.1/24", "dev", spare)
    assert used(spare) == begin + "it has the address 10.99.0.1/24"
    machine.command("ip", "address", "flush", "dev", spare)
    machine.command("ip", "route", "add", "10.98.0.0/24", "dev", spare)
    assert used(spare) == begin + "a route leads through it"
    machine.command("ip", "route", "delete", "10.98.0.0/24")
    machine.command("ip", "link", "set", spare, "master", bridge)
    assert used(spare) == begin + f"it belongs to {bridge}"
    assert used("nosuch0") == "Cannot use nosuch0 as NIC 1 of VM 5: this host has no such interface (any more)"


ODD_NAMES = (
    b"e\x1b[2J", b"\x9b31m", b"a\xff\xfe", b'"},{"', b"\\\\", b"\x7f'\x08", "\u202e\u2028".encode(), b"-all", b"if1",
)  # fmt: skip
"""The kernel takes every byte but a slash, a colon and blanks."""


@pytest.mark.parametrize("where", ["inside", "on the host"])
def test_interfaces_of_any_name_are_no_trouble(plain: Vm, bridge: str, where: str) -> None:
    """A tenant names his own; a PCI interface goes back to the host with the name that he gave it."""
    into = ["nsenter", "-t", str(machine.init_pid(plain.name)), "-n"] if where == "inside" else []
    add = ["ip", "link", "add", "type", "veth"]
    for number, name in enumerate(ODD_NAMES):
        subprocess.run([*into, *add[:3], "name", f"odd{number}", *add[3:], "peer", "name", f"peer{number}"], check=True)
        subprocess.run([*into, "ip", "link", "set", "dev", f"odd{number}", "name", name], check=True)
    try:
        attach(plain, bridge, IP="10.77.0.11", INBOUND_AVG_BW=1000, OUTBOUND_AVG_BW=1000).ok()
        assert plain.inside("ip address show dev eth1 | grep -c '10[.]77[.]0[.]11/24'") == "1\n"
        assert reaches_host(plain, "eth1")
        assert "tbf" in machine.command("tc", "qdisc", "show", "dev", f"{plain.name}-1")
        detach(plain, 1).ok()
        plain.act("reboot").ok()
    finally:
        if where == "on the host":
            for number in range(len(ODD_NAMES)):
                machine.command("ip", "link", "delete", "dev", f"peer{number}")


def test_a_nic_that_is_renamed_while_it_comes_is_found_by_its_number(plain: Vm, bridge: str) -> None:
    """Whatever a tenant's own programs call it, it has its address, and the name if that is to be had."""
    names = "ip -o link | sed -n 's/^[0-9]*: \\(vnet[0-9]*\\)@.*/\\1/p'"
    renamer = f"while :; do for name in $({names}); do ip link set $name name mine; done; done"
    machine.join(plain.name, int(plain.inside(f"({renamer}) >/dev/null 2>&1 & echo $!")))
    attach(plain, bridge, IP="10.77.0.11").ok()
    assert "inet 10.77.0.11/24" in plain.inside("ip address")
