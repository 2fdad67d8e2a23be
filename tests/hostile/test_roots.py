"""A container's root goes on changing while every action is done to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import disks, roots
from tests.hostile.every_action import Tried
from tests.support import images

Try = Callable[..., Tried]


PAIRS = list(zip(list(roots.MOODS)[::2], list(roots.MOODS)[1::2]))
"""Two kinds of mischief go on beside each other."""


@pytest.mark.parametrize("moods", PAIRS, ids=" and ".join)
def test_every_action_on_a_root_that(tried: Try, tmp_path: Path, moods: tuple[str, ...]) -> None:
    one = tried(roots.image(tmp_path / "root", *moods))
    one.one.add_nic("br0", IP="10.77.0.20")
    one.one.template["CONTEXT"] = {"DISK_ID": "1", "TARGET": "sdz"}
    tree = tmp_path / "context"
    tree.mkdir()
    (tree / "context.sh").write_text("ETH0_IP='10.77.0.20'\n")
    one.one.give(str(disks.iso(Path(one.one.path("disk.1")), tree)))
    one.all()


ACTIONS = ("reboot", "snapshot_create", "attach_disk", "shutdown", "save", "reset", "attach_nic", "exec", "resize_disk")


@pytest.mark.parametrize(("mischief", "action"), zip(list(roots.ONCE)[::2], itertools.cycle(ACTIONS)))
def test_once_and_then(tried: Try, mischief: str, action: str) -> None:
    """A single mischief, an action, and a start after it. Every second; the long form tries all."""
    one = tried(images.busybox_ext4())
    one.run("deploy")
    one.do(roots.ONCE[mischief])
    one.run(action)
    one.probes("vm/status", "vm/monitor")
    one.run("cancel")
    one.run("deploy")
