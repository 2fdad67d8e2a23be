"""The kernel's own words about network devices, addresses and routes: rtnetlink(7), in any network namespace.

Devices are told apart by number. Their names are bytes, of which a tenant may take every one but `/` and blanks; they
are read here and never looked up in a program's output, which such a name breaks. What is asked in a container is about
one device, since there may be a million. Thin: errors are OSError with the kernel's reason, no policy.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

from onelxc.root import syscalls

NEWLINK, GETLINK, NEWADDR, GETADDR, NEWROUTE, GETROUTE = 16, 18, 20, 22, 24, 26
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_INFO_KIND = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_MULTIPATH = 1, 4, 5, 9
IFF_UP = 1
MAIN = 254

CREATE, REPLACE = 0x400, 0x100
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_CAPPED_AND_TLVS = 0x200
_ERROR_TEXT = 1
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12
_HEADER = struct.Struct("=IHHII")
_BUFFER = 1 << 18
_ANSWER_S = 10.0


class Rtnetlink:
    """A socket in a network namespace: that of the descriptor, -1 for our own."""

    def __init__(self, namespace: int = -1) -> None:
        if namespace < 0:
            self._socket = _socket()
            return
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(namespace, syscalls.CLONE_NEWNET)
            try:
                self._socket = _socket()
            finally:
                syscalls.setns(home, syscalls.CLONE_NEWNET)
        finally:
            os.close(home)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def change(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Have something changed."""
        self._send(kind, body, flags | _ACK)
        for _ in self._answers():
            pass

    def get(self, kind: int, body: bytes) -> bytes:
        """Ask about one thing."""
        self._send(kind, body, _ACK)
        return next(iter(list(self._answers())), b"")

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Ask about all. Whoever has heard enough closes the socket."""
        self._send(kind, body, _DUMP)
        return self._answers()

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, 1, 0) + body)

    def _answers(self) -> Iterator[bytes]:
        while True:
            data = self._socket.recv(_BUFFER)
            while len(data) >= _HEADER.size:
                length, kind, flags, _, _ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[length + 3 & ~3 :]
                if kind in (_ERROR, _DONE):
                    _raise_error(body, flags)
                    return
                yield body


def _socket() -> socket.socket:
    found = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        found.settimeout(_ANSWER_S)
        for option in (_CAP_ACK, _EXT_ACK, _STRICT):
            found.setsockopt(_SOL_NETLINK, option, 1)
        found.bind((0, 0))
    except BaseException:
        found.close()
        raise
    return found


def _raise_error(body: bytes, flags: int) -> None:
    number = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
    if number > 0:
        said = attributes(body[4 + _HEADER.size :]).get(_ERROR_TEXT, b"") if flags & _CAPPED_AND_TLVS else b""
        raise OSError(number, said.rstrip(b"\0").decode(errors="replace") or os.strerror(number))


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded."""
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of an answer by kind, nested ones as they are."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[length + 3 & ~3 :]
    return found


def number(data: bytes) -> int:
    """An attribute of 32 bits; 0 if there is none."""
    return int(struct.unpack("=I", data)[0]) if len(data) == 4 else 0


def link_body(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    """struct ifinfomsg."""
    return struct.pack("=BBHiII", 0, 0, 0, index, flags, change)


def address_body(family: int, index: int, prefix: int = 0) -> bytes:
    """struct ifaddrmsg, of global scope."""
    return struct.pack("=BBBBi", family, prefix, 0, 0, index)


def route_body(family: int, *, new: bool = False) -> bytes:
    """struct rtmsg, of the main table: a default route by an administrator's hand, or all."""
    protocol, kind = (3, 1) if new else (0, 0)
    return struct.pack("=BBBBBBBBI", family, 0, 0, 0, MAIN, protocol, 0, kind, 0)
