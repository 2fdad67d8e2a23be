"""Gives a container the CPU and memory back that it had before a resize that nobody kept."""

from __future__ import annotations

from typing import Any

from onelxc import model
from onelxc.root import record
from onelxc.root.work import Work


def give_back(work: Work, what: dict[str, Any]) -> None:
    """The journal's `limits`: what the record says is what the container has."""
    from onelxc import hypervisor, resizing  # libvirt costs 38 ms, and nearly always nothing is to be done

    found = record.read(work.vm_id)
    if found is None:
        return
    with hypervisor.Hypervisor() as libvirt:
        domain = libvirt.find(model.deploy_id(work.vm_id))
        if domain is not None and domain.alive():
            resizing.apply(domain, found.vm, found.prepared)
