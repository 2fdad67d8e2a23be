"""A root is made ready for libvirt and its init recognised, without a name ever leading outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onelxc.errors import StorageError, TemplateError
from onelxc.model import Init
from onelxc.root import rootfs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def fd(root: Path) -> Iterator[int]:
    number = os.open(root, os.O_PATH | os.O_DIRECTORY)
    yield number
    os.close(number)


def put(root: Path, path: str, content: bytes = b"\x7fELF", mode: int = 0o755) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(content)
    (root / path).chmod(mode)


def test_links_lead_inside_only(root: Path, fd: int, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "abs").symlink_to(outside)
    (root / "rel").symlink_to("../../../.." + str(outside))
    (root / "var").mkdir()
    (root / "data").symlink_to("/var")
    for path in ("/abs/x", "/rel/x"):
        with pytest.raises(StorageError, match="dangling symbolic link"):
            rootfs.make_directory(fd, path)
    rootfs.make_directory(fd, "/data/x")
    assert (root / "var/x").is_dir()
    assert list(outside.iterdir()) == []


def test_a_file_where_a_directory_has_to_be(root: Path, fd: int) -> None:
    put(root, "data", b"")
    with pytest.raises(StorageError, match="Cannot make /data"):
        rootfs.make_directory(fd, "/data/x")


@pytest.mark.parametrize(
    "files,links,init,kind",
    [
        ({"lib/systemd/systemd": b"x"}, {"sbin/init": "../lib/systemd/systemd"}, "/sbin/init", Init.SYSTEMD),
        ({"usr/lib/systemd/systemd": b"x"}, {"lib": "usr/lib", "usr/sbin/init": "/lib/systemd/systemd"},
         "/usr/sbin/init", Init.SYSTEMD),
        ({"bin/busybox": b"x"}, {"sbin/init": "/bin/busybox"}, "/sbin/init", Init.BUSYBOX),
        ({"bin/busybox": b"x"}, {"bin/sh": "busybox"}, "/bin/sh", Init.OTHER),
        ({"bin/init": b"\x7fELF..BusyBox v1.36.."}, {}, "/bin/init", Init.BUSYBOX),
        ({"sbin/init": b"\x7fELF..INIT_VERSION=sysvinit-3.06 /run/initctl"}, {}, "/sbin/init", Init.SYSVINIT),
        ({"sbin/openrc-init": b"\x7fELF"}, {"sbin/init": "openrc-init"}, "/sbin/init", Init.OPENRC),
        ({"bin/sh": b"\x7fELF", "init": b"#! /bin/sh -e\nexec sleep\n"}, {}, "/init", Init.OTHER),
        ({"app": b"\x7fELF"}, {}, "/app", Init.OTHER),
    ],
)  # fmt: skip
def test_the_init_is_recognised(  # noqa: PLR0917
    root: Path, fd: int, files: dict[str, bytes], links: dict[str, str], init: str, kind: Init
) -> None:
    for path, content in files.items():
        put(root, path, content)
    for path, target in links.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    assert rootfs.find_init(fd, init) is kind


def test_unusable_inits(root: Path, fd: int) -> None:
    put(root, "text", b"x", 0o644)
    put(root, "script", b"#!/usr/bin/nosuch -x\n")
    put(root, "loop", b"#!/loop\n")
    (root / "dir").mkdir()
    os.mkfifo(root / "fifo", 0o755)
    (root / "host").symlink_to("/bin/sh")  # is there on the host, not inside
    (root / "self").symlink_to("self")
    cases = {
        "/missing": "there is no /missing in the root file system",
        "/text": "/text in the root file system is not executable",
        "/script": "its interpreter /usr/bin/nosuch is not in the root file system",
        "/loop": "/loop names no interpreter",
        "/dir": "/dir in the root file system is not a file",
        "/fifo": "/fifo in the root file system is not a file",
        "/host": "there is no /host in the root file system",
        "/self": "Too many levels of symbolic links",
        "/text/x": "Not a directory",
    }
    for init, words in cases.items():
        with pytest.raises(StorageError) as raised:
            rootfs.find_init(fd, init)
        assert words in str(raised.value)
    with pytest.raises(TemplateError, match="absolute path"):
        rootfs.find_init(fd, "sbin/init")
