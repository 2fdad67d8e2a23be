"""What may be asked of root? The one program that sudo allows to oneadmin: arguments in, JSON lines out.

    onelxc-root session <vm id> <action> --version X [--started SECONDS] [--wait SECONDS]    requests on stdin
    onelxc-root <one-shot verb> --version X                        one request, or none, on stdin
    onelxc-root version
    onelxc-root check [USER]                                       for people: what is missing here
    onelxc-root cache list|empty                                   for people: imported images
    onelxc-root freeze|thaw one-<vm id>                            for lxc-freeze and lxc-unfreeze
    onelxc-root console one-<vm id>                                for people: its console, through the hub
    onelxc-root refresh one-<vm id>                                for the hub, after a reboot from inside
    onelxc-root attend one-<vm id>                                 for the hub, when another host has or wants its disks

`--started` is when the caller began, in seconds since boot; `--wait` how long it waits for another action to end.

Nothing of the caller's environment is used, and no code outside the directory that this package lies in.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from math import inf
from typing import TYPE_CHECKING, Any

from onelxc import __version__, command, errors, names
from onelxc.errors import HelperError, OneLxcError
from onelxc.model import VmPaths
from onelxc.root import requests
from onelxc.root.verbs import ANY_VERSION, ONE_SHOT

if TYPE_CHECKING:
    from onelxc.config import HostConfig

LOCK_S = 120.0
"""How long an action waits for the one before it, unless its caller says."""
LONGEST_REQUEST = 64 << 10
REQUEST_S = 10.0
"""Of the one line that a one-shot verb reads."""
_BY_NAME = ("freeze", "thaw", "console", "refresh", "attend")
_ACTION = re.compile(r"[a-z][a-z_]{1,30}")


def main(argv: list[str]) -> int:
    """Do what is asked; the exit code. Whatever goes wrong is one line, of JSON where a program has asked."""
    for_people = argv[:1] == ["cache"] or (len(argv) <= 2 and argv[:1] in (["check"], *([word] for word in _BY_NAME)))
    try:
        status = _main(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        status = 1  # whoever asked has gone
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        status = 1
        if for_people:
            print(errors.told(error), file=sys.stderr)
        else:
            kind = type(error).__name__ if isinstance(error, OneLxcError) else "HelperError"
            _say({"error": errors.told(error), "kind": kind})
    _hear_nobody()
    return status


def _main(argv: list[str]) -> int:
    os.environ.clear()
    os.environ.update(command.ENVIRONMENT)
    os.umask(0o022)
    os.chdir("/")
    if argv == ["version"]:
        print(__version__)
        return 0
    if argv[:1] == ["check"] and len(argv) <= 2:
        from onelxc.root import check

        return check.main(argv[1] if len(argv) > 1 else "")
    if argv[:1] == ["cache"]:
        return _cache(argv[1:])
    if len(argv) == 2 and argv[0] in _BY_NAME:
        _by_name(*argv)
        return 0
    words, options = _parse(argv)
    if words[:1] not in ([verb] for verb in ANY_VERSION):
        _check_version(options.get("version"))
    from onelxc import config

    policy = config.host()
    if words[:1] == ["session"]:
        from onelxc.root.session import Session

        vm_id, verb = _session_words(words)
        return Session(vm_id, verb, policy, _number(options, "wait", LOCK_S)).serve(_number(options, "started", inf))
    if os.getuid() != 0:
        raise HelperError("Cannot run the root helper: not root")
    return _one_shot(words, policy)


def _by_name(verb: str, name: str) -> None:
    """The verbs that are no action of OpenNebula's: for shims, people and the hub."""
    from onelxc import config
    from onelxc.root import terminal

    vm_id = names.vm_id_of(name)
    if vm_id is None:
        raise HelperError(f"Cannot {verb} {name!r}: no container of ours")
    if os.getuid() != 0:
        raise HelperError(f"Cannot {verb} {name}: not root")
    if verb == "console":
        terminal.attach(vm_id)
    else:
        _locked(verb, vm_id, config.host())


def _cache(words: list[str]) -> int:
    """The import cache, for people. To empty it costs time at most, so that oneadmin may as well."""
    from onelxc import config
    from onelxc.root import cache

    policy = config.host()
    print(cache.main(words, policy.cache_path, policy.cache_max_mb))
    return 0


def _locked(verb: str, vm_id: int, policy: HostConfig) -> None:
    """Freezing: OpenNebula copies the disks of a running container, which stands still meanwhile and is reported as
    running. Refreshing: what libvirt does not keep over a reboot is put back."""
    from onelxc.root import freezer, lock, refresh
    from onelxc.root.journal import Journal
    from onelxc.root.work import Work

    held = lock.acquire(vm_id, verb, timeout_s=LOCK_S, log=lambda _text: None)
    journal = Journal(VmPaths(vm_id).journal, verb)
    work = Work(vm_id, verb, journal, policy, lambda text: print(errors.line(text), file=sys.stderr))
    try:
        if verb == "refresh":
            refresh.refresh(work)
        elif verb == "attend":
            from onelxc.root import fence

            fence.attend(work)
        else:
            function = freezer.verb_freeze if verb == "freeze" else freezer.verb_thaw
            function(work, {"why": freezer.SNAPSHOT})
    finally:
        journal.close()
        held.release()


def _one_shot(words: list[str], policy: Any) -> int:
    if len(words) != 1 or words[0] not in ONE_SHOT:
        raise HelperError(f"Cannot run the root helper: unknown verb {' '.join(words)!r}")
    # people at a terminal have no request to make
    text = b""
    if not os.isatty(0):
        lines = requests.Lines(0, longest=LONGEST_REQUEST, limit_s=REQUEST_S, patient=False)
        text = lines.next() or lines.rest
    request = requests.parse(text) if text.strip() else {}
    module, function = ONE_SHOT[words[0]]
    verb = getattr(importlib.import_module(module), function)
    _say({"ok": verb(policy, request, lambda text: _say({"log": errors.line(text)}))})
    return 0


def _parse(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    words: list[str] = []
    options: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        if word in ("--version", "--started", "--wait"):
            options[word[2:]] = next(rest, "")
        elif word.startswith("-"):
            raise HelperError(f"Cannot run the root helper: unknown option {word!r}")
        else:
            words.append(word)
    return words, options


def _check_version(theirs: str | None) -> None:
    if theirs != __version__:
        raise HelperError(
            f"Cannot use the root helper: the driver is version {theirs or 'unknown'}, the helper of this host is"
            f" {__version__}; run `install.sh node` of the driver's version on this host"
        )


def _session_words(words: list[str]) -> tuple[int, str]:
    if len(words) != 3 or not _ACTION.fullmatch(words[2]):
        raise HelperError(f"Cannot run the root helper: not `session <vm id> <action>`: {' '.join(words)!r}")
    # as OpenNebula writes it: no sign, no leading zero, and a number that fits its own column
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", words[1]):
        raise HelperError(f"Cannot run the root helper: not a VM id: {words[1]!r}")
    if os.getuid() != 0:
        raise HelperError("Cannot run the root helper: not root")
    return int(words[1]), words[2]


def _number(options: dict[str, str], name: str, default: float) -> float:
    """An option's seconds; nan compares with nothing, so it is none."""
    try:
        value = float(options.get(name, default))
    except ValueError:
        return default
    return value if value >= 0 else default


def _say(message: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # nobody listens any more; what was begun is finished all the same
        _hear_nobody()


def _hear_nobody() -> None:
    """What is left to be written goes nowhere, without another error at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
