"""Cases that hypothesis makes up: archives, headers of images, templates, and actions in any order on a changing root.

In the short form a handful of each, always the same. In the long one (`tests/run --hostile MINUTES`) rounds with ever
new seeds until the time is over; a failure shows the smallest example found and the command that runs it again.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import itertools
import lzma
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.hostile import archives, disks, roots, values
from tests.hostile.every_action import ACTIONS, Tried
from tests.hostile.witness import CANARY, SECRET_FILE
from tests.support import images

Try = Callable[..., Tried]
MINUTES = float(os.environ.get("ONELXC_HOSTILE_MINUTES", "0"))
SEED = int(os.environ.get("ONELXC_HOSTILE_SEED", "0"))
SHORT, ROUND = 5, 25
"""Examples in the short form, and in one round of the long one."""
GENERATORS = 4
"""They share the time."""

pytestmark = pytest.mark.timeout(0 if MINUTES else 180)


def explored(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], name: str) -> None:
    """`check` on examples of `strategy`: a few, or for as long as this generator's part of the time is."""
    deadline = time.monotonic() + 60 * MINUTES / GENERATORS
    for number in itertools.count(SEED):
        try:
            _round(strategy, check, number, ROUND if MINUTES else SHORT)
        except BaseException:
            print(f"again: ONELXC_HOSTILE_SEED={number} tests/run --hostile {MINUTES:g} -k {name}", file=sys.stderr)
            raise
        if time.monotonic() >= deadline:
            return


def _round(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], number: int, examples: int) -> None:
    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()


# archives

NAMES = st.one_of(
    st.sampled_from(
        [
            "a",
            "a/b",
            "bin",
            "bin/sh",
            "sbin/init",
            "etc",
            "etc/os-release",
            "proc",
            "dev/null",
            ".oldroot",
            "media",
            "rootfs",
            "rootfs/sbin/init",
            "..",
            "../x",
            "/etc/onelxc-evil",
            "../" * 20 + "etc/onelxc-evil",
            ".",
            "./",
            "",
            "a//b",
            "\x1b[2J",
            "out/x",
            CANARY,
            "metadata.yaml",
            "config",
            "context",
            "var/run",
        ]
    ),
    st.text(st.characters(min_codepoint=1, max_codepoint=300), max_size=120),
)
TARGETS = st.sampled_from(
    ["/", "..", "../..", "/etc", CANARY, SECRET_FILE, "/proc/1/root", "a", "self", "media/x", "out", "/.oldroot"]
)
NUMBERS = st.sampled_from([0, 1, -1, 511, 512, 1 << 12, 1 << 16, 1 << 31, 1 << 33, 1 << 62, (1 << 63) - 1])
PAX_KEYS = st.sampled_from(
    [
        "path",
        "linkpath",
        "size",
        "uid",
        "gid",
        "mtime",
        "SCHILY.xattr.user.x",
        "SCHILY.acl.access",
        "GNU.sparse.map",
        "GNU.sparse.size",
        "GNU.sparse.realsize",
        "GNU.sparse.name",
        "hdrcharset",
        "x",
    ]
)


@st.composite
def members(draw: st.DrawFn) -> bytes:
    kind = draw(
        st.sampled_from(
            [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S", b"D", b"V", b"M", b"?"]
        )
    )
    name = draw(NAMES).encode()[:100]
    if kind in (b"x", b"g"):
        records = draw(
            st.dictionaries(
                PAX_KEYS,
                st.one_of(TARGETS.map(str.encode), st.binary(max_size=40), NUMBERS.map(lambda number: b"%d" % number)),
                max_size=3,
            )
        )
        return archives.pax(records, kind)
    data = draw(st.one_of(st.binary(max_size=700), NAMES.map(lambda text: text.encode() + b"\0")))
    size = draw(st.one_of(st.just(len(data)), NUMBERS)) if draw(st.integers(0, 3)) == 0 else len(data)
    head = archives.header(
        name,
        kind,
        size=size,
        link=draw(TARGETS).encode(),
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(st.sampled_from([0, 1000, 65535, 65536, 1 << 31])),
        device=draw(st.sampled_from([(0, 0), (1, 5), (254, 0), (7, 0)])),
    )
    return head + archives.padded(data if size == len(data) or kind == b"0" else b"")


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "bzip2": lambda data: bz2.compress(data, 1),
}


@st.composite
def whole_archives(draw: st.DrawFn) -> bytes:
    parts = [archives.root()] if draw(st.booleans()) else []
    parts += draw(st.lists(members(), max_size=8))
    data = b"".join(draw(st.permutations(parts)))
    data += draw(st.sampled_from([archives.END, b"", bytes(512), bytes(1 << 20)]))
    packed = PACKED[draw(st.sampled_from(list(PACKED)))](data)
    return draw(st.sampled_from([packed, packed + b"rubbish", packed[: len(packed) * 3 // 4]]))


def test_archives(tried: Try) -> None:
    def check(data: bytes) -> None:
        one = tried()
        one.disk(lambda path: path.write_bytes(data), SIZE="64")
        if one.run("deploy").code == 0:
            one.run("exec")
            one.probes()
        one.over()

    explored(whole_archives(), check, "test_archives")


# images

HEADS: dict[str, tuple[Callable[[Path], Path], tuple[tuple[int, int], ...]]] = {
    "ext4": (disks.ext4, ((1024, 264), (2048, 64))),
    "gpt": (disks.gpt, ((446, 66), (512, 92), (1024, 128))),
    "mbr": (lambda path: disks.mbr(path, (0x83, 2048, 20480), (5, 30720, 20480)), ((446, 66),)),
    "qcow2": (lambda path: disks.qcow2(path, backing=CANARY), ((0, 112), (512, 32))),
}
"""An honest image, and (offset, length) of what is worth changing in it."""


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, tuple[tuple[int, bytes], ...]]:
    kind = draw(st.sampled_from(list(HEADS)))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        start, length = draw(st.sampled_from(HEADS[kind][1]))
        offset = start + draw(st.integers(0, length - 1))
        number = draw(st.one_of(NUMBERS, st.integers(0, 255))) % (1 << 64)
        width = draw(st.sampled_from("BHIQ"))
        size = struct.calcsize("<" + width)
        data = struct.pack(draw(st.sampled_from("<>")) + width, number % (1 << 8 * size))
        found.append((offset - offset % size, data))
    return kind, tuple(found)


def test_images(tried: Try) -> None:
    one = tried(images.busybox_ext4())
    one.run("deploy")

    def check(example: tuple[str, tuple[tuple[int, bytes], ...]]) -> None:
        kind, changed = example
        form = "qcow2" if kind == "qcow2" else "raw"
        one.attached(lambda path: disks.edited(HEADS[kind][0](path), *changed), str(example), FORMAT=form, DRIVER=form)

    explored(changes(), check, "test_images")


# templates

WORDS = st.one_of(
    st.sampled_from(values.WORDS), st.text(st.characters(min_codepoint=9, max_codepoint=0x2100), max_size=60)
)


def attributes(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(st.sampled_from(names), WORDS.map(printable_xml), max_size=3)


def printable_xml(text: str) -> str:
    """What OpenNebula's own XML can carry: it would not send more."""
    return "".join(c for c in text if c in "\t\n\r" or 32 <= ord(c) < 0xD800 or 0xE000 <= ord(c) < 0xFFFE)


TEMPLATES = st.fixed_dictionaries(
    {
        "root": attributes(values.DISK_ATTRIBUTES),
        "data": attributes(values.DISK_ATTRIBUTES),
        "nic": attributes(values.NIC_ATTRIBUTES),
        "vm": attributes(values.VM_ATTRIBUTES),
        "user": attributes(values.USER_ATTRIBUTES),
    }
)


def test_templates(tried: Try) -> None:
    def check(example: dict[str, dict[str, str]]) -> None:
        one = tried(images.busybox_ext4(), template=example["vm"], user_template=example["user"])
        one.one.add_disk(images.busybox_ext4(), TARGET="/mnt/data")
        one.one.add_nic("br0")
        for target, key in (
            (one.one.disks[0], "root"),
            (one.one.disks[1], "data"),
            (one.one.template["NIC"][0], "nic"),
        ):
            target.update(example[key])
        if one.run("deploy").code == 0:
            one.run("reboot")
            one.probes()
        one.over()

    explored(TEMPLATES, check, "test_templates")


# actions in any order, on a root that changes in any way

STEPS = st.lists(
    st.one_of(
        st.sampled_from(sorted(set(ACTIONS) - {"reconfigure", "prereconfigure"})),
        st.sampled_from(list(roots.ONCE)).map(lambda name: f"do {name}"),
    ),
    min_size=3,
    max_size=8,
)


@functools.cache
def mood_image(mood: str, directory: Path) -> str:
    return roots.image(directory / f"{list(roots.MOODS).index(mood)}", mood)


def test_sequences(tried: Try, tmp_path: Path) -> None:
    def check(example: tuple[str, list[str]]) -> None:
        mood, steps = example
        one = tried(mood_image(mood, tmp_path))
        one.one.add_nic("br0")
        one.run("deploy")
        for step in steps:
            if step.startswith("do "):
                one.do(roots.ONCE[step[3:]])
            elif step != "detach_nic" or one.one.template["NIC"]:
                one.run(step)
        one.probes()
        one.over()

    explored(st.tuples(st.sampled_from(list(roots.MOODS)), STEPS), check, "test_sequences")
