#!/usr/bin/python3
"""A stand-in for OpenNebula's svncterm_server: the same command line, pipe, commands and processes, no VNC.

What travels between viewer and terminal is the terminal's bytes as they are. As the real one (svncterm_server.c at
release-7.4.0) it makes the pipe 0640 or takes the one that is there, goes into the background, listens on
`PORT PASSWD|- COMMAND…`, lets go of `-PORT`, and runs COMMAND on a pty of its own for each viewer.
"""

from __future__ import annotations

import getopt
import os
import pty
import select
import signal
import socket
import sys

PIPE = "/tmp/svncterm_server_pipe"


def view(viewer: socket.socket, argv: list[str]) -> None:
    pid, master = pty.fork()
    if pid == 0:
        os.execvp(argv[0], argv)
    while True:
        for ready in select.select([viewer, master], [], [])[0]:
            try:
                data = viewer.recv(4096) if ready is viewer else os.read(master, 1024)
            except OSError:
                data = b""
            if not data:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                os._exit(0)
            if ready is viewer:
                os.write(master, data)
            else:
                viewer.sendall(data)


def serve(pipe: int) -> None:
    listeners: dict[socket.socket, list[str]] = {}
    while True:
        for ready in select.select([pipe, *listeners], [], [])[0]:
            if ready == pipe:
                line = b""
                while not line.endswith(b"\n"):
                    line += os.read(pipe, 1)
                assert len(line) < 256, "the real one's buffer is full"
                port, *rest = line.decode().split()
                for listener in [one for one in listeners if one.getsockname()[1] == abs(int(port))]:
                    if int(port) < 0:
                        listener.close()
                        del listeners[listener]
                if int(port) > 0:
                    listener = socket.socket()
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        listener.bind(("0.0.0.0", int(port)))
                        listener.listen(5)
                        listeners[listener] = rest[1:]
                    except OSError:
                        listener.close()
            else:
                viewer, _ = ready.accept()
                if os.fork() == 0:
                    for listener in listeners:
                        listener.close()
                    os.close(pipe)
                    view(viewer, listeners[ready])
                viewer.close()


def main() -> int:
    try:
        getopt.getopt(sys.argv[1:], "w:h:t:")
    except getopt.GetoptError as error:
        print(f"Usage: {sys.argv[0]} [-t nsecs] [-w width] [-h height]: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if not os.path.exists(PIPE):
        os.mkfifo(PIPE, 0o640)
    pipe = os.open(PIPE, os.O_RDWR)
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if os.fork():
        return 0
    os.setsid()
    serve(pipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
