"""Whatever a tenant puts where we look, nobody but himself waits for it: the host, its probes and other VMs go on."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.errors import StorageError
from onelxc.model import VmPaths
from onelxc.root import apart, holders, inside, tenantfile
from tests.node.test_live_disks import attach, detach, image
from tests.support import deaf, images, machine
from tests.support.vms import MONITORD, Vm
from tests.support.waiting import HUB_LOG, wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]

RELEASE = 'ID=guest\nVERSION_ID="7"\nPRETTY_NAME="A guest"\n'


def monitored(one: Vm) -> dict[int, str]:
    """vm/monitor's values of each VM."""
    said = one.driver.probe("onelxc-probes.d/vm/monitor/onelxc", "lxc", 2, "node1").ok().out
    found = re.findall(r'VM = \[ ID="(\d+)", DEPLOY_ID="[^"]*", MONITOR="([^"]*)" \]', said)
    return {int(vm_id): base64.b64decode(text).decode() for vm_id, text in found}


def release(one: Vm) -> str:
    return f"{VmPaths(one.vm_id).root}/etc/os-release"


F_SETSIG = 10
"""fcntl(2); the module has no name for it."""


@contextlib.contextmanager
def leased(path: str) -> Iterator[None]:
    """A write lease that its holder does not give up: who opens the file waits for 45 s."""
    with open(path, "r+b") as file:
        # told of who waits by a signal that is ignored anyway: a test may run in a thread, which cannot choose
        fcntl.fcntl(file, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def test_leases_on_what_is_read_hold_up_nobody(vm: NewVm) -> None:
    several = [vm(images.busybox_ext4()).deployed().booted() for _ in range(4)]
    for one in several:
        one.inside(f"echo '{RELEASE}' > /etc/os-release")
    healthy, hostile = several[0], several[1:]
    with contextlib.ExitStack() as stack:
        for one in hostile:
            stack.enter_context(leased(release(one)))
        values = monitored(healthy)
    assert set(values) == {one.vm_id for one in several}
    assert "OS_ID=guest" in values[healthy.vm_id]
    # a reader that waits gets the file when the kernel takes the lease away
    assert all("OS_ID" not in values[one.vm_id] for one in hostile)


HOSTILE_FILES: dict[str, Callable[[str], None]] = {
    "a pipe": os.mkfifo,
    "a terminal": lambda path: os.mknod(path, 0o20666, os.makedev(5, 0)),
    "endless zeros": lambda path: os.mknod(path, 0o20666, os.makedev(1, 5)),
    "a directory": os.mkdir,
    "a link to the host's": lambda path: os.symlink("/../../../../../../../../../../etc/os-release", path),
    "a link in a circle": lambda path: os.symlink("os-release", path),
    "not there": lambda path: None,
}


@pytest.mark.parametrize("what", sorted(HOSTILE_FILES))
def test_only_a_regular_file_is_read(vm: NewVm, tree: Path, tmp_path: Path, what: str) -> None:
    root = tmp_path / "root"
    machine.command("cp", "-a", str(tree), str(root))
    HOSTILE_FILES[what](f"{root}/etc/os-release")
    one = vm(images.ext4(f"{tmp_path}/root.ext4", str(root))).deployed().booted()
    shutil.rmtree(root)
    values = monitored(one)[one.vm_id]
    assert "MEMORY=" in values
    assert "OS_ID" not in values


def test_only_a_little_of_a_file_without_end_is_read(vm: NewVm) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    one.inside(f"echo '{RELEASE}' > /etc/os-release; truncate -s 3000G /etc/os-release")
    assert "OS_ID=guest" in monitored(one)[one.vm_id]


def test_what_is_mounted_over_it_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text("ID=own\n")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/os-release").write_text("ID=other\n")
    names = ("etc/os-release", "lib/os-release")
    assert tenantfile.first(str(tmp_path), names, 100) == "ID=own\n"
    assert tenantfile.first(str(tmp_path), names, 2) == "ID"
    with deaf.mounted(str(tmp_path / "etc")):
        assert tenantfile.first(str(tmp_path), names, 100) == "ID=other\n"


@pytest.fixture
def silence(tmp_path: Path) -> Iterator[str]:
    """Where a file system is mounted that never answers."""
    point = tmp_path / "silence"
    point.mkdir()
    with deaf.mounted(str(point)):
        yield str(point)


def children() -> set[int]:
    return {pid for pid in machine.pids() if stat(pid)[1:2] == [str(os.getpid())]}


def stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def test_a_child_that_cannot_even_be_killed_keeps_nothing(tmp_path: Path, silence: str) -> None:
    before = children()
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
            apart.run(lambda: str(os.stat(f"{silence}/x")).encode(), limit_s=0.5)
    (stuck,) = children() - before
    assert stat(stuck)[0] == "D"
    with open(tmp_path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held = {os.readlink(f"/proc/{stuck}/fd/{fd}").partition(":")[0] for fd in os.listdir(f"/proc/{stuck}/fd")}
    assert held == {os.devnull, "pipe"}
    assert os.getpgid(stuck) == stuck


def test_several_wait_together(silence: str) -> None:
    answers = apart.run_all(
        [lambda: str(os.stat(f"{silence}/x")).encode(), lambda: b"well", lambda: os.stat("/nowhere") and b""], limit_s=2
    )
    assert isinstance(answers[0], TimeoutError)
    assert answers[1] == b"well"
    assert isinstance(answers[2], FileNotFoundError)
    with pytest.raises(StorageError, match="its answer is too long"):
        apart.run(lambda: bytes(1 << 20), limit_s=10)


def test_who_uses_a_disk_is_told_in_time_or_not_at_all(silence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every open file of every process is looked at; one of them belongs to a file system that never answers."""
    held = os.open(silence, os.O_PATH | os.O_DIRECTORY)
    monkeypatch.setattr(holders, "LOOK_S", 1.0)
    monkeypatch.setattr(inside, "LOOK_S", 1.0)
    try:
        assert holders.users_of("/sys") == ()
        assert inside.users((os.getpid(),), 1 << 40) == ()
    finally:
        os.close(held)


def test_copies_of_a_mount_are_looked_for_where_they_can_be(vm: NewVm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the mount namespaces of unprivileged tenants, of which there may be thousands, each with a long table."""
    one = vm(images.busybox_ext4()).deployed().booted()
    theirs = machine.init_pid(one.name)
    looked: list[int] = []
    read = inside.mounts_of

    def mounts_of(pid: int) -> Iterator[inside.MountPoint]:
        for mount in read(pid):
            looked.append(pid)
            yield mount

    monkeypatch.setattr(inside, "mounts_of", mounts_of)
    (device,) = {mount.source for mount in machine.mounts() if mount.point == VmPaths(one.vm_id).root}
    holders.unmount_elsewhere(device, "/nowhere/")
    assert looked
    assert theirs not in looked


def test_a_disk_whose_place_never_answers_is_an_error_in_a_line(vm: NewVm, form: dict[str, str], image: str) -> None:
    one = vm(images.busybox_ext4(), user_template=form).deployed().booted()
    one.inside("mkdir -p /media/silence")
    with deaf.mounted("/media/silence", pid=machine.init_pid(one.name)):
        outcome = attach(one, image, TARGET="/media/silence/data")
        assert outcome.code == 1
        assert outcome.message == (
            f"Cannot attach disk VM {one.vm_id}: cannot attach at /media/silence/data: no answer within 15 s"
        )
        assert one.act("resize").code == 0, "the VM's lock is free"
    attach(one, image, TARGET="/media/data").ok()
    assert "/media/data" in one.inside("cat /proc/mounts")


def test_a_disk_below_what_never_answers_is_in_use(vm: NewVm, image: str) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    attach(one, image, TARGET="/media/data").ok()
    with deaf.mounted("/media", pid=machine.init_pid(one.name)):
        outcome = detach(one, 1)
        assert (outcome.code, outcome.message) == (
            1,
            f"Cannot detach disk VM {one.vm_id}: DISK 1 is in use by the kernel",
        )
    # its server has ended: the mount that hides the disk's is still there
    machine.command("nsenter", "-t", str(machine.init_pid(one.name)), "-m", "umount", "/media")
    detach(one, 1).ok()


ODD = {
    "carriage return": "a\rb",
    "line separator": "a\u2028b\x85\x0b\x0c\x1c",
    "not text": b"a\xff\x9b".decode(errors="surrogateescape"),
    "blanks": "a b\tc\nd",
    "backslashes": "a\\040b\\",
    "dashes": "a - b - -",
}


@pytest.mark.parametrize("what", sorted(ODD))
def test_mount_points_of_any_name_are_no_trouble(vm: NewVm, image: str, what: str) -> None:
    """Each of them is a line of the mount table, which is read for every disk that comes or goes, and of all VMs."""
    one = vm(images.busybox_ext4()).deployed().booted()
    pid = machine.init_pid(one.name)
    place = f"/media/{ODD[what]}"
    inside_it = ["nsenter", "-t", str(pid), "-m", "-U", "-S0", "-G0", "/bin/busybox"]
    subprocess.run([*inside_it, "mkdir", "-p", place], check=True)
    subprocess.run([*inside_it, "mount", "-t", "tmpfs", "none", place], check=True)
    assert place in [mount.point for mount in inside.mounts_of(pid)]
    attach(one, image, TARGET="/media/data").ok()
    assert holders.mounters_of("/dev/null") == ()
    detach(one, 1).ok()


def test_a_disk_that_is_mounted_everywhere_is_in_use(vm: NewVm, image: str) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    attach(one, image, TARGET="/media/data").ok()
    one.inside("cd /media; i=0; while [ $i -lt 1001 ]; do mkdir m$i; mount --bind data m$i; i=$((i+1)); done")
    outcome = detach(one, 1)
    assert outcome.message.endswith("DISK 1 is in use: it is mounted at more than 1000 places inside")
    one.act("cancel").ok()


def test_a_process_that_calls_itself_libvirts_is_not(vm: NewVm) -> None:
    """By its number a controller that has died might be taken for one of a container's processes."""
    from onelxc.root import orphans

    one = vm(images.busybox_ext4()).deployed().booted()
    one.inside("cp /bin/busybox /bin/libvirt_lxc; ln -s libvirt_lxc /bin/sleeper")
    machine.join(one.name, int(one.inside("exec -a sleep /bin/libvirt_lxc 999 >/dev/null 2>&1 & echo $!")))
    (pid,) = [pid for pid in machine.pids() if machine.command_line(pid) == "sleep 999"]
    wait_until(lambda: orphans.comm(pid) == "libvirt_lxc", "it has the name")
    assert not orphans.is_controller(pid)


def test_what_a_tenant_wrote_does_nothing_to_who_reads_the_hubs_log(vm: NewVm, image: str) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    attach(one, image, TARGET="/mnt/\x9b31mRED\u202e").ok()
    one.inside("umount /mnt/*; rmdir /mnt/*; rmdir /mnt; echo x > /mnt; reboot", check=False)
    one.booted(2)
    log = Path(HUB_LOG)
    wait_until(lambda: "Cannot attach at /mnt/?31mRED?: " in log.read_text(errors="replace"), "the hub tells of it")
    assert all(c.isprintable() for line in log.read_text().split("\n") for c in line)


__all__ = ["image"]
