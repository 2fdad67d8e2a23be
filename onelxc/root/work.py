"""What is every module of the helper given for one VM? Its number, its journal, the host's policy, a voice.

Before a module takes anything that outlives the process, it says so:

    taken = work.journal.take("file", path=temporary)
    …make it, use it, rename or remove it…
    work.journal.gave_back(taken)

Kinds and how each is given back: `release.GIVE_BACK`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onelxc.model import VmPaths
from onelxc.root.journal import Journal

if TYPE_CHECKING:
    from onelxc.config import HostConfig


@dataclass(frozen=True)
class Work:
    """One action's work for one VM, under that VM's lock."""

    vm_id: int
    verb: str
    journal: Journal
    config: HostConfig
    log: Callable[[str], None]
    """A line for the log of the action (shown only where the front-end wants INFO lines)."""

    @property
    def paths(self) -> VmPaths:
        return VmPaths(self.vm_id)
