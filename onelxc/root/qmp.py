"""How is a running daemon of QEMU's told something? By its monitor, a line of JSON there and one back.

Source: docs/interop/qmp-spec of QEMU. Events are passed over.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from onelxc import jsontext
from onelxc.errors import StorageError

_ANSWER_S = 60.0
_LONGEST = 1 << 20
"""A line that is longer ends in the middle, and is no JSON."""


class Monitor:
    """A conversation over the unix socket at `path`; one at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_S)
        try:
            self._socket.connect(path)
            self._lines = self._socket.makefile("rb")
        except OSError as error:
            self._socket.close()
            raise StorageError(f"Cannot reach the daemon at {path}: {error.strerror}") from error

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """What the command returns; `_` in the names of arguments stands for `-`. StorageError with QEMU's words."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
            while line := self._lines.readline(_LONGEST):
                answer = jsontext.loads(line)
                if "error" in answer:
                    raise StorageError(f"Cannot {command}: {answer['error'].get('desc')}")
                if "return" in answer:
                    return answer["return"]
        except (OSError, ValueError) as error:
            raise StorageError(f"Cannot {command}: the daemon at {self.path}: {error}") from error
        raise StorageError(f"Cannot {command}: the daemon at {self.path} has ended")

    def __enter__(self) -> Monitor:
        self.execute("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()
