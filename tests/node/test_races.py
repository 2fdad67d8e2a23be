"""What the original confessed: OpenNebula 3.2.1 deletes a VM's files before, beside, or without its cancel.

Whatever the order, nothing is left on the host: no container, mount, loop device, veth, control group, file or process.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.support import images, leaks, machine
from tests.support.stream import Outcome, Running
from tests.support.vms import HOST, Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]
GAVE_UP = "it was cancelled meanwhile"


@pytest.fixture
def gone(clean: None) -> Callable[[Vm], None]:
    """Assert that nothing of a VM is there *before* the fixture's own cancel could have removed it."""
    before = leaks.snapshot()

    def check(one: Vm) -> None:
        assert one.name not in machine.domains()
        leaks.assert_none_since(before)

    return check


def remove(one: Vm) -> None:
    """tm_delete: `rm -rf` of the images, as oneadmin."""
    machine.command("runuser", "-u", "oneadmin", "--", "rm", "-rf", one.directory)
    assert not os.path.exists(one.directory)


def cancel_while_booting(one: Vm) -> Outcome:
    """oned has no deploy id yet, and leaves the argument out."""
    return one.driver("cancel", HOST, one.vm_id, HOST)


def journal(one: Vm) -> str:
    try:
        with open(f"/var/lib/onelxc/vms/{one.vm_id}/journal") as file:
            return file.read()
    except FileNotFoundError:
        return ""


MOMENTS: dict[str, Callable[[Vm], object]] = {
    "at once": lambda one: True,
    "unpacking": lambda one: any("tar" in machine.command_line(pid).split(" ")[0] for pid in machine.pids()),
    "mounted": lambda one: '"mount"' in journal(one),
    "starting": lambda one: '"domain"' in journal(one),
    "running": lambda one: one.name in machine.domains(),
}


@pytest.fixture(params=list(MOMENTS))
def booting(request: pytest.FixtureRequest, vm: NewVm) -> tuple[Vm, Running]:
    """A VM whose deploy is in flight, at a certain moment. The image is a large one, so that there is time."""
    one = vm(images.distribution_tar("sysvinit"), template={"MEMORY": "128"})
    with no_cache() if request.param == "unpacking" else contextlib.nullcontext():
        running = one.start_deploy()
        wait_until(lambda: running.ended or MOMENTS[request.param](one), request.param, interval_s=0.002)
    assert request.param != "unpacking" or not running.ended
    return one, running


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """Archives are unpacked, although the same ones have been before."""
    path = "/etc/onelxc/host.conf"
    with open(path) as file:
        before = file.read()
    with open(path, "w") as file:
        file.write(before + "\nCACHE = [ SIZE = 0 ]\n")
    yield
    with open(path, "w") as file:
        file.write(before)


def test_deleted_first_cancelled_then(vm: NewVm, gone: Callable[[Vm], None]) -> None:
    one = vm().deployed().booted()
    remove(one)
    assert one.running
    one.act("cancel").ok()
    one.delete()
    gone(one)


@pytest.mark.parametrize("image", [images.busybox_tar, images.one_process_tar])
def test_deleted_beside_the_cancel(vm: NewVm, gone: Callable[[Vm], None], image: Callable[[], str]) -> None:
    one = vm(image()).deployed().booted()
    cancel = one.start("cancel")
    remove(one)
    cancel.wait().ok()
    one.delete()
    gone(one)


def test_deleted_while_booting_and_cancelled_without_an_id(
    booting: tuple[Vm, Running], gone: Callable[[Vm], None]
) -> None:
    one, deploy = booting
    remove(one)
    cancel_while_booting(one).ok()
    outcome = deploy.wait()
    assert outcome.code == 1 or outcome.out == f"{one.name}\n"
    if outcome.code:
        assert one.driver.message(outcome).startswith("Cannot ")
    one.delete()
    gone(one)


def test_cancelled_while_booting_and_deleted_then(booting: tuple[Vm, Running], gone: Callable[[Vm], None]) -> None:
    one, deploy = booting
    cancel_while_booting(one).ok()
    # whatever the deploy says: once the cancel has answered, nothing holds the files that are removed now
    assert not [line for line in machine.loops().values() if f"/{one.vm_id}/" in line]
    remove(one)
    deploy.wait()
    one.delete()
    gone(one)


def test_deleted_while_booting_and_never_cancelled(booting: tuple[Vm, Running], gone: Callable[[Vm], None]) -> None:
    """The next monitoring of the host ends what came of it."""
    one, deploy = booting
    remove(one)
    deploy.wait()
    monitor_host(one)
    one.delete()
    gone(one)


def test_deleted_without_cancel_is_noticed_by_the_probes(vm: NewVm, gone: Callable[[Vm], None]) -> None:
    """A VM that a poll reported as paused or failed gets the delete alone."""
    one = vm().deployed().booted()
    remove(one)
    assert one.running
    monitor_host(one)
    one.delete()
    gone(one)


def test_probes_leave_a_deploy_in_flight_alone(vm: NewVm) -> None:
    one = vm(images.distribution_tar("sysvinit"), template={"MEMORY": "128"})
    deploy = one.start_deploy()
    probed = 0
    while not deploy.ended:
        monitor_host(one)
        probed += 1
    assert deploy.wait().ok().out == f"{one.name}\n"
    assert probed > 1
    one.booted()


def monitor_host(one: Vm) -> None:
    """Every executable of im/lxc.d, as 3.2.1's monitoring of the host runs them."""
    directory = "/var/tmp/one/im/lxc.d"
    for name in sorted(os.listdir(directory)):
        assert one.driver.probe(f"lxc.d/{name}", "lxc", 0, HOST).code == 0


def test_resubmit_with_its_cancel_in_time(vm: NewVm) -> None:
    one = vm().deployed().booted()
    first = machine.init_pid(one.name)
    one.act("cancel").ok()
    again(one).deployed().booted()
    assert machine.init_pid(one.name) != first


def test_resubmit_whose_cancel_has_not_come_yet(vm: NewVm) -> None:
    """The old container still runs, on deleted files: it is not what the new deploy is asked for."""
    one = vm().deployed().booted()
    first = machine.init_pid(one.name)
    one.inside("echo old > /root/old")
    remove(one)
    again(one).deployed().booted()
    assert machine.init_pid(one.name) != first
    assert one.inside("ls /root") == ""


def test_resubmit_whose_cancel_comes_into_the_new_deploy(vm: NewVm, gone: Callable[[Vm], None]) -> None:
    """Which deploy a cancel is for cannot be told from its arguments: the newer one gives up, and leaves nothing."""
    one = vm(images.distribution_tar("sysvinit"), template={"MEMORY": "128"}).deployed()
    remove(one)
    with no_cache():
        deploy = again(one).start_deploy()
        wait_until(lambda: deploy.ended or MOMENTS["unpacking"](one), "the new deploy unpacks", interval_s=0.005)
    one.act("cancel").ok()
    outcome = deploy.wait()
    assert (outcome.code, one.driver.message(outcome)) == (1, f"Cannot deploy VM {one.vm_id}: {GAVE_UP}")
    one.delete()
    gone(one)


def again(one: Vm) -> Vm:
    """The transfer manager brings the disks anew."""
    one.delete()
    fresh = Vm(one.driver, one.vm_id, one.template, one.user_template)
    for disk in one.disks:
        name = os.path.basename(str(disk["SOURCE"]))
        fresh.add_disk(os.path.join(images.CACHE, name))
    fresh.deployments = one.deployments
    return fresh


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_deploy_whose_connection_is_lost_leaves_nothing(
    booting: tuple[Vm, Running], number: signal.Signals, gone: Callable[[Vm], None]
) -> None:
    """SIGKILL goes to the helper too here: then the next monitoring finds what is left."""
    one, deploy = booting
    deploy.hang_up(number)
    wait_until(lambda: not helpers(one), "the helper has ended")
    if '"commit"' in journal(one):
        one.act("cancel").ok()  # it was done already when the signal came
    elif number == signal.SIGKILL:
        monitor_host(one)
    one.delete()
    gone(one)


def helpers(one: Vm) -> list[int]:
    """The root helpers at work on this VM."""
    lines = {pid: machine.command_line(pid) for pid in machine.pids()}
    return [pid for pid, line in lines.items() if f"onelxc-root session {one.vm_id} " in line and "sudo" not in line]


def test_a_killed_helper_is_cleaned_up_after_by_the_next_monitoring(
    booting: tuple[Vm, Running], gone: Callable[[Vm], None]
) -> None:
    """SIGKILL: the journal and the kernel are all that is known."""
    one, deploy = booting
    for pid in helpers(one):
        with contextlib.suppress(ProcessLookupError):  # the worker dies with its supervisor
            os.kill(pid, signal.SIGKILL)
    outcome = deploy.wait()
    if outcome.code:
        assert one.driver.message(outcome).startswith("Cannot ")
        monitor_host(one)
    else:
        one.act("cancel").ok()
    one.delete()
    gone(one)
