"""An Open vSwitch: the host's, or one of a test machine's own with the datapath in user space, without the module."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.support import machine
from tests.support.waiting import wait_until

BRIDGE = "ovs0"
RUN = "/run/openvswitch"
DATABASE = "/etc/openvswitch/conf.db"
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"


@contextlib.contextmanager
def running(address: str) -> Iterator[str]:
    """A bridge with an address of the host on it; gives its name.

    It is on the host's own switch where that runs (the kernel's datapath), else on one that is started for it.
    """
    own = not os.path.exists(f"{RUN}/db.sock")
    if own:
        _start()
    try:
        kind = ["--", "set", "bridge", BRIDGE, "datapath_type=netdev"] if own else []
        machine.command("ovs-vsctl", "-t", "20", "add-br", BRIDGE, *kind)
        machine.command("ip", "address", "add", address, "dev", BRIDGE)
        machine.command("ip", "link", "set", BRIDGE, "up")
        yield BRIDGE
        machine.command("ovs-vsctl", "-t", "20", "del-br", BRIDGE)
    finally:
        if own:
            for name in ("ovs-vswitchd", "ovsdb-server"):
                _end(name)


def _start() -> None:
    """Both daemons, on an empty database."""
    os.makedirs(RUN, exist_ok=True)
    os.makedirs(os.path.dirname(DATABASE), exist_ok=True)
    if os.path.exists(DATABASE):
        os.unlink(DATABASE)
    machine.command("ovsdb-tool", "create", DATABASE, SCHEMA)
    quiet = ("--pidfile", "--detach", "--no-chdir", "-vconsole:off", "-vsyslog:off")
    machine.command("ovsdb-server", f"--remote=punix:{RUN}/db.sock", *quiet, DATABASE)
    machine.command("ovs-vsctl", "--no-wait", "init")
    machine.command("ovs-vswitchd", *quiet)


def ports() -> list[str]:
    return machine.command("ovs-vsctl", "-t", "20", "list-ports", BRIDGE).split()


def _end(name: str) -> None:
    with open(f"{RUN}/{name}.pid") as file:
        pid = int(file.read())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not machine.command_line(pid), f"{name} has ended")
