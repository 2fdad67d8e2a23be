"""A running container sees its new context, and its one-context is told."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import images, machine
from tests.support.vms import MONITORD, Vm
from tests.support.waiting import wait_until

pytestmark = pytest.mark.generation(MONITORD)

NewVm = Callable[..., Vm]
# stands for one-context, as it is installed where no systemd is: it notes what it was told, and what it sees then
ONE_CONTEXTD = '#!/bin/sh\necho "$@: $(grep NAME /context/context.sh)" >> /told\n'


@pytest.fixture
def iso(tmp_path: Path) -> Callable[..., str]:
    """A context ISO as OpenNebula's tm/context makes it."""

    def make(path: str, **files: str) -> str:
        tree = tmp_path / "context"
        machine.command("rm", "-rf", str(tree))
        tree.mkdir()
        for name, text in files.items():
            (tree / name.replace("_", ".")).write_text(text)
        command = ["xorriso", "-as", "mkisofs", "-o", path, "-V", "CONTEXT", "-J", "-R", str(tree)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return path

    return make


@pytest.fixture
def one(vm: NewVm, iso: Callable[..., str]) -> Vm:
    return with_context(vm, iso, {})


@pytest.fixture
def either(vm: NewVm, iso: Callable[..., str], form: dict[str, str]) -> Vm:
    """As `one`, in both forms."""
    return with_context(vm, iso, form)


def with_context(vm: NewVm, iso: Callable[..., str], form: dict[str, str]) -> Vm:
    made = vm(template={"CONTEXT": {"DISK_ID": "1", "TARGET": "sdb", "NAME": "first"}}, user_template=form)
    made.give(iso(made.path("disk.1"), context_sh="NAME='first'\n", start_sh="#!/bin/sh\n", old="only in the first\n"))
    return made.deployed().booted()


def reconfigure(one: Vm) -> None:
    for action in ("prereconfigure", "reconfigure"):
        extra = [one.path("disk.1")] if action == "reconfigure" else []
        outcome = one.act(action, "sdb", *extra, lcm_state=17).ok()
        assert (outcome.out, outcome.err) == ("", "")


def test_the_new_files_are_there_at_once_and_after_a_reboot(either: Vm, iso: Callable[..., str]) -> None:
    one = either
    assert one.inside("cat /context/context.sh") == "NAME='first'\n"
    one.give(iso(one.path("disk.1"), context_sh="NAME='second'\n", start_sh="#!/bin/sh\n", new="n" * 300000))
    reconfigure(one)
    for boots in (1, 2):
        one.booted(boots)
        assert one.inside("cat /context/context.sh") == "NAME='second'\n"
        assert one.inside("ls /context").split() == ["context.sh", "new", "start.sh"]
        assert one.inside("wc -c < /context/new") == "300000\n"
        assert one.inside("stat -c %u:%g /context /context/new") == "0:0\n0:0\n"
        assert one.inside("echo x 2>/dev/null > /context/context.sh || echo refused") == "refused\n"
        if boots == 1:
            one.inside("reboot", check=False)


def test_one_context_is_told_if_the_guest_has_it(one: Vm, iso: Callable[..., str]) -> None:
    one.inside(f"mkdir -p /usr/sbin; cat > /usr/sbin/one-contextd <<'END'\n{ONE_CONTEXTD}END\n")
    one.inside("chmod 755 /usr/sbin/one-contextd")
    one.give(iso(one.path("disk.1"), context_sh="NAME='second'\n"))
    reconfigure(one)
    told = wait_until(lambda: one.inside("cat /told", check=False), "one-context was told")
    assert told == "all reconfigure: NAME='second'\n"


def test_the_service_is_restarted_where_systemd_has_it(vm: NewVm, iso: Callable[..., str]) -> None:
    one = vm(images.distribution_tar("systemd"), template={"MEMORY": "256", "CONTEXT": {"DISK_ID": "1"}})
    one.give(iso(one.path("disk.1"), context_sh="NAME='first'\n"))
    one.deployed().booted()
    unit = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'cp /context/context.sh /told'\n"
    one.inside(f"cat > /etc/systemd/system/one-context-reconfigure.service <<'END'\n{unit}END\n")
    one.inside("systemctl daemon-reload")
    one.give(iso(one.path("disk.1"), context_sh="NAME='second'\n"))
    reconfigure(one)
    wait_until(lambda: one.inside("cat /told", check=False) == "NAME='second'\n", "the service has run")


def test_broken_context_is_one_line_and_the_old_one_stays(one: Vm) -> None:
    with open(one.path("disk.1"), "wb") as file:
        file.write(b"no ISO at all\n" * 4000)
    outcome = one.act("reconfigure", "sdb", one.path("disk.1"), lcm_state=17)
    assert (outcome.code, outcome.out) == (1, "")
    assert f"VM {one.vm_id}" in one.driver.message(outcome)
    assert "context" in one.driver.message(outcome)
    assert one.inside("cat /context/context.sh") == "NAME='first'\n"


def test_a_context_outside_of_the_datastores_is_refused(one: Vm) -> None:
    outcome = one.act("reconfigure", "sdb", "/etc/shadow", lcm_state=17)
    assert outcome.code == 1
    assert "does not lie in a datastore" in one.driver.message(outcome)


def test_without_a_context_at_its_start_there_is_nothing_to_renew(vm: NewVm, iso: Callable[..., str]) -> None:
    one = vm().deployed()
    one.give(iso(one.path("disk.1"), context_sh="NAME='second'\n"))
    reconfigure(one)
    assert one.inside("ls /context 2>/dev/null; true") == ""
    assert os.path.exists(one.path("disk.1"))
