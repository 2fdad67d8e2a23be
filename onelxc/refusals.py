"""What does an action say that containers cannot do? The words, and what to do instead, for each generation.

OpenNebula 3.2.1 has one `save` for "suspend here" and "stop, and move the files away", without a way to tell which,
and migrates by it: refused altogether there, since a frozen container whose files move is lost.
"""

from __future__ import annotations

from onelxc.action import Action
from onelxc.config import Generation
from onelxc.errors import NotSupportedError


def saving(this: Action) -> NotSupportedError:
    """For `save`: whatever it is for, except for a suspend that says so."""
    if this.request.generation is Generation.PULL:
        text = "OpenNebula 3.2 does not say whether its files will be moved, which a frozen container would not outlive"
        text += "; shut it down instead"
    else:
        text = "a container's memory cannot be written to a file; power it off, and stop, undeploy or migrate it then"
    return NotSupportedError(f"Cannot save VM {this.vm_id}: {text}")


def restoring(this: Action) -> NotSupportedError:
    """For `restore` of what no save of ours can have kept."""
    text = "no container's memory is ever written to a file, so that there is none to start from"
    if this.request.generation is Generation.PULL:
        text += "; delete the VM and create it anew"
    else:
        text += "; recover it with `onevm recover --recreate`"
    return NotSupportedError(f"Cannot restore VM {this.vm_id}: {text}")


def migration(this: Action) -> NotSupportedError:
    """For `migrate` and `migrate_local`: live migration."""
    if this.request.generation is Generation.PULL:
        instead = "shut it down and create it anew on the other host"
    else:
        instead = "power it off and migrate it then, or migrate it with --poff"
    return NotSupportedError(
        f"Cannot migrate VM {this.vm_id}: a running container cannot move to another host; {instead}"
    )
