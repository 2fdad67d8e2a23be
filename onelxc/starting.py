"""How does a VM come to run from its disks? The part that is the same for `deploy` and for what has to start anew.

Everything left from before is released first. Until the commit, leaving the helper's session undoes it all.
"""

from __future__ import annotations

from onelxc import domainxml, lifecycle, vnc
from onelxc.hypervisor import Hypervisor
from onelxc.model import Vm
from onelxc.report import Report
from onelxc.rootclient import Session


def start(libvirt: Hypervisor, host: Session, vm: Vm, report: Report) -> None:
    """Prepare the disks, start the container, see that it lives, keep it."""
    host.release()
    prepared = host.prepare(vm)
    with lifecycle.quoting(host.console):
        lifecycle.start(libvirt, domainxml.render(vm, prepared), vm.deploy_id)
    host.call("settle")
    host.commit()
    if vm.graphics is not None:
        vnc.start(vm.vm_id, vm.graphics, report.info)
