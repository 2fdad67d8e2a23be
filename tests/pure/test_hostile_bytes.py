"""Whatever bytes a tenant or an unprivileged caller sends, a parser of ours reads them or says in one line why not.

Only OneLxcError may come out, within the bounds of memory that the readers state; any other exception is a traceback
to somebody. What programs read is in tests/node/test_limits.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onelxc import errors, jsontext, model, names, wire
from onelxc.config import Generation, HostConfig
from onelxc.errors import HelperError, OneLxcError, TemplateError
from onelxc.model import Disk, IoLimits, Nic, Prepared, Vm
from onelxc.request import Request
from onelxc.root import cli, filesystems, hub_daemon, iso9660, nics, parttable, qcow2, requests, sample, validate
from onelxc.root.journal import Journal
from onelxc.template import Policy, build, parse

quietly = settings(deadline=None, max_examples=150)

DEEP = "[" * 100_000
LONG = "9" * 5000

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=20,
)


@contextlib.contextmanager
def only_one_line() -> Iterator[None]:
    """What comes out may be OneLxcError alone, and its text is short."""
    try:
        yield
    except OneLxcError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000


@contextlib.contextmanager
def within(mebibytes: int) -> Iterator[None]:
    """No more memory than this is taken meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


def image(content: bytes, size: int | None = None) -> int:
    """A descriptor of a file without a name."""
    fd = os.memfd_create("image")
    os.write(fd, content)
    if size is not None:
        os.ftruncate(fd, size)
    return fd


# JSON


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"a":' * 100_000,
        LONG,
        f'{{"n":{LONG}}}',
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e",
        "",
        "\0",
        b"\xff",
        "-" + LONG,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_json_that_is_none_of_ours_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError) as caught:
        jsontext.loads(text)
    assert "RecursionError" not in str(caught.value)


@quietly
@given(st.binary(max_size=200))
@example(DEEP.encode())
@example(b'{"n":' + LONG.encode() + b"}")
def test_a_request_is_an_object_or_an_error(line: bytes) -> None:
    with only_one_line():
        assert isinstance(requests.parse(line), dict)


@quietly
@given(st.sampled_from([Vm, Disk, Nic, Prepared, IoLimits]), st.data())
def test_what_is_no_model_is_an_error(kind: Any, data: st.DataObject) -> None:
    fields = st.sampled_from([field.name for field in kind.__dataclass_fields__.values()])
    value = data.draw(st.dictionaries(fields, JSON, max_size=6) | JSON)
    with only_one_line():
        wire.decode(kind, value)
    with only_one_line():
        validate.vm(value, 5, HostConfig())


@pytest.mark.parametrize(
    "value",
    [[1], {"a": 1}, None, "3", True, 1.5, float("nan"), 10**30, -(10**30), -1, 2**63],
)
def test_a_number_that_a_verb_needs_is_one(value: Any) -> None:
    with pytest.raises(HelperError, match="Cannot read disk_id: "):
        wire.number({"disk_id": value}, "disk_id")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**30, 2**64])
def test_a_number_of_the_model_is_finite_and_has_64_bits(value: float) -> None:
    for name in ("cpu", "memory_kib", "vcpu"):
        with pytest.raises(HelperError, match=f"Cannot read Vm.{name}: (not|no) "):
            wire.decode(Vm, {"vm_id": 5, name: value})


@pytest.mark.parametrize("value", ["\ud800", "a\0b"])
def test_a_text_of_the_model_can_be_told_to_the_kernel(value: str) -> None:
    with pytest.raises(HelperError, match=r"Cannot read Disk.path: (a NUL|no str of ours) in"):
        wire.decode(Disk, {"disk_id": 1, "path": value})


def test_a_list_of_the_model_has_an_end() -> None:
    with pytest.raises(HelperError, match="100000 items"):
        wire.decode(Vm, {"vm_id": 5, "notes": ["x"] * 100_000})


def test_a_line_that_quotes_has_an_end() -> None:
    assert len(str(HelperError("x" * 10**7))) < 2100
    assert len(errors.told(KeyError("x" * 10**7))) < 2200


# requests on a descriptor


def test_zeros_without_end_are_refused() -> None:
    """`onelxc-root reap </dev/zero`, and the same to a session."""
    zeros = os.open("/dev/zero", os.O_RDONLY)
    with within(32), pytest.raises(HelperError, match="longer than 4096 KiB"):
        requests.Lines(zeros).next()
    os.close(zeros)


def test_a_line_that_drips_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"do": "pre')
    with pytest.raises(HelperError, match=r"no end of the line after 0.05 s"):
        requests.Lines(reader, limit_s=0.05).next()
    with pytest.raises(HelperError, match=r"no end of the line after 0.05 s"):
        requests.Lines(reader, limit_s=0.05, patient=False).next()
    os.close(writer)
    os.close(reader)


def test_lines_come_one_by_one_and_half_a_line_is_none() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a\nbb\n\nhalf")
    os.close(writer)
    lines = requests.Lines(reader)
    assert [lines.next() for _ in range(4)] == [b"a", b"bb", b"", None]
    assert lines.rest == b"half"
    os.close(reader)


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=10)
WORDS = st.sampled_from(["session", "5", "deploy", "--version", "--wait", "nan", "inf", "reap", LONG])
ARGUMENTS = st.lists(WORDS | TEXT, max_size=8)


@quietly
@given(ARGUMENTS)
@example(["x"] * 100_000)
@example(["console", f"one-{LONG}"])
@example(["freeze", "one-99999999999999999999"])
def test_any_arguments_of_the_helper_are_answered_in_a_line(argv: list[str]) -> None:
    if argv[:1] in (["check"], ["cache"]):
        return
    environment = dict(os.environ)
    directory = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_one_shot", lambda words, _policy: len(words))
        patch.setattr("os.getuid", lambda: 1000)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(argv)
    os.environ.update(environment)
    os.chdir(directory)
    assert (out.getvalue() + err.getvalue()).count("\n") <= 1
    assert len(out.getvalue() + err.getvalue()) < 5000


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), ValueError("x\ny"), KeyError(5)])
def test_the_helper_ends_no_way_but_with_a_line(error: Exception, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_main", fail)
    assert cli.main(["reap"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["kind"] == "HelperError"
    assert answer["error"].startswith(f"internal error: {type(error).__name__}: ")
    assert cli.main(["check"]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("words", [["--idle-s"], ["--idle-s", "soon"]])
def test_the_hub_ends_in_a_line_as_well(words: list[str], capsys: Any) -> None:
    assert hub_daemon.main(words) == 1
    assert capsys.readouterr().err.count("\n") == 1


# numbers in texts


@pytest.mark.parametrize("text", [LONG, "²", "٣", "", "-1", "+1", "1_0", " 1"], ids=lambda text: text[:9])
def test_what_is_no_number_of_ours(text: str) -> None:
    assert not names.is_number(text)
    assert names.vm_id_of(f"one-{text}") is None
    with pytest.raises(TemplateError):
        Request("resize", Generation.MONITORD, 5, "h", (text,)).number(0, "size")


@pytest.mark.parametrize(
    "text", ["0-4294967295", "5000", "0-99999", "1-", LONG, "a", "1-2-3", "1," * 100_000], ids=lambda text: text[:9]
)
def test_vlans_that_are_none_take_no_memory(text: str) -> None:
    with within(64):
        with contextlib.suppress(TemplateError):
            assert len(model._numbers(text)) <= 4096
        nic = Nic(1, "one-5-1", "br0", guest_name="eth1", vlan_tagged=text)
        with contextlib.suppress(OneLxcError):
            nics.check(5, nic)
            assert len(nic.trunk) <= 4096


def test_vlans_are_counted_once() -> None:
    assert len(model._numbers(",".join(["0-4095"] * 4000))) == 4096
    assert model._numbers("5,3-4,5") == (5, 3, 4)


# templates


ODD = ["", "5", "-1", "nan", "inf", "1e400", LONG, "0-4294967295", "/" + "a/" * 2000, "one", "YES", "\x85", "'", "rbd"]
ADDRESSES = ["10.0.0.1", "fe80::1%x", "255.255.255.0", "/24", "fs", "swap"]
VALUES = st.sampled_from(ODD + ADDRESSES) | st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12)
ATTRIBUTES = {
    "TEMPLATE": ["CPU", "VCPU", "MEMORY", "SWAP", "LXC_SWAP", "VMID", "LXC_UNPRIVILEGED", "LXC_PROFILES"],
    "DISK": ["DISK_ID", "SIZE", "TYPE", "TARGET", "FORMAT", "SOURCE", "DISK_TYPE", "TOTAL_IOPS_SEC", "FS"],
    "NIC": ["NIC_ID", "BRIDGE", "MAC", "IP", "IP6", "NETWORK_MASK", "GATEWAY", "MTU", "VLAN_ID", "VLAN_TAGGED_ID",
            "CVLANS", "INBOUND_AVG_BW", "METHOD", "PREFIX_LENGTH"],
    "PCI": ["ADDRESS", "NIC_ID", "TYPE"],
    "OS": ["INIT", "BOOT", "INIT_ENV", "UUID"],
    "GRAPHICS": ["TYPE", "PORT", "PASSWD"],
    "CONTEXT": ["DISK_ID", "TARGET", "ETH0_MASK"],
    "NUMA_NODE": ["CPUS", "MEMORY_NODE_ID"],
    "RAW": ["TYPE", "DATA"],
}  # fmt: skip


def vector(name: str) -> st.SearchStrategy[tuple[str, dict[str, str]]]:
    return st.tuples(st.just(name), st.dictionaries(st.sampled_from(ATTRIBUTES[name]), VALUES))


def render(attributes: dict[str, str]) -> str:
    from xml.sax.saxutils import escape

    return "".join(f"<{name}>{escape(value)}</{name}>" for name, value in attributes.items())


@quietly
@given(vector("TEMPLATE"), st.lists(st.sampled_from(sorted(ATTRIBUTES)[:-1]).flatmap(vector), max_size=4))
def test_any_template_is_a_vm_or_an_error(
    top: tuple[str, dict[str, str]], vectors: list[tuple[str, dict[str, str]]]
) -> None:
    inner = "".join(f"<{name}>{render(values)}</{name}>" for name, values in vectors)
    text = f"<TEMPLATE>{render(top[1])}<DISK><DISK_ID>0</DISK_ID></DISK>{inner}</TEMPLATE>"
    with only_one_line():
        vm = parse(text.encode(), 5, "/var/lib/one/5", Policy())
        validate.vm(json.loads(json.dumps(model.to_json(vm))), 5, HostConfig())


@quietly
@given(st.binary(max_size=100))
@example(b"<a>" * 100_000)
@example(b"<TEMPLATE>" + b"<a>" * 100_000)
@example(b'<?xml version="1.0" encoding="nonsense"?><a/>')
@example(b"QUFB" * 10_000)
@example(b"<a b='" + b"&x;" * 10)
def test_what_is_no_xml_is_an_error(data: bytes) -> None:
    with only_one_line():
        parse(data, 5, "/x", Policy())


def test_entities_that_grow_are_refused() -> None:
    bomb = '<!DOCTYPE a [<!ENTITY a0 "lol">' + "".join(
        f'<!ENTITY a{number} "{f"&a{number - 1};" * 10}">' for number in range(1, 12)
    )
    for use in ('<TEMPLATE b="&a11;"/>', "<TEMPLATE>&a11;</TEMPLATE>"):
        with within(16), pytest.raises(TemplateError):
            parse(f"{bomb}]>{use}".encode(), 5, "/x", Policy())


@pytest.mark.parametrize("name", ["NIC", "DISK", "PCI", "RAW", "GRAPHICS", "NUMA_NODE"])
def test_a_vector_that_is_there_too_often_is_refused(name: str) -> None:
    text = f"<TEMPLATE><DISK><DISK_ID>0</DISK_ID></DISK>{f'<{name}/>' * 100_000}</TEMPLATE>"
    with pytest.raises(TemplateError, match=f"10000[01] times {name}"):
        parse(text.encode(), 5, "/x", Policy())


@pytest.mark.parametrize("target", ["/a" * 1500, "/" + "a" * 5000, "/a" * 100], ids=len)
def test_a_target_too_deep_for_a_path_is_refused(target: str) -> None:
    with pytest.raises(OneLxcError, match="too long, or too deep"):
        validate.vm({"vm_id": 5, "disks": [{"disk_id": 1, "path": "/x", "target": target}]}, 5, HostConfig())


@pytest.mark.parametrize(
    "field", [{"size_mb": 2**62}, {"size_mb": 0}, {"size_mb": -1}, {"disk_id": -1}, {"disk_id": 2**40}]
)
def test_a_disk_has_numbers_that_a_disk_can_have(field: dict[str, int]) -> None:
    disk = {"disk_id": 1, "path": "/x", **field}
    with pytest.raises(HelperError, match=r"DISK_IDs are not|not a size"):
        validate.vm({"vm_id": 5, "disks": [disk]}, 5, HostConfig())


# images


def qcow2_header(**fields: int) -> bytes:
    values = {"version": 3, "offset": 0, "length": 0, "bits": 16, "crypt": 0, "features": 0, "header": 104, **fields}
    head = struct.pack(">4sIQII", b"QFI\xfb", values["version"], values["offset"], values["length"], values["bits"])
    head = head.ljust(32, b"\0") + struct.pack(">I", values["crypt"])
    return (
        head.ljust(72, b"\0")
        + struct.pack(">Q", values["features"]).ljust(28, b"\0")
        + struct.pack(">I", values["header"])
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"offset": 2**63, "length": 10},
        {"offset": 2**64 - 1, "length": 10},
        {"offset": 1 << 40, "length": 10},
        {"offset": 512, "length": 2**32 - 1},
        {"offset": 512, "length": 10, "bits": 2**32 - 1},
        {"offset": 512, "length": 10, "bits": 0},
        {"offset": 512, "length": 10, "header": 2**32 - 1},
        {"offset": 3 << 20, "length": 10, "bits": 21},
    ],
)
def test_a_qcow2_header_leads_nowhere(fields: dict[str, int]) -> None:
    fd = image(qcow2_header(**fields).ljust(4096, b"\1"))
    with within(8), pytest.raises(OneLxcError, match=r"header is damaged|does not say what the image behind it"):
        qcow2._header(fd, "disk.0")
    os.close(fd)


def test_the_extensions_of_a_qcow2_header_have_an_end() -> None:
    """A gigabyte of extensions of length 0 would be read one by one."""
    fd = image(qcow2_header(offset=1 << 30, length=10, bits=21) + b"\0\0\0\1\0\0\0\0" * 100_000, 2 << 30)
    with pytest.raises(OneLxcError, match=r"header is damaged"):
        qcow2._header(fd, "disk.0")
    os.close(fd)


@quietly
@given(st.binary(max_size=160), st.integers(0, 4096))
def test_any_qcow2_header_is_read_or_refused(tail: bytes, size: int) -> None:
    fd = image((b"QFI\xfb\0\0\0\3" + tail).ljust(size, b"\2"))
    with only_one_line():
        qcow2._header(fd, "disk.0")
    os.close(fd)


def gpt(size: int, **fields: int) -> bytes:
    """A disk with a GPT whose checksums are right, whatever its numbers are."""
    values = {"at": 2, "count": 128, "each": 128, "length": 92, "first": 2048, "last": 4096, **fields}
    entries = struct.pack("<16s16sQQ", b"k" * 16, b"u" * 16, values["first"], values["last"]).ljust(
        values["count"] * values["each"] % (1 << 21), b"\0"
    )
    entries = entries[: values["count"] * values["each"] % (1 << 21)]
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, values["length"], 0, 0, 1, 0, 34, 4096, b"g" * 16,
        values["at"], values["count"], values["each"], zlib.crc32(entries))  # fmt: skip
    head = head[:16] + struct.pack("<I", zlib.crc32(head[: values["length"]])) + head[20:]
    mbr = bytes(446) + struct.pack("<8sII", b"\0\0\0\0\xee", 1, 100) + bytes(48) + b"\x55\xaa"
    return (mbr + head.ljust(512, b"\0") + entries).ljust(size, b"\0")


SMALL = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 127, 128, 129, 2**31, 2**32 - 1, 2**63, 2**64 - 1])


@quietly
@given(SMALL, SMALL, st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 128, 256, 512, 2**32 - 128]), SMALL)
def test_any_gpt_is_read_or_refused(first: int, last: int, count: int, each: int, at: int) -> None:
    fd = image(gpt(1 << 16, first=first, last=last, count=count, each=each, at=at))
    with only_one_line():
        found = parttable.read(fd)
        assert len(found) <= 128
    os.close(fd)


@quietly
@given(st.binary(max_size=64), st.integers(512, 8192), st.sampled_from([0xEE, 5, 15, 0x83]))
def test_any_partition_table_is_read_or_refused(rows: bytes, size: int, kind: int) -> None:
    mbr = bytearray(rows.rjust(510, b"\0") + b"\x55\xaa")
    mbr[446 + 4] = kind
    fd = image(bytes(mbr), size)
    with only_one_line():
        found = parttable.read(fd)
        assert len(found) <= 128
        for one in found:
            parttable.enlarge(fd, one)
    os.close(fd)


def test_a_chain_of_tables_that_leads_to_itself_ends() -> None:
    extended = struct.pack("<8sII", b"\0\0\0\0\x05", 1, 100)
    table = bytes(446) + extended + bytes(48) + b"\x55\xaa"
    fd = image(table + bytes(446) + extended * 4 + b"\x55\xaa", 1 << 20)
    assert len(parttable.read(fd)) < 128
    os.close(fd)


def test_more_partitions_than_anybody_has_are_refused() -> None:
    each = struct.pack("<16s16sQQ", b"k" * 16, b"u" * 16, 2048, 4096).ljust(128, b"\0")
    entries = each * 8192
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, 0, 34, 4096, b"g" * 16, 2, 8192, 128,
        zlib.crc32(entries))  # fmt: skip
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    mbr = bytes(446) + struct.pack("<8sII", b"\0\0\0\0\xee", 1, 100) + bytes(48) + b"\x55\xaa"
    fd = image(mbr + head.ljust(512, b"\0") + entries, 4 << 20)
    with pytest.raises(OneLxcError, match="more than 128 partitions"):
        parttable.read(fd)
    os.close(fd)


@quietly
@given(st.binary(max_size=2048), st.integers(0, 4096))
def test_any_superblock_is_read_or_refused(tmp_path_factory: Any, content: bytes, size: int) -> None:
    fd = image(bytes(1024) + content[:0x38] + b"\x53\xef" + content[0x38:], size)
    path = f"/proc/self/fd/{fd}"
    for look in (filesystems.ext_bytes, filesystems.ext_is_clean):
        with only_one_line():
            look(path)
    for kind in ("xfs", "btrfs", "ext4"):
        with only_one_line():
            filesystems.own_bytes(path, kind)
    os.close(fd)


# files of ours that may be damaged, and of the tenant's


DAMAGED = [
    DEEP.encode(),
    b'{"n":' + LONG.encode() + b"}",
    b'{"n":[1],"take":"x"}',
    b'{"n":"x","take":5}',
    b'{"commit":{}}',
    b'{"commit":1e400}',
    b'{"n":1,"take":"mount","by":[]}',
    b'{"n":{},"gone":true}',
    b'{"n":true,"gone":true}',
]


@quietly
@given(st.lists(st.binary(max_size=60) | st.sampled_from(DAMAGED)))
@example(DAMAGED)
def test_any_journal_is_read(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "journal"
    path.write_bytes(b"\n".join(lines))
    with only_one_line():
        Journal(str(path), "reap").held()


@quietly
@given(st.text(max_size=200) | st.just("ID='" + "x" * 20_000))
def test_any_os_release_is_read(text: str) -> None:
    assert all(len(value) <= 64 for value in sample.parse_release(text).values())


def test_the_templates_root_is_not_looked_for_in_vain() -> None:
    from lxml import etree

    with only_one_line():
        build(etree.fromstring(b"<VM/>"), 5, "/x", Policy())


# ISO images


def iso(records: bytes, *, block: int = 2048, extent: int = 18, size: int = 2048) -> bytes:
    """An image whose root directory has these records."""
    root = struct.pack("<BBIIII", 34, 0, extent, 0, size, 0).ljust(32, b"\0") + b"\1\0"
    head = bytearray(2048)
    head[:6] = b"\x01CD001"
    head[128:130] = struct.pack("<H", block)
    head[156:190] = root
    return bytes(16 * 2048) + bytes(head) + bytes(2048) + records.ljust(2048, b"\0")


def record(name: bytes, extent: int = 18, size: int = 2048, flags: int = 0, more: bytes = b"") -> bytes:
    body = bytearray(33) + name + (b"" if len(name) % 2 else b"\0") + more
    body[0] = len(body) & 0xFF
    body[2:6], body[10:14] = struct.pack("<I", extent), struct.pack("<I", size)
    body[25], body[32] = flags, len(name)
    return bytes(body)


OWN = record(b"\0") + record(b"\1")


@pytest.mark.parametrize(
    "records",
    [
        OWN + record(b"loop", flags=2),
        OWN + record(b"big", size=2**32 - 1),
        OWN + record(b"away", extent=2**32 - 1),
        OWN + record(b"x", more=b"CE\x1c\1" + struct.pack("<QQQ", 18, 0, 2048)) * 20,
        OWN + record(b"a/b"),
        OWN + record(b".."),
        OWN + record(b"x" * 10, more=b"NM\0\1"),
        b"\xff" * 2048,
        b"",
    ],
)
def test_directories_of_an_iso_that_loop_or_lie_are_refused(records: bytes) -> None:
    fd = image(iso(records))
    with within(16), only_one_line():
        for entry in iso9660.Iso(fd).entries():
            for piece in iso9660.Iso(fd).content(entry):
                assert len(piece) <= 1 << 20
    os.close(fd)


@quietly
@given(st.binary(max_size=300), SMALL, SMALL, st.sampled_from([0, 1, 512, 2048, 65535]))
def test_any_iso_is_read_or_refused(records: bytes, extent: int, size: int, block: int) -> None:
    fd = image(iso(OWN + records, block=block, extent=extent % 2**32, size=size % 2**32))
    with only_one_line():
        list(iso9660.Iso(fd).entries())
    os.close(fd)
