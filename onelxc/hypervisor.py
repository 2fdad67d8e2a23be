"""What does libvirt know of a container, and how is it told to start, stop and change one?

The only importer of libvirt: what leaves this module are plain values and the errors of `onelxc.errors`, told apart by
libvirt's code. Knows domains by name and XML, nothing of templates, disks or mounts. Used by the actions as oneadmin
and by the root helper alike.

libvirt's LXC driver is imprecise about the end of a container; what is worked around here, and why:

* `create` returns before init has been executed and says nothing when init dies at once: `Domain.look_again`.
* A domain that ended while libvirtd was away stays as a "shut off" transient one and blocks its name. `destroy` on it
  raises OPERATION_INVALID *and* removes it.
* `destroy` sends SIGTERM first, which most inits ignore, and takes 1.8 s; SIGKILL to init takes 0.2 s.
* A container that libvirt paused on cgroup v1 comes back as "running" after libvirtd restarts, frozen still; pausing it
  once more brings both to agree. On v2 libvirt cannot pause at all and its `destroy` ends a frozen container.
* One start in twenty of 9.0.0 leaves libvirt without a hold on the container: the controller's first message ("init has
  this pid") comes before the code that takes it, and the connection is dropped (virLXCMonitorNew registers the client
  with the event loop before its program). Such a container runs, but its end is never noticed and its reboot is an
  end: `Domain.in_hand`.
* `shutdown` and `reboot` report success and do nothing for an init without initctl, and its "signal" mode makes
  busybox reboot; by initctl it opens a path of the tenant's as the host's root. So neither is called, and each init is
  asked in its own language.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt

from onelxc.errors import HypervisorError, LibvirtGoneError, NoSuchDomainError
from onelxc.model import Init

URI = "lxc:///"

ANSWER_S = 30.0
"""How long libvirt's daemon may take to answer a new connection."""
KEEPALIVE_S, KEEPALIVES = 6, 5
"""A daemon that leaves so many messages in these intervals without any answer does not work any more."""
GONE_LIMIT_S = 30.0
EXEC_LIMIT_S = 15.0
IN_HAND_S = 1.0
LOOK_AGAIN_S = 0.4
"""How long a container must have lived, once init was executed, to count as started."""
INIT_GONE_S = 2.0
"""How long a controller may be there without a process 1: a reboot takes less, and some that failed to execute their
init go on like that for ever."""

_T = TypeVar("_T")
_loop_of = 0

# The client library prints every error on stderr by itself, and OpenNebula shows stderr to its user.
libvirt.registerErrorHandler(lambda _context, _error: None, None)


class State(enum.Enum):
    """A domain's state as libvirt tells it; a frozen one may be told as running (see above)."""

    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


_STATES = {
    libvirt.VIR_DOMAIN_NOSTATE: State.RUNNING,
    libvirt.VIR_DOMAIN_RUNNING: State.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
    # LXC never says SHUTDOWN or PMSUSPENDED; CRASHED and SHUTOFF are the zombies of a libvirtd that was away.
    libvirt.VIR_DOMAIN_SHUTDOWN: State.RUNNING,
    libvirt.VIR_DOMAIN_SHUTOFF: State.ENDED,
    libvirt.VIR_DOMAIN_CRASHED: State.ENDED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: State.PAUSED,
}

_GONE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)

# What an init wants to be sent, by number: the container's C library, not ours, says what SIGRTMIN+4 is, and that is 38
# on every Linux that systemd runs on. sysvinit hears no signal: see `root.telinit`.
STOP_SIGNALS = {
    Init.SYSTEMD: 38,
    Init.BUSYBOX: int(signal.SIGUSR2),
    Init.OPENRC: int(signal.SIGTERM),
    Init.OTHER: int(signal.SIGTERM),
}
REBOOT_SIGNALS = {
    Init.SYSTEMD: 39,
    Init.BUSYBOX: int(signal.SIGTERM),
    Init.OPENRC: int(signal.SIGINT),
}


class Hypervisor:
    """One connection to the host's libvirt."""

    def __init__(self, uri: str = URI) -> None:
        self._connection = _open(uri)

    def close(self) -> None:
        try:
            self._connection.close()
        except libvirt.libvirtError:
            pass

    def __enter__(self) -> Hypervisor:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def find(self, name: str) -> Domain | None:
        """The domain of that name, running or a zombie, None if there is none."""
        try:
            return Domain(self._connection.lookupByName(name), name)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise _error(f"Cannot look for {name}", error) from None

    def domain(self, name: str) -> Domain:
        """The domain of that name; NoSuchDomainError if there is none."""
        domain = self.find(name)
        if domain is None:
            raise NoSuchDomainError(f"Cannot find {name}: no such container on this host", code=42)
        return domain

    def domains(self) -> tuple[Domain, ...]:
        """All the domains, ours and others', zombies too."""
        found = _call("Cannot list the containers", lambda: self._connection.listAllDomains(0))
        return tuple(Domain(handle, handle.name()) for handle in found)

    def create(self, xml: str, name: str) -> Domain:
        """Start a transient domain. With schema validation, since libvirt silently drops what it does not know."""
        flags = libvirt.VIR_DOMAIN_START_VALIDATE
        return Domain(_call(f"Cannot start {name}", lambda: self._connection.createXML(xml, flags)), name)


class Domain:
    """One container as libvirt knows it. A handle may outlive its domain; each method says what happens then."""

    def __init__(self, handle: Any, name: str) -> None:
        self._handle = handle
        self.name = name

    def state(self) -> State:
        """ENDED when it is gone altogether, too."""
        try:
            return _STATES.get(self._handle.state()[0], State.RUNNING)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return State.ENDED
            raise _error(f"Cannot ask the state of {self.name}", error) from None

    def gone(self) -> bool:
        """Whether libvirt has forgotten it: only then its devices and its cgroup are gone too."""
        try:
            self._handle.state()
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return True
            raise _error(f"Cannot ask the state of {self.name}", error) from None
        return False

    def persistent(self) -> bool:
        """Ours never are."""
        return bool(_call(f"Cannot ask about {self.name}", self._handle.isPersistent))

    def uuid(self) -> str:
        return str(_call(f"Cannot ask about {self.name}", self._handle.UUIDString))

    def controller_pid(self) -> int | None:
        """The host's pid of its libvirt_lxc, which is the domain's id; changes at a reboot. None if it has ended."""
        try:
            # An id is cached in the handle, so that a restart would go unseen: look anew.
            number = self._handle.connect().lookupByUUID(self._handle.UUID()).ID()
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise _error(f"Cannot ask the process of {self.name}", error) from None
        return int(number) if number > 0 else None

    def init_pid(self) -> int | None:
        """The host's pid of the container's PID 1, None if it has ended."""
        controller = self.controller_pid()
        return init_of(controller) if controller is not None else None

    def alive(self) -> bool:
        """Whether its PID 1 runs and is what the image brought, no longer libvirt's own process about to execute it."""
        controller = self.controller_pid()
        if controller is None:
            return False
        init = init_of(controller)
        if init is None:
            return False
        return _lives(init) and _name(init) != _name(controller)

    def look_again(self) -> bool:
        """After `create`: wait until init was executed, then see that it lives on. False if it does not.

        A container that reboots meanwhile lives.
        """
        now = time.monotonic()
        deadline, executed, seen = now + EXEC_LIMIT_S, None, now
        while now < deadline:
            if self.state() is State.ENDED:
                return False
            init = self.init_pid()
            now = time.monotonic()
            if init is not None and _lives(init):
                seen = now
            elif now - seen > INIT_GONE_S:
                return False
            # libvirt needs a moment to notice an end: its word alone, that the domain runs, is not enough
            if init is not None and self.alive():
                executed = now if executed is None else executed
                if now - executed >= LOOK_AGAIN_S:
                    return True
            time.sleep(0.02)
        return False

    def in_hand(self, limit_s: float = IN_HAND_S) -> bool:
        """Whether libvirt will notice its end: it then knows its init's pid, for a container that runs for a moment."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self._handle.sendProcessSignal(1, 0, 0)
                return True
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or self.state() is State.ENDED:
                    return True  # Its end was noticed, or something else is wrong: not for us to tell.
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)

    def xml(self) -> str:
        """As it runs now, live-attached devices included, in the form that `create` takes."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE
        return str(_call(f"Cannot read the description of {self.name}", lambda: self._handle.XMLDesc(flags)))

    def signal(self, number: int) -> None:
        """Send a signal to PID 1. Nothing happens where it has ended."""
        _call_unless_gone(f"Cannot signal {self.name}", lambda: self._handle.sendProcessSignal(1, number, 0))

    def suspend(self) -> None:
        """Freeze by libvirt: cgroup v1 only."""
        _call(f"Cannot suspend {self.name}", self._handle.suspend)

    def resume(self) -> None:
        """Thaw what libvirt froze, also before libvirtd was restarted and forgot it."""
        if self.state() is State.RUNNING:
            _call(f"Cannot resume {self.name}", self._handle.suspend)
        _call(f"Cannot resume {self.name}", self._handle.resume)

    def wait_gone(self, limit_s: float, meanwhile: Callable[[], None] | None = None) -> bool:
        """Wait until libvirt has forgotten it, and with it its devices and cgroup; a zombie counts as ended.

        `meanwhile` is called again and again, and may raise to end the waiting.
        """
        deadline = time.monotonic() + limit_s
        pause = 0.01
        while True:
            if self.state() is State.ENDED:
                self._remove_zombie()
                return True
            if time.monotonic() >= deadline:
                return False
            if meanwhile:
                meanwhile()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def wait_restarted(
        self, controller: int | None, limit_s: float, meanwhile: Callable[[], None] | None = None
    ) -> bool:
        """Wait until it runs under another controller than `controller`: it has rebooted. False if not, or gone."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.state() is State.ENDED:
                return False
            if self.controller_pid() not in (None, controller) and self.alive():
                return True
            if meanwhile:
                meanwhile()
            time.sleep(0.05)
        return False

    def end(self, limit_s: float = GONE_LIMIT_S) -> None:
        """Make an end of it now, whatever state it is in, and wait until it is gone. "Already gone" is success."""
        state = self.state()
        if state is not State.ENDED and self.in_hand(0):
            self.signal(int(signal.SIGKILL))
            if state is State.PAUSED:
                _ignoring_errors(self._handle.resume)
            if self.wait_gone(min(2.0, limit_s)):
                return
            # Frozen, by a libvirtd that has forgotten so since (v1), or in a cgroup (v2, where destroy ends it anyway).
            _ignoring_errors(self._handle.suspend)
            _ignoring_errors(self._handle.resume)
            if self.wait_gone(min(1.0, limit_s)):
                return
        if state is not State.ENDED:
            self._destroy(limit_s)
        if not self.wait_gone(limit_s):
            raise HypervisorError(f"Cannot end {self.name}: it is still there after {limit_s:g} s")

    def _destroy(self, limit_s: float) -> None:
        """`destroy`; once more, while the control group whose tasks libvirt counts goes away as it reads (ENODEV)."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                self._handle.destroy()
                return
            except libvirt.libvirtError as error:
                if error.get_error_code() in _GONE:
                    return
                if error.get_int1() != errno.ENODEV or time.monotonic() >= deadline:
                    raise _error(f"Cannot destroy {self.name}", error) from None
            time.sleep(0.05)

    def _remove_zombie(self) -> None:
        """`destroy` on a transient domain that has ended fails, and removes it."""
        _call_unless_gone(f"Cannot remove what is left of {self.name}", self._handle.destroy)

    def has_interface(self, device: str) -> bool:
        """Whether it has a NIC whose host side is called `device`."""
        return re.search(rf"<target dev='{re.escape(device)}'/>", self.xml()) is not None

    def attach_device(self, xml: str) -> None:
        """Attach to the running container; kept when it reboots."""
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        _call(f"Cannot attach the device to {self.name}", lambda: self._handle.attachDeviceFlags(xml, flags))

    def detach_device(self, xml: str) -> None:
        """Detach from the running container; a device that is not there is an error with code 99."""
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        _call(f"Cannot detach the device from {self.name}", lambda: self._handle.detachDeviceFlags(xml, flags))

    def set_memory(self, *, limit_kib: int, swap_limit_kib: int | None) -> None:
        """Set the memory limits of the running container. As a parameter, which unlike setMemory survives its reboot
        and may exceed what it began with. `swap_limit_kib` is memory and swap together; None leaves it as it is."""
        values = {libvirt.VIR_DOMAIN_MEMORY_HARD_LIMIT: limit_kib}
        if swap_limit_kib is not None:
            values[libvirt.VIR_DOMAIN_MEMORY_SWAP_HARD_LIMIT] = swap_limit_kib
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        _call(f"Cannot set the memory of {self.name}", lambda: self._handle.setMemoryParameters(values, flags))

    def set_cpu(self, *, shares: int, period_us: int, quota_us: int) -> None:
        """Set the CPU's weight and limit of the running container; a quota of -1 is none."""
        values = {
            libvirt.VIR_DOMAIN_SCHEDULER_CPU_SHARES: shares,
            libvirt.VIR_DOMAIN_SCHEDULER_VCPU_PERIOD: period_us,
            libvirt.VIR_DOMAIN_SCHEDULER_VCPU_QUOTA: quota_us,
        }
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        _call(f"Cannot set the CPU of {self.name}", lambda: self._handle.setSchedulerParametersFlags(values, flags))


def _open(uri: str) -> Any:
    """A connection whose calls end when the daemon hangs. LibvirtGoneError where there is none.

    Keepalives tell that, in both directions, for which an event loop has to run. While a connection is made there are
    none yet, so another thread makes it.
    """
    result: list[Any] = []

    def connect() -> None:
        try:
            connection = libvirt.open(uri)
            if uri == URI:
                connection.setKeepAlive(KEEPALIVE_S, KEEPALIVES)
            result.append(connection)
        except libvirt.libvirtError as error:
            result.append(error)

    _start_event_loop()
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not result:
        raise LibvirtGoneError(f"Cannot reach libvirt ({uri}): its daemon does not answer; {_ADVICE}")
    if isinstance(result[0], libvirt.libvirtError):
        error = result[0]
        raise LibvirtGoneError(f"Cannot reach libvirt ({uri}): {_text(error)}; {_ADVICE}", code=error.get_error_code())
    return result[0]


def _start_event_loop() -> None:
    """Once for each process; a child that was forked has none, and no connection either."""
    global _loop_of
    if _loop_of == os.getpid():
        return
    _loop_of = os.getpid()
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, daemon=True).start()


def _run_events() -> None:
    while True:
        _ignoring_errors(libvirt.virEventRunDefaultImpl)


def init_of(controller: int) -> int | None:
    """The host's pid of the container's PID 1: the controller's only child. None if there is none."""
    try:
        with open(f"/proc/{controller}/task/{controller}/children", encoding="ascii") as children:
            pids = children.read().split()
    except OSError:
        return None
    return int(pids[0]) if pids else None


def _lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in (b"Z", b"X", b"x")


def _name(pid: int) -> bytes:
    """Its name, the same as its parent's until it executes another program. Not its arguments: those are read from its
    memory, and a tenant decides how long that takes."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _text(error: libvirt.libvirtError) -> str:
    """libvirt's words without the prefixes that differ from host to host."""
    text = " ".join(str(error.get_error_message() or error).split())
    text = re.sub(r"^Hook script execution failed: .*? unexpected exit status \d+: ", "", text)
    for prefix in (
        "internal error: guest failed to start: ",
        "internal error: Timed out while reading log output: ",
        "Failure in libvirt_lxc startup: ",
        "internal error: ",
        "operation failed: ",
        "Requested operation is not valid: ",
    ):
        if text.startswith(prefix):
            text = text[len(prefix) :]
    return text


_ADVICE = "see `systemctl status libvirtd` on this host, then do it again"


def _is_lost(error: libvirt.libvirtError) -> bool:
    """Whether libvirt's daemon, or the connection to it, has gone, rather than said no."""
    return error.get_error_domain() in (libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE) or (
        error.get_error_code() == libvirt.VIR_ERR_INTERNAL_ERROR and "keepalive" in str(error)
    )


def _error(doing: str, error: libvirt.libvirtError) -> HypervisorError:
    code = error.get_error_code()
    if _is_lost(error):
        return LibvirtGoneError(f"{doing}: the connection to libvirt is lost ({_text(error)}); {_ADVICE}", code=code)
    kind = NoSuchDomainError if code == libvirt.VIR_ERR_NO_DOMAIN else HypervisorError
    return kind(f"{doing}: {_text(error)}", code=code)


def _call(doing: str, function: Callable[[], _T]) -> _T:
    try:
        return function()
    except libvirt.libvirtError as error:
        raise _error(doing, error) from None


def _call_unless_gone(doing: str, function: Callable[[], object]) -> None:
    """For what asks a container to end: that it has ended is no error."""
    try:
        function()
    except libvirt.libvirtError as error:
        if error.get_error_code() not in _GONE:
            raise _error(doing, error) from None


def _ignoring_errors(function: Callable[[], object]) -> None:
    """For attempts whose effect is looked at afterwards."""
    try:
        function()
    except libvirt.libvirtError:
        pass
