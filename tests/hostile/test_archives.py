"""Hostile archives as roots and as data disks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import archives
from tests.hostile.every_action import Tried
from tests.support import images

Try = Callable[..., Tried]


def written(case: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(archives.CASES[case]())


@pytest.mark.parametrize("case", archives.CASES)
def test_as_root(tried: Try, case: str) -> None:
    one = tried()
    one.disk(written(case), SIZE="64")
    if one.run("deploy").code == 0:
        one.probes("vm/status", "vm/monitor")
        one.run("exec")


def test_as_data_disks_of_a_running_container(tried: Try) -> None:
    """Every fourth; the importer is the same."""
    one = tried(images.busybox_ext4())
    one.run("deploy")
    for case in list(archives.CASES)[::4]:
        one.attached(written(case), f"{case} as a data disk", SIZE="64")
