"""What does OpenNebula do around a VM? Its directory and disks as the transfer manager leaves them, and its actions
with argv and stdin as the captures of both generations have them.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Mapping
from typing import Any

from tests.support import machine, templates
from tests.support.breaking import Breaker
from tests.support.frontends import DRIVERS, MONITORD, PULL
from tests.support.stream import USER, Outcome, Running
from tests.support.waiting import wait_until

REMOTES = "/var/tmp/one"
HOST = "node1"


class Driver:
    """The installed executables of one generation, called as oneadmin through `bash -s`."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.directory = os.path.join(REMOTES, "vmm", DRIVERS[version])
        self.under: Breaker | None = None
        """What the next action is started under."""

    @property
    def pull(self) -> bool:
        return self.version == PULL

    def start(self, action: str, *argv: object, stdin: str | None = None) -> Running:
        """Begin an action; arguments are joined with blanks, unquoted, as OpenNebula does."""
        line = " ".join([os.path.join(self.directory, action), *(str(argument) for argument in argv)])
        under, self.under = self.under, None
        return Running(line, stdin, quoted=not self.pull, under=under)

    def __call__(self, action: str, *argv: object, stdin: str | None = None, timeout_s: float = 90) -> Outcome:
        return self.start(action, *argv, stdin=stdin).wait(timeout_s)

    def probe(self, path: str, *argv: object, stdin: str | None = None) -> Outcome:
        """A probe below im/, e.g. `lxc.d/host.py` or `onelxc-probes.d/vm/status/state`."""
        line = " ".join([os.path.join(REMOTES, "im", path), *(str(argument) for argument in argv)])
        return Running(line, stdin, quoted=True).wait()

    def message(self, outcome: Outcome) -> str:
        """The error as this generation shows it to the user."""
        return outcome.framed_message if self.pull else outcome.message


class Vm:
    """One VM on this host. `template` may be changed between actions; it is what the next one is told."""

    def __init__(
        self,
        driver: Driver,
        vm_id: int,
        template: Mapping[str, Any],
        user_template: Mapping[str, Any],
        ds_id: int = 0,
    ) -> None:
        self.driver = driver
        self.vm_id = vm_id
        self.name = f"one-{vm_id}"
        self.template: dict[str, Any] = {"CPU": "0.5", "MEMORY": "64", "VCPU": "1", "NAME": f"vm{vm_id}", **template}
        self.user_template = dict(user_template)
        self.disks: list[dict[str, Any]] = []
        self.ds_id = ds_id
        self.tm_mad = "ssh"
        """The system datastore's."""
        self.top = f"/var/lib/one/{vm_id}" if driver.pull else f"/var/lib/one/datastores/{self.ds_id}/{vm_id}"
        self.directory = os.path.join(self.top, "images") if driver.pull else self.top
        self.deployments = 0
        self.starts: list[int] = []
        os.makedirs(self.directory)
        self._own()

    def _own(self) -> None:
        account = pwd.getpwnam(USER)
        path = self.directory
        while path != "/var/lib/one":
            os.chown(path, account.pw_uid, account.pw_gid)
            path = os.path.dirname(path)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def give(self, path: str) -> None:
        """What the transfer manager writes belongs to oneadmin; 3.2.1's tm_ssh leaves it writable for all."""
        account = pwd.getpwnam(USER)
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        if not os.path.islink(path):
            os.chmod(path, 0o666 if self.driver.pull else 0o660)

    def add_disk(self, source: str | None, **attributes: object) -> str:
        """The next disk.N, a copy of `source` (None: nothing is copied, for volatile disks); its path."""
        number = len(self.disks)
        path = self.path(f"disk.{number}")
        if source is not None:
            machine.command("cp", "--reflink=auto", "--sparse=always", source, path)
            self.give(path)
        disk: dict[str, Any] = {"DISK_ID": number, "TARGET": f"sd{chr(97 + number)}"}
        if source is not None:
            disk["SOURCE"] = f"/srv/images/{os.path.basename(source)}"
        if not self.driver.pull:
            disk.update({"TYPE": "FILE", "DISK_TYPE": "FILE", "FORMAT": "raw", "DRIVER": "raw", "TM_MAD": "ssh"})
            disk.update({"CLONE": "YES", "SAVE": "NO", "READONLY": "NO"} if source is not None else {})
        disk.update(attributes)
        self.disks.append(disk)
        return path

    def add_nic(self, bridge: str, **attributes: object) -> str:
        """A NIC on `bridge`; the name of its host side."""
        nics = self.template.setdefault("NIC", [])
        number = len(nics)
        nic: dict[str, Any] = {"BRIDGE": bridge, "MAC": f"02:00:0a:4d:{self.vm_id & 255:02x}:{number + 2:02x}"}
        nic.update({"NETWORK": "lan", "NETWORK_ID": 0})
        if not self.driver.pull:
            nic.update(
                {"NIC_ID": number, "TARGET": f"{self.name}-{number}", "BRIDGE_TYPE": "linux", "VN_MAD": "bridge"}
            )
        nic.update(attributes)
        nics.append(nic)
        return f"{self.name}-{number}"

    def xml(self, *, state: int = 3, lcm_state: int = 3, deploy_id: str | None = None, extra: str = "") -> str:
        """The deployment file of 3.2.1, or the <VM> of 7.4.0."""
        template = {**self.template, "DISK": self.disks}
        if self.driver.pull:
            return templates.pull_template(self.vm_id, template)
        return templates.vm_xml(
            self.vm_id,
            template,
            name=str(self.template["NAME"]),
            deploy_id=self.name if deploy_id is None else deploy_id,
            host=HOST,
            user_template=self.user_template,
            state=state,
            lcm_state=lcm_state,
            ds_id=self.ds_id,
            tm_mad=self.tm_mad,
            extra=extra,
        )

    def action_xml(self, *, lcm_state: int = 3, state: int = 3, extra: str = "", **values: str) -> str:
        vm = self.xml(lcm_state=lcm_state, state=state, extra=extra)
        return templates.action_xml(vm, host=HOST, deploy_id=self.name, **values)

    def start_deploy(self) -> Running:
        file = self.path(f"deployment.{self.deployments}")
        self.deployments += 1
        if self.driver.pull:
            stdin = self.xml()
            # the here-document is unquoted there: what the remote shell would expand is written so that it stays
            stdin = stdin.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")
        else:
            stdin = self.xml(lcm_state=2, deploy_id="")
        return self.driver.start("deploy", file, HOST, self.vm_id, HOST, stdin=stdin)

    def deploy(self, timeout_s: float = 90) -> Outcome:
        return self.start_deploy().wait(timeout_s)

    def deployed(self, timeout_s: float = 90) -> Vm:
        """Deploy, which has to succeed and to print the deploy id and nothing else."""
        outcome = self.deploy(timeout_s).ok()
        assert outcome.out == f"{self.name}\n", outcome
        return self

    def start(self, action: str, *argv: object, lcm_state: int = 3, extra: str = "", **values: str) -> Running:
        """An action on the deployed VM: `DEPLOY_ID argv… HOST ID HOST`, with the action's XML from 5.x on."""
        if self.driver.pull:
            return self.driver.start(action, self.name, *argv, HOST, self.vm_id, HOST)
        stdin = self.action_xml(lcm_state=lcm_state, extra=extra, **values)
        between = [HOST] if action in ("shutdown", "cancel", "reboot", "reset", "save", "poll", "resize_disk") else []
        return self.driver.start(action, self.name, *argv, *between, self.vm_id, HOST, stdin=stdin)

    def act(self, action: str, *argv: object, timeout_s: float = 90, lcm_state: int = 3, extra: str = "",
            **values: str) -> Outcome:  # fmt: skip
        return self.start(action, *argv, lcm_state=lcm_state, extra=extra, **values).wait(timeout_s)

    def inside(self, shell: str, *, timeout_s: float = 30, check: bool = True, uid: int = 0) -> str:
        return machine.inside(self.name, shell, timeout_s=timeout_s, check=check, uid=uid)

    @property
    def privileged(self) -> bool:
        """Whether root of the container is root of the host."""
        with open(f"/proc/{machine.init_pid(self.name)}/uid_map") as file:
            return file.read().split()[1] == "0"

    @property
    def running(self) -> bool:
        return machine.domains().get(self.name) == 1

    def runs_anew(self, first: int) -> bool:
        """Whether another process than `first` is its process 1; False between two boots, where there may be none."""
        try:
            return machine.init_pid(self.name) != first
        except (AssertionError, machine.libvirt.libvirtError):
            return False

    def booted(self, times: int = 1, timeout_s: float = 60) -> Vm:
        """Wait until the container's own start scripts have run for the `times`th time.

        A line of /boots names the start of its process 1. Counting lines would not do: a deploy may have started the
        container twice, where libvirtd had missed the first start.
        """

        def is_up() -> bool:
            try:
                start = machine.started(machine.init_pid(self.name))
                lines = self.inside("cat /boots", check=False).splitlines()
            except (AssertionError, OSError, machine.libvirt.libvirtError):
                return False
            if len(lines) < times or (lines[-1] != "boot" and f"boot {start}" not in lines):
                return False
            new = start not in self.starts
            if times > len(self.starts) > 0 and not new:
                return False
            if new:
                self.starts.append(start)
            return True

        wait_until(is_up, f"{self.name} has booted {times} times", timeout_s=timeout_s)
        return self

    def end(self) -> None:
        """As OpenNebula does at last: cancel, then the transfer manager removes everything."""
        if os.path.exists(os.path.join(self.driver.directory, "cancel")):
            outcome = self.act("cancel")
            assert outcome.code == 0, f"cancel at the end of the test: {outcome}"
        self.delete()

    def delete(self) -> None:
        """The transfer manager's `rm -rf`, as oneadmin; in 3.2.1 only of `images`."""
        machine.command("runuser", "-u", USER, "--", "rm", "-rf", self.directory)
        shutil.rmtree(self.top, ignore_errors=True)


__all__ = ["HOST", "MONITORD", "PULL", "REMOTES", "Driver", "Vm"]
