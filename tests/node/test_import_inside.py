"""What is inside a compressed file decides: an image is unpacked whole, a tar imported, all else refused in words."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from pathlib import Path

import pytest

from onelxc.root import importer, mounts
from onelxc.root.unpacking import Limits
from tests.node.test_import import (
    COMPRESSIONS,
    assert_refused,
    mounted,
    no_abort,
    pack,
    place,
    run_import,
    sh,
    tree,
)

__all__ = ["place", "tree"]  # fixtures

MIB = 1 << 20
PACKED = {name: argv for name, argv in COMPRESSIONS.items() if argv}


def packed(data: bytes, compression: str = "gzip") -> bytes:
    return sh(*COMPRESSIONS[compression], "-c", input=data)


def made(path: Path, kind: str, tree: Path) -> bytes:
    """A small disk of each kind, and with something in it where a tool can."""
    with open(path, "wb") as file:
        file.truncate({"xfs": 310, "btrfs": 130, "f2fs": 64}.get(kind, 16) * MIB)
    name = str(path)
    commands: dict[str, list[list[str]]] = {
        "ext2": [["mkfs.ext2", "-q", "-d", str(tree), name]],
        "ext3": [["mkfs.ext3", "-q", "-d", str(tree), name]],
        "ext4": [["mkfs.ext4", "-q", "-d", str(tree), name]],
        "xfs": [["mkfs.xfs", "-q", name]],
        "btrfs": [["mkfs.btrfs", "-q", "--rootdir", str(tree), name]],
        "dos": [["sfdisk", "-q", name]],
        "gpt": [["sfdisk", "-q", "-X", "gpt", name]],
        "qcow2": [["qemu-img", "create", "-q", "-f", "qcow2", name, "64M"]],
        "squashfs": [["mksquashfs", str(tree), name, "-noappend", "-quiet", "-no-progress"]],
        "swap": [["mkswap", "-q", name]],
    }
    for argv in commands[kind]:
        lines = b"2048,,L\n" if argv[0] == "sfdisk" else None
        subprocess.run(argv, check=True, input=lines, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return path.read_bytes()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    root = tmp_path / "small"
    (root / "sbin").mkdir(parents=True)
    (root / "sbin/init").write_bytes(b"\x7fELF" + os.urandom(50_000))
    (root / "sbin/init").chmod(0o755)
    return root


@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4", "xfs", "btrfs", "dos", "gpt", "qcow2", "squashfs"])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_image_is_unpacked_byte_by_byte(
    place: Path, tmp_path: Path, small: Path, kind: str, compression: str
) -> None:
    data = made(tmp_path / "disk", kind, small)
    (place / "disk.0").write_bytes(packed(data, compression))
    os.chown(place / "disk.0", 9869, 9869)
    run_import(place, None, init=None)
    assert hashlib.sha256((place / "disk.0").read_bytes()).digest() == hashlib.sha256(data).digest()
    status = os.stat(place / "disk.0")
    assert (status.st_uid, status.st_gid) == (9869, 9869)
    assert status.st_blocks * 512 <= len(data) // 2 or kind == "squashfs", "the image is not sparse"
    assert os.listdir(place) == ["disk.0"]


@pytest.mark.parametrize("compression", PACKED)
@pytest.mark.parametrize("init", ["/sbin/init", None])
def test_a_compressed_ext4_is_the_disk(
    place: Path, tmp_path: Path, small: Path, compression: str, init: str | None
) -> None:
    run_import(place, packed(made(tmp_path / "disk", "ext4", small), compression), init=init)
    with mounted(place) as mnt:
        assert (mnt / "sbin/init").read_bytes() == (small / "sbin/init").read_bytes()


def test_a_compressed_squashfs_is_a_root(place: Path, tmp_path: Path, small: Path) -> None:
    """Which has to be writable, as one that is not compressed once more."""
    run_import(place, packed(made(tmp_path / "disk", "squashfs", small)), init="/sbin/init")
    with mounted(place) as mnt:
        assert (mnt / "sbin/init").read_bytes() == (small / "sbin/init").read_bytes()
        (mnt / "written").write_text("x")


@pytest.mark.parametrize("compression", PACKED)
def test_padding_behind_a_compressed_image(place: Path, tmp_path: Path, small: Path, compression: str) -> None:
    data = made(tmp_path / "disk", "ext4", small)
    (place / "disk.0").write_bytes(packed(data, compression))
    os.truncate(place / "disk.0", 32 * MIB + 1)
    run_import(place, None, init=None)
    assert (place / "disk.0").read_bytes() == data


def test_an_image_in_several_members(place: Path, tmp_path: Path, small: Path) -> None:
    data = made(tmp_path / "disk", "ext4", small)
    for compression in ("gzip", "xz", "zstd", "bzip2", "lz4"):
        run_import(place, packed(data[:7000], compression) + packed(data[7000:], compression), init=None)
        assert (place / "disk.0").read_bytes() == data


@pytest.mark.parametrize("compression", PACKED)
def test_a_broken_or_longer_compressed_image_is_refused(
    place: Path, tmp_path: Path, small: Path, compression: str
) -> None:
    data = packed(made(tmp_path / "disk", "ext4", small), compression)
    assert_refused(place, data[:-1] if compression != "gzip" else data[:-5], "truncated", init=None)
    assert_refused(place, data[: len(data) // 2], "truncated", init=None)
    assert_refused(place, data + b"something", "", init=None)
    assert_refused(place, data + bytes(5000) + b"something", "", init=None)


def test_an_image_that_is_larger_than_allowed(place: Path, tmp_path: Path) -> None:
    """A thousand times its compressed size: against bombs, as with archives; SIZE of the disk says that it is meant."""
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(1100 * MIB)
    sh("mkfs.ext4", "-q", str(path))
    with open(place / "disk.0", "wb") as out:
        subprocess.run(["bzip2", "-c", str(path)], check=True, stdout=out)
    assert_refused(place, None, "give the disk a larger SIZE", init=None)
    run_import(place, None, init=None, size_mb=1100)
    assert os.stat(place / "disk.0").st_size == 1100 * MIB
    assert os.stat(place / "disk.0").st_blocks * 512 < 100 * MIB


def test_a_terabyte_of_zeros_is_not_unpacked(place: Path) -> None:
    header = bytearray(2048)
    header[1080:1082] = b"\x53\xef"
    script = "import os,sys\nfor _ in range(1200): os.write(1, bytes(1 << 20))"
    with open(place / "disk.0", "wb") as out:
        first = sh("zstd", "-q", "-c", input=bytes(header))
        out.write(first)
        out.flush()
        with subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE) as source:
            subprocess.run(["zstd", "-q", "-c"], stdin=source.stdout, stdout=out, check=True)
    assert_refused(place, None, "does not fit into 60 MiB", init=None, limits=Limits(largest_mb=60))


def _at(offset: int, mark: bytes) -> bytes:
    return bytes(offset) + mark + bytes(70_000)


FILES = {
    "a ZIP archive": b"PK\x03\x04" + bytes(600),
    "a cpio archive": b"070701" + b"0" * 600,
    "a cpio archive (old)": b"\xc7\x71" + bytes(600),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c" + bytes(600),
    "a file of compress (.Z)": b"\x1f\x9d\x90" + bytes(range(256)),
    "an .lzma file": b"\x5d\x00\x00\x80\x00" + b"\xff" * 8 + bytes(600),
    "an lzip file": b"LZIP\x01" + bytes(600),
    "a Debian package": b"!<arch>\ndebian-binary   " + b" " * 100,
    "an HTML page": b"<!DOCTYPE html>\n<html>404</html>",
    "a text file": b"lxc.rootfs.path = dir:/x\n" * 10,
}
DISKS = {
    "swap space": _at(4086, b"SWAPSPACE2"),
    "an encrypted disk (LUKS)": _at(0, b"LUKS\xba\xbe\x00\x02"),
    "an ISO image": _at(32769, b"CD001"),
    "an LVM physical volume": _at(512, b"LABELONE"),
    "an NTFS file system": _at(3, b"NTFS    "),
    "something unknown": b"\xfe" * 60_000,
    "the archive is empty": bytes(10240),
    "the archive is empty (nothing)": b"",
    "begins with 1048576 zeros": bytes(2 * MIB) + b"x",
}


@pytest.mark.parametrize("compression", ["", "gzip"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_of_no_use_is_named(place: Path, compression: str, name: str) -> None:
    data = packed(FILES[name]) if compression else FILES[name]
    assert_refused(place, data, name.replace(" (old)", ""), init=None)


@pytest.mark.parametrize("name", DISKS)
def test_compressed_but_of_no_use(place: Path, name: str) -> None:
    for compression in ("gzip", "xz"):
        assert_refused(place, packed(DISKS[name], compression), name.replace(" (nothing)", ""), init=None)


@pytest.mark.parametrize("inner", PACKED)
def test_compressed_twice(place: Path, tree: Path, inner: str) -> None:
    data = pack(tree, compression=inner)
    assert_refused(place, packed(data, "gzip"), f"in the gzip file is another compressed file ({inner})")


def test_an_import_that_is_not_replaced_by_less(place: Path, tmp_path: Path, small: Path) -> None:
    """The persistent image itself, through OpenNebula's link, is what was in it."""
    store = place / "store"
    store.mkdir()
    data = made(tmp_path / "disk", "ext4", small)
    (store / "image").write_bytes(packed(data))
    directory = os.open(store, os.O_PATH)
    try:
        assert importer.import_archive(directory, "image", size_mb=None, init=None, log=print, abort=no_abort)
    finally:
        os.close(directory)
    assert (store / "image").read_bytes() == data


def test_a_compressed_image_grows_to_size(place: Path, tmp_path: Path, small: Path) -> None:
    run_import(place, packed(made(tmp_path / "disk", "ext4", small)), init=None, size_mb=64)
    fd = os.open(place / "disk.0", os.O_RDWR)
    try:
        with mounts.open_image(fd, "disk.0", print, root=True, size_mb=64) as detached:
            space = os.fstatvfs(detached.fd)
            assert space.f_blocks * space.f_frsize > 50 * MIB
    finally:
        os.close(fd)


def test_an_image_too_large_for_the_datastore(place: Path, tmp_path: Path, small: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(made(path, "ext4", small) + os.urandom(60 * MIB))
    sh("mount", "-t", "tmpfs", "-o", "size=130m", "small", str(place))
    try:
        with open(place / "disk.0", "wb") as out:
            subprocess.run(["bzip2", "-1", "-c", str(path)], check=True, stdout=out)
        assert_refused(place, None, "no space left", init=None)
    finally:
        sh("umount", str(place))


def test_ext_superblock_in_compressed_bytes_is_chance(place: Path, tree: Path) -> None:
    """The marks of disks stand deep in a file; those of compressed files come first."""
    data = pack(tree, compression="gzip")
    extra = struct.pack("<H", 1100) + bytes(1080 - 12) + b"\x53\xef" + bytes(1100 - 1080 + 10)
    assert data[3] == 0
    run_import(place, data[:3] + b"\x04" + data[4:10] + extra + data[10:])
    with mounted(place) as mnt:
        assert (mnt / "etc/passwd").exists()
