"""Who holds a mount or a loop device? For errors that name processes, and for mounts that live on in other namespaces.

Only looks at /proc and /sys, except `unmount_elsewhere` and `wait_until_free`, which remove copies of *our own* mounts,
at our own places, from the namespaces of other containers' controllers.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence

from onelxc.errors import StorageError
from onelxc.model import STATE, VmPaths
from onelxc.root import apart, inside, loops, mounts, orphans, syscalls
from onelxc.root.work import Work

FREE_S = 10.0
UNMOUNT_S = 5.0
LOOK_S = 5.0
MOST_USERS = 20


def loop_image(device: str) -> tuple[int, int] | None:
    """(st_dev, st_ino) of the image behind a loop device."""
    return loops.backing_identity(device)


def loops_over(images: set[tuple[int, int]]) -> tuple[str, ...]:
    """The loop devices that hold one of these images (st_dev, st_ino)."""
    found = []
    for name in os.listdir("/sys/block"):
        attached = name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop/backing_file")
        if attached and loop_image(f"/dev/{name}") in images:
            found.append(f"/dev/{name}")
    return tuple(found)


def loops_below(directory: str) -> tuple[str, ...]:
    """The loop devices mounted below a directory, in our own namespace."""
    points = set(mounts.mounted_below(directory))
    table = inside.mounts_of(os.getpid())
    return tuple(mount.source for mount in table if mount.point in points and mount.source.startswith("/dev/loop"))


def mounted_devices(directory: str) -> tuple[tuple[str, str], ...]:
    """(block device, mount point) of every mount below a directory, in our own namespace."""
    prefix = directory.rstrip("/") + "/"
    table = inside.mounts_of(os.getpid())
    return tuple((one.source, one.point) for one in table if one.point.startswith(prefix) and one.source[:5] == "/dev/")


def is_free(device: str) -> bool:
    """Whether nothing is mounted from a block device or a part of it, nor anything made of it. Gone is free."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV)
    status = os.stat(device)
    return not loops_over({(status.st_dev, status.st_ino)})


def wait_until_free(work: Work, images: set[tuple[int, int]], devices: Sequence[str]) -> None:
    """Return when no loop device holds one of these images any more, and nothing one of these block devices.

    Loop devices clear themselves with their last mount. Where mounts are private (hosts without systemd), every
    container started since ours keeps a copy of our mounts in its controller's namespace: those are unmounted there.
    """
    deadline = time.monotonic() + FREE_S
    images = images | {pair for pair in map(_identity, devices) if pair}
    for attempt in range(10**6):
        own = [one for one in loops_over(images) if not _is_of_another(one, work)] if images else []
        held = [*own, *(one for one in devices if not is_free(one))]
        if not held:
            return
        if attempt in (2, 20, 100):
            for device in held:
                unmount_elsewhere(device, work.paths.mounts + "/")
        if time.monotonic() > deadline:
            users = sorted({user for device in held for user in mounters_of(device)})
            raise StorageError(
                f"Cannot free {', '.join(held)} (images of VM {work.vm_id}):"
                f" in use by {', '.join(users) or 'the kernel'}"
            )
        time.sleep(0.005 if attempt < 20 else 0.05)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_of_another(device: str, work: Work) -> bool:
    """Whether another VM has mounted it, of an image that both read and neither writes."""
    points = [point for source, point in mounted_devices(os.path.join(STATE, "mnt")) if source == device]
    return bool(points) and not any(point.startswith(work.paths.mounts + "/") for point in points)


def refuse_used(path: str, images: set[tuple[int, int]]) -> None:
    """StorageError if a loop device has one of these images, of which `path` is one name."""
    used = loops_over(images)
    if used:
        users = sorted({user for device in used for user in mounters_of(device)})
        raise StorageError(f"Cannot use {path}: it is in use on this host by {', '.join(users) or used[0]}")


def is_lost(device: str) -> bool:
    """Whether the file behind a loop device has been deleted. An NFS client renames what is deleted while in use."""
    path = loops.backing_path(device)
    return path.endswith(" (deleted)") or bool(re.match(r"\.nfs[0-9a-f]{16,}", os.path.basename(path)))


def users_of(point: str) -> tuple[str, ...]:
    """Processes with an open file, directory or program on the file system mounted at `point`: `bash (4711)`."""

    def users() -> Iterator[int]:
        device = os.stat(point).st_dev
        return (pid for pid in _pids() if any(_on_device(path, device) for path in _references(pid)))

    return _described(users)


def mounters_of(device: str) -> tuple[str, ...]:
    """Processes that see a mount of a block device: one for each mount namespace."""
    number = _number(device)
    return _described(lambda: (pid for pid, table in _namespaces() if any(one.device == number for one in table)))


def _described(pids: Callable[[], Iterator[int]]) -> tuple[str, ...]:
    """For an error's text: () if that cannot be told in time. Some of the files belong to file systems that a tenant
    serves, and he may have thousands of mount namespaces."""

    def look() -> bytes:
        return "\n".join(map(orphans.describe, itertools.islice(pids(), MOST_USERS))).encode()

    try:
        return tuple(filter(None, apart.run(look, limit_s=LOOK_S).decode().split("\n")))
    except (OSError, StorageError):
        return ()


def unmount_elsewhere(device: str, prefix: str) -> None:
    """Unmount `device` in all the other mount namespaces, where it is mounted below `prefix`. Only in those of the
    host's own user namespace: there alone are copies of our mounts, and in others a tenant may have thousands."""
    number = _number(device)
    ours = os.readlink("/proc/self/ns/user")
    for pid, table in _namespaces():
        if _link(f"/proc/{pid}/ns/user") != ours:
            continue
        points = [one.point for one in table if one.device == number and one.point.startswith(prefix)]
        if points:
            _unmount_in(pid, points[::-1])


def _unmount_in(pid: int, points: list[str]) -> None:
    """What cannot be unmounted there is found mounted still."""
    try:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return

    def unmount() -> bytes:
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
        for point in points:
            try:
                syscalls.umount(point)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):
                    raise
        return b""

    try:
        apart.run(unmount, limit_s=UNMOUNT_S, keep=(namespace,))
    except (OSError, StorageError):
        pass
    finally:
        os.close(namespace)


def _number(device: str) -> str:
    """MAJOR:MINOR as mountinfo writes it."""
    rdev = os.stat(device).st_rdev
    return f"{os.major(rdev)}:{os.minor(rdev)}"


def _namespaces() -> Iterator[tuple[int, Iterator[inside.MountPoint]]]:
    """(a process in it, its mount table) of every mount namespace but ours."""
    seen = {"", os.readlink("/proc/self/ns/mnt")}
    for pid in _pids():
        namespace = _link(f"/proc/{pid}/ns/mnt")
        if namespace not in seen:
            seen.add(namespace)
            yield pid, inside.mounts_of(pid)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _references(pid: int) -> Iterator[str]:
    for name in ("cwd", "root", "exe"):
        yield f"/proc/{pid}/{name}"
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            yield f"/proc/{pid}/fd/{fd}"
    except OSError:
        return


def _on_device(path: str, device: int) -> bool:
    try:
        return os.stat(path).st_dev == device
    except OSError:
        return False


def lost_roots() -> set[int]:
    """The VMs whose root image has been deleted while it is mounted; a disk that was attached later may go."""
    found = set()
    for device, point in mounted_devices(os.path.join(STATE, "mnt")):
        vm_id = os.path.basename(os.path.dirname(point))
        if vm_id.isdigit() and point == VmPaths(int(vm_id)).root and is_lost(device):
            found.add(int(vm_id))
    return found
