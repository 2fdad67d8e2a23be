"""What does the one long-lived process of the host do? The daemon `onelxc-hub`.

It joins three things that know nothing of each other: `events` (libvirt's word on what runs), `consoles` (ptys, logs,
attached people) and `keeper` (whose disks are leased). After a reboot from inside it has `onelxc-root refresh one-N`
put back what libvirt does not, and `onelxc-root attend one-N` see to a VM whose disks another host has or wants:
processes of their own that take the VM's lock, so that the daemon never waits. It decides nothing about a VM's life.

Killed, it begins anew where it was: the containers' output waits in their ptys meanwhile, and `runs` tells which of
them have not got back everything since their reboot. That is tried until it is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from onelxc import command, config, errors, jsontext
from onelxc.errors import ConfigurationError, HelperError
from onelxc.names import RUN, deploy_id
from onelxc.root import consolelog, durable, lock, runs
from onelxc.root.consoles import Consoles, complain
from onelxc.root.events import Gone, Started, Watcher
from onelxc.root.hub import LOG, PID, START, make_run_directory, private, program
from onelxc.root.keeper import Keeper

SEEN = os.path.join(RUN, "hub.seen")
LOG_LIMIT = 256 * 1024
IDLE_S = 60.0
EXPIRE_EACH_S = 600.0
RETRY_S, RETRY_MAX_S = 2.0, 60.0
"""After how long a refresh that failed is tried again: twice as long each time."""
WORKERS_AT_ONCE = 8
"""So many that those of containers which make theirs wait hold up nobody else's."""


class Hub:
    """The daemon."""

    def __init__(self, held: int, idle_s: float, log_limit: int) -> None:
        """`held` is the locked pid file."""
        self._held = held
        self._idle_s = idle_s
        self._events: queue.SimpleQueue[Started | Gone] = queue.SimpleQueue()
        self._running = _read_seen()
        self._watcher = Watcher(self._deliver, self._running)
        self._consoles = Consoles(self._watcher.again, log_limit)
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._keeper = Keeper(self._wanted.put)
        self._waiting: deque[tuple[str, int]] = deque()
        self._working: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._failed: dict[int, tuple[int, float]] = {}
        """How often the refresh of a VM has failed, and when it is tried again."""
        self._due_at = 0.0
        self._stopped = False
        self._ready = False
        self._busy_at = time.monotonic()
        self._expired_at = 0.0

    def _deliver(self, event: Started | Gone) -> None:
        self._events.put(event)
        self._consoles.wake()

    def stop(self) -> None:
        """End at the next turn."""
        self._stopped = True

    def run(self) -> None:
        """Until stopped, or idle for as long as it was told."""
        self._running = {}
        self._watcher.start()
        self._keeper.start()
        try:
            while not self._stopped:
                self._consoles.turn(0.5)
                self._take_events()
                self._work()
                self._housekeeping()
        finally:
            self._consoles.close()

    def _take_events(self) -> None:
        changed = False
        while not self._events.empty():
            event = self._events.get()
            changed = True
            if isinstance(event, Gone):
                self._running.pop(event.vm_id, None)
                self._failed.pop(event.vm_id, None)
                self._consoles.gone(event.vm_id)
                continue
            self._running[event.vm_id] = event.domain_id
            if event.rebooted:
                runs.note_reboot(event.vm_id)
                self._wait("refresh", event.vm_id)
            if event.pty >= 0:
                try:
                    self._consoles.open(event.vm_id, event.pty)
                except OSError as error:
                    complain(f"{deploy_id(event.vm_id)}: console: {error}")
        if changed:
            _write_seen(self._running)

    def _wait(self, verb: str, vm_id: int) -> None:
        if (verb, vm_id) not in self._waiting:
            self._waiting.append((verb, vm_id))

    def _work(self) -> None:
        while not self._wanted.empty():
            self._wait("attend", self._wanted.get())
        for (verb, vm_id), process in list(self._working.items()):
            if process.poll() is not None:
                del self._working[verb, vm_id]
                if process.returncode:
                    complain(f"{deploy_id(vm_id)}: {verb} ended with {process.returncode}")
                if verb == "refresh":
                    self._count(vm_id, failed=bool(process.returncode))
        self._look_for_due()
        while self._waiting and len(self._working) < WORKERS_AT_ONCE:
            ready = next((one for one in self._waiting if one not in self._working), None)
            if ready is None:
                return
            self._waiting.remove(ready)
            verb, vm_id = ready
            try:
                self._working[ready] = subprocess.Popen(
                    [sys.executable, "-I", program("onelxc-root"), verb, deploy_id(vm_id)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=dict(command.ENVIRONMENT),
                )
            except (OSError, HelperError) as error:
                complain(f"{deploy_id(vm_id)}: {verb}: {error}")
                if verb == "refresh":
                    self._count(vm_id, failed=True)

    def _look_for_due(self) -> None:
        """Every refresh that is due and not under way, but for one that has just failed."""
        now = time.monotonic()
        if now < self._due_at:
            return
        self._due_at = now + RETRY_S
        for vm_id, controller in self._running.items():
            under_way = ("refresh", vm_id) in self._working or now < self._failed.get(vm_id, (0, 0.0))[1]
            if not under_way and (vm_id in self._failed or runs.due(vm_id, controller)):
                self._wait("refresh", vm_id)

    def _count(self, vm_id: int, *, failed: bool) -> None:
        times = self._failed.pop(vm_id, (0, 0.0))[0] + 1
        if failed:
            self._failed[vm_id] = times, time.monotonic() + min(RETRY_MAX_S, RETRY_S * 2**times)

    def _housekeeping(self) -> None:
        now = time.monotonic()
        if not self._ready and self._watcher.looked.is_set() and self._events.empty():
            self._ready = True
            _write_down(self._held, b"ready\n")
        if now - self._expired_at > EXPIRE_EACH_S:
            self._expired_at = now
            consolelog.expire()
        _bound_own_log()
        if not lock.is_at(self._held, PID):
            self._stopped = True  # somebody has cleared /run; the next hub does not know of this one
        if self._is_busy():
            self._busy_at = now
        elif now - self._busy_at > self._idle_s and _may_end(self._idle_s):
            self._stopped = True

    def _is_busy(self) -> bool:
        if self._running or len(self._consoles) or self._keeper.at_work:
            return True
        return bool(self._working or self._waiting or not self._ready)


def _may_end(idle_s: float) -> bool:
    """Whether nobody has asked for the hub lately; then, under the starters' lock, the pid file is gone too."""
    try:
        with private(START) as start:
            fcntl.flock(start, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if abs(time.time() - os.stat(PID).st_mtime) < idle_s:
                return False
            os.unlink(PID)
            return True
    except OSError:
        return False


def _read_seen() -> dict[int, int]:
    try:
        with open(SEEN) as seen:
            return {int(vm_id): int(domain_id) for vm_id, domain_id in jsontext.loads(seen.read()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_seen(running: dict[int, int]) -> None:
    try:
        with open(SEEN + ".new", "w") as seen:
            json.dump(running, seen)
        os.replace(SEEN + ".new", SEEN)
    except OSError as error:
        complain(f"{SEEN}: {error.strerror}")


def _bound_own_log() -> None:
    try:
        if os.fstat(2).st_size > LOG_LIMIT:
            os.ftruncate(2, 0)
    except OSError:
        pass  # systemd's journal, which bounds itself.


def _log_limit() -> int:
    """Bytes of one console log. A configuration that is wrong stops deploys; those who run go on."""
    try:
        return config.host().console_log_kib * 1024
    except ConfigurationError as error:
        complain(str(error))
        return consolelog.LIMIT


def _open_log() -> None:
    """stderr goes to our own log; where that cannot be, nowhere."""
    try:
        os.makedirs(os.path.dirname(LOG), 0o700, exist_ok=True)
        log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        os.dup2(log, 2)
        os.close(log)
    except OSError:
        pass


def _write_down(held: int, text: bytes) -> None:
    """A line of the pid file. Containers need the hub more than others need what is written there."""
    try:
        durable.write_all(held, text)
    except OSError as error:
        complain(f"{PID}: {error.strerror}")


def _lock(held: int) -> bool:
    """Lock the pid file; those who only look whether it is locked hold it for a moment."""
    for _ in range(50):
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
    return False


def main(arguments: Sequence[str]) -> int:
    """The program onelxc-hub [--idle-s SECONDS]. 0 also where another one runs already."""
    try:
        idle_s = float(arguments[1]) if arguments[:1] == ["--idle-s"] else IDLE_S
    except (IndexError, ValueError):
        complain("onelxc-hub: --idle-s needs a number of seconds")
        return 1
    os.umask(0o077)
    make_run_directory()
    held = os.open(PID, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not _lock(held):
        return 0
    os.ftruncate(held, 0)
    _write_down(held, f"{os.getpid()}\n".encode())
    if os.path.realpath("/proc/self/fd/2") == os.devnull:
        _open_log()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    try:
        hub = Hub(held, idle_s, _log_limit())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: hub.stop())
        hub.run()
    except Exception as error:  # whoever needs it starts it anew, and its log says why
        complain(errors.told(error))
        return 1
    return 0
