"""Is the daemon that watches the host's containers running, and how is it brought up? The starters' side of the hub.

`onelxc-hub` (see `hub_daemon`) is one process per host. Whoever needs it calls `ensure_running`: through systemd where
its unit is installed, else as a daemon of our own. It ends by itself when no container of ours has run and nobody has
asked for it for a minute. Imports no libvirt: every action that touches a container passes through here.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from typing import TextIO

from onelxc import command
from onelxc.errors import CommandError, HelperError
from onelxc.names import RUN

PID = os.path.join(RUN, "hub.pid")
"""Locked by the hub while it lives; its pid, and a second line "ready" once it has looked at all containers."""
START = os.path.join(RUN, "hub.start")
"""Locked while somebody starts the hub and while it decides to end."""
LOG = "/var/log/onelxc/hub.log"
UNIT = "onelxc-hub.service"
READY_S = 20.0


def make_run_directory() -> None:
    """What oneadmin's probes read lies below it, so they may pass, whatever the umask of who comes first."""
    os.makedirs(RUN, exist_ok=True)
    os.chmod(RUN, 0o711)


def ensure_running() -> None:
    """Return with the hub running and watching; HelperError if it does not come up. Quick when it runs."""
    make_run_directory()
    deadline = time.monotonic() + READY_S
    with private(START) as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        if is_running():
            os.utime(PID)
        else:
            _start()
            while not is_running():
                if time.monotonic() > deadline:
                    raise HelperError(f"Cannot start onelxc-hub: it does not come up; see {LOG}")
                time.sleep(0.01)
    # A hub that does not get ready waits for libvirt; what the caller does next will say so better.
    while not _is_ready() and time.monotonic() < deadline and is_running():
        time.sleep(0.01)


def is_running() -> bool:
    """Whether some process holds the pid file."""
    try:
        with open(PID) as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def pid() -> int | None:
    """The hub's pid, None if it does not run."""
    try:
        with open(PID) as held:
            text = held.read().split()
    except FileNotFoundError:
        return None
    return int(text[0]) if text and is_running() else None


def _is_ready() -> bool:
    try:
        with open(PID) as held:
            return "ready" in held.read() and is_running()
    except FileNotFoundError:
        return False


def private(path: str) -> TextIO:
    """A file to lock: only root may open it, since whoever can read a file can lock it."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "r+")


def _start() -> None:
    with private(PID) as stale:
        stale.truncate(0)  # What a killed one said of itself.
    if os.path.isdir("/run/systemd/system"):
        try:
            command.run(["systemctl", "start", "--no-ask-password", UNIT], verb="start onelxc-hub", timeout_s=READY_S)
            return
        except CommandError:
            pass  # Not installed, or masked: by ourselves then.
    command.daemon([sys.executable, "-I", program("onelxc-hub")])


def program(name: str) -> str:
    """One of our own programs: beside the package where it is installed, under libexec in the source tree."""
    above = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    for path in (os.path.join(above, name), os.path.join(above, "libexec", name)):
        if os.path.isfile(path):
            return path
    raise HelperError(f"Cannot start {name}: it is not in {above}; run `install.sh node` on this host")
