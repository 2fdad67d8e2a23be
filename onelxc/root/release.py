"""How is everything that a VM holds on this host given back? The verb `release`, and the undoing of what was not kept.

Order: the container's processes, its network devices, flush and unmount, devices, files, control groups, our record.
The journal names what may be there, the kernel says what is: mounts below the VM's own directory, loop devices over its
images. Everything can be done again and again; "already gone" is success. When it returns, the images are flushed and
nothing holds them. The first error is the one raised, after all the rest has been tried. Nothing has to be written for
that; what cannot be removed from a full or read-only file system is named in the log and keeps no VM.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
from collections.abc import Callable
from typing import Any

from onelxc import command, names, vnc
from onelxc.errors import CommandError, OneLxcError, StorageError
from onelxc.model import ID_RANGE, VmPaths
from onelxc.root import (
    cgroups,
    execution,
    flushing,
    holders,
    leases,
    leaving,
    mounts,
    named_group,
    neighbours,
    orphans,
    rawview,
    rbd,
    record,
    starts,
    validate,
    volumes,
)
from onelxc.root.cutting import cut_off
from onelxc.root.journal import Entry
from onelxc.root.work import Work

UNMOUNT_S = 5.0
NET = "/sys/class/net"


def verb(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: everything of this VM, if it is ours at all."""
    everything(work)
    return {}


def is_ours(vm_id: int) -> bool:
    """Whether anything says that this VM was ours: a state directory, or a mount in its place."""
    paths = VmPaths(vm_id)
    return os.path.exists(paths.state) or bool(mounts.mounted_below(paths.mounts))


def everything(work: Work) -> None:
    """Give back all that the VM holds. A container of that name that is not ours is left alone."""
    if not is_ours(work.vm_id):
        _Steps().run(lambda: _remove_directories(work))
        return
    entries = work.journal.held()
    images = _images(work, entries)
    steps = _Steps()
    first = work.config.first_id(work.vm_id)
    lost = leases.is_lost(work.vm_id, entries, work.config)
    if lost:
        cut_off(work)
    steps.run(lambda: flushing.thaw(work.paths))
    rawview.fail_lost(entries)
    steps.run(lambda: orphans.end(work.vm_id))
    steps.run(lambda: named_group.remove(work.vm_id, range(first, first + ID_RANGE)))
    steps.run(lambda: execution.forget(work.vm_id))
    steps.run(lambda: starts.forget(work.vm_id))
    steps.run(lambda: _stop_vnc(work.vm_id))
    steps.run(lambda: remove_network_devices(work.vm_id))
    steps.run(lambda: _remove_ports(work))
    steps.run(lambda: unmount_all(work, flush=not lost))
    for entry in entries:
        if entry.kind in _FILES:
            _attempt(work, lambda: give_back(work, entry))  # noqa: B023
        elif entry.kind not in (*_BY_THE_KERNEL, *_LAST):
            steps.run(lambda: give_back(work, entry))  # noqa: B023
    steps.finish()
    holders.wait_until_free(work, images, [])
    for entry in entries:
        if entry.kind in _LAST:
            give_back(work, entry)
    _remove_directories(work)
    work.journal.clear()
    shutil.rmtree(work.paths.state, ignore_errors=True)


def _stop_vnc(vm_id: int) -> None:
    found = record.legible(vm_id)
    graphics = found.vm.graphics if found is not None else None
    if graphics is not None and not neighbours.port_is_anothers(vm_id, graphics.port):
        vnc.stop(graphics.port)


def undo(work: Work) -> None:
    """Give back what was taken and never committed, last in, first out; all there is where nothing was ever kept."""
    rawview.fail_lost(work.journal.held())
    record.publish(work)
    if not os.path.exists(work.paths.record):
        if os.path.exists(work.paths.state) or os.path.exists(work.paths.mounts):
            everything(work)
        return
    steps = _Steps()
    for entry in work.journal.held():
        if not entry.committed and entry.kind in AFTER_COMMIT:
            work.journal.gave_back(entry.number)
        elif entry.committed == (entry.kind in AFTER_COMMIT):
            steps.run(lambda: give_back(work, entry))  # noqa: B023
    steps.finish()


def is_unfinished(entry: Entry) -> bool:
    """Whether an action that was killed has left this to be undone, or to be finished."""
    return not entry.committed or entry.kind in AFTER_COMMIT


def finish(work: Work) -> None:
    """What an action has decided with its commit: done now, or by whoever comes next. Never an error."""
    for entry in work.journal.held():
        if entry.committed and entry.kind in AFTER_COMMIT:
            _attempt(work, lambda: give_back(work, entry))  # noqa: B023


def let_go_of_disks(work: Work) -> None:
    """Unmount all the disks of a container that has ended, and return when their images are free."""
    entries = work.journal.held()
    images = _images(work, entries)
    unmount_all(work)
    holders.wait_until_free(work, images, [])
    for entry in entries:
        if entry.kind in ("mount", "loop"):
            work.journal.gave_back(entry.number)
        elif entry.kind in ("qcow2", "rbd", "volume"):
            give_back(work, entry)


class _Steps:
    """Try everything, keep the first error."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    def run(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (OneLxcError, OSError) as error:
            self.first = self.first or error

    def finish(self) -> None:
        if self.first is not None:
            raise self.first


def _attempt(work: Work, step: Callable[[], None]) -> None:
    """What must not stand in the way: if it fails, the log says so."""
    try:
        step()
    except (OneLxcError, OSError) as error:
        work.log(str(error))


def give_back(work: Work, entry: Entry) -> None:
    """Give back one thing of the journal, and note that."""
    function = GIVE_BACK.get(entry.kind)
    if function is None:
        raise StorageError(f"Cannot give back {entry.kind} of VM {work.vm_id}: an older or newer driver took it")
    function(work, entry.what)
    work.journal.gave_back(entry.number)


def _give_back_mount(work: Work, what: dict[str, Any]) -> None:
    path = str(what["path"])
    write_out(work, path)
    unmount(work, path)
    for directory in (path, os.path.dirname(path)):
        try:
            os.rmdir(directory)
        except OSError:
            break


def _give_back_loop(work: Work, what: dict[str, Any]) -> None:
    holders.wait_until_free(work, {(int(what["dev"]), int(what["ino"]))}, [])


def _give_back_file(work: Work, what: dict[str, Any]) -> None:
    """A file that we made, next to an image: its directory is opened without following what was put there since."""
    path = str(what["path"])
    if path.startswith(names.STATE + "/"):
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC) if os.path.exists(path) else -1
    else:
        try:
            directory = validate.find_directory(os.path.dirname(path), work.config)
        except StorageError:
            return  # the whole directory is gone, or no longer where it was: nothing of ours in it
    if directory < 0:
        return
    try:
        os.unlink(os.path.basename(path), dir_fd=directory)
    except FileNotFoundError:
        pass
    finally:
        os.close(directory)


def _give_back_domain(work: Work, what: dict[str, Any]) -> None:
    orphans.end(work.vm_id)
    remove_network_devices(work.vm_id)


def _by(module: str, function: str) -> Callable[[Work, dict[str, Any]], None]:
    """A function of a module above this one, or of one that is rarely needed: imported when it is called."""

    def give_back_there(work: Work, what: dict[str, Any]) -> None:
        getattr(importlib.import_module(module), function)(work, what)

    return give_back_there


GIVE_BACK: dict[str, Callable[[Work, dict[str, Any]], None]] = {
    "mount": _give_back_mount,  # path
    "loop": _give_back_loop,  # dev, ino of the image; path for people
    "qcow2": rawview.give_back,  # path of what is shown; dev, ino of the image
    "nbd": rawview.reconnect,  # path of a qcow2 that grows
    "volume": volumes.give_back,  # path of the device
    "rbd": rbd.give_back,  # image, options
    "shown": leaving.give_back,  # disk, source, target, id_base: what came to a running container
    "file": _give_back_file,  # path
    "domain": _give_back_domain,
    "nic": _by("onelxc.root.network", "give_back"),  # nic
    "record": record.unstage,
    "suspended": _by("onelxc.root.freezer", "give_back"),
    "resumed": _by("onelxc.root.freezer", "suspend_again"),
    "hidden": _by("onelxc.root.livedisks", "show_again"),  # source: taken out of a container
    "disk_leaves": _by("onelxc.root.livedisks", "leave_host"),  # source, limited, place, entries
    "nic_leaves": _by("onelxc.root.network", "leave"),  # nic
    "limits": _by("onelxc.root.resized", "give_back"),
    "tree": _by("onelxc.root.snapshots", "remove_tree"),  # path of an unfinished snapshot
    "still": _by("onelxc.root.snapshots", "go_on"),
    "revert": _by("onelxc.root.snapshots", "finish"),  # files: [copy, disk]
    leases.KIND: leases.give_back,  # path, token, disk
    leases.TRYING: leases.give_back,  # path, token, disk
}
"""How each kind of journal entry is given back, and what its data are."""


AFTER_COMMIT = ("disk_leaves", "nic_leaves")
"""Kinds that say what remains to be done once they are committed. Until then nothing has been done."""

_BY_THE_KERNEL = ("mount", "loop", "domain", "record", "suspended", "resumed", "hidden", "limits", *AFTER_COMMIT)
"""Kinds that a whole release finds by itself or that end with the container, whatever the journal says."""

_FILES = ("file", "tree", "revert")
"""Kinds that are files in the VM's directory, which OpenNebula removes. It may be full, read-only or gone."""
_LAST = (leases.KIND, leases.TRYING)
"""Kinds that are given back when nothing holds the images any more."""


def _images(work: Work, entries: list[Entry]) -> set[tuple[int, int]]:
    """(st_dev, st_ino) of the VM's images: what the journal names, and what is mounted in the VM's place."""
    found = {(int(e.what["dev"]), int(e.what["ino"])) for e in entries if e.kind == "loop"}
    return found | {pair for pair in map(holders.loop_image, holders.loops_below(work.paths.mounts)) if pair}


def remove_network_devices(vm_id: int) -> None:
    """The host sides of the VM's NICs, which go with the container unless it died badly, and what limits them."""
    if any(device.startswith(names.ifb_device(vm_id, "")) for device in os.listdir(NET)):
        from onelxc.root import traffic  # most VMs have none, and probes come here every five seconds

        traffic.clear_vm(vm_id)
    pattern = re.compile(re.escape(names.deploy_id(vm_id)) + r"-\d+\Z")
    for device in os.listdir(NET):
        # a veth has a peer; a bridge or a card that somebody called so is not ours
        if not pattern.match(device) or not _is_veth(device):
            continue
        try:
            command.run(["ip", "link", "delete", "dev", device], verb=f"remove {device}")
        except CommandError:
            if os.path.exists(os.path.join(NET, device)):
                raise


def _remove_ports(work: Work) -> None:
    """What an Open vSwitch still has of the VM's NICs."""
    found = record.legible(work.vm_id)
    if found is not None and any(nic.bridge_type == "openvswitch" for nic in found.vm.nics):
        from onelxc.root import ports

        for nic in found.vm.nics:
            if nic.bridge_type == "openvswitch":
                ports.remove(nic.device)


def _is_veth(device: str) -> bool:
    try:
        with open(os.path.join(NET, device, "iflink")) as peer, open(os.path.join(NET, device, "ifindex")) as own:
            return peer.read() != own.read() and not os.path.exists(os.path.join(NET, device, "device"))
    except OSError:
        return False


def unmount_all(work: Work, *, flush: bool = True) -> None:
    """Everything below the VM's directory of mounts, deepest first, written out before."""
    steps = _Steps()
    for point in reversed(mounts.mounted_below(work.paths.mounts)):
        # a datastore that is full or gone takes no more: a cancel says so, and is not refused for that
        written = functools.partial(write_out, work, point)
        if flush and work.verb == "cancel":
            _attempt(work, written)
        elif flush:
            steps.run(written)
        steps.run(lambda: unmount(work, point))  # noqa: B023
    steps.finish()


def write_out(work: Work, point: str) -> None:
    """Write out what can be: an image whose server was killed takes no more, and must not be held for that."""
    try:
        flushing.flush(point)
    except StorageError as error:
        if not rawview.fail_lost(work.journal.held()):
            raise
        work.log(f"{error}: the server of an image ({rawview.DAEMON}) was killed; what it had not written is lost")


def unmount(work: Work, point: str, *, leave: int = 0) -> None:
    """Unmount, in every mount namespace that has a copy. The error says who keeps it busy. `leave` so many below."""
    try:
        mounts.unmount(point, limit_s=UNMOUNT_S, leave=leave)
    except StorageError as error:
        users = holders.users_of(point)
        raise StorageError(f"{error}; in use by {', '.join(users)}" if users else str(error)) from error


def _remove_directories(work: Work) -> None:
    """The empty mount points; and v1's groups, which libvirt leaves when it was away at the end."""
    base = work.paths.mounts
    if os.path.isdir(base) and not mounts.mounted_below(base):
        for directory, _, _ in os.walk(base, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                continue
    if is_ours(work.vm_id):
        for group in cgroups.groups(work.vm_id):
            if not any(cgroups.each_process(group.path)):
                cgroups.remove(group.path)
