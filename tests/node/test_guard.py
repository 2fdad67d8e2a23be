"""libvirt sets a container up inside a root that its tenant wrote: nothing of the host is ever left in it.

By the guard before every start, and, where that did not run or did not help, by a look at what is mounted after it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onelxc.config import HostConfig
from onelxc.model import VmPaths
from onelxc.root import inside
from tests.node.test_domain import PROFILES, file
from tests.node.test_nics import failure
from tests.node.test_probes import states as probed
from tests.node.test_reap import states
from tests.support import hostconf, images, machine
from tests.support.vms import MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
Change = Callable[[Path], object]
HOOKS = Path("/etc/libvirt/hooks")
HOOK = HOOKS / "lxc.d/onelxc"
KEPT = HOOKS / "kept"
HUB_LOG = Path("/var/log/onelxc/hub.log")


@pytest.fixture
def archive(tree: Path, tmp_path: Path) -> Callable[[Change], str]:
    """An archive of the busybox root after a change to it."""

    def make(change: Change) -> str:
        root = tmp_path / "changed"
        subprocess.run(["cp", "-a", str(tree), str(root)], check=True)
        change(root)
        images.tar(str(root), str(tmp_path / "changed.tar"))
        shutil.rmtree(root)
        return str(tmp_path / "changed.tar")

    return make


def data_image(tmp_path: Path, name: str, change: Change) -> str:
    """A data disk with something on it."""
    content = tmp_path / f"{name}.d"
    content.mkdir()
    change(content)
    return images.ext4(str(tmp_path / name), str(content), 8)


def iso(tmp_path: Path, path: str, *files: str) -> str:
    content = tmp_path / "context.d"
    content.mkdir()
    for name in files:
        (content / name).write_text("")
    machine.command("xorriso", "-as", "mkisofs", "-o", path, "-V", "CONTEXT", "-J", "-R", str(content))
    return path


def of_the_host(one: Vm) -> list[str]:
    """What the container has mounted that is the host's, or another VM's: looked at from outside."""
    mine = {mount.device for mount in machine.mounts() if mount.point.startswith(VmPaths(one.vm_id).mounts + "/")}
    hosts = {mount.device for mount in machine.mounts()} - mine
    lines = Path(f"/proc/{machine.init_pid(one.name)}/mountinfo").read_text().splitlines()
    return [
        line for line in lines if line.split()[2] in hosts and " - cgroup" not in line and " /sys/net/ipv" not in line
    ]


def refusal(one: Vm) -> str:
    """Why it is not deployed: one line."""
    said = failure(one, one.deploy())
    assert one.name not in machine.domains()
    before = f"Cannot deploy VM {one.vm_id}: "
    return said.replace(f"{before}cannot", "Cannot").replace(before, "")


def is_safe(one: Vm) -> None:
    """It runs, and the host is nowhere in it."""
    assert of_the_host(one) == []
    for name in (".oldroot", "proc", "sys", "dev"):
        path = Path(VmPaths(one.vm_id).root) / name
        assert path.is_dir()
        assert not path.is_symlink()


def reboots(one: Vm, times: int) -> None:
    """From inside, by its init, without the driver."""
    one.inside("reboot", check=False)
    one.booted(times)


def stays_off(one: Vm) -> None:
    wait_until(lambda: one.name not in machine.domains(), "its end")
    wait_until(lambda: states().get(one.vm_id, "off") == "off", "its release")
    assert one.name not in machine.domains()
    assert not os.path.exists(VmPaths(one.vm_id).state)


# S1


@pytest.mark.parametrize("text", ["media/x", "/media/x", "../../../media/x", "/", "/proc", "nowhere"])
def test_a_link_at_oldroot_before_a_reboot_from_inside(vm: NewVm, text: str) -> None:
    one, other = vm().deployed().booted(), vm().deployed().booted()
    one.inside(f"mkdir -p /media/x; rmdir /.oldroot; ln -s {text} /.oldroot")
    reboots(one, 2)
    is_safe(one)
    assert os.listdir(f"{VmPaths(one.vm_id).root}/media/x") == []
    assert other.act("cancel").ok().err == ""
    assert other.name not in machine.domains()
    wait_until(lambda: states() == {one.vm_id: "running"}, "nobody is at work on it")


@pytest.mark.parametrize("make", ["mkfifo /.oldroot", "echo kept > /.oldroot", "mknod /.oldroot p", "true"])
def test_anything_else_at_oldroot(vm: NewVm, make: str) -> None:
    one = vm().deployed().booted()
    one.inside(f"rmdir /.oldroot; {make}")
    reboots(one, 2)
    is_safe(one)


def test_proc_sys_and_dev_replaced_from_inside(vm: NewVm, form: dict[str, str]) -> None:
    """A mount of the root elsewhere shows what lies below what libvirt has mounted."""
    one = vm(user_template=form).deployed().booted()
    one.inside(
        "mkdir -p /under /media/x; mount --bind / /under; cd /under;"
        " rmdir proc sys; rm -rf dev; ln -s media/x proc; ln -s /media/x sys; echo no > dev; cd /; umount /under"
    )
    reboots(one, 2)
    is_safe(one)


@pytest.mark.parametrize("action", ["reboot", "reset", "restart"])
def test_a_link_made_inside_before_an_action_of_opennebula(vm: NewVm, action: str) -> None:
    one = vm().deployed().booted()
    one.inside("mkdir -p /media/x; rmdir /.oldroot; ln -s media/x /.oldroot")
    if action == "restart":
        one.act("shutdown").ok()
        one.deployed()
    else:
        one.act(action).ok()
    one.booted(2)
    is_safe(one)


def test_a_disk_that_is_full(vm: NewVm) -> None:
    """A directory may not be made then: the VM is refused or starts, and the host is safe."""
    one = vm().deployed().booted()
    one.inside(
        "mkdir -p /media/x; rmdir /.oldroot; ln -s media/x /.oldroot; dd if=/dev/zero of=/fill; sync", check=False
    )
    first = machine.init_pid(one.name)
    one.inside("reboot", check=False)
    wait_until(lambda: one.name not in machine.domains() or one.runs_anew(first), "an end or a start")
    if one.name in machine.domains():
        one.booted(2)
        is_safe(one)


def test_a_mount_over_oldroot_inside_is_gone_with_its_container(vm: NewVm) -> None:
    one = vm().deployed().booted()
    one.inside("mkdir -p /media/x; mount --bind /media/x /.oldroot; mount -t tmpfs none /media")
    reboots(one, 2)
    is_safe(one)


# S2


@pytest.mark.parametrize("name", [".oldroot", "proc", "sys", "dev"])
@pytest.mark.parametrize("text", ["media/x", "/", "../../../../etc"])
def test_a_link_in_an_archive(vm: NewVm, archive: Callable[[Change], str], name: str, text: str) -> None:
    def change(root: Path) -> None:
        (root / "media/x").mkdir(parents=True)
        if (root / name).exists():
            shutil.rmtree(root / name)
        (root / name).symlink_to(text)

    one = vm(archive(change)).deployed().booted()
    is_safe(one)
    assert os.listdir(f"{VmPaths(one.vm_id).root}/media/x") == []


def test_an_image_whose_oldroot_cannot_be_replaced(vm: NewVm, tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", str(tree), str(root)], check=True)
    (root / ".oldroot").write_text("")
    image = images.ext4(str(tmp_path / "image"), str(root))
    machine.command("debugfs", "-w", "-R", "sif /.oldroot flags 0x80010", image)
    assert refusal(vm(image)) == ("Cannot make /.oldroot a directory of the root file system: Operation not permitted")


@pytest.mark.parametrize("text", ["proc", ""])
def test_a_read_only_root_has_to_have_them(vm: NewVm, tree: Path, tmp_path: Path, text: str) -> None:
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", str(tree), str(root)], check=True)
    if text:
        (root / ".oldroot").symlink_to(text)
    one = vm(None)
    one.add_disk(images.ext4(str(tmp_path / "without"), str(root)), READONLY="YES")
    assert refusal(one) == "Cannot make /.oldroot a directory of the root file system: Read-only file system"
    (root / ".oldroot").unlink(missing_ok=True)
    (root / ".oldroot").mkdir()
    other = vm(None)
    other.add_disk(images.ext4(str(tmp_path / "with"), str(root)), READONLY="YES")
    other.deployed()
    wait_until(lambda: states() == {other.vm_id: "running"}, "it runs")
    is_safe(other)


@contextlib.contextmanager
def privileged() -> Iterator[dict[str, str]]:
    """The form of a template for which root inside is root of the host."""
    with hostconf.with_line('PRIVILEGED = "yes"'):
        yield {"LXC_UNPRIVILEGED": "no"}


# S3


@pytest.mark.parametrize(
    "target", ["/proc", "/proc/", "//proc", "/./proc", "/sys", "/dev", "/.oldroot", "/proc/x", "/dev/shm/x"]
)
def test_a_data_disk_over_what_is_libvirts(vm: NewVm, tmp_path: Path, target: str) -> None:
    one = vm()
    one.add_disk(data_image(tmp_path, "data", lambda top: (top / "mounts").write_text("")), TARGET=target)
    first = "/.oldroot" if "oldroot" in target else "/" + target.strip("/.").split("/")[0]
    assert refusal(one).endswith(f" in the container: {first} is the container's own")


@pytest.mark.parametrize("text", ["/proc", "../proc", "/x/../proc", "/hop", "../../../../../proc"])
def test_a_data_disk_behind_a_link(vm: NewVm, archive: Callable[[Change], str], tmp_path: Path, text: str) -> None:
    def change(root: Path) -> None:
        (root / "media").mkdir()
        (root / "x").mkdir()
        (root / "hop").symlink_to("proc")
        (root / "media/d").symlink_to(text)

    one = vm(archive(change))
    one.add_disk(data_image(tmp_path, "data", lambda top: (top / "mounts").write_text("")), TARGET="/media/d")
    assert refusal(one) == (
        "Cannot mount at /media/d in the container: it leads to /proc, which is the container's own"
    )


def test_a_link_on_a_disk_that_is_mounted_before(vm: NewVm, tmp_path: Path) -> None:
    one = vm()
    one.add_disk(data_image(tmp_path, "one", lambda top: (top / "x").symlink_to("/proc")), TARGET="/media/d")
    one.add_disk(data_image(tmp_path, "two", lambda top: (top / "mounts").write_text("")), TARGET="/media/d/x")
    assert refusal(one) == (
        "Cannot mount at /media/d/x in the container: it leads to /proc, which is the container's own"
    )


def test_disks_in_disks_and_behind_harmless_links_run(
    vm: NewVm, archive: Callable[[Change], str], tmp_path: Path
) -> None:
    one = vm(archive(lambda root: (root / "data").symlink_to("var")))
    one.add_disk(data_image(tmp_path, "one", lambda top: (top / "x").mkdir()), TARGET="/data/d")
    one.add_disk(data_image(tmp_path, "two", lambda top: (top / "here").write_text("")), TARGET="/var/d/x")
    one.deployed().booted()
    assert one.inside("ls /var/d/x").split() == ["here", "lost+found"]
    reboots(one, 2)
    assert one.inside("ls /data/d/x").split() == ["here", "lost+found"]
    is_safe(one)


def test_a_target_turned_into_a_link_inside_ends_at_the_next_reboot(vm: NewVm, tmp_path: Path) -> None:
    one = vm()
    one.add_disk(data_image(tmp_path, "data", lambda top: (top / "mounts").write_text("")), TARGET="/media/d")
    one.deployed().booted()
    one.inside("umount /media/d; rmdir /media/d; ln -s /proc /media/d; reboot", check=False)
    stays_off(one)
    why = "Cannot mount at /media/d in the container: it leads to /proc, which is the container's own"
    assert f"{one.name}: not started: {why}\n" in HUB_LOG.read_text()
    assert refusal(one) == why


# S4


def test_context_behind_a_link(vm: NewVm, archive: Callable[[Change], str], tmp_path: Path) -> None:
    one = vm(archive(lambda root: (root / "context").symlink_to("proc")), template={"CONTEXT": {"DISK_ID": "1"}})
    one.give(iso(tmp_path, one.path("disk.1"), "mounts"))
    assert refusal(one) == (
        "Cannot mount at /context in the container: it leads to /proc, which is the container's own"
    )


# what the administrator mounts


def profile(mounted: str) -> str:
    return f"<devices>{mounted}</devices>"


@pytest.mark.parametrize(
    "mounted,why",
    [
        (
            "<filesystem type='ram'><source usage='1024' units='KiB'/><target dir='/link/x'/></filesystem>",
            "leads to /proc",
        ),
        ("<filesystem type='ram'><source usage='1024' units='KiB'/><target dir='/proc'/></filesystem>", "/proc is"),
        ("<filesystem type='mount'><source dir='/srv'/><target dir='/link'/></filesystem>", "leads to /proc"),
        ("<filesystem type='mount'><source dir='/nowhere'/><target dir='/srv'/></filesystem>", "is not there"),
        ("<filesystem type='bind'><source dir='/to-host'/><target dir='/srv'/></filesystem>", "leads to /.oldroot"),
    ],
)
def test_profiles(vm: NewVm, archive: Callable[[Change], str], mounted: str, why: str) -> None:
    def change(root: Path) -> None:
        (root / "link").symlink_to("proc")
        (root / "to-host").symlink_to(".oldroot")
        (root / "nowhere").symlink_to("/etc")

    with file(f"{PROFILES}/guard.xml", profile(mounted)), hostconf.with_line('PROFILES = "guard"'):
        one = vm(archive(change), user_template={"LXC_PROFILES": "guard"})
        assert why in refusal(one)


def test_a_share_of_the_administrators_is_nothing_of_the_host(vm: NewVm) -> None:
    share = Path("/srv/sha re")
    (share / "sub").mkdir(parents=True)
    mounted = f"<filesystem type='mount'><source dir='{share}'/><target dir='/share'/></filesystem>"
    memory = "<filesystem type='ram'><source usage='1024' units='KiB'/><target dir='/dev/shm'/></filesystem>"
    with file(f"{PROFILES}/guard.xml", profile(mounted + memory)), hostconf.with_line('PROFILES = "guard"'):
        one = vm(user_template={"LXC_PROFILES": "guard"}).deployed().booted()
        one.inside("mkdir /more; mount --bind /share/sub /more")
        assert states() == {one.vm_id: "running"}
        probe_says(one, "RUNNING")
        reboots(one, 2)
        assert states() == {one.vm_id: "running"}


# where the guard does not run


def restart_libvirtd() -> None:
    with machine.libvirtd_away("stop"):
        pass


@pytest.fixture
def without_hook() -> Iterator[Callable[[], None]]:
    """The administrator takes the hook away; a libvirtd that was started before it was put there runs at the end."""

    def remove() -> None:
        HOOK.rename(KEPT)

    yield remove
    if KEPT.exists():
        KEPT.rename(HOOK)
    restart_libvirtd()


def test_no_deploy_without_the_hook(vm: NewVm, without_hook: Callable[[], None]) -> None:
    without_hook()
    one = vm()
    assert refusal(one) == (
        f"Ended {one.name}: libvirt started it without OneLXC's guard, there is no {HOOK}: run `install.sh node`, and"
        " start the VM again"
    )
    assert one.name not in machine.domains()


def test_no_deploy_with_a_libvirtd_that_has_not_seen_the_hook(vm: NewVm, without_hook: Callable[[], None]) -> None:
    without_hook()
    restart_libvirtd()
    KEPT.rename(HOOK)
    one = vm()
    assert refusal(one) == (
        f"Ended {one.name}: libvirt started it without OneLXC's guard, {HOOK} did not run: restart libvirtd, which"
        " looks for hooks when it starts, and start the VM again"
    )
    restart_libvirtd()
    one.deployed().booted()


def test_a_reboot_from_inside_without_the_hook_is_the_end(vm: NewVm, without_hook: Callable[[], None]) -> None:
    one, other = vm().deployed().booted(), vm().deployed().booted()
    without_hook()
    one.inside("mkdir -p /media/x; rmdir /.oldroot; ln -s media/x /.oldroot; reboot", check=False)
    stays_off(one)
    assert f"Ended {one.name}: libvirt started it without OneLXC's guard" in HUB_LOG.read_text()
    assert other.act("cancel").ok().err == ""


def test_a_reboot_action_without_the_hook_fails(vm: NewVm, without_hook: Callable[[], None]) -> None:
    one = vm().deployed().booted()
    without_hook()
    assert "without OneLXC's guard" in failure(one, one.act("reboot"))
    stays_off(one)


def test_a_hook_that_is_put_later_ends_nobody_who_runs(vm: NewVm, without_hook: Callable[[], None]) -> None:
    """Containers from before an upgrade of the driver."""
    one = vm().deployed().booted()
    shutil.rmtree("/run/onelxc/guard")
    without_hook()
    assert states() == {one.vm_id: "running"}
    KEPT.rename(HOOK)
    HOOK.chmod(0o755)
    assert states() == {one.vm_id: "running"}
    reboots(one, 2)
    assert states() == {one.vm_id: "running"}


def test_hooks_of_others_are_called_as_well(vm: NewVm, tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = f'#!/bin/sh\necho "$0 $1 $2" >> {said}\n'
    others = (HOOKS / "lxc", HOOKS / "lxc.d/00-first", HOOKS / "lxc.d/zz-last")
    try:
        for path in others:
            path.write_text(script)
            path.chmod(0o755)
        one = vm().deployed().booted()
        one.inside("mkdir -p /media/x; rmdir /.oldroot; ln -s media/x /.oldroot")
        said.unlink()
        reboots(one, 2)
        is_safe(one)
        assert [line for line in said.read_text().splitlines() if " start" in line][:3] == [
            f"{path} {one.name} start" for path in others
        ]
    finally:
        for path in others:
            path.unlink(missing_ok=True)


# the second line


def probe_says(one: Vm, state: str) -> None:
    """The status probe, as monitord calls it."""
    assert probed(one.driver)[one.vm_id] == state


def held_by_the_host(one: Vm, source: str) -> None:
    """Put a file system of the host into a running container, as a hole would."""
    base = None if one.privileged else HostConfig().first_id(one.vm_id)
    inside.attach(machine.init_pid(one.name), source, "/media/of-the-host", base)


@pytest.mark.parametrize("source", ["/", "/run", "/dev", "/proc"])
def test_what_holds_the_host_is_ended(vm: NewVm, source: str) -> None:
    one, other = vm().deployed().booted(), vm().deployed().booted()
    held_by_the_host(one, source)
    assert states() == {one.vm_id: "off", other.vm_id: "running"}
    assert f"ended {one.name}: it held a file system of the host: " in HUB_LOG.read_text()
    stays_off(one)
    one.deployed().booted(2)
    assert states() == {one.vm_id: "running", other.vm_id: "running"}


def test_what_holds_another_vms_disk_is_ended(vm: NewVm) -> None:
    one, other = vm().deployed().booted(), vm().deployed().booted()
    held_by_the_host(one, VmPaths(other.vm_id).root)
    assert states() == {one.vm_id: "off", other.vm_id: "running"}
    assert other.act("cancel").ok().err == ""


def test_the_status_probe_sees_it(vm: NewVm) -> None:
    one = vm().deployed().booted()
    probe_says(one, "RUNNING")
    held_by_the_host(one, "/")
    probe_says(one, "POWEROFF")
    assert one.name not in machine.domains()


def test_a_second_namespace_hides_nothing(vm: NewVm) -> None:
    one = vm().deployed().booted()
    subprocess.Popen(
        ["nsenter", "-t", str(machine.init_pid(one.name)), "-a", "/bin/unshare", "-m", "/bin/sleep", "997"],
        stdin=subprocess.DEVNULL,
    )
    wait_until(
        lambda: any(machine.command_line(pid) == "/bin/sleep 997" for pid in machine.pids()), "another namespace"
    )
    sleeper = next(pid for pid in machine.pids() if machine.command_line(pid) == "/bin/sleep 997")
    machine.join(
        one.name, int(Path(f"/proc/{sleeper}/status").read_text().partition("NSpid:")[2].split("\n")[0].split()[-1])
    )
    inside.attach(sleeper, "/", "/media/of-the-host", HostConfig().first_id(one.vm_id))
    assert states() == {one.vm_id: "off"}


def test_what_root_inside_mounts_itself_is_its_own(vm: NewVm, tmp_path: Path) -> None:
    made = vm()
    made.add_disk(data_image(tmp_path, "data", lambda top: (top / "sub").mkdir()), TARGET="/media/d")
    one = made.deployed().booted()
    one.inside(
        "mkdir -p /m/tmp /m/proc /m/sys /m/over /m/bind /m/disk /o/u /o/w; mount -t tmpfs none /m/tmp;"
        " mount -t proc none /m/proc; mount -t sysfs none /m/sys; mount --bind /etc /m/bind;"
        " mount --bind /media/d/sub /m/disk;"
        " mkdir /m/tmp/u /m/tmp/w; mount -t overlay -o lowerdir=/etc,upperdir=/m/tmp/u,workdir=/m/tmp/w none /m/over"
    )
    assert of_the_host(one) == []
    assert states() == {one.vm_id: "running"}
    probe_says(one, "RUNNING")


def test_a_table_of_thousands_of_mounts(vm: NewVm) -> None:
    """Longer than a probe reads; the helper reads it to its end."""
    one = vm().deployed().booted()
    name = "n" * 200
    one.inside(f"mkdir /{name}; i=0; while [ $i -lt 1500 ]; do mount --bind /{name} /{name}; i=$((i+1)); done")
    assert states() == {one.vm_id: "running"}
    probe_says(one, "RUNNING")
    held_by_the_host(one, "/run")
    assert states() == {one.vm_id: "off"}


def test_a_privileged_container_may_have_the_kernels_interfaces(vm: NewVm) -> None:
    with privileged() as form:
        one = vm(user_template=form).deployed().booted()
        one.inside("mkdir /m; mount -t tracefs none /m || mount -t debugfs none /m || mount -t devtmpfs none /m")
        assert states() == {one.vm_id: "running"}
        held_by_the_host(one, "/")
        assert states() == {one.vm_id: "off"}
