"""The life of a VM of OpenNebula 7.4, privileged and not: deploy, reboot, reset, shutdown, cancel; and what is refused,
as its user reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support import images, machine
from tests.support.vms import HOST, MONITORD, Driver, Vm

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
HOST_CONF = "/etc/onelxc/host.conf"
UNPRIVILEGED, PRIVILEGED = "unprivileged", "privileged"


@pytest.fixture
def privileged_allowed(driver: Driver) -> Iterator[None]:
    with open(HOST_CONF) as file:
        before = file.read()
    with open(HOST_CONF, "a") as file:
        file.write('\nPRIVILEGED = "yes"\n')
    yield
    with open(HOST_CONF, "w") as file:
        file.write(before)


def deployed(vm: NewVm, form: str, image: str | None = "busybox", memory: str = "64") -> Vm:
    user = {"LXC_UNPRIVILEGED": "no"} if form == PRIVILEGED else {}
    one = vm(image, user_template=user, template={"MEMORY": memory}).deployed().booted()
    with open(f"/proc/{machine.init_pid(one.name)}/uid_map") as file:
        assert (file.read().split()[1] == "0") == (form == PRIVILEGED)
    return one


@pytest.mark.parametrize("form", [UNPRIVILEGED, PRIVILEGED])
def test_from_deploy_to_terminate(vm: NewVm, form: str, privileged_allowed: None) -> None:
    one = deployed(vm, form)
    one.inside("echo kept > /root/kept")
    for boots, action in ((2, "reboot"), (3, "reset")):
        before = machine.init_pid(one.name)
        outcome = one.act(action).ok()
        assert (outcome.out, outcome.err) == ("", "")
        one.booted(boots)
        assert machine.init_pid(one.name) != before
    one.act("shutdown").ok()
    assert one.name not in machine.domains()
    one.deployed().booted(4)
    assert one.inside("cat /root/kept") == "kept\n"
    assert one.inside("stat -c '%a %u' /usr/bin/sudo") == "4755 0\n"
    one.act("cancel").ok()
    assert one.name not in machine.domains()


@pytest.mark.parametrize("form", [PRIVILEGED, UNPRIVILEGED])
def test_systemd(vm: NewVm, form: str, privileged_allowed: None) -> None:
    one = deployed(vm, form, images.distribution_tar("systemd"), memory="256")
    one.act("reboot").ok()
    one.booted(2)
    one.act("shutdown").ok()
    assert one.name not in machine.domains()


def test_privileged_where_the_host_does_not_allow_it(vm: NewVm) -> None:
    """It runs, unprivileged: marketplace templates ask for it for the stock driver's sake."""
    one = vm(user_template={"LXC_UNPRIVILEGED": "no"}).deployed()
    with open(f"/proc/{machine.init_pid(one.name)}/uid_map") as file:
        assert file.read().split()[1] != "0"


@pytest.mark.parametrize("action", ["shutdown", "reboot", "reset", "prereconfigure"])
def test_none_of_that_name(vm: NewVm, action: str) -> None:
    one = vm()
    outcome = one.act(action, *(["sdb"] if action == "prereconfigure" else []))
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.message == f"Cannot find {one.name}: no such container on this host"


def test_cancel_of_none_is_success(vm: NewVm) -> None:
    outcome = vm().act("cancel").ok()
    assert (outcome.out, outcome.err) == ("", "")


@pytest.mark.parametrize("action", ["migrate", "migrate_local"])
def test_live_migration_is_refused_in_words(vm: NewVm, action: str) -> None:
    one = vm().deployed()
    outcome = one.driver(action, one.name, "node2", HOST, one.vm_id, HOST, stdin=one.action_xml())
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.message == (
        f"Cannot migrate VM {one.vm_id}: a running container cannot move to another host; power it off and migrate it"
        " then, or migrate it with --poff"
    )
    assert one.running


def test_deploy_that_fails_says_why_and_only_that(vm: NewVm) -> None:
    one = vm(template={"OS": {"INIT": "/sbin/nope"}})
    outcome = one.deploy()
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert outcome.message == (
        f"Cannot deploy VM {one.vm_id}: cannot start /sbin/nope: there is no /sbin/nope in the root"
        " file system (but /sbin/init)"
    )
