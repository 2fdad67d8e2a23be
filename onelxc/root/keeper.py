"""Gives the leases of this host's VMs their signs of life, and notices when another host has taken or wants one.

A thread of the hub. Each VM is looked at in a thread of its own, since a file server that does not answer holds up
whoever asks it. What is to be done about a VM is the hub's to start, under the VM's lock (`fence`); nothing else is
changed here, except for a lease that somebody removed by hand while no other host can have taken it.

Each turn writes down when it was (`names.HUB_BEAT`). A hub that was killed, stopped or hangs writes nothing, and then
the status probe has the leases seen to.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from onelxc import config, names, samples
from onelxc.errors import ConfigurationError, OneLxcError
from onelxc.model import VmPaths
from onelxc.root import leases, record
from onelxc.root.consoles import complain
from onelxc.root.journal import Entry, Journal
from onelxc.root.leases import State

SUSPENDED_S = 2.0
"""How often the leases of suspended containers are looked at: another host may wait for them."""


class Keeper(threading.Thread):
    """Calls `attend` with the id of each VM that has to be seen to."""

    def __init__(self, attend: Callable[[int], None]) -> None:
        super().__init__(name="leases", daemon=True)
        self._attend = attend
        self._busy: set[int] = set()
        self._due: dict[int, float] = {}
        self._policy = config.HostConfig()
        self._alive: dict[str, float] = {}
        """Token of a lease: a time at which it was ours for certain, by the file server's clock."""

    @property
    def at_work(self) -> bool:
        """Whether there are VMs whose leases have to be kept: such as are being deployed as well."""
        return bool(self._due)

    def run(self) -> None:
        told = ""
        while True:
            try:
                self._turn()
                _beat()
                told = ""
            except (OneLxcError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    complain(f"leases: {told}")
            time.sleep(SUSPENDED_S)

    def _read_policy(self) -> config.HostConfig:
        """A configuration that is wrong stops deploys; those who run keep their disks."""
        try:
            return config.host()
        except ConfigurationError:
            return self._policy

    def _turn(self) -> None:
        policy = self._policy = self._read_policy()
        now = samples.now_s()
        running = set(record.vm_ids())
        for gone in set(self._due) - running:
            del self._due[gone]
        for vm_id in running - self._busy:
            if now >= self._due.get(vm_id, 0.0) or leases.is_suspended(vm_id):
                self._due[vm_id] = now + policy.lease_timeout_s / 8
                self._busy.add(vm_id)
                threading.Thread(target=self._look, args=(vm_id, policy), daemon=True).start()

    def _look(self, vm_id: int, policy: config.HostConfig) -> None:
        try:
            entries = leases.held(Journal(VmPaths(vm_id).journal, "keep"))
            states = {self._keep(vm_id, entry, policy) for entry in entries}
            found = leases.worst(states, suspended=leases.is_suspended(vm_id))
            # without a record it is being deployed, under the lock that would have to be waited for
            if found in (State.LOST, State.WANTED) and os.path.exists(VmPaths(vm_id).record):
                self._attend(vm_id)
        except (OneLxcError, OSError) as error:
            complain(f"VM {vm_id}: lease: {error}")
        finally:
            self._busy.discard(vm_id)

    def _keep(self, vm_id: int, entry: Entry, policy: config.HostConfig) -> State:
        token = str(entry.what["token"])
        found, refreshed = leases.keep(vm_id, entry, policy)
        if found in (State.HELD, State.WANTED):
            self._alive[token] = refreshed
        if found is State.MISSING and not leases.is_suspended(vm_id):
            return leases.renew(vm_id, entry, policy, self._alive.get(token, float(entry.what.get("at", 0.0))))
        return found


def _beat() -> None:
    fd = os.open(names.HUB_BEAT, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        os.fchmod(fd, 0o644)
        os.pwrite(fd, b"%d\n" % samples.now_s(), 0)
    finally:
        os.close(fd)
