"""Every capture of 7.4.0 goes through the installed executables: argv and stdin as its ssh stream writes them.

stdout, stderr and the exit code are compared byte for byte; the effect is asked of libvirt and of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.config import Generation
from tests.contract.staged import BRIDGE, Staged
from tests.support import captures, machine
from tests.support.frontends import MONITORD
from tests.support.stream import Outcome
from tests.support.vms import Driver, Vm

pytestmark = pytest.mark.generation(MONITORD)
Stage = Callable[[str], Staged]
SILENT = Outcome("", "", 0)


@pytest.fixture(scope="session")
def onebr0() -> Iterator[None]:
    machine.command("ip", "link", "add", BRIDGE, "type", "bridge")
    machine.command("ip", "link", "set", BRIDGE, "up")
    yield
    machine.command("ip", "link", "delete", BRIDGE)


@pytest.fixture
def stage(onebr0: None, vm: Callable[..., Vm], driver: Driver, tmp_path: Path) -> Stage:
    def make(case: str) -> Staged:
        about = captures.named(f"7.4.0/{case}")
        vm_id, ds_id = ids(about)
        return Staged(driver, vm(None, vm_id=vm_id, ds_id=ds_id), case, tmp_path)

    return make


def ids(capture: captures.Capture) -> tuple[int, int]:
    from xml.etree import ElementTree

    root = ElementTree.fromstring(capture.read())
    vm = root if root.tag == "VM" else root.find("VM")
    assert vm is not None
    return int(vm.findtext("ID") or ""), int(vm.findtext("HISTORY_RECORDS/HISTORY/DS_ID") or "")


DEPLOYS = [
    "deploy/deploy",
    "migrate_cold_poff/deploy",
    "recover_recreate/deploy",
    "resume_from_poweroff/deploy",
    "resume_from_undeploy/deploy",
    "vnm_post_fails_after_deploy/deploy",
]


@pytest.mark.parametrize("case", DEPLOYS)
def test_deploy(stage: Stage, case: str) -> None:
    staged = stage(case)
    one = staged.one
    assert staged.send() == Outcome(f"{one.name}\n", "", 0)
    one.booted()
    assert machine.domains() == {one.name: 1}
    assert one.inside("cat /context/context.sh").startswith("DISK_ID='3'\n")
    assert one.inside("touch /media/one-disk.1/x && ls /media/one-disk.1") == "lost+found\nx\n"


ENDS = [
    "poweroff/shutdown",
    "terminate/shutdown",
    "undeploy/shutdown",
    "migrate_cold_poff/shutdown",
    "poweroff_hard/cancel",
    "terminate_hard/cancel",
    "recover_recreate/cancel",
    "vnm_post_fails_after_deploy/cancel",
]


@pytest.mark.parametrize("case", ENDS)
def test_end(stage: Stage, case: str) -> None:
    staged = stage(case).deployed()
    assert staged.send() == SILENT
    assert machine.domains() == {}
    assert not [mount for mount in machine.mounts() if mount.point.startswith("/var/lib/onelxc/")]


@pytest.mark.parametrize("case", ["reboot/reboot", "reset/reset"])
def test_again(stage: Stage, case: str) -> None:
    staged = stage(case).deployed()
    first = machine.init_pid(staged.one.name)
    assert staged.send() == SILENT
    staged.one.booted(2)
    assert machine.init_pid(staged.one.name) != first


REFUSED = ["stop/save", "migrate_cold_save/save", "migrate_live/migrate"]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(stage: Stage, case: str) -> None:
    staged = stage(case).deployed()
    first = machine.init_pid(staged.one.name)
    outcome = staged.send()
    assert (outcome.out, outcome.code) == ("", 1)
    assert outcome.err == outcome.message + "\n", "one line, with no prefix that would hide it from the user"
    assert f"VM {staged.one.vm_id}:" in outcome.message
    assert machine.init_pid(staged.one.name) == first


def test_every_capture_is_replayed() -> None:
    with open(__file__) as file:
        text = file.read()
    cases = [each.case.partition("/")[2] for each in captures.ALL if each.generation is Generation.MONITORD]
    missing = [case for case in cases if f'"{case}"' not in text]
    assert not missing
