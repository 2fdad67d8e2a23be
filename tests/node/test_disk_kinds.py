"""Every kind of image: deployed, written to, powered off, deployed again, read, cancelled, on real containers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc import config
from onelxc.errors import StorageError
from onelxc.model import Disk, VmPaths
from onelxc.root import filesystems, holders, loops, mounts, rbd
from onelxc.root.journal import Journal
from onelxc.root.work import Work
from tests.node.test_life import configured
from tests.support import hostconf, images, machine
from tests.support.diskimages import BEFORE_ALL, BETWEEN, LAST, empty, filled, make, mounted, partitioned, sh
from tests.support.frontends import MONITORD
from tests.support.vms import Vm

NewVm = Callable[..., Vm]
XFS_MB = 320
VERBOSE = 'FEATURES = [ VERBOSE = "yes" ]'


def packed(*options: str) -> Callable[[Path, Path], Path]:
    def make_archive(path: Path, tree: Path) -> Path:
        images.tar(str(tree), str(path), *options)
        return path

    return make_archive


def lxd(path: Path, tree: Path) -> Path:
    """A unified image: the root below rootfs/, and what describes it beside."""
    metadata = path.with_name("metadata.yaml")
    metadata.write_text("architecture: x86_64\n")
    sh(
        "tar",
        "-cJf",
        str(path),
        "-C",
        str(path.parent),
        metadata.name,
        "-C",
        str(tree),
        "--transform=s,^\\.,rootfs,S",
        ".",
    )
    return path


def shifted(path: Path, tree: Path, first: int) -> Path:
    filled(path, tree, "ext4", 64)
    with mounted(path) as mnt:
        for directory, names, files in os.walk(mnt):
            for name in [".", *names, *files]:
                item = os.path.join(directory, name)
                status = os.lstat(item)
                if status.st_uid < 65536:
                    os.chown(item, status.st_uid + first, status.st_gid + first, follow_symlinks=False)
                    if not os.path.islink(item):
                        os.chmod(item, status.st_mode & 0o7777)
    return path


def qcow2(path: Path, tree: Path) -> Path:
    """Smaller than its virtual size, with an internal snapshot."""
    raw = filled(path.with_suffix(".raw"), tree, "ext4", 64)
    sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    sh("qemu-img", "snapshot", "-c", "first", str(path))
    sh("qemu-img", "resize", "-q", "-f", "qcow2", str(path), "96M")
    return path


def squashfs(path: Path, tree: Path) -> Path:
    sh("mksquashfs", str(tree), str(path), "-quiet", "-no-progress", "-comp", "gzip")
    return path


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "tar": packed(),
    "tar.gz": packed("--gzip"),
    "tar.xz": packed("--use-compress-program=xz -1"),
    "tar.zst": packed("--zstd"),
    "tar.bz2": packed("--bzip2"),
    "tar.lz4": packed("--use-compress-program=lz4"),
    "LXD": lxd,
    "squashfs": squashfs,
    "ext4": lambda path, tree: filled(path, tree, "ext4", 64),
    "xfs": lambda path, tree: filled(path, tree, "xfs", XFS_MB),
    "btrfs": lambda path, tree: filled(path, tree, "btrfs", 128),
    "dos by fstab": lambda path, tree: partitioned(path, tree, "dos", BETWEEN),
    "gpt by fstab": lambda path, tree: partitioned(path, tree, "gpt", BETWEEN),
    "gpt by type": lambda path, tree: partitioned(path, tree, "gpt", BETWEEN, fstab=False, typed=True),
    "dos by size": lambda path, tree: partitioned(path, tree, "dos", BEFORE_ALL, fstab=False),
    "shifted by 100000": lambda path, tree: shifted(path, tree, 100000),
    "shifted by 600100001": lambda path, tree: shifted(path, tree, 600100001),
    "qcow2": qcow2,
}
CHOICES = {
    "dos by fstab": "partition 2 (ext4, 40 MiB) is taken: the root of the fstab in partition 2",
    "gpt by fstab": "partition 2 (ext4, 40 MiB) is taken: the root of the fstab in partition 2",
    "gpt by type": "partition 2 (ext4, 40 MiB) is taken: by its GPT type",
    "dos by size": "partition 2 (ext4, 60 MiB) is taken: the largest",
    "shifted by 100000": "the image's owners begin at 100000",
    "shifted by 600100001": "the image's owners begin at 600100001",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_there_after_a_power_off(vm: NewVm, tree: Path, tmp_path: Path, kind: str) -> None:
    one = vm(str(KINDS[kind](tmp_path / "image", tree)))
    with configured(one, VERBOSE):
        assert CHOICES.get(kind, "") in one.deploy().ok().err
    one.booted()
    assert one.inside("stat -c %u:%g /bin/busybox /home/user").split() == ["0:0", "1000:1000"]
    assert one.inside("stat -c %a /usr/bin/sudo") == "4755\n"
    one.inside("head -c 3000000 /dev/urandom > /root/data; md5sum /root/data > /root/sum")
    assert kind == "qcow2" or not fuse_below(one), "what is written goes through user space"
    one.act("shutdown").ok()
    assert loops.loops_of(one.path("disk.0")) == ()
    one.deployed().booted(2)
    one.inside("md5sum -c /root/sum")
    one.act("cancel").ok()


def fuse_below(one: Vm) -> list[str]:
    """FUSE file systems under the VM's mounts on the host, and in the container besides libvirt's own in /proc."""
    here = [
        mount.point for mount in machine.mounts() if mount.kind.startswith("fuse") and f"/{one.vm_id}/" in mount.point
    ]
    inside = [line.split() for line in one.inside("cat /proc/mounts").splitlines()]
    return here + [row[1] for row in inside if row[2].startswith("fuse") and not row[1].startswith("/proc/")]


GROWING: dict[str, Callable[[Path, Path], Path]] = {
    "dos, ext4": lambda path, tree: partitioned(path, tree, "dos", LAST),
    "gpt, ext4": lambda path, tree: partitioned(path, tree, "gpt", LAST),
    "gpt, xfs": lambda path, tree: partitioned(path, tree, "gpt", {**LAST, "root": XFS_MB}, kind="xfs"),
    "dos, btrfs": lambda path, tree: partitioned(path, tree, "dos", {**LAST, "root": 128}, kind="btrfs"),
    "qcow2": qcow2,
    "tar.gz": packed("--gzip"),
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_larger_size_grows(vm: NewVm, tree: Path, tmp_path: Path, kind: str) -> None:
    """At first, and again at a later start."""
    image = GROWING[kind](tmp_path / "image", tree)
    size = 320 if kind == "tar.gz" else (os.stat(image).st_size >> 20) + 200
    one = vm(str(image))
    for times in (1, 2):
        one.disks[0]["SIZE"] = str(size)
        with configured(one, VERBOSE):
            said = one.deploy().ok().err
        one.booted(times)
        kib = int(one.inside("df -k / | tail -n 1 | awk '{print $2}'"))
        assert kib > (size - 60) * 1024 * 0.85, said
        assert times == 1 or "file system grown from" in said, said
        assert not kind.startswith(("dos", "gpt")) or "disk.0: partition 2 grown from" in said, said
        one.inside(f"echo {times} >> /root/kept")
        one.act("shutdown").ok()
        size += 150
    one.deployed().booted(3)
    assert one.inside("cat /root/kept") == "1\n2\n"


def test_a_partition_that_another_follows_stays_and_the_vm_starts(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    one = vm(str(partitioned(tmp_path / "image", tree, "gpt", BETWEEN)))
    one.disks[0]["SIZE"] = "300"
    with configured(one, VERBOSE):
        said = one.deploy().ok().err
    assert "disk.0: partition 2 stays as it is though the disk is larger: partition 3 follows it" in said
    one.booted()


@pytest.mark.generation(MONITORD)
def test_a_live_resize_of_a_partitioned_disk_is_for_the_next_start(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    one = vm(str(partitioned(tmp_path / "image", tree, "gpt", LAST))).deployed().booted()
    refused = one.act("resize_disk", 0, 300, "b64", lcm_state=62)
    assert refused.code == 1
    assert "its last partition takes it when the VM starts next" in one.driver.message(refused)
    one.act("shutdown").ok()
    one.deployed().booted(2)  # with the SIZE of before, to which OpenNebula goes back
    assert int(one.inside("df -k / | tail -n 1 | awk '{print $2}'")) > 200 << 10


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_siblings_run_at_once_and_grow(vm: NewVm, tree: Path, tmp_path: Path, kind: str) -> None:
    """Clones of one image have one UUID. A larger SIZE grows the file system before start, or right after."""
    size = {"xfs": XFS_MB, "btrfs": 128, "ext4": 64}[kind]
    image = str(filled(tmp_path / "image", tree, kind, size))
    both = [vm(image), vm(image)]
    both[1].disks[0]["SIZE"] = str(size + 200)
    for number, one in enumerate(both):
        one.deployed().booted().inside(f"echo {number} > /root/who; sync")
    for number, one in enumerate(both):
        assert one.inside("cat /root/who") == f"{number}\n"
    kib = [int(one.inside("df -k / | tail -n 1 | awk '{print $2}'")) for one in both]
    assert kib[1] - kib[0] > 150 << 10


def test_an_unclean_file_system_is_repaired_first_and_a_broken_one_told(vm: NewVm, tmp_path: Path) -> None:
    one = vm(images.busybox_ext4())
    path = one.path("disk.0")
    sh("debugfs", "-w", "-R", "set_super_value state 0", path)
    one.deployed().booted().inside("echo x > /root/x")
    one.act("cancel").ok()
    sh("debugfs", "-w", "-R", "set_super_value state 2", path)
    sh("debugfs", "-w", "-R", "clri /bin", path)
    refused = one.deploy()
    assert refused.code == 1
    message = one.driver.message(refused)
    assert "e2fsck" in message, message
    assert "RUN fsck MANUALLY" in message, message


@pytest.mark.parametrize("kind", ["ext2", "ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("size_mb", [None, 400])
def test_an_image_that_lost_its_end_is_told_and_not_filled_up(tmp_path: Path, kind: str, size_mb: int | None) -> None:
    """Zeros in place of what is missing would be mounted, and be damage that nobody sees."""
    image = tmp_path / "disk"
    make(kind, str(empty(image, XFS_MB)))
    os.truncate(image, (XFS_MB - 20) << 20)
    for read_only in (False, True):
        with open(image, "rb" if read_only else "r+b") as file, pytest.raises(StorageError) as raised:
            mounts.open_image(file.fileno(), "disk.1", print, read_only=read_only, size_mb=size_mb)
        assert f"Cannot mount disk.1: it is truncated: its {kind} has " in str(raised.value)
    assert image.stat().st_size == (XFS_MB - 20) << 20


@pytest.mark.parametrize("form,name", [("vmdk", "VMDK"), ("vdi", "VDI"), ("vhdx", "VHDX"), ("vpc", "VHD")])
@pytest.mark.parametrize("size_mb", [None, 400])
def test_the_disk_of_another_hypervisor_is_named(tmp_path: Path, form: str, name: str, size_mb: int | None) -> None:
    image = tmp_path / "disk"
    sh("qemu-img", "create", "-q", "-f", form, str(image), "64M")
    before = image.read_bytes()
    with open(image, "r+b") as file, pytest.raises(StorageError) as raised:
        mounts.open_image(file.fileno(), "disk.1", print, size_mb=size_mb)
    assert str(raised.value).startswith(f"Cannot mount disk.1: it is a {name} disk: a disk may be "), raised.value
    assert image.read_bytes() == before


def test_symbolic_links_are_followed_and_stay(vm: NewVm, tmp_path: Path) -> None:
    """A persistent image lies in the image datastore and disk.0 is a link to it: also an archive becomes one there."""
    one = vm(None)
    store = Path("/var/lib/one/datastores/1")
    store.mkdir(parents=True, exist_ok=True)
    image = store / f"image-{one.vm_id}"
    shutil.copy(images.busybox_tar(), image)
    one.give(str(image))
    one.disks.append({"DISK_ID": 0, "TARGET": "sda", "PERSISTENT": "YES"})
    os.symlink(image, one.path("disk.0"))
    try:
        one.deployed().booted().inside("echo kept > /root/kept")
        one.act("cancel").ok()
        assert os.readlink(one.path("disk.0")) == str(image)
        with mounted(image) as mnt:
            assert (mnt / "root/kept").read_text() == "kept\n"
    finally:
        image.unlink()
        with contextlib.suppress(OSError):
            store.rmdir()


def put_upon(one: Vm, behind: str | Path, form: str = "raw") -> None:
    """disk.0 is a new, empty qcow2 with an image of `form` behind it."""
    path = one.path("disk.0")
    Path(path).unlink(missing_ok=True)
    sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", form, "-b", str(behind), path)
    one.give(path)


def test_a_qcow2_with_a_backing_file(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    """The base stays as it is. A header that names a file outside of the datastores opens nothing."""
    one = vm(None)
    base = filled(tmp_path / "base", tree, "ext4", 64)
    shutil.copy(base, one.path("base"))
    before = machine.command("md5sum", one.path("base"))
    put_upon(one, "base")
    one.disks.append({"DISK_ID": 0, "TARGET": "sda", "FORMAT": "qcow2"})
    one.deployed().booted().inside("echo kept > /root/kept")
    one.act("shutdown").ok()
    one.deployed().booted(2)
    assert one.inside("cat /root/kept") == "kept\n"
    one.act("cancel").ok()
    assert machine.command("md5sum", one.path("base")) == before
    put_upon(one, base)
    refused = one.deploy()
    assert refused.code == 1
    assert "does not lie in a datastore" in one.driver.message(refused)


def test_a_qcow2_is_not_shown_what_belongs_to_others(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    """Who uploads an image writes its header. Behind a disk lie the image that it was made from, and nothing else."""
    one = vm(None)
    store = Path("/var/lib/one/datastores/1")
    store.mkdir(parents=True, exist_ok=True)
    try:
        for name in ("mine", "foreign"):
            shutil.copy(filled(tmp_path / name, tree, "ext4", 64), store / name)
        one.disks.append({"DISK_ID": 0, "TARGET": "sda", "FORMAT": "qcow2"})
        one.disks[0]["SOURCE"] = "/var/lib/one//datastores/1/mine"
        put_upon(one, store / "mine")
        one.deployed().booted()
        one.act("cancel").ok()
        for behind in (store / "foreign", os.path.relpath(store / "foreign", one.directory)):
            put_upon(one, behind)
            refused = one.deploy()
            assert refused.code == 1
            assert "is neither the VM's own nor the one that the disk was made from" in one.driver.message(refused)
        # an uploaded image of one's own, with a header that names another's
        os.unlink(store / "mine")
        sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(store / "foreign"), str(store / "mine"))
        put_upon(one, store / "mine", form="qcow2")
        assert "is neither the VM's own" in one.driver.message(one.deploy())
    finally:
        for name in ("mine", "foreign"):
            (store / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            store.rmdir()
            store.parent.rmdir()


FAKE_RBD = """#!/bin/sh
# as far as `rbd device` is used: the cluster is a directory of images, its devices are loops
cd /srv/ceph || exit 2
echo "$*" >> /srv/ceph/calls
if [ "$1" = resize ]; then
    truncate -s "$3M" "${4#*/}" && losetup -c "$(sed -n "s,^${4#*/} ,,p" mapped)"
    exit
fi
case "$2" in
map) shift 2; for word; do case $word in */*) image=${word#*/};; esac; done
     [ -e "$image" ] || { echo "rbd: error opening image $image: (2) No such file or directory" >&2; exit 2; }
     device=$(losetup --find --show "$image"); echo "$image $device" >> mapped; echo "$device" ;;
unmap) losetup -d "$3"; grep -v " $3\\$" mapped > mapped.new; mv mapped.new mapped ;;
list) awk 'BEGIN { printf "[" } { printf "%s{\\"id\\":\\"%d\\",\\"pool\\":\\"one\\",\\"namespace\\":\\"\\",\\"name\\":\\"%s\\",\\"snap\\":\\"-\\",\\"device\\":\\"%s\\"}", (NR > 1 ? "," : ""), NR, $1, $2 } END { print "]" }' mapped ;;
esac
"""  # noqa: E501


@pytest.fixture
def ceph() -> Iterator[Path]:
    """A cluster with one pool."""
    cluster = Path("/srv/ceph")
    cluster.mkdir(parents=True)
    (cluster / "mapped").touch()
    rbd = Path("/usr/local/sbin/rbd")
    rbd.write_text(FAKE_RBD)
    rbd.chmod(0o755)
    yield cluster
    rbd.unlink()
    shutil.rmtree(cluster)


CEPH = {"TYPE": "RBD", "DISK_TYPE": "RBD", "IMAGE_ID": 7, "CLONE": "YES", "CEPH_USER": "libvirt"}


def test_ceph_images_are_mapped_and_unmapped(vm: NewVm, tree: Path, ceph: Path) -> None:
    """One with a partition table, which its transfer manager enlarges while the VM is powered off."""
    one = vm(None)
    image = partitioned(ceph / f"one-7-{one.vm_id}-0", tree, "gpt", LAST)
    one.disks.append({"DISK_ID": 0, "TARGET": "sda", "SOURCE": "one/one-7", **CEPH})
    one.deployed().booted().inside("echo kept > /root/kept")
    assert "--id libvirt" in (ceph / "calls").read_text()
    one.act("shutdown").ok()
    assert (ceph / "mapped").read_text() == ""
    os.truncate(image, 300 << 20)
    one.deployed().booted(2)
    assert one.inside("cat /root/kept") == "kept\n"
    assert int(one.inside("df -k / | tail -n 1 | awk '{print $2}'")) > 200 << 10
    one.act("cancel").ok()
    assert (ceph / "mapped").read_text() == ""
    one.disks[0]["SOURCE"] = "one/none"
    assert "No such file or directory" in one.driver.message(one.deploy())
    one.disks[0]["CEPH_CONF"] = "/tmp/mine.conf"
    assert "has to lie in /etc/ceph" in one.driver.message(one.deploy())


def test_a_source_of_a_users_own_opens_nothing_behind_a_qcow2(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    """In 3.2 users write SOURCE: a file of theirs may be called as the image of somebody else, in a like directory."""
    one = vm(None)
    store = Path("/var/lib/one/datastores/1")
    store.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copy(filled(tmp_path / "foreign", tree, "ext4", 64), store / "foreign")
        put_upon(one, store / "foreign")
        one.disks.append({"DISK_ID": 0, "TARGET": "sda", "FORMAT": "qcow2", "SOURCE": "/srv/mallory/1/foreign"})
        assert "is neither the VM's own" in one.driver.message(one.deploy())
        one.disks[0]["IMAGE_ID"] = "1x"
        assert "is neither the VM's own" in one.driver.message(one.deploy())
    finally:
        shutil.rmtree(store)


def test_the_helper_maps_no_image_that_was_made_for_another_disk(tmp_path: Path, ceph: Path) -> None:
    """Whatever an executable makes of a template."""
    work = Work(24, "deploy", Journal(str(tmp_path / "journal"), "deploy"), config.HostConfig(), lambda _text: None)
    for kind, name in [("fs", "one-7"), ("fs", "one-sys-24-2"), ("image", "one-sys-25-1"), ("image", "one-7-25-1")]:
        with pytest.raises(StorageError, match=r"is one-sys-24-1|made for another disk"):
            rbd.open_image(work, Disk(disk_id=1, path=f"rbd:one/{name}", kind=kind))
    assert (ceph / "mapped").read_text() == ""


def test_what_was_never_mapped_needs_no_rbd_to_be_given_back(vm: NewVm) -> None:
    """On a host without it."""
    one = vm(None)
    one.disks.append({"DISK_ID": 0, "TARGET": "sda", "SOURCE": "one/one-7", **CEPH})
    assert "rbd" in one.driver.message(one.deploy())
    one.act("cancel").ok()
    assert not os.path.exists(VmPaths(one.vm_id).state)


@pytest.mark.generation(MONITORD)
def test_a_ceph_image_grows_while_mounted(vm: NewVm, ceph: Path) -> None:
    """Its transfer manager leaves that to the driver; a volatile disk, which has a name of its own in the pool."""
    one = vm(images.busybox_ext4())
    one.tm_mad = "ceph"
    empty(ceph / f"one-sys-{one.vm_id}-1", XFS_MB)
    volatile = {"TYPE": "fs", "FORMAT": "raw", "FS": "xfs", "DISK_TYPE": "RBD", "POOL_NAME": "one"}
    one.disks.append({"DISK_ID": 1, "TARGET": "sdb", "SIZE": str(XFS_MB), **volatile})
    one.deployed().booted().inside("echo kept > /media/one-disk.1/file")
    one.act("resize_disk", 1, 500, "b64", lcm_state=62).ok()
    assert int(one.inside("df -k /media/one-disk.1 | tail -n 1 | awk '{print $2}'")) > 400 << 10
    assert one.inside("cat /media/one-disk.1/file") == "kept\n"
    one.act("cancel").ok()
    assert (ceph / "mapped").read_text() == ""


@pytest.mark.generation(MONITORD)
def test_a_qcow2_attached_grows_and_leaves(vm: NewVm, tmp_path: Path) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    raw = empty(tmp_path / "raw", XFS_MB)
    sh("mkfs.xfs", "-q", str(raw))
    sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(tmp_path / "image"))
    path = one.add_disk(str(tmp_path / "image"), ATTACH="YES", FORMAT="qcow2", DRIVER="qcow2")
    one.act("attach_disk", path, "sdb", 1, "b64", lcm_state=17).ok()
    one.disks[1].pop("ATTACH")
    one.inside("echo kept > /media/one-disk.1/file")
    one.act("resize_disk", 1, 500, "b64", lcm_state=62).ok()
    assert int(one.inside("df -k /media/one-disk.1 | tail -n 1 | awk '{print $2}'")) > 400 << 10
    assert json.loads(sh("qemu-img", "info", "-U", "--output=json", path))["virtual-size"] == 500 << 20
    one.disks[1]["ATTACH"] = "YES"
    one.act("detach_disk", path, "sdb", 1, lcm_state=18).ok()
    one.disks.pop()
    # nothing has it open any more: qemu-img takes the lock, and the file system is whole
    sh("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, str(raw))
    with mounted(raw) as mnt:
        assert (mnt / "file").read_text() == "kept\n"


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_device_that_is_only_read_stays_as_it_is(vm: NewVm, tmp_path: Path, kind: str) -> None:
    """Another host may have it mounted: its journal is not clean then, and playing it back would be writing."""
    raw, place = empty(tmp_path / "raw", 320), tmp_path / "place"
    sh(f"mkfs.{kind}", "-q", str(raw))
    place.mkdir()
    sh("mount", "-o", "loop", str(raw), str(place))
    (place / "file").write_text("kept")
    sh("sync", "-f", str(place))
    copy = tmp_path / "copy"
    sh("cp", str(raw), str(copy))
    sh("umount", str(place))
    before = copy.read_bytes()
    device = sh("losetup", "--find", "--show", str(copy)).strip()
    one = vm(images.busybox_ext4())
    try:
        os.symlink(device, one.path("disk.1"))
        one.disks.append({"DISK_ID": 1, "TARGET": "/mnt/d", "READONLY": "YES", "TYPE": "BLOCK"})
        with hostconf.with_line('BLOCK_DEVICES = "/dev/loop*"'):
            one.deployed().booted()
            one.inside("ls /mnt/d")
            one.act("cancel").ok()
        assert holders.is_free(device)
    finally:
        sh("losetup", "-d", device)
    assert copy.read_bytes() == before


def test_a_btrfs_clone_gets_a_uuid_of_its_own(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels before 6.7 need it, which know no temp_fsid."""
    first = filled(tmp_path / "first", tree, "btrfs", 128)
    second = shutil.copy(first, tmp_path / "second")
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: exists(path) and "temp_fsid" not in str(path))
    lines: list[str] = []
    with mounted(first), open(second, "r+b") as file, loops.attach(file.fileno()) as loop:
        before = filesystems.probe(loop.path)
        filesystems.tell_apart(loop.path, before, lines.append, read_only=False)
        assert filesystems.probe(loop.path).uuid != before.uuid
    assert "a UUID of its own" in lines[0]
