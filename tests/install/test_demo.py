"""install.sh demo: the whole of it, on this host."""

from __future__ import annotations

import os
import re
import signal
import subprocess

import pytest

from tests.support import images, machine
from tests.support.frontends import REPOSITORY
from tests.support.waiting import wait_until

DEMO = [os.path.join(REPOSITORY, "install.sh"), "demo"]
ENVIRONMENT = {"PATH": os.environ["PATH"], "ONELXC_ALONE": "1"}


@pytest.fixture(autouse=True)
def nothing_left(installed: None, clean: None) -> None:
    """A domain, a mount, a file or a process that it leaves fails the test."""


# It shows each step with its time, in the order in which oned takes them, and says at last that nothing is left.
@pytest.mark.parametrize("given", [False, True], ids=["busybox", "a tarball that is given"])
def test_demo(given: bool) -> None:
    done = subprocess.run(
        [*DEMO, *([images.busybox_tar()] if given else [])],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^([a-z ]+)(?:,[^:]*)?: (?:vmm|im)/lxc", done.stdout, re.MULTILINE)
    assert steps == ["host probe", "deploy", "poll", "reboot", "poll", "shutdown", "poll", "deploy", "cancel"]
    assert len(re.findall(r"^      \d+\.\d\d s$", done.stdout, re.MULTILINE)) == len(steps)
    assert "      STATE=a " in done.stdout
    assert "      STATE=d\n" in done.stdout
    assert done.stdout.endswith("Nothing is left of it: no domain, no mount, no loop device.\n")
    if not given:
        assert "boot number 2" in done.stdout


# Interrupted while the container runs, it takes everything back.
def test_interrupted() -> None:
    demo = subprocess.Popen(
        DEMO, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_until(lambda: any(name.startswith("one-4") for name in machine.domains()), "the container")
        os.killpg(demo.pid, signal.SIGTERM)
        demo.communicate(timeout=120)
    finally:
        demo.kill()
    assert demo.returncode != 0


# Only root, and only a file that is there.
def test_refusals() -> None:
    done = subprocess.run([*DEMO, "/no/such.tar"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "install.sh: there is no file /no/such.tar\n"
    user = ["setpriv", "--reuid", "oneadmin", "--regid", "oneadmin", "--clear-groups", "--"]
    done = subprocess.run([*user, *DEMO], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "install.sh: the demonstration needs root: sudo ./install.sh demo\n"
