"""What was a VM deployed with? Root's own record of it, JSON in the VM's state directory.

`vm.json` says that the VM is ours and alive as far as we know; it comes with a commit and goes with the release. Until
the commit it lies beside it as `vm.json.new`. Whatever changes a live VM stages a changed record and commits that.
`paused` is there while the container is frozen on somebody's wish, and says whose: on cgroup v2 libvirt does not know.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from onelxc import jsontext, model, wire
from onelxc.errors import HelperError, StorageError
from onelxc.model import Prepared, Vm, VmPaths
from onelxc.names import is_number
from onelxc.root import durable, limits, runs
from onelxc.root.journal import make_state_directory
from onelxc.root.work import Work

BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Record:
    """One deployed VM. `boot` is the boot of the host in which it was started."""

    vm: Vm
    prepared: Prepared
    boot: str

    @property
    def of_this_boot(self) -> bool:
        return self.boot == boot_id()


def boot_id() -> str:
    with open(BOOT_ID) as file:
        return file.read().strip()


def read(vm_id: int) -> Record | None:
    """The record of a deployed VM, None if there is none."""
    return _read(vm_id, VmPaths(vm_id).record)


def newest(vm_id: int) -> Record | None:
    """The record that is staged, else the one that is kept, else None."""
    return _read(vm_id, VmPaths(vm_id).record + ".new") or read(vm_id)


def _read(vm_id: int, path: str) -> Record | None:
    try:
        with open(path, "rb") as file:
            data = jsontext.loads(file.read())
        return Record(wire.decode(Vm, data["vm"]), wire.decode(Prepared, data["prepared"]), str(data["boot"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, HelperError) as error:
        raise StorageError(f"Cannot read the record of VM {vm_id}: {error}") from error


def legible(vm_id: int) -> Record | None:
    """`newest`, but None for one that cannot be read: damaged, or of another version of the driver.

    For whoever gives back what a VM holds: a record tells where to look as well, and must never be what keeps the VM.
    """
    try:
        return newest(vm_id)
    except StorageError:
        return None


def stage(work: Work, vm: Vm, prepared: Prepared) -> None:
    """Write the record that the next commit makes the VM's."""
    work.journal.take("record")
    data = {"vm": model.to_json(vm), "prepared": model.to_json(prepared), "boot": boot_id()}
    write_json(VmPaths(vm.vm_id).record + ".new", data)


def unstage(work: Work, what: dict[str, Any]) -> None:
    """Drop a record that was never committed."""
    _unlink(work.paths.record + ".new")


def commit(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: what was taken so far belongs to the VM, and the staged record is its own.

    With the journal's line it is done; what follows is no error, since whoever comes next finishes it (`release.undo`).
    """
    held = work.journal.held()
    if any(entry.kind == "domain" and not entry.committed for entry in held):
        runs.note(work.vm_id, runs.controller(work.vm_id))
    if held:
        work.journal.commit()
    try:
        publish(work)
    except OSError as error:
        work.log(f"{work.paths.record}: {error.strerror}")
    return {}


def kept(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"session": …}`, whether the last commit was that session's. For a caller whose helper was killed."""
    return {"kept": work.journal.kept(str(request.get("session", "")))}


def publish(work: Work) -> None:
    """Put the staged record in its place, if its commit is in the journal; a crash may have come in between."""
    staged = [entry for entry in work.journal.held() if entry.kind == "record"]
    if not staged or not all(entry.committed for entry in staged):
        return
    path = work.paths.record
    if os.path.exists(path + ".new"):
        os.rename(path + ".new", path)
        durable.sync_directory(os.path.dirname(path))
    for entry in staged:
        work.journal.gave_back(entry.number)


def resize(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"cpu": cores, "vcpu": n, "memory_kib": n}`, written down for the commit that says they are so."""
    found = read(work.vm_id)
    if found is None:
        raise StorageError(f"Cannot resize VM {work.vm_id}: there is no record of how it was deployed")
    asked = {"vm_id": work.vm_id, **{name: request.get(name) for name in ("cpu", "vcpu", "memory_kib")}}
    new = wire.decode(Vm, asked)
    if not (new.cpu > 0 and new.vcpu > 0 and new.memory_kib > 0):
        raise StorageError(f"Cannot resize VM {work.vm_id}: CPU, VCPU and MEMORY have to be above 0")
    work.journal.take("limits")
    limits.make_room(work.vm_id, new.memory_kib)
    stage(work, dataclasses.replace(found.vm, cpu=new.cpu, vcpu=new.vcpu, memory_kib=new.memory_kib), found.prepared)
    return {}


def vm_ids() -> tuple[int, ...]:
    """Every VM that has anything in our state directory."""
    try:
        names = os.listdir(os.path.join(model.STATE, "vms"))
    except FileNotFoundError:
        return ()
    return tuple(sorted(int(name) for name in names if is_number(name)))


def paused(vm_id: int) -> str:
    """What is noted: why the container is frozen ("suspend", "snapshot"), or "". Whether it is: `freezer.reason`."""
    try:
        with open(_paused_path(vm_id)) as file:
            return file.read().strip()
    except OSError:
        return ""


def set_paused(vm_id: int, why: str) -> None:
    """Write down that the container is frozen, before it is; "" that it goes on, after it does."""
    path = _paused_path(vm_id)
    if not why:
        durable.remove(path)  # one that stays is only a word: whether the container stands still the freezer says
        return
    _write(path, why.encode())


def _paused_path(vm_id: int) -> str:
    return os.path.join(VmPaths(vm_id).state, "paused")


def write_json(path: str, data: Any) -> None:
    """Replace a file of ours as a whole, flushed: after a power cut it is the old one or the new one."""
    _write(path, json.dumps(data, indent=1).encode())


def _write(path: str, data: bytes) -> None:
    try:
        make_state_directory(os.path.dirname(path))
        durable.replace(path, data)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror}") from error


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
