"""A real container without our driver: for tests of parts that must not depend on how a VM is prepared."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import libvirt

from onelxc.model import VmPaths, deploy_id
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
        self.root = Path(VmPaths(vm_id).root)
        if ours:
            os.makedirs(VmPaths(vm_id).state, 0o700)
        for name in ("bin", "proc", "sys", "dev", "tmp"):
            (self.root / name).mkdir(parents=True)
        subprocess.run(["cp", "/bin/busybox", self.root / "bin"], check=True)
        listed = subprocess.run(["busybox", "--list"], check=True, capture_output=True, text=True).stdout.split()
        for name in set(listed) - {"busybox"}:
            (self.root / "bin" / name).symlink_to("busybox")
        (self.root / "main").write_text(script)
        if id_base:
            subprocess.run(["chown", "-hR", f"{id_base}:{id_base}", self.root], check=True)
        self.start()

    def start(self) -> None:
        with libvirt.open("lxc:///") as connection:
            connection.createXML(self.xml(deploy_id(self.vm_id)), 0)

    def xml(self, name: str) -> str:
        idmap = f"<{{0}} start='0' target='{self.id_base}' count='65536'/>"
        idmap = f"<idmap>{idmap.format('uid')}{idmap.format('gid')}</idmap>" if self.id_base else ""
        return f"""<domain type='lxc'><name>{name}</name><memory unit='KiB'>65536</memory><vcpu>1</vcpu>
            {idmap}<features><privnet/></features>
            <os><type>exe</type><init>/bin/sh</init><initarg>/main</initarg></os>
            <devices><filesystem type='mount'><source dir='{self.root}'/><target dir='/'/></filesystem>{self.mounts}
            <console type='pty'/></devices></domain>"""

    def end(self) -> None:
        with libvirt.open("lxc:///") as connection:
            began = time.monotonic()
            eventually("its end", lambda: self._killed(connection, patient=time.monotonic() < began + 2))
        subprocess.run(["rm", "-rf", VmPaths(self.vm_id).mounts, VmPaths(self.vm_id).state], check=True)
        for path in (VmPaths(self.vm_id).console_log, VmPaths(self.vm_id).console_log + ".1"):
            Path(path).unlink(missing_ok=True)

    def _killed(self, connection: libvirt.virConnect, *, patient: bool) -> bool:
        """SIGKILL takes 0.2 s, destroy() 1.8. A signal is refused for a moment after create.

        Sometimes it is so for ever: libvirtd has missed what its controller says of init's pid.
        """
        for domain in connection.listAllDomains(0):
            if domain.name() == deploy_id(self.vm_id):
                with contextlib.suppress(libvirt.libvirtError):
                    if patient:
                        domain.sendProcessSignal(1, signal.SIGKILL)
                    else:
                        domain.destroy()
                return False
        return True

    def attach(self) -> socket.socket:
        eventually("a console socket", lambda: os.path.exists(socket_path(self.vm_id)))
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(WAIT_S)
        stream.connect(socket_path(self.vm_id))
        return stream
