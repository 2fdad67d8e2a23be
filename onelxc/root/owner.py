"""The root of a container, seen from the host: with its ids something is made in its file systems, or looked for.

For a process with one thread. Imports ctypes only where something is made, which is rare at a start.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Owner:
    """Whoever owns what is made. None is the host's own root, as whom everything is done."""

    def __init__(self, id_base: int | None) -> None:
        self.id_base = id_base
        self._securebits = 0
        self._ids: AbstractContextManager[None] | None = None

    def __enter__(self) -> None:
        """Take its ids, which an idmapped mount wants, and keep the capabilities: `/` may have mode 0555."""
        if self.id_base is None:
            return
        from onelxc.root import syscalls

        self._securebits = syscalls.keep_capabilities_over_ids()
        self._ids = syscalls.file_ids(self.id_base, self.id_base)
        self._ids.__enter__()

    def __exit__(self, *_: object) -> None:
        if self._ids is None:
            return
        from onelxc.root import syscalls

        self._ids.__exit__(None, None, None)
        self._ids = None
        syscalls.set_securebits(self._securebits)

    def reaches(self, path: str) -> bool:
        """Whether the container's root can go to a path of the host. Where not, libvirt looks for it in the tenant's
        root instead (lxcContainerResolveSymlinks)."""
        if self.id_base is None:
            return os.path.exists(path)
        from onelxc.root import syscalls

        groups = os.getgroups()
        os.setgroups([])
        try:
            with syscalls.file_ids(self.id_base, self.id_base):
                os.close(os.open(path, os.O_PATH | os.O_CLOEXEC))
            return True
        except OSError:
            return False
        finally:
            os.setgroups(groups)
