"""How are the blocks of an image in a format of its own shown raw? By qemu-storage-daemon: by nbd, else by FUSE.

Each image of a VM has a daemon of its own. It is in the journal before it is started, and ends when nothing is mounted
from the image any more, which flushes the image and lets go of it. By nbd the view is a block device; by FUSE,
where the kernel has no nbd, a file. What the daemon opens is `qcow2`'s to say: descriptors only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Any

from onelxc import command, kernelfile
from onelxc.errors import CommandError, StorageError
from onelxc.root import holders, iocounters, mounts, nbd, orphans
from onelxc.root.journal import Entry
from onelxc.root.qmp import Monitor
from onelxc.root.work import Work

DAEMON = "qemu-storage-daemon"
TOP = "top"
"""The node-name of the image that is to be shown."""
_END_S = 60.0
_MEMORY, _MEMORY_OF_EACH = 1 << 30, 64 << 20
"""What the daemon may take (RLIMIT_DATA), and more for each image of a chain, whose tables may be large. 0.2 GiB were
seen at full load, and 64 threads may have stacks of 8 MiB.
"""
_EXEMPT = "import os, sys; os.execvp(sys.argv[1], ['@' + sys.argv[1], *sys.argv[2:]])"
"""systemd-shutdown spares programs whose name begins so (systemd.io/ROOT_STORAGE_DAEMONS)."""
_PATIENCE_S = 120
"""How long a disk waits for its connection while it grows. A helper that was killed is undone by the next probe."""


def place_of(work: Work, image: os.stat_result) -> str:
    """Where the raw view of an image is shown as a file; an nbd device has this path as its name."""
    return os.path.join(work.paths.mounts, f"qcow2.{image.st_dev:x}.{image.st_ino:x}")


def device_of(work: Work, image: os.stat_result) -> str | None:
    """The nbd device that shows this image, if one does."""
    return next(iter(nbd.devices(place_of(work, image))), None)


def show(
    work: Work, image: os.stat_result, nodes: Sequence[str], fds: Sequence[int], *, read_only: bool, doing: str
) -> int:
    """A descriptor of the raw view of `image`, which the daemon gets as `nodes`, with the descriptors in them.

    Of a block device, or of a file, which may be made larger. The VM's release ends what makes it. `doing` is what an
    error says could not be done.
    """
    place = place_of(work, image)
    socket = _socket(work, place)
    work.journal.take("qcow2", path=place, dev=image.st_dev, ino=image.st_ino)
    memory = _MEMORY + _MEMORY_OF_EACH * len(fds)
    argv = [DAEMON]
    for node in nodes:
        argv += ["--blockdev", node]
    argv += ["--chardev", f"socket,id=monitor,path={socket}.qmp,server=on,wait=off", "--monitor", "monitor"]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={socket}.nbd"]
    try:
        for left in (f"{socket}.qmp", f"{socket}.nbd"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
        argv += ["--daemonize", "--pidfile", _pid_file(place)]
        limits = ["prlimit", f"--data={memory}", "--core=0"]
        command.run([*limits, *_outliving(), *argv], pass_fds=tuple(fds), verb=doing)
        with Monitor(f"{socket}.qmp") as daemon:
            shown = None
            if nbd.available():
                _export(daemon, writable=not read_only)
                shown = nbd.connect(f"{socket}.nbd", place)
                if shown is None:
                    _unexport(daemon)
            if shown is None:
                shown = place
                with open(place, "wb"):
                    pass
                writable = {"writable": True, "growable": True} if not read_only else {}
                daemon.execute("block-export-add", type="fuse", id="disk", node_name=TOP, mountpoint=place, **writable)
            else:
                iocounters.note(shown)
        return os.open(shown, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except CommandError as error:
        raise StorageError(str(error)) from error


def enlarge(work: Work, device: str, size: int) -> None:
    """Make the image behind an nbd device as large as `size` bytes. Requests wait meanwhile; none may be under way.

    QEMU does not resize what it shows by NBD, so the connection is ended and made again.
    """
    place = nbd.name_of(device)
    taken = work.journal.take("nbd", path=place)
    try:
        with Monitor(f"{_socket(work, place)}.qmp") as daemon, nbd.LinkWatch() as link:
            nbd.be_patient(device, _PATIENCE_S)
            nbd.wait_until_idle(device)
            _unexport(daemon)
            link.wait(device)
            daemon.execute("block_resize", node_name=TOP, size=size)
    finally:
        reconnect(work, {"path": place})
        work.journal.gave_back(taken)


def reconnect(work: Work, what: dict[str, Any]) -> None:
    """The journal's `nbd`: a device that was made larger has its connection again, whatever became of that."""
    place = str(what["path"])
    if not _pids(place):
        return
    with Monitor(f"{_socket(work, place)}.qmp") as daemon:
        for device in nbd.devices(place):
            if not daemon.execute("query-block-exports"):
                _export(daemon, writable=True)
            nbd.reconnect(device, f"{_socket(work, place)}.nbd")
            nbd.be_patient(device, 0)


def give_back(work: Work, what: dict[str, Any]) -> None:
    """End the daemon and remove what it showed. While something is still mounted from it, that is an error."""
    place = str(what["path"])
    for device in nbd.devices(place):
        holders.wait_until_free(work, set(), [device])
        nbd.disconnect(device)
    mounts.unmount(place)
    deadline = time.monotonic() + _END_S
    ending: set[int] = set()
    while True:
        running = _pids(place)
        # one that ends has no command line any more, but the image still
        ending = {pid for pid in ending.union(running) if not orphans.is_dead(pid)}
        if not ending:
            break
        if time.monotonic() > deadline:
            raise StorageError(f"Cannot let go of {place}: {DAEMON} ({min(ending)}) does not end")
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.01)
    socket = _socket(work, place)
    for path in (place, _pid_file(place), f"{socket}.qmp", f"{socket}.nbd"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def kill(entries: Iterable[Entry]) -> None:
    """End the daemons of these images (what a VM's journal holds) without letting them write what they keep back."""
    for entry in entries:
        if entry.kind == "qcow2":
            for pid in _pids(str(entry.what.get("path"))):
                orphans.kill(pid)
    fail_lost(entries)


def fail_lost(entries: Iterable[Entry]) -> bool:
    """Whether one of these images (what a VM's journal holds) has lost its daemon. Requests that wait for its answer
    fail then: who waits for a disk cannot be ended.
    """
    lost = False
    for entry in entries:
        place = str(entry.what.get("path"))
        if entry.kind == "qcow2" and not _pids(place):
            found = nbd.devices(place)
            lost = lost or bool(found) or mounts.is_mounted(place)
            for device in filter(nbd.is_busy, found):
                with contextlib.suppress(StorageError):
                    nbd.disconnect(device)
    return lost


def _outliving() -> list[str]:
    """What a daemon's command line begins with where systemd is: it belongs to no login (the action's ends, and logind
    may kill what it leaves), and goes last when the host goes down, after what is mounted from it.
    """
    if not os.path.isdir("/run/systemd/system"):
        return []
    scope = ["systemd-run", "--quiet", "--scope", "--collect", "--property=DefaultDependencies=no"]
    return [*scope, "/usr/bin/python3", "-I", "-c", _EXEMPT]


def _export(daemon: Monitor, *, writable: bool) -> None:
    daemon.execute("block-export-add", type="nbd", id="disk", node_name=TOP, name=nbd.EXPORT, writable=writable)


def _unexport(daemon: Monitor) -> None:
    daemon.execute("block-export-del", id="disk", mode="hard")
    deadline = time.monotonic() + _END_S
    while daemon.execute("query-block-exports"):
        if time.monotonic() > deadline:
            raise StorageError(f"Cannot take an image from those who use it: {DAEMON} does not end its export")
        time.sleep(0.01)


def _socket(work: Work, place: str) -> str:
    """What the daemon's sockets begin with: in the VM's state directory, which is root's alone."""
    return os.path.join(work.paths.state, os.path.basename(place))


def _pid_file(place: str) -> str:
    return f"{place}.pid"


def _pids(place: str) -> list[int]:
    """What runs to show it, from the first moment of its start on, by the command line."""
    try:
        with open(_pid_file(place), encoding="ascii") as file:
            pid = int(file.read())
        if _is_for(pid, place):
            return [pid]
    except (OSError, ValueError):
        pass
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_for(int(name), place)]


def _is_for(pid: int, place: str) -> bool:
    if not kernelfile.is_the_hosts(pid):
        return False
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return os.fsencode(_pid_file(place)) in line.read().split(b"\0")
    except OSError:
        return False
