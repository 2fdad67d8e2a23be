"""Systemd's hierarchy on hosts of cgroup version 1 without systemd: each container has its own group in it, no more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from onelxc.errors import HypervisorError
from onelxc.root import cgroups, named_group
from tests.node.test_cgroups_owned import foreign, left, two
from tests.support import machine
from tests.support.frontends import MONITORD
from tests.support.vms import HOST, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
NewVm = Callable[..., Vm]
TOP = "/sys/fs/cgroup/systemd"

__all__ = ["two"]


def own(one: Vm) -> str:
    """Its group in systemd's hierarchy, version 1."""
    return f"{TOP}/onelxc.slice/onelxc-{one.vm_id}.slice"


TRIES = """
mkdir {group}/evil
for file in {group}/*; do [ ! -f $file ] || ! (: >> $file) || echo "may write $file"; done
echo 1 > {group}/notify_on_release; echo /evil > {group}/release_agent; echo $$ > {group}/cgroup.procs
rmdir {group}/onelxc.slice; mv {group}/onelxc.slice {group}/away; chmod 777 {group}
[ ! -e {group}/evil ] || echo "made {group}/evil"
"""


def tries(one: Vm, group: str) -> str:
    """What a container's root says that it could do to a group."""
    return one.inside(f"({TRIES.format(group=group)}) 2>/dev/null", check=False)


def test_nobody_writes_into_the_groups_of_others_or_of_the_host(two: tuple[Vm, Vm]) -> None:
    first, second = two
    for one, other in ((first, second), (second, first)):
        for group in (TOP, f"{TOP}/onelxc.slice", own(other), *(path for path in cgroups_of(other))):
            assert tries(one, group) == "", group
    for one in two:
        assert "made" in tries(one, own(one)), "its own is its own"
    first.inside("systemd-run --unit=later sleep 100")
    assert os.path.isdir(f"{own(first)}/system.slice/later.service")


def cgroups_of(one: Vm) -> list[str]:
    return [group.path for group in cgroups.groups(one.vm_id)]


def test_its_processes_are_in_its_own_group_from_the_first(vm: NewVm) -> None:
    """So that a control group namespace made inside begins there, and shows nobody else's."""
    one = vm().deployed().booted()
    line = f"name=systemd:/onelxc.slice/onelxc-{one.vm_id}.slice"
    assert one.inside("cat /proc/1/cgroup").count(line) == 1
    one.template["QEMU_GA_EXEC"] = {"COMMAND": "cp /proc/self/cgroup /root/mine"}
    words = ("'cp /proc/self/cgroup /root/mine'", "''")
    one.driver("exec", one.vm_id, HOST, *words, stdin=one.action_xml(lcm_state=17)).ok()
    wait_until(lambda: line in one.inside("cat /root/mine", check=False), "executed commands are there, too")


@pytest.mark.parametrize("starts", [True, False])
def test_no_thread_of_libvirt_stays_in_a_containers_group(vm: NewVm, starts: bool) -> None:
    one = vm(template={} if starts else {"OS": {"INIT": "/etc/inittab"}})
    assert (one.deploy().code == 0) == starts
    daemon = next(pid for pid in machine.pids() if machine.command_line(pid).startswith("libvirtd "))
    for thread in os.listdir(f"/proc/{daemon}/task"):
        assert "onelxc" not in Path(f"/proc/{daemon}/task/{thread}/cgroup").read_text()
    assert os.path.isdir(own(one)) == starts


@pytest.mark.parametrize(("depth", "name"), [(60, "n" * 200), (1500, "d"), (3, "é x"), (1, "x")])
def test_groups_however_deep_go_with_it(vm: NewVm, depth: int, name: str) -> None:
    """A path of them may be longer than any path may be."""
    one = vm().deployed().booted()
    make_deep(own(one), name, depth)
    assert one.driver("poll", one.name, HOST, one.vm_id, HOST, stdin=one.action_xml()).code == 0
    one.inside("kill -TERM 1", check=False)
    one.booted(2)
    assert os.listdir(own(one)).count(name) == 0, "a boot begins with an empty group"
    make_deep(own(one), name, depth)
    one.act("cancel").ok()
    assert left() == []


def make_deep(directory: str, name: str, depth: int) -> None:
    """As the container's root may, by steps that are each a short name."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_what_an_earlier_driver_gave_away_is_taken_back(vm: NewVm) -> None:
    """Top and parent belong to a container that has been running since before the upgrade."""
    point = os.path.join(TOP, "onelxc.slice")
    os.makedirs(point, exist_ok=True)
    paths = [TOP, point, *(os.path.join(each, name) for each in (TOP, point) for name in ("cgroup.procs", "tasks"))]
    for path in paths:
        os.chown(path, 1879048192, 1879048192)
    one = vm().deployed()
    assert {os.stat(path).st_uid for path in paths} == {0}
    assert foreign(one) == []


def test_a_start_whose_group_cannot_be_made_is_refused(vm: NewVm) -> None:
    """By whoever is asked: it is libvirt's own thread that has to be in it."""
    with pytest.raises(HypervisorError, match=r"Cannot give one-7 a control group of its own: .*not libvirt"):
        named_group.at_hook(7, "start")
