"""The reaper: what is dead has been released before it is said to be off, and nothing that lives is touched."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from onelxc import rootclient
from onelxc.model import VmPaths
from onelxc.root import cgroups, freezer, orphans
from tests.support import images, machine
from tests.support.plain import Plain
from tests.support.vms import Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]


def states() -> dict[int, str]:
    return {vm["id"]: vm["state"] for vm in rootclient.one_shot("reap")["vms"]}


def held(one: Vm) -> list[str]:
    mounts = [mount.point for mount in machine.mounts() if mount.point.startswith(VmPaths(one.vm_id).mounts + "/")]
    return mounts + [path for path in machine.loops().values() if one.directory in path]


def test_only_the_dead_one_of_several_is_let_go_and_said_once(vm: NewVm) -> None:
    dead, alive = vm().deployed().booted(), vm().deployed().booted()
    assert states() == {dead.vm_id: "running", alive.vm_id: "running"}
    os.kill(machine.init_pid(dead.name), signal.SIGKILL)
    wait_until(lambda: dead.name not in machine.domains(), "its end")
    assert held(dead) != []
    assert states() == {dead.vm_id: "off", alive.vm_id: "running"}
    assert held(dead) == []
    assert not os.path.exists(VmPaths(dead.vm_id).state)
    assert states() == {alive.vm_id: "running"}
    assert alive.inside("echo alive") == "alive\n"


def test_the_living_are_told_without_libvirt(vm: NewVm) -> None:
    """No probe waits for a libvirtd that hangs, as long as nothing has ended."""
    one = vm().deployed().booted()
    with machine.libvirtd_away():
        assert states() == {one.vm_id: "running"}


def test_one_that_reboots_is_never_off(vm: NewVm) -> None:
    one = vm().deployed().booted()
    for boots in (2, 3):
        first = machine.init_pid(one.name)
        one.inside("reboot", check=False)
        seen = set()

        def restarted(first: int = first, seen: set[str] = seen) -> bool:
            seen.add(states().get(one.vm_id, "missing"))
            return one.runs_anew(first)

        wait_until(restarted, "the reboot", interval_s=0)
        assert seen <= {"running", "busy"}  # busy: a look at the moment in which the hub sees to the reboot
        one.booted(boots)
        wait_until(lambda: states() == {one.vm_id: "running"}, "the hub has done")


def test_containers_that_are_not_ours_are_not_even_listed(vm: NewVm) -> None:
    one = vm().deployed().booted()
    foreign = Plain("one-9950", "sleep 86400")
    try:
        assert states() == {one.vm_id: "running"}
        assert machine.domains()["one-9950"] == 1
    finally:
        foreign.end()


def test_a_data_disk_that_is_deleted_costs_no_vm_its_life(vm: NewVm) -> None:
    made = vm()
    made.add_disk(images.busybox_ext4(), TARGET="/srv/data")
    made.deployed().booted()
    os.unlink(made.path("disk.1"))
    assert states() == {made.vm_id: "running"}


def test_a_root_image_that_is_deleted_does(vm: NewVm) -> None:
    one = vm().deployed().booted()
    one.delete()
    assert states() == {one.vm_id: "off"}
    assert one.name not in machine.domains()
    assert held(one) == []


def test_moving_the_vms_directory_away_and_back_is_no_deletion(vm: NewVm) -> None:
    """What the kernel says of the image is by the file, not by its name."""
    one = vm().deployed().booted()
    os.rename(one.directory, f"{one.directory}.moved")
    assert states() == {one.vm_id: "running"}
    os.rename(f"{one.directory}.moved", one.directory)


def test_frozen_by_somebody_elses_hand_is_suspended(vm: NewVm) -> None:
    one = vm().deployed().booted()
    freezer.freeze(one.vm_id)
    wait_until(lambda: states() == {one.vm_id: "paused"}, "the freezer has taken hold")
    freezer.thaw(one.vm_id)
    wait_until(lambda: states() == {one.vm_id: "running"}, "it goes on")


def power_cut(one: Vm) -> None:
    """The processes, the mounts and the devices of a host that lost its power are gone; files are not."""
    with machine.libvirtd_away():
        for group in cgroups.groups(one.vm_id):
            for pid in cgroups.processes(group.path):
                orphans.kill(pid)
        wait_until(lambda: not any(cgroups.processes(group.path) for group in cgroups.groups(one.vm_id)))
        for group in cgroups.groups(one.vm_id):
            cgroups.remove(group.path)
        for link in machine.links():
            if link.startswith(f"{one.name}-"):
                machine.command("ip", "link", "delete", link, check=False)  # the kernel may be quicker
        wait_until(lambda: not any(link.startswith(f"{one.name}-") for link in machine.links()), "its links are gone")
        for mount in machine.mounts():
            if mount.point.startswith(VmPaths(one.vm_id).mounts + "/"):
                machine.command("umount", mount.point)
        for suffix in ("xml", "pid"):
            Path(f"/run/libvirt/lxc/{one.name}.{suffix}").unlink(missing_ok=True)
        record = Path(VmPaths(one.vm_id).record)
        if record.exists():
            data = json.loads(record.read_text())
            record.write_text(json.dumps({**data, "boot": "another-boot"}))


def test_after_a_power_cut_it_is_off_not_resurrected_and_starts_anew(vm: NewVm, bridge: str) -> None:
    one = vm()
    one.add_nic(bridge)
    one.deployed().booted()
    one.inside("echo precious > /root/kept; sync")
    power_cut(one)
    assert states() == {one.vm_id: "off"}
    assert states() == {}
    assert one.name not in machine.domains()
    one.deployed().booted(2)
    assert one.inside("cat /root/kept") == "precious\n"


def test_a_deploy_itself_clears_what_a_power_cut_has_left(vm: NewVm) -> None:
    one = vm().deployed().booted()
    power_cut(one)
    one.deployed().booted(2)
    assert states() == {one.vm_id: "running"}
