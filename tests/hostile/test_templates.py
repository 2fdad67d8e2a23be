"""Templates, XML and arguments that nobody should believe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.hostile import values
from tests.hostile.every_action import ACTIONS, Tried, judge
from tests.hostile.witness import Witness
from tests.support import images
from tests.support.frontends import MONITORD, PULL
from tests.support.vms import Driver

Try = Callable[..., Tried]


@pytest.mark.parametrize("case", values.TEMPLATES)
def test_template(tried: Try, case: str) -> None:
    aim: dict[str, Any] = values.TEMPLATES[case]
    one = tried(images.busybox_ext4(), template=aim.get("template", {}), user_template=aim.get("user", {}))
    if "second disk" in aim:
        one.one.add_disk(images.busybox_ext4())
        one.one.disks[1].update(aim["second disk"])
    if "nic" in aim:
        one.one.add_nic("br0", **aim["nic"])
    if one.run("deploy").code == 0:
        if "second disk" in aim:
            one.run("reboot")
        one.probes("vm/status", "vm/monitor")


def test_documents(tried: Try) -> None:
    one = tried(images.busybox_ext4())
    honest = one.one.xml
    for case, change in values.DOCUMENTS.items():
        print(case)
        one.one.xml = lambda *, change=change, **fields: change(honest(**fields))  # type: ignore[method-assign]
        if one.run("deploy").code == 0:
            one.run("cancel")
    one.one.xml = honest  # type: ignore[method-assign]


@pytest.mark.parametrize("driver", [MONITORD, PULL], indirect=True)
def test_arguments(driver: Driver, witness: Witness) -> None:
    for action in ACTIONS:
        if driver.pull and action not in (
            "deploy",
            "shutdown",
            "cancel",
            "reboot",
            "save",
            "restore",
            "migrate",
            "poll",
        ):
            continue
        for words in values.ARGUMENTS[:: 1 if action == "cancel" else 8]:
            outcome = driver(
                action, *words, stdin="<VM/>" if not driver.pull or action == "deploy" else None, timeout_s=20
            )
            print(action, words, outcome)
            judge(action, outcome)
    witness.look("arguments")
