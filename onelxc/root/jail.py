"""Where are programs run that read what a tenant gave us? In namespaces of their own, on a root that has nothing else.

The archive's names are resolved by tar, as root, with capabilities to chown and mknod. So tar runs where the host is
not: a mount namespace pivoted into an empty read-only root with the host's /usr (read-only), the new file system at
/t and nothing more; no network, no other process, no capability beyond those of a file's attributes. The decompressor
runs beside it without any rights. Each has limits. When the parent dies or gives up, all of it is killed with the pid
namespace's init.
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
_STRANGERS = 0xF0000000
"""The uid of filters is this and their jail's process number: no other process has it, so limits count theirs only."""
_TEXT_LIMIT = 256 << 10
_SAID = 500
_TICK_MS = 200
_F_SETPIPE_SZ = 1031

Program = Union[Sequence[str], Callable[[], int]]
"""A program, or a function of ours that gives its exit code."""


@dataclass(frozen=True)
class Limits:
    """What one process may take at most; None: as much as there is. How long all may take is `limit_s`.

    `memory_bytes` counts heap and private mappings (RLIMIT_DATA), not programs and libraries. `processes` counts
    threads as well; the kernel does not hold root to it, only filters.
    """

    memory_bytes: int | None = None
    cpu_s: int | None = None
    processes: int | None = None
    file_bytes: int | None = None

    def apply(self) -> None:
        """Hold this process, and what it executes, to them."""
        for number, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_DATA, self.memory_bytes),
            (resource.RLIMIT_CPU, self.cpu_s),
            (resource.RLIMIT_NPROC, self.processes),
            (resource.RLIMIT_FSIZE, self.file_bytes),
        ):
            if value is not None:
                resource.setrlimit(number, (value, value))


@dataclass(frozen=True)
class Filter:
    """What runs beside the main program, as a user of its own without rights: stdin → stdout.

    `fds` are descriptors that a function of ours uses besides. `user` is whose files it makes, without rights even so.
    """

    program: Program
    limits: Limits = Limits()
    fds: tuple[int, ...] = ()
    user: int | None = None


@dataclass(frozen=True)
class Ending:
    """How a program ended: its exit code (negative: a signal), and what it wrote on stderr."""

    status: int
    stderr: str


@dataclass(frozen=True)
class Outcome(Ending):
    """How the main program ended, what it wrote on stdout, and how its filters ended."""

    stdout: str
    filters: tuple[Ending, ...] = ()


def unpack(
    mount_fd: int,
    argv: Sequence[str],
    filters: Sequence[Filter],
    source: Iterable[bytes],
    watch: Callable[[str], bool],
    *,
    limit_s: float,
    limits: Limits = Limits(),
    source_fd: int = -1,
) -> Outcome:
    """Run `argv` with the detached mount at TARGET and `source` on its stdin, through the `filters`.

    `source_fd` is another detached mount, seen at SOURCE.

    `watch` is called several times a second with what `argv` wrote on stderr so far. True ends the run at once; what
    it raises (a cancel, no space left) ends it as well and is passed on. Nothing of the jail outlives this call.
    """
    return _run({TARGET: mount_fd, SOURCE: source_fd}, _Main(argv, limits), filters, source, watch, limit_s)


def read(
    filters: Sequence[Filter], source: Iterable[bytes], watch: Callable[[str], bool], *, limit_s: float
) -> tuple[Ending, ...]:
    """Run the filters alone, one behind the other; the last writes what it finds to a descriptor of its own."""
    return _run({}, None, filters, source, watch, limit_s).filters


def alone(program: Filter, *, limit_s: float, mount_fd: int = -1) -> Outcome:
    """Run one filter by itself, which reads what it has descriptors of; with a detached mount at TARGET."""
    return _run({TARGET: mount_fd}, None, [program], (), lambda _: False, limit_s)


def on_device(device: str, argv: Sequence[str], *, limit_s: float, limits: Limits = Limits()) -> Outcome:
    """Run `argv`, which reads or writes a file system, with the block device at DEVICE and nothing else of the host's.

    The device is all that it may open: it runs as a stranger, whose own device node that is.
    """
    try:
        node = os.open(device, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot open {device}: {error.strerror}") from error
    try:
        return _run({DEVICE: node}, None, [Filter(argv, limits)], (), lambda _: False, limit_s)
    finally:
        os.close(node)


@dataclass(frozen=True)
class _Main:
    """The program that runs as root, with the capabilities that a file's attributes need."""

    program: Sequence[str]
    limits: Limits
    fds: tuple[int, ...] = ()


def _run(  # noqa: PLR0917
    places: dict[str, int],
    main: _Main | None,
    filters: Sequence[Filter],
    source: Iterable[bytes],
    watch: Callable[[str], bool],
    limit_s: float,
) -> Outcome:
    """Run in a jail that has these detached mounts (-1: none) at these places."""
    programs: list[Filter | _Main] = [*filters, *([main] if main else [])]
    errors = [f"err{number}" for number in range(len(programs))]
    pipes = {name: os.pipe() for name in ("input", "out", *errors, "status")}
    _widen(pipes["input"][1])
    inner = {name: pair[0] if name == "input" else pair[1] for name, pair in pipes.items()}
    outer = {name: pair[1] if name == "input" else pair[0] for name, pair in pipes.items()}
    pid = os.fork()
    if pid == 0:
        _outside(places, programs, inner, os.getppid())
    for fd in inner.values():
        os.close(fd)
    try:
        texts = _pump(outer, source, watch, limit_s, errors[-1])
    finally:
        _kill(pid)
        for fd in outer.values():
            with contextlib.suppress(OSError):
                os.close(fd)
    said = {name: data.decode(errors="replace") for name, data in texts.items()}
    words = said["status"].split()
    if len(words) != len(programs):
        name = _name(programs[-1].program)
        raise StorageError(f"{name} did not run: {' '.join(said[errors[-1]].split()) or 'it ended without a word'}")
    endings = [Ending(int(word), said[name]) for word, name in zip(words, errors)]
    return Outcome(endings[-1].status, endings[-1].stderr, said["out"], tuple(endings[: len(filters)]))


def _name(program: Program) -> str:
    return str(getattr(program, "__module__", "the filter")) if callable(program) else program[0]


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
    outer: dict[str, int], source: Iterable[bytes], watch: Callable[[str], bool], limit_s: float, watched: str
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
            if watch(texts[watched].decode(errors="replace")):
                texts["status"] = b" ".join(b"-9" for name in texts if name.startswith("err"))
                return texts
            if now > deadline:
                said = " ".join((texts["out"] + texts[watched]).decode(errors="replace").split())
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


def _outside(trees: dict[str, int], programs: Sequence[Filter | _Main], fds: dict[str, int], parent: int) -> None:
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
        _keep_only({*trees.values(), *fds.values(), *(fd for one in programs for fd in one.fds)} - {-1})
        syscalls.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        stranger = _STRANGERS + os.getpid()
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
            _inside(trees, programs, fds, stranger)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for fd in fds.values():
            os.close(fd)
        for fd in set(trees.values()) - {-1}:
            os.close(fd)
        status = 0 if os.waitpid(pid, 0)[1] == 0 else 1
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(fds[f"err{len(programs) - 1}"], str(error).encode(errors="replace"))
    finally:
        os._exit(status)


def _close_others(fds: Iterable[int]) -> None:
    """Close all but these and the three of every process."""
    last = 3
    for fd in sorted(fds):
        os.closerange(last, fd)
        last = fd + 1
    os.closerange(last, _descriptors())


def _keep_only(fds: set[int]) -> None:
    """Close all but these: a lock or a protocol's pipe must not live on in the jail."""
    _close_others(fds)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def _descriptors() -> int:
    """Beyond the highest descriptor."""
    return min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536)


def _inside(trees: dict[str, int], programs: Sequence[Filter | _Main], fds: dict[str, int], stranger: int) -> None:
    """The second child, process 1 of the jail: builds the root, runs the programs, tells how they ended."""
    status = 1
    try:
        _build(trees, stranger)
        os.umask(0)
        stdin = fds["input"]
        pids = []
        for number, one in enumerate(programs):
            if number < len(programs) - 1:
                after, stdout = os.pipe()
                _widen(stdout)
            else:
                after, stdout = -1, fds["out"]
            pids.append(_start(one, {0: stdin, 1: stdout, 2: fds[f"err{number}"]}, stranger))
            os.close(stdin)
            os.close(stdout)
            stdin = after
        for name, fd in fds.items():
            if name.startswith("err"):
                os.close(fd)
        ended: dict[int, int] = {}
        while len(ended) < len(programs):
            gone, raw = os.waitpid(-1, 0)
            ended[gone] = -os.WTERMSIG(raw) if os.WIFSIGNALED(raw) else os.WEXITSTATUS(raw)
        os.write(fds["status"], " ".join(str(ended[pid]) for pid in pids).encode())
        status = 0
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(fds[f"err{len(programs) - 1}"], traceback.format_exc().splitlines()[-1].encode(errors="replace"))
    finally:
        os._exit(status)


def _start(one: Filter | _Main, streams: dict[int, int], stranger: int) -> int:
    """Fork and execute with these descriptors; a filter without rights."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for target, source in streams.items():
            os.dup2(source, target)
        if isinstance(one, Filter):
            user = stranger if one.user is None else one.user
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        syscalls.keep_capabilities(() if isinstance(one, Filter) else _CAPABILITIES)
        one.limits.apply()
        if not callable(one.program):
            os.execvpe(one.program[0], list(one.program), dict(command.ENVIRONMENT))
        _close_others(one.fds)  # an end of a pipe kept here would keep the other end waiting
        os._exit(one.program())
    except BaseException as error:
        cause = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        os.write(2, f"{_name(one.program)}: {cause}".encode())
    finally:
        os._exit(127)
    return 0


def _build(given: dict[str, int], stranger: int) -> None:
    """Pivot into a root that holds the host's programs, read-only, and what is `given`: mounts, or a device's node."""
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    links, trees = {}, {}
    null = syscalls.open_tree("/dev/null")
    for path in _DIRECTORIES:
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            trees[path] = syscalls.open_tree(path)
            syscalls.mount_setattr(trees[path], set_=syscalls.ATTR_RDONLY | syscalls.ATTR_NOSUID | syscalls.ATTR_NODEV)
    seen = {path: os.fstat(fd) for path, fd in given.items() if fd >= 0}
    devices = {path: status for path, status in seen.items() if not stat.S_ISDIR(status.st_mode)}
    nodev = 0 if devices else syscalls.ATTR_NODEV
    root = syscalls.mount_detached("tmpfs", "jail", {"size": "64k", "mode": "0755"}, syscalls.ATTR_NOSUID | nodev)
    syscalls.move_mount(root, "/usr")  # any directory serves as a foothold; this one exists everywhere
    os.chdir("/usr")
    for path, target in links.items():
        os.symlink(target, path[1:])
    for path, tree in trees.items():
        os.mkdir(path[1:])
        syscalls.move_mount(tree, path[1:])
    for path, status in seen.items():
        if path in devices:
            os.mknod(path[1:], stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
            os.chown(path[1:], stranger, stranger)
        else:
            os.mkdir(path[1:])
            syscalls.move_mount(given[path], path[1:])
    # e2fsprogs ask there whether the device is mounted, and without an answer do not begin
    os.mkdir("etc")
    os.mkdir("dev")
    os.close(os.open("dev/null", os.O_CREAT | os.O_WRONLY, 0o666))
    syscalls.move_mount(null, "dev/null")
    os.close(os.open("etc/mtab", os.O_CREAT | os.O_WRONLY, 0o644))
    if devices:  # btrfs-progs ask in /proc/self/mounts
        os.mkdir("proc")
        syscalls.move_mount(syscalls.mount_detached("proc", "proc", {"subset": "pid"}, syscalls.ATTR_RDONLY), "proc")
    syscalls.mount_setattr(root, set_=syscalls.ATTR_RDONLY)
    syscalls.pivot_root(".", ".")
    # The old root lies over the new one now (pivot_root(2), "pivot_root(".", ".")"); nothing but this namespace has it.
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")
    for fd in (root, null, *trees.values(), *given.values()):
        if fd >= 0:
            os.close(fd)
