"""What a tenant with root in his container, or a power cut at the worst moment, must not be able to do to the host."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc import executions
from onelxc.config import HostConfig
from onelxc.errors import HypervisorError, NoSuchDomainError
from onelxc.model import VmPaths
from onelxc.root import execution, freezer, inside, orphans
from onelxc.root.journal import Journal
from onelxc.root.work import Work
from tests.support import machine
from tests.support.plain_container import Container, eventually
from tests.support.vms import Vm
from tests.support.waiting import wait_until

BASE = 1879048192


@pytest.fixture
def container() -> Iterator[Callable[..., Container]]:
    made: list[Container] = []

    def make(vm_id: int, script: str) -> Container:
        made.append(Container(vm_id, script, id_base=BASE))
        return made[-1]

    yield make
    for one in made:
        one.end()
        eventually("the end of the command", lambda: not executions.running(one.vm_id))  # noqa: B023
        execution.forget(one.vm_id)


def start(vm_id: int, command: str) -> None:
    work = Work(vm_id, "exec", Journal(VmPaths(vm_id).journal, "exec"), HostConfig(), print)
    execution.start(work, {"command": command, "stdin": base64.b64encode(b"").decode()})


def damage(path: str, data: object) -> None:
    Path(path).write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.mark.parametrize("what", ["{", {}, {"vm": {"from_the_future": 1}, "prepared": {}, "boot": ""}])
def test_a_record_that_cannot_be_read_does_not_keep_the_vm(vm: Callable[..., Vm], what: object) -> None:
    one = vm().deployed().booted()
    damage(VmPaths(one.vm_id).record, what)
    assert one.act("cancel").ok().err == ""
    assert one.name not in machine.domains()
    assert not os.path.exists(VmPaths(one.vm_id).state)


def test_nor_when_it_ends_by_itself(vm: Callable[..., Vm]) -> None:
    one = vm().deployed().booted()
    damage(VmPaths(one.vm_id).record, "")
    one.inside("poweroff", check=False)
    wait_until(lambda: one.name not in machine.domains(), "the container has ended")
    assert one.act("poll").ok().out.split()[0] == "STATE=d"
    assert not os.path.exists(VmPaths(one.vm_id).state)


def test_nothing_is_mounted_or_unmounted_on_the_host_in_a_containers_stead(tmp_path: Path) -> None:
    """The number of a container's process may be another's by the time it is used."""
    with pytest.raises(NoSuchDomainError, match="is the host's"):
        inside.attach(os.getpid(), str(tmp_path), "/media/one-disk.5", None)
    assert not os.path.exists("/media/one-disk.5")
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        with pytest.raises(NoSuchDomainError, match="is the host's"):
            inside.detach(os.getpid(), str(tmp_path), remove=False)
        assert os.path.ismount(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_init_in_a_user_namespace_without_root_gets_no_command(container: Callable[..., Container]) -> None:
    one = container(840, "exec unshare -U sleep 1000")
    eventually("its namespace", lambda: not Path(f"/proc/{init(840)}/uid_map").read_text())
    with pytest.raises(HypervisorError, match="Cannot execute in one-840: "):
        start(840, "echo x > /done")
    assert not (one.root / "done").exists()
    eventually("no attendant", lambda: not executions.running(840))


def test_a_container_held_by_its_freezer_does_not_hold_the_action(
    container: Callable[..., Container], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = container(841, "exec sleep 1000")
    eventually("init", lambda: orphans.comm(init(841)) == "sleep")
    freezer.freeze(841)
    with pytest.raises(HypervisorError, match="it is suspended"):
        start(841, "echo x > /done")
    monkeypatch.setattr(execution, "BEGIN_S", 1.0)
    try:
        # frozen after that look
        with pytest.raises(HypervisorError, match="it did not begin within 1 s"):
            execution.begin(841, "echo x > /done", b"", 60)
    finally:
        freezer.thaw(841)
    eventually("no attendant", lambda: not executions.running(841))
    assert not (one.root / "done").exists()
    assert executions.pending() == []


def test_a_command_whose_action_was_broken_off_does_not_run_on(container: Callable[..., Container]) -> None:
    """OpenNebula was told that the command could not be executed: it must not be, then."""
    container(842, "exec sleep 1000")
    eventually("init", lambda: orphans.comm(init(842)) == "sleep")
    freezer.freeze(842)
    action = os.fork()
    if action == 0:
        try:
            execution.begin(842, "sleep 998", b"", 60)
        finally:
            os._exit(0)
    eventually("the attendant", lambda: executions.running(842))
    os.kill(action, signal.SIGKILL)
    os.waitpid(action, 0)
    freezer.thaw(842)
    eventually("no attendant", lambda: not executions.running(842))
    assert not [pid for pid in machine.pids() if "sleep 998" in machine.command_line(pid)]
    assert executions.pending() == []


def init(vm_id: int) -> int:
    return inside.init_pid(vm_id)
