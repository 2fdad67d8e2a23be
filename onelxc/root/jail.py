"""Where are programs run that read what a tenant gave us? In namespaces of their own, on a root that has nothing else.

The archive's names are resolved by tar, as root, with capabilities to chown and mknod. So tar runs where the host is
not: a mount namespace pivoted into an empty read-only root with the host's /usr (read-only), the new file system at
/t and nothing more; no network, no other process, no capability beyond those of a file's attributes. The decompressor
runs beside it as nobody. When the parent dies or gives up, all of it is killed with the pid namespace's init.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import select
import signal
import stat
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Union

from onelxc import command
from onelxc.errors import StorageError
from onelxc.root import syscalls

TARGET = "/t"
SOURCE = "/s"
DEVICE = "/device"
_DIRECTORIES = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libx32")
_CAPABILITIES = (
    syscalls.CAP_CHOWN,
    syscalls.CAP_DAC_OVERRIDE,
    syscalls.CAP_DAC_READ_SEARCH,
    syscalls.CAP_FOWNER,
    syscalls.CAP_FSETID,
    syscalls.CAP_MKNOD,
    syscalls.CAP_SETFCAP,
)
_NOBODY = 65534
_TEXT_LIMIT = 256 << 10
_SAID = 500
_TICK_MS = 200
_F_SETPIPE_SZ = 1031

Filter = Union[Sequence[str], Callable[[], int]]
"""A program, or a function of ours that gives its exit code; () for none."""


@dataclass
class Outcome:
    """How the two programs ended: exit codes (negative: a signal), and what they wrote."""

    filter_status: int
    status: int
    filter_stderr: str
    stderr: str
    stdout: str


def unpack(
    mount_fd: int,
    argv: Sequence[str],
    filter_argv: Filter,
    source: Iterable[bytes],
    watch: Callable[[str], bool],
    *,
    limit_s: float,
    source_fd: int = -1,
) -> Outcome:
    """Run `argv` with the detached mount at TARGET and `source` on its stdin, through `filter_argv` if that is not ().

    `source_fd` is another detached mount, seen at SOURCE.

    `watch` is called several times a second with what `argv` wrote on stderr so far. True ends the run at once; what
    it raises (a cancel, no space left) ends it as well and is passed on. Nothing of the jail outlives this call.
    """
    return _run({TARGET: mount_fd, SOURCE: source_fd}, argv, filter_argv, source, watch, limit_s)


def on_device(device: str, argv: Sequence[str], *, limit_s: float) -> Outcome:
    """Run `argv`, a checker of file systems, with the block device at DEVICE and nothing else of the host's."""
    try:
        node = syscalls.open_tree(device)
    except OSError as error:
        raise StorageError(f"Cannot open {device}: {error.strerror}") from error
    try:
        return _run({DEVICE: node}, argv, (), (), lambda _: False, limit_s)
    finally:
        os.close(node)


def _run(  # noqa: PLR0917
    places: dict[str, int],
    argv: Sequence[str],
    filter_argv: Filter,
    source: Iterable[bytes],
    watch: Callable[[str], bool],
    limit_s: float,
) -> Outcome:
    """Run in a jail that has these detached mounts (-1: none) at these places."""
    pipes = {name: os.pipe() for name in ("input", "out", "err", "filter_err", "status")}
    _widen(pipes["input"][1])
    inner = {name: pair[0] if name == "input" else pair[1] for name, pair in pipes.items()}
    outer = {name: pair[1] if name == "input" else pair[0] for name, pair in pipes.items()}
    pid = os.fork()
    if pid == 0:
        _outside(places, argv, filter_argv, inner, os.getppid())
    for fd in inner.values():
        os.close(fd)
    try:
        texts = _pump(outer, source, watch, limit_s)
    finally:
        _kill(pid)
        for fd in outer.values():
            with contextlib.suppress(OSError):
                os.close(fd)
    said = {name: data.decode(errors="replace") for name, data in texts.items()}
    words = said["status"].split()
    if len(words) != 2:
        raise StorageError(f"{argv[0]} did not run: {' '.join(said['err'].split()) or 'it ended without a word'}")
    return Outcome(int(words[0]), int(words[1]), said["filter_err"], said["err"], said["out"])


def _widen(pipe: int) -> None:
    """Fewer turns between decompressor and tar; where the kernel does not allow it, as it is."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, 1 << 20)


def _kill(pid: int) -> None:
    """End the jail and wait: the first child ends when the jail's last process, which may hold the mount, has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


def _pump(
    outer: dict[str, int], source: Iterable[bytes], watch: Callable[[str], bool], limit_s: float
) -> dict[str, bytes]:
    """Feed stdin and gather the rest until the status pipe closes."""
    texts = {name: b"" for name in outer if name != "input"}
    names = {fd: name for name, fd in outer.items()}
    chunks = iter(source)
    waiting = memoryview(b"")
    poll = select.poll()
    for fd, name in names.items():
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLOUT if name == "input" else select.POLLIN)
    deadline = time.monotonic() + limit_s
    next_watch = 0.0
    while any(name != "input" for name in names.values()):
        events = poll.poll(_TICK_MS)
        now = time.monotonic()
        if now >= next_watch:
            next_watch = now + _TICK_MS / 1000
            if watch(texts["err"].decode(errors="replace")):
                texts["status"] = b"-9 -9"
                return texts
            if now > deadline:
                said = " ".join((texts["out"] + texts["err"]).decode(errors="replace").split())
                raise StorageError(f"no end after {limit_s:g} s" + (f": {said[:_SAID]}" if said else ""))
        for fd, _ in events:
            name = names[fd]
            done = False
            try:
                if name == "input":
                    if not waiting:
                        waiting = memoryview(next(chunks, b""))
                    done = not waiting
                    if waiting:
                        waiting = waiting[os.write(fd, waiting) :]
                else:
                    data = os.read(fd, 65536)
                    done = not data
                    texts[name] = (
                        (texts[name] + data)[-_TEXT_LIMIT:] if name == "out" else (texts[name] + data)[:_TEXT_LIMIT]
                    )
            except BlockingIOError:
                continue
            except BrokenPipeError:
                done = True
            if done:
                poll.unregister(fd)
                del names[fd]
                os.close(fd)
    return texts


def _outside(trees: dict[str, int], argv: Sequence[str], filter_argv: Filter, fds: dict[str, int], parent: int) -> None:
    """The first child: leaves the host's namespaces and waits for the second, the jail's init. Never returns."""
    # What our parent left to the collector is the parent's to end: a connection to libvirt, ended here, waits for ever
    # for an answer over descriptors that are closed, or another's.
    gc.disable()
    status = 1
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD, signal.SIGALRM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        # SIGTERM waits until there is somebody to be killed
        signal.pthread_sigmask(signal.SIG_SETMASK, (signal.SIGTERM,))
        os.setsid()
        _keep_only({*trees.values(), *fds.values()} - {-1})
        syscalls.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        syscalls.unshare(
            syscalls.CLONE_NEWNS
            | syscalls.CLONE_NEWPID
            | syscalls.CLONE_NEWNET
            | syscalls.CLONE_NEWIPC
            | syscalls.CLONE_NEWUTS
        )
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            syscalls.die_with_parent()
            _inside(trees, argv, filter_argv, fds)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for fd in fds.values():
            os.close(fd)
        for fd in set(trees.values()) - {-1}:
            os.close(fd)
        status = 0 if os.waitpid(pid, 0)[1] == 0 else 1
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(fds["err"], str(error).encode(errors="replace"))
    finally:
        os._exit(status)


def _keep_only(fds: set[int]) -> None:
    """Close all but these: a lock or a protocol's pipe must not live on in the jail."""
    last = 3
    for fd in sorted(fds):
        os.closerange(last, fd)
        last = fd + 1
    os.closerange(last, _descriptors())
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _descriptors() -> int:
    """Beyond the highest descriptor."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536)


def _inside(trees: dict[str, int], argv: Sequence[str], filter_argv: Filter, fds: dict[str, int]) -> None:
    """The second child, process 1 of the jail: builds the root, runs the two programs, tells how they ended."""
    status = 1
    try:
        _build(trees)
        os.umask(0)
        filter_pid = 0
        stdin = fds["input"]
        if filter_argv:
            middle_r, middle_w = os.pipe()
            _widen(middle_w)
            filter_pid = _start(filter_argv, {0: stdin, 1: middle_w, 2: fds["filter_err"]}, ())
            os.close(middle_w)
            os.close(stdin)
            stdin = middle_r
        pid = _start(argv, {0: stdin, 1: fds["out"], 2: fds["err"]}, _CAPABILITIES)
        for fd in (stdin, fds["out"], fds["err"], fds["filter_err"]):
            os.close(fd)
        ended: dict[int, int] = {}
        while len(ended) < (2 if filter_pid else 1):
            gone, raw = os.waitpid(-1, 0)
            ended[gone] = -os.WTERMSIG(raw) if os.WIFSIGNALED(raw) else os.WEXITSTATUS(raw)
        os.write(fds["status"], f"{ended.get(filter_pid, 0)} {ended[pid]}".encode())
        status = 0
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(fds["err"], traceback.format_exc().splitlines()[-1].encode(errors="replace"))
    finally:
        os._exit(status)


def _start(argv: Filter, streams: dict[int, int], capabilities: tuple[int, ...]) -> int:
    """Fork and execute with these descriptors; without capabilities also as nobody."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for target, source in streams.items():
            os.dup2(source, target)
        if not capabilities:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        syscalls.keep_capabilities(capabilities)
        if not callable(argv):
            os.execvpe(argv[0], list(argv), dict(command.ENVIRONMENT))
        os.closerange(3, _descriptors())  # an end of a pipe kept here would keep the other end waiting
        os._exit(argv())
    except Exception as error:
        name = argv.__module__ if callable(argv) else argv[0]
        os.write(2, f"{name}: {error.strerror if isinstance(error, OSError) else error}".encode())
    finally:
        os._exit(127)
    return 0


def _build(given: dict[str, int]) -> None:
    """Pivot into a root that holds the host's programs, read-only, and the new file system."""
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    links, trees = {}, {}
    null = syscalls.open_tree("/dev/null")
    for path in _DIRECTORIES:
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            trees[path] = syscalls.open_tree(path)
            syscalls.mount_setattr(trees[path], set_=syscalls.ATTR_RDONLY | syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV)
    root = syscalls.mount_detached(
        "tmpfs", "jail", {"size": "64k", "mode": "0755"}, syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV
    )
    syscalls.move_mount(root, "/usr")  # any directory serves as a foothold; this one exists everywhere
    os.chdir("/usr")
    for path, target in links.items():
        os.symlink(target, path[1:])
    for path, tree in trees.items():
        os.mkdir(path[1:])
        syscalls.move_mount(tree, path[1:])
    for path, fd in given.items():
        if fd < 0:
            continue
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.mkdir(path[1:])
        else:
            os.close(os.open(path[1:], os.O_CREAT | os.O_WRONLY, 0o600))
        syscalls.move_mount(fd, path[1:])
    # e2fsprogs ask there whether the device is mounted, and without an answer do not begin
    os.mkdir("etc")
    os.mkdir("dev")
    os.close(os.open("dev/null", os.O_CREAT | os.O_WRONLY, 0o666))
    syscalls.move_mount(null, "dev/null")
    os.close(os.open("etc/mtab", os.O_CREAT | os.O_WRONLY, 0o644))
    syscalls.mount_setattr(root, set_=syscalls.ATTR_RDONLY)
    syscalls.pivot_root(".", ".")
    # The old root lies over the new one now (pivot_root(2), "pivot_root(".", ".")"); nothing but this namespace has it.
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")
    for fd in (root, null, *trees.values(), *given.values()):
        if fd >= 0:
            os.close(fd)
