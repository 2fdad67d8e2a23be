"""Fixtures of the tiers that need a machine (contract, node): the installed bundle, a driver, VMs, a bridge, leaks.

def test_something(vm):                     # 3.2.1; `pytestmark = pytest.mark.generation(MONITORD)` for 7.4.0
    one = vm(template={"MEMORY": "128"})    # with a busybox tarball as disk.0
    one.deployed().booted()
    assert one.inside("id -u") == "0\\n"
    # at the end: cancel, removal of its directory, and the comparison with what was on the host before
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import hostconf, images, installation, leaks, machine
from tests.support.frontends import PULL
from tests.support.vms import Driver, Vm

BRIDGE = "br0"


@pytest.fixture(scope="session")
def installed() -> None:
    """The bundle on front-ends of both generations, their remotes ready to be this host's, and the host's own half."""
    if not installation.is_test_machine():
        pytest.exit("these tests change the machine: run them by tests/run, or in tests/alone", returncode=70)
    installation.install()


@pytest.fixture
def driver(request: pytest.FixtureRequest, installed: None) -> Driver:
    """The executables of 3.2.1, or of the generation that a marker or `parametrize(…, indirect=True)` names."""
    mark = request.node.get_closest_marker("generation")
    return installation.activate(getattr(request, "param", None) or (mark.args[0] if mark else PULL))


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


@pytest.fixture(params=["unprivileged", "privileged"])
def form(request: pytest.FixtureRequest, installed: None) -> Iterator[dict[str, str]]:
    """Both forms of a container, as the `user_template` of a VM; the host allows both meanwhile."""
    with hostconf.with_line('PRIVILEGED = "yes"'):
        yield {"LXC_UNPRIVILEGED": "no"} if request.param == "privileged" else {}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The busybox root as a directory, to be put into an image."""
    path = tmp_path_factory.mktemp("tree") / "root"
    path.mkdir()
    path.chmod(0o755)
    images.busybox_tree(str(path))
    return path


@pytest.fixture(scope="session")
def bridge() -> Iterator[str]:
    """A Linux bridge of this machine, 10.77.0.1/24."""
    machine.command("ip", "link", "add", BRIDGE, "type", "bridge")
    machine.command("ip", "address", "add", "10.77.0.1/24", "dev", BRIDGE)
    machine.command("ip", "link", "set", BRIDGE, "up")
    yield BRIDGE
    machine.command("ip", "link", "delete", BRIDGE)


__all__ = ["bridge", "clean", "driver", "form", "installed", "tree", "vm"]
