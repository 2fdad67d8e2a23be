"""The life of a VM of OpenNebula 3.2.1, on real containers: started, asked to stop and to reboot, whatever its init."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.support import images, machine
from tests.support.vms import HOST, Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]

IMAGES: dict[str, Callable[[], str]] = {
    "busybox": images.busybox_tar,
    "process": images.one_process_tar,
    "sysvinit": lambda: images.distribution_tar("sysvinit"),
    "systemd": lambda: images.distribution_tar("systemd"),
}
SHORT = "TIMEOUTS = [ SHUTDOWN_TIMEOUT = 3, REBOOT_TIMEOUT = 3 ]"


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_what_it_wrote_is_there_after_every_kind_of_restart(vm: NewVm, kind: str) -> None:
    init = vm(IMAGES[kind](), template={"MEMORY": "256"}).deployed().booted()
    init.inside("echo kept > /root/kept")
    first = machine.init_pid(init.name)
    init.act("reboot").ok()
    init.booted(2)
    assert init.running
    assert machine.init_pid(init.name) != first
    assert init.inside("cat /root/kept") == "kept\n"

    with configured(init, SHORT if kind == "process" else ""):
        outcome = init.act("shutdown").ok()
    assert outcome.out == ""
    assert init.name not in machine.domains()
    assert [mount.point for mount in machine.mounts() if f"/{init.vm_id}/" in mount.point] == []

    init.deployed().booted(3)
    assert init.inside("cat /root/kept") == "kept\n"


@pytest.mark.parametrize("kind", ["busybox", "sysvinit", "systemd"])
def test_reboot_from_inside_goes_on_with_the_same_disks(vm: NewVm, kind: str) -> None:
    one = vm(IMAGES[kind](), template={"MEMORY": "256"}).deployed().booted()
    first = machine.init_pid(one.name)
    one.inside("reboot -f" if kind == "systemd" else "reboot", check=False)
    one.booted(2)
    assert machine.init_pid(one.name) != first


def test_power_off_from_inside_lets_go_of_everything_when_the_next_poll_sees_it(vm: NewVm, clean: None) -> None:
    one = vm().deployed().booted()
    one.inside("sync; poweroff", check=False)
    wait_until(lambda: one.name not in machine.domains(), "the container has ended")
    assert one.act("poll").ok().out.split()[0] == "STATE=d"
    assert [mount.point for mount in machine.mounts() if f"/{one.vm_id}/" in mount.point] == []


def test_a_second_deploy_of_a_living_container_answers_its_id_and_touches_nothing(vm: NewVm) -> None:
    one = vm().deployed().booted()
    first = machine.init_pid(one.name)
    one.deployed()
    assert machine.init_pid(one.name) == first


def test_cancel_is_quick_and_cancelling_again_is_success(vm: NewVm) -> None:
    one = vm().deployed().booted()
    assert one.act("cancel").ok().out == ""
    assert one.name not in machine.domains()
    assert one.act("cancel").ok().err == ""


def test_cancel_with_an_empty_deploy_id_ends_the_container(vm: NewVm) -> None:
    one = vm().deployed()
    one.driver("cancel", HOST, one.vm_id, HOST).ok()
    assert one.name not in machine.domains()


def test_a_chatty_container_is_not_stopped_by_its_console(vm: NewVm) -> None:
    """libvirt's pty takes some 37 kB; then whoever writes to it waits until somebody reads."""
    one = vm().deployed().booted()
    line = "one of many lines for a console that somebody has to read"
    one.inside(f"i=0; while [ $i -lt 4000 ]; do echo {line}; i=$((i+1)); done > /dev/console; echo done > /root/done")
    assert one.inside("cat /root/done") == "done\n"
    one.act("shutdown").ok()


def test_one_image_runs_as_many_vms_at_once_and_names_no_path_of_the_host(vm: NewVm) -> None:
    several = [vm() for _ in range(3)]
    running = [one.start_deploy() for one in several]
    for one, action in zip(several, running):
        assert action.wait().ok().out == f"{one.name}\n"
    for one in several:
        one.booted()
        one.inside(f"echo {one.name} > /root/name")
        inside = one.inside("cat /proc/mounts; env; grep -rl -e /var/lib/one -e onelxc /etc /root 2>/dev/null; true")
        assert "/var/lib/one" not in inside
    assert [one.inside("cat /root/name") for one in several] == [f"{one.name}\n" for one in several]


def test_containers_have_id_ranges_of_their_own(vm: NewVm) -> None:
    first, second = vm().deployed(), vm().deployed()
    starts = set()
    for one in (first, second):
        pid = machine.init_pid(one.name)
        with open(f"/proc/{pid}/uid_map") as file:
            inside, outside, count = map(int, file.read().split())
        assert (inside, count) == (0, 65536)
        starts.add(outside)
    assert len(starts) == 2
    assert 0 not in starts


def test_sudo_keeps_its_mode_and_works_in_an_unprivileged_container(vm: NewVm) -> None:
    one = vm(IMAGES["systemd"](), template={"MEMORY": "256"}).deployed().booted()
    with open(f"/proc/{machine.init_pid(one.name)}/uid_map") as file:
        assert file.read().split()[1] != "0"
    assert one.inside("stat -c '%a %u:%g' /usr/bin/sudo") == "4755 0:0\n"
    assert one.inside("sudo -n id -u", uid=1000) == "0\n"
    assert one.inside("sudo -n sh -c 'echo by root > /etc/by-root; stat -c %u /etc/by-root'", uid=1000) == "0\n"


def test_file_capabilities_survive_the_import_and_work(vm: NewVm) -> None:
    """ping of a distribution has cap_net_raw instead of suid; a user may use it."""
    one = vm(IMAGES["systemd"](), template={"MEMORY": "256"}).deployed().booted()
    pid = machine.init_pid(one.name)
    assert os.getxattr(f"/proc/{pid}/root/usr/bin/ping", "security.capability")
    assert one.inside("ping -c 1 -W 5 127.0.0.1 >/dev/null && echo answered", uid=1000) == "answered\n"


def test_a_shutdown_that_init_does_not_hear_is_forced_in_time(vm: NewVm) -> None:
    """A plain process as init ignores SIGTERM, as the kernel has it for process 1."""
    one = vm(images.one_process_tar()).deployed().booted()
    with configured(one, SHORT):
        one.act("shutdown").ok()
    assert one.name not in machine.domains()


def test_a_shutdown_that_must_not_be_forced_fails_in_words_and_the_container_goes_on(vm: NewVm) -> None:
    one = vm(images.one_process_tar()).deployed().booted()
    with configured(one, 'TIMEOUTS = [ SHUTDOWN_TIMEOUT = 2, SHUTDOWN_FORCE = "no" ]'):
        outcome = one.act("shutdown")
    assert outcome.code == 1
    assert one.driver.message(outcome) == f"Cannot shut down {one.name}: its init (other) did not end within 2 s"
    assert one.running
    assert one.inside("echo still here") == "still here\n"


def test_cancel_breaks_off_a_shutdown_that_waits(vm: NewVm) -> None:
    one = vm(images.one_process_tar()).deployed().booted()
    waiting = one.start("shutdown")
    wait_until(lambda: os.path.exists(f"/run/onelxc/lock/{one.vm_id}"), "the shutdown holds the lock")
    one.act("cancel").ok()
    assert waiting.wait().code == 1
    assert one.name not in machine.domains()


def test_killed_processes_of_a_container_are_its_end_and_deploy_starts_it_anew(vm: NewVm) -> None:
    one = vm().deployed().booted()
    one.inside("echo kept > /root/kept; sync")
    os.kill(machine.init_pid(one.name), signal.SIGKILL)
    wait_until(lambda: one.name not in machine.domains(), "the container has ended")
    one.deployed().booted(2)
    assert one.inside("cat /root/kept") == "kept\n"


@contextlib.contextmanager
def configured(one: Vm, text: str) -> Iterator[None]:
    """The operator's defaults, as they are on the host, with lines of one's own for a while."""
    path = os.path.join(one.driver.directory, "vmm_exec_lxc.conf")
    with open(path) as file:
        before = file.read()
    try:
        with open(path, "w") as file:
            file.write(f"{before}\n{text}\n")
        yield
    finally:
        with open(path, "w") as file:
            file.write(before)


def test_several_systemds_at_once(vm: NewVm) -> None:
    """On hosts with version 1 of control groups and no systemd, libvirt shows all containers one hierarchy for them."""
    several = [vm(IMAGES["systemd"](), template={"MEMORY": "256"}).deployed() for _ in range(2)]
    for one in several:
        one.booted()
        assert one.inside("systemctl is-active multi-user.target") == "active\n"
        assert one.inside("systemctl list-units --failed --plain --no-legend --type=service") == ""
        one.inside("systemd-run --unit=probe sh -c 'cat /proc/self/cgroup > /probe'")
        wait_until(lambda: "probe.service" in one.inside("cat /probe", check=False), "a service runs in its group")  # noqa: B023
    several[0].inside("reboot", check=False)
    several[0].booted(2)
    assert several[0].inside("systemctl is-active multi-user.target") == "active\n"
    several[1].act("shutdown").ok()
    several[0].act("reboot").ok()
    several[0].booted(3)
    assert several[0].inside("systemctl show -p ControlGroup --value systemd-journald.service") != ""
