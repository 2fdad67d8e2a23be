"""Where each file system of a container is really mounted, found in a root that its tenant wrote.

libvirt follows symbolic links with rights over the host when it makes and mounts its own places (SPECIAL) and the
targets of <filesystem>. Here the same ways are walked name by name, with every mount in view that libvirt makes before,
and refused where they lead to a place of libvirt's or to the root. Directories are compared by inode, so that no other
name for one (a file system that ignores case, a hard link in a damaged image) is overlooked.

No process of the tenant may run meanwhile. Nothing is opened but as O_PATH, one name at a time, never through a link.
Imports neither dataclasses nor ctypes: it runs at every start.
"""

from __future__ import annotations

import os
import stat

from onelxc import names
from onelxc.errors import StorageError
from onelxc.root.owner import Owner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SPECIAL = (".oldroot", "proc", "sys", "dev")
"""libvirt pivots through the first, then mounts over the others: lxcContainerSetupPivotRoot."""

_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS = 40
_TENANTS_PROC = ("self", "thread-self", "mounts")
"""Names below /proc that libvirt itself reads by after its mounts, or that lead through a process."""

Key = tuple[int, int, int]
"""A directory of the container: the number of its tree (0 is the root file system), device and inode."""


class Filesystem:
    """One <filesystem> of the domain: `source` is a path of the host, of the container for kind "bind"."""

    __slots__ = ("kind", "source", "target")

    def __init__(self, kind: str, source: str, target: str) -> None:
        self.kind = kind
        self.source = source
        self.target = target

    @property
    def tenants(self) -> bool:
        """Whether its content is the tenant's: a disk of the VM, its context, a directory of its root."""
        return self.kind == "bind" or self.source.startswith(names.MOUNTS + "/")


def secure(root: str, filesystems: Iterable[Filesystem], owner: Owner) -> None:
    """Make the root file system mounted at `root` safe for libvirt to start from. StorageError where it cannot be."""
    view = View(_open_source(root), owner)
    try:
        for filesystem in filesystems:
            if filesystem.target != "/":  # by libvirt's own comparison: a second root is not mounted
                view.add(filesystem)
    finally:
        view.close()


def refuse_special(target: str) -> None:
    """StorageError for a target that needs no look into the root to be wrong."""
    parts = _parts(target)
    if not target.startswith("/") or not parts or ".." in parts:
        raise _refused(target, "not a path below /")
    if parts[0] in SPECIAL:
        raise _refused(target, f"/{parts[0]} is the container's own")


class View:
    """The container's file systems as libvirt will find them when it mounts the next one."""

    def __init__(self, root: int, owner: Owner) -> None:
        self._trees = [root]
        self._mounted: dict[Key, int] = {}
        self._owner = owner
        self._special: dict[Key, str] = {}
        try:
            for name in SPECIAL:
                key = self._real_directory(name)
                if key in self._special or key == self._key(0, root):
                    raise StorageError(f"Cannot use the root file system: /{name} is another of its directories")
                self._special[key] = name
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for tree in self._trees:
            if tree >= 0:
                os.close(tree)
        self._trees = []

    def add(self, filesystem: Filesystem) -> None:
        """Find the target, make it where it is missing, and take what is mounted there into view."""
        target = filesystem.target
        if not filesystem.tenants and _is_kernels(target):
            # it lies in what libvirt has mounted by then, where nothing is the tenant's
            self._open_tree(filesystem, target, keep=False)
            return
        refuse_special(target)
        tree = self._open_tree(filesystem, target, keep=True)
        directory = tree < 0 or stat.S_ISDIR(os.fstat(tree).st_mode)
        self._trees.append(tree)
        here = _Way(self, target)
        try:
            here.walk(make=True, directory=directory)
            if here.is_root:
                raise _refused(target, "it leads to the root of the container")
            if not here.missing:
                self._mounted[here.key] = len(self._trees) - 1
        finally:
            here.close()

    def _open_tree(self, filesystem: Filesystem, target: str, *, keep: bool) -> int:
        """A descriptor of what will be mounted; -1 for what is empty or cannot be looked into (see `_Way`)."""
        source = filesystem.source
        if filesystem.kind == "bind":
            # libvirt follows the links of the host's path of that name, if there is one, and then those inside
            source = os.path.realpath(source) if self._owner.reaches(source) else source
            refuse_special(source)
            way = _Way(self, source)
            try:
                way.walk()
                return os.dup(way.fd) if not way.missing else -1
            finally:
                way.close()
        if filesystem.kind not in ("mount", "block"):
            return -1
        if not filesystem.tenants and not self._owner.reaches(source):
            raise _refused(target, f"its source {source} is not there for the container's root")
        if filesystem.kind == "block" or not keep:
            return -1
        return _open_source(source)

    def _real_directory(self, name: str) -> Key:
        """The key of a directory right below the root; what else has its name is put aside."""
        root = self._trees[0]
        try:
            mode = os.stat(name, dir_fd=root, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode):
                with self._owner:
                    _put_aside(root, name, mode)
                mode = 0
        except FileNotFoundError:
            mode = 0
        except OSError as error:
            raise _cannot_make(name, error) from error
        if not mode:
            try:
                with self._owner:
                    os.mkdir(name, 0o755, dir_fd=root)
            except OSError as error:
                raise _cannot_make(name, error) from error
        try:
            fd = os.open(name, _PATH | os.O_DIRECTORY, dir_fd=root)
        except OSError as error:
            raise _cannot_make(name, error) from error
        try:
            return self._key(0, fd)
        finally:
            os.close(fd)

    @staticmethod
    def _key(tree: int, fd: int) -> Key:
        status = os.fstat(fd)
        return tree, status.st_dev, status.st_ino

    def special(self, key: Key) -> str:
        return self._special.get(key, "")

    def root_of(self, tree: int) -> int:
        return os.dup(self._trees[tree]) if self._trees[tree] >= 0 else -1

    def cross(self, key: Key) -> int:
        """The number of the tree that is mounted on a directory, -1 if none is."""
        return self._mounted.get(key, -1)

    def make(self, name: str, parent: int) -> None:
        with self._owner:
            os.mkdir(name, 0o755, dir_fd=parent)


class _Way:
    """One path, walked from the root of the container."""

    def __init__(self, view: View, path: str) -> None:
        self._view = view
        self._path = path
        self._steps: list[tuple[Key, int]] = []
        self.missing = False
        """Whether its last part is not there, or lies in a tree that is not looked into."""

    @property
    def key(self) -> Key:
        return self._steps[-1][0]

    @property
    def fd(self) -> int:
        return self._steps[-1][1]

    @property
    def is_root(self) -> bool:
        return not self.missing and self.key == self._steps[0][0]

    def close(self) -> None:
        self._up(0)

    def walk(self, *, make: bool = False, directory: bool = True) -> None:
        """Go to the end. What is missing is made if `make`, as libvirt would, the last part only if it is to be a
        directory; never behind a link."""
        self._enter(0, self._view.root_of(0))
        todo = _parts(self._path)[::-1]
        own, links = len(todo), 0
        while todo:
            name = todo.pop()
            behind_link = len(todo) >= own  # of the path's own parts `own` are still to come
            own = min(own, len(todo))
            if self.missing:
                if name == "..":
                    raise _refused(self._path, "it leads through a directory that does not exist yet")
                continue
            if name == "..":
                self._up(max(1, len(self._steps) - 1))
                continue
            link = self._step(name, make=make and (bool(todo) or directory), behind_link=behind_link)
            if link is None:
                continue
            links += 1
            if links > _LINKS:
                raise _refused(self._path, "too many symbolic links")
            if link.startswith("/"):
                self._up(1)
            todo += _parts(link)[::-1]

    def _step(self, name: str, *, make: bool, behind_link: bool) -> str | None:
        """Go one name down; the text of a symbolic link, where it is one, is given back instead."""
        try:
            try:
                fd = os.open(name, _PATH, dir_fd=self.fd)
            except FileNotFoundError:
                if behind_link:
                    raise _refused(self._path, "a symbolic link on its way leads nowhere") from None
                if not make:
                    self.missing = True
                    return None
                self._view.make(name, self.fd)
                fd = os.open(name, _PATH, dir_fd=self.fd)
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                try:
                    return os.readlink("", dir_fd=fd)
                finally:
                    os.close(fd)
        except OSError as error:
            raise _refused(self._path, f"{name}: {error.strerror}") from error
        self._enter(self.key[0], fd)
        special = self._view.special(self.key)
        if special:
            raise _refused(self._path, f"it leads to /{special}, which is the container's own")
        return None

    def _enter(self, tree: int, fd: int) -> None:
        """Take a directory, or what is mounted on it, as the next step."""
        key = View._key(tree, fd)
        above = self._view.cross(key)
        while above >= 0:
            os.close(fd)
            fd = self._view.root_of(above)
            if fd < 0:
                raise _refused(self._path, "it lies below a file system that cannot be looked into")
            key = View._key(above, fd)
            above = self._view.cross(key)
        self._steps.append((key, fd))

    def _up(self, length: int) -> None:
        for _, fd in self._steps[length:]:
            os.close(fd)
        del self._steps[length:]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _is_kernels(target: str) -> bool:
    """Whether a target of the administrator's lies by a plain path in what libvirt mounts at /proc, /sys, /dev."""
    parts = _parts(target)
    if len(parts) < 2 or ".." in parts or not target.startswith("/"):
        return False
    if parts[0] == "proc":
        return not parts[1].isdigit() and parts[1] not in _TENANTS_PROC
    return parts[0] == "sys" or (parts[0] == "dev" and parts[1] != "fd")


def _put_aside(root: int, name: str, mode: int) -> None:
    """A symbolic link goes, since it holds nothing of its own; anything else is kept under another name."""
    try:
        if stat.S_ISLNK(mode):
            os.unlink(name, dir_fd=root)
            return
        for number in range(1, 100):
            try:
                os.link(name, f"{name}.{number}", src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
            except FileExistsError:
                continue
            os.unlink(name, dir_fd=root)
            return
        raise FileExistsError(17, os.strerror(17))
    except OSError as error:
        raise _cannot_make(name, error) from error


def _open_source(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot open {path}: {error.strerror}") from error


def _cannot_make(name: str, error: OSError) -> StorageError:
    return StorageError(f"Cannot make /{name} a directory of the root file system: {error.strerror}")


def _refused(path: str, why: str) -> StorageError:
    return StorageError(f"Cannot mount at {path} in the container: {why}")
