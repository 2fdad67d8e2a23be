"""Starts a program whose changes to the host the kernel asks somebody about first: the launcher of `breaking`.

    stopping.py DESCRIPTOR COMMAND…      the listener of the filter goes through the socket DESCRIPTOR

Imports nothing of the tests', and leaves nothing in the program's environment.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct
import sys

_CALLS = {
    # name: (number on x86_64, on aarch64)
    "write": (1, 64),
    "ioctl": (16, 29),
    "pwrite64": (18, 68),
    "kill": (62, 129),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "link": (86, None),
    "unlink": (87, None),
    "symlink": (88, None),
    "mount": (165, 40),
    "umount2": (166, 39),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "fallocate": (285, 47),
    "syncfs": (306, 267),
    "renameat2": (316, 276),
    "pidfd_send_signal": (424, 424),
    "move_mount": (429, 429),
    "mount_setattr": (442, 442),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]
NUMBERS = {numbers[_COLUMN]: name for name, numbers in _CALLS.items() if numbers[_COLUMN] is not None}

_SECCOMP = {"x86_64": 317, "aarch64": 277}[platform.machine()]
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _SET, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_NUMBER, _SECOND, _THIRD = 0, 16 + 8, 16 + 16


def _program() -> bytes:
    """Classic BPF: notify of the calls above; of openat only with O_CREAT, of ioctl only those of loop devices (0x4C…)
    and of file systems that are frozen (0x58…)."""
    instructions: list[tuple[int, int, int, int]] = []
    for number, name in NUMBERS.items():
        if name == "openat":
            body = [(_LOAD, 0, 0, _THIRD), (_SET, 0, 1, os.O_CREAT), (_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
        elif name == "ioctl":
            body = [(_LOAD, 0, 0, _SECOND), (_AND, 0, 0, 0xFF00), (_EQUAL, 1, 0, 0x4C00), (_EQUAL, 0, 1, 0x5800)]
            body += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
        else:
            body = [(_RETURN, 0, 0, _NOTIFY)]
        instructions += [(_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, len(body), number), *body]
    instructions.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def install_filter() -> int:
    """For this process and all that it starts. Gives the descriptor on which the kernel asks."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _program()
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
    listener = int(libc.syscall(_SECCOMP, 1, 8, header))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _main(descriptor: str, *command: str) -> None:
    channel = socket.socket(fileno=int(descriptor))
    listener = install_filter()
    socket.send_fds(channel, [b"x"], [listener])
    channel.close()
    os.close(listener)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _main(*sys.argv[1:])
