"""How does an NBD server on this host become a block device? By the kernel's nbd, which is told by generic netlink.

The kernel picks a free device itself, so nobody else gets the same, and keeps the name it is given with it:
/sys/block/nbdN/backend says what a device is for, whoever has forgotten it. Knows nothing of images and VMs.
Sources: linux/nbd-netlink.h, linux/genetlink.h, and proto.md of the NBD project for the server's side.
"""

from __future__ import annotations

import errno
import glob
import os
import socket
import struct
import time
from collections.abc import Iterable

from onelxc import command, host, kernelfile
from onelxc.errors import CommandError, StorageError

EXPORT = "disk"
"""What a server has to call what it shows."""
_GENERIC, _ERROR, _REQUEST_ACK = 16, 2, 5
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME, _GROUPS, _GROUP_ID = 16, 3, 1, 2, 7, 2
_CONNECT, _DISCONNECT, _RECONFIGURE, _LINK_DEAD = 1, 2, 3, 4
_INDEX, _SIZE, _BLOCK, _SERVER_FLAGS, _SOCKETS, _PATIENCE, _BACKEND = 1, 2, 3, 5, 7, 8, 10
_NETLINK, _ADD_MEMBERSHIP = 270, 1
_ANSWER_S = 30.0
_LINK_S = 10.0

Attribute = tuple[int, bytes]


def available() -> bool:
    """Whether this kernel has nbd; the module is loaded if the administrator has not forbidden it (blacklist).

    Loaded by us, it looks for no partitions: they would be the host's to see, and LVM's to activate. Before 5.14 the
    kernel does not say what a device is for.
    """
    if host.kernel_version(os.uname().release) < (5, 14):
        return False
    if not os.path.isdir("/sys/module/nbd"):
        try:
            command.run(["modprobe", "-b", "-q", "nbd", "max_part=0"])
        except CommandError:
            return False
    return os.path.isdir("/sys/module/nbd")


def connect(server: str, name: str) -> str | None:
    """The block device of what the server at the unix socket `server` shows; `name` is what it can be found by.

    None if the module was loaded so that the host would see the partitions of a partitioned image.
    """
    with _Server(server) as link:
        if _max_part() != "0" and link.sector()[510:] == b"\x55\xaa":
            return None
        # 512: file systems have the sectors of the disk that they were made on
        size = [(_SIZE, _u64(link.size)), (_BLOCK, _u64(512)), (_SERVER_FLAGS, _u64(link.flags))]
        answer = _ask(_CONNECT, [*size, (_BACKEND, _text(name)), _sockets(link.socket)], "attach an nbd device")
    return f"/dev/nbd{struct.unpack('=I', dict(answer)[_INDEX])[0]}"


def devices(name: str) -> tuple[str, ...]:
    """The connected devices of this name: the kernel's word."""
    return tuple(device for device in _all() if name_of(device) == name)


def devices_below(directory: str) -> tuple[str, ...]:
    """The connected devices whose names are paths below a directory."""
    prefix = directory.rstrip("/") + "/"
    return tuple(device for device in _all() if name_of(device).startswith(prefix))


def name_of(device: str) -> str:
    """What a device was connected for; "" if it is not connected, or no nbd device."""
    return kernelfile.text(f"/sys/block/{os.path.basename(device)}/backend")


def disconnect(device: str) -> None:
    """End the connection; requests that wait for an answer fail. What is not connected is disconnected."""
    try:
        _ask(_DISCONNECT, [_index(device)], f"disconnect {device}")
    except StorageError:
        if name_of(device):
            raise


def be_patient(device: str, seconds: int) -> None:
    """How long requests wait for another server when this one has gone, before they fail. 0, the beginning: not."""
    _reconfigure(device, (_PATIENCE, _u64(seconds)))


def reconnect(device: str, server: str) -> None:
    """Go on with another connection, of which the device takes the size. Does nothing to one whose server is there."""
    with _Server(server) as link:
        _reconfigure(device, _sockets(link.socket))
        # not at once: to change the size waits for the requests that wait for the connection
        _reconfigure(device, (_SIZE, _u64(link.size)))


def is_busy(device: str) -> bool:
    """Whether requests are under way."""
    return bool(set(kernelfile.text(f"/sys/block/{os.path.basename(device)}/inflight").split()) - {"0"})


def wait_until_idle(device: str) -> None:
    """Return when no request is under way. Whoever calls sees to it that none comes."""
    deadline = time.monotonic() + _ANSWER_S
    while is_busy(device):
        if time.monotonic() > deadline:
            raise StorageError(f"Cannot change the size of {device}: it does not come to rest")
        time.sleep(0.01)


class LinkWatch:
    """Hears from the kernel that it has noticed the end of a connection. To be made before that is ended."""

    def __init__(self) -> None:
        _, groups = _family()
        self._socket = _netlink()
        for group in groups:
            self._socket.setsockopt(_NETLINK, _ADD_MEMBERSHIP, group)

    def wait(self, device: str) -> None:
        """Return when the device has lost its connection. A word that does not come is not waited for."""
        deadline = time.monotonic() + _LINK_S
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                message = self._socket.recv(65536)
            except OSError:
                return
            if message[16] == _LINK_DEAD and _index(device) in _attributes(message[20:]):
                return

    def __enter__(self) -> LinkWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class _Server:
    """A connection to an NBD server, past the greetings. The kernel gets the socket and does the rest."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(_ANSWER_S)
        try:
            self.socket.connect(path)
            magic, _ = struct.unpack(">16sH", self._receive(18))
            if magic != b"NBDMAGICIHAVEOPT":
                raise StorageError(f"Cannot use {path}: no NBD server")
            # fixed newstyle, no zeroes after the answer; option 1: the export of this name
            self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, len(EXPORT)) + EXPORT.encode())
            self.size, self.flags = struct.unpack(">QH", self._receive(10))
        except OSError as error:
            self.socket.close()
            raise StorageError(f"Cannot reach the NBD server {path}: {error}") from error
        except StorageError:
            self.socket.close()
            raise

    def sector(self) -> bytes:
        """The first 512 bytes; fewer if there are no more."""
        length = min(512, self.size)
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 0, 0, length))
        if struct.unpack(">IIQ", self._receive(16))[1] != 0:
            raise StorageError("Cannot read an image: its NBD server reports an error")
        return self._receive(length)

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise StorageError("Cannot use an NBD server: it ended the connection")
            data += more
        return data

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def _reconfigure(device: str, *attributes: Attribute) -> None:
    name = (_BACKEND, _text(name_of(device)))
    _ask(_RECONFIGURE, [_index(device), name, *attributes], f"change {device}")


def _index(device: str) -> Attribute:
    return _INDEX, struct.pack("=I", int(device[len("/dev/nbd") :]))


def _sockets(link: socket.socket) -> Attribute:
    link.settimeout(None)
    return _SOCKETS, _pack([(1, _pack([(1, struct.pack("=I", link.fileno()))]))])


def _u64(number: int) -> bytes:
    return struct.pack("=Q", number)


def _text(word: str) -> bytes:
    return os.fsencode(word) + b"\0"


def _all() -> list[str]:
    return [f"/dev/{os.path.basename(path)}" for path in glob.glob("/sys/block/nbd*")]


def _max_part() -> str:
    return kernelfile.text("/sys/module/nbd/parameters/max_part")


def _family() -> tuple[int, tuple[int, ...]]:
    """(number, multicast groups) by which generic netlink knows nbd here."""
    found = dict(_exchange(_CONTROL, _GET_FAMILY, [(_FAMILY_NAME, b"nbd\0")], "use nbd"))
    groups = [dict(_attributes(group))[_GROUP_ID] for _, group in _attributes(found.get(_GROUPS, b""))]
    return struct.unpack("=H", found[_FAMILY_ID])[0], tuple(struct.unpack("=I", group)[0] for group in groups)


def _ask(verb: int, attributes: Iterable[Attribute], doing: str) -> list[Attribute]:
    return _exchange(_family()[0], verb, attributes, doing)


def _netlink() -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _GENERIC)
    link.bind((0, 0))
    return link


def _exchange(family: int, verb: int, attributes: Iterable[Attribute], doing: str) -> list[Attribute]:
    """The attributes of the answer, if there is one. StorageError with the kernel's reason."""
    body = struct.pack("=BBH", verb, 1, 0) + _pack(attributes)
    answer: list[Attribute] = []
    with _netlink() as link:
        link.send(struct.pack("=IHHII", 16 + len(body), family, _REQUEST_ACK, 1, 0) + body)
        while True:
            messages = link.recv(65536)
            while messages:
                length, kind = struct.unpack_from("=IH", messages)
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", messages, 16)[0]
                    if code:
                        raise StorageError(f"Cannot {doing}: {os.strerror(code)} ({errno.errorcode.get(code, code)})")
                    return answer
                answer = _attributes(messages[20:length])
                messages = messages[(length + 3) // 4 * 4 :]


def _pack(attributes: Iterable[Attribute]) -> bytes:
    packed = b""
    for kind, data in attributes:
        packed += struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
    return packed


def _attributes(data: bytes) -> list[Attribute]:
    found = []
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found.append((kind & 0x3FFF, data[4:length]))
        data = data[(max(length, 4) + 3) // 4 * 4 :]
    return found
