"""Snapshots of the whole VM: all disks at one moment, kept while the VM is off and moves, gone back to by a restart."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc import rootclient
from onelxc.root import lock
from tests.support import images, machine
from tests.support.stream import Outcome
from tests.support.vms import MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
HOTPLUG_SNAPSHOT = 24
LOOP = "while :; do echo >> /first; echo >> /srv/data/second; done"


@pytest.fixture
def one(vm: NewVm) -> Vm:
    """Two disks of its own: the root and an image at /srv/data."""
    made = vm()
    made.add_disk(images.busybox_ext4(), TARGET="/srv/data")
    return made.deployed().booted()


@pytest.fixture
def either(vm: NewVm, form: dict[str, str]) -> Vm:
    """As `one`, in both forms."""
    made = vm(user_template=form)
    made.add_disk(images.busybox_ext4(), TARGET="/srv/data")
    return made.deployed().booted()


def snapshot(one: Vm, action: str, name: object) -> Outcome:
    return one.act(action, name, lcm_state=HOTPLUG_SNAPSHOT)


def create(one: Vm, number: int = 0) -> None:
    outcome = snapshot(one, "snapshot_create", number).ok()
    assert (outcome.out, outcome.err) == (f"snap-{number}\n", "")


def revert(one: Vm, number: int = 0) -> None:
    outcome = snapshot(one, "snapshot_revert", f"snap-{number}").ok()
    assert (outcome.out, outcome.err) == ("", "")


def count(one: Vm) -> None:
    """Two files grow by a line at a time, first the one on the first disk, then the one on the second."""
    one.inside(f"({LOOP}) > /dev/null 2>&1 & true")
    wait_until(lambda: numbers(one)[1] > 20, "it counts")


def numbers(one: Vm) -> tuple[int, int]:
    said = one.inside("wc -l < /first; wc -l < /srv/data/second", check=False).split()
    return (int(said[0]), int(said[1])) if len(said) == 2 else (0, 0)


def test_all_disks_are_of_one_moment_and_it_goes_back_to_it_again_and_again(either: Vm) -> None:
    one = either
    count(one)
    create(one)
    kept = Path(one.path("snap-0"))
    assert sorted(os.listdir(kept)) == ["disk.0", "disk.1"]
    for name in ("disk.0", "disk.1"):
        # complete: nothing that a journal would have to put in its place
        machine.command("e2fsck", "-f", "-n", str(kept / name))
        assert (kept / name).owner() == "oneadmin"
    before = numbers(one)
    wait_until(lambda: numbers(one)[0] > before[0] + 20, "it counts on after the snapshot")
    for boots in (2, 2):
        revert(one)
        one.booted(boots)
        first, second = numbers(one)
        assert 20 < first <= before[0]
        assert first - second in (0, 1), "the second disk is of another moment than the first"
        one.inside("echo lost > /root/lost")
    assert one.inside("ls /root/lost") == "/root/lost\n"
    assert snapshot(one, "snapshot_delete", "snap-0") == Outcome("", "", 0)
    assert not kept.exists()


def test_several_and_each_can_be_forgotten(one: Vm) -> None:
    for number in (0, 1):
        one.inside(f"echo {number} > /root/state")
        create(one, number)
    snapshot(one, "snapshot_delete", "snap-0").ok()
    assert not os.path.exists(one.path("snap-0"))
    snapshot(one, "snapshot_delete", "snap-0").ok()
    one.inside("echo later > /root/state")
    revert(one, 1)
    one.booted(2)
    assert one.inside("cat /root/state") == "1\n"


def test_one_that_opennebula_has_forgotten_is_replaced(one: Vm) -> None:
    one.inside("echo old > /root/state")
    create(one)
    one.inside("echo new > /root/state")
    create(one)
    one.inside("echo later > /root/state")
    revert(one)
    assert one.booted(2).inside("cat /root/state") == "new\n"


def test_kept_over_poweroff_and_cold_migration(one: Vm) -> None:
    one.inside("echo old > /root/state")
    create(one)
    one.inside("echo new > /root/state")
    one.act("shutdown").ok()
    # tm_mad/ssh/mv: tar of the whole directory, as oneadmin
    top, name = os.path.split(one.directory)
    script = (
        f"tar -C {top} --sparse -cf - {name} > /var/tmp/moved; rm -rf {one.directory}; tar -C {top} -xf /var/tmp/moved"
    )
    machine.command("runuser", "-u", "oneadmin", "--", "sh", "-ec", script)
    os.unlink("/var/tmp/moved")
    one.deployed().booted(2)
    assert one.inside("cat /root/state") == "new\n"
    revert(one)
    one.booted(2)
    assert one.inside("cat /root/state") == "old\n"


def test_an_image_with_a_daemon_of_its_own_goes_back_as_well(vm: NewVm, tmp_path: Path) -> None:
    """qcow2 has what it needs to be understood in the memory of who shows it, until that is flushed."""
    image = str(tmp_path / "image")
    machine.command("qemu-img", "convert", "-O", "qcow2", images.busybox_ext4(), image)
    one = vm(image).deployed().booted()
    one.inside("echo old > /root/state")
    create(one)
    one.inside("echo new > /root/state")
    revert(one)
    assert one.booted(2).inside("cat /root/state") == "old\n"


def test_persistent_images_of_shared_datastores_stay_links(one: Vm) -> None:
    one.act("shutdown").ok()
    target = f"/var/lib/one/datastores/1/{one.vm_id}-image"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(one.path("disk.0"), target)
    os.symlink(target, one.path("disk.0"))
    one.deployed().booted(2)
    one.inside("echo old > /root/state")
    create(one)
    one.inside("echo new > /root/state")
    revert(one)
    one.booted(3)
    assert one.inside("cat /root/state") == "old\n"
    assert os.readlink(one.path("disk.0")) == target
    one.act("shutdown").ok()
    os.unlink(target)


def test_a_disk_that_was_attached_later_stays_as_it_is(one: Vm) -> None:
    create(one)
    path = one.add_disk(images.busybox_ext4(), TARGET="/srv/later", ATTACH="YES")
    one.act("attach_disk", path, "/srv/later", 2, "b64", lcm_state=17).ok()
    one.inside("echo there > /srv/later/file; echo lost > /srv/data/file")
    revert(one)
    one.booted(1)
    wait_until(lambda: one.inside("cat /srv/later/file", check=False) == "there\n", "the later disk is shown again")
    assert one.inside("cat /srv/data/file", check=False) == ""


def test_an_unknown_one_leaves_the_container_alone(one: Vm) -> None:
    first = machine.init_pid(one.name)
    outcome = snapshot(one, "snapshot_revert", "snap-7")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.message == (
        f"Cannot find snapshot snap-7 of VM {one.vm_id}: {one.path('snap-7')}: No such file or directory"
    )
    assert machine.init_pid(one.name) == first
    for action in ("snapshot_create", "snapshot_revert", "snapshot_delete"):
        outcome = snapshot(one, action, "../7")
        assert outcome.message == f"Cannot {action} VM {one.vm_id}: not a snapshot of ours: '../7'"
        assert (outcome.code, outcome.out) == (1, "")


@pytest.mark.parametrize("trick", ["link", "another's file", "hard link"])
def test_a_file_that_was_exchanged_is_not_used(one: Vm, trick: str) -> None:
    create(one)
    image = Path(one.path("snap-0/disk.1"))
    image.rename(one.path("aside"))
    if trick == "link":
        image.symlink_to("/etc/shadow")
    elif trick == "hard link":
        os.link(one.path("aside"), image)
    else:
        image.write_text("x")
        os.chown(image, 12345, 12345)
    first = machine.init_pid(one.name)
    outcome = snapshot(one, "snapshot_revert", "snap-0")
    assert outcome.code == 1
    assert "disk.1" in outcome.message
    assert machine.init_pid(one.name) == first


@pytest.fixture
def small(vm: NewVm) -> Iterator[Vm]:
    """A VM whose directory has room for little more than its disks."""
    made = vm(image=None)
    machine.command("mount", "-t", "tmpfs", "-o", "size=150m", "tmpfs", made.directory)
    machine.command("chown", "oneadmin:oneadmin", made.directory)
    try:
        made.add_disk(images.busybox_ext4())
        yield made.deployed().booted()
        made.act("cancel").ok()
    finally:
        machine.command("umount", made.directory)


def test_too_little_room_is_told_before_anything_is_done(small: Vm) -> None:
    small.inside("dd if=/dev/urandom of=/big bs=1M count=50; sync")
    outcome = snapshot(small, "snapshot_create", 0)
    assert outcome.code == 1
    assert outcome.message.startswith(f"Cannot make snap-0 of VM {small.vm_id}: ")
    assert f"MiB needed in {small.directory}, " in outcome.message
    assert [name for name in os.listdir(small.directory) if "snap" in name] == []
    small.inside("echo goes on")


@pytest.fixture
def reflinks(vm: NewVm) -> Iterator[Vm]:
    """A VM whose directory lies on XFS."""
    made = vm(image=None)
    volume = f"/var/tmp/{made.vm_id}.xfs"
    machine.command("truncate", "-s", "400M", volume)
    machine.command("mkfs.xfs", "-q", volume)
    machine.command("mount", "-o", "loop", volume, made.directory)
    machine.command("chown", "oneadmin:oneadmin", made.directory)
    try:
        made.add_disk(images.busybox_ext4())
        yield made.deployed().booted()
        made.act("cancel").ok()
    finally:
        machine.command("umount", made.directory)
        os.unlink(volume)


def test_a_reflink_costs_no_room(reflinks: Vm) -> None:
    reflinks.inside("dd if=/dev/urandom of=/big bs=1M count=40; sync")
    before = os.statvfs(reflinks.directory).f_bfree
    create(reflinks)
    space = os.statvfs(reflinks.directory)
    assert (before - space.f_bfree) * space.f_bsize < 8 << 20
    reflinks.inside("rm /big")
    revert(reflinks)
    assert reflinks.booted(2).inside("wc -c < /big") == f"{40 << 20}\n"


def states() -> dict[int, str]:
    return {vm["id"]: vm["state"] for vm in rootclient.one_shot("reap")["vms"]}


def test_a_helper_killed_amid_a_copy_leaves_a_container_that_goes_on(one: Vm) -> None:
    one.inside("dd if=/dev/urandom of=/big bs=1M count=50 && sync")
    running = one.start("snapshot_create", 0, lcm_state=HOTPLUG_SNAPSHOT)
    wait_until(lambda: os.path.exists(one.path(".snap-0.new/disk.0")), "the copy has begun", interval_s=0.0005)
    helper = lock.holder(one.vm_id)
    assert helper is not None
    os.kill(helper.pid, signal.SIGKILL)
    assert running.wait().code == 1
    wait_until(lambda: states() == {one.vm_id: "running"}, "the next look has put it right")
    assert one.inside("echo goes on > /file; cat /file") == "goes on\n"
    assert [name for name in os.listdir(one.directory) if "snap" in name] == []
    create(one)


def test_killed_amid_going_back_the_disks_are_all_old_or_all_new(one: Vm) -> None:
    one.inside("echo old | tee /file > /srv/data/file; sync")
    create(one)
    one.inside("echo new | tee /file > /srv/data/file; dd if=/dev/urandom of=/big bs=1M count=40; sync")
    running = one.start("snapshot_revert", "snap-0", lcm_state=HOTPLUG_SNAPSHOT)
    begun = lambda: any(name.startswith(".onelxc-disk.1") for name in os.listdir(one.directory))  # noqa: E731
    wait_until(lambda: begun() or running.ended, "the copies are made", interval_s=0.0005)
    helper = lock.holder(one.vm_id)
    if helper is not None:
        os.kill(helper.pid, signal.SIGKILL)
    running.wait()
    wait_until(lambda: states().get(one.vm_id) in (None, "running"), "the next look has settled it")
    if one.name not in machine.domains():
        one.deployed()
    one.booted(1)
    assert one.inside("cat /file /srv/data/file") in ("old\nold\n", "new\nnew\n")
    assert [name for name in os.listdir(one.directory) if name.startswith(".onelxc")] == []
