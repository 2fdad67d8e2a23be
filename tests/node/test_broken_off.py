"""Every action, broken off at a moment: its processes killed, its caller gone, a call that fails, a disk that is full.

Seen from outside, the VM is then as before or as after, and the answer agrees: failed is as before, success is as
after. The next status probe finds nothing left to do, the same action succeeds, and after a cancel nothing is left.

`tests/run` takes a sample of the moments; all of them: ONELXC_MOMENTS=all tests/run tests/node/test_broken_off.py
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from onelxc import executions, rootclient
from onelxc.root import hub
from tests.support import images, leaks, machine
from tests.support.breaking import CALLER_KILLED, FULL, WAYS, Breaker
from tests.support.frontends import MONITORD
from tests.support.stream import Outcome
from tests.support.vms import HOST, Vm
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.generation(MONITORD)]
if os.environ.get("ONELXC_MOMENTS"):
    pytestmark.append(pytest.mark.timeout(0))

NewVm = Callable[..., Vm]
State = dict[str, Any]


@dataclass
class Stage:
    """One VM with a disk and a NIC of its own beside its root, and what the actions bring it."""

    one: Vm
    image: str
    init: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An action. `ready` is what has to be before it; `ends` where it may leave the container ended, half way."""

    act: Callable[[Stage], Outcome]
    ready: Callable[[Stage], object] = lambda stage: None
    ends: bool = False
    deployed: bool = True


def deploy(stage: Stage) -> Outcome:
    return stage.one.deploy()


def new_disk(stage: Stage) -> None:
    stage.one.add_disk(stage.image, ATTACH="YES")


def attach_disk(stage: Stage) -> Outcome:
    one = stage.one
    return one.act("attach_disk", one.path("disk.2"), "sdc", 99, "b64", lcm_state=17)


def attached_disk(stage: Stage) -> None:
    new_disk(stage)
    attach_disk(stage).ok()


def detach_disk(stage: Stage) -> Outcome:
    one = stage.one
    number = len(one.disks) - 1
    one.disks[number]["ATTACH"] = "YES"
    return one.act("detach_disk", one.path(f"disk.{number}"), one.disks[number]["TARGET"], 1, lcm_state=18)


def new_nic(stage: Stage) -> None:
    stage.notes["device"] = stage.one.add_nic("br0", ATTACH="YES", IP="10.77.0.12")


def nic_action(name: str) -> Callable[[Stage], Outcome]:
    def act(stage: Stage) -> Outcome:
        nic = stage.one.template["NIC"][-1]
        nic["ATTACH"] = "YES"
        more = ["br0", "-", "lxc", f"{stage.one.name}-{nic['NIC_ID']}"] if name == "attach_nic" else []
        return stage.one.act(name, nic["MAC"], *more, lcm_state=25)

    return act


def resize(stage: Stage) -> Outcome:
    stage.one.template.update(CPU="0.7", MEMORY="96", VCPU="2")
    return stage.one.act("resize")


def resize_disk(stage: Stage) -> Outcome:
    return stage.one.act("resize_disk", 1, 400, "b64", lcm_state=62)


def snapshot(name: str) -> Callable[[Stage], Outcome]:
    return lambda stage: stage.one.act(
        f"snapshot_{name}", 0 if name == "create" else "snap-0", lcm_state=24
    )  # HOTPLUG_SNAPSHOT


def with_snapshot(stage: Stage) -> None:
    snapshot("create")(stage).ok()
    stage.one.inside("echo later > /data/later; sync")


def save(stage: Stage) -> Outcome:
    return stage.one.act("save", stage.one.path("checkpoint"), lcm_state=6)


def restore(stage: Stage) -> Outcome:
    one = stage.one
    stdin = one.action_xml(lcm_state=21)
    return one.driver("restore", one.path("checkpoint"), HOST, one.name, one.vm_id, HOST, stdin=stdin)


def plain(name: str) -> Callable[[Stage], Outcome]:
    return lambda stage: stage.one.act(name)


def execute(stage: Stage) -> Outcome:
    wait_until(lambda: not executions.running(stage.one.vm_id), "no command runs")
    stage.one.template["QEMU_GA_EXEC"] = {"COMMAND": "true", "STDIN": ""}
    return stage.one.driver("exec", stage.one.vm_id, HOST, stdin=stage.one.action_xml(lcm_state=17))


def with_context(stage: Stage) -> None:
    one = stage.one
    for number, name in enumerate(("first", "second")):
        tree = Path(stage.image).parent / f"context.{one.vm_id}.{number}"
        tree.mkdir()
        (tree / "context.sh").write_text(f"NAME='{name}'\n")
        command = ["xorriso", "-as", "mkisofs", "-o", one.path(f"iso.{number}"), "-J", "-R", str(tree)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        one.give(one.path(f"iso.{number}"))
    os.rename(one.path("iso.0"), one.path("disk.9"))
    one.template["CONTEXT"] = {"DISK_ID": "9", "TARGET": "sdz", "NAME": "first"}


def reconfigure(stage: Stage) -> Outcome:
    one = stage.one
    if os.path.exists(one.path("iso.1")):
        os.replace(one.path("iso.1"), one.path("disk.9"))
    return one.act("reconfigure", "sdz", one.path("disk.9"), lcm_state=17)


CASES = {
    "deploy": Case(deploy, deployed=False),
    "attach_disk": Case(attach_disk, new_disk),
    "detach_disk of the deploy": Case(detach_disk),
    "detach_disk": Case(detach_disk, attached_disk),
    "attach_nic": Case(nic_action("attach_nic"), new_nic),
    "detach_nic": Case(nic_action("detach_nic")),
    "resize": Case(resize),
    "resize_disk": Case(resize_disk),
    "snapshot_create": Case(snapshot("create")),
    "snapshot_revert": Case(snapshot("revert"), with_snapshot, ends=True),
    "snapshot_delete": Case(snapshot("delete"), with_snapshot),
    "save": Case(save),
    "restore": Case(restore, lambda stage: save(stage).ok()),
    "reboot": Case(plain("reboot"), ends=True),
    "shutdown": Case(plain("shutdown"), ends=True),
    "cancel": Case(plain("cancel"), ends=True),
    "exec": Case(execute),
    "reconfigure": Case(reconfigure, with_context),
}
HALVES = ("resize_disk", "snapshot_delete", "reconfigure", "exec")
"""Actions of several steps, none of which is taken back: what was done stays, and the next try does the rest."""


@pytest.fixture
def stages(vm: NewVm, bridge: str, tmp_path: Path) -> Callable[[Case], Stage]:
    def make(case: Case) -> Stage:
        if not (tmp_path / "data").exists():
            for name, kind in (("data", "xfs"), ("more", "ext4")):
                with open(tmp_path / name, "wb") as file:
                    file.truncate(320 << 20)
                subprocess.run([f"mkfs.{kind}", "-q", str(tmp_path / name)], check=True)
        one = vm(images.busybox_ext4())
        one.add_disk(str(tmp_path / "data"), TARGET="/data")
        one.add_nic(bridge, IP="10.77.0.11")
        stage = Stage(one, str(tmp_path / "more"))
        if case.ready is with_context:
            case.ready(stage)
        if case.deployed:
            one.deployed().booted()
        else:
            hub.ensure_running()
        if case.ready is not with_context:
            case.ready(stage)
        stage.init = machine.init_pid(one.name) if case.deployed else 0
        return stage

    return make


def state(stage: Stage) -> State:
    """What is to be seen of the VM from outside, with its number left out."""
    one = stage.one
    seen: State = {"running": one.name in machine.domains()}
    here = f"/var/lib/onelxc/mnt/{one.vm_id}/"
    backing = {f"/dev/{name}": os.path.basename(path) for name, path in machine.loops().items()}
    seen["host mounts"] = sorted(
        f"{mount.point} {mount.kind} {backing.get(mount.source, mount.source)}"
        for mount in machine.mounts()
        if mount.point.startswith(here)
    )
    seen["loops"] = sorted(os.path.basename(path) for path in machine.loops().values() if f"/{one.vm_id}/" in path)
    seen["links"] = sorted(name for name in machine.links() if name.startswith(f"{one.name}-"))
    seen["files"] = sorted(
        f"{os.path.relpath(os.path.join(top, name), one.directory)} {os.path.getsize(os.path.join(top, name))}"
        for top, _, names in os.walk(one.directory)
        for name in names
        if not name.startswith("deployment.")
    )
    if seen["running"]:
        seen.update(_of_container(stage, backing))
    return json.loads(re.sub(rf"(?<=[-/]){one.vm_id}\b", "N", json.dumps(seen)))


def _of_container(stage: Stage, backing: dict[str, str]) -> State:
    one = stage.one
    init = machine.init_pid(one.name)
    with open(f"/proc/{init}/mountinfo") as table:
        sources = {line.split(" - ")[1].split(" ")[1]: line.split(" ")[4] for line in table}
    with open(f"/var/lib/onelxc/vms/{one.vm_id}/vm.json") as file:
        kept = json.load(file)["vm"]
    groups = machine.control_groups(one.name)
    values = {}
    for name in ("memory.limit_in_bytes", "cpu.shares", "freezer.state", "memory.max", "cpu.weight", "cgroup.freeze"):
        for group in groups:
            if os.path.exists(f"{group}/{name}"):
                values[name] = Path(group, name).read_text().strip()
    return {
        "same start": init == stage.init,
        "shown": sorted(f"{backing[source]} {point}" for source, point in sources.items() if source in backing),
        "nics": sorted(mac.split(":")[-1] for mac in one.inside("cat /sys/class/net/*/address").split()),
        "limits": values,
        "data": one.inside("ls /data", check=False).split(),
        "context": one.inside("cat /context/context.sh 2>/dev/null", check=False),
        "kept": {
            "disks": sorted((disk["disk_id"], disk["size_mb"]) for disk in kept["disks"]),
            "nics": sorted(nic["nic_id"] for nic in kept["nics"]),
            "size": [kept["cpu"], kept["vcpu"], kept["memory_kib"]],
        },
    }


def is_at_work(one: Vm) -> bool:
    """Whether a helper, or its worker, holds the VM's lock; the file of one that was killed may stay."""
    try:
        with open(f"/run/onelxc/lock/{one.vm_id}") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def settled(one: Vm) -> str:
    """The VM's state once the probe finds nothing more to do; "" if it knows no such VM any more."""

    def look() -> list[str]:
        if is_at_work(one):
            return []  # a helper whose caller was killed is still at work
        verdict = next((vm for vm in rootclient.one_shot("reap")["vms"] if vm["id"] == one.vm_id), None)
        done = verdict is None or (verdict["state"] != "busy" and not verdict.get("error"))
        return [str(verdict["state"]) if verdict else ""] if done else []

    return wait_until(look, f"nothing is left to do for {one.name}", interval_s=0.1)[0]


def undisturbed(case: Case, stage: Stage) -> tuple[State, State, list[str]]:
    """What is to be seen before and after, and all the moments."""
    before = state(stage)
    counting = Breaker()
    stage.one.driver.under = counting
    case.act(stage).ok()
    counting.close()
    settled(stage.one)
    return before, state(stage), counting.moments


def chosen(case: str, moments: list[str], way: str) -> list[int]:
    """The moments to break off at: all (who waits asks libvirt the same again and again: once), or one for each way,
    elsewhere in each action."""
    places = [at for at, what in enumerate(moments, 1) if at == 1 or what != moments[at - 2]]
    if os.environ.get("ONELXC_MOMENTS") == "all":
        return places
    share = (sorted(CASES).index(case) * len(WAYS) + WAYS.index(way)) * 0.618 % 1
    return [places[int(share * len(places))]]


@pytest.mark.parametrize("name", list(CASES))
def test_broken_off(name: str, stages: Callable[[Case], Stage]) -> None:
    case = CASES[name]
    first = stages(case)
    before, after, moments = undisturbed(case, first)
    finish(first.one)
    wrong = []
    for way in WAYS:
        for at in chosen(name, moments, way):
            here = leaks.snapshot()
            stage = stages(case)
            breaker = Breaker(at, way)
            stage.one.driver.under = breaker
            outcome = case.act(stage)
            breaker.close()
            moment = f"{way} at {at} of {len(moments)} ({breaker.moments[at - 1 : at]})"
            try:
                check(name, stage, (before, after), outcome, way)
                finish(stage.one)
                leaks.assert_none_since(here)
            except AssertionError as error:
                wrong.append(f"{moment}: {outcome}: {error}"[:3000])
                finish(stage.one)
            assert len(wrong) < 5, "\n\n".join(wrong)
    assert not wrong, "\n\n".join(wrong)


def check(name: str, stage: Stage, expected: tuple[State, State], outcome: Outcome, way: str) -> None:
    case, (before, after) = CASES[name], expected
    if outcome.code and way != CALLER_KILLED and outcome.code < 128:
        message = stage.one.driver.message(outcome)
        assert message.startswith("Cannot "), message
        assert "internal error" not in message
    if way == FULL and name in ("cancel", "shutdown"):
        assert outcome.code == 0, "it ends without writing anything"
    settled(stage.one)
    seen = state(stage)
    if outcome.code == 0:
        assert_is(seen, after)
    elif case.ends or name in HALVES:
        pass
    elif outcome.code < 128 and way != CALLER_KILLED:
        assert_is(seen, before)
    else:
        assert seen in (before, after), difference(seen, before) + difference(seen, after)
    if not case.ends or seen["running"]:
        case.act(stage).ok()
        settled(stage.one)
        assert_is(state(stage), after)


def assert_is(seen: State, wanted: State) -> None:
    assert seen == wanted, difference(seen, wanted)


def difference(seen: State, wanted: State) -> str:
    return "".join(
        f"\n  {key}: {seen.get(key)}\n  not: {wanted.get(key)}"
        for key in sorted({*seen, *wanted})
        if seen.get(key) != wanted.get(key)
    )


def finish(one: Vm) -> None:
    one.act("cancel").ok()
    one.delete()
