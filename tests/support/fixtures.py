"""Fixtures of the tiers that need a machine (contract, node): the installed bundle, a driver, VMs, a bridge, leaks.

def test_something(vm):                     # 3.2.1; `pytestmark = pytest.mark.generation(MONITORD)` for 7.4.0
    one = vm(template={"MEMORY": "128"})    # with a busybox tarball as disk.0
    one.deployed().booted()
    assert one.inside("id -u") == "0\\n"
    # at the end: cancel, removal of its directory, and the comparison with what was on the host before
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import frontends, images, leaks, machine
from tests.support.frontends import MONITORD, PULL, REPOSITORY
from tests.support.vms import REMOTES, Driver, Vm

FRONT_ENDS = "/srv/front-ends"
BRIDGE = "br0"
_active: list[str] = []


def _install_helper() -> None:
    """The host's half of the bundle."""
    installer = os.path.join(REPOSITORY, "install.sh")
    if os.path.exists(os.path.join(REPOSITORY, "install.d/node.sh")):
        machine.command(installer, "node", "--no-packages", timeout_s=300)
        return
    # until install.sh can do it
    os.makedirs("/usr/lib/onelxc", exist_ok=True)
    shutil.copytree(os.path.join(REPOSITORY, "onelxc"), "/usr/lib/onelxc/onelxc", dirs_exist_ok=True)
    for name in os.listdir(os.path.join(REPOSITORY, "libexec")):
        shutil.copy(os.path.join(REPOSITORY, "libexec", name), "/usr/lib/onelxc/")
    with open("/etc/sudoers.d/onelxc", "w") as file:
        file.write("oneadmin ALL=(root) NOPASSWD: /usr/lib/onelxc/onelxc-root *\n")
    os.chmod("/etc/sudoers.d/onelxc", 0o440)


@pytest.fixture(scope="session")
def installed() -> None:
    """The bundle on front-ends of both generations, their remotes ready to be this host's, and the host's own half."""
    if os.environ.get("ONELXC_ALONE") != "1" and not os.path.exists("/run/onelxc-test-machine"):
        pytest.exit("these tests change the machine: run them by tests/run, or in tests/alone", returncode=70)
    _install_helper()
    for version in (PULL, MONITORD):
        location = os.path.join(FRONT_ENDS, version)
        if os.path.exists(f"{REMOTES}.{version}"):
            continue
        frontends.lay_out(location, version)
        machine.command("chown", "-R", "oneadmin:oneadmin", location)
        if version == MONITORD and not os.path.exists(os.path.join(REPOSITORY, "install.d/monitord.sh")):
            continue
        frontends.install(location)
        frontends.push(location, version, f"{REMOTES}.{version}")
        machine.command("chown", "-R", "oneadmin:oneadmin", f"{REMOTES}.{version}")


def activate(version: str) -> Driver:
    """Make the remotes of `version` those of this host."""
    if _active != [version]:
        if _active:
            os.rename(REMOTES, f"{REMOTES}.{_active.pop()}")
        os.rename(f"{REMOTES}.{version}", REMOTES)
        _active.append(version)
    return Driver(version)


@pytest.fixture
def driver(request: pytest.FixtureRequest, installed: None) -> Driver:
    """The executables of 3.2.1, or of the generation that a marker or `parametrize(…, indirect=True)` names."""
    mark = request.node.get_closest_marker("generation")
    return activate(getattr(request, "param", None) or (mark.args[0] if mark else PULL))


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing is left on the host that was not there before."""
    before = leaks.snapshot()
    yield
    leaks.assert_none_since(before)


_ids = itertools.count(100)


@pytest.fixture
def vm(driver: Driver, clean: None) -> Iterator[Callable[..., Vm]]:
    """A factory of VMs with ids of their own: `vm()` has a busybox archive as disk.0, `vm(image=None)` no disk yet."""
    made: list[Vm] = []

    def make(
        image: str | None = "busybox",
        *,
        template: dict[str, Any] | None = None,
        user_template: dict[str, Any] | None = None,
        vm_id: int | None = None,
        ds_id: int = 0,
    ) -> Vm:
        number = next(_ids) if vm_id is None else vm_id
        one = Vm(driver, number, template or {}, user_template or {}, ds_id)
        made.append(one)
        if image == "busybox":
            one.add_disk(images.busybox_tar())
        elif image is not None:
            one.add_disk(image)
        return one

    yield make
    for one in reversed(made):
        one.end()


@pytest.fixture(scope="session")
def bridge() -> Iterator[str]:
    """A Linux bridge of this machine, 10.77.0.1/24."""
    machine.command("ip", "link", "add", BRIDGE, "type", "bridge")
    machine.command("ip", "address", "add", "10.77.0.1/24", "dev", BRIDGE)
    machine.command("ip", "link", "set", BRIDGE, "up")
    yield BRIDGE
    machine.command("ip", "link", "delete", BRIDGE)


__all__ = ["bridge", "clean", "driver", "installed", "vm"]
