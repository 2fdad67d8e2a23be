"""The life of a VM of OpenNebula 7.4, privileged and not: deploy, reboot, reset, shutdown, cancel; and what is refused,
as its user reads it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import images, machine
from tests.support.stream import Outcome
from tests.support.vms import HOST, MONITORD, Vm

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]


def test_from_deploy_to_terminate(vm: NewVm, form: dict[str, str]) -> None:
    raw = {"TYPE": "lxc", "DATA": "lxc.mount.auto = cgroup:rw"}  # as marketplaces have it, for the stock driver
    one = vm(user_template=form, template={"RAW": raw}).deployed().booted()
    assert one.privileged == (form != {})
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


def test_systemd(vm: NewVm, form: dict[str, str]) -> None:
    one = vm(images.distribution_tar("systemd"), user_template=form, template={"MEMORY": "256"}).deployed().booted()
    assert one.privileged == (form != {})
    one.act("reboot").ok()
    one.booted(2)
    one.act("shutdown").ok()
    assert one.name not in machine.domains()


def test_privileged_where_the_host_does_not_allow_it(vm: NewVm) -> None:
    """It runs, unprivileged: marketplace templates ask for it for the stock driver's sake."""
    assert not vm(user_template={"LXC_UNPRIVILEGED": "no"}).deployed().privileged


# Every action that needs a running container, and its own arguments.
ON_THE_RUNNING: dict[str, tuple[object, ...]] = {
    "shutdown": (),
    "reboot": (),
    "reset": (),
    "save": ("/var/lib/one/checkpoint",),
    "attach_disk": ("disk.0", "sda", 0, "b64"),
    "detach_disk": ("disk.0", "sda", 0),
    "attach_nic": ("02:00:00:00:00:01", "br0", "-", "lxc", "one-0-0"),
    "detach_nic": ("02:00:00:00:00:01",),
    "prereconfigure": ("sdb",),
    "reconfigure": ("sdb", "disk.1"),
    "resize": (),
    "resize_disk": (0, 64, "b64"),
    "snapshot_create": (0,),
    "snapshot_revert": ("snap-0",),
    "snapshot_delete": ("snap-0",),
}
SAVE_SUSPEND = 6


def test_none_of_that_name(vm: NewVm) -> None:
    one = vm()
    one.disks[0]["ATTACH"] = "YES"
    one.add_nic("br0", ATTACH="YES")
    for action, arguments in ON_THE_RUNNING.items():
        words = (one.path(str(word)) if str(word).startswith("disk.") else word for word in arguments)
        outcome = one.act(action, *words, lcm_state=SAVE_SUSPEND)
        message = f"Cannot find {one.name}: no such container on this host"
        assert (action, outcome) == (action, Outcome("", message + "\n", 1))
        assert outcome.message == message, "nothing of it is taken for a line of the log"
    one.template["QEMU_GA_EXEC"] = {"COMMAND": "true"}
    outcome = one.driver("exec", one.vm_id, HOST, "true", stdin=one.action_xml())
    assert outcome == Outcome("", f"Cannot execute in {one.name}: it does not run on this host\n", 1)
    assert one.driver("exec_cancel", one.vm_id, HOST, stdin=one.action_xml()) == Outcome("", "", 0)
    outcome = one.driver("exec_cancel", HOST, stdin=one.action_xml())
    assert outcome == Outcome("", f"Cannot exec_cancel: VM id and host expected: {HOST}\n", 1)


def test_another_deploy_id(vm: NewVm) -> None:
    one = vm()
    message = f"VM {one.vm_id}: web.example is not a container of ours"
    for action, words in (("cancel", "cancel"), ("shutdown", "shut down"), ("resize", "resize")):
        outcome = one.driver(action, "web.example", HOST, one.vm_id, HOST, stdin=one.action_xml())
        assert (outcome.code, outcome.out, outcome.message) == (1, "", f"Cannot {words} {message}")


def test_cancel_of_none_is_success(vm: NewVm) -> None:
    assert vm().act("cancel") == Outcome("", "", 0)


@pytest.mark.parametrize("action", ["migrate", "migrate_local"])
def test_live_migration_is_refused_in_words(vm: NewVm, form: dict[str, str], action: str) -> None:
    one = vm(user_template=form).deployed()
    outcome = one.driver(action, one.name, "node2", HOST, one.vm_id, HOST, stdin=one.action_xml())
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.message == (
        f"Cannot migrate VM {one.vm_id}: a running container cannot move to another host; power it off and migrate it"
        " then, or migrate it with --poff"
    )
    assert one.running


@pytest.mark.parametrize("lcm_state", [22, 35])
def test_restore_of_what_no_save_has_kept(vm: NewVm, lcm_state: int) -> None:
    """BOOT_STOPPED and BOOT_MIGRATE: there is no memory of it, so that it starts from its disks."""
    one = vm()
    stdin = one.action_xml(lcm_state=lcm_state)
    one.driver("restore", one.path("checkpoint"), HOST, one.name, one.vm_id, HOST, stdin=stdin).ok()
    one.booted()


def test_deploy_that_fails_says_why_and_only_that(vm: NewVm) -> None:
    one = vm(template={"OS": {"INIT": "/sbin/nope"}})
    outcome = one.deploy()
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert outcome.message == (
        f"Cannot deploy VM {one.vm_id}: cannot start /sbin/nope: there is no /sbin/nope in the root"
        " file system (but /sbin/init)"
    )
