"""Every capture of 3.2.1 goes through the installed executables, as its ssh stream wrote it: argv, stdin, nothing else.

stdout, stderr and the exit code are compared byte for byte; what happened to the container is asked of libvirt.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable

import pytest

from onelxc.config import Generation
from tests.support import captures, images, machine
from tests.support.stream import Outcome, Running
from tests.support.vms import REMOTES, Vm
from tests.support.waiting import wait_until

NewVm = Callable[..., Vm]
CASES = [capture.case.partition("/")[2] for capture in captures.ALL if capture.generation is Generation.PULL]


def frame(text: str) -> str:
    return f"ERROR MESSAGE --8<------\n{text}\nERROR MESSAGE ------>8--\n"


def start(case: str) -> Running:
    """The capture, as SshStream and do_action of 3.2.1 write it."""
    capture = captures.named(f"3.2.1/{case}")
    stdin = None if capture.stdin is None else capture.stdin.decode()
    return Running(" ".join(capture.argv), stdin, quoted=False)


def send(case: str) -> Outcome:
    return start(case).wait()


def deployed(vm: NewVm, vm_id: int) -> Vm:
    return vm(vm_id=vm_id).deployed()


def test_deploy(vm: NewVm) -> None:
    one = vm(vm_id=2)
    assert send("deploy") == Outcome("one-2\n", "", 0)
    assert machine.domains() == {"one-2": 1}
    assert "<memory unit='KiB'>1048576</memory>" in machine.domain_xml("one-2")
    one.booted()
    assert one.inside("stat -c %a /usr/bin/sudo") == "4755\n"


def test_deploy_nic_context(vm: NewVm, bridge: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = vm(vm_id=24)
    tree = tmp_path_factory.mktemp("context")
    (tree / "context.sh").write_text("HOSTNAME='lxc'\n")
    (tree / "init.sh").write_text("#!/bin/sh\n")
    # the next disk.N after the DISKs, which no DISK lists
    iso = one.path("disk.1")
    machine.command("xorriso", "-as", "mkisofs", "-quiet", "-o", iso, "-V", "CONTEXT", "-J", "-R", str(tree))
    one.give(iso)
    assert send("deploy_nic_context") == Outcome("one-24\n", "", 0)
    one.booted()
    assert os.readlink("/sys/class/net/one-24-0/master").endswith("/br0")
    assert one.inside("cat /context/context.sh") == "HOSTNAME='lxc'\n"
    assert "192.168.132.1/24" in one.inside("ip -4 addr show eth0")
    assert "02:00:c0:a8:84:01" in one.inside("ip link show eth0")
    assert one.inside("touch /context/x 2>&1; true") == "touch: /context/x: Read-only file system\n"


def test_cancel(vm: NewVm) -> None:
    deployed(vm, 3)
    assert send("cancel") == Outcome("", "", 0)
    assert machine.domains() == {}


def test_cancel_after_empty_deploy_id(vm: NewVm) -> None:
    """deploy was killed before it could say its id: the VM's own number is all that is left."""
    deployed(vm, 11)
    assert send("cancel_after_empty_deploy_id") == Outcome("", "", 0)
    assert machine.domains() == {}


def test_cancel_while_booting(vm: NewVm) -> None:
    """The deploy in flight gives up, whatever it is at, and the deploy id is not there at all."""
    one = vm(images.distribution_tar("systemd"), vm_id=5)
    deploying = one.start_deploy()
    state = "/var/lib/onelxc/vms/5/journal"
    wait_until(lambda: os.path.exists(state), "the deploy has begun to take things")
    assert send("cancel_while_booting") == Outcome("", "", 0)
    outcome = deploying.wait()
    assert (outcome.out, outcome.code) == ("", 1)
    assert outcome.err == frame(outcome.framed_message)
    assert machine.domains() == {}


@pytest.mark.parametrize("case", ["save", "restore", "migrate"])
def test_refused(vm: NewVm, case: str) -> None:
    """One line in the frame, exit code 1, and the container is as before."""
    one = deployed(vm, {"save": 2, "restore": 2, "migrate": 7}[case])
    first = machine.init_pid(one.name)
    outcome = send(case)
    assert (outcome.out, outcome.code) == ("", 1)
    assert outcome.err == frame(outcome.framed_message)
    assert f"VM {one.vm_id}:" in outcome.framed_message
    assert "\n" not in outcome.framed_message
    assert machine.init_pid(one.name) == first


POLL = re.compile(r"STATE=a USEDCPU=\d+(\.\d+)? USEDMEMORY=[1-9]\d* NETRX=\d+ NETTX=\d+\n")


def test_poll(vm: NewVm) -> None:
    deployed(vm, 12).booted()
    outcome = send("poll")
    assert POLL.fullmatch(outcome.out), outcome
    assert (outcome.err, outcome.code) == ("", 0)


def test_poll_of_a_vm_that_is_gone(vm: NewVm) -> None:
    vm(vm_id=12)
    outcome = send("poll")
    assert (outcome.out.split()[0], outcome.err, outcome.code) == ("STATE=d", "", 0)


KEYS = (
    "HYPERVISOR TOTALCPU CPUSPEED TOTALMEMORY USEDMEMORY FREEMEMORY FREECPU USEDCPU NETRX NETTX ARCH MODELNAME HOSTNAME"
)


def test_probe(driver: object) -> None:
    """run_probes calls each executable in the directory, from there; commas would become lines."""
    capture = captures.named("3.2.1/probe")
    directory = os.path.join(REMOTES, "im/lxc.d")
    printed = []
    for name in sorted(os.listdir(directory)):
        if os.access(os.path.join(directory, name), os.X_OK):
            outcome = Running(f"cd {directory}; ./{shlex.quote(name)} {' '.join(capture.argv[1:])}", None, quoted=False)
            answer = outcome.wait()
            assert (answer.err, answer.code) == ("", 0)
            printed += answer.out.splitlines()
    assert not [line for line in printed if "," in line or "=" not in line]
    values = dict(line.split("=", 1) for line in printed)
    assert set(KEYS.split()) <= set(values)
    assert values["HYPERVISOR"] == "lxc"
    assert int(values["TOTALCPU"]) == 100 * (os.cpu_count() or 0)


def test_reboot(vm: NewVm) -> None:
    one = deployed(vm, 2).booted()
    assert send("reboot") == Outcome("", "", 0)
    one.booted(2)
    assert machine.domains() == {"one-2": 1}


def test_shutdown(vm: NewVm) -> None:
    deployed(vm, 2).booted()
    assert send("shutdown") == Outcome("", "", 0)
    assert machine.domains() == {}


def test_every_capture_is_replayed() -> None:
    """Read from this file, since the tests above may have run in another worker."""
    with open(__file__) as file:
        text = file.read()
    missing = [case for case in CASES if f'"{case}"' not in text and f'"3.2.1/{case}"' not in text]
    assert not missing
