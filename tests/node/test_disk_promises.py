"""What people complain about in container drivers' disks, each as a test: nothing stale, nothing half done, nothing
without a limit, and every refusal in words.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc import host
from onelxc.errors import StorageError
from onelxc.root import idmap, loops, syscalls
from tests.node.test_bad_input import refused
from tests.node.test_disk_kinds import VERBOSE, XFS_MB, NewVm
from tests.node.test_life import configured
from tests.node.test_live_disks import limits_of
from tests.support import hostconf, images, machine
from tests.support.diskimages import empty, make, mounted, partitioned, sh
from tests.support.frontends import MONITORD
from tests.support.vms import Vm
from tests.support.waiting import wait_until

HELPER = "/usr/lib/onelxc/onelxc-root"


def ended(one: Vm) -> None:
    """OpenNebula's monitoring sees that the container has ended; from its answer on the disks may be copied."""
    wait_until(lambda: one.name not in machine.domains(), "the container has ended")
    assert one.act("poll").ok().out.split()[0] == "STATE=d"


def from_inside(one: Vm) -> None:
    one.inside("poweroff", check=False)
    ended(one)


def killed(one: Vm) -> None:
    os.kill(machine.init_pid(one.name), signal.SIGKILL)
    ended(one)


ENDS: dict[str, Callable[[Vm], object]] = {
    "poweroff from outside": lambda one: one.act("shutdown").ok(),
    "poweroff from inside": from_inside,
    "kill -9": killed,
    "cancel": lambda one: one.act("cancel").ok(),
}


@pytest.fixture
def store() -> Iterator[Path]:
    """A shared image datastore on this host."""
    path = Path("/var/lib/one/datastores/1")
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


@pytest.mark.parametrize("end", ENDS)
def test_a_saved_image_is_never_stale(vm: NewVm, store: Path, end: str) -> None:
    """What goes back to the datastore is copied at the moment in which the action answers: every byte is in it, though
    nobody inside has flushed anything.
    """
    one = vm(None)
    shutil.copy(images.busybox_ext4(), store / "image")
    one.give(str(store / "image"))
    os.symlink(store / "image", one.path("disk.0"))
    one.disks.append({"DISK_ID": 0, "TARGET": "sda", "PERSISTENT": "YES"})
    one.deployed().booted()
    one.inside("head -c 20000000 /dev/urandom > /root/data; md5sum < /root/data > /root/sum")
    ENDS[end](one)
    shutil.copy(store / "image", store / "saved")
    assert "clean" in sh("dumpe2fs", "-h", str(store / "saved"))
    with mounted(store / "saved") as mnt:
        assert hashlib.md5((mnt / "root/data").read_bytes()).hexdigest() == (mnt / "root/sum").read_text().split()[0]
    assert os.readlink(one.path("disk.0")) == str(store / "image")


VOLATILE = {"ext2": 32, "ext3": 32, "ext4": 32, "xfs": XFS_MB, "btrfs": 128}


def test_volatile_disks_are_formatted_once_and_swap_is_told(vm: NewVm) -> None:
    """They come from the transfer manager as empty files."""
    one = vm(images.busybox_ext4())
    for number, (fs, size) in enumerate(VOLATILE.items(), 1):
        one.give(str(empty(Path(one.path(f"disk.{number}")), size)))
        how = {"FORMAT": fs} if number % 2 else {"FORMAT": "raw", "FS": fs}
        one.add_disk(None, TYPE="fs", SIZE=size, **how)
    one.give(str(empty(Path(one.path("disk.6")), 16)))
    one.add_disk(None, TYPE="swap", SIZE=16)
    with configured(one, VERBOSE):
        assert "DISK 6: swap is not used: containers share the host's" in one.deploy().ok().err
    one.booted()
    for number, fs in enumerate(VOLATILE, 1):
        one.inside(f"echo {fs} > /media/one-disk.{number}/file")
    assert "one-disk.6" not in one.inside("cat /proc/mounts")
    one.act("shutdown").ok()
    one.deployed().booted(2)
    for number, fs in enumerate(VOLATILE, 1):
        assert one.inside(f"cat /media/one-disk.{number}/file") == f"{fs}\n"
        assert sh("blkid", "-p", "-o", "value", "-s", "TYPE", one.path(f"disk.{number}")) == f"{fs}\n"


def plain(kind: str, size_mb: int) -> Callable[[Path, Path], Path]:
    def fill(path: Path, tree: Path) -> Path:
        make(kind, str(empty(path, size_mb)))
        with mounted(path) as mnt:
            shutil.copytree(tree, mnt, dirs_exist_ok=True)
        return path

    return fill


def unclean(path: Path, tree: Path) -> Path:
    """As a host that crashed leaves it: its journal has to be replayed, which would be writing."""
    first = plain("ext4", 32)(path.with_suffix(".first"), tree)
    with mounted(first) as mnt:
        (mnt / "more").write_text("x")
        os.sync()
        shutil.copy(first, path)
    return path


def squashed(path: Path, tree: Path) -> Path:
    sh("mksquashfs", str(tree), str(path), "-quiet", "-no-progress")
    return path


def qcow2_of(path: Path, tree: Path) -> Path:
    raw = plain("ext4", 32)(path.with_suffix(".raw"), tree)
    sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    return path


READ_ONLY: dict[str, Callable[[Path, Path], Path]] = {
    "ext4": plain("ext4", 32),
    "xfs": plain("xfs", XFS_MB),
    "btrfs": plain("btrfs", 128),
    "squashfs": squashed,
    "qcow2": qcow2_of,
    "gpt": lambda path, tree: partitioned(path, tree, "gpt", {"root": 32}, fstab=False),
    "unclean": unclean,
}


def test_read_only_is_read_only_whatever_the_kind(vm: NewVm, tmp_path: Path) -> None:
    """A SIZE larger than the image included: not a byte of a read-only image changes."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("kept")
    kinds = dict(READ_ONLY)
    if host.kernel_version(os.uname().release) < (6, 2):  # from there on Linux maps the ids of squashfs
        other = vm(images.busybox_ext4())
        other.add_disk(str(kinds.pop("squashfs")(tmp_path / "squashfs", tree)), READONLY="YES")
        refusal = other.deploy()
        assert refusal.code == 1
        assert "has no idmapped mounts for squashfs" in refusal.err
    one = vm(images.busybox_ext4())
    originals = []
    for number, (kind, build) in enumerate(kinds.items(), 1):
        originals.append(build(tmp_path / f"{number}", tree))
        one.add_disk(str(originals[-1]), READONLY="YES", SIZE=500, FORMAT="qcow2" if kind == "qcow2" else "raw")
    archive = tmp_path / "archive"
    images.tar(str(tree), str(archive), "--gzip")
    one.add_disk(str(archive), READONLY="YES")
    one.deployed().booted()
    for number in range(1, len(originals) + 2):
        place = f"/media/one-disk.{number}"
        assert one.inside(f"cat {place}/file") == "kept"
        said = one.inside(f"echo x 2>&1 > {place}/file; mount -o remount,rw {place}; echo x > {place}/new; ls {place}")
        assert "new" not in said.split(), said
    one.act("shutdown").ok()
    for number, original in enumerate(originals, 1):
        assert subprocess.run(["cmp", str(original), one.path(f"disk.{number}")]).returncode == 0, original


def test_compressed_disks_are_what_they_hold(vm: NewVm, tmp_path: Path) -> None:
    """As root, as data disk, and as a persistent one, a link into the datastore that is its content ever after."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_text("kept")
    packed = tmp_path / "root.gz"
    machine.command("sh", "-c", f"gzip -1 -c {images.busybox_ext4()} > {packed}")
    one = vm(str(packed))
    raw = plain("ext4", 16)(tmp_path / "raw", tree)
    for name, source in (("xz", raw), ("zstd", qcow2_of(tmp_path / "qcow2", tree))):
        machine.command("sh", "-c", f"{name} -1 -c {source} > {tmp_path / name}")
        one.add_disk(str(tmp_path / name))
    persistent = one.add_disk(str(tmp_path / "xz"))
    stored = Path(os.path.dirname(one.directory), f"image-{one.vm_id}")
    shutil.move(persistent, stored)
    os.symlink(stored, persistent)
    try:
        one.deployed().booted()
        for number in (1, 2, 3):
            assert one.inside(f"cat /media/one-disk.{number}/file") == "kept"
        one.inside("echo more > /media/one-disk.3/new")
        one.act("shutdown").ok()
        assert os.path.islink(persistent)
        with mounted(stored) as mnt:
            assert {path.name: path.read_text() for path in mnt.iterdir() if path.is_file()} == {
                "file": "kept",
                "new": "more\n",
            }
    finally:
        stored.unlink()


def test_fsck_has_its_time_and_no_more(vm: NewVm) -> None:
    """The image asks it to wait for two minutes, whether another host has the disk. The error has what it had said."""
    one = vm(images.busybox_ext4())
    path = empty(Path(one.path("disk.1")), 32)
    sh("mkfs.ext4", "-q", "-O", "mmp,^metadata_csum", "-E", "mmp_update_interval=30", str(path))
    with open(path, "r+b") as file:  # debugfs would wait, too
        file.seek(1024 + 0x3A)
        file.write(bytes(2))
    one.give(str(path))
    one.disks.append({"DISK_ID": 1, "TARGET": "sdb"})
    doing = "check an image that was not unmounted cleanly: e2fsck: no end after 4 s"
    with hostconf.with_line("FSCK_TIMEOUT = 4"):
        refused(one, one.deploy, f"{doing}: MMP interval is 30 seconds and total wait time is 122", mounted=True)


def test_a_disk_that_fails_leaves_nothing_of_those_before_it(vm: NewVm, tmp_path: Path) -> None:
    one = vm(images.busybox_ext4())
    for kind, size in (("xfs", XFS_MB), ("btrfs", 128)):
        make(kind, str(empty(tmp_path / kind, size)))
        one.add_disk(str(tmp_path / kind))
    tree = tmp_path / "tree"
    tree.mkdir()
    one.add_disk(str(qcow2_of(tmp_path / "qcow2", tree)), FORMAT="qcow2")
    one.add_disk(str(partitioned(tmp_path / "gpt", tree, "gpt", {"data": 32})))
    one.add_disk(str(empty(tmp_path / "none", 8)))
    refused(one, one.deploy, r"mount .*/disk\.5: there is no file system in it", mounted=True)


@pytest.mark.parametrize("before", ["never seen", "seen before"])
def test_a_full_datastore_is_one_line_and_leaves_nothing(vm: NewVm, tmp_path: Path, before: str) -> None:
    """Also where the image is in the cache, and where nothing tells beforehand how much an archive holds."""
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin/init").write_bytes(b"\x7fELF" + b"\1" * (60 << 20))
    (tmp_path / "sbin/init").chmod(0o755)
    archive = tmp_path.with_suffix(".tar")
    images.tar(str(tmp_path), str(archive), "--bzip2")
    if before == "seen before":
        rich = vm(None)
        rich.add_disk(str(archive))
        rich.deploy()  # its init is no program
        assert "ext4" in sh("blkid", "-p", rich.path("disk.0"))
    one = vm(None)
    size = os.path.getsize(archive) + (60 << 20)
    machine.command("mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", one.directory)
    try:
        one.add_disk(str(archive))
        refused(one, one.deploy, "import disk.0: no space left in the datastore while unpacking")
    finally:
        machine.command("umount", one.directory)


def test_an_archive_unpacks_to_what_the_host_allows_or_the_disk_has(vm: NewVm, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive", "w:gz") as archive:
        for name, size, mode in (("sbin/init", 1 << 20, 0o755), ("zeros", 100 << 20, 0o644)):
            member = tarfile.TarInfo(name)
            member.size, member.mode = size, mode
            with open("/dev/zero", "rb") as zeros:
                archive.addfile(member, zeros)
    one = vm(None)
    one.add_disk(str(tmp_path / "archive"))
    with hostconf.with_line("IMPORT_LIMIT = 80"):
        refused(one, one.deploy, "does not fit into 80 MiB, the most that an archive of .* give the disk a larger SIZE")
        one.disks[0]["SIZE"] = "200"
        assert one.driver.message(one.deploy()).startswith(f"Cannot start {one.name}: ")
    assert os.stat(one.path("disk.0")).st_size == 200 << 20


def test_a_file_system_that_cannot_be_mapped_is_named_and_so_is_the_kernel() -> None:
    fd = syscalls.mount_detached("ramfs", "none", {}, 0)
    named = re.escape(f"Linux {os.uname().release} has no idmapped mounts for ramfs")
    try:
        with pytest.raises(StorageError, match=named):
            idmap.apply(fd, "ramfs", 0, 1879048192)
    finally:
        os.close(fd)


def test_the_log_tells_of_the_cache_and_it_can_be_seen_and_emptied(vm: NewVm, tmp_path: Path) -> None:
    images.busybox_tree(str(tmp_path / "tree"))
    (tmp_path / "tree/etc/unique").write_text(os.urandom(16).hex())
    images.tar(str(tmp_path / "tree"), str(tmp_path / "archive"), "--gzip")
    said = []
    for _ in range(2):
        one = vm(str(tmp_path / "archive"))
        with configured(one, VERBOSE):
            said.append(one.deploy().ok().err)
        one.booted()
    assert "import cache: miss" in said[0]
    assert "import cache: kept for the next deploy" in said[0]
    assert "import cache: hit, disk.0 " in said[1]
    listed = machine.command(HELPER, "cache", "list")
    assert f"archive of {len((tmp_path / 'archive').read_bytes().rstrip(bytes(1)))} bytes" in listed, listed
    assert "set free" in machine.command(HELPER, "cache", "empty")
    assert " 0 images" in machine.command(HELPER, "cache", "list")


@pytest.mark.generation(MONITORD)
def test_limits_of_the_template_hold_from_the_start_and_after_a_reboot_from_inside(vm: NewVm) -> None:
    one = vm(images.busybox_ext4())
    one.disks[0].update({"TOTAL_IOPS_SEC": "700", "READ_BYTES_SEC": str(8 << 20)})
    one.give(str(empty(Path(one.path("disk.1")), 32)))
    one.add_disk(None, TYPE="fs", FORMAT="raw", FS="ext4", WRITE_BYTES_SEC=str(4 << 20))
    one.deployed().booted()
    for times in (1, 2):
        one.booted(times)
        for number, expected in (
            (0, {"read_bps": 8 << 20, "write_bps": None, "read_iops": 700, "write_iops": 700}),
            (1, {"read_bps": None, "write_bps": 4 << 20, "read_iops": None, "write_iops": None}),
        ):
            (device,) = loops.loops_of(one.path(f"disk.{number}"))
            numbers = machine.command("cat", f"/sys/block/{os.path.basename(device)}/dev").strip()
            assert limits_of(one, numbers) == expected, (times, number)
        if times == 1:
            one.inside("reboot", check=False)
