"""Memory and CPU of a running container go up and down, and stay as they were set through every restart."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onelxc import cgroup
from tests.support import machine
from tests.support.vms import MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]


@pytest.fixture
def one(vm: NewVm, form: dict[str, str]) -> Vm:
    """A running container of 64 MB and one core, in both forms."""
    return vm(user_template=form).deployed().booted()


def groups(one: Vm) -> cgroup.Groups:
    with open(f"/run/libvirt/lxc/{one.name}.pid") as file:
        return cgroup.of(int(file.read()), cgroup.mounts())


def limits(one: Vm) -> tuple[object, object]:
    """(memory in KiB, cores) as the kernel has them."""
    found = groups(one)
    return cgroup.memory_limit_kib(found), cgroup.cpu_quota(found)


def weight(one: Vm) -> int:
    found = groups(one)
    # on version 2 libvirt leaves it to systemd, whose unit is the group above
    unit = found.unified.removesuffix("/libvirt")
    path = f"{unit}/cpu.weight" if unit else f"{found.separate['cpu']}/cpu.shares"
    with open(path) as file:
        return int(file.read())


def resize(one: Vm, **values: str) -> None:
    one.template.update(values)
    outcome = one.act("resize").ok()
    assert (outcome.out, outcome.err) == ("", "")


def test_up_and_down(one: Vm) -> None:
    assert limits(one) == (64 * 1024, 1.0)
    before = weight(one)
    resize(one, MEMORY="160", CPU="2", VCPU="2")
    assert limits(one) == (160 * 1024, 2.0)
    assert weight(one) == 4 * before
    resize(one, MEMORY="48", CPU="0.5", VCPU="1")
    assert limits(one) == (48 * 1024, 1.0)
    assert weight(one) == before


def test_kept_through_restarts_of_the_container_and_of_libvirtd(one: Vm) -> None:
    resize(one, MEMORY="128", CPU="1", VCPU="2")
    expected = (128 * 1024, 2.0)
    shares = weight(one)
    one.inside("reboot", check=False)
    one.booted(2)
    assert (limits(one), weight(one)) == (expected, shares)
    machine.restart_libvirtd()
    assert (limits(one), weight(one)) == (expected, shares)
    one.inside("reboot", check=False)
    one.booted(3)
    assert (limits(one), weight(one)) == (expected, shares)
    one.act("reset").ok()
    one.booted(4)
    assert (limits(one), weight(one)) == (expected, shares)


def test_below_what_it_uses_is_refused_in_words(one: Vm) -> None:
    resize(one, MEMORY="200")
    # by exec, since the command has to be in the container's control groups
    one.template["QEMU_GA_EXEC"] = {"COMMAND": "tail -c 100m /dev/zero"}
    one.driver("exec", one.vm_id, "node1", "'tail -c 100m /dev/zero'", "''", stdin=one.action_xml()).ok()
    wait_until(lambda: cgroup.memory_kib(groups(one)) > 80 * 1024, "it uses memory")
    one.template["MEMORY"] = "64"
    outcome = one.act("resize")
    assert (outcome.code, outcome.out) == (1, "")
    message = one.driver.message(outcome)
    assert message.startswith(f"Cannot resize VM {one.vm_id}: it uses ")
    assert message.endswith(" MB of memory, which do not fit into 64 MB")
    assert limits(one)[0] == 200 * 1024
    assert one.running
    one.driver("exec_cancel", one.vm_id, "node1", stdin=one.action_xml()).ok()


@pytest.mark.parametrize(
    ("values", "words"),
    [({"MEMORY": "0"}, "MEMORY is 0 MB"), ({"MEMORY": "much"}, "MEMORY is not"), ({"VCPU": "0"}, "VCPU")],
)
def test_values_that_are_none(vm: NewVm, values: dict[str, str], words: str) -> None:
    one = vm().deployed()
    before = limits(one)
    one.template.update(values)
    outcome = one.act("resize")
    assert outcome.code == 1
    assert words in one.driver.message(outcome)
    assert f"VM {one.vm_id}" in one.driver.message(outcome)
    assert limits(one) == before


def test_a_vm_that_is_off(vm: NewVm) -> None:
    one = vm()
    outcome = one.act("resize")
    assert outcome.code == 1
    assert one.driver.message(outcome) == (f"Cannot find {one.name}: no such container on this host")
