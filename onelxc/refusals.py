"""What does an action say that containers cannot do? The words, and what to do instead, for each generation.

OpenNebula 3.2.1 has one `save` for "suspend here" and "stop, and move the files away", without a way to tell which,
and migrates by it: refused altogether there, since a frozen container whose files move is lost.
"""

from __future__ import annotations

from onelxc.action import Action
from onelxc.config import Generation
from onelxc.errors import NotSupportedError


def migration(this: Action) -> NotSupportedError:
    """For `migrate` and `migrate_local`: live migration."""
    if this.request.generation is Generation.PULL:
        instead = "shut it down and create it anew on the other host"
    else:
        instead = "power it off and migrate it then, or migrate it with --poff"
    return NotSupportedError(
        f"Cannot migrate VM {this.vm_id}: a running container cannot move to another host; {instead}"
    )
