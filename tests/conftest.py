"""What every tier shares: the repository on the path, and that a test's directory is its tier."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if REPOSITORY not in sys.path:
    sys.path.insert(0, REPOSITORY)

from tests.support.fixtures import *  # noqa: E402, F403

WAITING = pytest.StashKey[int]()
"""How many tests were left for the emulated machine."""
TIERS = ("lint", "pure", "contract", "install", "node", "hostile")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The directory names the tier; `-m node` selects by it. What needs the emulated machine waits for it, counted."""
    for item in items:
        tier = os.path.relpath(str(item.path), os.path.dirname(os.path.abspath(__file__))).split(os.sep)[0]
        if tier in TIERS:
            item.add_marker(tier)
    if os.environ.get("ONELXC_IN_VM"):
        return
    waiting = [item for item in items if item.get_closest_marker("emulated")]
    if waiting:
        items[:] = [item for item in items if item not in waiting]
        config.hook.pytest_deselected(items=waiting)
        config.stash[WAITING] = len(waiting)
        if hasattr(config, "workeroutput"):
            config.workeroutput["waiting"] = len(waiting)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of xdist counted."""
    node.config.stash[WAITING] = getattr(node, "workeroutput", {}).get("waiting", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    waiting = config.stash.get(WAITING, 0)
    if waiting:
        terminalreporter.write_line(f"{waiting} tests wait for tests/run --vm: this kernel may lack what they need")


class AtOnce:
    """In the emulated machine (tools/vm), where a run takes hours, tells of each test as it ends."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.when == "call":
            terminal = self._config.pluginmanager.get_plugin("terminalreporter")
            terminal.write_line(f" {report.duration:.0f} s {report.nodeid}\n{report.longreprtext}".rstrip())


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("ONELXC_IN_VM"):
        config.pluginmanager.register(AtOnce(config))
