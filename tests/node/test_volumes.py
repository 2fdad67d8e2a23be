"""Disks that need what a test machine's kernel may lack: qcow2 through nbd, logical volumes, plain block devices.

The kinds that `test_disk_kinds` has go through the same kernel in the emulated machine, qcow2 through nbd among them.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.root import lock, nbd
from tests.support import hostconf, images, leaks, machine
from tests.support.diskimages import BETWEEN, empty, filled, partitioned, sh
from tests.support.frontends import MONITORD
from tests.support.vms import Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.emulated
NewVm = Callable[..., Vm]
GROUP = "vg-one-0"


def packed(raw: Path) -> str:
    """A raw image as qcow2."""
    path = raw.with_suffix(".qcow2")
    sh("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path))
    return str(path)


def nbds_of(one: Vm) -> list[str]:
    return [name for name, named in machine.nbds().items() if named.startswith(f"/var/lib/onelxc/mnt/{one.vm_id}/")]


def daemon_of(one: Vm) -> int:
    (pid,) = [
        pid
        for pid in machine.pids()
        if f"/mnt/{one.vm_id}/" in machine.command_line(pid) and "qemu-storage-daemon" in machine.command_line(pid)
    ]
    return pid


def cycle(one: Vm) -> None:
    """Written, powered off, deployed again, read, cancelled."""
    one.deployed().booted().inside("head -c 3000000 /dev/urandom > /root/data; md5sum /root/data > /root/sum")
    one.act("shutdown").ok()
    one.deployed().booted(2).inside("md5sum -c /root/sum")
    one.act("cancel").ok()


def test_two_qcow2_at_once_have_devices_of_their_own(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    """One grows before it starts, the other has an image behind it. Nothing goes through FUSE."""
    raw = filled(tmp_path / "base", tree, "ext4", 64)
    first, second = vm(packed(raw)), vm(None)
    first.disks[0]["SIZE"] = "200"
    shutil.copy(raw, second.path("base"))
    sh("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base", second.path("disk.0"))
    second.give(second.path("disk.0"))
    second.disks.append({"DISK_ID": 0, "TARGET": "sda"})
    running = [one.start_deploy() for one in (first, second)]
    for one, action in zip((first, second), running):
        action.wait(600).ok()
        one.booted().inside(f"echo {one.vm_id} > /root/who; sync")
    assert len({*nbds_of(first), *nbds_of(second)}) == 2
    assert not [mount for mount in machine.mounts() if "fuse" in mount.kind and "qcow2" in mount.point]
    assert int(first.inside("df -k / | tail -n 1 | awk '{print $2}'")) > 150 << 10
    for one in (first, second):
        one.act("shutdown").ok()
        assert nbds_of(one) == []
        one.deployed().booted(2)
        assert one.inside("cat /root/who") == f"{one.vm_id}\n"
        one.act("cancel").ok()
    assert machine.nbds() == {}


def test_a_partitioned_qcow2_shows_the_host_no_partitions(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    one = vm(packed(partitioned(tmp_path / "image", tree, "gpt", BETWEEN))).deployed().booted()
    (device,) = nbds_of(one)
    assert not [name for name in os.listdir(f"/sys/block/{device}") if name.startswith(device)]
    one.inside("echo kept > /root/kept")
    one.act("cancel").ok()
    # where somebody has loaded the module so that it would show them
    sh("modprobe", "-r", "nbd")
    sh("modprobe", "nbd", "max_part=15")
    try:
        assert one.deployed().booted(2).inside("cat /root/kept") == "kept\n"
        assert nbds_of(one) == []
        assert [mount for mount in machine.mounts() if "fuse" in mount.kind and f"/mnt/{one.vm_id}/" in mount.point]
        one.act("cancel").ok()
    finally:
        sh("modprobe", "-r", "nbd")


@pytest.mark.generation(MONITORD)
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_qcow2_grows_while_it_is_written(vm: NewVm, tmp_path: Path, kind: str) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    raw = empty(tmp_path / "raw", 320)
    sh(f"mkfs.{kind}", "-q", str(raw))
    path = one.add_disk(packed(raw), ATTACH="YES", FORMAT="qcow2", DRIVER="qcow2")
    one.act("attach_disk", path, "sdb", 1, "b64", lcm_state=17).ok()
    one.disks[1].pop("ATTACH")
    one.inside(
        "cd /media/one-disk.1; (n=0; while echo $n > number && sync; do n=$((n + 1)); done; echo $n > /failed)"
        " > /dev/null 2>&1 < /dev/null &"
    )

    def number() -> int:
        return int(one.inside("cat /media/one-disk.1/number", check=False) or 0)

    wait_until(lambda: number() > 2, "the container writes")
    one.act("resize_disk", 1, 500, "b64", lcm_state=62).ok()
    after = number()
    wait_until(lambda: number() > after, "the container goes on writing")
    assert int(one.inside("df -k /media/one-disk.1 | tail -n 1 | awk '{print $2}'")) > 400 << 10
    assert json.loads(sh("qemu-img", "info", "-U", "--output=json", path))["virtual-size"] == 500 << 20
    one.inside("test ! -e /failed")


@pytest.mark.generation(MONITORD)
def test_a_helper_killed_while_a_qcow2_grows_leaves_it_in_working_order(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    one = vm(packed(filled(tmp_path / "image", tree, "ext4", 64))).deployed().booted()
    action = one.start("resize_disk", 0, 200, "b64", lcm_state=62)
    journal = Path(f"/var/lib/onelxc/vms/{one.vm_id}/journal")
    wait_until(lambda: action.ended or '"take":"nbd"' in journal.read_text(), "it grows", timeout_s=300)
    assert not action.ended, action.wait()
    kill_helper(one)
    assert action.wait().code != 0
    one.act("resize_disk", 0, 200, "b64", lcm_state=62).ok()
    one.inside("echo kept > /root/kept; sync", timeout_s=90)
    assert int(one.inside("df -k / | tail -n 1 | awk '{print $2}'")) > 150 << 10
    one.act("cancel").ok()
    assert one.deployed().booted(2).inside("cat /root/kept") == "kept\n"


def kill_helper(one: Vm) -> None:
    holder = lock.holder(one.vm_id)
    assert holder is not None
    os.kill(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("moment", ["its start", "the daemon", "its device", "the mount"])
def test_a_helper_killed_during_deploy_leaves_nothing(
    clean: None, vm: NewVm, tree: Path, tmp_path: Path, moment: str
) -> None:
    before = leaks.snapshot()
    one = vm(packed(filled(tmp_path / "image", tree, "ext4", 64)))
    state = f"/var/lib/onelxc/vms/{one.vm_id}"
    reached: dict[str, Callable[[], object]] = {
        "its start": lambda: any("systemd-run" in machine.command_line(pid) for pid in machine.pids()),
        "the daemon": lambda: os.path.isdir(state) and any(name.endswith(".qmp") for name in os.listdir(state)),
        "its device": lambda: nbds_of(one),
        "the mount": lambda: any(f"/mnt/{one.vm_id}/" in mount.point for mount in machine.mounts()),
    }
    action = one.start_deploy()
    wait_until(lambda: action.ended or reached[moment](), moment, timeout_s=300)
    assert not action.ended, action.wait()
    kill_helper(one)
    assert action.wait().code != 0
    one.act("cancel").ok()
    added = [line for line in leaks.snapshot().added_since(before) if one.directory not in line]
    assert added == []
    one.deployed().booted()


@pytest.mark.parametrize("action", ["shutdown", "cancel"])
def test_a_daemon_that_is_killed_costs_its_vm_only(vm: NewVm, tree: Path, tmp_path: Path, action: str) -> None:
    """The container sees I/O errors. Cancel gets through, nothing is left, and what was synced is there."""
    image = packed(filled(tmp_path / "image", tree, "ext4", 64))
    one, other = vm(image).deployed().booted(), vm(image).deployed().booted()
    one.inside("echo kept > /root/kept; sync")
    # stopped first, so that a request is under way when it dies: nobody will ever answer that
    assert "/run-" in Path(f"/proc/{daemon_of(one)}/cgroup").read_text(), "it belongs to nobody's login"
    os.kill(daemon_of(one), signal.SIGSTOP)
    one.inside("(echo lost > /root/lost && sync) > /dev/null 2>&1 < /dev/null &")
    wait_until(lambda: nbd.is_busy(f"/dev/{nbds_of(one)[0]}"), "a request is under way")
    os.kill(daemon_of(one), signal.SIGKILL)
    one.act(action).ok()
    assert nbds_of(one) == []
    other.inside("echo kept > /root/kept; sync")
    assert one.deployed().booted(2).inside("cat /root/kept") == "kept\n"


def test_the_leak_check_sees_an_nbd_device(tmp_path: Path) -> None:
    before = leaks.snapshot()
    image, server, name = empty(tmp_path / "image", 1), str(tmp_path / "s"), str(tmp_path / "name")
    pid_file = tmp_path / "pid"
    export = ["--nbd-server", f"addr.type=unix,addr.path={server}", "--export", "nbd,id=disk,node-name=n,name=disk"]
    file = f"driver=file,node-name=n,filename={image},read-only=on"
    sh("qemu-storage-daemon", "--blockdev", file, *export, "--daemonize", "--pidfile", str(pid_file))
    assert nbd.available()
    device = nbd.connect(server, name)
    assert device is not None
    try:
        assert f"nbds: {os.path.basename(device)} {name}" in leaks.snapshot().added_since(before)
    finally:
        nbd.disconnect(device)
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    leaks.assert_none_since(before)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    """A volume group of OpenNebula's LVM datastore 0, with a pool for thin volumes."""
    device = sh("losetup", "--find", "--show", str(empty(tmp_path / "pv", 600))).strip()
    sh("vgcreate", "-q", GROUP, device)
    sh("lvcreate", "-q", "-L", "256M", "--thinpool", "pool", GROUP)
    try:
        yield GROUP
    finally:
        sh("vgremove", "-q", "-f", GROUP)
        sh("pvremove", "-q", device)
        sh("losetup", "-d", device)


def link(one: Vm, device: str, **attributes: str) -> str:
    """disk.N as the transfer managers leave it."""
    path = one.path(f"disk.{len(one.disks)}")
    os.symlink(device, path)
    one.give(path)
    one.disks.append({"DISK_ID": len(one.disks), "TARGET": f"sd{chr(97 + len(one.disks))}", **attributes})
    return path


def volume(one: Vm, number: int, kind: list[str], *mkfs: str) -> str:
    """fs_lvm_ssh's volume for a disk, with a file system."""
    name = f"lv-one-{one.vm_id}-{number}"
    sh("lvcreate", "-q", "-y", "-n", name, *kind)
    sh("mkfs.ext4", "-q", *mkfs, f"/dev/{GROUP}/{name}")
    return f"/dev/{GROUP}/{name}"


LINEAR = ["-L", "96M", GROUP]
THIN = ["-V", "96M", "--thin", f"{GROUP}/pool"]


@pytest.mark.parametrize("kind", [LINEAR, THIN], ids=["linear", "thin"])
def test_a_logical_volume(group: str, vm: NewVm, tree: Path, kind: list[str]) -> None:
    one = vm(None)
    device = volume(one, 0, kind, "-d", str(tree))
    path = link(one, device)
    cycle(one)
    # nothing holds it: its transfer manager may deactivate it at once
    sh("lvchange", "-q", "-an", device)
    refused = one.deploy()
    assert refused.code == 1
    assert f"Cannot open {path}" in one.driver.message(refused)
    sh("lvchange", "-q", "-ay", device)
    one.deployed().booted(3).inside("md5sum -c /root/sum")


@pytest.mark.generation(MONITORD)
def test_a_volume_comes_grows_and_leaves(group: str, vm: NewVm) -> None:
    one = vm(images.busybox_ext4()).deployed().booted()
    device = volume(one, 1, THIN)
    path = link(one, device, ATTACH="YES", TYPE="BLOCK", DISK_TYPE="BLOCK", TM_MAD="fs_lvm_ssh")
    one.act("attach_disk", path, "sdb", 1, "b64", lcm_state=17).ok()
    one.disks[1].pop("ATTACH")
    one.inside("echo kept > /media/one-disk.1/file; sync")
    sh("lvextend", "-q", "-L", "192M", device)
    one.act("resize_disk", 1, 192, "b64", lcm_state=62).ok()
    assert int(one.inside("df -k /media/one-disk.1 | tail -n 1 | awk '{print $2}'")) > 150 << 10
    one.disks[1]["ATTACH"] = "YES"
    one.act("detach_disk", path, "sdb", 1, lcm_state=18).ok()
    one.disks.pop()
    sh("lvremove", "-q", "-y", device)
    os.unlink(path)


def test_the_volume_of_another_vm_is_refused(group: str, vm: NewVm, tree: Path) -> None:
    one, other = vm(None), vm(None)
    link(one, volume(other, 0, THIN, "-d", str(tree)))
    assert f"was made for disk 0 of VM {other.vm_id}" in one.driver.message(one.deploy())


@pytest.fixture
def device(tree: Path) -> Iterator[str]:
    """A disk of this host with a name that stays, as TM_MAD "dev" has them for images; the root is on it."""
    sh("modprobe", "scsi_debug", "dev_size_mb=96")
    try:
        (found,) = wait_until(
            lambda: glob.glob("/sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*/block/sd*")
        )
        sh("udevadm", "settle")
        named = [str(one) for one in Path("/dev/disk/by-id").iterdir() if one.resolve().name == os.path.basename(found)]
        sh("mkfs.ext4", "-q", "-d", str(tree), named[0])
        yield named[0]
    finally:
        sh("udevadm", "settle")
        sh("modprobe", "-r", "scsi_debug")


def test_a_plain_device_is_refused_unless_the_host_allows_it(device: str, vm: NewVm) -> None:
    one, other = vm(None), vm(None)
    link(one, device)
    link(other, os.path.realpath(device))
    assert "does not lie in a datastore" in one.driver.message(one.deploy())
    with hostconf.with_line('BLOCK_DEVICES = "/dev/disk/by-id/*"'):
        cycle(one)
        # by the path in the link, and not by what it leads to
        assert "does not lie in a datastore" in other.driver.message(other.deploy())
    with hostconf.with_line('BLOCK_DEVICES = "/dev/sd*, /dev/disk/by-id/*"'):
        one.deployed().booted(3).inside("md5sum -c /root/sum")
        assert "is in use on this host" in other.driver.message(other.deploy())
        one.act("cancel").ok()
        sh("mount", device, "/mnt")
        try:
            assert "is in use on this host by" in one.driver.message(one.deploy())
        finally:
            sh("umount", "/mnt")
