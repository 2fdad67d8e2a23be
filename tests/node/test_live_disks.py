"""Disks of running containers, privileged and unprivileged: attached, detached, grown, as 7.4 asks for it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onelxc import __version__
from onelxc.root import loops
from tests.support import images, machine
from tests.support.frontends import MONITORD
from tests.support.stream import Outcome
from tests.support.vms import Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]
ATTACH = {"ATTACH": "YES"}


@pytest.fixture
def one(vm: NewVm, form: dict[str, str]) -> Vm:
    return vm(images.busybox_ext4(), user_template=form).deployed().booted()


@pytest.fixture
def image(tmp_path: Path) -> str:
    return make(tmp_path / "data", "ext4", 32)


def make(path: Path, kind: str, size_mb: int) -> str:
    with open(path, "wb") as file:
        file.truncate(size_mb << 20)
    subprocess.run([f"mkfs.{kind}", "-q", str(path)], check=True)
    return str(path)


def attach(one: Vm, source: str, **attributes: Any) -> Outcome:
    """As 7.4: the transfer manager has put the image there, argv has path, TARGET and an index that may be wrong."""
    if source == one.path(f"disk.{len(one.disks)}"):
        source = shutil.move(source, f"{source}.away")
    path = one.add_disk(source, **{**ATTACH, **attributes})
    disk = one.disks[-1]
    outcome = one.act("attach_disk", path, disk["TARGET"], 99, "b64", lcm_state=17)
    disk.pop("ATTACH")
    if outcome.code:
        one.disks.pop()
    return outcome


def detach(one: Vm, number: int) -> Outcome:
    one.disks[number]["ATTACH"] = "YES"
    outcome = one.act("detach_disk", one.path(f"disk.{number}"), one.disks[number]["TARGET"], 1, lcm_state=18)
    one.disks[number].pop("ATTACH")
    if not outcome.code:
        one.disks.pop(number)
    return outcome


def resize(one: Vm, number: int, size_mb: int) -> Outcome:
    return one.act("resize_disk", number, size_mb, "b64", lcm_state=62)


def test_comes_and_goes(one: Vm, image: str, tmp_path: Path) -> None:
    """One container, one case after the other: each gives back what it brought."""
    comes_again(one, image)
    read_only(one, image)
    limits(one, image)
    detach_of_what_something_is_mounted_in(one, image)
    archive_and_volatile_disk(one, tmp_path)


def comes_again(one: Vm, image: str) -> None:
    attach(one, image).ok()
    path = one.path("disk.1")
    assert one.inside("stat -c %u /media/one-disk.1") == "0\n"
    one.inside("echo written > /media/one-disk.1/file")
    assert loops.loops_of(path) != ()
    detach(one, 1).ok()
    assert loops.loops_of(path) == ()
    assert one.inside("ls /media") == "", "the directory that was made for it is gone, too"
    # what was written is in the image, which nothing holds any more; and it comes again, somewhere else
    again = attach(one, path, TARGET="/srv/data")
    assert again.code == 0, again
    assert one.inside("cat /srv/data/file") == "written\n"
    assert os.stat(one.path("disk.1")).st_uid != 0
    detach(one, 1).ok()


def read_only(one: Vm, image: str) -> None:
    attach(one, image, READONLY="YES").ok()
    outcome = one.inside("echo x > /media/one-disk.1/file; echo $?; mount -o remount,rw /media/one-disk.1; echo $?")
    assert outcome.split()[0] != "0"
    if not one.privileged:
        assert outcome.split()[1] != "0"
    detach(one, 1).ok()


def limits(one: Vm, image: str) -> None:
    attach(one, image, TOTAL_BYTES_SEC=str(2 << 20), READ_IOPS_SEC="77").ok()
    (device,) = loops.loops_of(one.path("disk.1"))
    number = machine.command("cat", f"/sys/block/{os.path.basename(device)}/dev").strip()
    assert limits_of(one, number) == {"read_bps": 2 << 20, "write_bps": 2 << 20, "read_iops": 77, "write_iops": None}
    detach(one, 1).ok()
    assert not any(limits_of(one, number).values())


def limits_of(one: Vm, number: str) -> dict[str, int | None]:
    found: dict[str, int | None] = dict.fromkeys(("read_bps", "write_bps", "read_iops", "write_iops"))
    for group in machine.cgroups():
        if one.name not in group.replace("\\x2d", "-"):
            continue
        for name in found:
            file = Path(group, f"blkio.throttle.{name}_device")
            if file.exists():
                values = dict(line.split() for line in file.read_text().splitlines())
                found[name] = int(values[number]) if number in values else None
        for file in (Path(group, "libvirt/io.max"), Path(group, "io.max")):
            if file.exists():
                for line in file.read_text().splitlines():
                    if line.startswith(f"{number} "):
                        words = dict(word.split("=") for word in line.split()[1:])
                        for name, word in zip(found, ("rbps", "wbps", "riops", "wiops")):
                            found[name] = None if words[word] == "max" else int(words[word])
    return found


def test_detach_names_who_uses_it(one: Vm, image: str) -> None:
    attach(one, image).ok()
    one.inside("cd /media/one-disk.1 && sleep 1234 </dev/null >/dev/null 2>&1 & echo")
    pid = wait_until(lambda: one.inside("pidof sleep | tr ' ' '\\n' | sort -n | tail -n 1").strip())
    refused = detach(one, 1)
    assert refused.code == 1
    assert f"DISK 1 is in use by sleep (pid {pid} inside)" in one.driver.message(refused)
    one.inside("echo x > /media/one-disk.1/still-there")
    one.inside(f"kill {pid}")
    wait_until(lambda: pid not in one.inside("pidof sleep", check=False).split(), "the process has ended")
    detach(one, 1).ok()
    assert loops.loops_of(one.path("disk.1")) == ()


def detach_of_what_something_is_mounted_in(one: Vm, image: str) -> None:
    attach(one, image, TARGET="/data").ok()
    one.inside("mkdir /data/x && mount -t tmpfs none /data/x")
    refused = detach(one, 1)
    assert "DISK 1 is in use by what is mounted at /data/x inside" in one.driver.message(refused)
    one.inside("umount /data/x")
    detach(one, 1).ok()


def test_back_after_restarts_of_libvirtd_from_inside_and_by_reset(one: Vm, image: str) -> None:
    attach(one, image, WRITE_IOPS_SEC="55").ok()
    machine.restart_libvirtd()
    one.inside("echo kept > /media/one-disk.1/file; sync; reboot")
    one.booted(2)
    wait_until(lambda: one.inside("cat /media/one-disk.1/file", check=False) == "kept\n", "the disk is back")
    one.act("reset").ok()
    one.booted(3)
    wait_until(lambda: one.inside("cat /media/one-disk.1/file", check=False) == "kept\n", "the disk is back")
    (device,) = loops.loops_of(one.path("disk.1"))
    number = machine.command("cat", f"/sys/block/{os.path.basename(device)}/dev").strip()
    wait_until(lambda: limits_of(one, number)["write_iops"] == 55, "its limits, too")
    detach(one, 1).ok()
    assert loops.loops_of(one.path("disk.1")) == ()


def test_an_attach_that_is_not_finished_is_taken_back(one: Vm, image: str) -> None:
    """Its caller dies after the disk came into the container and before it was kept."""
    path = one.add_disk(image)
    disk = {"disk_id": 1, "path": path, "target": "sdb"}
    requests = json.dumps({"do": "attach_disk", "disk": disk}) + "\n"
    helper = ["/usr/lib/onelxc/onelxc-root", "session", str(one.vm_id), "attach_disk", "--version", __version__]
    process = subprocess.Popen(helper, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(requests)
    process.stdin.flush()
    said = (json.loads(line) for line in process.stdout)
    answers = list(itertools.islice((answer for answer in said if "log" not in answer), 2))
    assert answers[1] == {"ok": {"target": "/media/one-disk.1"}}, answers
    assert "one-disk.1" in one.inside("cat /proc/mounts")
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()
    assert "one-disk.1" not in one.inside("cat /proc/mounts")
    assert loops.loops_of(path) == ()
    one.disks.pop()
    assert attach(one, image).code == 0


def test_a_disk_of_the_deploy_can_be_detached(vm: NewVm, image: str) -> None:
    one = vm(images.busybox_ext4())
    one.add_disk(image, TARGET="/data")
    one.deployed().booted().inside("echo x > /data/file")
    detach(one, 1).ok()
    assert loops.loops_of(one.path("disk.1")) == ()
    one.inside("reboot")
    one.booted(2)
    assert one.running


def archive_and_volatile_disk(one: Vm, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("from the archive")
    images.tar(str(tmp_path / "tree"), str(tmp_path / "data.tar.gz"), "--gzip")
    attach(one, str(tmp_path / "data.tar.gz")).ok()
    assert one.inside("cat /media/one-disk.1/file") == "from the archive"
    with open(tmp_path / "empty", "wb") as file:
        file.truncate(32 << 20)
    attach(one, str(tmp_path / "empty"), TYPE="fs", FORMAT="ext4", FS="ext4").ok()
    one.inside("echo x > /media/one-disk.2/file")


def test_refused_and_nothing_left(vm: NewVm, image: str) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    for attributes, words in (
        ({"TARGET": "/../x"}, "TARGET is no place for a data disk"),
        ({"TARGET": "/boots"}, "cannot attach at /boots"),
        ({"TARGET": "/proc"}, "/proc is the container's own"),
        ({"TYPE": "swap"}, "a container cannot swap to a disk of its own"),
    ):
        refused = attach(one, image, **attributes)
        assert refused.code == 1
        assert words in one.driver.message(refused), refused
        assert one.driver.message(refused).count("\n") <= 1
        assert loops.loops_of(one.path("disk.1")) == ()
    # nothing stands in the way of the next one
    attach(one, image).ok()


def test_failures_in_words(vm: NewVm, tmp_path: Path, image: str) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(os.urandom(1 << 20))
    assert "there is no file system in it" in one.driver.message(attach(one, str(rubbish)))
    os.unlink(one.path("disk.1"))
    one.disks.append({**one.disks[0], "DISK_ID": 1, "TARGET": "sdb", "ATTACH": "YES"})
    missing = one.act("attach_disk", one.path("disk.1"), "sdb", 1, "b64", lcm_state=17)
    assert "disk.1" in one.driver.message(missing)
    assert "No such file" in one.driver.message(missing)
    one.disks.pop()
    one.disks[0]["ATTACH"] = "YES"
    root = one.act("detach_disk", one.path("disk.0"), "sda", 0, lcm_state=18)
    assert "it holds the root file system" in one.driver.message(root)
    one.disks[0].pop("ATTACH")
    attach(one, image).ok()
    one.disks[1]["ATTACH"] = "YES"
    one.disks[1]["TARGET"] = "/elsewhere"
    again = one.act("attach_disk", one.path("disk.1"), "/elsewhere", 1, "b64", lcm_state=17)
    assert "a disk of that number is attached already" in one.driver.message(again)
    one.act("cancel").ok()
    gone = attach(one, image)
    assert gone.code == 1
    assert one.name in one.driver.message(gone)


def test_grows_while_mounted(one: Vm, tmp_path: Path) -> None:
    for kind in ("xfs", "btrfs"):
        grows(one, make(tmp_path / kind, kind, 320))


def grows(one: Vm, image: str) -> None:
    attach(one, image).ok()
    one.inside("echo kept > /media/one-disk.1/file")
    resize(one, 1, 500).ok()
    assert os.stat(one.path("disk.1")).st_size == 500 << 20
    size_kib = int(one.inside("df -k /media/one-disk.1 | tail -n 1 | awk '{print $2}'"))
    assert size_kib > 400 << 10
    assert one.inside("cat /media/one-disk.1/file") == "kept\n"
    smaller = resize(one, 1, 300)
    assert "does not shrink" in one.driver.message(smaller)
    detach(one, 1).ok()


def test_ext4_grows_or_says_when_it_will(vm: NewVm) -> None:
    """Without CAP_SYS_RESOURCE (as in some build machines) the kernel does not grow ext4 while it is mounted."""
    one = vm(images.busybox_ext4()).deployed().booted()
    outcome = resize(one, 0, 128)
    may = int(
        next(line for line in Path("/proc/self/status").read_text().splitlines() if "CapEff" in line).split()[1], 16
    )
    if may >> 24 & 1:
        outcome.ok()
    else:
        assert outcome.code == 1
        assert "the image has the new size" in one.driver.message(outcome)
        one.act("shutdown").ok()
        one.disks[0]["SIZE"] = "128"
        one.deployed().booted(2)
    assert int(one.inside("df -k / | tail -n 1 | awk '{print $2}'")) > 100 << 10
