"""Makes an image file an ext4 for the content of an archive, and cuts it afterwards to what that has taken.

Works on open descriptors of regular files; mounts nothing.
"""

from __future__ import annotations

import contextlib
import os
import time

from onelxc import command
from onelxc.errors import CommandError, StorageError
from onelxc.root import filesystems

_MIB = 1 << 20
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,64bit,metadata_csum"
)
"""Named one by one: what mke2fs 1.47 takes by default (orphan_file) is unknown to e2fsck 1.46 of the next host."""
_LARGE_XATTRS = ",ea_inode"
_BYTES_PER_INODE = 8192
SPARE_INODES = 1024
_JOURNAL = 64 * _MIB
_BESIDE = 1.05
"""Group descriptors, bitmaps and index blocks beside what files take."""
_TOO_LARGE = 128 * _MIB


def room_for(content: int) -> int:
    """How large a file system is that holds so many bytes of files and inodes in any case."""
    return int(content * _BESIDE) + _JOURNAL


def make(image: int, inodes: int, *, large_xattrs: bool) -> None:
    """With as many inodes as are asked for, but not fewer than usual."""
    features = _FEATURES + (_LARGE_XATTRS if large_xattrs else "")
    number = max(inodes, os.fstat(image).st_size // _BYTES_PER_INODE)
    argv = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-N", str(number), "-m", "0", "-O", features]
    argv += ["-E", "lazy_itable_init=1,lazy_journal_init=1,discard", f"/proc/self/fd/{image}"]
    command.run(argv, pass_fds=(image,), verb="make the image's file system")


def fit(image: int, size: int, wanted: int, limit_s: float) -> int:
    """Cut an image that came out much larger than anyone asked for; OpenNebula 3.2.1 copies every byte of it."""
    path = f"/proc/self/fd/{image}"
    _wait_unmounted(path)
    wanted = -(-wanted // _MIB) * _MIB
    if size <= wanted + max(wanted // 2, _TOO_LARGE):
        return size
    with contextlib.suppress(CommandError):
        command.run(
            ["resize2fs", "-f", path, f"{wanted >> 10}K"],
            pass_fds=(image,),
            timeout_s=limit_s,
            verb="shrink the image",
        )
    size = filesystems.ext_bytes(path)
    os.ftruncate(image, size)
    return size


def _wait_unmounted(path: str, limit_s: float = 20.0) -> None:
    """The file system is let go when the last descriptor closes; wait until its superblock says so."""
    deadline = time.monotonic() + limit_s
    while not filesystems.ext_is_clean(path):
        if time.monotonic() > deadline:
            raise StorageError("the new image did not become clean after unmounting")
        time.sleep(0.01)
