"""The guard before every start of a container, run by libvirt's hook: HOOK in `root/starts.py`.

libvirt calls it with the domain's XML on stdin just before it starts the container's processes, also when it restarts
a container that rebooted from inside, and gives the start up where the exit code is not 0. What is made safe, and what
is refused, is `targets`; the mark that it leaves is `starts`. Imports no more than a start can afford.
"""

from __future__ import annotations

import os
import sys
from xml.parsers import expat

from onelxc import names
from onelxc.errors import OneLxcError, StorageError, line
from onelxc.root import starts, targets
from onelxc.root.owner import Owner
from onelxc.root.targets import Filesystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SOURCES = ("dir", "file", "dev", "name", "usage", "volume")


class Domain:
    """What of a domain's XML decides where libvirt mounts: its file systems in order, and who root is."""

    def __init__(self, xml: bytes) -> None:
        self.filesystems: list[Filesystem] = []
        self.id_base: int | None = None
        self.users: list[str] = []
        self._path: list[str] = []
        self._now: Filesystem | None = None
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        try:
            parser.Parse(xml, True)
        except expat.ExpatError as error:
            raise StorageError(f"Cannot read the domain's description: {error}") from error

    @property
    def root(self) -> Filesystem | None:
        """The root file system: the first one with this target."""
        return next((each for each in self.filesystems if each.target == "/"), None)

    def _start(self, tag: str, attributes: dict[str, Any]) -> None:
        self._path.append(tag)
        # below <domain>, or <domstatus><domain> in libvirt's own file of a running one
        if self._path[-2:] == ["devices", "filesystem"]:
            self._now = Filesystem(attributes.get("type", "mount"), "", "")
            self.filesystems.append(self._now)
        elif self._now is not None and tag == "source":
            self._now.source = next((attributes[name] for name in _SOURCES if name in attributes), "")
        elif self._now is not None and tag == "target":
            self._now.target = attributes.get("dir", "")
        elif self._path[-2:] == ["idmap", "uid"] and attributes.get("start") == "0":
            self.id_base = int(attributes["target"])
        elif self._path[-2:] in (["os", "inituser"], ["os", "initgroup"]):
            self.users.append("")

    def _text(self, text: str) -> None:
        if self._path[-2:] in (["os", "inituser"], ["os", "initgroup"]):
            self.users[-1] += text

    def _end(self, tag: str) -> None:
        self._path.pop()
        if tag == "filesystem":
            self._now = None


def secure(domain: Domain) -> None:
    """Make the root file system of a domain safe to start from. StorageError where it cannot be."""
    root = domain.root
    if root is None or root.kind != "mount":
        raise StorageError("Cannot start the container: its root file system is not a mounted directory")
    for user in domain.users:
        # by its name libvirt asks the libraries of the container who that is, in its own process
        if not user.startswith("+"):
            raise StorageError(f"Cannot start as {user}: <inituser> and <initgroup> have to be written as +NUMBER")
    targets.secure(root.source, domain.filesystems, Owner(domain.id_base))


def main(argv: list[str]) -> int:
    """`onelxc-guard NAME start begin -`, as libvirt calls a hook. One line on stderr and 1 where it refuses.

    At "started" and "stopped" a start is over: only `named_group` has something to do then.
    """
    vm_id = names.vm_id_of(argv[0]) if argv else None
    operation = argv[1] if argv[1:] else ""
    if vm_id is None or operation not in ("start", "started", "stopped"):
        return 0
    os.umask(0o022)
    try:
        if operation == "start":
            secure(Domain(sys.stdin.buffer.read()))
        if not os.path.isdir("/run/systemd/system"):
            from onelxc.root import named_group

            named_group.at_hook(vm_id, operation)
        if operation == "start":
            starts.mark(vm_id)
    except OneLxcError as error:
        return _refuse(vm_id, str(error))
    except OSError as error:
        return _refuse(vm_id, f"Cannot make its root file system safe: {error.filename}: {error.strerror}")
    except Exception as error:  # a fault of our own must not let it start
        return _refuse(vm_id, f"Cannot make its root file system safe: {type(error).__name__}: {error}")
    return 0


def _refuse(vm_id: int, why: str) -> int:
    starts.tell(f"{names.deploy_id(vm_id)}: not started: {why}")
    sys.stderr.write(line(why) + "\n")
    return 1
