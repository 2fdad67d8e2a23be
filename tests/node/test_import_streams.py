"""Whole archives are imported, whatever packed them; others are refused with the true cause, in little memory."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from onelxc.errors import StorageError
from onelxc.root.unpacking import Limits
from tests.node.test_import import INIT, assert_refused, build, member, mounted, pack, place, run_import, sh, tree

__all__ = ["place", "tree"]  # fixtures

MIB = 1 << 20


@contextlib.contextmanager
def packed(path: Path, *argv: str) -> Iterator[IO[bytes]]:
    """What is written to it goes, packed, to `path`: this process itself stays small, as its children are measured."""
    with open(path, "wb") as out, subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=out) as packer:
        assert packer.stdin is not None
        yield packer.stdin
    assert packer.returncode == 0


@pytest.mark.parametrize("padding", [0, 1, 10_000_000])
def test_a_plain_tar_whose_last_file_ends_in_zeros(place: Path, padding: int) -> None:
    content = b"x" + bytes(200_000)
    data = build(INIT, ("zeros", content, 0o644))
    (place / "disk.0").write_bytes(data)
    os.truncate(place / "disk.0", len(data) + padding)
    run_import(place, None, init=None)
    with mounted(place) as mnt:
        assert (mnt / "zeros").read_bytes() == content


@pytest.mark.parametrize("size_mb", [None, 1000])
@pytest.mark.parametrize("packer", [("gzip", "-1"), ("bzip2", "-1")])
def test_many_empty_files(place: Path, size_mb: int | None, packer: tuple[str, ...]) -> None:
    with packed(place / "disk.0", *packer, "-c") as out:
        for number in range(150_000):
            out.write(tarfile.TarInfo(f"d{number // 1000}/{number}").tobuf(tarfile.USTAR_FORMAT))
        out.write(bytes(1024))
    run_import(place, None, init=None, size_mb=size_mb)
    with mounted(place) as mnt:
        assert sum(len(files) for _, _, files in os.walk(mnt)) == 150_000
    assert sh("e2fsck", "-f", "-n", str(place / "disk.0"))


def test_more_files_than_allowed(place: Path) -> None:
    """Headers are cheap to pack, and an inode each to unpack."""
    with packed(place / "disk.0", "xz", "-1", "-c") as out:
        for number in range(100_000):
            out.write(tarfile.TarInfo(str(number)).tobuf(tarfile.USTAR_FORMAT))
        out.write(bytes(1024))
    assert_refused(place, None, "does not fit into 20 MiB", init=None, limits=Limits(largest_mb=20))


PACKERS = {
    "zstd, --long=27": ("zstd", "-q", "--long=27"),
    "zstd, --long=28": ("zstd", "-q", "--long=28"),
    "zstd, --long=31": ("zstd", "-q", "--ultra", "--long=31", "-1"),
    "zstd, with checksums": ("zstd", "-q", "--check"),
    "xz, 64 MiB": ("xz", "-T1", "--lzma2=preset=0,dict=64MiB"),
    "xz, blocks": ("xz", "-0", "-T2", "--block-size=65536"),
    "xz, sha256": ("xz", "-0", "--check=sha256"),
    "xz, x86": ("xz", "-T1", "--x86", "--lzma2=preset=0"),
    "bzip2, small": ("bzip2", "-1"),
    "lz4, legacy": ("lz4", "-q", "-l"),
    "lz4, linked": ("lz4", "-q", "-BD", "-B4"),
    "lz4, no checksums": ("lz4", "-q", "--no-frame-crc"),
    "gzip, fastest": ("gzip", "-1"),
    "gzip, with a name": ("gzip", "-9", "-N"),
}


@pytest.mark.parametrize("name", PACKERS)
def test_what_packers_make(place: Path, tree: Path, name: str) -> None:
    data = sh(*PACKERS[name], "-c", input=pack(tree))
    for copy in (data, data + bytes(777)):
        run_import(place, copy)
        with mounted(place) as mnt:
            assert (mnt / "etc/passwd").exists()


def test_a_large_xz_dictionary(place: Path, tree: Path) -> None:
    """xz writes what dictionary it was told, and whoever unpacks has to have it."""
    data = sh("xz", "-T1", "--lzma2=preset=0,dict=200MiB,mf=hc3,mode=fast,nice=8", "-c", input=pack(tree))
    run_import(place, data)
    words = "it needs more memory than IMPORT_MEMORY of host.conf allows: xz: "
    assert_refused(place, data, words, limits=Limits(memory_mb=100))


def test_a_window_that_is_larger_than_allowed(place: Path, tree: Path) -> None:
    data = sh("zstd", "-q", "--ultra", "-1", "--long=31", "-c", input=pack(tree))
    words = "its window of 2048 MiB is more than IMPORT_MEMORY of host.conf allows (1024 MiB)"
    assert_refused(place, data, words, limits=Limits(memory_mb=1024))


def test_skippable_frames(place: Path, tree: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x08\x00\x00\x00metadata"
    for packer in ("zstd", "lz4"):
        data = sh(packer, "-q", "-c", input=pack(tree))
        for whole in (skippable + data, data + skippable, skippable * 3 + data + skippable + bytes(99)):
            run_import(place, whole)


def test_a_zstd_dictionary(place: Path, tree: Path, tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"s{number}").write_bytes((b"sample %d " % number) * 50 + os.urandom(64))
    samples = [str(tmp_path / f"s{number}") for number in range(200)]
    sh("zstd", "-q", "--train", *samples, "-o", str(tmp_path / "dictionary"))
    data = sh("zstd", "-q", "-D", str(tmp_path / "dictionary"), "-c", input=pack(tree))
    assert_refused(place, data, "unsupported: it was compressed with a zstd dictionary")


@pytest.mark.parametrize("packer", ["gzip", "xz", "zstd", "bzip2", "lz4"])
def test_truncated_and_corrupt_are_two_words(place: Path, tmp_path: Path, packer: str) -> None:
    (tmp_path / "file").write_bytes(os.urandom(300_000))
    data = sh(packer, "-c", *(["-T1"] if packer == "xz" else []), input=pack(tmp_path))
    assert_refused(place, data[:200_000], "the archive is truncated", init=None)
    broken = bytearray(data)
    for at in range(100_000, 100_050):
        broken[at] ^= 0x55
    assert_refused(place, bytes(broken), "the archive is corrupt", init=None)


@pytest.mark.parametrize("packer", ["gzip", "xz", "zstd", "bzip2", "lz4"])
def test_corrupt_behind_the_end_of_archive(place: Path, tree: Path, packer: str) -> None:
    """tar needs no more by then, and the checksum of the whole comes last."""
    data = bytearray(sh(packer, "-c", input=pack(tree) + bytes(5 * MIB)))
    at = len(data) - {"gzip": 7, "xz": 30, "zstd": 3, "bzip2": 4, "lz4": 2}[packer]
    data[at] ^= 0x10
    assert_refused(place, bytes(data), "Cannot import disk.0: the archive is ")


@pytest.mark.parametrize("packer", ["", "gzip", "xz", "zstd", "bzip2", "lz4"])
@pytest.mark.parametrize("gap", [0, 512, 1 << 20])
def test_two_archives_one_behind_the_other(place: Path, tree: Path, packer: str, gap: int) -> None:
    """tar would read the first alone."""
    first, second = pack(tree), build(("second", b"x", 0o644))
    data = first + bytes(gap) + second
    if packer:
        data = sh(packer, "-c", input=first + bytes(gap)) + sh(packer, "-c", input=second)
    assert_refused(place, data, "another archive begins behind the end of the archive, at byte ")


def test_an_archive_in_two_members(place: Path, tree: Path) -> None:
    data = pack(tree)
    for packer in ("gzip", "xz", "zstd", "bzip2", "lz4"):
        run_import(place, sh(packer, "-c", input=data[:5000]) + sh(packer, "-c", input=data[5000:]))


@pytest.mark.parametrize("packer", ["", "gzip", "zstd"])
def test_other_data_behind_the_end(place: Path, tree: Path, packer: str) -> None:
    data = pack(tree) + b"something"
    assert_refused(place, sh(packer, "-c", input=data) if packer else data, "there are other data behind the end")


def test_a_lone_block_of_zeros(place: Path) -> None:
    """tar stops there."""
    one, two = build(INIT).rstrip(b"\0"), build(("b", b"x", 0o644))
    one += bytes(-len(one) % 512)
    assert_refused(place, one + bytes(512) + two, "another archive begins", init=None)
    run_import(place, one + bytes(512), init=None)


def test_archives_with_hardly_anything(place: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir(mode=0o751)
    run_import(place, pack(tmp_path / "root"), init=None)
    with mounted(place) as mnt:
        assert mnt.stat().st_mode & 0o777 == 0o751
        assert os.listdir(mnt) == []
    for packer in ("gzip", "zstd", "xz"):
        assert_refused(place, sh(packer, "-c", input=bytes(10240)), "the archive is empty", init=None)


@pytest.mark.parametrize("factor", [1, 7, 20, 1000])
def test_blocking_factors(place: Path, tree: Path, factor: int) -> None:
    run_import(place, pack(tree, f"--blocking-factor={factor}"))


def test_sizes_beyond_8_gib(place: Path) -> None:
    """In the extended header, with the header's own field out of its range; sparse, so that it is quick."""
    for format in ("gnu", "posix"):
        sparse = place / "sparse"
        with open(sparse, "wb") as file:
            file.truncate(9 << 30)
            file.seek(8 << 30)
            file.write(b"x")
        data = sh("tar", "-C", str(place), "-c", f"--format={format}", "--sparse", "sparse")
        sparse.unlink()
        run_import(place, data, init=None)
        with mounted(place) as mnt:
            assert (mnt / "sparse").stat().st_size == 9 << 30


def test_pax_sizes_with_eight_digits(place: Path) -> None:
    """Decimal, where the header's field of that length is octal."""
    for size in (10_000_000, 99_999):
        info = tarfile.TarInfo("file")
        info.size, info.pax_headers = size, {"size": str(size)}
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info, io.BytesIO(b"y" * size))
        run_import(place, out.getvalue(), init=None)
        with mounted(place) as mnt:
            assert (mnt / "file").read_bytes() == b"y" * size


def test_signed_checksums(place: Path) -> None:
    """As some old tars made them, of names beyond ASCII."""
    info = tarfile.TarInfo("n\xe4me")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT, encoding="latin-1"))
    block[148:156] = b" " * 8
    total = sum(byte - 256 if byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    for packer in ((), ("gzip", "-c")):
        data = bytes(block) + bytes(1024)
        run_import(place, sh(*packer, input=data) if packer else data, init=None)
        with mounted(place) as mnt:
            assert os.listdir(os.fsencode(mnt)) == [b"n\xe4me"]


@pytest.mark.parametrize("kind", [b"A", b"M", b"N", b"Z"])
def test_members_that_tar_would_skip_or_guess(place: Path, kind: bytes) -> None:
    assert_refused(place, build(INIT, extra=(member("some/file", kind),)), "some/file is ", init=None)


def test_a_corrupt_header_in_the_middle(place: Path) -> None:
    data = bytearray(build(INIT, ("a", b"x", 0o644), ("b", b"y", 0o644)))
    at = data.rindex(b"b\0")
    data[at + 120] ^= 1
    assert_refused(place, bytes(data), "the archive is corrupt: there is no tar header at byte", init=None)


def claims(kind: bytes, size: int) -> bytes:
    """A header that describes another, and what it says is large; packed."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most, in bytes, that any process started meanwhile by this one has taken, seen from outside."""
    peak = [0]
    over = threading.Event()
    mine = {pid for pid in os.listdir("/proc") if pid.isdigit()}

    def look() -> None:
        while not over.wait(0.005):
            for pid in set(filter(str.isdigit, os.listdir("/proc"))) - mine:
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                        if line.startswith("VmHWM:"):
                            peak[0] = max(peak[0], int(line.split()[1]) << 10)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        time.sleep(0.02)
        over.set()
        thread.join()


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"X"])
def test_a_header_that_claims_gigabytes(place: Path, kind: bytes) -> None:
    with packed(place / "disk.0", "zstd", "-q", "-c") as out:
        out.write(claims(kind, 700_000_000))
        for _ in range(668):
            out.write(bytes(MIB))
        out.write(build(INIT))
    assert os.stat(place / "disk.0").st_size < 100_000
    with peak_memory() as peak:
        assert_refused(place, None, "claims to have 700000000 bytes", init=None, size_mb=4000)
    assert 0 < peak[0] < 150 * MIB


def test_many_headers_for_one_file(place: Path) -> None:
    """Each within bounds, and together without end."""
    long_name = claims(b"L", 60_000) + b"n" * 60_000 + bytes(-60_000 % 512)
    with packed(place / "disk.0", "zstd", "-q", "-c") as out:
        for _ in range(5000):
            out.write(long_name)
        out.write(build(INIT))
    with peak_memory() as peak, contextlib.suppress(StorageError):
        run_import(place, None, init=None)
    assert 0 < peak[0] < 300 * MIB


def test_attributes_without_end(place: Path) -> None:
    """Those to be set afterwards have to be remembered."""
    with packed(place / "disk.0", "zstd", "-q", "-c") as out:
        for number in range(1000):
            info = tarfile.TarInfo(str(number))
            info.pax_headers = {"SCHILY.xattr.trusted.x": "v" * 60_000}
            out.write(info.tobuf(tarfile.PAX_FORMAT))
        out.write(bytes(1024))
    with peak_memory() as peak:
        assert_refused(place, None, "are too many", init=None, size_mb=4000)
    assert 0 < peak[0] < 300 * MIB


def test_xz_threads_stay_within_the_limit(place: Path) -> None:
    """Blocks of 32 MiB, of which each thread holds one, packed and unpacked."""
    info = tarfile.TarInfo("file")
    info.size = 160 * MIB
    with packed(place / "disk.0", "xz", "-0", "-T2", "--block-size=33554432", "-c") as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(16):
            out.write(os.urandom(MIB) * 10)
        out.write(bytes(1024))
    with peak_memory() as peak:
        run_import(place, None, init=None, limits=Limits(memory_mb=128))
    assert 0 < peak[0] < (128 + 192) * MIB
