"""What becomes of NICs beside libvirt? Live ones get their name and addresses, all of them MTU and limits.

A NIC that libvirt attaches to a running container arrives as `vnetN`, down and without address, whatever its XML says;
only after the container's next reboot is it as described. So it is found (it is the other end of `one-<vm>-<nic>`),
renamed, addressed and raised from outside, in the container's network namespace alone. Verbs of a session:

    new_nic     before libvirt attaches: refuse what the VM has already, journal it
    attach_nic  after it: make it ready inside, and stage the record with it
    detach_nic  the record without it is kept, then it leaves the container and the host
    settle      after a start or a reboot from inside: MTU and limits of all NICs
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable
from typing import Any

from onelxc import domainxml, model, wire
from onelxc.errors import CommandError, HelperError, HypervisorError, LibvirtGoneError, NotSupportedError
from onelxc.model import Nic, Vm, nic_device
from onelxc.names import ifb_device
from onelxc.root import nics, ports, record, release, traffic
from onelxc.root.links import Link, Namespace
from onelxc.root.work import Work

ARRIVES_S = 10.0


def new_nic(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"nic": …}`; from here on the caller may attach it, unless it is `{"there": true}` already."""
    nic = _nic(work, request)
    found = _record(work)
    if nic.pci_address:
        raise NotSupportedError(
            f"Cannot attach NIC {nic.nic_id} to VM {work.vm_id}: a PCI interface moves into a container only when it"
            " starts: power the VM off first"
        )
    known = next((other for other in found.vm.nics if other.nic_id == nic.nic_id), None)
    if known is not None and known.mac == nic.mac:
        return {"there": True}
    if known is not None and known.attach:
        # an attach whose answer did not arrive: OpenNebula gives its number to the next one
        work.log(f"NIC {nic.nic_id} is another one now: detaching the one before ({known.mac})")
        detach_nic(work, {"nic_id": nic.nic_id})
    elif known is not None:
        raise HelperError(f"Cannot attach NIC {nic.nic_id} to VM {work.vm_id}: it has a NIC of that number")
    with Namespace() as host:
        if host.link(nic.device) is not None:
            raise HypervisorError(
                f"Cannot attach NIC {nic.nic_id} to VM {work.vm_id}: this host has an interface {nic.device} already"
            )
        nics.look_at_bridge(host, work.vm_id, nic)
    work.journal.take("nic", nic=model.to_json(nic))
    return {"there": False}


def attach_nic(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"nic": …}`, which libvirt has attached."""
    nic = _nic(work, request)
    found = _record(work)
    with Namespace() as host, Namespace.of_vm(work.vm_id) as inside:
        outer, inner = _arrived(host, inside, work.vm_id, nic)
        _rename(inside, inner, nic.guest_name, work.log)
        _address(inside, inner.index, nic, work.log)
        _finish(work.vm_id, (host, outer, inside), nic, work.log)
    record.stage(work, dataclasses.replace(found.vm, nics=_with(found.vm, nic)), found.prepared)
    return {}


def detach_nic(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"nic_id": …}`. With the commit it is decided; a NIC that is not there is detached."""
    nic_id = wire.number(request, "nic_id")
    found = _record(work)
    nic = next((nic for nic in found.vm.nics if nic.nic_id == nic_id), None)
    if nic is None:
        return {}
    _ask_libvirt(work.vm_id)
    work.journal.take("nic_leaves", nic=model.to_json(nic))
    rest = tuple(other for other in found.vm.nics if other.nic_id != nic_id)
    record.stage(work, dataclasses.replace(found.vm, nics=rest), found.prepared)
    record.commit(work, {})
    release.finish(work)
    return {}


def leave(work: Work, what: dict[str, Any]) -> None:
    """The journal's `nic_leaves`, once committed: libvirt does not know the NIC any more, nothing of it is here."""
    nic = wire.decode(Nic, what["nic"])
    with Namespace() as host:
        if host.link(nic.device) is None:
            _put_in_its_place(host, work.vm_id, nic)
    _detach(work.vm_id, nic)
    forget(work.vm_id, nic.nic_id)
    for entry in work.journal.held():
        if entry.kind == "nic" and entry.what.get("nic", {}).get("nic_id") == nic.nic_id:
            work.journal.gave_back(entry.number)


def _put_in_its_place(host: Namespace, vm_id: int, nic: Nic) -> None:
    """A tenant who deletes his end deletes the pair; libvirt then fails to delete it once more, and keeps the NIC for
    the next reboot. So another device takes its place, for libvirt to delete."""
    peer = ifb_device(vm_id, nic.nic_id)
    traffic.clear(host, vm_id, nic.nic_id)
    host.run("ip", "link", "add", nic.device, "type", "veth", "peer", "name", peer, verb=f"make {nic.device}")


def refresh(work: Work, found: record.Record) -> None:
    """After the container has restarted by itself (see `refresh`)."""
    with Namespace() as host:
        for nic in found.vm.nics:
            if nic.on_a_switched_port and host.link(nic.device) is not None:
                ports.restore(host, work.vm_id, nic, work.log)
    settle(found, work.log)


def settle(found: record.Record, log: Callable[[str], None]) -> None:
    """MTU and limits of all NICs, for which libvirt has no way that works here; and PCI NICs, which it only moves.

    A NIC that is not there (the tenant can delete his end, and with it the pair) is no reason to end anything.
    """
    vm = found.vm
    interfaces = dict(found.prepared.interfaces)
    if not any(nic.beyond_libvirt for nic in vm.nics):
        return
    with Namespace() as host, Namespace.of_vm(vm.vm_id) as inside:
        outside = {link.name: link for link in host.links()}
        for nic in vm.nics:
            if nic.nic_id in interfaces:
                _settle_pci(inside, interfaces[nic.nic_id], nic, log)
            elif nic.device in outside:
                _finish(vm.vm_id, (host, outside[nic.device], inside), nic, log)
            else:
                log(f"NIC {nic.nic_id}: {nic.device} is gone")


def forget(vm_id: int, nic_id: int) -> None:
    """What is left on the host of a NIC that is gone."""
    device = nic_device(vm_id, nic_id)
    with Namespace() as host:
        traffic.clear(host, vm_id, nic_id)
        link = host.link(device)
        if link is not None and link.kind == "veth":
            host.delete(device)


def give_back(work: Work, what: dict[str, Any]) -> None:
    """An attached NIC that nobody kept: libvirt must not plug it in again at the container's next reboot."""
    nic = wire.decode(Nic, what["nic"])
    with Namespace() as host:
        if host.link(nic.device) is not None:
            _detach(work.vm_id, nic)
    forget(work.vm_id, nic.nic_id)


def _detach(vm_id: int, nic: Nic) -> None:
    """From libvirt's domain; where that does not know the NIC, or is not there, the device goes all the same."""
    from onelxc.hypervisor import Hypervisor  # libvirt costs 38 ms, and nearly always nothing is to be done

    try:
        with Hypervisor() as libvirt:
            domain = libvirt.find(model.deploy_id(vm_id))
            if domain is not None and domain.has_interface(nic.device):
                domain.detach_device(domainxml.render_interface(nic))
    except LibvirtGoneError:
        raise
    except HypervisorError:
        pass


def _ask_libvirt(vm_id: int) -> None:
    """LibvirtGoneError if libvirt does not answer: before anything is decided that it is needed for."""
    from onelxc.hypervisor import Hypervisor

    with Hypervisor() as libvirt:
        libvirt.domain(model.deploy_id(vm_id))


def _with(vm: Vm, nic: Nic) -> tuple[Nic, ...]:
    kept = [other for other in vm.nics if other.nic_id != nic.nic_id]
    return tuple(sorted([*kept, dataclasses.replace(nic, attach=True)], key=lambda other: other.nic_id))


def _record(work: Work) -> record.Record:
    found = record.read(work.vm_id)
    if found is None:
        raise HelperError(f"Cannot change VM {work.vm_id}: nothing of it runs here that was deployed by this driver")
    return found


def _nic(work: Work, request: dict[str, Any]) -> Nic:
    """The NIC that a caller describes, which has to have a MAC address: it is attached live."""
    nic = wire.decode(Nic, request.get("nic"))
    nics.check(work.vm_id, nic)
    if not nic.mac:
        raise HelperError(f"Cannot attach NIC {nic.nic_id} to VM {work.vm_id}: it has no MAC address")
    return nic


def _arrived(host: Namespace, inside: Namespace, vm_id: int, nic: Nic) -> tuple[Link, Link]:
    """Both ends of the NIC. libvirt answers once it has told its controller to move the inner one."""
    deadline = time.monotonic() + ARRIVES_S
    while True:
        outer = host.link(nic.device)
        inner = inside.by_index(outer.peer) if outer is not None else None
        if outer is not None and inner is not None and inner.mac == nic.mac:
            return outer, inner
        if time.monotonic() > deadline:
            raise HypervisorError(
                f"Cannot attach NIC {nic.nic_id} to VM {vm_id}: {nic.device} has not come to the container"
            )
        time.sleep(0.02)


def _rename(inside: Namespace, link: Link, name: str, log: Callable[[str], None]) -> None:
    """Give it its name. The name may be the tenant's for something else."""
    if link.name == name:
        return
    try:
        inside.rename(link.index, name)
    except CommandError as error:
        log(f"{link.name} inside: {error}")


def _address(inside: Namespace, index: int, nic: Nic, log: Callable[[str], None]) -> None:
    """Up, with its addresses: what libvirt does at a start. A network without IPv6 leaves that out."""
    if nic.mtu:
        inside.set_mtu(index, nic.mtu)
    inside.set_up(index)
    for family, ip, prefix, gateway in (
        (socket.AF_INET, nic.ip, nic.prefix, nic.gateway),
        (socket.AF_INET6, nic.ip6, nic.prefix6, nic.gateway6),
    ):
        try:
            if ip and prefix is not None:
                inside.add_address(index, ip, prefix)
            if gateway and not inside.has_default(family):
                inside.add_default(index, gateway)
        except CommandError as error:
            log(f"NIC {nic.nic_id}: {error}")


def _finish(vm_id: int, places: tuple[Namespace, Link, Namespace], nic: Nic, log: Callable[[str], None]) -> None:
    """What is the same at a start, at a reboot and for a live NIC: the MTU of both ends, and the limits.

    `places` are the host, the NIC's device there, and the container.
    """
    host, outer, inside = places
    if nic.mtu and outer.mtu != nic.mtu:
        try:
            host.change(outer.name, "mtu", str(nic.mtu))
            inside.set_mtu(outer.peer, nic.mtu)
        except CommandError as error:
            log(f"NIC {nic.nic_id}: MTU {nic.mtu}: {error}")
    if nic.inbound or nic.outbound:
        traffic.shape(host, vm_id, nic, log)


def _settle_pci(inside: Namespace, interface: str, nic: Nic, log: Callable[[str], None]) -> None:
    link = inside.link(interface)
    if link is None:
        log(f"NIC {nic.nic_id}: {interface} has not come to the container, or is called otherwise there by now")
        return
    _rename(inside, link, nic.guest_name, log)
    _address(inside, link.index, nic, log)
