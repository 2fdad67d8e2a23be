"""How does an operator's terminal get to a container's console? `onelxc-root console one-N`, through the hub.

Raw terminal to socket and back until Ctrl-] or the container's end. Interprets nothing of what the tenant writes, as
any terminal program does not.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import termios
import time
import tty

from onelxc.errors import HelperError, NoSuchDomainError
from onelxc.names import deploy_id
from onelxc.root import hub
from onelxc.root.consoles import socket_path

ESCAPE = b"\x1d"


def connect(vm_id: int, timeout_s: float = 10) -> socket.socket:
    """A stream to the console of a running VM (protocol: `consoles`); NoSuchDomainError if it has none."""
    hub.ensure_running()
    deadline = time.monotonic() + timeout_s
    while True:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(socket_path(vm_id))
            return stream
        except (FileNotFoundError, ConnectionRefusedError):
            stream.close()
        if time.monotonic() > deadline:
            raise NoSuchDomainError(f"Cannot open the console of {deploy_id(vm_id)}: it does not run on this host")
        time.sleep(0.1)


def attach(vm_id: int) -> None:
    """Join stdin and stdout to the console until either ends, or Ctrl-] is typed at a terminal."""
    stream = connect(vm_id, timeout_s=2)
    saved = None
    if os.isatty(0):
        sys.stderr.write(f"Console of {deploy_id(vm_id)}; Ctrl-] leaves.\r\n")
        saved = termios.tcgetattr(0)
        tty.setraw(0)
    try:
        _copy(stream, terminal=saved is not None)
    except OSError as error:
        raise HelperError(f"Cannot go on with the console of {deploy_id(vm_id)}: {error.strerror}") from error
    finally:
        stream.close()
        if saved is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, saved)
            sys.stderr.write("\n")


def _copy(stream: socket.socket, *, terminal: bool) -> None:
    with selectors.PollSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                data = stream.recv(65536) if key.fileobj is stream else os.read(0, 4096)
                if key.fileobj is stream:
                    if not data:
                        return
                    while data:
                        data = data[os.write(1, data) :]
                elif terminal and (ESCAPE in data or not data):  # or the terminal was closed
                    return
                elif data:
                    stream.sendall(data)
                else:
                    selector.unregister(0)  # What is said is still of interest.
