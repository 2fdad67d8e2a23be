"""How does the bundle get onto a machine of tests/alone? By install.sh, front-ends of both generations and the host."""

from __future__ import annotations

import os

from tests.support import frontends, machine
from tests.support.frontends import MONITORD, PULL, REPOSITORY
from tests.support.vms import REMOTES, Driver

FRONT_ENDS = "/srv/front-ends"


def is_test_machine() -> bool:
    return os.environ.get("ONELXC_ALONE") == "1" or os.path.exists("/run/onelxc-test-machine")


def install() -> None:
    """The bundle on front-ends of both generations, their remotes ready to be this host's, and the host's own half."""
    if os.path.exists(FRONT_ENDS):
        return  # in this machine already
    machine.command(os.path.join(REPOSITORY, "install.sh"), "node", "--no-packages", timeout_s=300)
    for version in (PULL, MONITORD):
        location = os.path.join(FRONT_ENDS, version)
        frontends.lay_out(location, version)
        machine.command("chown", "-R", "oneadmin:oneadmin", location)
        frontends.install(location)
        frontends.push(location, version, f"{REMOTES}.{version}")
        machine.command("chown", "-R", "oneadmin:oneadmin", f"{REMOTES}.{version}")


def activate(version: str) -> Driver:
    """Make the remotes of `version` those of this host."""
    if os.path.exists(f"{REMOTES}.{version}"):
        if os.path.exists(REMOTES):
            os.rename(REMOTES, f"{REMOTES}.{PULL if version == MONITORD else MONITORD}")
        os.rename(f"{REMOTES}.{version}", REMOTES)
    return Driver(version)
