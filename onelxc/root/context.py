"""How do the files of a context ISO reach a container? Into a small tmpfs of their own, which it sees read-only.

The ISO is never mounted: that would need a kernel with iso9660, and on hosts with contextualization packages their
udev rules would fire on the *host*. Who reads it is `iso9660`, in the jail: an image may be a tenant's.
"""

from __future__ import annotations

import functools
import os

from onelxc.errors import StorageError
from onelxc.root import iso9660, jail, mounts, syscalls

_LIMITS = jail.Limits(memory_bytes=256 << 20, cpu_s=60, processes=1, file_bytes=iso9660.LIMIT)
_LIMIT_S = 120.0


def make(*, id_base: int | None) -> mounts.Detached:
    """A detached read-only tmpfs, empty, owned by the container's root. To be placed with id_base=None.

    Owned, not idmapped: tmpfs has idmapped mounts only from Linux 6.3 on. Its size has room for the largest context
    twice, since `fill` may come again; what is not used costs nothing, and the container cannot write there.
    """
    owner = str(id_base or 0)
    words: dict[str, str | None] = {"size": str(2 * iso9660.LIMIT), "mode": "0755", "uid": owner, "gid": owner}
    attributes = syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID | syscalls.ATTR_RDONLY
    try:
        return mounts.Detached(syscalls.mount_detached("tmpfs", "onelxc-context", words, attributes), "tmpfs", "")
    except OSError as error:
        raise StorageError(f"Cannot make a tmpfs for the context: {error.strerror}") from error


def fill(iso_fd: int, target: str, *, id_base: int | None) -> None:
    """Put the files of an ISO into the context that is mounted at `target`, under the eyes of whoever sees it.

    Each file changes as a whole; what the ISO has not got goes. The mounts stay read-only, the container's own ones
    too: written is through a mount that is attached nowhere.
    """
    try:
        tree = syscalls.open_tree(target)
    except OSError as error:
        raise StorageError(f"Cannot open the context at {target}: {error.strerror}") from error
    try:
        syscalls.mount_setattr(tree, clear=syscalls.ATTR_RDONLY)
        program = functools.partial(iso9660.main, iso_fd, jail.TARGET)
        extract = jail.Filter(program, _LIMITS, (iso_fd,), user=id_base or 0)
        outcome = jail.alone(extract, limit_s=_LIMIT_S, mount_fd=tree)
    except StorageError as error:
        raise StorageError(f"Cannot read the context: {error}") from error
    except OSError as error:
        raise StorageError(f"Cannot fill the context: {error.strerror}") from error
    finally:
        os.close(tree)
    if outcome.status != 0:
        said = outcome.stderr.strip() or f"killed by signal {-outcome.status}"
        raise StorageError(said if said.startswith("Cannot ") else f"Cannot read the context: {said}")
