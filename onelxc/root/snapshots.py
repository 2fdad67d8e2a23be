"""How is a VM's state kept, gone back to, and forgotten? Copies of all its disks, made at one moment.

They lie in the VM's own directory, `snap-0/disk.0`, owned like the disks: so they outlive a poweroff, travel with a
cold migration, and go when OpenNebula removes the VM. By reflink where the file system can, else sparse copies. While
they are made the container's tasks and file systems stand still, so that they belong together and need no repair.
Memory is in none of them: going back restarts the container, which is its caller's part.

What lies in that directory is oneadmin's to change: everything is opened without following links, and is looked at.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from onelxc import model
from onelxc.errors import HelperError, NoSuchDomainError, StorageError
from onelxc.model import Disk
from onelxc.root import freezer, orphans, prepare, record, release, snapshotfiles, validate
from onelxc.root.work import Work

_NAME = re.compile(r"snap-(0|[1-9][0-9]{0,8})")


def create(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"name": "snap-0"}`. One of that name, which OpenNebula has forgotten, is replaced."""
    name = _name(request)
    found = _record(work)
    with _home(work, found) as home, contextlib.ExitStack() as stack:
        disks = [(disk, stack.enter_context(validate.find(disk.path, work.config))) for disk in _kept(found.vm)]
        temporary = f".{name}.new"
        snapshotfiles.remove(home.fd, temporary)
        tree = work.journal.take("tree", path=posixpath.join(home.path, temporary))
        os.mkdir(temporary, 0o700, dir_fd=home.fd)
        directory = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | snapshotfiles.NOFOLLOW, dir_fd=home.fd)
        stack.callback(os.close, directory)
        snapshotfiles.look_for_space(home, [disk for _, disk in disks], f"make {name} of VM {work.vm_id}")
        with standing_still(work):
            for disk, image in disks:
                snapshotfiles.copy_out(image, directory, f"disk.{disk.disk_id}")
        for disk, _ in disks:
            snapshotfiles.sync(f"disk.{disk.disk_id}", directory)
        os.fchown(directory, home.uid, home.gid)
        os.fchmod(directory, 0o750)
        os.fsync(directory)
        snapshotfiles.remove(home.fd, name)
        os.rename(temporary, name, src_dir_fd=home.fd, dst_dir_fd=home.fd)
        os.fsync(home.fd)
        work.journal.gave_back(tree)
    return {"name": name}


def check(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: whether `revert` could succeed. Asked before the container is ended for it."""
    name = _name(request)
    found = _record(work)
    with _home(work, found) as home, _opened(work, home, name) as directory:
        images = snapshotfiles.images_in(directory, f"{name} of VM {work.vm_id}", found.vm.root_disk.disk_id)
        if not snapshotfiles.clones(images[found.vm.root_disk.disk_id], home.fd):
            snapshotfiles.need_space(
                home,
                sum(snapshotfiles.allocated(fd) for fd in images.values()),
                f"go back to {name} of VM {work.vm_id}",
            )
        for disk in _kept(found.vm):
            if disk.disk_id not in images:
                work.log(f"disk {disk.disk_id} was attached after {name} was made and stays as it is")
        snapshotfiles.close(images)
    return {}


def revert(work: Work, request: dict[str, Any]) -> Any:
    """The verb: `{"name": "snap-0"}`, of a container that has ended; mounts the disks again. → Prepared

    Either all the disks are as they were then, or none: once every copy is complete, a crash does not stop the rest.
    """
    name = _name(request)
    found = _record(work)
    if orphans.alive(work.vm_id):
        raise HelperError(f"Cannot go back to {name} of VM {work.vm_id}: its container runs")
    with _home(work, found) as home, _opened(work, home, name) as directory:
        images = snapshotfiles.images_in(directory, f"{name} of VM {work.vm_id}", found.vm.root_disk.disk_id)
        release.let_go_of_disks(work)
        files = []
        for disk in _kept(found.vm):
            if disk.disk_id in images:
                files += _copy_beside(work, images[disk.disk_id], disk)
        snapshotfiles.close(images)
        done = work.journal.take("revert", files=files)
        finish(work, {"files": files})
        work.journal.gave_back(done)
        for entry in work.journal.held():
            if entry.kind == "file" and [entry.what["path"]] in [pair[:1] for pair in files]:
                work.journal.gave_back(entry.number)
    prepared = prepare.prepare(work, found.vm)
    record.stage(work, found.vm, prepared)
    work.journal.take("domain")  # from here on the caller may start it
    return model.to_json(prepared)


def delete(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"name": "snap-0"}`. One that is not there is deleted."""
    name = _name(request)
    with _home(work, _record(work)) as home:
        snapshotfiles.remove(home.fd, name)
        os.fsync(home.fd)
    return {}


def finish(work: Work, what: dict[str, Any]) -> None:
    """Put complete copies in the place of the disks: `files` is a list of [copy, disk], by their real paths."""
    for copy, disk in what["files"]:
        directory = validate.find_directory(posixpath.dirname(disk), work.config)
        try:
            os.rename(posixpath.basename(copy), posixpath.basename(disk), src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        except FileNotFoundError:
            continue  # it is in place already
        finally:
            os.close(directory)


def remove_tree(work: Work, what: dict[str, Any]) -> None:
    """Remove a snapshot that was never finished."""
    path = str(what["path"])
    try:
        home = validate.find_directory(posixpath.dirname(path), work.config)
    except StorageError:
        return  # the VM's directory has gone, and this with it
    try:
        snapshotfiles.remove(home, posixpath.basename(path))
    finally:
        os.close(home)


def go_on(work: Work, what: dict[str, Any]) -> None:
    """Let a container go on that stood still for a snapshot."""
    try:
        freezer.verb_thaw(work, {"why": freezer.SNAPSHOT})
    except NoSuchDomainError:
        record.set_paused(work.vm_id, "")


def _name(request: dict[str, Any]) -> str:
    name = str(request.get("name"))
    if not _NAME.fullmatch(name):
        raise HelperError(f"Cannot find a snapshot: not a name of ours: {name!r}")
    return name


def _record(work: Work) -> record.Record:
    found = record.read(work.vm_id)
    if found is None:
        raise NoSuchDomainError(f"Cannot find {model.deploy_id(work.vm_id)}: no such container of ours on this host")
    return found


def _kept(vm: model.Vm) -> tuple[Disk, ...]:
    """The disks that the container can write."""
    return tuple(disk for disk in (vm.root_disk, *vm.data_disks) if not disk.read_only)


@contextlib.contextmanager
def _home(work: Work, found: record.Record) -> Iterator[snapshotfiles.Home]:
    """The directory that OpenNebula gave the VM: where its disks are, whatever they may be links to."""
    path = posixpath.dirname(found.vm.root_disk.path)
    fd = validate.find_directory(path, work.config)
    try:
        status = os.fstat(fd)
        yield snapshotfiles.Home(path, fd, status.st_uid, status.st_gid)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(work: Work, home: snapshotfiles.Home, name: str) -> Iterator[int]:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | snapshotfiles.NOFOLLOW, dir_fd=home.fd)
    except OSError as error:
        raise StorageError(
            f"Cannot find snapshot {name} of VM {work.vm_id}: {posixpath.join(home.path, name)}: {error.strerror}"
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def standing_still(work: Work) -> Iterator[None]:
    """The container and its disks, while the body changes something below them."""
    still = work.journal.take("still")
    freezer.verb_freeze(work, {"why": freezer.SNAPSHOT})
    try:
        yield
    finally:
        freezer.verb_thaw(work, {"why": freezer.SNAPSHOT})
        work.journal.gave_back(still)


def _copy_beside(work: Work, source: int, disk: Disk) -> list[list[str]]:
    """A complete copy of the snapshot's image beside the disk: [[copy, disk]]. A volume is written over at once."""
    with validate.find(disk.path, work.config) as found:
        if found.directory < 0:
            snapshotfiles.write_over(source, found)
            return []
        name = f".onelxc-{found.name}.{os.getpid()}"
        path = posixpath.join(posixpath.dirname(found.real), name)
        work.journal.take("file", path=path)
        try:
            target = os.open(
                name, os.O_RDWR | os.O_CREAT | os.O_EXCL | snapshotfiles.NOFOLLOW, 0o600, dir_fd=found.directory
            )
            try:
                snapshotfiles.fill(source, target, found)
                os.fsync(target)
            finally:
                os.close(target)
        except OSError as error:
            raise StorageError(f"Cannot copy to {path}: {error.strerror}") from error
        return [[path, found.real]]
