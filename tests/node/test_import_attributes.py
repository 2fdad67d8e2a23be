"""No attribute that an archive holds is lost without a word: kept, or the import fails in a line that names the file.

The measure is what GNU tar, as root of the host that made the archive, restores.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.test_import import assert_refused, manifest, mounted, place, run_import, sh

__all__ = ["place"]  # a fixture

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


@contextlib.contextmanager
def accounts(*lines: str) -> Iterator[None]:
    """Users and groups of the host that makes an archive."""
    files = {Path("/etc/passwd"): "{0}:x:{1}:{1}::/:/bin/sh\n", Path("/etc/group"): "{0}:x:{1}:\n"}
    before = {path: path.read_text() for path in files}
    try:
        for path, form in files.items():
            path.write_text(before[path] + "".join(form.format(*line.split(":")) for line in lines))
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small root file system with a passwd and a group of its own."""
    path = tmp_path / "root"
    (path / "etc").mkdir(parents=True)
    (path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nlisa:x:1234:1234::/:/bin/sh\n")
    (path / "etc/group").write_text("root:x:0:\nadm:x:4:\nlisa:x:1234:\n")
    (path / "var").mkdir()
    return path


def restored(tmp_path: Path, data: bytes, *options: str) -> dict[str, object]:
    """What GNU tar makes of it on this host, attribute by attribute."""
    target = tmp_path / "restored"
    target.mkdir()
    sh("tar", "-C", str(target), "-x", "-p", "--same-owner", "--numeric-owner", *options, input=data)
    return manifest(target)


def imported(place: Path, data: bytes) -> dict[str, object]:
    run_import(place, data, init=None)
    with mounted(place) as mnt:
        found = manifest(mnt)
    assert sh("e2fsck", "-f", "-n", str(place / "disk.0"))
    return found


def acl_of(place: Path, data: bytes, name: str, which: str = ACCESS) -> bytes:
    run_import(place, data, init=None)
    with mounted(place) as mnt:
        return os.getxattr(mnt / name, which)


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, bits, number) for tag, bits, number in entries)


NOBODY = 0xFFFFFFFF
LISA = acl((1, 7, NOBODY), (2, 5, 1234), (4, 0, NOBODY), (16, 5, NOBODY), (32, 0, NOBODY))


def archive(*members: tuple[str, dict[str, str]], init: bool = True) -> bytes:
    """A pax archive of directories with these records, and of a passwd and group."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, records in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.pax_headers = tarfile.DIRTYPE, 0o750, records
            tar.addfile(info)
        for name, text in (("etc/passwd", "lisa:x:1234:1::/:\n"), ("etc/group", "adm:x:4:\n")) if init else ():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


@pytest.mark.parametrize("options", [(), ("--xattrs",), ("--xattrs", "--xattrs-include=*"), ("--numeric-owner",)])
def test_acls_by_name_are_restored_as_gnu_tar_does(
    place: Path, tmp_path: Path, root: Path, options: tuple[str, ...]
) -> None:
    """In each form that GNU tar writes them: text, text and raw, by name and by number."""
    (root / "var/log").mkdir()
    (root / "var/log/file").write_text("x")
    sh("setfacl", "-m", "g::---,g:adm:r-x,m::r-x", str(root / "var"))
    sh("setfacl", "-m", "u:1234:r,g:adm:rw", str(root / "var/log/file"))
    sh("setfacl", "-m", "d:u:1234:rwx,d:g:adm:rx,u:1234:rx", str(root / "var/log"))
    with accounts("lisa:1234"):
        data = sh("tar", "-C", str(root), "-c", "--acls", *options, ".")
        expected = restored(tmp_path, data, "--acls", *options[:2])
    assert imported(place, data) == expected == manifest(root)


def test_acls_that_are_raw_only(place: Path, root: Path) -> None:
    sh("setfacl", "-m", "g::---,g:adm:r-x,m::r-x", str(root / "var"))
    data = sh("tar", "-C", str(root), "-c", "--xattrs", "--xattrs-include=*", ".")
    assert imported(place, data) == manifest(root)


@pytest.mark.parametrize(
    "text",
    [
        "user::rwx,user:lisa:r-x,group::---,mask::r-x,other::---",
        "user::rwx\nuser:lisa:r-x\t#effective:r-x\ngroup::---\nmask::r-x\nother::---\n",
        "user::rwx,user:lisa:r-x:1234,group::---,mask::r-x,other::---",  # bsdtar, star
        "user::rwx,user:nobody-knows-her:r-x:1234,group::---,mask::r-x,other::---",
        "u::rwx,u:1234:r-x,g::---,m::r-x,o::---",
        "user::rwx,user:lisa:r-x,group::---,mask:r-x,other:---",
    ],
    ids=["gnu", "comments", "bsdtar", "by-id", "short", "solaris"],
)
def test_every_form_of_acl(place: Path, text: str) -> None:
    for which, name in (("access", ACCESS), ("default", DEFAULT)):
        assert acl_of(place, archive(("d", {f"SCHILY.acl.{which}": text})), "d", name) == LISA


@pytest.mark.parametrize("mode", [0o604, 0o777, 0o4000, 0o2750])
@pytest.mark.parametrize("key", ["SCHILY.acl.access", "SCHILY.xattr.system.posix_acl_access"])
def test_an_acl_counts_where_the_mode_says_otherwise(place: Path, key: str, mode: int) -> None:
    """bsdtar writes the mode by the ACL's entry for the group, not by its mask."""
    words = "user::rwx,user:1234:r-x,group::---,mask::r-x,other::---"
    text = words if key == "SCHILY.acl.access" else os.fsdecode(LISA)
    info = tarfile.TarInfo("file")
    info.mode, info.pax_headers, info.size = mode, {key: text}, 5
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"hello"))
    run_import(place, out.getvalue(), init=None)
    with mounted(place) as mnt:
        assert os.getxattr(mnt / "file", ACCESS) == LISA
        assert os.stat(mnt / "file").st_mode & 0o7777 == 0o750 | mode & 0o7000
        assert (mnt / "file").read_bytes() == b"hello"


def test_names_mean_what_they_meant_where_the_archive_was_made(place: Path, root: Path) -> None:
    """A name of the host that goes with the number of a file's owner, though the root file system knows another."""
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nlisa:x:77:77::/:/bin/sh\n")
    os.chown(root / "var", 1234, 1234)
    sh("setfacl", "-m", "u:1234:r-x,g::---,m::r-x", str(root / "etc"))
    with accounts("lisa:1234"):
        data = sh("tar", "-C", str(root), "-c", "--acls", ".")
    assert imported(place, data) == manifest(root)


def test_names_below_rootfs(place: Path, root: Path) -> None:
    sh("setfacl", "-m", "u:1234:r-x", str(root / "var"))
    (root / "sbin").mkdir()
    (root / "sbin/init").write_bytes(b"\x7fELF")
    (root / "sbin/init").chmod(0o755)
    root.rename(root.parent / "rootfs")
    with accounts("lisa:1234"):
        data = sh("tar", "-C", str(root.parent), "-c", "--acls", "rootfs")
    run_import(place, data)
    with mounted(place) as mnt:
        assert manifest(mnt) == manifest(root.parent / "rootfs")


@pytest.mark.parametrize("kind", ["user", "group"])
def test_a_name_that_nobody_knows(place: Path, kind: str) -> None:
    records = {"SCHILY.acl.access": f"user::rwx,{kind}:stranger:r-x,group::---,mask::r-x,other::---"}
    words = f"some/dir: its ACL names the {kind} stranger, whose number neither /etc/"
    assert_refused(place, archive(("some/dir", records)), words, init=None)


def test_a_data_disk_without_names(place: Path) -> None:
    records = {"SCHILY.acl.access": "user::rwx,user:lisa:r-x,group::---,mask::r-x,other::---"}
    assert_refused(place, archive(("d", records), init=False), "d: its ACL names the user lisa", init=None)


@pytest.mark.parametrize("text", ["user::rwx,nonsense", "user::rwx,group:x:rwz,other::---", "user::rwx,user:7:r-x"])
def test_what_is_no_acl(place: Path, text: str) -> None:
    assert_refused(place, archive(("d", {"SCHILY.acl.access": text})), "Cannot import disk.0: ", init=None)


def test_the_passwd_of_a_hostile_archive(place: Path) -> None:
    """A link out, a device, a FIFO, a huge file in its place: nothing of the host is read."""
    text = "user::rwx,user:root:r-x,group::---,mask::r-x,other::---"
    for kind, target in ((tarfile.SYMTYPE, "/../../../../etc/passwd"), (tarfile.FIFOTYPE, ""), (tarfile.CHRTYPE, "")):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            passwd = tarfile.TarInfo("etc/passwd")
            passwd.type, passwd.linkname, passwd.devmajor, passwd.devminor = kind, target, 1, 5
            tar.addfile(passwd)
            info = tarfile.TarInfo("d")
            info.type, info.pax_headers, info.uname = tarfile.DIRTYPE, {"SCHILY.acl.access": text}, ""
            tar.addfile(info)
        assert_refused(place, out.getvalue(), "d: its ACL names the user root", init=None)


def test_attributes_go_to_no_link_out_of_the_archive(place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("d")
        info.type, info.pax_headers = tarfile.DIRTYPE, {"SCHILY.xattr.trusted.evil": "x"}
        tar.addfile(info)
        link = tarfile.TarInfo("d")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(link)
        info.name, info.pax_headers = "d/.", {"SCHILY.xattr.trusted.evil": "x"}
        tar.addfile(info)
    with contextlib.suppress(Exception):
        run_import(place, out.getvalue(), init=None)
    assert os.listxattr(outside) == []


@pytest.mark.parametrize("bytes_", [3000, 5000, 20_000, 65_536])
def test_large_xattrs(place: Path, bytes_: int) -> None:
    value = "v" * bytes_
    run_import(place, archive(("d", {"SCHILY.xattr.user.big": value}), ("e", {})), init=None)
    with mounted(place) as mnt:
        assert os.getxattr(mnt / "d", "user.big") == value.encode()
        assert os.listxattr(mnt / "e") == []
    assert sh("e2fsck", "-f", "-n", str(place / "disk.0"))


def test_many_xattrs_that_are_large_together(place: Path) -> None:
    records = {f"SCHILY.xattr.user.a{number}": "v" * 700 for number in range(20)}
    run_import(place, archive(("d", records)), init=None)
    with mounted(place) as mnt:
        assert len(os.listxattr(mnt / "d")) == 20


def test_more_xattrs_than_a_file_can_have(place: Path) -> None:
    records = {f"SCHILY.xattr.user.{'n' * 200}{number}": "v" for number in range(60)}
    assert_refused(place, archive(("d", records)), "for file 'd': No space left on device", init=None)


def test_an_xattr_that_linux_cannot_keep(place: Path) -> None:
    data = archive(("some/dir", {"SCHILY.xattr.user.big": "v" * 65_537}))
    assert_refused(place, data, "some/dir: its attribute user.big has 65537 bytes, Linux allows 65536", init=None)


@pytest.mark.parametrize(
    "records,name,value",
    [
        ({"SCHILY.xattr.trusted.overlay.opaque": "y"}, "trusted.overlay.opaque", b"y"),
        ({"SCHILY.xattr.user.a%3Db%25": "1"}, "user.a=b%", b"1"),
        ({"LIBARCHIVE.xattr.user.x%20y": base64.b64encode(b"\0\1\2z").decode().rstrip("=")}, "user.x y", b"\0\1\2z"),
        ({"LIBARCHIVE.xattr.user.x": "Yg", "SCHILY.xattr.user.x": "a"}, "user.x", b"a"),
        (
            {"SCHILY.xattr.security.selinux": "system_u:object_r:etc_t:s0"},
            "security.selinux",
            b"system_u:object_r:etc_t:s0",
        ),
        ({"RHT.security.selinux": "system_u:object_r:etc_t:s0"}, "security.selinux", b"system_u:object_r:etc_t:s0\0"),
    ],
)
def test_xattrs_of_every_kind(place: Path, records: dict[str, str], name: str, value: bytes) -> None:
    run_import(place, archive(("d", records)), init=None)
    with mounted(place) as mnt:
        assert os.getxattr(mnt / "d", name) == value


def test_what_a_later_file_of_the_same_name_does_not_have(place: Path) -> None:
    run_import(place, archive(("d", {"SCHILY.xattr.trusted.x": "1"}), ("./d/", {})), init=None)
    with mounted(place) as mnt:
        assert os.listxattr(mnt / "d") == []


@pytest.mark.parametrize(
    "records,words",
    [
        ({"SCHILY.acl.ace": "everyone@:rwx::allow"}, "some/dir: an NFSv4 ACL"),
        ({"SCHILY.xattr.system.nfs4_acl": "x"}, "system.nfs4_acl"),
        ({"SUN.holesdata": " 0 1"}, "some/dir: a sparse file in the form of Solaris"),
        ({"GNU.volume.filename": "x"}, "some/dir: a part of a multi-volume archive"),
    ],
)
def test_what_cannot_be_kept_is_refused(place: Path, records: dict[str, str], words: str) -> None:
    assert_refused(place, archive(("some/dir", records)), words, init=None)


def test_keywords_that_mean_nothing_here_are_told(place: Path) -> None:
    records = {"MSWINDOWS.fileattr": "32", "SCHILY.fflags": "nodump", "LIBARCHIVE.xattr.com.apple.provenance": "AQ"}
    lines = run_import(place, archive(("d", {**records, "SCHILY.dev": "7"})), init=None)
    told = next(line for line in lines if "are left out" in line)
    assert "MSWINDOWS.fileattr (1)" in told
    assert "com.apple.provenance (1)" in told
    assert "SCHILY.fflags (1)" in told
    assert "SCHILY.dev" not in told


def test_a_global_header(place: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0123abc", "VENDOR.x": "1"}
    ) as tar:
        tar.addfile(tarfile.TarInfo("a"))
    lines = run_import(place, out.getvalue(), init=None)
    assert any("VENDOR.x (1)" in line for line in lines)
    for key in ("SCHILY.xattr.user.x", "SCHILY.acl.access", "size", "path"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={key: "5"}) as tar:
            tar.addfile(tarfile.TarInfo("a"))
        assert_refused(place, out.getvalue(), "Cannot import disk.0: ", init=None)


@pytest.mark.parametrize(
    "format,sparse",
    [(name, ()) for name in ("v7", "ustar", "oldgnu", "gnu", "posix")]
    + [(name, ("--sparse",)) for name in ("oldgnu", "gnu", "posix")],
)
def test_every_format(place: Path, tmp_path: Path, format: str, sparse: tuple[str, ...]) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/file").write_bytes(os.urandom(100_000))
    os.link(root / "d/file", root / "d/hard")
    (root / "d/soft").symlink_to("file")
    with open(root / "d/holes", "wb") as holes:
        for number in range(60):
            holes.seek(number << 16)
            holes.write(b"x")
        holes.truncate(60 << 16)
    os.utime(root / "d/file", (1, 1))
    if format not in ("v7", "ustar"):
        (root / ("n" * 200)).mkdir()
        (root / ("n" * 200) / ("f" * 200)).write_text("x")
        (root / b"\xff\xfe\n new".decode(errors="surrogateescape")).write_text("x")
    if format != "v7":
        os.mkfifo(root / "fifo")
        os.mknod(root / "device", stat.S_IFBLK | 0o600, os.makedev(8, 3))
    data = sh("tar", "-C", str(root), "-c", f"--format={format}", *sparse, ".")
    found = imported(place, data)
    assert found == manifest(root)


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_files_of_posix_archives(place: Path, tmp_path: Path, version: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with open(root / "holes", "wb") as holes:
        for number in range(40):
            holes.seek(number << 16)
            holes.write(b"abc")
        holes.truncate(50 << 16)
    sh("setfattr", "-n", "user.x", "-v", "1", str(root / "holes"))
    data = sh(
        "tar", "-C", str(root), "-c", "--format=posix", "--sparse", f"--sparse-version={version}",
        "--pax-option=hdrcharset=BINARY", "--xattrs", ".",
    )  # fmt: skip
    assert imported(place, data) == manifest(root)


def test_times(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, ns in (("a", 1_234_567_890_123_456_789), ("b", -1_500_000_000), ("c", 4_000_000_000_000_000_001)):
        (root / name).write_text("x")
        os.utime(root / name, ns=(ns, ns))
    data = sh("tar", "-C", str(root), "-c", "--format=posix", ".")
    run_import(place, data, init=None)
    with mounted(place) as mnt:
        for name in "abc":
            assert os.stat(mnt / name).st_mtime_ns == os.stat(root / name).st_mtime_ns


@pytest.mark.parametrize("records", [{}, {"uid": "4294967295"}, {"gid": "04294967295"}])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE])
def test_an_owner_that_is_no_number(place: Path, records: dict[str, str], kind: bytes) -> None:
    """chown(2) would leave the file root's own."""
    info = tarfile.TarInfo("some/file")
    info.type, info.linkname, info.pax_headers = kind, "x", records
    info.uid = 0 if records else 4294967295
    data = info.tobuf(tarfile.PAX_FORMAT if records else tarfile.GNU_FORMAT) + bytes(1024)
    assert_refused(place, data, "some/file: its owner is 4294967295, which Linux takes for no number", init=None)


def test_a_volume_label(place: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").write_text("x")
    for format in ("gnu", "posix"):
        data = sh("tar", "-C", str(tmp_path / "root"), "-c", f"--format={format}", "--label=VOLUME", ".")
        assert "a" in imported(place, data)


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_incremental_archives(place: Path, tmp_path: Path, format: str) -> None:
    """A full dump is whole; the next holds only what has changed."""
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/old").write_text("x")
    os.utime(root / "d/old", (1, 1))
    command = ["tar", "-C", str(root), "-c", f"--format={format}", f"--listed-incremental={tmp_path}/list", "."]
    full = sh(*command)
    assert "d/old" in imported(place, full)
    (root / "d/new").write_text("x")
    assert_refused(place, sh(*command), "d/old is not in it, since it is an incremental archive", init=None)


@pytest.mark.parametrize("volume", [1, 2])
def test_a_part_of_an_archive(place: Path, tmp_path: Path, volume: int) -> None:
    (tmp_path / "file").write_bytes(os.urandom(50_000))
    subprocess.run(
        [
            "tar",
            "-C",
            str(tmp_path),
            "-c",
            "-M",
            "-L",
            "30",
            "-f",
            str(tmp_path / "v1"),
            "-f",
            str(tmp_path / "v2"),
            "file",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    words = "truncated" if volume == 1 else "multi-volume"
    assert_refused(place, (tmp_path / f"v{volume}").read_bytes(), words, init=None)


def test_attributes_of_a_squashfs(place: Path, tmp_path: Path) -> None:
    """cp passes over what it cannot set, and does not see what only the host's root does."""
    root = tmp_path / "root"
    (root / "sbin").mkdir(parents=True)
    (root / "sbin/init").write_bytes(b"\x7fELF")
    (root / "sbin/init").chmod(0o755)
    sh("setcap", "cap_net_raw+ep", str(root / "sbin/init"))
    sh("truncate", "-s", "120M", str(tmp_path / "btrfs"))
    sh("mkfs.btrfs", "-q", str(tmp_path / "btrfs"))  # ext4 has no room for the large one
    (tmp_path / "mnt").mkdir()
    sh("mount", "-o", "loop", str(tmp_path / "btrfs"), str(tmp_path / "mnt"))
    try:
        sh("cp", "-a", str(root), str(tmp_path / "mnt/root"))
        root = tmp_path / "mnt/root"
        os.setxattr(root / "sbin", "trusted.overlay.opaque", b"y")
        os.setxattr(root / "sbin", "security.selinux", b"system_u:object_r:bin_t:s0\0")
        os.setxattr(root, "user.big", b"v" * 9000)
        sh("mksquashfs", str(root), str(place / "disk.0"), "-quiet", "-no-progress", "-noappend")
        run_import(place, None)
        with mounted(place) as mnt:
            assert manifest(mnt) == manifest(root)
    finally:
        sh("umount", str(tmp_path / "mnt"))
    assert sh("e2fsck", "-f", "-n", str(place / "disk.0"))
