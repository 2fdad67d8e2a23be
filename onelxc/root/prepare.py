"""How do a VM's disks become what libvirt starts a container from? The verb `prepare`.

It conducts and does nothing itself: an archive is imported, images are mounted outside the VM's directory, seen with
the VM's own ids, the context is brought in, init is looked at while the root can still be read as the tenant wrote it.
Every step is in the journal before it is taken. The answer is `model.Prepared`; the record is staged for the commit.
"""

from __future__ import annotations

import functools
import os
import stat
from typing import Any

from onelxc import domainxml, model
from onelxc.errors import ConfigurationError, StorageError
from onelxc.model import Disk, Init, IoLimits, Mount, Prepared, Vm
from onelxc.root import (
    apparmor,
    cache,
    cgroups,
    consolelog,
    context,
    filesystems,
    guard,
    holders,
    hub,
    importer,
    leases,
    loops,
    mounts,
    neighbours,
    newfile,
    nics,
    placeholders,
    qcow2,
    rawview,
    rbd,
    record,
    rootfs,
    targets,
    validate,
    volumes,
)
from onelxc.root.owner import Owner
from onelxc.root.work import Work

CONTEXT = "/context"
_A_DIRECTORY = (
    'it is a directory: OpenNebula has unpacked the archive, which loses its owners; set NO_DECOMPRESS="yes" on the'
    " image datastore and register the archive again"
)


def verb(work: Work, request: dict[str, Any]) -> Any:
    """The verb: `{"vm": …}` → a Prepared."""
    vm = validate.vm(request.get("vm"), work.vm_id, work.config)
    for nic in vm.nics:
        nics.check(work.vm_id, nic)
    neighbours.check(work, vm)
    hub.ensure_running()
    prepared = prepare(work, vm)
    record.stage(work, nics.resolved(vm, prepared.switches), prepared)
    neighbours.check(work, vm)
    consolelog.begin(work.vm_id)
    work.journal.take("domain")  # from here on the caller may start it
    return model.to_json(prepared)


def prepare(work: Work, vm: Vm) -> Prepared:
    """Mount everything. The caller undoes by the journal when this raises."""
    id_base = None if vm.privileged else work.config.first_id(vm.vm_id)
    controller = apparmor.controller(work.config.apparmor, vm.privileged)
    make_private(work.paths.mounts, id_base)
    devices = []
    init, device = _root(work, vm, id_base)
    if vm.root_disk.limits != IoLimits():
        devices.append((vm.root_disk.disk_id, device))
    found = []
    for disk in vm.data_disks:
        work.journal.take("mount", path=work.paths.disk(disk.disk_id))
        placeholders.put(work.paths.disk(disk.disk_id))
        device = mount_data_disk(work, disk, id_base)
        if disk.limits != IoLimits():
            devices.append((disk.disk_id, device))
        found.append(Mount(work.paths.disk(disk.disk_id), validate.mount_point(disk), disk.read_only))
    if vm.context is not None:
        _context(work, vm.context, id_base)
        found.append(Mount(work.paths.context, CONTEXT, True))
    prepared = Prepared(
        root=work.paths.root,
        id_base=id_base,
        mounts=tuple(sorted(found, key=lambda mount: mount.target.count("/"))),
        init=init,
        cgroup=cgroups.version(),
        profiles=tuple(map(_profile, vm.profiles)),
        devices=tuple(devices),
        interfaces=nics.interfaces(vm),
        switches=nics.switches(vm),
        swap_accounting=_counts_swap(),
        controller=controller,
    )
    _secure(vm, prepared)
    return prepared


def _secure(vm: Vm, prepared: Prepared) -> None:
    """What the guard does at each start, now, so that what it refuses is told in its own words."""
    if prepared.profiles or vm.raw:
        guard.secure(guard.Domain(domainxml.render(vm, prepared).encode()))
        return
    filesystems = [targets.Filesystem("mount", mount.source, mount.target) for mount in prepared.mounts]
    targets.secure(prepared.root, filesystems, Owner(prepared.id_base))


def make_private(directory: str, id_base: int | None) -> None:
    """The VM's directory of mounts: root's, and passable for nobody but root and the container's own root.

    libvirt's child goes through it with the container's ids; other users of the host must not come to the tenant's
    files, whose modes are the tenant's.
    """
    os.makedirs(directory, exist_ok=True)
    os.chmod(os.path.dirname(directory), 0o711)
    os.chown(directory, 0, 0 if id_base is None else id_base)
    os.chmod(directory, 0o710)


def _root(work: Work, vm: Vm, id_base: int | None) -> tuple[Init, str]:
    """Mount the root file system; which init is in it, and its block device."""
    disk = vm.root_disk
    opened = _open_mount(work, disk, vm.init)
    with opened as detached:
        init = rootfs.find_init(detached.fd, vm.init)
        device = detached.device
        work.journal.take("mount", path=work.paths.root)
        mounts.place(detached, work.paths.root, id_base=id_base)
    return init, device


def _import(work: Work, found: validate.Found, disk: Disk, init: str | None) -> None:
    """If the image is an archive, put a file system with its content in its place."""
    if found.directory < 0:
        return
    # the image has no name but for a moment between its own and the archive's
    taken = work.journal.take("file", path=newfile.temporary_name(found.real))
    imported = importer.import_archive(
        found.directory,
        found.name,
        size_mb=disk.size_mb,
        init=init,
        log=work.log,
        abort=_carry_on,
        limits=importer.Limits(work.config.import_timeout_s, work.config.import_limit_mb, work.config.import_memory_mb),
        cache=cache.Cache(work.config.cache_path, work.config.cache_max_mb, work.log),
    )
    work.journal.gave_back(taken)
    if imported:
        work.log(f"disk {disk.disk_id} was an archive and is an image now")


def _carry_on() -> None:
    """The session breaks off its worker from outside."""


def _context(work: Work, disk: Disk, id_base: int | None) -> None:
    """The files of the context ISO at their place on the host."""
    with validate.find(disk.path, work.config) as found:
        iso = found.open(os.O_RDONLY)
    try:
        with context.make(id_base=id_base) as detached:
            work.journal.take("mount", path=work.paths.context)
            mounts.place(detached, work.paths.context, id_base=None)
        context.fill(iso, work.paths.context, id_base=id_base)
    finally:
        os.close(iso)


def _open_mount(work: Work, disk: Disk, init: str | None) -> mounts.Detached:
    """A disk's file system as a detached mount, whatever the disk is. `init` is what a root file system must hold."""
    fd = _open_disk(work, disk, init)
    try:
        if disk.kind == "fs" and not disk.read_only:
            _format(fd, disk)
        return mounts.open_image(
            fd,
            disk.path,
            work.log,
            read_only=disk.read_only,
            root=init is not None,
            size_mb=disk.size_mb,
            enlarge=functools.partial(rawview.enlarge, work),
            fsck_limit_s=work.config.fsck_timeout_s,
        )
    finally:
        os.close(fd)


def _open_disk(work: Work, disk: Disk, init: str | None) -> int:
    """A descriptor of the disk's raw bytes: a file or a block device. What it takes is in the journal."""
    if not disk.read_only:
        leases.take(work, disk)
    if disk.path.startswith(rbd.PREFIX):
        return rbd.open_image(work, disk)
    with validate.find(disk.path, work.config) as found:
        if stat.S_ISDIR(found.status.st_mode):
            raise StorageError(f"Cannot use {disk.path}: {_A_DIRECTORY}")
        _import(work, found, disk, init)
    # opened anew: an import has put another file in its place
    with validate.find(disk.path, work.config) as found:
        return open_image(work, found, disk)


def open_image(work: Work, found: validate.Found, disk: Disk) -> int:
    """A descriptor of an image's raw bytes for the loop device; the image is in the journal from here on."""
    status = found.status
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and not disk.read_only:
        # a lease lies beside one name of the image, and this is another
        holders.refuse_used(disk.path, {(status.st_dev, status.st_ino)})
    if stat.S_ISREG(status.st_mode):
        work.journal.take("loop", path=found.real, dev=status.st_dev, ino=status.st_ino)
    if stat.S_ISBLK(status.st_mode):
        return volumes.take(work, found, disk)
    fd = found.open(os.O_RDONLY if disk.read_only else os.O_RDWR)
    if stat.S_ISREG(status.st_mode) and qcow2.is_qcow2(fd):
        os.close(fd)
        return qcow2.export(work, found, disk)
    return fd


def mount_data_disk(work: Work, disk: Disk, id_base: int | None) -> str:
    """Mount a data disk at its place on the host; a volatile one is formatted first. Gives its block device."""
    target = work.paths.disk(disk.disk_id)
    opened = _open_mount(work, disk, None)
    with opened as detached:
        device = detached.device
        work.journal.take("mount", path=target)
        mounts.place(detached, target, id_base=id_base)
    return device


def _format(fd: int, disk: Disk) -> None:
    """A volatile disk comes empty from some transfer managers and formatted from others."""
    seen = filesystems.probe_parts(fd, [(0, 0)], disk.path)[0]
    if not seen.kind and not seen.partitions:
        with loops.attach(fd, name=disk.path) as loop:
            filesystems.make(loop.path, disk.fs or "ext4")


def _profile(name: str) -> str:
    """A fragment of the administrator's, from a directory that only root writes."""
    path = os.path.join(model.PROFILES, name if name.endswith(".xml") else f"{name}.xml")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigurationError(f"Cannot read the profile {name}: {path}: {error.strerror}") from error


def _counts_swap() -> bool:
    if cgroups.version() == 2:
        return True
    points = [point for point, kind in cgroups.hierarchies() if "memory" in kind.split(",")]
    return any(os.path.exists(os.path.join(point, "memory.memsw.limit_in_bytes")) for point in points)
