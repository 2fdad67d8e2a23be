"""Images that lie, as data disks, as roots, and contexts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import disks
from tests.hostile.every_action import Tried
from tests.support import images

Try = Callable[..., Tried]


def test_as_data_disks_of_a_running_container(tried: Try) -> None:
    one = tried(images.busybox_ext4())
    one.run("deploy")
    for number, (case, make) in enumerate(disks.CASES.items()):
        form = "qcow2" if case.startswith("qcow2") or number % 8 == 0 else "raw"
        one.attached(make, f"{case} as {form}", FORMAT=form, DRIVER=form)


@pytest.mark.parametrize("case", [name for number, name in enumerate(disks.CASES) if number % 6 == 0])
def test_as_root(tried: Try, case: str) -> None:
    one = tried()
    form = {"FORMAT": "qcow2", "DRIVER": "qcow2"} if case.startswith("qcow2") else {}
    one.disk(disks.CASES[case], SIZE="32", **form)
    one.run("deploy")


def test_contexts(tried: Try, tmp_path: Path) -> None:
    one = tried(images.busybox_ext4())
    one.one.template["CONTEXT"] = {"DISK_ID": "1", "TARGET": "hda"}
    path = Path(one.one.path("disk.1"))
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "context.sh").write_text("ETH0_IP='10.77.0.9'\n")
    (tree / "start.sh").write_text("#!/bin/sh\n" + "# \n" * 30000)
    (tree / "mounts").write_text("")
    honest = disks.iso(tmp_path / "honest.iso", tree)
    for number, (case, change) in enumerate(disks.CONTEXTS.items()):
        path.unlink(missing_ok=True)
        path.write_bytes(honest.read_bytes())
        change(path)
        one.one.give(str(path))
        print(case)
        if number % 4 == 0 or number < 2:
            one.run("cancel")
            one.run("deploy")
        one.run("reconfigure")
