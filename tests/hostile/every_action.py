"""Every action that OpenNebula 7.4 asks a driver for, as it asks; and what an answer has to look like.

An action is `act(vm) -> Outcome`. `Tried` runs them on one VM: each answer is judged by itself, and the witness looks
at the host after it. Whether an action succeeds is not asked here: a hostile container may refuse what it likes, as
long as that is one line, in time.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.hostile.witness import SECRET, Witness, holds_secret
from tests.support import images, machine
from tests.support.stream import Outcome
from tests.support.vms import HOST, REMOTES, Driver, Vm

LIMIT_S = 30.0
"""For any action, with the time limits of TIMEOUTS and on a machine that does other things as well."""
PROBE_S = 10.0
TIMEOUTS = "TIMEOUTS = [ SHUTDOWN_TIMEOUT = 2, REBOOT_TIMEOUT = 2, LOCK_TIMEOUT = 10 ]"
CONFIGURATION = "<MONITOR_CONFIGURATION><PROBES_PERIOD/></MONITOR_CONFIGURATION>"
PROBES = ("vm/status", "vm/monitor", "vm/execution", "vm/snapshot", "host/monitor", "host/system", "host/beacon")
_FRAME = re.compile(r"ERROR MESSAGE --8<------\n(.*)\nERROR MESSAGE ------>8--\n")
_OUT = {
    "deploy": r"one-\d+\n",
    "restore": r"(one-\d+\n)?",
    "poll": r"[^\n]+\n",
    "snapshot_create": r"snap-\d+\n",
    "exec": r"[^\n]*\n?",
}
"""What stdout may be on success; nothing where it is not listed. Nothing ever on failure."""


def judge(action: str, outcome: Outcome) -> None:
    """One result or one line, as OpenNebula and its user's terminal can bear it."""
    told = f"{action}: {outcome}"
    assert outcome.code in (0, 1), told
    assert SECRET not in outcome.out + outcome.err, told
    framed = _FRAME.fullmatch(outcome.err)
    error = framed.group(1) + "\n" if framed else outcome.err
    assert error.count("\n") <= 1, told
    text = error.rstrip("\n")
    assert text.isprintable(), f"not only text that prints: {told}"
    for word in ("Traceback", "internal error", ".py:"):
        assert word not in text, told
    if outcome.code:
        assert outcome.out == "", told
        assert text, f"no word of why: {told}"
    else:
        assert re.fullmatch(_OUT.get(action, ""), outcome.out), told


class Tried:
    """One VM of one tenant, on which actions are tried."""

    def __init__(self, one: Vm, witness: Witness) -> None:
        self.one = one
        self.witness = witness
        self._over = False

    def run(self, action: str, limit_s: float = LIMIT_S) -> Outcome:
        """One of ACTIONS by its name."""
        began = time.monotonic()
        return self._judged(action, ACTIONS[action](self.one), began, limit_s)

    def _judged(self, action: str, outcome: Outcome, began: float, limit_s: float = LIMIT_S) -> Outcome:
        took = time.monotonic() - began
        print(f"{action}: {took:.1f} s, {outcome}")  # shown with a failure
        judge(action, outcome)
        assert took < limit_s, f"{action} took {took:.1f} s"
        self.witness.look(action)
        return outcome

    def all(self) -> None:
        """Every action once, in an order in which each finds the VM as it needs it, if the container lets it."""
        for action in ORDER:
            self.run(action)
            if action in MOMENTS:
                self.probes()

    def probes(self, *names: str) -> None:
        for name in names or PROBES:
            probe(self.one.driver, name)
        self.witness.look("probes")

    def disk(self, make: Callable[[Path], object], **attributes: object) -> str:
        """The next disk, made where it is to lie, as the transfer manager has put it there."""
        path = self.one.add_disk(None, SOURCE="/srv/images/x", CLONE="YES", SAVE="NO", READONLY="NO", **attributes)
        make(Path(path))
        self.one.give(path)
        return path

    def attached(self, make: Callable[[Path], object], what: str, **attributes: object) -> None:
        """An image goes to the running container and, if it is taken, comes back."""
        path = self.disk(make, TARGET="/media/later", ATTACH="YES", **attributes)
        disk = self.one.disks[-1]
        print(what)
        began = time.monotonic()
        outcome = self.one.act("attach_disk", path, disk["TARGET"], 99, "b64", lcm_state=17)
        self._judged("attach_disk", outcome, began)
        if outcome.code == 0:
            assert self.run("detach_disk").code == 0
        else:
            self.one.disks.remove(disk)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def do(self, script: str) -> None:
        """The tenant does something in the container, if that still runs and has a shell."""
        with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired, machine.libvirt.libvirtError):
            self.one.inside(script, check=False, timeout_s=5)

    def over(self) -> None:
        """cancel, which always succeeds; and nothing of the host's is in what the tenant keeps."""
        if self._over:
            return
        self._over = True
        try:
            ended = self.run("cancel")
            assert ended.code == 0, ended
            assert self.one.name not in machine.domains()
            assert holds_secret(self.one.directory) == []
        finally:
            self.one.delete()


def probe(driver: Driver, name: str) -> None:
    began = time.monotonic()
    outcome = driver.probe(f"onelxc-probes.d/{name}/onelxc", "lxc", 2, HOST, stdin=CONFIGURATION)
    took = time.monotonic() - began
    told = f"{name}: {outcome}"
    assert outcome.code == 0, told
    assert took < PROBE_S, f"{name} took {took:.1f} s"
    assert SECRET not in outcome.out + outcome.err, told
    assert outcome.err == "", told
    for text in outcome.out.splitlines():
        assert text.isprintable(), f"not only text that prints: {told}"
        # 7.4 takes `NAME = VALUE` and vectors; a value in base64 is a tenant's, wholly
        for encoded in re.findall(r'MONITOR="([^"]*)"', text):
            assert SECRET.encode() not in base64.b64decode(encoded), told


def _attach_disk(one: Vm) -> Outcome:
    path = one.add_disk(images.busybox_ext4(), TARGET="/media/later", ATTACH="YES")
    disk = one.disks[-1]
    outcome = one.act("attach_disk", path, disk["TARGET"], 99, "b64", lcm_state=17)
    del disk["ATTACH"]
    return outcome


def _detach_disk(one: Vm) -> Outcome:
    disk = one.disks[-1]
    disk["ATTACH"] = "YES"
    path = one.path(f"disk.{disk['DISK_ID']}")
    outcome = one.act("detach_disk", path, disk["TARGET"], 1, lcm_state=18)
    del disk["ATTACH"]
    if outcome.code == 0 and len(one.disks) > 1:
        one.disks.remove(disk)
        os.unlink(path)
    return outcome


def _attach_nic(one: Vm) -> Outcome:
    device = one.add_nic("br0", ATTACH="YES", IP="10.77.0.99")
    nic = one.template["NIC"][-1]
    outcome = one.act("attach_nic", nic["MAC"], "br0", "-", "lxc", device, lcm_state=25)
    del nic["ATTACH"]
    return outcome


def _detach_nic(one: Vm) -> Outcome:
    nics = one.template["NIC"]
    nics[-1]["ATTACH"] = "YES"
    outcome = one.act("detach_nic", nics[-1]["MAC"], lcm_state=25)
    nics.pop()
    return outcome


def _resize(one: Vm) -> Outcome:
    one.template.update({"MEMORY": "96", "CPU": "1", "VCPU": "1"})
    return one.act("resize")


def _resize_disk(one: Vm) -> Outcome:
    size = os.path.getsize(one.path("disk.0"))
    return one.act("resize_disk", 0, (size >> 20) + 8, "b64", lcm_state=62)


def _exec(one: Vm) -> Outcome:
    one.template["QEMU_GA_EXEC"] = {"COMMAND": "cat /etc/hostname"}
    outcome = one.driver("exec", one.vm_id, HOST, "'cat /etc/hostname'", "''", stdin=one.action_xml(lcm_state=17))
    del one.template["QEMU_GA_EXEC"]
    return outcome


def _exec_cancel(one: Vm) -> Outcome:
    return one.driver("exec_cancel", one.vm_id, HOST, stdin=one.action_xml(lcm_state=17))


def _restore(one: Vm) -> Outcome:
    stdin = one.action_xml(lcm_state=21)
    return one.driver("restore", one.path("checkpoint"), HOST, one.name, one.vm_id, HOST, stdin=stdin)


def _migrate(one: Vm) -> Outcome:
    return one.driver("migrate", one.name, "node2", HOST, one.vm_id, HOST, stdin=one.action_xml())


def _context(one: Vm) -> str:
    return str(one.template.get("CONTEXT", {}).get("DISK_ID", ""))


ACTIONS: dict[str, Callable[[Vm], Outcome]] = {
    "deploy": lambda one: one.deploy(LIMIT_S),
    "poll": lambda one: one.act("poll"),
    "reboot": lambda one: one.act("reboot"),
    "reset": lambda one: one.act("reset"),
    "save": lambda one: one.act("save", one.path("checkpoint"), lcm_state=6),
    "restore": _restore,
    "attach_disk": _attach_disk,
    "detach_disk": _detach_disk,
    "attach_nic": _attach_nic,
    "detach_nic": _detach_nic,
    "prereconfigure": lambda one: one.act("prereconfigure", "sdz", lcm_state=17),
    "reconfigure": lambda one: one.act("reconfigure", "sdz", one.path(f"disk.{_context(one)}"), lcm_state=17),
    "resize": _resize,
    "resize_disk": _resize_disk,
    "snapshot_create": lambda one: one.act("snapshot_create", 0, lcm_state=24),
    "snapshot_revert": lambda one: one.act("snapshot_revert", "snap-0", lcm_state=24),
    "snapshot_delete": lambda one: one.act("snapshot_delete", "snap-0", lcm_state=24),
    "exec": _exec,
    "exec_cancel": _exec_cancel,
    "migrate": _migrate,
    "shutdown": lambda one: one.act("shutdown"),
    "cancel": lambda one: one.act("cancel"),
}
ORDER = (
    "deploy",
    "poll",
    "exec",
    "exec_cancel",
    "attach_disk",
    "attach_nic",
    "resize",
    "resize_disk",
    "prereconfigure",
    "reconfigure",
    "snapshot_create",
    "save",
    "restore",
    "reboot",
    "snapshot_revert",
    "snapshot_delete",
    "detach_nic",
    "detach_disk",
    "reset",
    "migrate",
    "shutdown",
    "deploy",
    "cancel",
)
MOMENTS = ("deploy", "save", "shutdown")
"""The probes are asked after these, too."""


def configure(driver: Driver) -> None:
    """The operator's time limits, in the driver's own configuration file, once."""
    places = [os.path.join(REMOTES, "etc/vmm", os.path.basename(driver.directory)), driver.directory]
    conf = next(path for place in places if (path := Path(place, "vmm_exec_lxc.conf")).exists())
    before = conf.read_text()
    if TIMEOUTS not in before:
        conf.write_text(f"{before}\n{TIMEOUTS}\n")
