"""How do the ids inside a file system become the ids of one VM? By a user namespace that a mount is seen through.

Knows nothing of disks or containers. The kernel's rule: a mount can be given a mapping once, while it is detached, on
file systems that allow it (ext4 and xfs from Linux 5.12, btrfs 5.15, overlayfs 5.19, squashfs 6.2, tmpfs 6.3).
"""

from __future__ import annotations

import errno
import os

from onelxc.errors import StorageError
from onelxc.root import syscalls

COUNT = 65536


def user_namespace(stored_first: int, host_first: int, count: int = COUNT) -> int:
    """A descriptor of a user namespace that shows what is stored as `stored_first`… as `host_first`… of the host.

    The namespace lives as long as the descriptor or a mount that uses it. The child that makes it is ended here.
    """
    ready_r, ready_w = os.pipe()
    hold_r, hold_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready_r)
            os.close(hold_w)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(ready_w, b"1")
            os.read(hold_r, 1)
        finally:
            os._exit(0)
    os.close(ready_w)
    os.close(hold_r)
    try:
        if os.read(ready_r, 1) != b"1":
            raise StorageError(
                "Cannot make a user namespace: this kernel or its limit user.max_user_namespaces forbids it"
            )
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(f"{stored_first} {host_first} {count}\n")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot make a user namespace: {error.strerror}") from error
    finally:
        os.close(ready_r)
        os.close(hold_w)
        os.waitpid(pid, 0)


def apply(mount_fd: int, kind: str, stored_first: int, host_first: int, count: int = COUNT) -> None:
    """Let the detached mount `mount_fd`, a file system of `kind`, be seen with shifted ids."""
    userns = user_namespace(stored_first, host_first, count)
    try:
        syscalls.mount_setattr(mount_fd, userns_fd=userns)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise StorageError(
                f"Cannot map the ids of a {kind} file system: Linux {os.uname().release} has no idmapped mounts for"
                f" {kind}; use another file system or kernel, or run the VM privileged (LXC_UNPRIVILEGED=no)"
            ) from error
        raise StorageError(f"Cannot map the ids of a {kind} file system: {error.strerror}") from error
    finally:
        os.close(userns)
