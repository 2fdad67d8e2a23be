"""How does a running container come to a new context? The verb behind `reconfigure`.

OpenNebula writes a new context ISO when a NIC comes or goes and when the user changes the context. Its files are put
into the context that the container sees at /context, and one-context's own reconfiguration is started in the guest, if
the guest has that. It runs on by itself: OpenNebula waits for none on any hypervisor.
"""

from __future__ import annotations

import os
from typing import Any

from onelxc.errors import OneLxcError
from onelxc.root import context, execution, freezer, mounts, record, validate
from onelxc.root.work import Work

# one-context's service, by the guest's own means; where none is there, its program (see its one-context-reconfigure)
COMMAND = """
if command -v systemctl >/dev/null && systemctl cat one-context-reconfigure.service >/dev/null 2>&1; then
    exec systemctl --no-block restart one-context-reconfigure.service
elif [ -x /etc/init.d/one-context-reconfigure ]; then
    exec /etc/init.d/one-context-reconfigure restart
elif [ -x /usr/sbin/one-contextd ]; then
    exec /usr/sbin/one-contextd all reconfigure
fi
"""
LIMIT_S = 600.0


def verb(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"path": the new ISO}`."""
    target = work.paths.context
    if not mounts.is_mounted(target):
        work.log("the container was started without a context: it sees this one from its next start on")
        return {}
    found = record.read(work.vm_id)
    with validate.find(str(request.get("path", "")), work.config) as image:
        iso = image.open(os.O_RDONLY)
    try:
        context.fill(iso, target, id_base=found.prepared.id_base if found else None)
    finally:
        os.close(iso)
    if freezer.reason(work.vm_id):
        work.log("the container is suspended: it reads its context when it starts")
        return {}
    try:
        execution.begin(work.vm_id, COMMAND, b"", LIMIT_S, told=False)
    except OneLxcError as error:
        work.log(f"its reconfiguration could not be started: {error}")
    return {}
