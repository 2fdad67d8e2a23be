"""What are things called? The domain's name, the NICs' host side, and the paths that everybody shares.

Apart from `model` because probes start every five seconds, and dataclasses alone cost them as much as the interpreter.
Imports nothing.
"""

from __future__ import annotations

DOMAIN_PREFIX = "one-"

# Paths of the host, all of them root's own. Nothing that a cancel needs lies in the VM's directory, which OpenNebula
# may remove at any moment, and nothing is mounted below it, so that no `rm -rf` walks into a mount.
STATE = "/var/lib/onelxc"
RUN = "/run/onelxc"
IO_COUNTERS = f"{RUN}/io"
"""A file for each loop device of ours, named `major:minor`: its statistics when it was given its image."""
HUB_BEAT = f"{RUN}/hub.beat"
"""When the hub last saw to the leases, in seconds since boot. Anybody may read it."""
HOST_CONF = "/etc/onelxc/host.conf"
PROFILES = "/etc/onelxc/profiles"
HELPER = "/usr/lib/onelxc/onelxc-root"
MOUNTS = f"{STATE}/mnt"


def deploy_id(vm_id: int) -> str:
    """The domain's name, and OpenNebula's DEPLOY_ID."""
    return f"{DOMAIN_PREFIX}{vm_id}"


def vm_id_of(name: str) -> int | None:
    """The VM id in a domain's name, None if the name is not one of ours."""
    number = name[len(DOMAIN_PREFIX) :]
    if not name.startswith(DOMAIN_PREFIX) or not is_number(number):
        return None
    return int(number) if str(int(number)) == number else None


def is_number(text: str) -> bool:
    """Whether a text is a whole number of ours: of a VM, a disk, a size, of which none has more than 18 digits."""
    return len(text) <= 18 and text.isascii() and text.isdigit()


def ifb_device(vm_id: int, nic_id: int | str) -> str:
    """What the traffic from a NIC is led through where it is limited; with "" what all of the VM's begin with."""
    return f"onb-{vm_id}-{nic_id}"


def nic_device(vm_id: int, nic_id: int) -> str:
    """The host side of a NIC; VNM's security groups and Open vSwitch find it by this name."""
    return f"{DOMAIN_PREFIX}{vm_id}-{nic_id}"
