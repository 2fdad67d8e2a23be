"""Which network devices are there, on the host or in a container, and how is one changed? iproute2, spoken in JSON.

A container's devices are looked at from outside: `ip` is the host's own program and runs with the host's files, in the
container's network namespace alone. Its tenant names interfaces as he likes, so that they are told apart by index, and
nothing read there is used as an argument but numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from onelxc import command, jsontext
from onelxc.errors import CommandError, HypervisorError
from onelxc.root import cgroups, orphans


@dataclass(frozen=True)
class Link:
    """One device. `peer` is the index of a veth's other end, `kind` as in `ip link add type …` ("" for hardware)."""

    name: str
    index: int
    mac: str
    mtu: int
    kind: str
    master: str
    up: bool
    peer: int


class Namespace:
    """A network namespace, held open: the host's own (`fd` -1) or a container's."""

    def __init__(self, fd: int = -1) -> None:
        self.fd = fd

    @classmethod
    def of_vm(cls, vm_id: int) -> Namespace:
        """That of the VM's running container. HypervisorError if there is none, or if it is the host's own."""
        for group in cgroups.groups(vm_id):
            for init in orphans.children(group.controller):
                try:
                    fd = os.open(f"/proc/{init}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    continue
                # the number may be another process's by now
                if init in orphans.children(group.controller) and _inode(fd) != os.stat("/proc/self/ns/net").st_ino:
                    return cls(fd)
                os.close(fd)
        raise HypervisorError(f"Cannot find the network of VM {vm_id}: it has no running container")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, *argv: str, verb: str) -> bytes:
        """One program of iproute2 in here."""
        if self.fd < 0:
            return command.run(argv, verb=verb)
        return command.run(["nsenter", f"--net=/proc/self/fd/{self.fd}", "--", *argv], pass_fds=(self.fd,), verb=verb)

    def links(self) -> tuple[Link, ...]:
        """All devices in here."""
        found = jsontext.loads(self.run("ip", "-d", "-j", "link", "show", verb="list network devices") or b"[]")
        return tuple(_link(entry) for entry in found)

    def link(self, name: str) -> Link | None:
        """The device of that name, None if there is none."""
        return next((link for link in self.links() if link.name == name), None)

    def by_index(self, index: int) -> Link | None:
        """The device of that number, None if there is none."""
        return next((link for link in self.links() if link.index == index), None)

    def change(self, name: str, *words: str) -> None:
        """`ip link set dev NAME …`."""
        self.run("ip", "link", "set", "dev", name, *words, verb=f"set up {name}")

    def addresses(self, name: str) -> tuple[str, ...]:
        """The addresses of a device as "10.0.0.1/24", without those that it has by itself."""
        found = jsontext.loads(self.run("ip", "-j", "address", "show", "dev", name, verb=f"look at {name}") or b"[]")
        infos = [info for entry in found for info in entry.get("addr_info", ())]
        return tuple(f"{info['local']}/{info['prefixlen']}" for info in infos if info.get("scope") != "link")

    def has_routes(self, name: str) -> bool:
        """Whether any route of the main table leads through a device, but for what it has by itself."""
        for family in ("-4", "-6"):
            text = self.run("ip", family, "-j", "route", "show", "dev", name, verb=f"look at {name}")
            routes = jsontext.loads(text or b"[]")
            if any(not str(route.get("dst", "")).startswith("fe80:") for route in routes):
                return True
        return False

    def route(self, family: str, *words: str) -> None:
        """`ip route replace …`."""
        self.run("ip", family, "route", "replace", *words, verb="set a route")

    def delete(self, name: str) -> None:
        """Remove a device; one that is gone already is fine."""
        try:
            self.run("ip", "link", "delete", "dev", name, verb=f"remove {name}")
        except CommandError:
            if self.link(name) is not None:
                raise


def _link(entry: dict[str, Any]) -> Link:
    return Link(
        name=str(entry["ifname"]),
        index=int(entry["ifindex"]),
        mac=str(entry.get("address", "")).lower(),
        mtu=int(entry.get("mtu", 0)),
        kind=str(entry.get("linkinfo", {}).get("info_kind", "")),
        master=str(entry.get("master", "")),
        up="UP" in entry.get("flags", ()),
        peer=int(entry.get("link_index", 0)),
    )


def _inode(fd: int) -> int:
    return os.fstat(fd).st_ino
