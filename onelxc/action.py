"""What is the same in every action: arguments in, one result or one line of error out?

An executable under `remotes/vmm` tells its story as a function of an `Action` and hands it to `main`. Only here do
errors become exit codes: 0 or 1, never 42 (remotes missing, to OpenNebula) and never 255 (ssh failed).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from onelxc import config, errors, request, rootclient
from onelxc.errors import GiveUpError, NoSuchDomainError
from onelxc.model import Vm, deploy_id
from onelxc.report import Report, silence_stdout_of_children

if TYPE_CHECKING:
    from onelxc.template import Policy

REMOTES = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
"""The directory that OpenNebula copied to this host; the package lies in it."""

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Action:
    """One call by OpenNebula, its arguments read."""

    name: str
    request: request.Request
    defaults: config.Defaults
    report: Report

    @property
    def vm_id(self) -> int:
        return self.request.vm_id

    @property
    def domain_name(self) -> str:
        """By the VM's id, not by the deploy id of the arguments: that one is empty when a deploy is cancelled."""
        return deploy_id(self.vm_id)

    def vm(self) -> Vm:
        """The VM as the XML of this call describes it, with the operator's defaults."""
        from onelxc import template  # lxml costs 25 ms, and half of the actions of 3.2.1 have no XML

        vm = template.parse(self.request.xml, self.vm_id, self.request.vm_dir, self.policy())
        for note in vm.notes:
            self.report.info(note)
        return vm

    def policy(self) -> Policy:
        """The operator's defaults and the host's rules."""
        from onelxc import template

        return template.Policy(self.defaults, config.host())

    def host(self) -> rootclient.Session:
        """The root helper's session for this VM; it holds the VM's lock until it is left, and undoes what was not
        committed then."""
        return rootclient.open_session(self.vm_id, self.name, self.report)


def main(name: str, run: Callable[[Action], str | None]) -> NoReturn:
    """Run one action and end the process. `run` gives the result to print, None for nothing."""
    silence_stdout_of_children()
    for number in _SIGNALS:
        signal.signal(number, _give_up)
    report = Report(name, framed=False)
    vm_id: int | None = None
    try:
        front_end = config.front_end(REMOTES)
        report = Report(name, framed=front_end.framed)
        call = request.parse(name, sys.argv, front_end.generation)
        vm_id = call.vm_id
        defaults = config.defaults(REMOTES, front_end.driver)
        report = Report(name, framed=front_end.framed, verbose=defaults.verbose)
        if call.deploy_id not in ("", deploy_id(vm_id)):
            raise NoSuchDomainError(f"Cannot {_words(name)} VM {vm_id}: {call.deploy_id} is not a container of ours")
        result = run(Action(name, call, defaults, report))
        if result is not None:
            report.result(result)
    except Exception as error:
        with contextlib.suppress(OSError):  # nobody listens any more
            report.error(told(name, vm_id, errors.told(error)))
        _end(1)
    _end(0)


def told(action: str, vm_id: int | None, text: str) -> str:
    """An error's text so that it names the VM: `Cannot deploy VM 5: cannot …`."""
    # a path may have the number in it, and names nobody
    if vm_id is None or (not text.startswith("/") and re.search(rf"\b(VM |one-){vm_id}\b", text)):
        return text
    if text.startswith("Cannot "):
        text = "cannot " + text[len("Cannot ") :]
    return f"Cannot {_words(action)} VM {vm_id}: {text}"


def _words(action: str) -> str:
    return {"shutdown": "shut down"}.get(action, action.replace("_", " "))


def _give_up(number: int, _frame: object) -> None:
    """The first signal unwinds, so that everything is undone; more of them must not interrupt the undoing."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise GiveUpError(f"stopped by {signal.Signals(number).name}")


def _end(code: int) -> NoReturn:
    """Without the interpreter's tear-down, which is some milliseconds and nothing else to a process that is done."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
