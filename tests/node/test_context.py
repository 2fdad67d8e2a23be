"""The context ISO is read in user space: names, modes and contents as mkisofs stored them; broken ones in one line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from onelxc.errors import StorageError
from onelxc.root import context, mounts


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    """As OpenNebula's tm/context makes it (`mkisofs -o ISO -V CONTEXT -J -R DIR`)."""
    source = tmp_path / "source"
    (source / "deep/er").mkdir(parents=True)
    (source / "context.sh").write_text("ONEADMIN='1'\n")
    (source / ("long-" + "n" * 240 + ".sh")).write_text("long")
    (source / "deep/er/Ünïcode file").write_bytes(os.urandom(70_000))
    (source / "empty").write_text("")
    (source / "secret").write_text("s")
    (source / "secret").chmod(0o600)
    for number in range(120):
        (source / f"script-{number}.sh").write_text(str(number))
    argv = [
        "xorriso",
        "-as",
        "mkisofs",
        "-quiet",
        "-o",
        str(tmp_path / "iso"),
        "-V",
        "CONTEXT",
        "-J",
        "-R",
        str(source),
    ]
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
    return tmp_path / "iso"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "context"
    yield path
    mounts.unmount(str(path))


def test_the_files_arrive(iso: Path, target: Path, tmp_path: Path) -> None:
    with open(iso, "rb") as file:
        mounts.place(context.make(id_base=5_000_000), str(target), id_base=None)
        context.fill(file.fileno(), str(target), id_base=5_000_000)
    source = tmp_path / "source"
    assert sorted(p.relative_to(target) for p in target.rglob("*")) == sorted(
        p.relative_to(source) for p in source.rglob("*")
    )
    for path in source.rglob("*"):
        arrived = target / path.relative_to(source)
        assert path.is_dir() or arrived.read_bytes() == path.read_bytes()
        assert os.stat(arrived).st_uid == os.stat(arrived).st_gid == 5_000_000
    assert os.stat(target / "secret").st_mode & 0o777 == 0o600
    assert os.stat(target).st_uid == 5_000_000
    with pytest.raises(OSError, match="Read-only file system"):
        (target / "new").write_text("x")


def test_broken_images_are_one_line(iso: Path, target: Path, tmp_path: Path) -> None:
    mounts.place(context.make(id_base=None), str(target), id_base=None)
    whole = iso.read_bytes()
    broken = tmp_path / "broken"
    refused = 0
    cases = [b"", b"x" * 100_000, whole[:40_000], whole[: len(whole) // 2]]
    for position in range(17 * 2048, min(len(whole), 40 * 2048), 499):
        cases.append(whole[:position] + b"\xff\xff\xff" + whole[position + 3 :])
    for data in cases:
        broken.write_bytes(data)
        with open(broken, "rb") as file:
            try:
                context.fill(file.fileno(), str(target), id_base=None)
            except StorageError as error:
                refused += 1
                assert str(error).startswith("Cannot ")
    assert refused >= 4
