"""Every capture of 7.4.0 goes through the installed executables: argv and stdin as its ssh stream writes them.

stdout, stderr and the exit code are compared byte for byte; the effect is asked of libvirt and of the kernel.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from onelxc.config import Generation
from tests.contract.staged import BRIDGE, Staged
from tests.support import captures, machine
from tests.support.frontends import MONITORD
from tests.support.stream import Outcome
from tests.support.vms import HOST, REMOTES, Driver, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)
Stage = Callable[..., Staged]
SILENT = Outcome("", "", 0)


@pytest.fixture(scope="session")
def onebr0() -> Iterator[None]:
    machine.command("ip", "link", "add", BRIDGE, "type", "bridge")
    machine.command("ip", "link", "set", BRIDGE, "up")
    yield
    machine.command("ip", "link", "delete", BRIDGE)


@pytest.fixture
def stage(onebr0: None, vm: Callable[..., Vm], driver: Driver, tmp_path: Path) -> Stage:
    def make(case: str, root_mb: int | None = None) -> Staged:
        about = captures.named(f"7.4.0/{case}")
        vm_id, ds_id = ids(about)
        return Staged(driver, vm(None, vm_id=vm_id, ds_id=ds_id), case, tmp_path, root_mb)

    return make


def ids(capture: captures.Capture) -> tuple[int, int]:
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


def test_attach_disk(stage: Stage) -> None:
    one = stage("attach_disk/attach_disk").deployed()
    assert one.send() == SILENT
    assert one.one.inside("echo there > /media/one-disk.4/file; cat /media/one-disk.4/file") == "there\n"


def test_detach_disk(stage: Stage) -> None:
    one = stage("detach_disk/detach_disk").deployed()
    assert one.send("attach_disk/attach_disk") == SILENT
    image = one.one.path("disk.4")
    assert image in machine.loops().values()
    assert one.send() == SILENT
    assert image not in machine.loops().values(), "the transfer manager takes the image away now"
    assert "one-disk.4" not in one.one.inside("cat /proc/mounts")


@pytest.mark.parametrize("case", ["attach_nic/attach_nic", "detach_nic/detach_nic"])
def test_nic(stage: Stage, case: str) -> None:
    one = stage(case).deployed()
    assert one.send("attach_nic/attach_nic") == SILENT
    assert os.readlink("/sys/class/net/one-1-1/master").endswith(f"/{BRIDGE}")
    assert "link/ether 02:00:c0:a8:96:65" in one.one.inside("ip link show eth1")
    if case.startswith("detach"):
        assert one.send() == SILENT
        assert "one-1-1" not in machine.links()
        assert "02:00:c0:a8:96:65" not in one.one.inside("ip link")


NEW_CONTEXT = "DISK_ID='3'\nNEW='yes'\n"
CONTEXTS = [
    ("attach_nic/prereconfigure", "attach_nic/reconfigure"),
    ("attach_nic_alias/prereconfigure", "attach_nic_alias/reconfigure"),
    ("detach_nic/prereconfigure", "detach_nic/reconfigure"),
    ("detach_nic_alias/prereconfigure", "detach_nic_alias/reconfigure"),
    ("updateconf/prereconfigure", "updateconf/reconfigure"),
]


@pytest.mark.parametrize(("before", "after"), CONTEXTS)
def test_new_context(stage: Stage, before: str, after: str) -> None:
    """Between the two the transfer manager writes a new ISO: nobody holds the old one."""
    one = stage(before).deployed()
    assert one.send() == SILENT
    assert one.one.path("disk.3") not in machine.loops().values()
    one.write_context(NEW_CONTEXT)
    assert one.send(after) == SILENT
    assert one.one.inside("cat /context/context.sh") == NEW_CONTEXT


def test_resize_disk(stage: Stage) -> None:
    one = stage("disk_resize_live/resize_disk", root_mb=64).deployed()
    before = int(one.one.inside("df -m / | awk 'END { print $2 }'"))
    os.truncate(one.one.path("disk.0"), 96 << 20)  # what the transfer manager did before
    outcome = one.send()
    if not machine.may_grow_mounted():
        # the machine that these tests run on; the emulated one can
        assert (outcome.out, outcome.err, outcome.code) == ("", outcome.message + "\n", 1)
        assert "CAP_SYS_RESOURCE" in outcome.message
        return
    assert outcome == SILENT
    assert int(one.one.inside("df -m / | awk 'END { print $2 }'")) > before + 16


def test_resize(stage: Stage) -> None:
    one = stage("resize_live/resize").deployed()
    assert one.one.inside("awk '/^MemTotal/ { print $2 }' /proc/meminfo") == f"{128 << 10}\n"
    assert one.send() == SILENT
    assert one.one.inside("awk '/^MemTotal/ { print $2 }' /proc/meminfo") == f"{256 << 10}\n"


def executions(driver: Driver) -> str:
    directory = os.path.join(REMOTES, "im/onelxc-probes.d/vm/execution")
    probes = sorted(name for name in os.listdir(directory) if name.startswith("onelxc"))
    return "".join(driver.probe(f"onelxc-probes.d/vm/execution/{name}", "onelxc", 2, HOST).ok().out for name in probes)


def test_exec(stage: Stage, driver: Driver) -> None:
    one = stage("exec/exec").deployed()
    assert one.send() == SILENT
    said = wait_until(lambda: executions(driver), "the result is reported")
    assert 'ID="2"' in said.replace(" ", "") or "ID=2" in said.replace(" ", "")
    assert base64.b64encode(b"hello\n").decode() in said
    assert executions(driver) == "", "a result is reported once"


def test_exec_cancel(stage: Stage, driver: Driver) -> None:
    one = stage("exec_cancel/exec_cancel").deployed()
    assert one.send("exec/exec") == SILENT
    assert one.send() == SILENT
    wait_until(lambda: "echo hello" not in one.one.inside("ps"), "what was started has ended")


def test_snapshots(stage: Stage) -> None:
    """The name that create prints comes back in revert and delete."""
    one = stage("snapshot_create/snapshot_create").deployed()
    one.one.inside("echo old > /file")
    assert one.send() == Outcome("snap-0\n", "", 0)
    one.one.inside("echo new > /file")
    assert one.send("snapshot_revert/snapshot_revert") == SILENT
    one.one.booted()
    assert one.one.inside("cat /file") == "old\n"
    assert one.send("snapshot_delete/snapshot_delete") == SILENT


def test_suspend_and_resume(stage: Stage) -> None:
    one = stage("suspend/save").deployed()
    first = machine.init_pid(one.one.name)
    assert one.send() == SILENT
    assert one.send("resume_from_suspend/restore") == SILENT
    assert machine.init_pid(one.one.name) == first
    assert one.one.inside("echo alive") == "alive\n"


@pytest.mark.parametrize("case", ["resume_from_stop/restore", "migrate_cold_save/restore"])
def test_restore_of_what_no_save_kept(stage: Stage, case: str) -> None:
    """It starts from its disks."""
    one = stage(case)
    assert one.send() == SILENT
    assert one.one.inside("echo alive") == "alive\n"


def test_poll(stage: Stage) -> None:
    outcome = stage("poll/poll").deployed().send()
    assert (outcome.out.split()[0], outcome.err, outcome.code) == ("STATE=a", "", 0)


PROBES = ["probes/host_beacon", "probes/host_monitor", "probes/host_system", "probes/vm_monitor", "probes/vm_status"]


@pytest.mark.parametrize("case", PROBES)
def test_probe(stage: Stage, driver: Driver, case: str) -> None:
    """Each probe of the directory, beside a running VM."""
    stage("poll/poll").deployed()
    capture = captures.named(f"7.4.0/{case}")
    directory = f"onelxc-probes.d/{case.partition('/')[2].replace('_', '/')}"
    ours = [name for name in os.listdir(os.path.join(REMOTES, "im", directory)) if name.startswith("onelxc")]
    assert ours
    for name in ours:
        stdin = capture.read().decode()
        outcome = driver.probe(os.path.join(directory, name), *capture.argv[1:], stdin=stdin)
        assert (outcome.err, outcome.code) == ("", 0)
        if case == "probes/vm_status":
            assert 'DEPLOY_ID="one-1"' in outcome.out.replace(" ", "")
            assert 'STATE="RUNNING"' in outcome.out.replace(" ", "")


def test_every_capture_is_replayed() -> None:
    with open(__file__) as file:
        text = file.read()
    cases = [each.case.partition("/")[2] for each in captures.ALL if each.generation is Generation.MONITORD]
    missing = [case for case in cases if f'"{case}"' not in text]
    assert not missing
