"""How is an image of a kind made on the spot? Raw ones with a file system, or with a partition table."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from onelxc.root import loops


def sh(*argv: str, input: str | None = None) -> str:
    return subprocess.run(argv, check=True, input=input, stdout=subprocess.PIPE, text=True).stdout


def empty(path: Path, size_mb: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size_mb << 20)
    return path


@contextlib.contextmanager
def mounted(path: Path, *, offset: int = 0, size: int = 0) -> Iterator[Path]:
    target = path.with_suffix(".mnt")
    target.mkdir()
    with open(path, "r+b") as file, loops.attach(file.fileno(), offset=offset, size=size) as loop:
        sh("mount", loop.path, str(target))
        try:
            yield target
        finally:
            sh("umount", str(target))
            target.rmdir()


def make(kind: str, device: str) -> None:
    sh(f"mkfs.{kind}", "-q", device)


def filled(path: Path, tree: Path, kind: str, size_mb: int) -> Path:
    make(kind, str(empty(path, size_mb)))
    with mounted(path) as mnt:
        sh("cp", "-a", f"{tree}/.", f"{mnt}/")
    return path


ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
BEFORE_ALL = {"boot": 16, "root": 60, "data": 40}
"""The root is the largest: nothing else need tell it."""
BETWEEN = {"boot": 16, "root": 40, "data": 60}
LAST = {"boot": 16, "root": 40}


def partitioned(
    path: Path,
    tree: Path,
    label: str,
    layout: dict[str, int],
    *,
    kind: str = "ext4",
    fstab: bool = True,
    typed: bool = False,
) -> Path:
    """Partitions of so many MB, one with the root as `kind`, the others ext4 and empty. A MB is left at the end."""
    empty(path, sum(layout.values()) + 2)
    plain = "83" if label == "dos" else "L"
    rows = [f"size={mb}MiB, type={ROOT_TYPE if typed and name == 'root' else plain}" for name, mb in layout.items()]
    # the copy of a GPT takes some of the last partition's place
    rows[-1] = rows[-1].replace(f"size={list(layout.values())[-1]}MiB, ", "")
    sh("sfdisk", "-q", str(path), input="\n".join([f"label: {label}", *rows]) + "\n")
    table = json.loads(sh("sfdisk", "--json", str(path)))["partitiontable"]
    for name, row in zip(layout, table["partitions"]):
        offset, size = int(row["start"]) * 512, int(row["size"]) * 512
        with open(path, "r+b") as file, loops.attach(file.fileno(), offset=offset, size=size) as loop:
            make(kind if name == "root" else "ext4", loop.path)
            identity = sh("blkid", "-p", "-o", "value", "-s", "UUID", loop.path).strip()
        if name == "root":
            with mounted(path, offset=offset, size=size) as mnt:
                sh("cp", "-a", f"{tree}/.", f"{mnt}/")
                if fstab:
                    (mnt / "etc/fstab").write_text(f"# made by a test\nUUID={identity} / {kind} defaults 0 1\n")
    return path
