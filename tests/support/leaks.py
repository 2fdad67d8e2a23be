"""What is left on the host after a test that was not there before? Compared by what the kernel and libvirt say.

Expected to stay: the hub (it ends by itself), the import cache, console logs (kept to be read after a failure), lock
files, and what libvirt itself leaves in its own directories (libvirt-lxc.md, "always left").
"""

from __future__ import annotations

import os
import stat
import zlib
from dataclasses import dataclass

from tests.support import machine
from tests.support.waiting import wait_until

WATCHED = ("/var/lib/one", "/var/lib/onelxc", "/run/onelxc", "/var/tmp")
STAY = (
    "/var/lib/onelxc/cache",
    "/run/onelxc/lock",
    "/run/onelxc/giveup",
    "/run/onelxc/hub",
    "/run/onelxc/console",
    "/run/onelxc/io",  # one small file for each block device that was ever used
    "/var/tmp/one",
)
PROCESSES_STAY = ("libvirtd", "onelxc-hub", "hub_daemon")


@dataclass(frozen=True)
class Snapshot:
    domains: frozenset[str]
    mounts: frozenset[str]
    loops: frozenset[str]
    nbds: frozenset[str]
    links: frozenset[str]
    cgroups: frozenset[str]
    processes: frozenset[str]
    files: frozenset[str]

    def added_since(self, before: Snapshot) -> list[str]:
        """One line for each thing that is here and was not."""
        return [
            f"{kind}: {item}"
            for kind in ("domains", "mounts", "loops", "nbds", "links", "cgroups", "processes", "files")
            for item in sorted(getattr(self, kind) - getattr(before, kind))
        ]


def _processes() -> frozenset[str]:
    found = set()
    for pid in machine.pids():
        line = machine.command_line(pid)
        if not line or pid == os.getpid() or any(word in line for word in PROCESSES_STAY):
            continue
        if os.path.isdir("/run/systemd/system") and "libvirt_lxc" not in line and "onelxc" not in line:
            try:
                with open(f"/proc/{pid}/cgroup") as file:
                    if "lxc" not in file.read():
                        continue
            except OSError:
                continue
        found.add(f"{pid} {line[:200]}")
    return frozenset(found)


def _files() -> frozenset[str]:
    found = set()
    for top in WATCHED:
        for directory, names, files in os.walk(top):
            for name in list(names):
                path = os.path.join(directory, name)
                if path.startswith(STAY) or os.path.ismount(path):
                    names.remove(name)
                elif os.path.islink(path):
                    found.add(path)
            for name in files:
                path = os.path.join(directory, name)
                if not path.startswith(STAY):
                    found.add(path)
            if directory.startswith("/var/lib/onelxc/"):
                found.add(directory)
    # a policy that a test changed would be the next one's
    try:
        with open("/etc/onelxc/host.conf", "rb") as policy:
            found.add(f"/etc/onelxc/host.conf with {zlib.crc32(policy.read()):08x}")
    except FileNotFoundError:
        pass
    # directories that every VM shares are made once and stay
    return frozenset(found - {"/var/lib/onelxc/vms", "/var/lib/onelxc/mnt", "/var/lib/onelxc/snapshots"})


def snapshot() -> Snapshot:
    return Snapshot(
        domains=frozenset(machine.domains()),
        mounts=frozenset(
            f"{mount.point} ({mount.kind} {mount.source})"
            for mount in machine.mounts()
            if not mount.point.startswith("/run/user/")  # somebody logged in, to look into the emulated machine
        ),
        loops=frozenset(f"{name} {path}" for name, path in machine.loops().items()),
        nbds=frozenset(f"{name} {named}" for name, named in machine.nbds().items()),
        links=frozenset(machine.links()),
        cgroups=frozenset(machine.cgroups()),
        processes=_processes(),
        files=_files(),
    )


def assert_none_since(before: Snapshot, timeout_s: float = 15) -> None:
    """AssertionError that lists what is left; what is just ending gets some time."""
    left: list[str] = []

    def clean() -> bool:
        left[:] = snapshot().added_since(before)
        return not left

    try:
        wait_until(clean, timeout_s=timeout_s, interval_s=0.1)
    except AssertionError:
        raise AssertionError("left behind:\n  " + "\n  ".join(left)) from None


def is_device(path: str) -> bool:
    return stat.S_ISBLK(os.stat(path).st_mode)
