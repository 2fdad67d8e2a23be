"""A disk is mounted for writing on one host at a time, whatever OpenNebula does without asking a driver.

A lease (`leasefile`) lies beside each image that is open for writing; for a volume or a Ceph image it lies in the VM's
directory. It is taken before the disk is opened and given back when nothing holds the disk any more. The hub refreshes
it (`keeper`), or whoever looks at the VM where no hub runs. It is void

* if it is this host's, of an earlier boot, or of a VM whose journal does not hold it;
* if it is a copy (another inode), made together with a copy of the image;
* if it had no sign of life for `limit_s` by the file server's clock, and has none while we watch for a quarter of that.

Another host's live lease is asked for. A suspended container is ended for that, since all it wrote is in its image; one
that runs is never ended by a request, and then the caller gets a line that says where it runs.
"""

from __future__ import annotations

import contextlib
import enum
import os
import posixpath
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onelxc.errors import StorageError
from onelxc.model import Disk, VmPaths
from onelxc.root import freezer, leasefile, lock, record, validate
from onelxc.root.journal import Entry, Journal
from onelxc.root.leasefile import Draft, Lease, Seen

if TYPE_CHECKING:
    from onelxc.config import HostConfig
    from onelxc.root.work import Work

KIND = "lease"
TRYING = "leasing"
"""The journal's kind of a lease that is being taken, and may be another host's still."""
RUNS, ENDING = "runs", "ending"
"""What a holder answers to another host's request."""
_LOOK_S = 0.5
_MACHINE_ID = "/etc/machine-id"


class State(enum.Enum):
    """What a host finds of a lease that its journal holds."""

    HELD = "held"
    WANTED = "wanted"
    LOST = "lost"
    MISSING = "missing"
    GONE = "gone"
    """Together with its directory."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Place:
    """Where the lease of a disk lies. `with_disk`: whatever copies the lease copies the disk, too."""

    directory: int
    name: str
    path: str
    with_disk: bool


def host_identity() -> str:
    """This host, whatever its boot. Hosts that were copied from one image may share their machine-id."""
    try:
        with open(_MACHINE_ID) as file:
            machine = file.read().strip()[:64]
    except OSError:
        machine = ""
    return f"{machine}@{socket.gethostname()[:64]}"


# taking and giving back


def take(work: Work, disk: Disk) -> None:
    """Make sure that nobody else has `disk` open for writing, and that nobody gets it until it is given back."""
    with _place(work, disk) as place:
        token = secrets.token_hex(8)
        for entry in held(work.journal):
            if entry.what["path"] != place.path:
                continue
            if entry.what["disk"] != disk.disk_id:
                raise StorageError(
                    f"Cannot use {disk.path}: it is the same image as disk {entry.what['disk']} of this VM"
                )
            own = str(entry.what["token"])
            if _state(leasefile.refresh(place.directory, place.name, own), own) in (State.HELD, State.WANTED):
                return
            work.journal.gave_back(entry.number)
        trying = work.journal.take(TRYING, path=place.path, token=token, disk=disk.disk_id)
        lease = _lease(work.vm_id, disk.disk_id, token, work.config)
        try:
            with Draft(place.directory, place.name, lease) as draft:
                _Taking(work, disk, place, draft, lease).run()
                taken = draft.now()
        except OSError as error:
            raise StorageError(f"Cannot write the lease {place.path}: {error.strerror}") from error
        work.journal.take(KIND, path=place.path, token=token, disk=disk.disk_id, at=taken)
        work.journal.gave_back(trying)


def _lease(vm_id: int, disk_id: int, token: str, config: HostConfig) -> Lease:
    hostname = socket.gethostname()[:64]
    return Lease(host_identity(), hostname, record.boot_id(), vm_id, disk_id, token, config.lease_timeout_s)


def give_back(work: Work, what: dict[str, Any]) -> None:
    """Remove a lease of ours. Where that cannot be done (a datastore that is away, or read-only) it goes by its age."""
    try:
        with _directory(work, str(what["path"])) as directory:
            name, token = posixpath.basename(str(what["path"])), str(what["token"])
            leasefile.remove(directory, name, token)
            seen = leasefile.read(directory, name)
            if seen is not None and seen.note.get("by") == token:
                leasefile.write_note(directory, name, {}, sign_of_life=False)
    except (OSError, StorageError) as error:
        work.log(f"the lease {what['path']} stays: {error}")


@contextlib.contextmanager
def _place(work: Work, disk: Disk) -> Iterator[Place]:
    """Beside the image itself, links resolved; beside the link where that leads to a device, or there is no file."""
    path = disk.path if disk.path.startswith("/") else disk.beside
    with_disk = False
    if disk.path.startswith("/"):
        with validate.find(disk.path, work.config) as found:
            if found.directory >= 0:
                path, with_disk = found.real, True
    directory = validate.find_directory(posixpath.dirname(path), work.config)
    try:
        name = leasefile.name_for(posixpath.basename(path))
        yield Place(directory, name, posixpath.join(posixpath.dirname(path), name), with_disk)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _directory(work: Work, path: str) -> Iterator[int]:
    directory = _find_directory(work.vm_id, path, work.config)
    try:
        yield directory
    finally:
        os.close(directory)


def _find_directory(vm_id: int, path: str, config: HostConfig) -> int:
    """The directory of a lease, or where it was moved to, with an image that a running container has open. The kernel
    knows where that is. A suspended one goes by OpenNebula's word that it is elsewhere.
    """
    try:
        return validate.find_directory(posixpath.dirname(path), config)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError) or is_suspended(vm_id):
            raise
        from onelxc.root import holders, loops

        images = map(loops.backing_path, holders.loops_below(VmPaths(vm_id).mounts))
        name = posixpath.basename(path)
        moved = next((one for one in images if leasefile.name_for(posixpath.basename(one)) == name), None)
        if moved is None:
            raise
        return validate.find_directory(posixpath.dirname(moved), config)


class _Taking:
    """One lease being taken: at once, or after its holder has let go or shown no life for long enough."""

    def __init__(self, work: Work, disk: Disk, place: Place, draft: Draft, lease: Lease) -> None:
        self._work = work
        self._disk = disk
        self._place = place
        self._draft = draft
        self._lease = lease
        self._watched: Seen | None = None
        self._began = 0.0

    def run(self) -> None:
        place = self._place
        while not self._draft.publish():
            seen = leasefile.read(place.directory, place.name)
            if seen is None:
                continue
            if not self._is_void(seen):
                time.sleep(_LOOK_S)
                continue
            aside = f"{place.name}.{self._lease.token}.old"
            leasefile.displace(place.directory, place.name, leasefile.token_of(seen), aside)
        if self._watched is not None:
            # others may have watched the same lease, and displace what they take for it
            time.sleep(2 * _LOOK_S)
            now = leasefile.read(place.directory, place.name)
            if now is None or leasefile.token_of(now) != self._lease.token:
                raise self._error("another host takes it just now")

    def _is_void(self, seen: Seen) -> bool:
        """Whether nobody has the disk by this lease. Raises if somebody goes on having it."""
        lease = seen.lease
        if lease is not None and lease.host == self._lease.host:
            if lease.boot != self._lease.boot or lease.vm_id == self._work.vm_id:
                return True
            if not _holds(lease):
                return True
            # OpenNebula gives no image away that a VM of its own has
            if is_suspended(lease.vm_id) or _is_being_ended(lease.vm_id):
                return self._watch(seen)
            raise self._error(f"VM {lease.vm_id} of this host has it as its disk {lease.disk_id}, for writing")
        if seen.is_copy and self._place.with_disk:
            return True
        return self._watch(seen)

    def _watch(self, seen: Seen) -> bool:
        """Ask its holder, and see whether there is one."""
        now = time.monotonic()
        limit = max(self._work.config.lease_timeout_s, seen.lease.limit_s if seen.lease else 0.0)
        who = f"host {seen.lease.hostname} (VM {seen.lease.vm_id})" if seen.lease else "an unknown host"
        if self._watched is None or leasefile.token_of(self._watched) != leasefile.token_of(seen):
            self._watched, self._began = seen, now
            self._work.log(f"asking {who} to let go of {self._disk.path}")
            if not seen.is_copy:
                self._ask()
            return False
        if seen.note.get("to") == self._lease.token and seen.note.get("answer") == RUNS:
            raise self._error(f"it runs on {who}; power it off there")
        alive = seen.refreshed != self._watched.refreshed
        watched_s = now - self._began
        ending = seen.note.get("answer") == ENDING
        if alive and watched_s > limit / 2 and not ending:
            raise self._error(f"{who} has it and does not let go; end its container there")
        age = self._draft.now() - (seen.arrived if seen.is_copy else seen.refreshed)
        if not alive and age < 0 and watched_s >= limit:
            age = watched_s  # the server's clock was set back since
        if age >= limit and not alive and watched_s >= (0 if seen.is_copy else limit / 4):
            self._work.log(f"{who} has given no sign of life for {age:.0f} s: taking {self._disk.path} over")
            return True
        if watched_s > 2 * limit:
            raise self._error(f"{who} has it and does not let go; end its container there")
        return False

    def _ask(self) -> None:
        note = {"by": self._lease.token, "host": self._lease.hostname}
        with contextlib.suppress(OSError):
            leasefile.write_note(self._place.directory, self._place.name, note, sign_of_life=False)

    def _error(self, what: str) -> StorageError:
        return StorageError(f"Cannot use {self._disk.path}: {what}")


def _holds(lease: Lease) -> bool:
    """Whether another VM of this host, in this boot, has this lease in its journal."""
    entries = Journal(VmPaths(lease.vm_id).journal, KIND).held()
    return any(entry.kind in (KIND, TRYING) and entry.what["token"] == lease.token for entry in entries)


# keeping


def held(journal: Journal) -> list[Entry]:
    """The leases of a VM."""
    return of(journal.held())


def of(entries: Iterable[Entry]) -> list[Entry]:
    """The leases among the entries of a journal."""
    return [entry for entry in entries if entry.kind == KIND]


def keep(vm_id: int, entry: Entry, config: HostConfig) -> tuple[State, float]:
    """Refresh a lease of ours; how it is, and when it was refreshed before. For those who hold no VM's lock, too."""
    path, token = str(entry.what["path"]), str(entry.what["token"])
    try:
        directory = _find_directory(vm_id, path, config)
    except StorageError as error:
        return (State.GONE if isinstance(error.__cause__, FileNotFoundError) else State.UNKNOWN), 0.0
    try:
        seen = leasefile.refresh(directory, posixpath.basename(path), token)
        return _state(seen, token), seen.refreshed if seen else 0.0
    except OSError:
        return State.UNKNOWN, 0.0
    finally:
        os.close(directory)


def _state(seen: Seen | None, token: str) -> State:
    if seen is None or seen.lease is None:  # what somebody has put there, but no other host
        return State.MISSING
    if leasefile.token_of(seen) != token:
        return State.LOST
    return State.WANTED if "by" in seen.note else State.HELD


def state(vm_id: int, entries: Iterable[Entry], config: HostConfig) -> State:
    """The VM's leases, refreshed; the worst of what is found.

    A suspended container whose lease has gone has lost its disks. Of one that runs that is not certain: see `keeper`.
    """
    found = {keep(vm_id, entry, config)[0] for entry in of(entries)}
    return worst(found, suspended=is_suspended(vm_id))


def worst(found: set[State], *, suspended: bool) -> State:
    """What a VM's leases, taken together, say."""
    if State.LOST in found or (suspended and found & {State.MISSING, State.GONE}):
        return State.LOST
    return State.WANTED if State.WANTED in found else State.HELD


def renew(vm_id: int, entry: Entry, config: HostConfig, refreshed: float) -> State:
    """Write a lease again that is not there any more, unless another host may have had the disk: if it was refreshed
    longer ago than it lasts, by the file server's clock.
    """
    path, token = str(entry.what["path"]), str(entry.what["token"])
    directory = validate.find_directory(posixpath.dirname(path), config)
    try:
        lease = _lease(vm_id, int(entry.what["disk"]), token, config)
        with Draft(directory, posixpath.basename(path), lease) as draft:
            if draft.now() - refreshed >= config.lease_timeout_s:
                return State.LOST
            seen = leasefile.read(directory, posixpath.basename(path))
            if seen is not None and seen.lease is None:
                aside = f"{posixpath.basename(path)}.{token}.old"
                leasefile.displace(directory, posixpath.basename(path), leasefile.token_of(seen), aside)
            return State.HELD if draft.publish() else State.LOST
    finally:
        os.close(directory)


def _is_being_ended(vm_id: int) -> bool:
    """Whether somebody sees to a VM that was suspended: for its end it is thawed."""
    return record.paused(vm_id) == freezer.SUSPEND and lock.holder(vm_id) is not None


def is_suspended(vm_id: int) -> bool:
    """Whether the VM's container stands still because its user suspended it."""
    return record.paused(vm_id) == freezer.SUSPEND and bool(freezer.reason(vm_id))


def is_lost(vm_id: int, entries: Iterable[Entry], config: HostConfig) -> bool:
    """Whether another host may have had the disks of this VM since it got them."""
    return state(vm_id, entries, config) is State.LOST


def answer(work: Work, text: str) -> None:
    """Tell whoever has asked for the VM's disks."""
    for entry in held(work.journal):
        with contextlib.suppress(OSError, StorageError), _directory(work, str(entry.what["path"])) as directory:
            name, token = posixpath.basename(str(entry.what["path"])), str(entry.what["token"])
            seen = leasefile.read(directory, name)
            if seen is not None and leasefile.token_of(seen) == token and "by" in seen.note:
                note = {"answer": text, "to": str(seen.note["by"])[:64]}
                leasefile.write_note(directory, name, note, sign_of_life=True)
