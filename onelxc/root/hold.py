"""Does libvirt still have a hold on a container that rebooted from inside? If not, it is started once more.

libvirt loses its connection to one container in twenty while it starts it (see `hypervisor`), and then its next reboot
would be its end. Just after a reboot nothing is lost by another one; later there would be.
"""

from __future__ import annotations

from onelxc import hypervisor, lifecycle, names
from onelxc.root.record import Record
from onelxc.root.work import Work


def refresh(work: Work, found: Record) -> None:
    """Start the container anew where libvirt would not notice its end. HypervisorError if that fails."""
    with hypervisor.Hypervisor() as libvirt:
        domain = libvirt.find(names.deploy_id(work.vm_id))
        if domain is None or not domain.look_again() or domain.in_hand():
            return
        work.log(f"libvirt has lost its connection to {domain.name}: started anew")
        lifecycle.restart(libvirt, domain, domain.xml())
