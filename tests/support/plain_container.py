"""A real container without our driver: for tests of parts that must not depend on how a VM is prepared."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from onelxc import hypervisor
from onelxc.model import VmPaths, deploy_id
from onelxc.root import starts
from onelxc.root.consoles import socket_path
from tests.support.waiting import wait_until

WAIT_S = 60.0


def eventually(what: str, condition: Callable[[], object]) -> None:
    """Wait until it is so; fails with `what` after a minute."""
    wait_until(condition, what, timeout_s=WAIT_S, interval_s=0.02)


class Container:
    """Busybox with a script as init; its root is a plain directory, chowned where it is unprivileged."""

    def __init__(self, vm_id: int, script: str, *, ours: bool = True, id_base: int = 0, mounts: str = "") -> None:
        self.vm_id = vm_id
        self.id_base = id_base
        self.mounts = mounts
        self.ours = ours
        self.script = script
        self.root = Path(VmPaths(vm_id).root)
        while not self._started():
            self.end()

    def _started(self) -> bool:
        """False where libvirt has lost the container in starting it (see `hypervisor`): it would be of no use."""
        self._build()
        with hypervisor.Hypervisor() as connection:
            return connection.create(self.xml(self.name), self.name).in_hand(5)

    @property
    def name(self) -> str:
        return deploy_id(self.vm_id)

    def _build(self) -> None:
        if self.ours:
            os.makedirs(VmPaths(self.vm_id).state, 0o700)
        for name in ("bin", "proc", "sys", "dev", "tmp"):
            (self.root / name).mkdir(parents=True)
        subprocess.run(["cp", "/bin/busybox", self.root / "bin"], check=True)
        listed = subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
        for name in set(listed) - {"busybox"}:
            (self.root / "bin" / name).symlink_to("busybox")
        (self.root / "main").write_text(self.script)
        if self.id_base:
            subprocess.run(["chown", "-hR", f"{self.id_base}:{self.id_base}", self.root], check=True)

    def xml(self, name: str) -> str:
        idmap = f"<{{0}} start='0' target='{self.id_base}' count='65536'/>"
        idmap = f"<idmap>{idmap.format('uid')}{idmap.format('gid')}</idmap>" if self.id_base else ""
        return f"""<domain type='lxc'><name>{name}</name><memory unit='KiB'>65536</memory><vcpu>1</vcpu>
            {idmap}<features><privnet/></features>
            <os><type>exe</type><init>/bin/sh</init><initarg>/main</initarg></os>
            <devices><filesystem type='mount'><source dir='{self.root}'/><target dir='/'/></filesystem>{self.mounts}
            <console type='pty'/></devices></domain>"""

    def end(self) -> None:
        with hypervisor.Hypervisor() as connection:
            domain = connection.find(self.name)
            if domain is not None:
                domain.end()
        subprocess.run(["rm", "-rf", VmPaths(self.vm_id).mounts, VmPaths(self.vm_id).state], check=True)
        starts.forget(self.vm_id)
        for path in (VmPaths(self.vm_id).console_log, VmPaths(self.vm_id).console_log + ".1"):
            Path(path).unlink(missing_ok=True)

    def attach(self) -> socket.socket:
        eventually("a console socket", lambda: os.path.exists(socket_path(self.vm_id)))
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(WAIT_S)
        stream.connect(socket_path(self.vm_id))
        return stream
