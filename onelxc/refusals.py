"""What an action says that containers cannot do: the words, and what to do instead, for each generation.

No advice costs data. OpenNebula 3.2.1 has one `save` for "suspend here" and "stop, and move the files away", without a
way to tell which, and migrates by it: refused altogether there, since a frozen container whose files move is lost. It
also has no poweroff: what is shut down there is gone, but for disks with SAVE=yes.
"""

from __future__ import annotations

from onelxc.action import Action
from onelxc.config import Generation
from onelxc.errors import NotSupportedError

_SHUT_DOWN = "shutting it down ends it for good, and keeps only persistent disks and those with SAVE=yes"


def saving(this: Action) -> NotSupportedError:
    """For `save`: whatever it is for, except for a suspend that says so."""
    if this.request.generation is Generation.PULL:
        text = "OpenNebula 3.2 does not say whether its files will be moved, which a frozen container would not outlive"
        text += f"; it runs on; {_SHUT_DOWN}"
    else:
        text = "a container's memory cannot be written to a file; power it off, and undeploy or migrate it then"
    return NotSupportedError(f"Cannot save VM {this.vm_id}: {text}")


def restoring(this: Action) -> NotSupportedError:
    """For `restore` in 3.2.1, which does not say what to start the container from."""
    text = (
        "a container's memory is in no file, and OpenNebula 3.2 does not say which disks to start it from; they lie in"
    )
    text += f" {this.request.vm_dir}: copy them before you delete or resubmit it, which removes them"
    return NotSupportedError(f"Cannot restore VM {this.vm_id}: {text}")


def migration(this: Action) -> NotSupportedError:
    """For `migrate` and `migrate_local`: live migration."""
    if this.request.generation is Generation.PULL:
        instead = f"it stays where it is; {_SHUT_DOWN}"
    else:
        instead = "power it off and migrate it then, or migrate it with --poff"
    return NotSupportedError(
        f"Cannot migrate VM {this.vm_id}: a running container cannot move to another host; {instead}"
    )
