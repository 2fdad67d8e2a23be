"""What does only root know of the containers? One question to the root helper, for probes, which hold no session.

`reap` releases everything that dead containers of ours still hold and tells how each VM of ours is; `sample` tells of
the running ones what does not change while they run. Probes ask only when something has changed: sudo writes each call
into the host's log.
"""

from __future__ import annotations

from collections.abc import Mapping

from onelxc import __version__, names
from onelxc.errors import CommandError, HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TIMEOUT_S = 120
"""A reaper may have file systems to flush."""


def ask(verb: str) -> Mapping[str, Any]:
    """The helper's answer to `reap` or `sample`. HelperError if there is none."""
    import json

    from onelxc import command

    argv = [names.HELPER, verb, "--version", __version__]
    try:
        out = command.run(_as_root(argv), timeout_s=TIMEOUT_S, ok=(0, 1), verb="ask the root helper of OneLXC")
    except CommandError as error:
        raise HelperError(f"{error}; has install.sh node been run on this host?") from error
    last = out.decode(errors="replace").strip().rpartition("\n")[2]
    try:
        answer = json.loads(last)
    except ValueError:
        answer = {}
    if isinstance(answer, dict) and isinstance(answer.get("ok"), dict):
        return answer["ok"]  # type: ignore[no-any-return]
    said = answer.get("error") if isinstance(answer, dict) else None
    raise HelperError(str(said or f"Cannot ask the root helper of OneLXC: it said {last[:200]!r}"))


def _as_root(argv: list[str]) -> list[str]:
    import os

    return argv if os.geteuid() == 0 else ["sudo", "-n", *argv]
