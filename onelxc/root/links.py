"""Which network devices are there, on the host or in a container, and how is one changed?

By the kernel's own words (`rtnetlink`), and on the host, for what it has no few words of, by iproute2. A container's
devices are looked at from outside, in its network namespace alone. Its tenant names interfaces as he likes, and may
rename one while we look: there they are known by index, and no name of his is an argument to anything.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from onelxc import command
from onelxc.errors import CommandError, HypervisorError
from onelxc.root import cgroups, orphans, rtnetlink
from onelxc.root.rtnetlink import Rtnetlink, attribute, attributes

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_LINK_SCOPE = 253
_ROUTES = 10_000


@dataclass(frozen=True)
class Link:
    """One device. `peer` is the index of a veth's other end, `master` of its bridge, 0 for none; `kind` as in
    `ip link add type …` ("" for hardware)."""

    name: str
    index: int
    mac: str
    mtu: int
    kind: str
    master: int
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
        """All devices in here. For the host: in a container there may be a million."""
        with self._kernel("list network devices") as kernel:
            found = [_link(answer) for answer in kernel.dump(rtnetlink.GETLINK, rtnetlink.link_body())]
        return tuple(found)

    def link(self, name: str) -> Link | None:
        """The device of that name, None if there is none."""
        return self._get(rtnetlink.link_body() + attribute(rtnetlink.IFLA_IFNAME, os.fsencode(name) + b"\0"))

    def by_index(self, index: int) -> Link | None:
        """The device of that number, None if there is none."""
        return self._get(rtnetlink.link_body(index)) if index > 0 else None

    def _get(self, body: bytes) -> Link | None:
        with self._kernel("look at a network device") as kernel:
            try:
                return _link(kernel.get(rtnetlink.GETLINK, body))
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                return None

    @contextlib.contextmanager
    def _kernel(self, verb: str) -> Iterator[Rtnetlink]:
        try:
            with Rtnetlink(self.fd) as kernel:
                yield kernel
        except OSError as error:
            raise CommandError(f"Cannot {verb}: {error.strerror or error}") from error

    def rename(self, index: int, name: str) -> None:
        """Give a device a name, which it takes while it is down."""
        with self._kernel(f"call it {name}") as kernel:
            kernel.change(rtnetlink.NEWLINK, rtnetlink.link_body(index, 0, rtnetlink.IFF_UP))
            body = rtnetlink.link_body(index) + attribute(rtnetlink.IFLA_IFNAME, name.encode() + b"\0")
            kernel.change(rtnetlink.NEWLINK, body)

    def set_mtu(self, index: int, mtu: int) -> None:
        with self._kernel(f"set MTU {mtu}") as kernel:
            body = rtnetlink.link_body(index) + attribute(rtnetlink.IFLA_MTU, struct.pack("=I", mtu))
            kernel.change(rtnetlink.NEWLINK, body)

    def set_up(self, index: int) -> None:
        with self._kernel("raise it") as kernel:
            kernel.change(rtnetlink.NEWLINK, rtnetlink.link_body(index, rtnetlink.IFF_UP, rtnetlink.IFF_UP))

    def add_address(self, index: int, address: str, prefix: int) -> None:
        """An address that is there already is fine."""
        family, packed = _packed(address)
        with self._kernel(f"give it the address {address}/{prefix}") as kernel:
            body = rtnetlink.address_body(family, index, prefix)
            body += attribute(rtnetlink.IFA_LOCAL, packed) + attribute(rtnetlink.IFA_ADDRESS, packed)
            kernel.change(rtnetlink.NEWADDR, body, rtnetlink.CREATE | rtnetlink.REPLACE)

    def add_default(self, index: int, gateway: str) -> None:
        """The default route of the gateway's family."""
        family, packed = _packed(gateway)
        with self._kernel(f"set the default route by {gateway}") as kernel:
            body = rtnetlink.route_body(family, new=True)
            body += attribute(rtnetlink.RTA_GATEWAY, packed) + attribute(rtnetlink.RTA_OIF, struct.pack("=I", index))
            kernel.change(rtnetlink.NEWROUTE, body, rtnetlink.CREATE | rtnetlink.REPLACE)

    def has_default(self, family: int) -> bool:
        """Whether there is a default route. Somebody who has made a million routes is believed to have one."""
        return any(length == 0 or count > _ROUTES for count, (length, _, _) in enumerate(self._routes(family)))

    def _routes(self, family: int) -> Iterator[tuple[int, bytes, set[int]]]:
        """(length of the prefix, prefix, devices) of the routes of the main table."""
        with self._kernel("look at routes") as kernel:
            try:
                for answer in kernel.dump(rtnetlink.GETROUTE, rtnetlink.route_body(family)):
                    found = attributes(answer[12:])
                    if answer[0] == family and answer[4] == rtnetlink.MAIN:
                        yield answer[1], found.get(rtnetlink.RTA_DST, b""), _devices(found)
            except OSError as error:
                # a table that nobody has put a route into is not there; nor is IPv6 everywhere
                if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                    raise

    def change(self, name: str, *words: str) -> None:
        """`ip link set dev NAME …`."""
        self.run("ip", "link", "set", "dev", name, *words, verb=f"set up {name}")

    def addresses(self, index: int) -> tuple[str, ...]:
        """The addresses of a device as "10.0.0.1/24", without those that it has by itself."""
        found = []
        with self._kernel("look at addresses") as kernel:
            for answer in kernel.dump(rtnetlink.GETADDR, rtnetlink.address_body(socket.AF_UNSPEC, index)):
                family, prefix, _, scope, owner = struct.unpack_from("=BBBBi", answer)
                known = attributes(answer[8:])
                packed = known.get(rtnetlink.IFA_LOCAL) or known.get(rtnetlink.IFA_ADDRESS, b"")
                if owner == index and family in _FAMILIES and scope != _LINK_SCOPE and packed:
                    found.append(f"{socket.inet_ntop(family, packed)}/{prefix}")
        return tuple(found)

    def has_routes(self, index: int) -> bool:
        """Whether any route of the main table leads through a device, but for what it has by itself."""
        return any(
            index in devices and not prefix.startswith(b"\xfe\x80")
            for family in _FAMILIES
            for _, prefix, devices in self._routes(family)
        )

    def delete(self, name: str) -> None:
        """Remove a device; one that is gone already is fine."""
        try:
            self.run("ip", "link", "delete", "dev", name, verb=f"remove {name}")
        except CommandError:
            if self.link(name) is not None:
                raise


def _link(answer: bytes) -> Link:
    _, _, _, index, flags, _ = struct.unpack_from("=BBHiII", answer)
    found = attributes(answer[16:])
    return Link(
        name=os.fsdecode(found.get(rtnetlink.IFLA_IFNAME, b"").rstrip(b"\0")),
        index=index,
        mac=found.get(rtnetlink.IFLA_ADDRESS, b"").hex(":"),
        mtu=rtnetlink.number(found.get(rtnetlink.IFLA_MTU, b"")),
        kind=_kind(found.get(rtnetlink.IFLA_LINKINFO, b"")),
        master=rtnetlink.number(found.get(rtnetlink.IFLA_MASTER, b"")),
        up=bool(flags & rtnetlink.IFF_UP),
        peer=rtnetlink.number(found.get(rtnetlink.IFLA_LINK, b"")),
    )


def _kind(info: bytes) -> str:
    return attributes(info).get(rtnetlink.IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace")


def _devices(route: dict[int, bytes]) -> set[int]:
    """Of a route, or of all its next hops (struct rtnexthop)."""
    found = {rtnetlink.number(route.get(rtnetlink.RTA_OIF, b""))}
    hops = route.get(rtnetlink.RTA_MULTIPATH, b"")
    while len(hops) >= 8:
        length, _, _, index = struct.unpack_from("=HBBi", hops)
        found.add(index)
        hops = hops[max(length, 8) + 3 & ~3 :]
    return found


def _packed(address: str) -> tuple[int, bytes]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.inet_pton(family, address)


def _inode(fd: int) -> int:
    return os.fstat(fd).st_ino
