"""What does OpenNebula want? argv and stdin of one executable, as both generations write them, into a frozen Request.

Source of the shapes: src/vmm_mad/exec/one_vmm_exec.rb at release-3.2.1 and release-7.4.0, and what both were seen to
send. It reads no XML (`template` and `actiondata` do) and decides nothing. Descriptor 0 is touched only where something
is known to come: 3.2.1 leaves it open for ever in most actions, and whoever reads it then hangs.
"""

from __future__ import annotations

import os
import posixpath
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onelxc.config import Generation
from onelxc.errors import TemplateError
from onelxc.names import is_number

STDIN_LIMIT_S = 60.0
STDIN_LIMIT_BYTES = 16 << 20
"""As much as OpenNebula keeps of a VM (MEDIUMTEXT)."""


@dataclass(frozen=True)
class Request:
    """One call. `arguments` is what is the action's own: argv without the program, the VM's id and the host."""

    action: str
    generation: Generation
    vm_id: int
    host: str
    arguments: tuple[str, ...] = ()
    xml: bytes = b""

    @property
    def deploy_id(self) -> str:
        """The domain's name as oned knows it, "" if it knows none yet.

        3.2.1 leaves an empty one out altogether, so that the host stands in its place, and writes "-" for the id of
        a deploy that printed nothing.
        """
        arguments = self.arguments
        if self.action in ("deploy", "exec", "exec_cancel"):
            return ""
        if self.action == "restore":
            return arguments[2] if self.generation is Generation.MONITORD and len(arguments) > 2 else ""
        others = {"save": 2, "migrate": 2}.get(self.action, 1)
        if self.generation is Generation.PULL and len(arguments) <= others:
            return ""
        name = arguments[0] if arguments else ""
        return "" if name in ("-", self.host) else name

    @property
    def vm_dir(self) -> str:
        """The directory of the VM's disks, where argv names a file in it; else ""."""
        place = {"deploy": 0, "restore": 0, "save": 1, "attach_disk": 1, "detach_disk": 1, "reconfigure": 2}
        index = place.get(self.action)
        if index is None or index >= len(self.arguments):
            return ""
        path = self.arguments[index]
        return clean_path(posixpath.dirname(path)) if path.startswith("/") else ""

    def argument(self, index: int, what: str) -> str:
        """One of the action's own arguments. TemplateError if oned gave too few."""
        if index >= len(self.arguments):
            raise TemplateError(f"Cannot {self.action} VM {self.vm_id}: no {what} in the arguments")
        return self.arguments[index]

    def number(self, index: int, what: str) -> int:
        """One of the action's own arguments that has to be a whole number."""
        text = self.argument(index, what)
        if not is_number(text):
            raise TemplateError(f"Cannot {self.action} VM {self.vm_id}: the {what} is not a number: {text!r}")
        return int(text)


def parse(
    action: str,
    argv: Sequence[str],
    generation: Generation,
    read: Callable[[], bytes] | None = None,
) -> Request:
    """The request of `argv` (program first). `read` gives stdin; it is called only where XML comes."""
    arguments = list(argv[1:])
    first = action in ("exec", "exec_cancel") and generation is Generation.MONITORD
    if len(arguments) < 2:
        raise TemplateError(f"Cannot {action}: VM id and host expected: {' '.join(arguments) or 'no arguments'}")
    number, host = arguments[:2] if first else arguments[-2:]
    if not is_number(number):
        raise TemplateError(f"Cannot {action}: not the id of a VM: {number!r}")
    comes = generation is Generation.MONITORD or action == "deploy"
    return Request(
        action=action,
        generation=generation,
        vm_id=int(number),
        host=host,
        arguments=tuple(arguments[2:] if first else arguments[:-2]),
        xml=(read or read_stdin)() if comes else b"",
    )


def clean_path(path: str) -> str:
    """oned writes `/var/lib/one//datastores`: one slash, no dots."""
    return posixpath.normpath("/" + path.lstrip("/")) if path.startswith("/") else posixpath.normpath(path)


def read_stdin(fd: int = 0, limit_s: float = STDIN_LIMIT_S) -> bytes:
    """All of stdin, with a limit: a stream that never ends must not hold the host's other actions."""
    deadline = time.monotonic() + limit_s
    parts: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise TemplateError(f"Cannot read the VM's template: no end of it on stdin after {limit_s:g} s")
        part = os.read(fd, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > STDIN_LIMIT_BYTES:
            raise TemplateError(f"Cannot read the VM's template: more than {STDIN_LIMIT_BYTES >> 20} MiB on stdin")
