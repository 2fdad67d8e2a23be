"""Suspended containers stand still, are known to, and go on: whatever happens to libvirtd, and whoever ends them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from onelxc import rootclient
from tests.support import machine
from tests.support.vms import MONITORD, PULL, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
SAVE_SUSPEND, BOOT_SUSPENDED, SAVE_STOP = 6, 21, 5


@pytest.fixture
def one(vm: NewVm) -> Vm:
    return counting(vm().deployed().booted())


@pytest.fixture
def either(vm: NewVm, form: dict[str, str]) -> Vm:
    """As `one`, in both forms."""
    return counting(vm(user_template=form).deployed().booted())


def counting(one: Vm) -> Vm:
    """It counts, several times a second, in a file."""
    loop = "while :; do echo tick >> /ticks; sleep 0.1; done"
    machine.join(one.name, int(one.inside(f": > /ticks; ({loop}) >/dev/null 2>&1 & echo $!")))
    wait_until(lambda: ticks(one) > 1, "it counts")
    return one


def ticks(one: Vm) -> int:
    """Read from outside: a shell inside would stand still as well."""
    with open(f"/var/lib/onelxc/mnt/{one.vm_id}/root/ticks") as file:
        return len(file.readlines())


def suspend(one: Vm) -> None:
    outcome = one.act("save", one.path("checkpoint"), lcm_state=SAVE_SUSPEND).ok()
    assert (outcome.out, outcome.err) == ("", "")


def resume(one: Vm) -> None:
    stdin = one.action_xml(lcm_state=BOOT_SUSPENDED)
    one.driver("restore", one.path("checkpoint"), "node1", one.name, one.vm_id, "node1", stdin=stdin).ok()


def states() -> dict[int, str]:
    return {vm["id"]: vm["state"] for vm in rootclient.one_shot("reap")["vms"]}


def stands_still(one: Vm) -> bool:
    wait_until(lambda: _tasks_frozen(one), "the kernel says frozen")
    before = ticks(one)
    time.sleep(0.5)
    return ticks(one) == before


def _tasks_frozen(one: Vm) -> bool:
    for path in machine.control_groups(one.name):
        for name, words in (("freezer.state", "FROZEN"), ("cgroup.events", "frozen 1")):
            if os.path.exists(f"{path}/{name}"):
                with open(f"{path}/{name}") as file:
                    if words in file.read():
                        return True
    return False


def goes_on(one: Vm) -> None:
    before = ticks(one)
    wait_until(lambda: ticks(one) > before, "it counts on")


def test_it_stands_still_is_reported_suspended_and_goes_on_as_the_same(either: Vm) -> None:
    one = either
    first = machine.init_pid(one.name)
    suspend(one)
    assert stands_still(one)
    assert states() == {one.vm_id: "paused"}
    suspend(one)
    resume(one)
    goes_on(one)
    assert states() == {one.vm_id: "running"}
    assert machine.init_pid(one.name) == first
    resume(one)
    goes_on(one)


def test_what_was_written_is_on_disk_when_it_is_suspended(one: Vm) -> None:
    one.inside("echo precious > /root/precious")
    suspend(one)
    copy, point = one.path("copy"), "/mnt/copy"
    os.makedirs(point)
    machine.command("cp", "--sparse=always", one.path("disk.0"), copy)
    machine.command("mount", "-o", "loop", copy, point)
    with open(f"{point}/root/precious") as file:
        assert file.read() == "precious\n"
    machine.command("umount", point)
    os.rmdir(point)
    resume(one)


@pytest.mark.parametrize("action", ["cancel", "shutdown", "reboot", "reset"])
def test_a_suspended_one_can_be_ended_and_rebooted(one: Vm, action: str) -> None:
    suspend(one)
    one.act(action).ok()
    if action in ("cancel", "shutdown"):
        assert one.name not in machine.domains()
        assert states() == {}
    else:
        one.booted(2)
        assert states() == {one.vm_id: "running"}


def test_libvirtd_restarts_while_it_is_suspended(one: Vm) -> None:
    first = machine.init_pid(one.name)
    suspend(one)
    machine.restart_libvirtd()
    assert stands_still(one)
    assert states() == {one.vm_id: "paused"}
    resume(one)
    goes_on(one)
    assert machine.init_pid(one.name) == first


def test_cancelled_after_libvirtd_has_forgotten_that_it_is_suspended(one: Vm) -> None:
    suspend(one)
    machine.restart_libvirtd()
    one.act("cancel").ok()
    assert one.name not in machine.domains()


def test_stop_is_refused_and_it_goes_on(one: Vm) -> None:
    outcome = one.act("save", one.path("checkpoint"), lcm_state=SAVE_STOP)
    assert outcome.code == 1
    assert outcome.message == (
        f"Cannot save VM {one.vm_id}: a container's memory cannot be written to a file;"
        " power it off, and undeploy or migrate it then"
    )
    goes_on(one)


def test_a_suspended_one_that_died_starts_anew_from_its_disks(one: Vm) -> None:
    one.inside("echo kept > /root/kept")
    suspend(one)
    # what a restart of the host does to it
    one.driver("cancel", one.name, "node1", one.vm_id, "node1", stdin=one.action_xml()).ok()
    resume(one)
    one.booted(2)
    assert one.inside("cat /root/kept") == "kept\n"


@pytest.mark.parametrize("lcm_state", [22, 48, 35, 37])
def test_one_that_was_stopped_or_moved_starts_anew_from_its_disks(one: Vm, lcm_state: int) -> None:
    """`onevm stop` of a suspended VM asks no driver; what was frozen here is ended first."""
    one.inside("echo kept > /root/kept")
    suspend(one)
    stdin = one.action_xml(lcm_state=lcm_state)
    one.driver("restore", one.path("checkpoint"), "node1", one.name, one.vm_id, "node1", stdin=stdin).ok()
    one.booted(2)
    assert one.inside("cat /root/kept") == "kept\n"


@pytest.mark.generation(PULL)
def test_in_3_2_no_advice_costs_a_disk(vm: NewVm) -> None:
    """What is deleted or resubmitted there is gone, and so is what is shut down."""
    one = vm()
    restore = one.driver("restore", one.path("checkpoint"), "node1", one.vm_id, "node1")
    assert f"they lie in {one.directory}: copy them before" in one.driver.message(restore)
    for action, argv in (("save", (one.path("checkpoint"),)), ("migrate", ("node2", "node1"))):
        outcome = one.driver(action, one.name, *argv, "node1", one.vm_id, "node1")
        assert "keeps only persistent disks and those with SAVE=yes" in one.driver.message(outcome)
    assert os.path.exists(one.path("disk.0"))


def test_the_shims_hold_it_still_while_opennebula_copies_its_disks(one: Vm) -> None:
    """`sudo lxc-freeze -n one-N`, as snap_create_live calls it. Nothing of it shows in the VM's state."""
    sudo = ["runuser", "-u", "oneadmin", "--", "sudo", "-n"]
    machine.command(*sudo, "/usr/sbin/lxc-freeze", "-n", one.name)
    assert stands_still(one)
    assert states() == {one.vm_id: "running"}
    # what is copied now is a file system without anything to repair
    copy = one.path("copy")
    machine.command("cp", "--sparse=always", one.path("disk.0"), copy)
    machine.command("e2fsck", "-f", "-n", copy)
    assert "needs_recovery" not in machine.command("dumpe2fs", "-h", copy)
    os.unlink(copy)
    machine.command(*sudo, "/usr/sbin/lxc-unfreeze", "-n", one.name)
    goes_on(one)


def test_the_shims_do_not_wake_a_suspended_one(one: Vm) -> None:
    suspend(one)
    machine.command("/usr/sbin/lxc-freeze", "-n", one.name)
    machine.command("/usr/sbin/lxc-unfreeze", "-n", one.name)
    assert stands_still(one)
    assert states() == {one.vm_id: "paused"}
    resume(one)
    goes_on(one)


@pytest.mark.parametrize("action", ["cancel", "shutdown"])
def test_one_that_was_never_thawed_after_a_copy_can_be_ended(one: Vm, action: str) -> None:
    """The transfer manager was killed between freeze and unfreeze; processes wait for a frozen file system."""
    machine.command("/usr/sbin/lxc-freeze", "-n", one.name)
    one.act(action).ok()
    assert one.name not in machine.domains()
