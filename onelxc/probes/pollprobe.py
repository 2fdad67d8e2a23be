"""How is one VM? 3.2.1's `poll` action. argv: DEPLOY_ID HOST ID HOST, or HOST ID HOST when the id is not known."""

from __future__ import annotations

import sys

from onelxc import containers, monitoring, names, samples
from onelxc.errors import OneLxcError
from onelxc.probes import statusprobe
from onelxc.usage import Readings, Usage


def run() -> str:
    """The one line. `p` is never said: 3.2.1 has no suspend that a container could have, and deletes a VM that was
    reported paused without telling the driver.
    """
    number = sys.argv[-2] if len(sys.argv) > 3 else ""
    if not names.is_number(number):
        raise OneLxcError("Cannot poll a VM: no VM id in the arguments (DEPLOY_ID HOST ID HOST)")
    vm_id = int(number)
    usage = _usage(vm_id)
    if usage is None:
        # dead, or between two lives of a reboot; the helper knows, and lets go of what is dead
        state = statusprobe.verdicts().get(str(vm_id), statusprobe.OFF)
        if state == statusprobe.OFF:
            samples.forget(_file(vm_id))
            return monitoring.poll("d", None)
        usage = _usage(vm_id)
    return monitoring.poll("a", usage)


def _usage(vm_id: int) -> Usage | None:
    name = names.deploy_id(vm_id)
    for container in containers.running():
        if container.name == name:
            readings = Readings(_file(vm_id))
            usage = readings.of(container)
            readings.keep()
            return usage
    return None


def _file(vm_id: int) -> str:
    return f"onelxc-poll-{vm_id}"
