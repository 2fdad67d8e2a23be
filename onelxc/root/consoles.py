"""Who reads and writes a container's console? The hub's one loop over all ptys, logs and attached people.

A container whose console nobody reads stands still after some 37 kB (`wait_woken` in the kernel's tty), so every pty
is drained from the first moment, into a bounded log and to everybody who is attached. libvirt lets several readers
share the bytes of one pty; here each of them gets all.

**Protocol** of `/run/onelxc/console/one-N.sock` (stream, root only): what is read is the console's bytes, first what
was said recently (at most BACKLOG), then as it comes; what is written goes to the container as if typed. Nothing is
framed. The stream outlives a reboot from inside and ends when the container is gone. A reader that does not keep up
loses the oldest bytes; it never slows the container or the others.

Knows nothing of libvirt: `events` opens the ptys.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Callable

from onelxc.errors import line
from onelxc.model import VmPaths
from onelxc.names import RUN, deploy_id
from onelxc.root.consolelog import ConsoleLog

SOCKETS = os.path.join(RUN, "console")
BACKLOG = 16 * 1024
QUEUE = 1024 * 1024
"""Bytes that wait for one reader before the oldest are dropped."""
CLIENTS = 32
"""People at one console; each may have QUEUE bytes waiting."""
TYPED = 64 * 1024
"""Bytes that wait for a container which does not read what is typed."""
RATE = 2 * 1024 * 1024
BURST = 4 * 1024 * 1024
"""Bytes a second of one console, and at once: a tenant's `yes` may slow down itself, not the host's CPU and disk."""
LINGER_S = 5.0
"""How long people stay attached to a container that is not there, in case it is rebooting."""


def socket_path(vm_id: int) -> str:
    """Where people attach to a VM's console."""
    return os.path.join(SOCKETS, deploy_id(vm_id) + ".sock")


@dataclass(eq=False)
class _Client:
    """One attached reader and writer."""

    socket: socket.socket
    outgoing: bytearray = field(default_factory=bytearray)


class _Console:
    """One VM's console: pty while it runs, log, and who is attached."""

    def __init__(self, vm_id: int, listener: socket.socket) -> None:
        self.vm_id = vm_id
        self.listener = listener
        self.pty = -1
        self.log: ConsoleLog | None = None
        self.clients: list[_Client] = []
        self.recent = bytearray()
        self.typed = bytearray()
        self.allowance = float(BURST)
        self.refilled = time.monotonic()
        self.silent_since = time.monotonic()

    def refill(self, now: float) -> None:
        self.allowance = min(float(BURST), self.allowance + (now - self.refilled) * RATE)
        self.refilled = now


class Consoles:
    """All consoles of the host. Every method but `wake` is called from the one thread that calls `turn`."""

    def __init__(self, lost: Callable[[int], None], log_limit: int) -> None:
        """`lost(vm_id)` is called when a pty has ended: the container did, or rebooted. `log_limit` in bytes."""
        self._log_limit = log_limit
        self._lost = lost
        self._consoles: dict[int, _Console] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        os.makedirs(SOCKETS, 0o700, exist_ok=True)

    def __len__(self) -> int:
        return len(self._consoles)

    def wake(self) -> None:
        """End the current `turn`; the only method for other threads."""
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass

    def open(self, vm_id: int, pty: int) -> None:
        """Drain this pty (a non-blocking descriptor, ours from now on) for the VM, instead of what it had before."""
        console = self._consoles.get(vm_id)
        if console is None:
            try:
                console = self._consoles[vm_id] = _Console(vm_id, _listen(socket_path(vm_id)))
            except OSError:
                os.close(pty)
                raise
            self._selector.register(console.listener, selectors.EVENT_READ, (self._accept, console, None))
        self._hang_up(console)
        console.pty = pty
        try:
            console.log = ConsoleLog(vm_id, self._log_limit)
        except OSError as error:
            complain(f"{deploy_id(vm_id)}: no console log: {error}")
        self._interest(console)

    def gone(self, vm_id: int) -> None:
        """The container is not running; people stay attached for a while in case it comes again."""
        console = self._consoles.get(vm_id)
        if console is not None:
            self._drain(console)
            self._hang_up(console)

    def turn(self, timeout_s: float) -> None:
        """Wait at most that long, do what there is to do. A fault of one console ends that console alone."""
        now = time.monotonic()
        for console in list(self._consoles.values()):
            if console.pty < 0 and (now - console.silent_since > LINGER_S or not _ours(console.vm_id)):
                self._close(console)
            elif console.allowance <= 0:
                console.refill(now)
                self._interest(console)
                timeout_s = min(timeout_s, 0.05)
        for key, mask in self._selector.select(timeout_s):
            if key.data is None:
                try:
                    os.read(self._wake_read, 4096)
                except BlockingIOError:
                    pass
                continue
            act, console, client = key.data
            if client is not None and client not in console.clients:
                continue
            try:
                act(console, client, mask)
            except Exception as error:
                complain(f"{deploy_id(console.vm_id)}: console: {type(error).__name__}: {error}")
                if client is not None:
                    self._leave(console, client)
                elif act == self._pty:
                    self._hang_up(console)
                    self._lost(console.vm_id)

    def close(self) -> None:
        """Let go of everything and everybody."""
        for console in list(self._consoles.values()):
            self._close(console)

    def _pty(self, console: _Console, _client: None, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and console.typed:
            try:
                del console.typed[: os.write(console.pty, console.typed[:4096])]
            except BlockingIOError:
                pass
            self._interest(console)
        if mask & selectors.EVENT_READ and not self._drain(console):
            self._hang_up(console)
            self._lost(console.vm_id)

    def _drain(self, console: _Console) -> bool:
        """Read what there is, within the allowance; False when the pty has ended."""
        if console.pty < 0:
            return False
        console.refill(time.monotonic())
        for _ in range(64):
            try:
                data = os.read(console.pty, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._said(console, data)
            if console.allowance <= 0:
                self._interest(console)
                return True
        return True

    def _said(self, console: _Console, data: bytes) -> None:
        console.allowance -= len(data)
        if console.log is not None:
            console.log.write(data)
        console.recent += data
        del console.recent[:-BACKLOG]
        for client in list(console.clients):
            self._give(console, client, data)

    def _give(self, console: _Console, client: _Client, data: bytes) -> None:
        client.outgoing += data
        if len(client.outgoing) > QUEUE:
            del client.outgoing[: len(client.outgoing) - QUEUE // 2]
        self._send(console, client)

    def _send(self, console: _Console, client: _Client) -> None:
        try:
            while client.outgoing:
                del client.outgoing[: client.socket.send(client.outgoing[:65536])]
        except BlockingIOError:
            pass
        except OSError:
            self._leave(console, client)
            return
        self._client_interest(console, client)

    def _accept(self, console: _Console, _client: None, _mask: int) -> None:
        try:
            connection, _ = console.listener.accept()
        except OSError:
            return
        if len(console.clients) >= CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection)
        console.clients.append(client)
        self._selector.register(connection, selectors.EVENT_READ, (self._client, console, client))
        self._give(console, client, bytes(console.recent))

    def _client(self, console: _Console, client: _Client, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            try:
                data = client.socket.recv(4096)
            except BlockingIOError:
                data = None
            except OSError:
                data = b""
            if data == b"":
                self._leave(console, client)
                return
            if data and console.pty >= 0:
                console.typed += data
                self._interest(console)
        if mask & selectors.EVENT_WRITE:
            self._send(console, client)

    def _leave(self, console: _Console, client: _Client) -> None:
        if client in console.clients:
            console.clients.remove(client)
            self._selector.unregister(client.socket)
            client.socket.close()

    def _interest(self, console: _Console) -> None:
        """Tell the selector what is wanted of the pty now, and of those who type into it."""
        if console.pty < 0:
            return
        mask = (selectors.EVENT_READ if console.allowance > 0 else 0) | (selectors.EVENT_WRITE if console.typed else 0)
        self._register(console.pty, mask, (self._pty, console, None))
        for client in console.clients:
            self._client_interest(console, client)

    def _client_interest(self, console: _Console, client: _Client) -> None:
        mask = (selectors.EVENT_READ if len(console.typed) < TYPED else 0) | (
            selectors.EVENT_WRITE if client.outgoing else 0
        )
        self._register(client.socket.fileno(), mask, (self._client, console, client))

    def _register(self, fd: int, mask: int, data: object) -> None:
        known = self._selector.get_map().get(fd)
        if known is None:
            if mask:
                self._selector.register(fd, mask, data)
        elif not mask:
            self._selector.unregister(fd)
        elif known.events != mask:
            self._selector.modify(fd, mask, data)

    def _hang_up(self, console: _Console) -> None:
        if console.pty >= 0:
            self._register(console.pty, 0, None)
            os.close(console.pty)
            console.pty = -1
            console.silent_since = time.monotonic()
            console.typed.clear()
        if console.log is not None:
            console.log.close()
            console.log = None

    def _close(self, console: _Console) -> None:
        self._hang_up(console)
        for client in list(console.clients):
            self._leave(console, client)
        self._selector.unregister(console.listener)
        console.listener.close()
        _unlink(socket_path(console.vm_id))
        del self._consoles[console.vm_id]


def _ours(vm_id: int) -> bool:
    """Whether the VM still has anything here: released, it is not about to come again."""
    return os.path.isdir(VmPaths(vm_id).state)


def complain(text: str) -> None:
    """A line for the hub's own log, which is where its stderr goes. Lost where that is full."""
    try:
        sys.stderr.write(time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) + line(text) + "\n")
        sys.stderr.flush()
    except OSError:
        pass


def _listen(path: str) -> socket.socket:
    _unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(old)
    listener.listen(16)
    listener.setblocking(False)
    return listener


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
