"""How does root put a mount into a running container, and take it out again?

By a child that enters the container's mount namespace and does one thing there. It keeps the host's user namespace,
since moving a mount needs rights over both sides; directories are made with the container's root's ids, and every name
is resolved from the container's root. Knows nothing of disks.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass

from onelxc.errors import NoSuchDomainError, OneLxcError, StorageError
from onelxc.names import deploy_id
from onelxc.root import cgroups, orphans, rootfs, syscalls


@dataclass(frozen=True)
class MountPoint:
    """A mount as one process sees it: MAJOR:MINOR of the file system, where it is, where it comes from."""

    device: str
    point: str
    source: str


def init_pid(vm_id: int) -> int:
    """The host's pid of the container's process 1. NoSuchDomainError where the container does not run."""
    for controller in {group.controller for group in cgroups.groups(vm_id)}:
        if orphans.is_controller(controller):
            for child in orphans.children(controller):
                if not orphans.is_dead(child):
                    return child
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


def mounts_of(pid: int) -> tuple[MountPoint, ...]:
    """The mount table of a process, oldest first; empty where it is gone."""
    found = []
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            for line in table:
                fields = line.rstrip("\n").split(" ")
                source = fields[fields.index("-") + 2]
                found.append(MountPoint(fields[2], _unescape(fields[4]), source))
    except OSError:
        return ()
    return tuple(found)


def _unescape(text: str) -> str:
    r"""mountinfo writes blanks, tabs, newlines and backslashes as \ooo."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape") if "\\" in text else text


def attach(pid: int, source: str, target: str, id_base: int | None) -> None:
    """Show the host's mount `source` at `target` of the container; the directory is made if missing."""
    if any(mount.point == target for mount in mounts_of(pid)):
        raise StorageError(f"Cannot attach at {target}: something else is mounted there")
    namespace = _namespace(pid)
    tree = -1
    try:
        tree = syscalls.open_tree(source)
        # what the container mounts below it must not come out on the host
        syscalls.mount_setattr(tree, propagation=syscalls.MS_PRIVATE)

        def move() -> None:
            _make(target, id_base)
            root = os.open("/", os.O_PATH | os.O_DIRECTORY)
            place = syscalls.openat2(root, target, os.O_PATH | os.O_DIRECTORY)
            syscalls.move_mount(tree, "", dir_fd=place)

        _enter(namespace, move, f"Cannot attach at {target}")
    except OSError as error:
        raise StorageError(f"Cannot attach at {target}: {error.strerror}") from error
    finally:
        os.close(namespace)
        if tree >= 0:
            os.close(tree)


def _make(target: str, id_base: int | None) -> None:
    """mkdir -p as the container's root, to whom alone its file systems belong."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    if id_base is not None:
        os.setgroups([])
        os.setegid(id_base)
        os.seteuid(id_base)
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

    def unmount() -> None:
        try:
            syscalls.umount(point)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise _BusyError from error
            if error.errno not in (errno.EINVAL, errno.ENOENT):
                raise
        if remove:
            try:
                root = os.open("/", os.O_PATH | os.O_DIRECTORY)
                parent = syscalls.openat2(root, posixpath.dirname(point), os.O_PATH | os.O_DIRECTORY)
                os.rmdir(posixpath.basename(point), dir_fd=parent)
            except OSError:
                pass

    try:
        _enter(namespace, unmount, f"Cannot detach from {point}")
    except _BusyError:
        return False
    finally:
        os.close(namespace)
    return True


class _BusyError(OneLxcError):
    pass


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


def _enter(namespace: int, step: Callable[[], None], doing: str) -> None:
    """Run `step` in a child that is in the mount namespace; what went wrong there is raised here."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            step()
            os.write(writer, b"+")
        except _BusyError:
            os.write(writer, b"!")
        except OSError as error:
            os.write(writer, f"{error.strerror}".encode())
        except BaseException as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        said = os.read(reader, 4096).decode(errors="replace")
    finally:
        os.close(reader)
        os.waitpid(child, 0)
    if said == "!":
        raise _BusyError(doing)
    if said != "+":
        raise StorageError(f"{doing}: {said or 'the helper died'}")


def users(pids: tuple[int, ...], st_dev: int) -> tuple[str, ...]:
    """Processes among `pids` that hold something on the file system, as its tenant knows them."""
    return tuple(_describe(pid) for pid in pids if any(_device(path) == st_dev for path in _references(pid)))


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
    try:
        with open(f"/proc/{pid}/status") as status:
            line = next(line for line in status if line.startswith("NSpid:"))
        return f"{orphans.comm(pid)} (pid {line.split()[-1]} inside)"
    except (OSError, StopIteration):
        return orphans.describe(pid)
