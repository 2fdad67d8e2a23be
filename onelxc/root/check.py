"""Can containers run on this host, and if not, what is missing?

Run by `install.sh node` at its end and by `onelxc-root check` at any time. It looks and tries, and changes nothing.
A problem that stops every container is told as `cannot:`, one that takes away a feature as `limited:`. Sources of the
rules: libvirt's LXC driver as measured (see docs/decisions), and the kernel's own files under /proc and /sys.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onelxc import __version__, command, config, errors, host, kernelfile
from onelxc.errors import CommandError, ConfigurationError, HypervisorError
from onelxc.model import HELPER
from onelxc.root import apparmor, starts

# program: what it is needed for
NEEDED = {
    "tar": "importing archives",
    "mkfs.ext4": "importing archives",
    "e2fsck": "checking file systems",
    "resize2fs": "growing file systems",
    "ip": "network interfaces",
    "prlimit": "limits of programs that read images",
    "nsenter": "network interfaces of containers",
    "sudo": "oneadmin's way to the root helper",
    "virsh": "looking at libvirt",
}
USEFUL = {
    "xz": "archives packed with xz",
    "zstd": "archives packed with zstd",
    "bzip2": "archives packed with bzip2",
    "lz4": "archives packed with lz4",
    "mkfs.xfs": "XFS disks",
    "mkfs.btrfs": "btrfs disks",
    "qemu-storage-daemon": "qcow2 disks",
    "tc": "bandwidth limits",
    "lspci": "OpenNebula's own PCI probe (it fails without, and the host with it)",
}
MODULES = {"libvirt": "python3-libvirt", "lxml": "python3-lxml", "yaml": "python3-yaml"}


@dataclass(frozen=True)
class Problem:
    """`fatal` ones stop every container here."""

    fatal: bool
    text: str

    def __str__(self) -> str:
        return f"{'cannot' if self.fatal else 'limited'}: {self.text}"


def problems(user: str = "") -> list[Problem]:
    """Everything that is wrong here, the worst first. `user` is who runs the executables, oneadmin by default."""
    user = user or os.environ.get("ONEADMIN", "") or "oneadmin"
    systemd = os.path.isdir("/run/systemd/system")
    with open("/proc/mounts", encoding="utf-8", errors="replace") as mounts:
        hierarchies = mounts.read()
    looks: list[Callable[[], Iterator[Problem]]] = [
        lambda: kernel(os.uname().release),
        lambda: cgroups(hierarchies, _controllers(hierarchies), systemd),
        user_namespaces,
        devices,
        veth,
        programs,
        python_modules,
        lambda: helper(HELPER),
        lambda: hook(starts.HOOK),
        lambda: libvirt(systemd),
        lambda: the_user(user),
        confinement,
        idle_exit,
    ]
    found = [problem for look in looks for problem in look()]
    return sorted(found, key=lambda problem: not problem.fatal)


def kernel(release: str) -> Iterator[Problem]:
    """Idmapped mounts came with 5.12 (ext4, XFS), and with 5.15 for btrfs."""
    version = host.kernel_version(release)
    if version < (5, 12):
        yield Problem(True, f"kernel {release} has no idmapped mounts: unprivileged containers need 5.12 or later")
    elif version < (5, 15):
        yield Problem(False, f"kernel {release} cannot map ids on btrfs: such disks need 5.15 or later")


def cgroups(mounts: str, owned_by_v2: dict[str, str], systemd: bool) -> Iterator[Problem]:
    """libvirt's LXC driver starts containers on pure v2 under systemd, and on pure v1 without it.

    `mounts` is /proc/mounts, `owned_by_v2` the text of cgroup.controllers of each cgroup2 mount point.
    """
    kinds: dict[str, list[str]] = {"cgroup": [], "cgroup2": []}
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] in kinds:
            kinds[fields[2]].append(fields[1])
    if not kinds["cgroup"] and not kinds["cgroup2"]:
        yield Problem(True, "no control groups are mounted at /sys/fs/cgroup")
    elif systemd and kinds["cgroup"]:
        yield Problem(
            True,
            "control groups v1 (or hybrid) under systemd: libvirt starts no container there (`NoMachineForPID`);"
            " boot with systemd.unified_cgroup_hierarchy=1",
        )
    elif kinds["cgroup"]:
        for place in kinds["cgroup2"]:
            if owned_by_v2.get(place, "").strip():
                yield Problem(
                    True,
                    f"{place} holds v2 controllers ({owned_by_v2[place].strip()}) beside v1: libvirt takes the host"
                    " for v2 and fails; unmount it, or mount these controllers as v1",
                )


def _controllers(mounts: str) -> dict[str, str]:
    found = {}
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[2] == "cgroup2":
            found[fields[1]] = kernelfile.text(os.path.join(fields[1], "cgroup.controllers"))
    return found


def user_namespaces() -> Iterator[Problem]:
    """Compiled in, and not forbidden."""
    if not os.path.exists("/proc/self/ns/user"):
        yield Problem(True, "this kernel has no user namespaces (CONFIG_USER_NS)")
    elif kernelfile.text("/proc/sys/user/max_user_namespaces") == "0":
        yield Problem(True, "user namespaces are turned off: sysctl user.max_user_namespaces is 0")


def devices() -> Iterator[Problem]:
    """FUSE shows a container its own /proc/meminfo (libvirt insists on it); loop devices carry its disks."""
    for device, module, use in (
        ("/dev/fuse", "fuse", "libvirt's LXC driver starts no container"),
        ("/dev/loop-control", "loop", "image files cannot be mounted"),
    ):
        if not os.path.exists(device) and not _has_module(module):
            yield Problem(True, f"no {device} and no module {module}: {use}")
    if not _has_module("nbd"):
        yield Problem(False, "no module nbd: qcow2 disks go through FUSE, which is slower")
    known = kernelfile.text("/proc/filesystems").split()
    if "ext4" not in known and not _has_module("ext4"):
        yield Problem(True, "this kernel cannot mount ext4, which imported images are")


def _has_module(name: str) -> bool:
    if os.path.isdir(f"/sys/module/{name}"):
        return True
    return bool(shutil.which("modprobe", path=command.PATH)) and _works(["modprobe", "-n", "-q", name])


def veth() -> Iterator[Problem]:
    """Tried where nobody sees it, in a network namespace of its own."""
    if not _works(["unshare", "--net", "ip", "link", "add", "onelxc0", "type", "veth", "peer", "name", "onelxc1"]):
        yield Problem(False, "this kernel makes no veth pairs: containers cannot have network interfaces")
        return
    if shutil.which("tc", path=command.PATH) is None:
        return
    bucket = "tc qdisc add dev lo root tbf rate 1mbit burst 64kb latency 1s"
    if not _works(["unshare", "--net", "sh", "-c", bucket]):
        yield Problem(False, "this kernel has no token buckets (sch_tbf): limits of NICs are not kept")
        return
    everything = "tc filter add dev lo parent ffff: protocol all prio 1 u32 match u32 0 0 action"
    led = f"ip link add ifb9 type ifb && {everything} mirred egress redirect dev ifb9"
    dropped = f"{everything} police rate 1mbit burst 64kb conform-exceed drop"
    if not _works(["unshare", "--net", "sh", "-c", f"tc qdisc add dev lo ingress && {{ {led} || {dropped}; }}"]):
        yield Problem(False, "this kernel has neither ifb nor act_police: OUTBOUND limits of NICs are not kept")


def programs() -> Iterator[Problem]:
    """What the driver calls."""
    for table, fatal in ((NEEDED, True), (USEFUL, False)):
        for program, use in table.items():
            if shutil.which(program, path=command.PATH) is None:
                yield Problem(fatal, f"{program} is missing, needed for {use}")


def python_modules() -> Iterator[Problem]:
    """For the distribution's interpreter, whichever one runs this."""
    for module, package in MODULES.items():
        if not _works(["/usr/bin/python3", "-I", "-c", f"import {module}"]):
            yield Problem(True, f"/usr/bin/python3 has no module {module}: install {package}")


def helper(path: str) -> Iterator[Problem]:
    """There, of this version, and in nobody's hands but root's, from / on down."""
    if not os.path.exists(path):
        yield Problem(True, f"the root helper {path} is missing: run `install.sh node` as root")
        return
    place = path
    while place != "/":
        seen = os.stat(place)
        if seen.st_uid != 0 or seen.st_mode & 0o022:
            yield Problem(True, f"{place} can be changed by others than root: chown root:root and chmod go-w")
        place = os.path.dirname(place)
    found = kernelfile.text(os.path.join(os.path.dirname(path), "onelxc", "__init__.py"))
    if f'"{__version__}"' not in found:
        yield Problem(True, f"the root helper is of another version than {__version__}: run `install.sh node` as root")


def hook(path: str) -> Iterator[Problem]:
    """libvirt calls it at each start, and skips one that is not executable."""
    if not os.path.exists(path):
        yield Problem(True, f"libvirt's hook {path} is missing: run `install.sh node` as root")
    elif not os.access(path, os.X_OK):
        yield Problem(True, f"libvirt's hook {path} is not executable: chmod 755, and reload or restart libvirtd")


def libvirt(systemd: bool) -> Iterator[Problem]:
    """Asked as root; whether oneadmin may, is asked in `the_user`."""
    if shutil.which("virsh", path=command.PATH) is None:
        return
    try:
        command.run(["virsh", "-q", "-c", "lxc:///", "uri"], timeout_s=30)
    except CommandError as error:
        hint = "" if systemd else "; without systemd libvirtd has to be started by other means"
        yield Problem(True, f"libvirt's LXC driver does not answer: {_last(error.stderr or str(error))}{hint}")


def the_user(user: str) -> Iterator[Problem]:
    """Exists, reaches libvirt, may run the helper."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        yield Problem(True, f"no user {user}: OpenNebula's packages for hosts make it, or useradd")
        return
    as_user = ["setpriv", "--reuid", user, "--regid", str(account.pw_gid), "--init-groups", "--"]
    ask = ["virsh", "-q", "-c", "lxc:///", "uri"]
    if _works(ask) and not _works([*as_user, *ask]):
        groups = [group.gr_name for group in grp.getgrall() if user in group.gr_mem]
        cause = "is not in group libvirt" if "libvirt" not in groups else "is in group libvirt, but is refused"
        yield Problem(True, f"{user} cannot use libvirt: it {cause} (libvirtd.conf: unix_sock_group, auth_unix_rw)")
    if not _works(["sudo", "-n", "-l", "-U", user, HELPER, "version"]):
        yield Problem(True, f"sudo does not let {user} run {HELPER}: is /etc/sudoers.d read by /etc/sudoers?")


def confinement() -> Iterator[Problem]:
    """Nothing is wrong with a host without AppArmor; one that has it should use it, unless host.conf says no."""
    if kernelfile.text(apparmor.ENABLED) != "Y":
        return
    try:
        wanted = config.host().apparmor
    except ConfigurationError as error:
        yield Problem(True, str(error))
        return
    if not wanted:
        yield Problem(False, 'containers are not confined by AppArmor: APPARMOR = "no" in host.conf')
    elif not apparmor.available():
        yield Problem(False, f"{apparmor.SOURCE} is missing, so that AppArmor confines nothing: run `install.sh node`")
    elif shutil.which("apparmor_parser", path=command.PATH) is None:
        yield Problem(True, 'AppArmor is on, and apparmor_parser is missing: install apparmor, or set APPARMOR = "no"')
    else:
        try:
            apparmor.controller(True, False)
        except HypervisorError as error:
            yield Problem(True, str(error))


def idle_exit() -> Iterator[Problem]:
    """Before 11.0 libvirtd leaves after --timeout seconds although containers run, and misses their reboots."""
    for process in os.listdir("/proc"):
        if process.isdigit() and kernelfile.is_the_hosts(int(process)):
            words = kernelfile.text(f"/proc/{process}/cmdline").split("\0")
            if os.path.basename(words[0]) in ("libvirtd", "virtlxcd") and "--timeout" in words and _version() < 11:
                yield Problem(
                    False,
                    f"{os.path.basename(words[0])} runs with --timeout and would leave although containers run: take"
                    " it out of /etc/default/libvirtd and restart libvirtd",
                )


def _version() -> int:
    """libvirt's major version; 0 if it cannot be asked."""
    try:
        return int(command.run(["libvirtd", "--version"]).split()[-1].split(b".")[0])
    except (CommandError, ValueError, IndexError):
        return 0


def _works(argv: list[str]) -> bool:
    try:
        command.run(argv, timeout_s=30)
    except CommandError:
        return False
    return True


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def verb(_config: object, request: dict[str, object], _log: object) -> list[str]:
    """The one-shot verb `check`: every problem as a line."""
    return [str(problem) for problem in problems(str(request.get("user", "")))]


def main(user: str = "") -> int:
    """`onelxc-root check`, for people: a line per problem and a verdict. 1 when no container can run here."""
    if os.geteuid() != 0:
        print("Only root can see whether containers run here: sudo onelxc-root check")
        return 1
    found = problems(user)
    for problem in found:
        print(errors.line(str(problem)))
    fatal = any(problem.fatal for problem in found)
    print("Containers cannot run here yet." if fatal else "Containers can run here.")
    return int(fatal)
