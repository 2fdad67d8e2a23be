"""Is the machine that all node tests stand on what they take it for?"""

from __future__ import annotations

import os
import subprocess

from tests.support import images, leaks, machine
from tests.support.waiting import wait_until


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
