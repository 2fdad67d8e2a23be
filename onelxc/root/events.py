"""Which containers of ours run just now, and where are their consoles? libvirt's word, followed for ever.

A thread of the hub: it holds one connection (which also keeps libvirtd 9 from its exit after 120 s without clients),
is woken by lifecycle and reboot events, and compares (name, domain id) every two seconds in case an event was lost.
A domain id is the controller's pid, so a new id under an old name is a reboot. It never touches a domain that is not
ours: `one-<id>` with a state directory. It changes nothing in libvirt.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable

import libvirt

from onelxc.model import VmPaths, vm_id_of
from onelxc.root.consoles import complain

URI = "lxc:///"
INTERVAL_S = 2.0
_TTY = re.compile(r"<console[^>]* tty='(/dev/pts/\d+)'")


@dataclass(frozen=True)
class Started:
    """A container runs, with this id; `pty` is its console's open descriptor, -1 if it could not be opened."""

    vm_id: int
    domain_id: int
    pty: int
    rebooted: bool


@dataclass(frozen=True)
class Gone:
    """A container that ran runs no more."""

    vm_id: int


class Watcher(threading.Thread):
    """Delivers Started and Gone, in order, from its own thread."""

    def __init__(self, deliver: Callable[[Started | Gone], None], seen: dict[int, int]) -> None:
        """`seen` is what ran when a former hub was last alive: VM id → domain id."""
        super().__init__(name="libvirt", daemon=True)
        self._deliver = deliver
        self._wake = threading.Event()
        self._before = dict(seen)
        self._running: dict[int, int] = {}
        self._reopen: set[int] = set()
        self._connection: Any = None
        self.looked = threading.Event()
        """Set once the first look has been taken."""

    def again(self, vm_id: int) -> None:
        """The console that was opened for this VM has ended: look again, and open the one there is now."""
        self._reopen.add(vm_id)
        self._wake.set()

    def run(self) -> None:
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, name="events", daemon=True).start()
        told = ""
        while True:
            self._wake.clear()
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    told = ""
                self._look(self._connection)
                self.looked.set()
            except Exception as error:
                if str(error) != told:
                    told = str(error)
                    complain(f"libvirt: {told}")
                self._disconnect()
            self._wake.wait(INTERVAL_S if self._connection is not None else 0.5)

    def _connect(self) -> Any:
        connection = libvirt.open(URI)
        connection.setKeepAlive(10, 6)
        connection.registerCloseCallback(lambda _c, _reason, _o: self._wake.set(), None)
        for event in (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, libvirt.VIR_DOMAIN_EVENT_ID_REBOOT):
            connection.domainEventRegisterAny(None, event, lambda *_: self._wake.set(), None)
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except libvirt.libvirtError:
                pass

    def _look(self, connection: Any) -> None:
        domains = {}
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            vm_id = vm_id_of(domain.name())
            if vm_id is not None and os.path.isdir(VmPaths(vm_id).state):
                domains[vm_id] = domain
        for vm_id in [known for known in self._running if known not in domains]:
            del self._running[vm_id]
            self._deliver(Gone(vm_id))
        reopen, self._reopen = self._reopen, set()
        for vm_id, domain in domains.items():
            domain_id = domain.ID()
            if self._running.get(vm_id) == domain_id and vm_id not in reopen:
                continue
            pty = _open_console(connection, domain)
            before = self._running.get(vm_id, self._before.get(vm_id, domain_id))
            self._running[vm_id] = domain_id
            if pty < 0:
                self._reopen.add(vm_id)
            self._deliver(Started(vm_id, domain_id, pty, rebooted=before != domain_id))
        self._before.clear()


def _open_console(connection: Any, domain: Any) -> int:
    """The console's pty, -1 if there is none now.

    A pty's number is given to somebody else as soon as its master is closed, so what was opened is ours only if the
    domain still runs, with the same id and console, *after* the opening: the controller has held the master throughout.
    """
    pty = -1
    try:
        tty = _tty(domain)
        if not tty:
            return -1
        pty = os.open(tty, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        now = connection.lookupByName(domain.name())
        if stat.S_ISCHR(os.fstat(pty).st_mode) and now.ID() == domain.ID() and _tty(now) == tty:
            return pty
    except (OSError, libvirt.libvirtError):
        pass
    if pty >= 0:
        os.close(pty)
    return -1


def _tty(domain: Any) -> str:
    found = _TTY.search(domain.XMLDesc(0))
    return found.group(1) if found else ""


def _run_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            time.sleep(0.1)
