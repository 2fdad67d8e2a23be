"""Which network interface is at a PCI address of this host?"""

from __future__ import annotations

import os
import re

from onelxc.errors import ConfigurationError

ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\Z")
DEVICES = "/sys/bus/pci/devices"


def interface(address: str, devices: str = DEVICES) -> str:
    """The interface at `0000:81:00.1`. ConfigurationError if there is none, or more than one."""
    try:
        names = sorted(os.listdir(os.path.join(devices, address, "net")))
    except OSError:
        names = []
    if len(names) != 1:
        what = f"several interfaces: {', '.join(names)}" if names else "no network interface (any more)"
        raise ConfigurationError(f"Cannot use the PCI device {address}: it has {what}")
    return names[0]
