"""Rules of this project that no linter knows: who may import whom, who may start processes, what is written nowhere."""

from __future__ import annotations

import ast
import os
import re

import pytest

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# A module imports only what stands before it here. A module of the package that is not listed comes after all others
# of its row's end: list it.
ORDER = [
    "onelxc",
    "onelxc.errors",
    "onelxc.report",
    "onelxc.names",
    "onelxc.command",
    "onelxc.model",
    "onelxc.wire",
    "onelxc.optext",
    "onelxc.config",
    "onelxc.request",
    "onelxc.template",
    "onelxc.domainxml",
    "onelxc.hypervisor",
    "onelxc.lifecycle",
    "onelxc.usage",
    "onelxc.monitoring",
]
# `hypervisor` for actions, and the hub's event loop, which has to live in libvirt's own
LIBVIRT_ONLY_IN = {"onelxc.hypervisor", "onelxc.root.events"}


def modules() -> dict[str, str]:
    """Dotted name → path of every module of the package."""
    found = {}
    for directory, _, names in os.walk(os.path.join(REPOSITORY, "onelxc")):
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(directory, name)
                dotted = os.path.relpath(path, REPOSITORY)[:-3].replace(os.sep, ".")
                found[dotted[: -len(".__init__")] if dotted.endswith(".__init__") else dotted] = path
    return found


def imports(path: str, known: dict[str, str]) -> set[str]:
    """Every module that a file imports anywhere, those of the package by their full name."""
    with open(path) as file:
        tree = ast.parse(file.read())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found


def test_one_direction() -> None:
    """No module of the flow imports one that comes after it, and none imports in a circle."""
    known = modules()
    graph = {name: {other for other in imports(path, known) if other in known} for name, path in known.items()}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name in ORDER and other in ORDER and ORDER.index(other) > ORDER.index(name)
    ]
    # below the flow and above it: the helper's side never knows of actions, the flow never of the helper's side
    for name, others in graph.items():
        for other in others:
            if name.startswith("onelxc.root.") and other.startswith(("onelxc.action", "onelxc.rootclient")):
                wrong.append(f"{name} imports {other}")
            if name in ORDER and other.startswith("onelxc.root."):
                wrong.append(f"{name} imports {other}")
    assert not wrong
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, f"a circle: {' → '.join([*way, name])}"
        if name not in done:
            for other in sorted(graph[name] - {name}):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


def test_libvirt_stops_at_one_module() -> None:
    """Its errors are typed where it is imported, so that its errors are typed words everywhere else."""
    known = modules()
    who = {name for name, path in known.items() if {"libvirt", "libvirt_lxc"} & imports(path, known)}
    assert who <= LIBVIRT_ONLY_IN


# Each was looked at for paths that it opens in a running container (docs/decisions/0025-nothing-by-libvirt-inside.md).
# `shutdown` and `reboot` are not here, nor what makes a device node.
LIBVIRT_CALLS = {
    "ID", "UUID", "UUIDString", "XMLDesc", "attachDeviceFlags", "close", "connect", "createXML", "destroy",
    "detachDeviceFlags", "domainEventRegisterAny", "isPersistent", "listAllDomains", "lookupByName", "lookupByUUID",
    "name", "registerCloseCallback", "resume", "sendProcessSignal", "setKeepAlive", "setMemoryParameters",
    "setSchedulerParametersFlags", "state", "suspend",
}  # fmt: skip
# what they are called on: names in those two modules, and calls that give one
LIBVIRT_OBJECTS = {"_handle", "_connection", "connection", "domain", "handle", "now", "connect", "lookupByUUID"}
VIRSH_WORDS = re.compile(r"""VIRSH, "(\w+)"|"lxc:///", "(\w+)\"""")


def test_libvirt_is_asked_for_nothing_but_what_was_looked_at() -> None:
    used = set()
    for name in LIBVIRT_ONLY_IN:
        with open(modules()[name]) as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                of = node.value.func if isinstance(node.value, ast.Call) else node.value
                if {getattr(of, "attr", ""), getattr(of, "id", "")} & LIBVIRT_OBJECTS:
                    used.add(node.attr)
    assert used == LIBVIRT_CALLS
    words = set()
    for path in modules().values():
        with open(path) as file:
            words.update(word for found in VIRSH_WORDS.findall(file.read()) for word in found if word)
    assert words == {"destroy", "uri"}


def test_only_network_interfaces_are_attached_by_libvirt() -> None:
    """Disks and host devices it makes as nodes, at paths inside: those come by our own hand, or at the start."""
    directory = os.path.join(REPOSITORY, "remotes/vmm/lxc")
    calls = []
    for path in [*modules().values(), *(os.path.join(directory, name) for name in os.listdir(directory))]:
        with open(path) as file:
            calls += re.findall(r"\.(?:at|de)tach_device\((.*)\)", file.read())
    assert calls
    assert set(calls) == {"domainxml.render_interface(nic)"}


def test_probes_import_neither_lxml_nor_yaml() -> None:
    """They run every few seconds on every host; the imports of `usage` and `monitoring` are their cost."""
    known = modules()
    for name in ("onelxc.usage", "onelxc.monitoring"):
        reached: set[str] = set()
        waiting = [name] if name in known else []
        while waiting:
            module = waiting.pop()
            for other in imports(known[module], known):
                assert other.split(".")[0] not in ("lxml", "yaml"), f"{name} reaches {other} through {module}"
                if other in known and other not in reached:
                    reached.add(other)
                    waiting.append(other)


# What leaves us may quote a tenant, and passes `errors.line` or `monitoring` there. The jail writes to pipes of ours.
WRITERS = {
    "onelxc.report",
    "onelxc.probe",
    "onelxc.root.check",
    "onelxc.root.cli",
    "onelxc.root.consoles",
    "onelxc.root.guard",
    "onelxc.root.terminal",
}
WRITES = re.compile(r"(?<!\w)print\(|sys\.std(?:out|err)\.(?:buffer\.)?write|traceback\.print")


def test_text_leaves_by_few_doors() -> None:
    who = set()
    for name, path in modules().items():
        with open(path) as file:
            if WRITES.search(file.read()):
                who.add(name)
    assert who == WRITERS


FORBIDDEN = {
    "a path of one machine": re.compile(r"/work/|/home/(?!user\b)[a-z]"),
    # `umount(".")` is the old root after pivot_root, in a namespace of our own: there it hides nothing
    "a lazy umount": re.compile(r"""umount2?\b(?!\("\."|2\("\.").{0,40}(-l\b|MNT_DETACH|--lazy)"""),
    "a shell": re.compile(r"shell\s*=\s*True|os\.system\("),
}
EXEMPT = {
    "tests/lint/test_rules.py",
    "tests/alone",
    "tests/hostile/roots.py",
    ".git",
}  # the last a file in a further work tree of git


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_is_written_nowhere(what: str) -> None:
    found = []
    for directory, names, files in os.walk(REPOSITORY):
        names[:] = [name for name in names if name not in (".git", "__pycache__", ".mypy_cache", "captures")]
        for name in files:
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, REPOSITORY)
            if relative in EXEMPT or relative == ".git":  # of a worktree
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    lines = file.read().splitlines()
            except (UnicodeDecodeError, OSError):
                continue
            found += [f"{relative}:{number}: {line.strip()[:120]}" for number, line in enumerate(lines, 1)
                      if FORBIDDEN[what].search(line)]  # fmt: skip
    assert not found


def test_json_is_read_within_bounds() -> None:
    """By `jsontext`: json.loads has an exception of its own for what is deep. `enter` reads what we wrote."""
    exempt = {"onelxc.jsontext", "onelxc.root.enter"}
    found = []
    for name, path in modules().items():
        with open(path) as file:
            tree = ast.parse(file.read())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("load", "loads")]
        if name not in exempt and any(isinstance(call.value, ast.Name) and call.value.id == "json" for call in calls):
            found.append(name)
    assert not found
