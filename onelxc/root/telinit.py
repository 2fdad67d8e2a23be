"""A sysvinit is asked for another runlevel by a program of its own, executed as its root. The verb `telinit`.

sysvinit hears no signal for this, only its pipe /run/initctl. Whatever lies at that path is the tenant's: nobody with a
right over the host may open it (libvirt's shutdown and reboot would, as the host's root and following links). So the
image's own telinit writes to it, in all the namespaces of the container, with the rights that any command of its root
has. What only looks like a sysvinit gets nothing but that.
"""

from __future__ import annotations

from typing import Any

from onelxc.errors import HelperError, OneLxcError
from onelxc.root import execution
from onelxc.root.work import Work

LIMIT_S = 10.0
"""telinit gives up after 3 s where nobody reads the pipe."""
_LEVELS = (0, 6)


def verb(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"level": 0 | 6}`, power off or reboot. One that cannot be asked is no error: whoever asks waits for
    the effect, and has a limit."""
    level = request.get("level")
    if level not in _LEVELS:
        raise HelperError(f"Cannot ask the init of VM {work.vm_id}: not a runlevel: {level!r}")
    try:
        execution.begin(work.vm_id, f"telinit {level:d}", b"", LIMIT_S, told=False)
    except OneLxcError as error:
        work.log(f"its init could not be asked: {error}")
    return {}
