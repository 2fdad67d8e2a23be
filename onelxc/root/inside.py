"""How does root put a mount into a running container, and take it out again?

By a child that enters the container's mount namespace and does one thing there, in limited time (`apart`). It keeps the
host's user namespace, since moving a mount needs rights over both sides; directories are made with the container's
root's ids, and every name is resolved from the container's root. Knows nothing of disks.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onelxc import kernelfile
from onelxc.errors import NoSuchDomainError, StorageError
from onelxc.names import deploy_id
from onelxc.root import apart, cgroups, orphans, rootfs, syscalls

STEP_S = 15.0
"""How long one step inside may take: a path may lead over a file system that a process of the container serves."""
LOOK_S = 5.0
MOST_USERS = 20


@dataclass(frozen=True)
class MountPoint:
    """A mount as one process sees it: MAJOR:MINOR of the file system, where it is, where it comes from."""

    device: str
    point: str
    source: str


def init_pid(vm_id: int) -> int:
    """The host's pid of the container's process 1. NoSuchDomainError where the container does not run."""
    found = orphans.processes_of(cgroups.groups(vm_id))
    if found is not None:
        return found[1]
    raise NoSuchDomainError(f"Cannot find {deploy_id(vm_id)}: no such container runs on this host")


def processes(init: int) -> tuple[int, ...]:
    """Every process of the container whose process 1 is `init`, those included that were brought in from outside."""
    found = []
    mine = _pid_namespace(init)
    for name in os.listdir("/proc"):
        if name.isdigit() and mine and _pid_namespace(int(name)) == mine:
            found.append(int(name))
    return tuple(sorted(found))


def _pid_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def mounts_of(pid: int) -> Iterator[MountPoint]:
    """The mount table of a process, oldest first; empty where it is gone. One by one: there may be 100,000."""
    try:
        # in bytes, since a name may hold what text takes for the end of a line
        with open(f"/proc/{pid}/mountinfo", "rb") as table:
            for line in table:
                before, _, after = line.rstrip(b"\n").partition(b" - ")
                fields = before.split(b" ")
                yield MountPoint(os.fsdecode(fields[2]), _unescape(fields[4]), os.fsdecode(after.split(b" ")[1]))
    except OSError:
        return


def own_mount(point: str) -> MountPoint | None:
    """What is mounted at `point` of the host, the topmost."""
    found = None
    for mount in mounts_of(os.getpid()):
        found = mount if mount.point == point else found
    return found


def _unescape(path: bytes) -> str:
    r"""mountinfo writes blanks, tabs, newlines and backslashes as \ooo."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found.group(1), 8) & 255]), path))


def attach(pid: int, source: str, target: str, id_base: int | None) -> None:
    """Show the host's mount `source` at `target` of the container; the directory is made if missing."""
    if any(mount.point == target for mount in mounts_of(pid)):
        raise StorageError(f"Cannot attach at {target}: something else is mounted there")
    namespace = _namespace(pid)
    tree = place = -1
    try:
        place = _place(namespace, target, id_base)
        tree = syscalls.open_tree(source)
        # what the container mounts below it must not come out on the host
        syscalls.mount_setattr(tree, propagation=syscalls.MS_PRIVATE)

        def move() -> bytes:
            syscalls.move_mount(tree, "", dir_fd=place)
            return b""

        _enter(namespace, move, keep=(tree, place))
    except OSError as error:
        raise StorageError(f"Cannot attach at {target}: {error.strerror}") from error
    except StorageError as error:
        raise StorageError(f"Cannot attach at {target}: {error}") from error
    finally:
        for fd in (namespace, tree, place):
            if fd >= 0:
                os.close(fd)


def _place(namespace: int, target: str, id_base: int | None) -> int:
    """A descriptor of the directory, made if missing. By a child of its own: one that waits for ever on its way there
    holds no disk."""
    ours, its = socket.socketpair()

    def find() -> bytes:
        _make(target, id_base)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        socket.send_fds(its, [b"."], [syscalls.openat2(root, target, os.O_PATH | os.O_DIRECTORY)])
        return b""

    with ours, its:
        _enter(namespace, find, keep=(its.fileno(),))
        return int(socket.recv_fds(ours, 1, 1)[1][0])


def _make(target: str, id_base: int | None) -> None:
    """mkdir -p as the container's root, to whom alone its file systems belong."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    if id_base is not None:
        os.setgroups([])
        os.setegid(id_base)
        os.seteuid(id_base)
        syscalls.die_with_parent()  # which other ids have undone
    try:
        rootfs.make_directory(root, target)
    finally:
        if id_base is not None:
            os.seteuid(0)
            os.setegid(0)
        os.close(root)


def detach(pid: int, point: str, *, remove: bool) -> bool:
    """Unmount `point` in the namespace of `pid`; False if it is in use. `remove` also takes the empty directory."""
    namespace = _namespace(pid)

    def unmount() -> bytes:
        try:
            syscalls.umount(point)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return b"busy"
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
        if remove:
            try:
                root = os.open("/", os.O_PATH | os.O_DIRECTORY)
                parent = syscalls.openat2(root, posixpath.dirname(point), os.O_PATH | os.O_DIRECTORY)
                os.rmdir(posixpath.basename(point), dir_fd=parent)
            except OSError:
                pass
        return b""

    try:
        return _enter(namespace, unmount) != b"busy"
    except OSError as error:
        raise StorageError(f"Cannot detach from {point}: {error.strerror}") from error
    finally:
        os.close(namespace)


def _namespace(pid: int) -> int:
    """The process's mount namespace. NoSuchDomainError if it is gone, or in ours: its number is another's by now, or
    somebody of the host has entered the container in part. Nothing may be mounted or unmounted on the host here.
    """
    try:
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoSuchDomainError("Cannot enter the container: it has ended") from error
    if os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/mnt")):
        os.close(fd)
        raise NoSuchDomainError(f"Cannot enter the container: process {pid} is the host's")
    return fd


def _enter(namespace: int, step: Callable[[], bytes], keep: tuple[int, ...] = ()) -> bytes:
    """Run `step` in a child that is in the mount namespace: what it gives, or the OSError or StorageError it raised."""

    def inside() -> bytes:
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
        return step()

    return apart.run(inside, limit_s=STEP_S, keep=(namespace, *keep))


def users(pids: tuple[int, ...], st_dev: int) -> tuple[str, ...]:
    """Processes among `pids` that hold something on the file system, as its tenant knows them; () if it takes long."""

    def look() -> bytes:
        found = [_describe(pid) for pid in pids if any(_device(path) == st_dev for path in _references(pid))]
        return "\n".join(found[:MOST_USERS]).encode()

    try:
        return tuple(filter(None, apart.run(look, limit_s=LOOK_S).decode().split("\n")))
    except (OSError, StorageError):
        return ()


def _references(pid: int) -> list[str]:
    found = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
    for directory in ("fd", "map_files"):
        try:
            found += [f"/proc/{pid}/{directory}/{name}" for name in os.listdir(f"/proc/{pid}/{directory}")]
        except OSError:
            continue
    return found


def _device(path: str) -> int:
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


def _describe(pid: int) -> str:
    inside = kernelfile.status(pid, "NSpid").split()
    return f"{orphans.comm(pid)} (pid {inside[-1]} inside)" if inside else orphans.describe(pid)
