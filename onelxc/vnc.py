"""How does GRAPHICS TYPE=VNC show a container's console? Through OpenNebula's svncterm_server, if the host has it.

One server for the host, of the user oneadmin, told by lines on a named pipe: `PORT PASSWORD|- COMMAND…` to listen,
`-PORT` to stop (src/svncterm_server/svncterm_server.c at release-7.4.0). The command of ours attaches to the console
hub, so that a viewer takes no bytes away from the log or from other viewers. A console that cannot be shown is a line
in the log and never a reason for a VM not to run.

The server reads a line into 256 bytes, splits it at blanks and executes what follows the password as oneadmin. So
PASSWD, which the tenant wrote, gets there only if it is one plain word; the stock driver passes on whatever it is.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable

from onelxc import command, names
from onelxc.errors import CommandError
from onelxc.model import Graphics

SERVER = "svncterm_server"
PIPE = "/tmp/svncterm_server_pipe"
SIZE = ("-w", "800", "-h", "600", "-t", "300")
LINE_LIMIT = 200
LOCK_S = 5.0
FREE_S = 2.0

_PASSWORD = re.compile(r"[!-,.-~][!-~]{0,63}\Z")
"""Printable, no blank; the server takes a leading `-` for "no password"."""


def start(vm_id: int, graphics: Graphics, log: Callable[[str], None]) -> None:
    """Have the console of a running VM shown on its port. Says in the log why not, where it cannot be."""
    password = graphics.password or "-"
    if graphics.password and not _PASSWORD.match(graphics.password):
        log("no VNC: PASSWD of GRAPHICS has to be one word of printable ASCII without a leading '-'")
        return
    program = shutil.which(SERVER, path=command.PATH)
    if program is None:
        log(f"no VNC: {SERVER} of OpenNebula's node packages is not on this host")
        return
    if graphics.listen not in ("", "0.0.0.0"):
        log(f"VNC: {SERVER} listens on every address, not only on {graphics.listen}")
    line = f"{graphics.port} {password} sudo -n {names.HELPER} console {names.deploy_id(vm_id)}\n"
    if len(line) > LINE_LIMIT:
        log("no VNC: PASSWD of GRAPHICS is too long")
        return
    lock = _locked()
    try:
        if not _listens():
            command.run([program, *SIZE], verb="start the VNC server")
        # one that a VM of before has left there would keep the port; of those that run none has it (`neighbours`)
        problem = _tell(f"-{graphics.port}\n") or _wait_free(graphics.port) or _tell(line)
    except CommandError as error:
        problem = str(error)
    finally:
        os.close(lock)
    if problem:
        log(f"no VNC: {problem}")


def stop(port: int) -> None:
    """No longer listen on the port. Without a server there is nothing to stop. Called by root, too."""
    _tell(f"-{port}\n")


def _tell(line: str) -> str:
    """Write to the server in one piece; "" or why it could not be told.

    Everybody can make things in /tmp: a pipe that is another user's is not written to, since passwords pass through it.
    """
    try:
        pipe = os.open(PIPE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        return f"{PIPE}: {error.strerror}"
    try:
        status = os.fstat(pipe)
        if not stat.S_ISFIFO(status.st_mode):
            return f"{PIPE}: not a pipe"
        if os.geteuid() != 0 and status.st_uid not in (0, os.geteuid()):
            return f"{PIPE}: of another user ({status.st_uid})"
        os.write(pipe, line.encode())
    except OSError as error:
        return f"{PIPE}: {error.strerror}"
    finally:
        os.close(pipe)
    return ""


def _wait_free(port: int) -> str:
    """ "" as soon as nobody listens on the port: the server cannot tell that it could not."""
    deadline = time.monotonic() + FREE_S
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return ""
            except OSError as error:
                if time.monotonic() > deadline:
                    return f"port {port}: {error.strerror}"
        time.sleep(0.02)


def _listens() -> bool:
    """Whether somebody reads the pipe."""
    try:
        os.close(os.open(PIPE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW))
    except OSError:
        return False
    return True


def _locked() -> int:
    """A descriptor whose closing lets the next deploy go on: two that start a server at once would have two."""
    lock = os.open(os.path.dirname(os.path.realpath(__file__)), os.O_RDONLY | os.O_CLOEXEC)
    deadline = time.monotonic() + LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.02)
    return lock
