"""What does only root know of the containers? One question to the root helper, for probes, which hold no session.

`reap` releases everything that dead containers of ours still hold and tells how each VM of ours is; `sample` tells of
the running ones what does not change while they run. Probes ask only when something has changed: sudo writes each call
into the host's log, and the modules for it take as long to import as all the rest of a probe.
"""

from __future__ import annotations

from collections.abc import Mapping

from onelxc.errors import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def ask(verb: str) -> Mapping[str, Any]:
    """The helper's answer to `reap` or `sample`. HelperError if there is none."""
    from onelxc import rootclient

    answer = rootclient.one_shot(verb)
    if not isinstance(answer, dict) or "vms" not in answer:
        raise HelperError(f"Cannot understand the root helper's answer to {verb}")
    return answer
