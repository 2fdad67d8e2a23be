"""A file system whose server takes every request and never answers: what a tenant may put on any path of his own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterator

from onelxc.root import syscalls
from tests.support.waiting import wait_until

_INIT = 26


@contextlib.contextmanager
def mounted(point: str, *, pid: int = 0) -> Iterator[int]:
    """Mount it at `point`, in the mount namespace of the process `pid` if that is given; gives the server's pid.

    Whoever waits for it waits until the end: the server's death answers all.
    """
    ready, tell = os.pipe()
    server = os.fork()
    if server == 0:
        try:
            _serve(point, pid, tell)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(ready, 100) == b"+", "no FUSE here"
        yield server
    finally:
        os.close(ready)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        if not pid:
            wait_until(lambda: _unmounted(point), "those who waited have gone")


def _unmounted(point: str) -> bool:
    try:
        syscalls.umount(point)
    except OSError as error:
        return error.errno != errno.EBUSY
    return True


def _serve(point: str, pid: int, tell: int) -> None:
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    if pid:
        namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
        syscalls.setns(namespace, syscalls.CLONE_NEWNS)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
    syscalls.mount("deaf", point, "fuse", data=options)
    asked = os.read(fuse, 1 << 17)
    unique = struct.unpack_from("<IIQ", asked)[2]
    answer = struct.pack("<IIIIHHIIHH", 7, 23, 0, 0, 0, 0, 4096, 0, 0, 0)
    os.write(fuse, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
    os.write(tell, b"+")
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    while True:
        os.read(fuse, 1 << 17)
