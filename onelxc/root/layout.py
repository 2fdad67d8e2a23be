"""Where in an archive is the root file system? At the top, or below `rootfs/` beside what describes an image.

Looks at what has been unpacked and moves it; knows nothing of tar or disks.
"""

from __future__ import annotations

import os
import re
import stat

from onelxc.errors import StorageError
from onelxc.root import syscalls, trees

_DESCRIBES = re.compile(
    r"config|fstab|templates|metadata|partial|lost\+found|\..*|.*\.(ya?ml|json|xml|txt|md|conf|log|tpl|hold|dev)"
)
"""What stands beside a `rootfs/` and describes it, in images and exports of LXC, LXD and Incus."""


def hoist(mount_fd: int) -> tuple[str, ...]:
    """Lift the content of `rootfs/` to the top where that holds the root (LXD images, exports with a config).

    Only where the top level is not a root file system itself. Single names relative to descriptors, none followed.
    Gives the names that are gone, which described it; StorageError where others would be.
    """
    top = syscalls.openat2(mount_fd, ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        names = set(os.listdir(top))
        if "rootfs" not in names or names & {"etc", "usr", "bin", "sbin", "lib"}:
            return ()
        status = os.stat("rootfs", dir_fd=top, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            return ()
        beside = sorted(names - {"rootfs"})
        others = [name for name in beside if not _DESCRIBES.fullmatch(name)]
        if others:
            raise StorageError(f"beside rootfs/ there is {others[0]!a}, which would be lost; pack the root alone")
        away = ".onelxc-root"
        os.rename("rootfs", away, src_dir_fd=top, dst_dir_fd=top)
        inner = os.open(away, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        try:
            for name in beside:
                trees.remove(top, name)
            for name in os.listdir(inner):
                os.rename(name, name, src_dir_fd=inner, dst_dir_fd=top)
            for attribute in os.listxattr(top):
                os.removexattr(top, attribute)
            for attribute in os.listxattr(inner):
                os.setxattr(top, attribute, os.getxattr(inner, attribute))
        finally:
            os.close(inner)
        os.rmdir(away, dir_fd=top)
        os.fchown(top, status.st_uid, status.st_gid)
        os.fchmod(top, stat.S_IMODE(status.st_mode))
        os.utime(top, ns=(status.st_atime_ns, status.st_mtime_ns))
        return tuple(map(ascii, beside))
    finally:
        os.close(top)
