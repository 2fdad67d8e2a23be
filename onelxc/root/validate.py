"""What may an unprivileged caller name? VM ids, names of ours, and disks that lie in the host's datastores.

A disk's path is walked component by component through descriptors, following symbolic links by hand, and never leaves
the places that host.conf allows. What is found is held open: nobody can exchange it afterwards, and every later use
goes through the descriptors (`/proc/self/fd/N` for programs). The walk stops before it looks at anything outside, so a
path outside gets the same answer whether or not something is there.
"""

from __future__ import annotations

import fnmatch
import os
import posixpath
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onelxc import wire
from onelxc.errors import HelperError, StorageError
from onelxc.model import Disk, Vm
from onelxc.root import targets

if TYPE_CHECKING:
    from onelxc.config import HostConfig

_LINKS = 16
_LARGEST_MB = 1 << 34
_LONGEST_POINT, _DEEPEST_POINT = 1024, 64
_PATH_FD = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass
class Found:
    """A file or device that a caller named, held open; links are resolved, `real` is where it truly is."""

    path: str
    real: str
    name: str
    directory: int
    """Descriptor of the directory that it lies in (-1 for a device)."""
    file: int
    """O_PATH descriptor of itself."""

    @property
    def status(self) -> os.stat_result:
        return os.fstat(self.file)

    def open(self, flags: int) -> int:
        """A descriptor to read or write it."""
        try:
            return os.open(f"/proc/self/fd/{self.file}", flags | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"Cannot open {self.path}: {error.strerror}") from error

    def beside(self, name: str) -> str:
        """A path of another file in its directory, for calls without a dir_fd."""
        return f"/proc/self/fd/{self.directory}/{name}"

    def close(self) -> None:
        for fd in (self.directory, self.file):
            if fd >= 0:
                os.close(fd)
        self.directory = self.file = -1

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find(path: str, config: HostConfig) -> Found:
    """The regular file, directory or block device at `path`. StorageError if it lies outside, is missing or is else."""
    directory, name, real = _walk(path, config)
    if directory < 0:
        return _device(path, real)
    try:
        file = os.open(name, _PATH_FD, dir_fd=directory)
    except OSError as error:
        os.close(directory)
        raise StorageError(f"Cannot open {path}: {error.strerror}") from error
    found = Found(path, real, name, directory, file)
    mode = found.status.st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        found.close()
        raise StorageError(f"Cannot use {path}: it is neither a file nor a volume")
    return found


def find_directory(path: str, config: HostConfig) -> int:
    """A descriptor of the directory at `path`, which lies in a datastore or is one."""
    for datastore in _datastores(config):
        if posixpath.normpath(path) == datastore:
            return os.open(datastore, _DIRECTORY)
    found = find(path, config)
    if not stat.S_ISDIR(found.status.st_mode):
        found.close()
        raise StorageError(f"Cannot use {path}: it is no directory")
    try:
        return os.open(f"/proc/self/fd/{found.file}", _DIRECTORY)
    except OSError as error:
        raise StorageError(f"Cannot open {path}: {error.strerror}") from error
    finally:
        found.close()


def vm(data: object, vm_id: int, config: HostConfig) -> Vm:
    """The VM that a caller describes, if it is the one whose lock is held and allowed to be what it says."""
    read = wire.decode(Vm, data)
    if read.vm_id != vm_id:
        raise HelperError(f"Cannot prepare VM {vm_id}: it is described as VM {read.vm_id}")
    if read.privileged and not config.privileged:
        raise HelperError(
            f"Cannot prepare VM {vm_id}: this host runs no privileged containers (PRIVILEGED in host.conf)"
        )
    identifiers = [disk.disk_id for disk in read.disks]
    if len(set(identifiers)) != len(identifiers):
        raise HelperError(f"Cannot prepare VM {vm_id}: DISK_IDs are not distinct small numbers: {identifiers}")
    for each in read.disks:
        check_disk(each)
    for profile in read.profiles:
        if not profile or "/" in profile or profile.startswith("."):
            raise HelperError(f"Cannot prepare VM {vm_id}: {profile!r} is no name of a profile")
    # whether a template or the operator's defaults name them is not known here: this host's own word is what counts
    refused = config.refused(read.profiles)
    if refused:
        raise HelperError(
            f"Cannot prepare VM {vm_id}: this host does not allow the profile {refused} (PROFILES in host.conf)"
        )
    if read.raw and not config.raw:
        raise HelperError(f"Cannot prepare VM {vm_id}: this host allows no RAW (RAW in host.conf)")
    return read


def check_disk(disk: Disk) -> None:
    """HelperError or StorageError unless its numbers and its place are those that a disk can have."""
    if not 0 <= disk.disk_id < 100000:
        raise HelperError(f"Cannot use disk {disk.disk_id}: DISK_IDs are not distinct small numbers")
    if disk.size_mb is not None and not 0 < disk.size_mb <= _LARGEST_MB:
        raise HelperError(f"Cannot use disk {disk.disk_id}: not a size: {disk.size_mb} MB")
    mount_point(disk)


def mount_point(disk: Disk) -> str:
    """Where a data disk goes inside the container: an absolute path without `..`, and none of libvirt's own."""
    targets.refuse_special(disk.mount_point)
    point = posixpath.normpath("/" + disk.mount_point.lstrip("/"))
    if len(point) > _LONGEST_POINT or point.count("/") > _DEEPEST_POINT:
        raise StorageError(f"Cannot mount disk {disk.disk_id} at {disk.mount_point!r}: too long, or too deep, a path")
    return point


def _datastores(config: HostConfig) -> tuple[str, ...]:
    """The allowed places as configured, and as they really are."""
    places = [posixpath.normpath(place) for place in config.datastores]
    return tuple(dict.fromkeys([*places, *map(os.path.realpath, places)]))


def _outside(path: str) -> StorageError:
    return StorageError(f"Cannot use {path}: it does not lie in a datastore of this host (DATASTORES in host.conf)")


def _walk(path: str, config: HostConfig) -> tuple[int, str, str]:
    """(descriptor of the directory, last component, real path), (-1, "", device's path) for an allowed device."""
    if not path.startswith("/"):
        raise _outside(path)
    # the links of a path are the caller's; those of a datastore's own place the administrator's
    places = _datastores(config)
    wanted = posixpath.normpath(path)
    for _ in range(_LINKS):
        place = next((place for place in places if wanted.startswith(place.rstrip("/") + "/")), None)
        if place is None:
            if wanted != posixpath.normpath(path) and _is_device_name(wanted, config):
                return -1, "", wanted
            raise _outside(path)
        followed = _descend(path, place, wanted[len(place.rstrip("/")) + 1 :].split("/"))
        if not isinstance(followed, str):
            return followed
        wanted = followed
    raise StorageError(f"Cannot open {path}: too many symbolic links")


def _descend(path: str, place: str, components: list[str]) -> tuple[int, str, str] | str:
    """Go down from an allowed place. A symbolic link on the way ends it with the path that is meant instead."""
    try:
        here = os.open(place, _DIRECTORY)
    except OSError as error:
        raise StorageError(f"Cannot open {place}: {error.strerror}") from error
    try:
        real = os.path.realpath(place)
        for index, name in enumerate(components):
            try:
                link = os.readlink(name, dir_fd=here)
            except OSError:
                link = ""
            if link:
                rest = components[index + 1 :]
                return posixpath.normpath(posixpath.join(real, link, *rest))
            if index == len(components) - 1:
                kept, here = here, -1
                return kept, name, posixpath.join(real, name)
            below = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
            real = posixpath.join(real, name)
        raise StorageError(f"Cannot open {path}: it is a datastore itself")
    except OSError as error:
        raise StorageError(f"Cannot open {path}: {error.strerror}") from error
    finally:
        if here >= 0:
            os.close(here)


def _is_device_name(path: str, config: HostConfig) -> bool:
    """Whether host.conf lets a link in a datastore lead there: the volumes of OpenNebula's LVM drivers by default."""
    return any(fnmatch.fnmatchcase(path, one) and path.count("/") == one.count("/") for one in config.block_devices)


def _device(path: str, device: str) -> Found:
    """/dev is root's, so its links may be followed, but they have to end at a block device in /dev."""
    try:
        file = os.open(device, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot open {path}: {device}: {error.strerror}") from error
    real = os.readlink(f"/proc/self/fd/{file}")
    if not stat.S_ISBLK(os.fstat(file).st_mode) or not real.startswith("/dev/"):
        os.close(file)
        raise StorageError(f"Cannot use {path}: {device} is no block device")
    return Found(path, device, posixpath.basename(device), -1, file)
