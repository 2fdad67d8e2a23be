"""What is on this host right now? Domains, mounts, loop devices, links, cgroups, processes: asked of the kernel and of
libvirt, never of the driver that is being tested.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import libvirt

LOOP_GET_STATUS64 = 0x4C05


def command(*argv: str, stdin: str | None = None, timeout_s: float = 60, check: bool = True) -> str:
    """stdout of a program that has to succeed."""
    done = subprocess.run(
        argv,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert not check or done.returncode == 0, f"{argv}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


LIBVIRTD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bin/libvirtd")


@contextlib.contextmanager
def libvirtd_away(how: str = "kill") -> Iterator[None]:
    """libvirtd crashes (`how` "stop": is stopped), and is started again whatever happens meanwhile."""
    command(LIBVIRTD, how)
    try:
        yield
    finally:
        command(LIBVIRTD, "start")


def restart_libvirtd() -> None:
    """It crashes and is started again; it answers when this returns."""
    with libvirtd_away():
        pass


def domains() -> dict[str, int]:
    """Every domain that libvirt knows with its state, VIR_DOMAIN_*; inactive ones too."""
    connection = libvirt.open("lxc:///")
    found = {}
    try:
        for domain in connection.listAllDomains():
            try:
                found[domain.name()] = domain.state()[0]
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                    raise
                # it ended since it was listed
        return found
    finally:
        connection.close()


def domain_xml(name: str) -> str:
    connection = libvirt.open("lxc:///")
    try:
        return str(connection.lookupByName(name).XMLDesc())
    finally:
        connection.close()


def init_pid(name: str) -> int:
    """The pid, seen from here, of the container's process 1. The domain's id is the pid of its controller."""
    connection = libvirt.open("lxc:///")
    try:
        controller = connection.lookupByName(name).ID()
    finally:
        connection.close()
    for pid in pids():
        try:
            with open(f"/proc/{pid}/stat") as stat:
                parent = int(stat.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{pid}/status") as status:
                numbers = re.search(r"^NSpid:(.*)$", status.read(), re.MULTILINE)
        except OSError:
            continue
        if parent == controller and numbers and numbers.group(1).split()[-1] == "1":
            return pid
    raise AssertionError(f"the domain {name} has no process 1")


def control_groups(name: str) -> list[str]:
    """The directories that the container's processes are in, one for each controller."""
    found = [path for path in cgroups() if name in path.replace(r"\x2d", "-")]
    return [f"{path}/libvirt" if os.path.isdir(f"{path}/libvirt") else path for path in found]


def join(name: str, pid: int) -> None:
    """Put a process that `inside` started into the container's control groups. `pid` is as seen inside."""
    space = os.readlink(f"/proc/{init_pid(name)}/ns/pid")
    for each in pids():
        try:
            with open(f"/proc/{each}/status") as status:
                numbers = re.search(r"^NSpid:(.*)$", status.read(), re.MULTILINE)
            same = os.readlink(f"/proc/{each}/ns/pid") == space
        except OSError:
            continue
        if same and numbers and int(numbers.group(1).split()[-1]) == pid:
            for group in control_groups(name):
                with open(f"{group}/cgroup.procs", "w") as procs:
                    procs.write(str(each))
            return
    raise AssertionError(f"{name} has no process {pid}")


def inside(name: str, shell: str, *, timeout_s: float = 30, check: bool = True, uid: int = 0) -> str:
    """stdout of a shell command run in all namespaces of the container, as its root."""
    pid = init_pid(name)
    mine, theirs = (os.readlink(f"/proc/{who}/ns/user") for who in ("self", pid))
    argv = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "nsenter", "-t", str(pid), "-m", "-u", "-i", "-n", "-p"]
    if mine != theirs:
        argv.append("-U")
    argv += ["-S", str(uid), "-G", str(uid), "/bin/sh", "-c", shell]
    return command(*argv, timeout_s=timeout_s, check=check)


def pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def started(pid: int) -> int:
    """When a process began, in the kernel's ticks: the same number inside of a container as outside."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def command_line(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Mount:
    device: str
    root: str
    point: str
    kind: str
    source: str


def mounts() -> list[Mount]:
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            fields, (kind, source) = left.split(" "), right.split(" ")[:2]
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match.group(1), 8)), fields[4])
            found.append(Mount(fields[2], fields[3], point, kind, source))
    return found


def loops() -> dict[str, str]:
    """Loop devices with their backing file, of this machine: its file system is the one mounted at its path.

    /dev is shared with other machines that run tests, where the same path is on another file system.
    """
    here = sorted(mounts(), key=lambda mount: len(mount.point))
    found = {}
    for name in sorted(os.listdir("/sys/block")):
        backing = f"/sys/block/{name}/loop/backing_file"
        if not os.path.exists(backing):
            continue
        try:
            with open(f"/dev/{name}", "rb") as device:
                status = fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(232))
            with open(backing) as file:
                path = file.read().strip()
        except OSError:  # gone meanwhile, or without backing file
            continue
        number = struct.unpack_from("Q", status)[0]
        # the kernel's huge_encode_dev: 12 bits of major in the middle of the minor's
        device_number = f"{(number >> 8) & 0xFFF}:{(number & 0xFF) | ((number >> 12) & 0xFFFFF00)}"
        at = [mount.device for mount in here if path.startswith(mount.point.rstrip("/") + "/")]
        if at and at[-1] == device_number:
            found[name] = path
    return found


def nbds() -> dict[str, str]:
    """Connected nbd devices with the name that they were connected for."""
    found = {}
    for directory in glob.glob("/sys/block/nbd*"):
        with contextlib.suppress(OSError), open(f"{directory}/backend") as file:
            found[os.path.basename(directory)] = file.read().strip()
    return found


def may_grow_mounted() -> bool:
    """Whether ext4 may grow while it is mounted: the kernel wants CAP_SYS_RESOURCE, which some machines take away."""
    with open("/proc/self/status") as file:
        found = re.search(r"^CapEff:\s*(\w+)", file.read(), re.MULTILINE)
    assert found
    return bool(int(found.group(1), 16) >> 24 & 1)


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def cgroups() -> set[str]:
    """Directories of containers in any controller, below the partition that libvirt makes."""
    found = set()
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        for name in list(names):
            # made by libvirt itself, or by systemd for it, which writes - as \\x2d
            if name.startswith("machine-lxc") or ("lxc-" in name and "libvirt-lxc" in name):
                found.add(os.path.join(directory, name))
                names.remove(name)
    return found
