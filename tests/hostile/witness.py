"""What of the host may no tenant change, read or fill? Watched from outside while a test lets one try.

Nothing here asks the driver: the kernel, libvirt, and files that nobody has any business with. `Witness.look` is cheap
and meant for after each action; `Witness.judge` is the whole comparison at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator

from tests.support import leaks, machine

CANARY = "/srv/canary"
"""A file system of its own, so that a container that has it, or any file of it, shows its device number."""
SECRET = "d41c-canary-of-the-host-7f93"
SECRET_FILE = f"{CANARY}/secret"
SECRET_IMAGE = f"{CANARY}/image.raw"

PEAK_KIB = 512 << 10
"""No process that works for a tenant takes more memory; the largest that the driver allows takes half of it."""
HELD_KIB = 96 << 10
"""What this machine's processes and tmpfs may hold more at the end: caches of libvirtd, hub, and the test itself."""

# Trees that nothing which a tenant asks for ever writes to. /srv holds the front-ends, and the canary.
_QUIET = (
    "/etc",
    "/home",
    "/root/.ssh",
    "/boot",
    "/usr/lib/onelxc",
    "/usr/local/bin",
    "/usr/bin",
    "/usr/sbin",
    "/srv/front-ends",
    "/usr/libexec",
    "/var/spool",
    "/var/lib/systemd",
)
# … and such where only names are compared: what is there has a life of its own.
_NAMES = (
    "/",
    "/root",
    "/opt",
    "/srv",
    "/usr",
    "/usr/local",
    "/run",
    "/dev",
    "/var",
    "/var/lib",
    "/var/log",
    "/var/lib/one",
    "/lib",
    "/mnt",
    "/media",
)
# /dev is shared with other machines that run tests; loop devices that are in use are looked at by their files
_OURS = (
    "/root/.cache",
    CANARY,
    "/dev/pts",
    "/dev/shm",
    "/dev/loop",
    "/dev/mapper",
    "/dev/disk",
    "/run/udev",
    "/run/user",
    "/run/lock",
)
_RESTLESS_SYSCTLS = (
    "kernel/random/",
    "kernel/ns_last_pid",
    "fs/dentry-state",
    "fs/inode-",
    "fs/file-nr",
    "fs/aio-nr",
    "kernel/pty/nr",
    "fs/quota",
    "net/netfilter/nf_conntrack_count",
    "kernel/core_sched",
    "fs/binfmt_misc",
    "kernel/perf_event_max_sample_rate",
    "fs/nfs",
    "sunrpc",
)


class Canary:
    """Files that nobody opens, watched by the kernel: every access is told."""

    _EVENTS = 0x00000FFF  # IN_ALL_EVENTS

    def __init__(self) -> None:
        os.makedirs(CANARY, exist_ok=True)
        machine.command("mount", "-t", "tmpfs", "-o", "mode=755,size=8m", "canary", CANARY)
        for path in (SECRET_FILE, f"{CANARY}/mounts", f"{CANARY}/disk.0", f"{CANARY}/initctl"):
            with open(path, "w") as file:
                file.write(f"{SECRET}\n" * 64)
        with open(SECRET_IMAGE, "w") as file:
            file.write(f"{SECRET}\n" * 4096)
        os.symlink(SECRET_FILE, f"{CANARY}/link")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        self._names = {}
        for path in (CANARY, *(entry.path for entry in os.scandir(CANARY) if not entry.is_symlink())):
            number = self._libc.inotify_add_watch(self._fd, path.encode(), self._EVENTS)
            assert number >= 0
            self._names[number] = path
        self.events()

    def events(self) -> list[str]:
        """What has happened to it since the last call, a line for each."""
        found = []
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return found
            while data:
                number, mask, _, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0").decode(errors="replace")
                found.append(f"{self._names.get(number, number)}/{name}: inotify events {mask:#x}")
                data = data[16 + length :]

    def devices(self) -> str:
        status = os.stat(CANARY)
        return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"

    def end(self) -> None:
        os.close(self._fd)
        machine.command("umount", CANARY)


class Peaks(threading.Thread):
    """The most memory that any process of the host had at a time; a container's own have a limit of their own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ending = threading.Event()
        self._mine = os.readlink("/proc/self/ns/pid")
        self._skip = {os.getpid(), 1}
        self.high: dict[str, int] = {}

    def run(self) -> None:
        while not self._ending.wait(0.02):
            for name in os.listdir("/proc"):
                if name.isdigit() and int(name) not in self._skip:
                    self._note(name)

    def _note(self, pid: str) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/status", errors="replace") as file:
                lines = dict(line.split(":", 1) for line in file)
            kib = int(lines.get("VmHWM", "0 kB").split()[0])
            if kib <= PEAK_KIB // 4:
                return
            if os.readlink(f"/proc/{pid}/ns/pid") == self._mine or len(lines["NSpid"].split()) == 1:
                self.high[_comm(int(pid))] = max(kib, self.high.get(_comm(int(pid)), 0))

    def end(self) -> None:
        self._ending.set()
        self.join()


def _status(path: str, top: int) -> str:
    """What changes with a file. In tests/alone whatever is written has come up into the overlay, with its device
    number; what has not is the machine's, on which others may be at work.
    """
    status = os.lstat(path)
    kind = f"{status.st_mode:o} {status.st_uid}:{status.st_gid}"
    if stat.S_ISDIR(status.st_mode) or status.st_dev != top:
        return kind
    return f"{kind} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _files() -> Iterator[str]:
    device = os.stat("/").st_dev
    for top in _NAMES:
        with contextlib.suppress(OSError):
            for name in os.listdir(top):
                path = os.path.join(top, name)
                if not path.startswith(_OURS) and not (top == "/var/lib/one" and name.isdigit()):
                    yield path if os.path.islink(path) or not os.path.isdir(path) else f"{path}/"
    for top in _QUIET:
        for directory, names, files in os.walk(top):
            names[:] = [name for name in names if not os.path.join(directory, name).startswith(_OURS)]
            for name in (*names, *files):
                with contextlib.suppress(FileNotFoundError):
                    path = os.path.join(directory, name)
                    yield f"{path} ({_status(path, device)})"


def _sysctls() -> Iterator[str]:
    for directory, names, files in os.walk("/proc/sys"):
        if directory.startswith("/proc/sys/net/") and os.path.basename(directory) in ("conf", "neigh"):
            names[:] = [name for name in names if name in ("all", "default", "lo")]
        for name in files:
            path = os.path.join(directory, name)
            if any(word in path for word in _RESTLESS_SYSCTLS):
                continue
            with contextlib.suppress(OSError), open(path, errors="replace") as file:
                yield f"{path} = {' '.join(file.read(4096).split())}"


def _modules() -> set[str]:
    with contextlib.suppress(FileNotFoundError), open("/proc/modules") as file:  # a kernel may have none
        return {line.split()[0] for line in file}
    return set()


def _held_kib() -> int:
    """Anonymous and tmpfs memory of this machine."""
    for path in ("/sys/fs/cgroup/memory/memory.stat", "/sys/fs/cgroup/memory.stat"):
        with contextlib.suppress(OSError), open(path) as file:
            counts = dict(line.split() for line in file)
            names = ("total_rss", "total_shmem") if "total_rss" in counts else ("anon", "shmem")
            return sum(int(counts[name]) for name in names) // 1024
    return 0


def _names() -> tuple[str, str]:
    with open("/proc/sys/kernel/domainname") as file:
        return os.uname().nodename, file.read()


class Host:
    """Everything at one moment, as sets of lines."""

    def __init__(self) -> None:
        self.left = leaks.snapshot()
        self.files = set(_files())
        self.sysctls = set(_sysctls())
        self.modules = _modules()
        self.names = _names()
        self.held_kib = _held_kib()

    def changes_since(self, before: Host) -> list[str]:
        lines = list(self.left.added_since(before.left))
        lines += [f"gone: {line}" for line in before.left.added_since(self.left)]
        for kind in ("files", "sysctls", "modules"):
            mine, theirs = getattr(self, kind), getattr(before, kind)
            lines += [f"{kind}: + {line}" for line in sorted(mine - theirs)]
            lines += [f"{kind}: - {line}" for line in sorted(theirs - mine)]
        if self.names != before.names:
            lines.append(f"names: {before.names} -> {self.names}")
        if self.held_kib > before.held_kib + HELD_KIB:
            lines.append(f"memory: {before.held_kib >> 10} MiB -> {self.held_kib >> 10} MiB")
        return lines


class Witness:
    """One test's. `look` after each action, `judge` when all is over and deleted."""

    def __init__(self, canary: Canary, before: Host | None = None) -> None:
        """`before`: what the last test found as it ought to be."""
        self._canary = canary
        self._before = before or Host()
        canary.events()
        self._forbidden = {mount.device for mount in machine.mounts() if mount.kind not in _PSEUDO}
        self._peaks = Peaks()
        self._peaks.start()

    def look(self, what: str) -> None:
        """Nothing of the host has been touched, and no container has anything of it."""
        assert _names() == self._before.names, what
        assert self._canary.events() == [], f"{what}: somebody was at the host's canary files"
        for pid in _inits():
            for line in _shows(pid, self._forbidden):
                raise AssertionError(f"{what}: a container has a mount of the host's: {line}")

    def judge(self, timeout_s: float = 15) -> Host:
        """The host as it is now, and was before; else AssertionError with all that is different."""
        self._peaks.end()
        self.look("at the end")
        high = {command: kib for command, kib in self._peaks.high.items() if kib > PEAK_KIB}
        assert high == {}, f"more than {PEAK_KIB >> 10} MiB of memory (KiB): {high}"
        deadline = time.monotonic() + timeout_s
        while True:
            now = Host()
            changes = now.changes_since(self._before)
            if not changes or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert not changes, "the host has changed:\n  " + "\n  ".join(changes)
        return now


_PSEUDO = ("proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "devtmpfs", "nsfs", "debugfs", "tracefs")


def _inits() -> list[int]:
    """Process 1 of every container, as seen from here: of a pid namespace below ours."""
    found = []
    for pid in machine.pids():
        with contextlib.suppress(OSError, StopIteration), open(f"/proc/{pid}/status", errors="replace") as file:
            numbers = next(line for line in file if line.startswith("NSpid")).split()[1:]
            if len(numbers) > 1 and numbers[-1] == "1" and _comm(pid) != "libvirt_lxc":
                found.append(pid)
    return found


def _comm(pid: int) -> str:
    """Not its command line, which lies in the tenant's memory: who reads that waits as long as he likes."""
    with open(f"/proc/{pid}/comm", errors="replace") as file:
        return file.read().strip()


def _shows(pid: int, forbidden: set[str]) -> Iterator[str]:
    """Mounts of the process that are one of the host's file systems."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/mountinfo") as file:
        for line in file:
            fields = line.split()
            if fields[2] in forbidden and _is_container(pid):
                yield f"{_comm(pid)}: {line.strip()}"


def _is_container(pid: int) -> bool:
    """Not a jail of the driver's, which has the host's /usr, read-only, for the programs in it."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            return "lxc" in file.read()
    except OSError:
        return False


def holds_secret(directory: str) -> list[str]:
    """Files below `directory` in which the host's secret is found: images of file systems show their files' content."""
    return [entry.path for entry in os.scandir(directory) if entry.is_file(follow_symlinks=False) and _has(entry.path)]


def _has(path: str) -> bool:
    """By the parts of the file that have been written, since a tenant's image may be a hole of terabytes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end, at = os.fstat(fd).st_size, 0
        while at < end:
            at = os.lseek(fd, at, os.SEEK_DATA)
            until = os.lseek(fd, at, os.SEEK_HOLE)
            while at < until:
                if SECRET.encode() in os.pread(fd, (1 << 20) + len(SECRET), at):
                    return True
                at += 1 << 20
    except OSError as error:
        if error.errno != errno.ENXIO:  # no more data
            raise
    finally:
        os.close(fd)
    return False
