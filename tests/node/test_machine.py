"""Is the machine that all node tests stand on what they take it for?"""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.support import images, leaks, machine
from tests.support.frontends import REPOSITORY
from tests.support.waiting import wait_until

ALONE = os.path.join(REPOSITORY, "tests/alone")
FREEZER = next(path for path in ("/sys/fs/cgroup/freezer", "/sys/fs/cgroup") if os.path.exists(f"{path}/cgroup.procs"))


def test_libvirt_answers_with_no_domain_of_others() -> None:
    assert machine.domains() == {}


def test_oneadmin_reaches_libvirt() -> None:
    machine.command("runuser", "-u", "oneadmin", "--", "virsh", "-c", "lxc:///", "list")


def test_network_is_its_own() -> None:
    """Nothing that a test does to a link reaches the network of whoever runs the tests."""
    virtual = os.listdir("/sys/devices/virtual/net")
    assert machine.links() - set(virtual) - {"bonding_masters"} == set()
    assert machine.command("ip", "route", "show", "default") == ""


def test_leak_check_sees_each_kind(tmp_path: object) -> None:
    """A check that sees nothing would be worth nothing."""
    before = leaks.snapshot()
    image = "/var/lib/one/leak.img"
    mounted = "/var/lib/onelxc/leak"
    os.makedirs(mounted)
    machine.command("cp", "--sparse=always", images.busybox_ext4(), image)
    machine.command("mount", "-o", "loop", image, mounted)
    machine.command("ip", "link", "add", "one-0-0", "type", "veth", "peer", "name", "vnetx")
    # the name counts on a host with systemd, where processes come and go that are not ours
    sleeper = subprocess.Popen(["onelxc-leak", "1000"], executable="/bin/sleep")
    group = next(path for path in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if os.path.isdir(path))
    os.makedirs(f"{group}/machine/lxc-1-one-0.libvirt-lxc")
    try:
        kinds = {line.split(":")[0] for line in leaks.snapshot().added_since(before)}
        assert kinds == {"mounts", "loops", "links", "processes", "cgroups", "files"}
    finally:
        sleeper.kill()
        sleeper.wait()
        machine.command("umount", mounted)
        machine.command("ip", "link", "delete", "one-0-0")
        os.rmdir(f"{group}/machine/lxc-1-one-0.libvirt-lxc")
        os.unlink(image)
        os.rmdir(mounted)
    leaks.assert_none_since(before)


def test_libvirtd_can_be_taken_away() -> None:
    with machine.libvirtd_away():
        wait_until(lambda: subprocess.run(["virsh", "-c", "lxc:///", "list"], capture_output=True).returncode != 0)
    assert machine.domains() == {}


def test_machines_in_different_pid_namespaces_keep_their_control_groups() -> None:
    """Each is process 1 of its own, sees none of the other's processes, and tidies up at its start and its end."""
    top = FREEZER
    environment = {**os.environ, "ALONE_LIBVIRTD": "no"}

    def begin(script: str) -> subprocess.Popen[str]:
        argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", ALONE, "bash", "-euc", script]
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def groups() -> set[str]:
        return {name for name in os.listdir(top) if name.startswith("onelxc-alone")}

    first = begin(f"mkdir -p {top}/empty/below; echo made; read -r; ls -d {top}/empty/below")
    assert first.stdin and first.stdout
    assert first.stdout.readline() == "made\n"
    own = groups()
    assert len(own) == 1
    second, third = (begin("true") for _ in range(2))
    assert [one.wait(60) for one in (second, third)] == [0, 0]
    assert groups() == own
    assert first.communicate("\n", timeout=60)[0] == f"{top}/empty/below\n"
    assert (first.returncode, groups()) == (0, set())


def test_what_a_killed_machine_left_is_removed_by_the_next() -> None:
    os.makedirs(f"{FREEZER}/onelxc-alone.1/below")
    machine.command(ALONE, "true")
    assert not os.path.exists(f"{FREEZER}/onelxc-alone.1")


@pytest.mark.parametrize("how", ["ends", "is terminated", "is killed"])
def test_a_frozen_process_ends_with_its_machine(how: str) -> None:
    """A suspended container stayed, and its machine waited for it; SIGKILL does not reach what is frozen."""
    state, word = ("freezer.state", "FROZEN") if FREEZER.endswith("/freezer") else ("cgroup.freeze", "1")
    script = (
        f"mkdir {FREEZER}/still; sleep 1234 & echo $! > {FREEZER}/still/cgroup.procs;"
        f" echo {word} > {FREEZER}/still/{state}; echo still; read -r"
    )
    environment = {**os.environ, "ALONE_LIBVIRTD": "no"}
    one = subprocess.Popen(
        [ALONE, "bash", "-euc", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert one.stdin and one.stdout
    assert one.stdout.readline() == "still\n"
    if how == "ends":
        one.stdin.write("\n")
        one.stdin.flush()
    else:
        one.send_signal(signal.SIGTERM if how == "is terminated" else signal.SIGKILL)
    one.wait(60)
    one.stdin.close()
    one.stdout.close()
    if how == "is killed":
        machine.command(ALONE, "true")
    assert not [pid for pid in machine.pids() if "sleep 1234" in machine.command_line(pid)]
    assert not [name for name in os.listdir(FREEZER) if name.startswith("onelxc-alone")]
