"""Containers in AppArmor's profiles: each start, whatever enters, and what they keep away."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from onelxc import containers, executions
from onelxc.config import HostConfig
from onelxc.root import apparmor, execution, orphans
from onelxc.root.journal import Journal
from onelxc.root.work import Work
from tests.support import hostconf, images, machine
from tests.support.vms import Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.emulated
NewVm = Callable[..., Vm]
PROFILE = "libvirt-onelxc-container"
SANDBOX = {
    "PrivateTmp": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateDevices": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "NoNewPrivileges": "yes",
}
"""What Debian's own units ask for."""


def init_of(one: Vm) -> int:
    (controller,) = [each.controller for each in containers.running() if each.vm_id == one.vm_id]
    (init,) = orphans.children(controller)
    return init


def label_of(one: Vm) -> str:
    return apparmor.label(init_of(one))


@pytest.mark.parametrize("kind", ["busybox", "systemd"])
def test_every_start_is_confined(vm: NewVm, kind: str) -> None:
    """The first, one that libvirt makes by itself after a reboot from inside, and one that the driver asks for."""
    image = images.busybox_tar() if kind == "busybox" else images.distribution_tar("systemd")
    one = vm(image, template={"MEMORY": "256"}).deployed().booted()
    assert label_of(one) == PROFILE
    assert Path(f"/proc/{init_of(one)}/attr/current").read_text().rstrip("\0\n") == f"{PROFILE} (enforce)"
    one.inside("reboot -f" if kind == "systemd" else "reboot", check=False)
    one.booted(2)
    assert label_of(one) == PROFILE
    one.act("reboot").ok()
    one.booted(3)
    assert label_of(one) == PROFILE
    one.act("shutdown").ok()


def test_a_service_manager_works(vm: NewVm) -> None:
    """No unit fails, and a service with a file system of its own starts: it mounts, and moves its root."""
    one = vm(images.distribution_tar("systemd"), template={"MEMORY": "256"}).deployed().booted()
    failed = one.inside("systemctl --failed --no-legend --plain", timeout_s=300)
    unit = "\n".join(f"{name}={value}" for name, value in SANDBOX.items())
    one.inside(
        f"printf '[Service]\nType=oneshot\nExecStart=/bin/true\n%s\n' '{unit}' > /run/systemd/system/own.service"
    )
    one.inside("systemctl daemon-reload; systemctl start own.service", timeout_s=300)
    journal = machine.command("journalctl", "-k", "-b", "--no-pager", "-o", "cat")
    denied = {line for line in journal.splitlines() if 'apparmor="DENIED"' in line and PROFILE in line}
    assert not denied, (failed, denied)


def run(one: Vm, text: str) -> str:
    """What a command says that the driver executes in the container, as `onevm exec` does."""
    work = Work(one.vm_id, "exec", Journal("/nonexistent", "exec"), HostConfig(), print)
    execution.start(work, {"command": text, "stdin": ""})
    wait_until(lambda: not executions.running(one.vm_id), "the end of the command", timeout_s=120)
    wait_until(executions.pending, "a result")
    (told,) = execution.finished(HostConfig(), {}, print)["vms"]
    return base64.b64decode(told["stdout"]).decode() + base64.b64decode(told["stderr"]).decode()


@pytest.fixture
def one(vm: NewVm) -> Vm:
    return vm(images.busybox_tar()).deployed().booted()


def test_a_command_is_confined_as_init_is(one: Vm) -> None:
    assert run(one, "cat /proc/self/attr/current").strip("\0\n ") == f"{PROFILE} (enforce)"


# root of the container may not write to most of this anyway; with the host's own ids it could
@pytest.mark.parametrize("way", ["unprivileged", "privileged"])
def test_what_is_the_hosts_is_kept_away(vm: NewVm, way: str) -> None:
    with hostconf.with_line('PRIVILEGED = "yes"'):
        form = {"LXC_UNPRIVILEGED": "no"} if way == "privileged" else {}
        one = vm(images.busybox_tar(), template=form).deployed().booted()
        assert one.privileged == (way == "privileged")
        for tried in ("echo b > /proc/sysrq-trigger", "cat /proc/kcore", "ls /sys/kernel/security"):
            assert "Permission denied" in run(one, f"({tried}) 2>&1 | head -c 200"), tried
        if way == "privileged":
            said = run(one, "mkdir -p /s; mount -t sysfs s /s 2>&1; echo; mount -o remount,rw /proc/sys 2>&1; ls /s")
            assert said.count("denied") + said.count("permitted") == 2, said


def test_no_seldom_used_kind_of_socket(one: Vm) -> None:
    """Asking for one loads its code into the host's kernel: AppleTalk, TIPC, RDS, vsock are refused before that."""
    code = """import socket, sys
open("/proc/self/attr/current", "w").write("changeprofile " + sys.argv[1])
for family in (5, 21, 30, 40):
    try: socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error: print(family, error.errno)
"""
    said = machine.command("/usr/bin/python3", "-c", code, label_of(one))
    assert said == "5 13\n21 13\n30 13\n40 13\n"


def test_it_can_be_turned_off(vm: NewVm) -> None:
    with hostconf.with_line('APPARMOR = "no"'):
        assert label_of(vm(images.busybox_tar()).deployed().booted()) == ""
        said = machine.command("/usr/sbin/onelxc-root", "check", "oneadmin", check=False)
        assert 'limited: containers are not confined by AppArmor: APPARMOR = "no" in host.conf' in said


def test_profiles_that_are_not_loaded_are_loaded(vm: NewVm) -> None:
    machine.command("apparmor_parser", "-R", apparmor.SOURCE)
    assert label_of(vm(images.busybox_tar()).deployed().booted()) == PROFILE
