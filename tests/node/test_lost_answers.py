"""The commit is made, and its answer does not arrive: what was done counts, and doing it again is success."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.node.test_broken_off import nic_action
from tests.node.test_live_disks import attach, detach, make
from tests.support import images, machine
from tests.support.breaking import CALLER_KILLED, FAILS, HELPER_KILLED, Breaker, text_of
from tests.support.stream import Outcome
from tests.support.vms import HOST, MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]


class AfterCommit(Breaker):
    """Broken off when the record is put in its place: the commit is in the journal."""

    def __init__(self, way: str) -> None:
        super().__init__(0, way)

    def decide(self, pid: int, name: str, arguments: tuple[int, ...]) -> int:
        if name == "rename" and self.at == 0 and text_of(pid, arguments[0]).endswith("/vm.json.new"):
            self.at = len(self.moments) + 1
        return super().decide(pid, name, arguments)


def broken(one: Vm, way: str, act: Callable[[], Outcome]) -> Outcome:
    breaker = one.driver.under = AfterCommit(way)
    outcome = act()
    breaker.close()
    assert breaker.at
    wait_until(lambda: not os.path.exists(f"/run/onelxc/lock/{one.vm_id}"), "the helper has ended")
    return outcome


@pytest.mark.parametrize("way", [HELPER_KILLED, FAILS])
def test_after_the_commit_nothing_is_an_error(vm: NewVm, tmp_path: Path, bridge: str, way: str) -> None:
    one = vm()
    one.add_nic(bridge)
    one.deployed().booted()
    image = make(tmp_path / "data", "ext4", 32)
    broken(one, way, lambda: attach(one, image)).ok()
    one.inside("echo x > /media/one-disk.1/file")
    broken(one, way, lambda: detach(one, 1)).ok()
    assert "one-disk.1" not in one.inside("cat /proc/mounts")
    assert one.path("disk.1") not in machine.loops().values()
    stage = type("Stage", (), {"one": one})
    broken(one, way, lambda: nic_action("detach_nic")(stage)).ok()
    assert f"{one.name}-0" not in machine.links()
    one.template["NIC"].clear()
    one.add_nic(bridge)
    broken(one, way, lambda: nic_action("attach_nic")(stage)).ok()
    assert one.template["NIC"][0]["MAC"] in one.inside("cat /sys/class/net/*/address")


def test_a_deploy_whose_helper_dies_after_the_commit_has_succeeded(vm: NewVm) -> None:
    one = vm()
    assert broken(one, HELPER_KILLED, one.deploy).ok().out == f"{one.name}\n"
    one.booted()


def test_another_image_under_the_number_of_one_whose_answer_was_lost(vm: NewVm, tmp_path: Path) -> None:
    """OpenNebula took the first one away, and gives its number to the next; in between the host is monitored."""
    one = vm(images.busybox_ext4()).deployed().booted()
    assert broken(one, CALLER_KILLED, lambda: attach(one, make(tmp_path / "first", "ext4", 32))).code
    one.inside("echo first > /media/one-disk.1/file")
    os.unlink(one.path("disk.1"))
    attach(one, make(tmp_path / "second", "ext4", 64)).ok()
    assert one.inside("cat /media/one-disk.1/file", check=False) == ""
    assert list(machine.loops().values()).count(one.path("disk.1")) == 1
    detach(one, 1).ok()


def test_another_nic_under_the_number_of_one_whose_answer_was_lost(vm: NewVm, bridge: str) -> None:
    one = vm().deployed().booted()
    stage = type("Stage", (), {"one": one})
    one.add_nic(bridge)
    assert broken(one, CALLER_KILLED, lambda: nic_action("attach_nic")(stage)).code
    first = one.template["NIC"].pop()["MAC"]
    one.add_nic(bridge, MAC="02:00:0a:4d:77:77")
    nic_action("attach_nic")(stage).ok()
    addresses = one.inside("cat /sys/class/net/*/address")
    assert "02:00:0a:4d:77:77" in addresses
    assert first not in addresses
    assert [name for name in machine.links() if name.startswith(f"{one.name}-")] == [f"{one.name}-0"]


def test_the_freezers_word_counts(vm: NewVm) -> None:
    """A save that died between its note and the freezer: the container runs, whatever is written down."""
    one = vm().deployed().booted()
    Path(f"/var/lib/onelxc/vms/{one.vm_id}/paused").write_text("suspend")
    one.template["QEMU_GA_EXEC"] = {"COMMAND": "true", "STDIN": ""}
    one.driver("exec", one.vm_id, HOST, stdin=one.action_xml()).ok()
    one.act("snapshot_create", 0, lcm_state=24).ok()
    assert one.inside("echo runs") == "runs\n"
    groups = [Path(group, "freezer.state") for group in machine.control_groups(one.name)]
    assert "FROZEN" not in "".join(group.read_text() for group in groups if group.exists())
    one.act("save", one.path("checkpoint"), lcm_state=6).ok()
    refused = one.driver("exec", one.vm_id, HOST, stdin=one.action_xml())
    assert "it is suspended" in one.driver.message(refused)
