"""Containers that libvirt is given directly: what the driver did not make, and what only looking needs."""

from __future__ import annotations

import os
import shutil

import libvirt

from tests.support import machine

DIRECTORY = "/srv/plain"


class Plain:
    """A privileged container of busybox in a directory; `script` is what its process 1, a shell, runs. With `disk_mb`
    the directory is a file system of its own: that of the tests' machine is in memory, and knows no page cache.
    """

    def __init__(
        self, name: str, script: str, *, bridge: str = "", address: str = "", memory_kib: int = 65536, disk_mb: int = 0
    ) -> None:
        self.name = name
        self.root = os.path.join(DIRECTORY, name)
        self.disk = ""
        os.makedirs(self.root)
        if disk_mb:
            self.disk = f"{self.root}.img"
            machine.command("truncate", "-s", f"{disk_mb}M", self.disk)
            machine.command("mkfs.ext4", "-q", self.disk)
            machine.command("mount", "-o", "loop", self.disk, self.root)
        for directory in ("bin", "proc", "sys", "dev", "tmp", ".oldroot"):
            os.makedirs(os.path.join(self.root, directory))
        shutil.copy("/bin/busybox", os.path.join(self.root, "bin"))
        for applet in ("sh", "env", "sleep", "dd", "seq", "cat", "true"):
            os.symlink("busybox", os.path.join(self.root, "bin", applet))
        with open(os.path.join(self.root, "main"), "w") as file:
            file.write(script)
        nic = ""
        if bridge:
            nic = (
                f"<interface type='bridge'><source bridge='{bridge}'/><target dev='{name}-0'/><guest dev='eth0'/>"
                f"<ip address='{address}' family='ipv4' prefix='24'/></interface>"
            )
        self.xml = (
            f"<domain type='lxc'><name>{name}</name><memory unit='KiB'>{memory_kib}</memory><vcpu>1</vcpu>"
            "<features><privnet/></features>"
            "<os><type>exe</type><init>/bin/sh</init><initarg>/main</initarg></os>"
            f"<devices><filesystem type='mount'><source dir='{self.root}'/><target dir='/'/></filesystem>{nic}"
            "<console type='pty'/></devices></domain>"
        )
        self.start()

    def start(self) -> None:
        connection = libvirt.open("lxc:///")
        try:
            connection.createXML(self.xml)
        finally:
            connection.close()

    def inside(self, shell: str) -> str:
        return machine.inside(self.name, shell)

    def end(self) -> None:
        connection = libvirt.open("lxc:///")
        try:
            connection.lookupByName(self.name).destroy()
        except libvirt.libvirtError as error:
            # 42: it has ended by itself; 55: just now
            if error.get_error_code() not in (42, 55):
                raise
        finally:
            connection.close()
        if self.disk:
            machine.command("umount", self.root)
            os.unlink(self.disk)
        shutil.rmtree(self.root)
