"""Import once, deploy many: by content, bounded, safe under concurrency and crashes, and never a cause of failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onelxc.root import cache as caches
from onelxc.root import copies, importer, record
from tests.node.test_import import INIT, build, mounted, no_abort, sh

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(f"/var/lib/one/cached-{os.getpid()}")
    (path / "cache").mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def deploy(place: Path, data: bytes, *, size_mb: int | None = None, max_mb: int = 1000, padding: int = 0) -> list[str]:
    lines: list[str] = []
    (place / "disk.0").write_bytes(data + bytes(padding))
    (place / "disk.0").chmod(0o660)
    directory = os.open(place, os.O_PATH)
    try:
        cache = caches.Cache(str(place / "cache"), max_mb, lines.append)
        assert importer.import_archive(
            directory, "disk.0", size_mb=size_mb, init="/sbin/init", log=lines.append, abort=no_abort, cache=cache
        )
    finally:
        os.close(directory)
    with mounted(place) as mnt:
        assert (mnt / "sbin/init").exists()
    assert os.stat(place / "disk.0").st_mode & 0o777 == 0o660
    return lines


def archive(word: bytes = b"x", bulk_mb: int = 0) -> bytes:
    init = (INIT[0], INIT[1].replace(b"/sbin/init", b"/bin/sh"), INIT[2])
    return build(init, ("bin/sh", word * 1000, 0o755), ("bulk", word * (bulk_mb << 20), 0o644))


def said(lines: list[str], word: str) -> bool:
    return any(line.startswith(f"import cache: {word}") for line in lines)


def test_the_second_deploy_starts_from_the_first(place: Path) -> None:
    first = deploy(place, archive())
    assert said(first, "kept")
    # what the first VM wrote into its disk is not in the next one's
    with mounted(place) as mnt:
        (mnt / "written").write_text("by the first")
    second = deploy(place, archive())
    assert said(second, "hit")
    assert not any("imported" in line for line in second)
    with mounted(place) as mnt:
        assert not (mnt / "written").exists()
    other = deploy(place, archive(b"y"))
    assert not said(other, "hit")
    assert not said(deploy(place, archive(), padding=70_000), "miss"), "padding is not content"


def test_images_of_an_older_version_go(place: Path) -> None:
    """They may lack attributes that were lost in their days."""
    deploy(place, archive())
    (entry,) = os.listdir(place / "cache")
    (place / "cache" / entry).rename(place / "cache" / entry.replace("v2-", "v1-"))
    assert said(deploy(place, archive()), "miss")
    assert os.listdir(place / "cache") == [entry]


def test_a_data_disk_is_not_a_root_of_the_same_archive(place: Path) -> None:
    """What stands below rootfs/ is lifted out of it for a root only."""
    data = build(("rootfs/sbin/init", b"#!/bin/sh\n", 0o755), ("rootfs/bin/sh", b"x", 0o755))
    deploy(place, data)
    (place / "disk.0").write_bytes(data)
    directory = os.open(place, os.O_PATH)
    cache = caches.Cache(str(place / "cache"), 1000, print)
    assert importer.import_archive(directory, "disk.0", size_mb=None, init=None, log=print, abort=no_abort, cache=cache)
    os.close(directory)
    with mounted(place) as mnt:
        assert (mnt / "rootfs/sbin/init").exists()
    assert said(deploy(place, data), "hit")


def test_a_compressed_image_is_unpacked_once(place: Path, tmp_path: Path) -> None:
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin/init").write_text("x")
    (tmp_path / "sbin/init").chmod(0o755)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(tmp_path), str(place / "image"), "16M"], check=True)
    data = subprocess.run(["gzip", "-c", str(place / "image")], check=True, stdout=subprocess.PIPE).stdout
    (place / "image").unlink()
    assert said(deploy(place, data), "kept")
    assert said(deploy(place, data), "hit")


def test_sizes(place: Path) -> None:
    """A copy can grow, it cannot shrink: an image that was made for a large SIZE is not for everyone."""
    deploy(place, archive(), size_mb=500)
    assert not said(deploy(place, archive()), "hit")
    assert os.stat(place / "disk.0").st_size < 200 << 20
    assert said(deploy(place, archive(), size_mb=1), "hit")
    assert os.stat(place / "disk.0").st_size < 200 << 20
    assert said(deploy(place, archive(), size_mb=500), "hit")
    assert os.stat(place / "disk.0").st_size == 500 << 20
    assert said(deploy(place, archive(), size_mb=700), "hit")


def test_bounded_and_the_longest_unused_goes(place: Path) -> None:
    for number, word in enumerate((b"a", b"b", b"c")):
        deploy(place, archive(word, 4))
        newest = max((place / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (1000 + number, 1000 + number))
    assert said(deploy(place, archive(b"a", 4)), "hit")  # used again: b is the oldest now
    one = max(path.stat().st_blocks * 512 for path in (place / "cache").iterdir())
    limit = (3 * one >> 20) + 1
    deploy(place, archive(b"d", 4), max_mb=limit)
    assert said(deploy(place, archive(b"a", 4), max_mb=limit), "hit")
    assert not said(deploy(place, archive(b"b", 4), max_mb=limit), "hit")


def test_off(place: Path) -> None:
    lines = deploy(place, archive(), max_mb=0)
    assert not any("cache" in line for line in lines)
    assert os.listdir(place / "cache") == []


def test_after_a_crash_of_the_host(place: Path) -> None:
    """What was added shortly before may never have reached the disk: it does not count in the next boot, and goes."""
    deploy(place, archive())
    (entry,) = (place / "cache").iterdir()
    boot = record.boot_id()
    entry.rename(str(entry).replace(boot, "00000000-0000-4000-8000-000000000000"))
    assert said(deploy(place, archive()), "miss")
    assert [boot in path.name for path in (place / "cache").iterdir()] == [True]


def test_what_is_flushed_outlives_the_boot(place: Path) -> None:
    deploy(place, archive())
    (entry,) = (place / "cache").iterdir()
    os.utime(entry, (1000, 1000))
    deploy(place, archive(b"y"))
    names = {path.name for path in (place / "cache").iterdir()}
    assert entry.name.replace(f".{record.boot_id()}", "") in names


@pytest.mark.parametrize("damage", ["shorter", "directory", "link", "rubbish", "unreadable directory", "file"])
def test_never_a_cause_of_failure(place: Path, damage: str) -> None:
    deploy(place, archive())
    (entry,) = (place / "cache").iterdir()
    if damage == "shorter":
        os.truncate(entry, 5 << 20)
    elif damage == "directory":
        entry.unlink()
        entry.mkdir()
    elif damage == "link":
        entry.unlink()
        entry.symlink_to("/etc/shadow")
    elif damage == "rubbish":
        (place / "cache/v1-x").write_text("rubbish")
        (place / "cache/other").mkdir()
    else:
        shutil.rmtree(place / "cache")
        (place / "cache").write_text("")
    deploy(place, archive())
    deploy(place, archive(b"y"))


def test_no_room_for_it(place: Path) -> None:
    small = place / "small"
    small.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=3m", "small", str(small))
    try:
        (place / "cache").rmdir()
        (place / "cache").symlink_to(small)
        lines = deploy(place, archive(b"x", 4))
        assert said(lines, "not kept: too little space")
        assert os.listdir(small) == []
    finally:
        sh("umount", str(small))


def test_several_at_once(place: Path) -> None:
    """Two imports and two hits of the same archive while another process empties the cache again and again."""
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from tests.node import test_import_cache as t\n"
        "import shutil\n"
        "place = Path(sys.argv[1]); place.mkdir(); (place / 'cache').symlink_to(sys.argv[2])\n"
        "for _ in range(6): t.deploy(place, t.archive())\n"
    )
    shared = place / "shared"
    shared.mkdir()
    argv = [sys.executable, "-c", code]
    workers = [
        subprocess.Popen([*argv, str(place / f"vm{number}"), str(shared)], cwd=REPOSITORY, stderr=subprocess.PIPE)
        for number in range(3)
    ]
    while any(worker.poll() is None for worker in workers):
        caches.Cache(str(shared), 1000, print).empty()
        try:
            workers[0].wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            pass
    for worker in workers:
        assert worker.stderr is not None
        error = worker.stderr.read().decode()
        worker.stderr.close()
        assert worker.returncode == 0, error


def test_list_and_empty(place: Path) -> None:
    deploy(place, archive())
    text = caches.main(["list"], str(place / "cache"), 1000)
    assert "1 images" in text
    assert f"archive of {len(archive().rstrip(bytes(1)))} bytes" in text
    assert "set free" in caches.main(["empty"], str(place / "cache"), 1000)
    assert os.listdir(place / "cache") == []


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4"])
def test_copies_share_where_the_file_system_can(place: Path, kind: str) -> None:
    """mkfs.xfs wants 300 MB at least; the data of the copy takes no space of its own on xfs and btrfs."""
    with open(place / "fs", "wb") as file:
        file.truncate(400 << 20)
    sh(f"mkfs.{kind}", "-q", str(place / "fs"))
    target = place / "fs.mnt"
    target.mkdir()
    sh("mount", "-o", "loop", str(place / "fs"), str(target))
    try:
        with open(target / "image", "wb") as file:
            file.truncate(100 << 20)
            file.seek(50 << 20)
            file.write(os.urandom(3 << 20))
        with open(target / "image", "rb") as source, open(target / "copy", "wb") as copy:
            assert copies.copy(source.fileno(), copy.fileno(), no_abort) is (kind != "ext4")
        assert (target / "copy").read_bytes() == (target / "image").read_bytes()
        assert os.stat(target / "copy").st_blocks <= (4 << 20) // 512
    finally:
        sh("umount", str(target))
