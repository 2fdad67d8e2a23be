"""What two VMs of one host must not share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import hostconf, machine
from tests.support.vms import MONITORD, Vm

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
COUNT = 32768


def ids_of(one: Vm) -> str:
    with open(f"/proc/{machine.init_pid(one.name)}/uid_map") as file:
        return file.read()


def test_two_vms_whose_ids_would_be_the_same_do_not_run_on_one_host(vm: NewVm) -> None:
    one, two = vm(vm_id=7), vm(vm_id=7 + COUNT)
    one.deployed()
    outcome = two.deploy()
    assert outcome.code == 1
    assert "it would have the user ids of VM 7" in outcome.message
    one.act("cancel").ok()
    two.deployed()
    assert one.deploy().code == 1


def test_nor_those_that_overlap_since_the_range_was_changed(vm: NewVm) -> None:
    one, two = vm(vm_id=9), vm(vm_id=8)
    one.deployed()
    with hostconf.with_line(f"ID_BASE = {1879048192 + 65536 + 30000}"):
        outcome = two.deploy()
    assert outcome.code == 1
    assert "it would have the user ids of VM 9" in outcome.message


def test_neighbours_have_different_ids(vm: NewVm) -> None:
    one, two = vm(vm_id=11).deployed(), vm(vm_id=12).deployed()
    assert ids_of(one) != ids_of(two)


def test_of_two_that_start_at_once_at_most_one_runs(vm: NewVm) -> None:
    one, two = vm(vm_id=13), vm(vm_id=13 + COUNT)
    outcomes = [running.wait(90) for running in [one.start_deploy(), two.start_deploy()]]
    assert [outcome.code for outcome in outcomes].count(0) <= 1
