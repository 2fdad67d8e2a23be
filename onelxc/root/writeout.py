"""How does what is unpacked reach the disk? While the rest is still being unpacked, and with certainty at the end.

Otherwise the kernel keeps all of it in memory, and whoever waits for the image waits once for the archive and once for
the disk. Knows nothing of archives; it writes out what others have written.
"""

from __future__ import annotations

import os
import threading

from onelxc.root import syscalls

_EVERY_S = 0.5


class WriteOut:
    """The file system of the mount `mount_fd`, whose bytes lie in the file `image`; both outlive this."""

    def __init__(self, mount_fd: int, image: int) -> None:
        # a descriptor hears of each failed write since it was opened, but once: so the last word has one of its own
        self._last_word = syscalls.openat2(mount_fd, ".", os.O_RDONLY | os.O_DIRECTORY)
        self._eager = syscalls.openat2(mount_fd, ".", os.O_RDONLY | os.O_DIRECTORY)
        self._image = image
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Write out now and then from here on. Not before the last fork: a thread is no good to a child."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            try:
                syscalls.syncfs(self._eager)
                syscalls.start_write_back(self._image)
            except OSError:
                return  # `finish` meets it, too

    @property
    def at_work(self) -> bool:
        """Whether it goes on writing by itself; a failure ends that."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> None:
        """Everything is in the image, or OSError. That the image is on the disk is its own fsync's to say."""
        self._stop()
        syscalls.syncfs(self._last_word)

    def _stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> WriteOut:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        os.close(self._last_word)
        os.close(self._eager)
