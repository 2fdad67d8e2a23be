"""The file systems that the driver writes to are full, out of inodes or read-only. What can fail fails before anything
is changed, and a VM is ended all the same.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc import executions, rootclient
from tests.node.test_live_disks import attach, detach, make
from tests.support import images, machine
from tests.support.vms import HOST, MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]
VMS = "/var/lib/onelxc/vms"


@contextlib.contextmanager
def small(directory: str) -> Iterator[str]:
    """A file system of its own at a directory of ours, of a few pages and inodes."""
    os.makedirs(directory, exist_ok=True)
    machine.command("mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=100,mode=0711", "none", directory)
    try:
        yield directory
    finally:
        # a helper that has answered may just be ending
        wait_until(lambda: not subprocess.run(["umount", directory], capture_output=True).returncode, "it is free")


def fill(directory: str) -> None:
    """No page is left."""
    with contextlib.suppress(OSError), open(f"{directory}/fill", "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def use_up_inodes(directory: str) -> None:
    with contextlib.suppress(OSError):
        for number in range(1000):
            with open(f"{directory}/fill.{number}", "wb"):
                pass


def make_read_only(directory: str) -> None:
    """As the kernel does with a file system after an I/O error."""
    remount = ["mount", "-o", "remount,ro", directory]
    wait_until(lambda: not subprocess.run(remount, capture_output=True).returncode, "nobody writes there")


def make_room(directory: str) -> None:
    machine.command("mount", "-o", "remount,rw", directory)
    for entry in os.listdir(directory):
        if entry.startswith("fill"):
            os.unlink(f"{directory}/{entry}")


TROUBLES = {"full": fill, "no inodes": use_up_inodes, "read-only": make_read_only}


@pytest.fixture(params=list(TROUBLES))
def trouble(request: pytest.FixtureRequest) -> Callable[[str], None]:
    return TROUBLES[request.param]


@pytest.mark.parametrize("action", ["cancel", "shutdown"])
def test_a_vm_is_ended_whatever_cannot_be_written(vm: NewVm, trouble: Callable[[str], None], action: str) -> None:
    with small(VMS), small("/run/onelxc/lock"):
        one = vm().deployed().booted()
        for directory in (VMS, "/run/onelxc/lock"):
            trouble(directory)
        one.act(action).ok()
        assert one.name not in machine.domains()
        assert not [mount for mount in machine.mounts() if f"/mnt/{one.vm_id}/" in mount.point]
        one.act("cancel").ok()
        for directory in (VMS, "/run/onelxc/lock"):
            make_room(directory)
        rootclient.one_shot("reap")
        assert os.listdir(VMS) == []


@pytest.mark.parametrize("how", ["by itself", "killed"])
def test_one_that_died_is_released_whatever_cannot_be_written(
    vm: NewVm, trouble: Callable[[str], None], how: str
) -> None:
    with small(VMS):
        one = vm().deployed().booted()
        trouble(VMS)
        if how == "killed":
            os.kill(machine.init_pid(one.name), 9)
        else:
            one.inside("poweroff", check=False)  # it may end with the container
        wait_until(lambda: one.name not in machine.domains(), "it has ended")
        assert rootclient.one_shot("reap")["vms"] == [{"id": one.vm_id, "state": "off"}]
        assert not [mount for mount in machine.mounts() if f"/mnt/{one.vm_id}/" in mount.point]
        make_room(VMS)
        rootclient.one_shot("reap")


def detached(directory: str) -> None:
    """The VM's directory is read-only; its images are in use, so that only a bind mount over it can be."""
    machine.command("mount", "--bind", directory, directory)
    machine.command("mount", "-o", "remount,ro,bind", directory)


def test_a_vm_whose_directory_is_read_only_or_gone_is_ended(vm: NewVm) -> None:
    for trouble in (detached, lambda path: machine.command("find", path, "-mindepth", "1", "-delete")):
        one = vm(None)
        machine.command("mount", "-t", "tmpfs", "none", one.directory)
        machine.command("chown", "oneadmin:", one.directory)
        one.add_disk(images.busybox_ext4())
        one.deployed().booted()
        trouble(one.directory)
        one.act("cancel").ok()
        assert one.name not in machine.domains()
        while os.path.ismount(one.directory):
            machine.command("umount", one.directory)


def test_what_can_fail_comes_first(vm: NewVm, tmp_path: Path, trouble: Callable[[str], None], bridge: str) -> None:
    """Nothing can be written: every change of a running VM fails, and nothing has changed."""
    with small(VMS):
        one = vm()
        one.add_disk(make(tmp_path / "data", "ext4", 32), TARGET="/data")
        one.add_nic(bridge, IP="10.77.0.10")
        one.deployed().booted().inside("echo kept > /data/file")
        trouble(VMS)
        outcomes = [detach(one, 1), attach(one, make(tmp_path / "more", "ext4", 32))]
        nic = one.template["NIC"][0]
        outcomes += [one.act("detach_nic", nic["MAC"], lcm_state=25), one.act("save", one.path("x"), lcm_state=6)]
        one.template["MEMORY"] = "96"
        outcomes.append(one.act("resize"))
        for outcome in outcomes:
            assert outcome.code == 1, outcome
            assert "cannot write" in one.driver.message(outcome), outcome
        assert one.inside("cat /data/file; ls /media; cat /sys/class/net/eth0/operstate") == "kept\nup\n"
        assert one.path("disk.1") in machine.loops().values()
        make_room(VMS)
        assert [vm["state"] for vm in rootclient.one_shot("reap")["vms"]] == ["running"]
        attach(one, make(tmp_path / "again", "ext4", 32)).ok()
        detach(one, 2).ok()
        detach(one, 1).ok()
        one.act("cancel").ok()


def test_a_result_that_cannot_be_written_is_told_as_lost(vm: NewVm) -> None:
    with small(executions.DIRECTORY):
        os.chmod(executions.DIRECTORY, 0o755)
        one = vm().deployed().booted()
        one.template["QEMU_GA_EXEC"] = {"COMMAND": "read line; seq 1 2000", "STDIN": ""}
        one.template["QEMU_GA_EXEC"]["COMMAND"] = "sleep 1; seq 1 2000"
        one.driver("exec", one.vm_id, HOST, stdin=one.action_xml()).ok()
        fill(executions.DIRECTORY)
        wait_until(lambda: not executions.running(one.vm_id), "the command has ended")
        (told,) = rootclient.one_shot("executions")["vms"]
        assert (told["id"], told["status"], told["code"]) == (one.vm_id, "ERROR", 137)
        assert os.listdir(executions.DIRECTORY) == ["fill"]
        fill(executions.DIRECTORY)
        refused = one.driver("exec", one.vm_id, HOST, stdin=one.action_xml())
        assert "No space left on device" in one.driver.message(refused)
        assert os.listdir(executions.DIRECTORY) == ["fill"]
        one.act("cancel").ok()


def test_the_hub_drains_consoles_when_nothing_can_be_logged(vm: NewVm) -> None:
    with small("/var/log/onelxc"):
        fill("/var/log/onelxc")
        use_up_inodes("/var/log/onelxc")
        one = vm().deployed().booted()
        one.inside(
            "for i in $(seq 1 4000); do echo a line of some length that fills the console $i; done > /dev/console"
        )
        one.act("cancel").ok()
