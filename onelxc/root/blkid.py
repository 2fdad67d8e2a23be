"""What does libblkid recognise on an image or device? Asked through a descriptor, so that this needs no rights.

For the jail (`filesystems.probe`): the function runs there, as a stranger who has nothing but the descriptor. It writes
a line of JSON for each place. It is what `blkid -p` does (misc-utils/blkid.c of util-linux).
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence

_LABEL, _UUID, _TYPE = 1 << 1, 1 << 3, 1 << 5
NAMES = ("TYPE", "PTTYPE", "UUID", "LABEL")
_NOTHING, _AMBIVALENT = 1, -2
AMBIVALENT = "AMBIVALENT"
"""Said instead of the rest where there are the marks of more than one file system."""


def load() -> ctypes.CDLL:
    """The library; before the jail is entered, so that it is the host's."""
    library = ctypes.CDLL("libblkid.so.1", use_errno=True)
    library.blkid_new_probe.restype = ctypes.c_void_p
    return library


def tell(library: ctypes.CDLL, fd: int, places: Sequence[tuple[int, int]]) -> int:
    """Write to stdout what is at each (offset, size) of `fd`; size 0 is to the end. The exit code."""
    for offset, size in places:
        os.write(1, json.dumps(_look(library, fd, offset, size)).encode() + b"\n")
    return 0


def _look(library: ctypes.CDLL, fd: int, offset: int, size: int) -> dict[str, str]:
    probe = ctypes.c_void_p(library.blkid_new_probe())
    if library.blkid_probe_set_device(probe, fd, ctypes.c_int64(offset), ctypes.c_int64(size)) != 0:
        raise OSError(ctypes.get_errno(), "it cannot be read")
    library.blkid_probe_enable_superblocks(probe, 1)
    library.blkid_probe_set_superblocks_flags(probe, _LABEL | _UUID | _TYPE)
    library.blkid_probe_enable_partitions(probe, 1)
    found = library.blkid_do_safeprobe(probe)
    if found == _NOTHING:
        return {}
    if found == _AMBIVALENT:
        return {AMBIVALENT: ""}
    if found != 0:
        raise OSError(ctypes.get_errno(), "it cannot be read")
    values = {}
    for name in NAMES:
        data, length = ctypes.c_char_p(), ctypes.c_size_t()
        if library.blkid_probe_lookup_value(probe, name.encode(), ctypes.byref(data), ctypes.byref(length)) == 0:
            values[name] = (data.value or b"").decode(errors="replace")
    return values
