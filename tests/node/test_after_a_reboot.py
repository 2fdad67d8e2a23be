"""What libvirt does not bring back after a reboot from inside is brought back until it is there, whoever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from onelxc import rootclient
from onelxc.report import Report
from onelxc.root import hub
from tests.node.test_live_disks import attach, make
from tests.support import images, machine
from tests.support.vms import MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]


@pytest.fixture
def one(vm: NewVm, tmp_path: Path) -> Vm:
    made = vm(images.busybox_ext4()).deployed().booted()
    attach(made, make(tmp_path / "data", "ext4", 32)).ok()
    made.inside("echo kept > /media/one-disk.1/file")
    return made


def is_back(one: Vm) -> bool:
    return one.inside("cat /media/one-disk.1/file", check=False) == "kept\n"


def verdict(one: Vm) -> dict[str, str]:
    return next(vm for vm in rootclient.one_shot("reap")["vms"] if vm["id"] == one.vm_id)


def refreshes(one: Vm) -> list[int]:
    return [pid for pid in machine.pids() if f"refresh {one.name}" in machine.command_line(pid)]


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_refresh_that_is_killed_is_tried_again(one: Vm) -> None:
    with rootclient.open_session(one.vm_id, "reset", Report("test", framed=False)):
        one.inside("reboot")
        one.booted(2)
        for _ in range(2):
            kill(wait_until(lambda: refreshes(one), "the hub sees to it"))
            wait_until(lambda: not refreshes(one), "it is killed")
        assert not is_back(one)
        told = verdict(one)
        assert told["state"] == "running"
        assert "not everything is back" in told["error"]
    wait_until(lambda: is_back(one), "the disk is back")
    wait_until(lambda: "error" not in verdict(one), "the probe knows")


def test_a_hub_that_is_killed_meanwhile_knows_it_again(one: Vm) -> None:
    with rootclient.open_session(one.vm_id, "reset", Report("test", framed=False)):
        one.inside("reboot")
        one.booted(2)
        wait_until(lambda: refreshes(one), "the hub sees to it")
        pid = hub.pid()
        assert pid
        kill([pid, *refreshes(one)])
        wait_until(lambda: not hub.is_running(), "no hub")
        os.unlink("/run/onelxc/hub.seen")
        assert "error" in verdict(one)
        assert hub.is_running()
        assert not is_back(one)
    wait_until(lambda: is_back(one), "the disk is back")


def test_an_action_that_dies_after_its_restart_leaves_it_to_the_hub(one: Vm) -> None:
    """A reset is killed between the new start and what it puts back."""
    running = one.start("reset")
    first = machine.init_pid(one.name)
    wait_until(lambda: one.runs_anew(first), "it was started anew", interval_s=0.001)
    running.hang_up(signal.SIGKILL)
    wait_until(lambda: one.name in machine.domains() and is_back(one), "the disk is back")


def test_what_is_in_place_is_not_due(one: Vm) -> None:
    one.act("reset").ok()
    assert is_back(one)
    assert verdict(one) == {"id": one.vm_id, "state": "running"}
    one.inside("umount /media/one-disk.1")
    assert verdict(one) == {"id": one.vm_id, "state": "running"}, "what a guest unmounts stays so"
