"""A tar archive becomes a disk, with every attribute; a hostile, broken or oversized one becomes one line."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.errors import GiveUpError, StorageError
from onelxc.root import filesystems, importer, jail, loops, mounts, syscalls, writeout
from tests.support import machine
from tests.support.waiting import wait_until

COMPRESSIONS = {
    "plain": (),
    "gzip": ("gzip", "-1"),
    "xz": ("xz", "-1"),
    "zstd": ("zstd", "-1"),
    "bzip2": ("bzip2", "-1"),
    "lz4": ("lz4", "-1"),
}


def no_abort() -> None:
    pass


def give_up() -> None:
    raise GiveUpError("cancelled")


def sh(*argv: str, input: bytes | None = None) -> bytes:
    return subprocess.run(argv, check=True, input=input, stdout=subprocess.PIPE).stdout


@pytest.fixture
def place() -> Iterator[Path]:
    """A VM's directory on this host."""
    path = Path(f"/var/lib/one/import-{os.getpid()}")
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small root with one of each kind of file that an import has to keep."""
    root = tmp_path_factory.mktemp("tree") / "root"
    for name in ("sbin", "bin", "etc", "dev", "home/user", "tmp", "usr/bin"):
        (root / name).mkdir(parents=True)
    root.chmod(0o755)
    (root / "sbin/init").write_bytes(b"\x7fELF" + os.urandom(70_000))
    (root / "sbin/init").chmod(0o755)
    (root / "usr/bin/sudo").write_text("sudo")
    os.chown(root / "usr/bin/sudo", 0, 0)
    (root / "usr/bin/sudo").chmod(0o4755)
    os.link(root / "usr/bin/sudo", root / "bin/su")
    (root / "usr/bin/ping").write_text("ping")
    sh("setcap", "cap_net_raw+ep", str(root / "usr/bin/ping"))
    (root / "tmp").chmod(0o1777)
    os.chown(root / "home/user", 1000, 1001)
    (root / "home/user").chmod(0o2750)
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    os.setxattr(root / "etc/passwd", "user.test", b"kept")
    sh("setfacl", "-m", "u:1000:rw,d:g:7:rx", str(root / "etc"))
    (root / "etc/link").symlink_to("/etc/passwd")
    (root / "etc/dangling").symlink_to("../../../../nowhere")
    (root / "etc/ünïcode\n name").write_text("x")
    os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(root / "dev/null", 0o666)
    os.mkfifo(root / "dev/initctl")
    with open(root / "home/sparse", "wb") as sparse:
        sparse.truncate(40 << 20)
        sparse.seek(20 << 20)
        sparse.write(b"in the middle")
    os.chown(root / "home/sparse", 4_000_000_000, 7, follow_symlinks=False)
    return root


def manifest(root: Path) -> dict[str, object]:
    """Everything about every file below, comparable."""
    found: dict[str, object] = {}
    links: dict[int, set[str]] = {}
    for directory, names, files in os.walk(root):
        for name in [".", *names, *files]:
            path = os.path.normpath(os.path.join(directory, name))
            status = os.lstat(path)
            inside = os.path.relpath(path, root)
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
            }
            what: object = None
            if stat.S_ISREG(status.st_mode):
                what = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            elif stat.S_ISCHR(status.st_mode):
                what = status.st_rdev
            links.setdefault(status.st_ino, set()).add(inside)
            about = (oct(status.st_mode), status.st_uid, status.st_gid, int(status.st_mtime), xattrs, what)
            found[inside] = (*about, links[status.st_ino])  # one set, complete at the end, shared by its names
    return found


def pack(tree: Path, *options: str, names: tuple[str, ...] = (".",), compression: str = "plain") -> bytes:
    plain = sh("tar", "-C", str(tree), "-c", "--numeric-owner", "--sparse", "--acls", "--xattrs",
               "--xattrs-include=*", *options, *names)  # fmt: skip
    return sh(*COMPRESSIONS[compression], "-c", input=plain) if compression != "plain" else plain


def run_import(place: Path, data: bytes | None, **options: object) -> list[str]:
    """Import `data` as disk.0; the lines that it logged."""
    if data is not None:
        (place / "disk.0").write_bytes(data)
    lines: list[str] = []
    arguments: dict[str, object] = {"size_mb": None, "init": "/sbin/init", "log": lines.append, "abort": no_abort}
    directory = os.open(place, os.O_PATH | os.O_DIRECTORY)
    try:
        assert importer.import_archive(directory, "disk.0", **{**arguments, **options})  # type: ignore[arg-type]
    finally:
        os.close(directory)
    return lines


def assert_free(place: Path) -> None:
    """No loop device has the image, but for the moment in which udev looks at it."""
    wait_until(lambda: not loops.loops_of(str(place / "disk.0")), "no loop device has the image")


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[Path]:
    """The finished image, mounted as stored."""
    target = place / "mnt"
    fd = os.open(place / "disk.0", os.O_RDWR)
    try:
        mounts.place(mounts.open_image(fd, "disk.0", print, root=True), str(target), id_base=None)
    finally:
        os.close(fd)
    try:
        yield target
    finally:
        mounts.unmount(str(target))
        target.rmdir()
        assert_free(place)


def assert_refused(place: Path, data: bytes | None, words: str, **options: object) -> None:
    """One clear line, the archive as it was, nothing beside it."""
    if data is not None:
        (place / "disk.0").write_bytes(data)
    before = (place / "disk.0").read_bytes()
    with pytest.raises(StorageError) as raised:
        run_import(place, None, **options)
    text = str(raised.value)
    assert words in text, text
    assert text.startswith("Cannot "), text
    assert (place / "disk.0").read_bytes() == before
    assert os.listdir(place) == ["disk.0"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_attribute_survives(place: Path, tree: Path, compression: str) -> None:
    (place / "disk.0").write_bytes(pack(tree, compression=compression))
    os.chown(place / "disk.0", 9869, 9869)
    (place / "disk.0").chmod(0o640)
    lines = run_import(place, None)
    assert f"({compression} tar" in lines[-1]
    status = os.stat(place / "disk.0")
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (9869, 9869, 0o640)
    with mounted(place) as mnt:
        assert manifest(mnt) == manifest(tree)
        assert os.stat(mnt / "home/sparse").st_blocks < 2048, "the sparse file has become full"
        assert "security.capability" in os.listxattr(mnt / "usr/bin/ping")
    assert sh("e2fsck", "-f", "-n", str(place / "disk.0"))


@pytest.mark.parametrize(
    "options,names",
    [
        ((), (".",)),
        (("--transform=s,^\\./,/,", "-P"), (".",)),
        ((), ("sbin", "bin", "etc", "dev", "home", "tmp", "usr")),
    ],
    ids=["dot", "absolute", "bare"],
)
def test_root_at_the_top(place: Path, tree: Path, options: tuple[str, ...], names: tuple[str, ...]) -> None:
    run_import(place, pack(tree, *options, names=names))
    with mounted(place) as mnt:
        expected, got = manifest(tree), manifest(mnt)
        assert {k: v for k, v in got.items() if k != "."} == {k: v for k, v in expected.items() if k != "."}


@pytest.mark.parametrize(
    "beside", [(), ("metadata.yaml", "templates/hostname.tpl"), ("config",)], ids=["bare", "lxd", "lxc"]
)
def test_root_below_rootfs(place: Path, tree: Path, tmp_path: Path, beside: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    image.mkdir()
    sh("cp", "-a", str(tree), str(image / "rootfs"))
    for name in beside:
        (image / name).parent.mkdir(exist_ok=True)
        (image / name).write_text("lxc.rootfs.path = /etc/shadow\n")
    run_import(place, pack(image))
    with mounted(place) as mnt:
        assert manifest(mnt) == manifest(tree)


def test_nothing_of_use_is_lost_beside_rootfs(place: Path, tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    (image / "backups").mkdir(parents=True)
    sh("cp", "-a", str(tree), str(image / "rootfs"))
    sh("setfacl", "-m", "u:7:rwx,d:u:8:rx", str(image))
    assert_refused(place, pack(image), "beside rootfs/ there is 'backups', which would be lost")
    run_import(place, pack(image), init=None)  # a data disk is what was packed
    with mounted(place) as mnt:
        assert manifest(mnt) == manifest(image)
    (image / "backups").rename(image / "templates")
    lines = run_import(place, pack(image))
    assert "left out beside rootfs/: 'templates'" in lines
    with mounted(place) as mnt:
        assert manifest(mnt) == manifest(tree)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_padding_of_qemu_img_resize_is_harmless(place: Path, tree: Path, compression: str) -> None:
    data = pack(tree, compression=compression)
    for padded in (len(data) + 1, (len(data) + 511) // 512 * 512, 64 << 20):
        (place / "disk.0").write_bytes(data)
        os.truncate(place / "disk.0", padded)
        run_import(place, None)
        with mounted(place) as mnt:
            assert (mnt / "etc/passwd").exists()


def test_a_gzip_trailer_that_ends_in_zeros(place: Path, tree: Path) -> None:
    """The size in the trailer is below 16 MiB nearly always, so its last byte is zero, and the padding hides it."""
    data = pack(tree, compression="gzip")
    assert data[-1] == 0
    (place / "disk.0").write_bytes(data)
    os.truncate(place / "disk.0", 8 << 20)
    run_import(place, None)
    with mounted(place) as mnt:
        assert (mnt / "etc/passwd").exists()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_truncated_anywhere_is_an_error(place: Path, tree: Path, compression: str) -> None:
    data = pack(tree, compression=compression)
    ends = {len(data) * part // 9 for part in range(1, 9)} | {600, 1024, len(data) - 1, len(data) - 9}
    if compression == "plain":  # what is cut from the blocks of zeros at the end is no loss
        content = len(data.rstrip(b"\0")) // 512 * 512
        ends = {end for end in ends if end <= content} | {content, content - 512}
    for end in sorted(ends):
        if end > 512:
            assert_refused(place, data[:end], "", init=None)


def test_a_gzip_file_of_several_members(place: Path, tree: Path) -> None:
    """As parallel packers write it; what is no member after the last is an error, as gzip says itself."""
    plain = pack(tree)
    parts = [sh("gzip", "-1", "-c", input=plain[at : at + 20_000]) for at in range(0, len(plain), 20_000)]
    run_import(place, b"".join(parts))
    with mounted(place) as mnt:
        assert manifest(mnt) == manifest(tree)
    assert_refused(place, b"".join(parts) + b"more", "there is something else behind its end")
    assert_refused(place, b"".join(parts[:-1]), "", init=None)


def test_truncated_at_a_member_is_an_error_though_tar_says_nothing(place: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
        archive.addfile(tarfile.TarInfo("b"))
    for data in (whole.getvalue()[:1024], sh("gzip", "-c", input=whole.getvalue()[:512])):
        assert_refused(place, data, "it has no end-of-archive mark", init=None)


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "plain"])
def test_corrupt(place: Path, tree: Path, compression: str) -> None:
    data = bytearray(pack(tree, compression=compression))
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    assert_refused(place, bytes(data), "Cannot import disk.0: ")


def test_compressed_but_no_tar(place: Path) -> None:
    assert_refused(
        place, sh("gzip", "-c", input=b"no tar at all" * 100), "in the gzip file is a text file: a disk may be"
    )


@pytest.mark.parametrize(
    "members,words",
    [
        ([("etc/passwd", b"", 0o644)], "there is no /sbin/init in the root file system"),
        ([("sbin/init", b"", 0o644)], "/sbin/init in the root file system is not executable"),
        ([("sbin/init", b"#!/bin/nosuch\n", 0o755)], "its interpreter /bin/nosuch is not in the root file system"),
        ([("sbin/init/x", b"", 0o755)], "is not a file"),
        ([("lib/systemd/systemd", b"", 0o755)], "(but /lib/systemd/systemd)"),
    ],
)
def test_no_init(place: Path, members: list[tuple[str, bytes, int]], words: str) -> None:
    assert_refused(place, build(*members), words)


def build(*members: tuple[str, bytes, int], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info in extra:
            archive.addfile(info)
        for name, content, mode in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(name: str, kind: bytes, target: str = "", device: tuple[int, int] = (0, 0)) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, 0o755
    info.devmajor, info.devminor = device
    return info


INIT = ("sbin/init", b"#!/sbin/init\n", 0o755)


@pytest.mark.parametrize(
    "extra,members",
    [
        ((), [("../../../../{outside}/evil", b"x", 0o644)]),
        ((), [("{outside}/evil", b"x", 0o644)]),
        ((member("out", tarfile.SYMTYPE, "{outside}"),), [("out/evil", b"x", 0o644)]),
        ((member("out", tarfile.SYMTYPE, "../../../../../{outside}"),), [("out/evil", b"x", 0o644)]),
        ((member("out", tarfile.SYMTYPE, "{outside}/victim"),), [("out", b"x", 0o644)]),
        ((member("out", tarfile.LNKTYPE, "{outside}/victim"),), [("out", b"x", 0o644)]),
        ((member("out", tarfile.LNKTYPE, "../../../../{outside}/victim"),), [("out", b"x", 0o644)]),
        ((member("a", tarfile.SYMTYPE, "/"), member("b", tarfile.SYMTYPE, "a/{outside}")), [("b/evil", b"x", 0o644)]),
        ((member("usr", tarfile.SYMTYPE, "/usr"),), [("usr/bin/onelxc-evil", b"x", 0o755)]),
        ((member("p", tarfile.SYMTYPE, "/proc/sys/kernel"),), [("p/core_pattern", b"|/evil", 0o644)]),
        ((member("rootfs", tarfile.SYMTYPE, "{outside}"),), []),
    ],
)
def test_hostile_names_reach_nothing_outside(
    place: Path, tmp_path: Path, extra: tuple[tarfile.TarInfo, ...], members: list[tuple[str, bytes, int]]
) -> None:
    """Refused or put inside, as tar decides: what matters is that the host is as it was."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    core_pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    usr_bin = sorted(os.listdir("/usr/bin"))
    named = []
    for info in extra:
        info = copy.copy(info)
        info.linkname = info.linkname.replace("{outside}", str(outside))
        named.append(info)
    files = [(name.replace("{outside}", str(outside)), content, mode) for name, content, mode in members]
    data = build(INIT, *files, extra=tuple(named))
    with contextlib.suppress(StorageError):
        run_import(place, data, init=None)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"victim": "untouched"}
    assert os.stat(outside / "victim").st_nlink == 1
    assert Path("/proc/sys/kernel/core_pattern").read_text() == core_pattern
    assert sorted(os.listdir("/usr/bin")) == usr_bin
    assert sorted(os.listdir(place)) == ["disk.0"]


def test_device_nodes_are_kept_and_never_opened(place: Path) -> None:
    """Behind a node of the host's memory or disk comes a file of the same name: tar must not write through it."""
    nodes = (member("dev/mem", tarfile.CHRTYPE, device=(1, 1)), member("dev/full", tarfile.CHRTYPE, device=(1, 7)))
    run_import(place, build(INIT, ("dev/full", b"written", 0o644), extra=nodes), init=None)
    with mounted(place) as mnt:
        assert os.lstat(mnt / "dev/mem").st_rdev == os.makedev(1, 1)
        assert (mnt / "dev/full").read_bytes() == b"written"


@pytest.mark.parametrize("what", ["size", "name", "xattr"])
def test_huge_headers(place: Path, what: str) -> None:
    info = tarfile.TarInfo("a")
    info.mode = 0o755
    if what == "size":
        info.pax_headers = {"GNU.sparse.realsize": str(1 << 62), "GNU.sparse.size": str(1 << 62), "size": str(1 << 61)}
    elif what == "name":
        info.name = "n" * 3_000_000
    else:
        info.pax_headers = {"SCHILY.xattr.user.big": "v" * 3_000_000}
    with contextlib.suppress(StorageError):
        run_import(place, build(INIT, extra=(info,)), init=None)
    assert sorted(os.listdir(place)) == ["disk.0"]
    assert_free(place)


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
def test_a_bomb(place: Path, compression: str) -> None:
    zeros = member("zeros", tarfile.REGTYPE)
    zeros.size = 200 << 20
    header = zeros.tobuf(tarfile.GNU_FORMAT)
    with (
        open(place / "disk.0", "wb") as out,
        subprocess.Popen([*COMPRESSIONS[compression], "-c"], stdin=subprocess.PIPE, stdout=out) as packer,
    ):
        assert packer.stdin is not None
        packer.stdin.write(header)
        for _ in range(200):
            packer.stdin.write(bytes(1 << 20))
        packer.stdin.write(bytes(10240))
    limits = importer.Limits(largest_mb=60)
    assert_refused(place, None, "does not fit into 60 MiB", limits=limits)


def test_no_space_left(tree: Path, tmp_path: Path) -> None:
    """A datastore that is full before and one that becomes full meanwhile: one line, nothing left."""
    small = Path(f"/var/lib/one/small-{os.getpid()}")
    small.mkdir()
    (tmp_path / "root/sbin").mkdir(parents=True)
    (tmp_path / "root/sbin/init").write_bytes(bytes(80 << 20))
    (tmp_path / "root/sbin/init").chmod(0o755)
    sh("mount", "-t", "tmpfs", "-o", "size=72m", "small", str(small))
    try:
        assert_refused(small, pack(tmp_path / "root", compression="gzip"), "it needs 81 MiB in the datastore")
        # bzip2 does not tell how much it holds: the datastore becomes full while it is unpacked
        assert_refused(
            small, pack(tmp_path / "root", compression="bzip2"), "no space left in the datastore while unpacking"
        )
    finally:
        sh("umount", str(small))
        small.rmdir()


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_unpacked_is_written_meanwhile_and_a_failure_is_heard_at_the_end(place: Path, fits: bool) -> None:
    """Also when it was met, and with that forgotten by the kernel, before."""
    sh("mount", "-t", "tmpfs", "-o", f"size={64 if fits else 8}m", "small", str(place))
    try:
        with open(place / "image", "w+b") as image:
            image.truncate(48 << 20)
            sh("mkfs.ext4", "-q", str(place / "image"))
            with loops.attach(image.fileno()) as loop:
                mount = filesystems.mount(loop.path, "ext4", read_only=False, nodev=True)
            before = os.stat(image.fileno()).st_blocks
            with writeout.WriteOut(mount, image.fileno()) as out:
                top = syscalls.openat2(mount, ".", os.O_RDONLY | os.O_DIRECTORY)
                with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=top), "wb") as file:
                    file.write(os.urandom(20 << 20))
                os.close(top)
                out.begin()
                if fits:
                    wanted = before + (19 << 20) // 512
                    wait_until(lambda: os.stat(image.fileno()).st_blocks > wanted, "it is in the image")
                    out.finish()
                else:
                    wait_until(lambda: not out.at_work, "the thread has met the error")
                    with pytest.raises(OSError):
                        out.finish()
            os.close(mount)
    finally:
        sh("umount", str(place))


def test_a_datastore_without_unnamed_files(place: Path, tree: Path) -> None:
    """NFS has no O_TMPFILE; nor has this FUSE file system."""
    (place / "real").mkdir()
    (place / "store").mkdir()
    sh("bindfs", str(place / "real"), str(place / "store"))
    store = place / "store"
    try:
        with pytest.raises(OSError):
            os.open(store, os.O_TMPFILE | os.O_RDWR)
        run_import(store, pack(tree, compression="zstd"))
        assert os.listdir(store) == ["disk.0"]
        with mounted(place / "real") as mnt:
            assert (mnt / "usr/bin/sudo").stat().st_mode & 0o7777 == 0o4755
        assert_refused(store, pack(tree, compression="gzip")[:-50], "Cannot import disk.0")
        with pytest.raises(GiveUpError):
            run_import(store, pack(tree), abort=give_up)
        # FUSE hides a deleted file until udev, too, has closed its loop device
        wait_until(lambda: os.listdir(store) == ["disk.0"], "nothing lies beside the archive")
    finally:
        sh("fusermount", "-u", str(store))


def test_size(place: Path, tree: Path) -> None:
    data = pack(tree, compression="gzip")
    run_import(place, data, size_mb=300)
    assert os.stat(place / "disk.0").st_size == 300 << 20
    run_import(place, data, size_mb=1)
    small = os.stat(place / "disk.0")
    assert 64 << 20 <= small.st_size <= 256 << 20
    assert small.st_blocks * 512 < 16 << 20, "the image is not sparse"


def test_an_estimate_that_was_wrong_is_corrected(place: Path) -> None:
    """Small files take more in ext4 than in tar; what is cut from an image made too large leaves it sound."""
    tiny = [(f"d{number % 50}/{number}", b"x", 0o644) for number in range(12_000)]
    lines = run_import(place, sh("bzip2", "-1", "-c", input=build(INIT, *tiny)), init=None)
    assert "imported disk.0" in lines[-1]
    with mounted(place) as mnt:
        assert sum(len(files) for _, _, files in os.walk(mnt)) == 12_001
    assert sh("e2fsck", "-f", "-n", str(place / "disk.0"))
    assert os.stat(place / "disk.0").st_size < 600 << 20


def test_giving_up(place: Path, tree: Path) -> None:
    calls = []

    def abort() -> None:
        calls.append(1)
        if len(calls) > 1:
            raise GiveUpError("cancelled")

    (place / "disk.0").write_bytes(pack(tree))
    before = (place / "disk.0").read_bytes()
    with pytest.raises(GiveUpError):
        run_import(place, None, abort=abort)
    assert (place / "disk.0").read_bytes() == before
    assert os.listdir(place) == ["disk.0"]


def test_killed_in_the_middle_leaves_nothing(place: Path, tmp_path: Path) -> None:
    (tmp_path / "root/sbin").mkdir(parents=True)
    (tmp_path / "root/sbin/init").write_bytes(os.urandom(6 << 20))
    (place / "disk.0").write_bytes(pack(tmp_path / "root", compression="bzip2"))
    before = (place / "disk.0").read_bytes()
    code = (
        "import os, sys; from onelxc.root import importer\n"
        f"d = os.open({str(place)!r}, os.O_PATH)\n"
        "importer.import_archive(d, 'disk.0', size_mb=None, init=None, log=print,"
        " abort=lambda: print('tick', flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == b"tick\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while _tars() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _tars()
    assert (place / "disk.0").read_bytes() == before
    assert os.listdir(place) == ["disk.0"]


def _tars() -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"--directory=/t\0" in line:
                found.append(pid)
    return found


def test_a_checker_of_file_systems_ends_with_its_caller() -> None:
    code = "from onelxc.root import jail; jail.on_device('/dev/null', ('sleep', '1234.5'), limit_s=2000)"
    caller = subprocess.Popen([sys.executable, "-c", code])
    checkers = lambda: [pid for pid in machine.pids() if machine.command_line(pid).split() == ["sleep", "1234.5"]]  # noqa: E731
    wait_until(checkers, "it runs")
    caller.kill()
    caller.wait()
    wait_until(lambda: not checkers(), "it has ended")


def test_what_waits_for_the_collector_is_not_ended_in_the_jail() -> None:
    """It may be a connection to libvirt, whose end there waited for ever."""
    ended = []

    class Left:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            ended.append(self)

    def collects() -> int:
        gc.set_threshold(1)
        [[] for _ in range(1000)]
        return len(ended)

    thresholds = gc.get_threshold()
    gc.set_threshold(0)
    try:
        Left()
        done = jail.unpack(-1, ("true",), [jail.Filter(collects)], [], lambda _: False, limit_s=60)
    finally:
        gc.set_threshold(*thresholds)
    assert (done.filters[0].status, done.status) == (0, 0)


def _allocates() -> int:
    return len(bytearray(200 << 20)) and 0


def _forks() -> int:
    for _ in range(8):
        if os.fork() == 0:
            time.sleep(60)
    return 0


def _writes() -> int:
    os.write(2, b"x")
    with open(os.memfd_create("x"), "wb") as file:
        file.write(bytes(8192))
    return 0


def _computes() -> int:
    while True:
        pass


@pytest.mark.parametrize(
    "program,limits",
    [
        (_allocates, jail.Limits(memory_bytes=128 << 20)),
        (_forks, jail.Limits(processes=4)),
        (_writes, jail.Limits(file_bytes=4096)),
        (_computes, jail.Limits(cpu_s=1)),
    ],
)
def test_limits_of_a_jail(program: Callable[[], int], limits: jail.Limits) -> None:
    """Each lets pass what is within, and ends what is beyond."""
    if program is not _computes:
        assert jail.read([jail.Filter(program)], [], lambda _: False, limit_s=60)[0].status == 0
    assert jail.read([jail.Filter(program, limits)], [], lambda _: False, limit_s=60)[0].status != 0


def test_what_is_no_archive_is_left_alone(place: Path) -> None:
    for data in (b"", b"\0" * 4096, b"QFI\xfb" + bytes(600), os.urandom(4096)):
        (place / "disk.0").write_bytes(data)
        directory = os.open(place, os.O_PATH)
        try:
            assert not importer.import_archive(directory, "disk.0", size_mb=None, init=None, log=print, abort=no_abort)
        finally:
            os.close(directory)
