"""What of a container's mount table is the host's; mount tables as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from onelxc import mounttable

HOST = mounttable.host_devices(
    """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:20 / /proc rw shared:2 - proc proc rw
24 22 0:21 / /sys rw shared:3 - sysfs sysfs rw
25 24 0:30 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw
26 22 0:40 / /run rw shared:5 - tmpfs tmpfs rw
27 22 7:0 / /var/lib/onelxc/mnt/5/root rw shared:6 - ext4 /dev/loop0 rw
28 22 7:1 / /var/lib/onelxc/mnt/6/root rw shared:7 - ext4 /dev/loop1 rw
29 22 0:50 /sub /var/lib/onelxc/mnt/5/disk.1 rw shared:8 - btrfs /dev/loop2 rw
30 22 0:50 / /var/lib/onelxc/mnt/6/disk.1 rw shared:8 - btrfs /dev/loop2 rw
"""
)


@pytest.mark.parametrize(
    "line",
    [
        "40 39 7:0 / / rw - ext4 /dev/loop0 rw",
        "41 40 7:0 /etc /m rw - ext4 /dev/loop0 rw",
        "42 40 0:50 /sub /media/d rw master:8 - btrfs /dev/loop2 rw",
        "43 40 0:60 / /proc rw - proc proc rw",
        "44 43 0:20 /sys/net/ipv4 /proc/sys/net/ipv4 rw - proc proc rw",
        "45 40 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "46 40 0:4 net:[4026532000] /run/netns/x rw - nsfs nsfs rw",
        "47 40 0:61 / /tmp rw - tmpfs tmpfs rw",
        "48 40 0:62 / /o rw - overlay overlay rw,lowerdir=/etc",
        "49 40 0:63 / /f rw - fuse.cgroup nobody rw",
    ],
)
def test_its_own(line: str) -> None:
    assert mounttable.foreign(line + "\n", 5, HOST) == []


@pytest.mark.parametrize(
    "line",
    [
        "40 39 8:1 / /media/x rw - ext4 /dev/sda1 rw",
        "41 40 8:1 /etc/passwd /m rw shared:1 master:2 - ext4 /dev/sda1 rw",
        "42 40 7:1 / /other rw - ext4 /dev/loop1 rw",
        "43 40 0:20 / /p rw - proc proc rw",
        "44 40 0:20 /sys /p rw - proc proc rw",
        "45 40 0:21 / /s rw - sysfs sysfs rw",
        "46 40 0:40 /libvirt /r rw - tmpfs tmpfs rw",
        "47 40 8:1 / /a\x0b\x1c\x85b rw - ext4 /dev/sda1 rw",
        "48 40 8:1 / /a\\040-\\040proc rw - ext4 cgroup rw",
    ],
)
def test_the_hosts(line: str) -> None:
    assert len(mounttable.foreign(f"39 1 7:0 / / rw - ext4 x rw\n{line}\n", 5, HOST)) == 1


def test_what_is_no_line_is_nothing() -> None:
    for text in ("", "\n", "1 2 8:1\n", "40 39 8:1 / /med", " - \n"):
        assert mounttable.foreign(text, 5, HOST) == []


def test_names_as_they_are() -> None:
    assert mounttable.unescape(r"/a\040b\011\012\134040") == "/a b\t\n\\040"


def test_a_long_table_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    path.write_text("x" * 1000)
    assert mounttable.read(str(path), 1001) == ("x" * 1000, False)
    assert mounttable.read(str(path), 100) == ("x" * 100, True)
    assert mounttable.read(str(tmp_path / "gone"), 100) == ("", False)
