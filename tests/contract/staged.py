"""What stands on a host before a capture of 7.4.0 arrives? The VM's directory as the transfer manager left it, and, for
actions on a running VM, the container: deployed from the capture's own <VM>, without what is only being attached.
"""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

from onelxc.config import Generation
from tests.support import captures, images, machine
from tests.support.stream import Outcome, Running
from tests.support.vms import HOST, Driver, Vm

CONTEXT = "DISK_ID='3'\nETH0_IP='192.168.150.100'\nNETWORK='YES'\n"
BRIDGE = "onebr0"
NOT_STREAMED = ("exec", "exec_cancel", "poll", "resize", "snapshot_create", "snapshot_delete")
"""Actions that one_vmm_exec.rb runs by do_action without an ssh stream."""


class Staged:
    """One capture, `<case>/<action>`, and the VM that it is about. `one` is the VM as the other fixtures know it."""

    def __init__(self, driver: Driver, one: Vm, case: str, scratch: Path, root_mb: int | None) -> None:
        """`root_mb` is the size of disk.0 before the action, if not the one in its XML."""
        self.root_mb = root_mb
        self.driver = driver
        self.one = one
        self.capture = captures.named(f"7.4.0/{case}")
        root = ElementTree.fromstring(self.capture.read())
        vm = root if root.tag == "VM" else root.find("VM")
        assert vm is not None
        self.vm = vm
        self.template = vm.find("TEMPLATE")
        self._make_disks(scratch)

    def _make_disks(self, scratch: Path) -> None:
        assert self.template is not None
        for disk in self.template.findall("DISK"):
            path = self.one.path(f"disk.{disk.findtext('DISK_ID')}")
            size = int(disk.findtext("SIZE") or "0") << 20
            if disk.findtext("DISK_ID") == "0":
                size = self.root_mb << 20 if self.root_mb else size
                machine.command("cp", "--sparse=always", images.busybox_ext4(), path)
            else:
                with open(path, "wb") as file:
                    file.truncate(size)
                if disk.findtext("TYPE") == "swap":
                    machine.command("mkswap", path)
                else:
                    machine.command("mkfs.ext4", "-q", "-F", path)
            os.truncate(path, size)
            self.one.give(path)
        self.scratch = scratch
        self.write_context(CONTEXT)

    def write_context(self, text: str) -> None:
        """The context ISO, as `tm context` makes it anew."""
        tree = self.scratch / "context"
        tree.mkdir(exist_ok=True)
        (tree / "context.sh").write_text(text)
        path = self.one.path("disk.3")
        if os.path.exists(path):
            os.unlink(path)
        machine.command("xorriso", "-as", "mkisofs", "-quiet", "-o", path, "-V", "CONTEXT", "-J", "-R", str(tree))
        self.one.give(path)

    def deployed(self) -> Staged:
        """The container runs, as it did when the capture's action arrived."""
        copy = ElementTree.fromstring(ElementTree.tostring(self.vm))
        template = copy.find("TEMPLATE")
        assert template is not None
        for element in [*template.findall("DISK"), *template.findall("NIC"), *template.findall("NIC_ALIAS")]:
            if element.findtext("ATTACH") == "YES":
                template.remove(element)
        if self.root_mb:
            size = template.find("DISK[DISK_ID='0']/SIZE")
            assert size is not None
            size.text = str(self.root_mb)
        for old in template.findall("RESIZE/*"):
            present = template.find(old.tag)
            assert present is not None
            present.text = old.text
        text = ElementTree.tostring(copy, encoding="unicode")
        outcome = self.driver("deploy", self.one.path("deployment.0"), HOST, self.one.vm_id, HOST, stdin=text)
        assert outcome == Outcome(f"{self.one.name}\n", "", 0), outcome
        self.one.booted()
        return self

    def start(self, case: str | None = None) -> Running:
        """The capture (or a later one of the same VM), as 7.4.0's SshStream and do_action write it."""
        capture = self.capture if case is None else captures.named(f"7.4.0/{case}")
        assert capture.generation is Generation.MONITORD
        # the front-end that was watched had its driver's directory called lxc
        program = os.path.join(self.driver.directory, capture.action)
        command = " ".join([program, *(word.replace(" ", "\\ ") for word in capture.argv[1:])])
        streamed = capture.action not in NOT_STREAMED
        return Running(command, capture.read().decode(), quoted=True, streamed=streamed)

    def send(self, case: str | None = None) -> Outcome:
        return self.start(case).wait()
