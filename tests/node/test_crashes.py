"""What dies besides containers: the host, libvirtd, a container's controller. Afterwards the same VM starts again with
all that it had written, or ends, and nothing is left.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import libvirt
import pytest

from onelxc.root import cgroups, freezer
from tests.support import images, leaks, machine
from tests.support.vms import HOST, Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]
SHUTOFF = libvirt.VIR_DOMAIN_SHUTOFF


def controller(one: Vm) -> int:
    with open(f"/run/libvirt/lxc/{one.name}.pid") as file:
        return int(file.read())


def is_there(pid: int) -> bool:
    return bool(machine.command_line(pid))


def zombie(one: Vm) -> None:
    """The container ends while libvirtd is away: libvirt shows a transient domain that is shut off, for ever."""
    init = machine.init_pid(one.name)
    with machine.libvirtd_away():
        os.kill(init, signal.SIGKILL)
        wait_until(lambda: not is_there(init), "init has ended")
    wait_until(lambda: machine.domains().get(one.name) == SHUTOFF, "a zombie is there")


def orphan(one: Vm) -> None:
    """The controller dies while libvirtd is away: the container's processes live on and belong to nobody."""
    init, pid = machine.init_pid(one.name), controller(one)
    with machine.libvirtd_away():
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_there(pid), "the controller has ended")
        assert is_there(init)
    assert is_there(init)


def host_crash(one: Vm) -> None:
    """All processes die at once; mounts, devices and what lies in /run are gone. Files stay as they were flushed."""
    init, pid = machine.init_pid(one.name), controller(one)
    with machine.libvirtd_away():
        for each in (pid, init):
            os.kill(each, signal.SIGKILL)
        wait_until(lambda: not is_there(init) and not is_there(pid), "all have ended")
        for mount in reversed(
            [mount.point for mount in machine.mounts() if mount.point.startswith("/var/lib/onelxc/mnt/")]
        ):
            machine.command("umount", mount)
        machine.command("rm", "-rf", "/run/onelxc/lock", "/run/onelxc/giveup", f"/run/libvirt/lxc/{one.name}.xml")


CRASHES = {"zombie": zombie, "orphan": orphan, "host crash": host_crash}


@pytest.fixture(params=list(CRASHES))
def crashed(request: pytest.FixtureRequest, vm: NewVm) -> Vm:
    one = vm().deployed().booted()
    one.inside("echo kept > /root/kept; sync")
    CRASHES[request.param](one)
    return one


def test_restart_begins_anew_with_what_was_written(crashed: Vm) -> None:
    """3.2.1's `onevm restart` of a VM in UNKNOWN is a second deploy."""
    crashed.deployed().booted(2)
    assert crashed.inside("cat /root/kept") == "kept\n"


def test_cancel_leaves_nothing(crashed: Vm) -> None:
    crashed.act("cancel").ok()
    assert crashed.name not in machine.domains()
    assert not [mount for mount in machine.mounts() if f"/{crashed.vm_id}/" in mount.point]
    assert not [group for group in machine.cgroups() if crashed.name in group]


def test_shutdown_of_what_has_ended_is_success(crashed: Vm) -> None:
    crashed.act("shutdown").ok()
    assert crashed.name not in machine.domains()


def test_poll_lets_go_before_it_says_so(crashed: Vm) -> None:
    assert crashed.act("poll").ok().out.split()[0] == "STATE=d"
    assert crashed.name not in machine.domains()
    assert not [mount for mount in machine.mounts() if f"/{crashed.vm_id}/" in mount.point]
    assert not [group for group in machine.cgroups() if crashed.name in group]


@pytest.mark.parametrize("action", ["cancel", "poll"])
def test_what_libvirt_destroyed_by_halves_does_not_come_back(vm: NewVm, action: str) -> None:
    """A destroy that failed leaves libvirt's own file behind, which a restarted libvirtd makes a zombie of."""
    one = vm().deployed().booted()
    path = f"/run/libvirt/lxc/{one.name}.xml"
    with open(path, "rb") as file:
        kept = file.read()
    # Debian 12's really fails, with ENODEV, and forgets the container all the same
    machine.command("virsh", "-c", "lxc:///", "destroy", one.name, check=False)
    wait_until(lambda: one.name not in machine.domains(), "libvirt has forgotten it")
    with open(path, "wb") as file:
        file.write(kept)
    one.act(action).ok()
    machine.restart_libvirtd()
    assert one.name not in machine.domains()


@pytest.mark.parametrize("action", ["reboot", "shutdown", "cancel", "poll", "deploy"])
def test_containers_go_on_without_libvirtd_and_are_known_again(vm: NewVm, action: str) -> None:
    one = vm().deployed().booted()
    init = machine.init_pid(one.name)
    with machine.libvirtd_away():
        assert is_there(init)
    assert machine.init_pid(one.name) == init
    outcome = one.deploy() if action == "deploy" else one.act(action)
    outcome.ok()
    if action == "reboot":
        one.booted(2)
    elif action == "poll":
        assert outcome.out.startswith("STATE=a ")
    elif action == "deploy":
        assert machine.init_pid(one.name) == init
    else:
        assert one.name not in machine.domains()


@pytest.mark.parametrize("action", ["shutdown", "reboot"])
def test_libvirtd_away_is_said_and_the_container_goes_on(vm: NewVm, action: str) -> None:
    one = vm().deployed().booted()
    init = machine.init_pid(one.name)
    with machine.libvirtd_away():
        outcome = one.act(action)
        message = one.driver.message(outcome)
        assert outcome.code == 1
        assert str(one.vm_id) in message
        assert "Cannot" in message
        assert "libvirt" in message
        assert is_there(init)


ADVICE = "see `systemctl status libvirtd` on this host, then do it again"


def test_a_libvirtd_that_restarts_amid_an_action_is_named_and_nothing_else(vm: NewVm) -> None:
    """Not what the container happened to say last on its console, and what to do."""
    one = vm(images.one_process_tar()).deployed().booted()
    running = one.start("shutdown")
    wait_until(lambda: os.path.exists(f"/run/onelxc/lock/{one.vm_id}"), "the shutdown is at work")
    machine.restart_libvirtd()
    message = one.driver.message(running.wait())
    assert str(one.vm_id) in message
    assert "libvirt" in message
    assert message.endswith(ADVICE)
    assert "its console said" not in message
    assert one.running


@pytest.fixture
def hanging() -> Iterator[None]:
    """libvirtd is there and does nothing."""
    pids = [pid for pid in machine.pids() if os.path.basename(machine.command_line(pid).split(" ")[0]) == "libvirtd"]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_libvirtd_that_hangs_holds_no_action_for_ever(vm: NewVm, request: pytest.FixtureRequest) -> None:
    one = vm(images.one_process_tar()).deployed().booted()
    running = one.start("shutdown")
    wait_until(lambda: os.path.exists(f"/run/onelxc/lock/{one.vm_id}"), "the shutdown is at work")
    request.getfixturevalue("hanging")
    for outcome in (running.wait(), one.act("reboot")):
        message = one.driver.message(outcome)
        assert outcome.code == 1
        assert "libvirt" in message
        assert message.endswith(ADVICE)
    one.act("cancel").ok()
    assert not [mount for mount in machine.mounts() if f"/{one.vm_id}/" in mount.point]


def test_cancel_without_libvirtd_ends_the_container_all_the_same(vm: NewVm) -> None:
    """oned will not ask again: the kernel is enough."""
    one = vm().deployed().booted()
    init = machine.init_pid(one.name)
    with machine.libvirtd_away():
        one.act("cancel").ok()
        assert not is_there(init)
    monitor = one.driver.probe("lxc.d/onelxc-reap", "lxc", 0, HOST)
    assert monitor.code == 0
    one.deployed().booted()


def test_libvirtd_killed_in_the_middle_of_a_deploy_leaves_nothing(vm: NewVm) -> None:
    one = vm()
    before = leaks.snapshot()
    deploy = one.start_deploy()
    wait_until(lambda: deploy.ended or os.path.exists(f"/var/lib/onelxc/mnt/{one.vm_id}/root/sbin"), interval_s=0.002)
    with machine.libvirtd_away():
        outcome = deploy.wait()
    if outcome.code:
        message = one.driver.message(outcome)
        assert str(one.vm_id) in message
        one.delete()
        leaks.assert_none_since(before)
        assert one.name not in machine.domains()
    else:
        one.booted()


@pytest.mark.parametrize("action", ["shutdown", "reboot", "cancel"])
def test_frozen_containers_are_ended_and_rebooted_too(vm: NewVm, action: str) -> None:
    """By libvirt itself where it can (version 1 of control groups), and forgotten by it when it was restarted."""
    one = vm().deployed().booted()
    first = machine.init_pid(one.name)
    if cgroups.version() == 2:
        freezer.freeze(one.vm_id)
    else:
        connection = libvirt.open("lxc:///")
        connection.lookupByName(one.name).suspend()
        connection.close()
    machine.restart_libvirtd()
    one.act(action).ok()
    if action == "reboot":
        one.booted(2)
        assert machine.init_pid(one.name) != first
    else:
        assert one.name not in machine.domains()
        assert not is_there(first)
