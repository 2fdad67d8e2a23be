"""What does an action of 6.x/7.x ask for beyond its arguments? `<VMM_DRIVER_ACTION_DATA>`, read for each action.

The XML goes before argv: `index` of attach_disk is wrong for targets such as /mnt/x, and the command of exec may have
lost its quotes on the way. States are those of include/VirtualMachine.h at release-7.4.0.
"""

from __future__ import annotations

import enum
import posixpath
import re
from dataclasses import dataclass
from typing import Any

from onelxc import template
from onelxc.errors import NotSupportedError, TemplateError
from onelxc.fields import Fields
from onelxc.model import Disk, Nic, Vm
from onelxc.request import Request, clean_path
from onelxc.template import Policy


class Saving(enum.Enum):
    """What a save is for, or what a restore comes back from."""

    SUSPEND = "suspend"
    STOP = "stop"
    MIGRATE = "migrate"


_SAVING = {5: Saving.STOP, 6: Saving.SUSPEND, 7: Saving.MIGRATE}
"""SAVE_STOP, SAVE_SUSPEND, SAVE_MIGRATE."""
_RESTORING = {
    21: Saving.SUSPEND,  # BOOT_SUSPENDED
    22: Saving.STOP,  # BOOT_STOPPED
    48: Saving.STOP,  # BOOT_STOPPED_FAILURE
    35: Saving.MIGRATE,  # BOOT_MIGRATE
    37: Saving.MIGRATE,  # BOOT_MIGRATE_FAILURE
}


@dataclass(frozen=True)
class OfDisk:
    """A disk that comes, goes or grows, and its VM, which has it among its disks in all cases."""

    vm: Vm
    disk: Disk


@dataclass(frozen=True)
class OfNic:
    """A NIC that comes or goes, and its VM, which has it among its NICs in both cases."""

    vm: Vm
    nic: Nic


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of the VM. `hypervisor_id` is our own name for it, `snap-<id>`; `name` is the user's."""

    snapshot_id: int
    hypervisor_id: str
    name: str = ""


def vm_of(request: Request, policy: Policy) -> Vm:
    """The VM of any action that has XML, with the paths of its disks on this host."""
    root = template.root_of(request.xml, request.vm_id)
    return template.build(root, request.vm_id, vm_dir_of(root, request), policy)


def vm_dir_of(root: Any, request: Request) -> str:
    """The directory of the VM's disks: from argv, from a path in the XML, else from the system datastore's."""
    if request.vm_dir:
        return request.vm_dir
    for name in ("DISK_TARGET_PATH", "CHECKPOINT_FILE"):
        path = (root.findtext(name) or "").strip()
        # at migrate, DISK_TARGET_PATH is that of the datastore
        if path.startswith("/") and posixpath.basename(path).startswith(("disk.", "checkpoint")):
            return clean_path(posixpath.dirname(path))
    base = (root.findtext("DATASTORE/BASE_PATH") or "").strip()
    if base.startswith("/"):
        return clean_path(posixpath.join(base, str(request.vm_id)))
    records = root.findall(".//HISTORY_RECORDS/HISTORY/DS_ID")
    if records and (records[-1].text or "").strip().isdigit():
        return posixpath.join("/var/lib/one/datastores", records[-1].text.strip(), str(request.vm_id))
    raise Fields(root, f"VM {request.vm_id}").error("the XML does not say where the disks lie on this host")


def disk_of(request: Request, policy: Policy) -> OfDisk:
    """The disk of attach_disk, detach_disk or resize_disk."""
    vm = vm_of(request, policy)
    if request.action == "resize_disk":
        wanted = request.number(1, "disk id")
        found = [disk for disk in vm.disks if disk.disk_id == wanted]
    else:
        path = clean_path(request.argument(1, "path of the disk"))
        found = [disk for disk in vm.disks if disk.attach] or [disk for disk in vm.disks if disk.path == path]
    if not found:
        raise TemplateError(f"Cannot {request.action} VM {request.vm_id}: its XML has no such DISK")
    return OfDisk(vm, found[0])


def nic_of(request: Request, policy: Policy) -> OfNic:
    """The NIC of attach_nic or detach_nic."""
    vm = vm_of(request, policy)
    mac = request.argument(1, "MAC address").lower()
    found = [nic for nic in vm.nics if nic.attach] or [nic for nic in vm.nics if nic.mac == mac]
    if not found:
        raise TemplateError(f"Cannot {request.action} VM {request.vm_id}: its XML has no NIC with the MAC {mac}")
    return OfNic(vm, found[0])


def new_size_mb(request: Request) -> int:
    """What resize_disk is to grow a disk to."""
    return request.number(2, "new size")


def context_path(request: Request) -> str:
    """The context ISO that reconfigure brings."""
    return clean_path(request.argument(2, "path of the context"))


def snapshot_of(request: Request) -> Snapshot:
    """The snapshot of snapshot_create (argv has its number), snapshot_revert or snapshot_delete (our own name)."""
    text = request.argument(1, "snapshot")
    number = text if request.action == "snapshot_create" else text.rpartition("snap-")[2]
    if not re.match(r"[0-9]{1,9}\Z", number) or (request.action != "snapshot_create" and text != f"snap-{int(number)}"):
        raise TemplateError(f"Cannot {request.action} VM {request.vm_id}: not a snapshot of ours: {text!r}")
    fields, _, _ = template.template_of(template.root_of(request.xml, request.vm_id), request.vm_id)
    named = {one.findtext("SNAPSHOT_ID"): one.findtext("NAME") for one in fields.all("SNAPSHOT")}
    return Snapshot(int(number), f"snap-{int(number)}", named.get(str(int(number))) or "")


def command_of(request: Request) -> tuple[str, str]:
    """The command of exec, and in base64 what it reads. argv has both, but not with every quote (see `exec_by_ssh`)."""
    fields, _, _ = template.template_of(template.root_of(request.xml, request.vm_id), request.vm_id)
    command = fields.text("QEMU_GA_EXEC/COMMAND")
    if not command:
        raise TemplateError(f"Cannot exec in VM {request.vm_id}: its XML has no QEMU_GA_EXEC/COMMAND")
    return command, fields.text("QEMU_GA_EXEC/STDIN")


def saving_of(request: Request) -> Saving:
    """What a save or restore is for. Only a suspend leaves everything where it is, so that a freezer is enough."""
    fields = template.template_of(template.root_of(request.xml, request.vm_id), request.vm_id)[2]
    state = fields.whole("LCM_STATE")
    table = _SAVING if request.action == "save" else _RESTORING
    if state not in table:
        raise NotSupportedError(f"Cannot {request.action} VM {request.vm_id}: not known in the state {state}")
    return table[state]
