"""What is asked of a running container is done with its own rights: no path of its tenant's is opened by the host."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.model import Init
from onelxc.root import record
from tests.node.test_life import SHORT, configured
from tests.node.test_live_disks import attach as attach_disk
from tests.node.test_live_disks import detach as detach_disk
from tests.node.test_live_disks import image
from tests.node.test_nics import attach as attach_nic
from tests.node.test_nics import detach as detach_nic
from tests.node.test_suspend import resume, suspend
from tests.support import images, machine
from tests.support.vms import MONITORD, Vm

NewVm = Callable[..., Vm]

HOST_NAME = "the-host"
INITCTL = ("/run/initctl", "/dev/initctl", "/etc/.initctl")
TELINIT = """\
#!/bin/sh
echo "level $1" >> /asked
grep -e CapEff -e CapBnd /proc/self/status >> /asked
cat /proc/self/uid_map >> /asked
exec sleep 3
"""


@pytest.fixture
def impostor(tree: Path, tmp_path: Path) -> Iterator[Path]:
    """A root whose init looks like sysvinit and is busybox, which hears nothing of it."""
    root = tmp_path / "root"
    machine.command("cp", "-a", str(tree), str(root))
    content = (root / "bin/busybox").read_bytes().replace(b"BusyBox v", b"BusyBOX v") + b"INIT_VERSION=sysvinit\0"
    (root / "sbin/init").unlink()
    (root / "sbin/init").write_bytes(content)
    (root / "sbin/init").chmod(0o755)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def host_name() -> Iterator[None]:
    """The name of this machine, which differs from what any test before may have made of it."""
    before = socket.gethostname()
    socket.sethostname(HOST_NAME)
    yield
    socket.sethostname(before)


def packed(root: Path) -> str:
    path = f"{root}.tar"
    images.tar(str(root), path)
    return path


def forged(one: Vm) -> Vm:
    found = record.read(one.vm_id)
    assert found is not None
    assert found.prepared.init is Init.SYSVINIT
    return one


@pytest.mark.usefixtures("host_name")
@pytest.mark.parametrize("action", ["shutdown", "reboot"])
@pytest.mark.parametrize("path", INITCTL)
def test_a_link_where_initctl_should_be_leads_nowhere(
    vm: NewVm, impostor: Path, form: dict[str, str], path: str, action: str
) -> None:
    """libvirt wrote 384 bytes into whatever the link named: with a proc of the container's own, the host's name."""
    one = forged(vm(packed(impostor), template=form).deployed().booted())
    mine = one.inside("hostname")
    one.inside(f"mkdir -p /p /run && mount -t proc proc /p && ln -s /p/sys/kernel/hostname {path}")
    with configured(one, SHORT):
        one.act(action).ok()
    assert socket.gethostname() == HOST_NAME
    assert action == "shutdown" or one.booted(2).inside("hostname") == mine


@pytest.mark.parametrize("path", INITCTL)
def test_nor_do_a_file_and_a_pipe_take_anything_or_wait(vm: NewVm, impostor: Path, path: str) -> None:
    one = forged(vm(packed(impostor)).deployed().booted())
    root = f"/var/lib/onelxc/mnt/{one.vm_id}/root"
    one.inside(f"mkdir -p /run; echo untouched > /kept; chmod 0 /kept; ln -s /kept {path}")
    with configured(one, SHORT):
        one.act("reboot").ok()
        one.booted(2)
        assert Path(f"{root}/kept").read_text() == "untouched\n"
        one.inside(f"mkdir -p /run; rm -f {path}; mkfifo {path}")
        one.act("reboot").ok()


def test_the_request_is_the_containers_own_command_with_its_rights(
    vm: NewVm, impostor: Path, form: dict[str, str]
) -> None:
    (impostor / "sbin/telinit").write_text(TELINIT)
    (impostor / "sbin/telinit").chmod(0o755)
    one = forged(vm(packed(impostor), template=form).deployed().booted())
    init = machine.init_pid(one.name)
    bounding = next(line for line in Path(f"/proc/{init}/status").read_text().splitlines() if "CapBnd" in line)
    ids = Path(f"/proc/{init}/uid_map").read_text().split()[2]
    with configured(one, SHORT):
        one.act("reboot").ok()
    one.booted(2)
    asked = one.inside("cat /asked").splitlines()
    assert asked[:3] == ["level 6", bounding.replace("CapBnd", "CapEff"), bounding]
    assert asked[3].split()[0] == "0"
    assert asked[3].split()[2] == ids
    with configured(one, SHORT):
        one.act("shutdown").ok()


TRAPS = (
    *INITCTL,
    "/dev/console", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/tty1",
    "/dev/ptmx", "/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/net/tun", "/dev/fuse",
    "/dev/loop-control", "/dev/log", "/run/netns/eth0", "/run/systemd/private", "/var/run/netns/eth0", "/etc/passwd",
    "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime", "/etc/mtab",
    "/etc/resolv.conf", "/etc/hostname", "/etc/hosts", "/etc/fstab", "/etc/machine-id",
)  # fmt: skip
SET_TRAPS = f"""
set -e
mkdir /trap
for path in {" ".join(TRAPS)}; do
    name=$(echo $path | tr / _)
    echo $path > /trap/$name
    mkdir -p ${{path%/*}}
    rm -rf $path 2>/trap/_rm || continue  # what libvirt has mounted
    ln -s /trap/$name $path
done
"""


class Traps:
    """Tells which files of a directory were opened, read, written or changed, by whomever."""

    EVENTS = 0x1 | 0x2 | 0x4 | 0x20  # IN_ACCESS, IN_MODIFY, IN_ATTRIB, IN_OPEN

    def __init__(self, directory: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self._fd, directory.encode(), self.EVENTS) >= 0

    def sprung(self) -> set[str]:
        """Since the last time."""
        try:
            events = os.read(self._fd, 1 << 20)
        except BlockingIOError:
            return set()
        found = set()
        while events:
            length = struct.unpack_from("iIII", events)[3]
            found.add(events[16 : 16 + length].rstrip(b"\0").decode())
            events = events[16 + length :]
        return found

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.generation(MONITORD)
def test_no_other_action_opens_anything_in_a_running_container(
    vm: NewVm, form: dict[str, str], bridge: str, image: str
) -> None:
    """What libvirt does for them stays outside: every place in /dev, /run and /etc that it might know is a link to a
    file that tells who opened it."""
    one = vm(images.busybox_ext4(), user_template=form)
    one.add_nic(bridge, IP="10.77.0.10")
    one.deployed().booted()
    one.inside(SET_TRAPS)
    traps = Traps(f"/var/lib/onelxc/mnt/{one.vm_id}/root/trap")
    one.inside("cat /etc/fstab")
    assert traps.sprung() == {"_etc_fstab"}
    attach_nic(one, bridge, IP="10.77.0.11").ok()
    detach_nic(one, 1).ok()
    attach_disk(one, image, TARGET="/media/data").ok()
    detach_disk(one, 1).ok()
    one.template.update({"MEMORY": "96", "CPU": "1", "VCPU": "2"})
    one.act("resize").ok()
    suspend(one)
    resume(one)
    for probe in ("vm/monitor/onelxc", "vm/status/onelxc"):
        assert one.driver.probe(f"onelxc-probes.d/{probe}", "lxc", 0, "node1").code == 0
    machine.command("/usr/sbin/onelxc-root", "refresh", one.name)
    assert traps.sprung() == set()
    one.act("reboot").ok()
    one.booted(2)
    assert traps.sprung() <= {"_etc_localtime"}  # busybox tells the time of its reboot
    traps.close()
    one.act("shutdown").ok()


__all__ = ["image"]
