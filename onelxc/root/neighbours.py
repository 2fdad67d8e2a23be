"""What two VMs of one host must not share: user and group ids, and the port of a viewer.

Ids follow from the VM's number, so two numbers that lie ID_COUNT apart have the same. The second VM is refused on this
host, before anything is mounted and again when its record is written: of two that start at once each may see the
other then.
"""

from __future__ import annotations

from collections.abc import Iterator

from onelxc import names
from onelxc.errors import StorageError
from onelxc.model import ID_RANGE, Vm
from onelxc.root import record
from onelxc.root.record import Record
from onelxc.root.work import Work


def check(work: Work, vm: Vm) -> None:
    """StorageError if another VM of this host has what this one would get."""
    first = None if vm.privileged else work.config.first_id(vm.vm_id)
    for other in _others(vm.vm_id):
        base = other.prepared.id_base
        if first is not None and base is not None and abs(base - first) < ID_RANGE:
            raise StorageError(
                f"Cannot run VM {vm.vm_id} on this host: it would have the user ids of VM {other.vm.vm_id}, {first} and"
                f" above; start it on another host, or raise ID_COUNT in {names.HOST_CONF}"
            )
        if vm.graphics is not None and _has_port(other, vm.graphics.port):
            raise StorageError(
                f"Cannot run VM {vm.vm_id} on this host: VM {other.vm.vm_id} has port {vm.graphics.port} for its VNC"
                " viewer; give it another GRAPHICS/PORT"
            )


def port_is_anothers(vm_id: int, port: int) -> bool:
    """Whether another VM than this one shows its console on the port."""
    return any(_has_port(other, port) for other in _others(vm_id))


def _has_port(other: Record, port: int) -> bool:
    return other.vm.graphics is not None and other.vm.graphics.port == port


def _others(vm_id: int) -> Iterator[Record]:
    """The other VMs that run here, or are about to."""
    for number in record.vm_ids():
        found = record.legible(number) if number != vm_id else None
        if found is not None:
            yield found
