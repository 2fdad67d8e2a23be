"""How does a running container come to its end, or through a reboot, whatever its init and its state?

Policy over `hypervisor`, which knows how each init is asked: ask, ask again at half time, force at the end where that
is allowed. Holds no lock and touches no disk; its callers do that through the root helper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onelxc import wire
from onelxc.errors import HypervisorError, LibvirtGoneError, NoSuchDomainError
from onelxc.hypervisor import IN_HAND_S, REBOOT_SIGNALS, STOP_SIGNALS, Domain, Hypervisor, State
from onelxc.model import Init, Prepared, Vm

Helper = Callable[..., object]
"""Has the helper do a verb, with its arguments: `rootclient.Session.call`."""
_POWER_OFF, _REBOOT = 0, 6
"""Runlevels of sysvinit."""
QUOTED_LINES = 3
STARTS = 4
"""Of one container, when libvirt lets go of it (see `hypervisor`): one in twenty, so that four fail never."""


def wake(domain: Domain, root: Helper) -> None:
    """Let a frozen container go on, whoever froze it, known or forgotten: it hears nothing else."""
    if domain.state() is State.PAUSED:
        domain.resume()
    if domain.alive():
        root("thaw")


def stop(
    domain: Domain, init: Init, root: Helper, *, limit_s: float, force: bool, meanwhile: Callable[[], None]
) -> None:
    """Power off by asking init, and wait until it is gone. Without `force` a container that stays is an error.

    `meanwhile` is called while waiting; what it raises (a cancel came) ends that.
    """
    for _ in range(2):
        _ask(domain, init, root, STOP_SIGNALS, _POWER_OFF)
        if domain.wait_gone(limit_s / 2, meanwhile):
            return
    if not force:
        raise HypervisorError(
            f"Cannot shut down {domain.name}: its init ({init.value}) did not end within {limit_s:g} s"
        )
    domain.end()


def reboot(
    hypervisor: Hypervisor, domain: Domain, init: Init, root: Helper, *, limit_s: float, meanwhile: Callable[[], None]
) -> Domain:
    """Restart by asking init, by force where it knows no reboot, does not come back in time or just ends."""
    xml = domain.xml()
    controller = domain.controller_pid()
    asked = _ask(domain, init, root, REBOOT_SIGNALS, _REBOOT)
    if asked and domain.wait_restarted(controller, limit_s, meanwhile) and domain.in_hand():
        return domain
    return restart(hypervisor, domain, xml)


def _ask(domain: Domain, init: Init, root: Helper, signals: Mapping[Init, int], level: int) -> bool:
    """Ask init in its language; returns at once. False where it has no word for this."""
    if init is Init.SYSVINIT:
        root("telinit", level=level)
        return True
    if init not in signals:
        return False
    domain.signal(signals[init])
    return True


def restart(hypervisor: Hypervisor, domain: Domain, xml: str) -> Domain:
    """End it and start it anew from what is mounted, with the devices it had."""
    domain.end()
    return start(hypervisor, xml, domain.name)


def start(hypervisor: Hypervisor, xml: str, name: str) -> Domain:
    """Create a container and see that it lives. HypervisorError, with nothing left in libvirt, if it does not.

    On a host that is busy libvirt may just be late to know init: each start waits for it twice as long as the last.
    """
    for number in range(STARTS):
        domain = hypervisor.create(xml, name)
        try:
            if not domain.look_again():
                raise HypervisorError(f"Cannot start {name}: its init ended at once")
            if domain.in_hand(IN_HAND_S * 2**number):
                return domain
        except BaseException:
            with contextlib.suppress(HypervisorError):  # the first error is told; the helper ends what is left
                domain.end()
            raise
        domain.end()
    raise HypervisorError(f"Cannot start {name}: libvirt has lost its connection to the container {STARTS} times")


@dataclass(frozen=True)
class Known:
    """What root's record says of a VM. `ours` also where only something left over from it is known; `vm` and `prepared`
    are what it was deployed with, None then; `lost` where its image was deleted under it, or another host has taken it;
    `suspended` where it stands still because its user said so."""

    ours: bool
    vm: Vm | None
    prepared: Prepared | None
    lost: bool
    suspended: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Known:
        """From the helper's answer to `record`."""
        return cls(
            ours=bool(record["ours"]),
            vm=wire.decode(Vm, record["vm"]) if record["vm"] else None,
            prepared=wire.decode(Prepared, record["prepared"]) if record["prepared"] else None,
            lost=bool(record["lost"]),
            suspended=record["paused"] == "suspend",
        )

    @property
    def init(self) -> Init:
        return self.prepared.init if self.prepared else Init.OTHER


def lives_already(hypervisor: Hypervisor, name: str, known: Known) -> bool:
    """Whether a deploy has nothing to do. HypervisorError if the name belongs to a container that is not ours.

    A container whose image was deleted is one of before (a resubmit, whose cancel has not come yet), and so is one
    whose disks another host has had since: they do not count.
    """
    domain = hypervisor.find(name)
    if domain is None:
        return False
    _refuse_foreign(domain, known)
    return domain.alive() and not known.lost


def ours(hypervisor: Hypervisor, name: str, known: Known) -> Domain | None:
    """Our container of that name, None if it has ended and only what it held is left.

    NoSuchDomainError if there is nothing of ours at all, HypervisorError if the name belongs to somebody else.
    """
    domain = hypervisor.find(name)
    if domain is not None:
        _refuse_foreign(domain, known)
    elif not known.ours:
        raise NoSuchDomainError(f"Cannot find {name}: no such container on this host")
    return domain


def ours_alive(hypervisor: Hypervisor, name: str, known: Known) -> Domain:
    """Our running container of that name; NoSuchDomainError if there is none."""
    domain = hypervisor.domain(name)
    _refuse_foreign(domain, known)
    if domain.state() is State.ENDED:
        raise NoSuchDomainError(f"Cannot find {name}: it has ended")
    return domain


@contextlib.contextmanager
def quoting(console: Callable[[], str]) -> Iterator[None]:
    """Complete the error of a container that would not start with the last lines on its console."""
    try:
        yield
    except LibvirtGoneError:
        raise
    except HypervisorError as error:
        said = " / ".join(console().splitlines()[-QUOTED_LINES:])
        if not said:
            raise
        raise type(error)(f"{error}; its console said: {said}", code=error.code) from None


def _refuse_foreign(domain: Domain, known: Known) -> None:
    if not known.ours:
        raise HypervisorError(
            f"Cannot touch {domain.name}: a container of that name, not ours, runs on this host ({domain.uuid()})"
        )
