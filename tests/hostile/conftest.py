"""The hostile tier: a tenant tries everything, and the host is watched from outside.

Its short form is part of every run: fixed cases, fixed seeds. `tests/run --hostile MINUTES` runs the long one, where
hypothesis makes cases up for so long.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.hostile import every_action
from tests.hostile.every_action import Tried
from tests.hostile.witness import Canary, Host, Witness
from tests.support import images
from tests.support.frontends import MONITORD
from tests.support.vms import Driver, Vm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What OpenNebula 7 sends, unless a test says otherwise: it has all the actions."""
    for item in items:
        if "/hostile/" in str(item.path) and not item.get_closest_marker("generation"):
            item.add_marker(pytest.mark.generation(MONITORD))


@pytest.fixture(scope="session")
def canary(installed: None) -> Iterator[Canary]:
    one = Canary()
    yield one
    one.end()


@pytest.fixture(scope="session")
def last(installed: None) -> dict[str, Host]:
    """The host as the last test left it, by the version it had: a look at all of it costs a tenth of a second."""
    return {}


@pytest.fixture
def witness(driver: Driver, canary: Canary, bridge: str, last: dict[str, Host]) -> Iterator[Witness]:
    every_action.configure(driver)
    if driver.version not in last:
        # what is made once and stays is there before anybody compares
        one = Vm(driver, 99, {}, {})
        one.add_disk(images.busybox_tar())
        one.add_nic(bridge)
        one.deployed().booted().end()
    watching = Witness(canary, last.pop(driver.version, None))
    yield watching
    after = watching.judge()
    last.clear()
    last[driver.version] = after


_numbers = itertools.count(200)


@pytest.fixture
def tried(driver: Driver, witness: Witness) -> Iterator[Callable[..., Tried]]:
    """A factory of VMs to try actions on; at the end each is cancelled, which has to succeed, and deleted."""
    made: list[Tried] = []

    def make(image: str | None = None, **fields: object) -> Tried:
        one = Vm(driver, next(_numbers), fields.get("template", {}), fields.get("user_template", {}))  # type: ignore[arg-type]
        if image is not None:
            one.add_disk(image)
        made.append(Tried(one, witness))
        return made[-1]

    yield make
    with contextlib.ExitStack() as all_of_them:
        for each in made:
            all_of_them.callback(each.over)
