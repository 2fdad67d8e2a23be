"""Who holds a mount or a loop device? For errors that name processes, and for mounts that live on in other namespaces.

Only looks at /proc and /sys, except `unmount_elsewhere` and `wait_until_free`, which remove copies of *our own* mounts,
at our own places, from the namespaces of other containers' controllers.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Sequence

from onelxc.errors import StorageError
from onelxc.model import STATE, VmPaths
from onelxc.root import loops, mounts, orphans, syscalls
from onelxc.root.work import Work

FREE_S = 10.0


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
    table = _table("/proc/self/mountinfo")
    return tuple(source for _, point, source in table if point in points and source.startswith("/dev/loop"))


def mounted_devices(directory: str) -> tuple[tuple[str, str], ...]:
    """(block device, mount point) of every mount below a directory, in our own namespace."""
    prefix = directory.rstrip("/") + "/"
    table = _table("/proc/self/mountinfo")
    return tuple((source, point) for _, point, source in table if point.startswith(prefix) and source[:5] == "/dev/")


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
    try:
        with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file", errors="surrogateescape") as file:
            path = file.read().rstrip("\n")
    except OSError:
        return False
    return path.endswith(" (deleted)") or bool(re.match(r"\.nfs[0-9a-f]{16,}", os.path.basename(path)))


def users_of(point: str) -> tuple[str, ...]:
    """Processes with an open file, directory or program on the file system mounted at `point`: `bash (4711)`."""
    try:
        device = os.stat(point).st_dev
    except OSError:
        return ()
    found = []
    for pid in _pids():
        if any(_on_device(path, device) for path in _references(pid)):
            found.append(orphans.describe(pid))
    return tuple(found)


def mounters_of(device: str) -> tuple[str, ...]:
    """Processes that see a mount of a block device: one for each mount namespace."""
    number = _number(device)
    return tuple(orphans.describe(pid) for pid, table in _namespaces() if any(n == number for n, _, _ in table))


def unmount_elsewhere(device: str, prefix: str) -> None:
    """Unmount `device` in all the other mount namespaces, where it is mounted below `prefix`."""
    number = _number(device)
    for pid, table in _namespaces():
        points = [point for n, point, _ in table if n == number and point.startswith(prefix)]
        if points:
            _unmount_in(pid, points[::-1])


def _unmount_in(pid: int, points: list[str]) -> None:
    """In a child, since a process cannot come back from another mount namespace without a descriptor of its own."""
    try:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    child = os.fork()
    if child == 0:
        try:
            syscalls.setns(namespace, syscalls.CLONE_NEWNS)
            for point in points:
                try:
                    syscalls.umount(point)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOENT):
                        os._exit(1)
        finally:
            os._exit(0)
    os.close(namespace)
    os.waitpid(child, 0)


def _number(device: str) -> str:
    """MAJOR:MINOR as mountinfo writes it."""
    rdev = os.stat(device).st_rdev
    return f"{os.major(rdev)}:{os.minor(rdev)}"


def _namespaces() -> Iterator[tuple[int, list[tuple[str, str, str]]]]:
    """(a process in it, its mount table) of every mount namespace but ours."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    for pid in _pids():
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            yield pid, _table(f"/proc/{pid}/mountinfo")
        except OSError:
            continue


def _table(path: str) -> list[tuple[str, str, str]]:
    """(MAJOR:MINOR, mount point, source) of a mount table."""
    found = []
    with open(path, encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.rstrip("\n").split(" ")
            source = fields[fields.index("-") + 2]
            found.append((fields[2], _unescape(fields[4]), source))
    return found


def _unescape(text: str) -> str:
    r"""mountinfo writes blanks, tabs, newlines and backslashes as \ooo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), text)


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
