"""A disk is open for writing on one host at a time, whatever OpenNebula does without asking a driver.

The other host is a process with a name and a machine-id of its own, which takes leases by the helper's own code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from onelxc import names, rootclient
from onelxc.model import VmPaths
from onelxc.root import hub, leasefile, leases, record
from tests.support import hostconf, images, machine
from tests.support.stream import USER
from tests.support.vms import HOST, MONITORD, REMOTES, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
SAVE_SUSPEND, BOOT_SUSPENDED, BOOT_STOPPED = 6, 21, 22
REPOSITORY = Path(__file__).resolve().parents[2]

OTHER = """
import dataclasses, json, os, sys, time
sys.path.insert(0, sys.argv[1])
from onelxc import config, model, names
names.STATE = model.STATE = sys.argv[2]
from onelxc.root import leases, record
from onelxc.root.journal import Journal
from onelxc.root.work import Work
vm_id, path = int(sys.argv[3]), sys.argv[4]
def tell(**what):
    print(json.dumps(what), flush=True)
journal = Journal(os.path.join(sys.argv[2], "journal"), "deploy")
work = Work(vm_id, "deploy", journal, config.host(), lambda text: tell(log=text))
try:
    leases.take(work, model.Disk(disk_id=0, path=path))
    tell(taken=True)
except Exception as error:
    tell(error=str(error))
for line in sys.stdin:
    if line == "keep\\n":
        state = leases.state(vm_id, journal.held(), work.config)
        tell(state=state.value)
    else:
        for entry in leases.held(journal):
            leases.give_back(work, entry.what)
        tell(gone=True)
"""


class OtherHost:
    """Host B, in its own UTS namespace; it holds nothing but a lease."""

    def __init__(self, state: Path, vm_id: int, path: str) -> None:
        state.mkdir(exist_ok=True)
        argv = ["unshare", "--uts", "sh", "-c", 'hostname host-b; exec "$0" "$@"', sys.executable, "-c", OTHER]
        self.process = subprocess.Popen(
            [*argv, str(REPOSITORY), str(state), str(vm_id), path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.logs: list[str] = []

    def answer(self) -> dict[str, object]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said: dict[str, object] = json.loads(line)
            if "log" not in said:
                return said
            self.logs.append(str(said["log"]))
        raise AssertionError("the other host ended")

    def ask(self, what: str) -> dict[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def host_b(tmp_path: Path) -> Iterator[Callable[[Vm], OtherHost]]:
    made: list[OtherHost] = []

    def make(one: Vm, disk: str = "disk.0") -> OtherHost:
        made.append(OtherHost(tmp_path / f"b{len(made)}", one.vm_id, one.path(disk)))
        return made[-1]

    yield make
    for host in made:
        host.end()


@contextmanager
def short_leases(seconds: int = 8) -> Iterator[None]:
    with hostconf.with_line(f"LEASE_TIMEOUT = {seconds}"):
        yield


@pytest.fixture
def short() -> Iterator[None]:
    with short_leases():
        yield


def lease(one: Vm, disk: str = "disk.0") -> leasefile.Seen | None:
    directory = os.open(one.directory, os.O_RDONLY)
    try:
        return leasefile.read(directory, leasefile.name_for(disk))
    finally:
        os.close(directory)


def suspend(one: Vm) -> None:
    one.act("save", one.path("checkpoint"), lcm_state=SAVE_SUSPEND).ok()


def restore(one: Vm, lcm_state: int = BOOT_SUSPENDED) -> None:
    stdin = one.action_xml(lcm_state=lcm_state)
    one.driver("restore", one.path("checkpoint"), HOST, one.name, one.vm_id, HOST, stdin=stdin).ok()


def loops_over(one: Vm) -> list[str]:
    return [name for name, path in machine.loops().items() if path.startswith(one.directory)]


def no_hub() -> None:
    pid = hub.pid()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not hub.is_running(), "the hub's end")


def test_it_is_there_while_the_container_is_and_oneadmin_may_remove_it(vm: NewVm) -> None:
    one = vm().deployed()
    seen = lease(one)
    assert seen is not None
    assert seen.lease is not None
    assert (seen.lease.vm_id, seen.lease.disk_id, seen.is_copy) == (one.vm_id, 0, False)
    owner = os.stat(os.path.join(one.directory, leasefile.name_for("disk.0")))
    assert (owner.st_uid, owner.st_gid) == (os.stat(one.directory).st_uid, os.stat(one.directory).st_gid)
    one.act("cancel").ok()
    assert [name for name in os.listdir(one.directory) if "lease" in name] == []


def test_a_running_one_is_refused_to_another_host_in_a_line_that_names_this_one(
    vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]
) -> None:
    one = vm().deployed().booted()
    error = str(host_b(one).answer()["error"])
    assert error.startswith(f"Cannot use {one.path('disk.0')}: it runs on host {machine.command('hostname').strip()}")
    assert one.running


def test_a_suspended_one_is_let_go_when_another_host_asks(
    vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]
) -> None:
    one = vm().deployed().booted()
    one.inside("echo kept > /kept")
    suspend(one)
    assert host_b(one).answer() == {"taken": True}
    assert not loops_over(one), "the image is still open here"
    assert one.name not in machine.domains()


def test_one_that_somebody_removed_by_hand_comes_back(vm: NewVm, short: None) -> None:
    one = vm().deployed().booted()
    first, before = machine.init_pid(one.name), lease(one)
    assert before is not None
    wait_until(lambda: (seen := lease(one)) is not None and seen.refreshed > before.refreshed, "a sign of life")
    time.sleep(3)  # the hub remembers when it saw it
    os.unlink(one.path(leasefile.name_for("disk.0")))
    wait_until(lambda: lease(one) is not None, "the lease")
    assert machine.init_pid(one.name) == first


def test_what_another_host_has_is_refused_here(vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]) -> None:
    one = vm()
    other = host_b(one)
    assert other.answer() == {"taken": True}
    running = one.start_deploy()
    for _ in range(40):
        assert other.ask("keep")["state"] in ("held", "wanted")
        time.sleep(0.2)
    outcome = running.wait(60)
    assert outcome.code == 1
    assert "host host-b" in outcome.message
    assert not loops_over(one)
    assert other.ask("give back") == {"gone": True}
    one.deployed()


def test_what_a_dead_host_had_is_taken_over_after_its_time(
    vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]
) -> None:
    one = vm()
    other = host_b(one)
    assert other.answer() == {"taken": True}
    other.end()
    began = time.monotonic()
    one.deployed()
    assert time.monotonic() - began > 6


def test_the_hub_keeps_it_alive(vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]) -> None:
    one = vm().deployed()
    first = lease(one)
    assert first is not None
    wait_until(lambda: (seen := lease(one)) is not None and seen.refreshed > first.refreshed + 4, "signs of life")


def test_a_status_probe_lets_go_where_no_hub_runs(vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]) -> None:
    one = vm().deployed().booted()
    suspend(one)
    no_hub()
    other = host_b(one)
    deadline = time.monotonic() + 20
    while one.name in machine.domains() and time.monotonic() < deadline:
        no_hub()
        rootclient.one_shot("reap")
        time.sleep(0.5)
    assert other.answer() == {"taken": True}
    assert one.name not in machine.domains()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_the_status_probe_sees_to_the_leases_of_a_hub_that_shows_no_life(vm: NewVm, sent: int) -> None:
    one = vm().deployed().booted()
    probe = f"{REMOTES}/im/onelxc-probes.d/vm/status/onelxc lxc 2 {HOST}"
    pid = hub.pid()
    assert pid is not None
    command = ["bash", "-c", f"while {probe} </dev/null; do sleep 1; done"]
    loop = subprocess.Popen(command, stdout=subprocess.PIPE, user=USER, group=USER, cwd="/", start_new_session=True)
    try:
        assert loop.stdout is not None
        loop.stdout.readline()
        os.kill(pid, sent)
        for _ in range(2):
            killed = time.time()
            wait_until(lambda: (seen := lease(one)) is not None and seen.refreshed > killed, "life", timeout_s=30)  # noqa: B023
        assert (hub.pid() == pid) == (sent == signal.SIGSTOP)
    finally:
        if sent == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)
        os.killpg(loop.pid, signal.SIGKILL)
        loop.communicate()


def test_the_hub_stays_while_a_long_deploy_has_a_lease(vm: NewVm, tmp_path: Path) -> None:
    """Nothing of it is mounted as long as an archive is imported; what keeps the lease alive must not be idle."""
    no_hub()
    one = vm()
    other = Path(VmPaths(one.vm_id).state)
    daemon = subprocess.Popen([REPOSITORY / "libexec/onelxc-hub", "--idle-s", "0.5"])
    try:
        other.mkdir(parents=True, exist_ok=True)
        wait_until(lambda: os.path.exists(names.HUB_BEAT) and hub.is_running(), "the hub")
        os.utime(hub.PID, (0, 0))
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.wait(8)
        other.rmdir()
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.wait()


def _taken_by_force(one: Vm) -> None:
    """What another host does when this one gave no sign of life for long: it was away, its virtual machine paused."""
    directory = os.open(one.directory, os.O_RDONLY)
    name = leasefile.name_for("disk.0")
    seen = leasefile.read(directory, name)
    assert seen is not None
    assert seen.lease is not None
    stranger = leasefile.Lease("other@host-b", "host-b", "another boot", one.vm_id, 0, "0" * 16, 3600)
    with leasefile.Draft(directory, name, stranger) as draft:
        assert leasefile.displace(directory, name, seen.lease.token, f"{name}.aside")
        assert draft.publish()
    os.close(directory)


@pytest.mark.parametrize("suspended", [True, False])
def test_one_that_lost_its_disks_is_ended_without_another_byte_in_them(vm: NewVm, suspended: bool) -> None:
    one = vm().deployed().booted()
    if suspended:
        suspend(one)
    else:
        one.inside("(while :; do echo x >> /busy; sleep 0.05; done) >/dev/null 2>&1 & sleep 0.5; sync")
        machine.command("/usr/sbin/lxc-freeze", "-n", one.name)
    before = machine.command("sha1sum", one.path("disk.0"))
    _taken_by_force(one)
    wait_until(lambda: one.name not in machine.domains() and not loops_over(one), "its end", timeout_s=40)
    assert machine.command("sha1sum", one.path("disk.0")) == before
    stranger = lease(one)
    assert stranger is not None
    assert stranger.lease is not None
    assert stranger.lease.hostname == "host-b"
    leasefile.remove(os.open(one.directory, os.O_RDONLY), leasefile.name_for("disk.0"), "0" * 16)


def test_sent_home_again_it_is_started_anew_and_not_taken_for_a_running_one(vm: NewVm) -> None:
    one = vm().deployed().booted()
    first = machine.init_pid(one.name)
    suspend(one)
    no_hub()
    _taken_by_force(one)
    leasefile.remove(os.open(one.directory, os.O_RDONLY), leasefile.name_for("disk.0"), "0" * 16)
    one.deployed().booted()
    assert machine.init_pid(one.name) != first


def test_a_frozen_left_over_is_ended_by_a_deploy(vm: NewVm) -> None:
    one = vm().deployed().booted()
    first = machine.init_pid(one.name)
    suspend(one)
    one.deployed().booted()
    assert machine.init_pid(one.name) != first


def test_a_lease_that_was_copied_with_its_disk_is_none(vm: NewVm, host_b: Callable[[Vm], OtherHost]) -> None:
    """tm/ssh moves the directory with tar; the container here goes on, of files that are gone."""
    one, two = vm(), vm()
    other = host_b(one)
    assert other.answer() == {"taken": True}
    machine.command("sh", "-c", f"tar -C {one.directory} -cf - . | tar -C {two.directory} -xf -")
    assert lease(two) is not None
    two.deployed()


def test_a_lease_of_this_host_that_nobody_holds_is_none(vm: NewVm) -> None:
    """Of an earlier boot, or of a VM whose journal was lost."""
    one = vm()
    directory = os.open(one.directory, os.O_RDONLY)
    name = leasefile.name_for("disk.0")
    for boot, vm_id in (("an earlier boot", 9999), (record.boot_id(), 9999), (record.boot_id(), one.vm_id)):
        old = leasefile.Lease(leases.host_identity(), "here", boot, vm_id, 0, "f" * 16, 3600)
        with leasefile.Draft(directory, name, old) as draft:
            assert draft.publish()
        began = time.monotonic()
        one.deployed()
        assert time.monotonic() - began < 20
        one.act("cancel").ok()
    os.close(directory)


def test_one_that_cannot_be_read_goes_by_its_age(vm: NewVm, short: None) -> None:
    one = vm()
    path = Path(one.directory, leasefile.name_for("disk.0"))
    for content in ("", "{" * 600, "[1]", '{"host": 1, "inode": "x"}', "\udcff"):
        path.write_text(content, errors="surrogateescape")
        os.utime(path, (0, 0))
        one.deployed()
        one.act("cancel").ok()


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


JUNK: dict[str, Callable[[str], None]] = {
    "a directory": os.mkdir,
    "a FIFO": os.mkfifo,
    "a socket": _socket,
    "a link": lambda path: os.symlink("/etc/hostname", path),
    "a link to nothing": lambda path: os.symlink("nothing", path),
    "huge": lambda path: machine.command("truncate", "-s", "1T", path) and None,
}


@pytest.mark.parametrize("what", JUNK)
def test_what_is_no_lease_keeps_nobody(vm: NewVm, short: None, what: str) -> None:
    one = vm()
    path, before = one.path(leasefile.name_for("disk.0")), Path("/etc/hostname").read_bytes()
    JUNK[what](path)
    os.utime(path, (0, 0), follow_symlinks=False)
    one.deployed().booted()
    first = machine.init_pid(one.name)
    os.unlink(path)
    JUNK[what](path)  # and while it runs
    wait_until(lambda: (seen := lease(one)) is not None and seen.lease is not None, "it is written again")
    assert machine.init_pid(one.name) == first
    one.act("cancel").ok()
    assert [name for name in os.listdir(one.directory) if "lease" in name] == []
    assert Path("/etc/hostname").read_bytes() == before


def test_a_lease_of_the_future_ends_as_well(vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]) -> None:
    """The server's clock was wrong when its host died."""
    one = vm()
    other = host_b(one)
    assert other.answer() == {"taken": True}
    other.end()
    os.utime(one.path(leasefile.name_for("disk.0")), (4e9, 4e9))
    one.deployed()


def test_one_that_runs_keeps_its_disks_when_its_directory_is_moved(
    vm: NewVm, short: None, host_b: Callable[[Vm], OtherHost]
) -> None:
    """As the transfer manager of a shared datastore does, if OpenNebula is told that a refused migration succeeded."""
    one = vm().deployed().booted()
    before = one.directory
    moved = f"{before}.moved"
    os.rename(before, moved)
    try:
        os.utime(f"{moved}/{leasefile.name_for('disk.0')}", (0, 0))
        one.directory = moved
        assert "it runs on host" in str(host_b(one).answer().get("error"))
        assert one.running
    finally:
        one.directory = before
        os.rename(moved, before)


def test_an_image_with_the_longest_name_has_one_too(vm: NewVm) -> None:
    one, image = vm(), "i" * 205
    os.rename(one.path("disk.0"), one.path(image))
    os.symlink(image, one.path("disk.0"))
    one.deployed()
    assert lease(one, image) is not None
    one.act("cancel").ok()
    assert lease(one, image) is None


def test_two_vms_of_one_host_do_not_write_to_the_same_image(vm: NewVm) -> None:
    one, two = vm(), vm(image=None)
    os.symlink(one.path("disk.0"), two.path("disk.0"))
    two.disks.append(dict(one.disks[0]))
    one.deployed()
    outcome = two.deploy()
    assert outcome.code == 1
    assert f"VM {one.vm_id} of this host has it" in outcome.message
    assert one.running


def test_one_that_was_suspended_and_then_deleted_keeps_no_image(vm: NewVm, short: None) -> None:
    """`onevm terminate` of a suspended VM asks no driver. A persistent image is a link, and goes to the next VM."""
    store = "/var/lib/one/datastores/1"
    os.makedirs(store)
    one, two = vm(), vm(image=None)
    machine.command("mv", one.path("disk.0"), f"{store}/image")
    machine.command("chown", "-R", "oneadmin:", store)
    for each in (one, two):
        os.symlink(f"{store}/image", each.path("disk.0"))
    two.disks.append(dict(one.disks[0]))
    one.deployed().booted()
    suspend(one)
    two.deployed().booted(1)
    assert one.name not in machine.domains()
    two.act("cancel").ok()
    one.deployed()
    suspend(one)
    machine.command("rm", "-r", one.directory)
    rootclient.one_shot("reap")
    assert one.name not in machine.domains()
    assert not [path for path in machine.loops().values() if path.startswith(store)]
    machine.command("rm", "-r", store)


def test_disks_that_were_exchanged_while_it_was_suspended_are_the_ones_it_goes_on_with(vm: NewVm) -> None:
    """`onevm disk-snapshot-create` of a suspended VM asks no driver, and may leave another file in the disk's place."""
    one = vm().deployed().booted()
    one.inside("echo kept > /kept")
    suspend(one)
    machine.command(
        "sh", "-c", f"cd {one.directory}; mkdir disk.0.snap; mv disk.0 disk.0.snap/0; cp disk.0.snap/0 disk.0"
    )
    machine.command("chown", "-R", "oneadmin:", one.directory)
    restore(one)
    one.booted(2)
    assert one.inside("cat /kept") == "kept\n"
    assert loops_over(one)
    assert [path for path in machine.loops().values() if path.startswith(one.directory)] == [one.path("disk.0")]


def test_one_vm_does_not_have_an_image_twice(vm: NewVm) -> None:
    one = vm()
    os.symlink("disk.0", one.path("disk.1"))
    one.disks.append({**one.disks[0], "DISK_ID": 1, "TARGET": "sdb"})
    outcome = one.deploy()
    assert outcome.code == 1
    assert "the same image as disk 0" in outcome.message


def test_images_that_nobody_writes_to_are_shared(vm: NewVm, tmp_path: Path) -> None:
    shared = vm(image=None).path("shared.img")
    machine.command("sh", "-c", f"truncate -s 16M {shared}; mkfs.ext4 -q {shared}")
    for one in (vm(), vm()):
        os.symlink(shared, one.path("disk.1"))
        one.disks.append({**one.disks[0], "DISK_ID": 1, "TARGET": "/mnt/d", "READONLY": "YES"})
        one.deployed()


def test_a_hard_link_is_the_same_image(vm: NewVm) -> None:
    one, two = vm(), vm(image=None)
    one.deployed()
    os.link(one.path("disk.0"), two.path("disk.0"))
    two.disks.append(dict(one.disks[0]))
    outcome = two.deploy()
    assert outcome.code == 1
    assert "in use" in outcome.message


@pytest.mark.parametrize("how", ["read-only", "gone", "full"])
def test_no_datastore_keeps_a_vm_from_being_ended(vm: NewVm, how: str) -> None:
    one = vm(image=None)
    place = one.directory
    machine.command("mount", "-t", "tmpfs", "-o", "size=300m,uid=9869,gid=9869,mode=755", "tmpfs", place)
    try:
        one.add_disk(images.busybox_tar())
        one.deployed()
        if how == "read-only":
            machine.command("mount", "-o", "remount,ro", place, check=False)
        elif how == "gone":
            machine.command("mount", "-t", "tmpfs", "tmpfs", place)
        else:
            machine.command("fallocate", "-l", str(os.path.getsize(one.path("disk.0"))), one.path("disk.0"))
            machine.command("sh", "-c", f"dd if=/dev/zero of={place}/fill bs=1M 2>/dev/null; true")
        one.act("cancel").ok()
        assert one.name not in machine.domains()
    finally:
        while os.path.ismount(place):
            machine.command("umount", place)


def test_a_disk_that_comes_and_goes_has_its_own(vm: NewVm) -> None:
    one = vm().deployed().booted()
    path = one.path("disk.1")
    machine.command("sh", "-c", f"truncate -s 16M {path}; mkfs.ext4 -q {path}")
    one.give(path)
    one.disks.append({**one.disks[0], "DISK_ID": 1, "TARGET": "/mnt/d", "ATTACH": "YES"})
    one.act("attach_disk", path, "/mnt/d", 1, "x").ok()
    assert lease(one, "disk.1") is not None
    one.act("detach_disk", path, "/mnt/d", 1).ok()
    assert lease(one, "disk.1") is None
    assert lease(one) is not None
