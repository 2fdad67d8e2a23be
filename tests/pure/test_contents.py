"""What begins with some bytes, and what a tar's headers say."""

from __future__ import annotations

import struct
import tarfile

import pytest

from onelxc.root import contents, paxheader, posixacl, tarheader


def at(offset: int, mark: bytes) -> bytes:
    return bytes(offset) + mark + bytes(70_000)


@pytest.mark.parametrize("mark", contents._MARKS, ids=lambda mark: f"{mark[1]} at {mark[2]}")
def test_each_mark_is_found(mark: tuple[str, str, int, bytes]) -> None:
    use, name, offset, text = mark
    assert contents.look(at(offset, text)) == contents.Content(use, name)


def test_what_stands_at_the_beginning_counts_before_what_stands_deep_in_a_file() -> None:
    """By chance, in compressed bytes, or on purpose."""
    data = bytearray(at(0, b"\x1f\x8b\x08"))
    data[1080:1082] = b"\x53\xef"
    found = contents.look(bytes(data))
    assert found is not None
    assert found.name == "gzip"


def test_a_hybrid_iso_is_an_iso() -> None:
    data = bytearray(at(32769, b"CD001"))
    data[446:462] = struct.pack("<B3sB3sII", 0x80, b"", 0x17, b"", 64, 1000)
    data[510:512] = b"\x55\xaa"
    found = contents.look(bytes(data))
    assert found is not None
    assert found.name == "an ISO image"


def test_dos_tables() -> None:
    data = bytearray(1024)
    data[510:512] = b"\x55\xaa"
    assert contents.look(bytes(data)) is None, "a boot sector without partitions"
    data[446:462] = struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", 64, 1000)
    found = contents.look(bytes(data))
    assert found is not None
    assert found.name == "DOS partition table"
    data[446] = 0x33
    assert contents.look(bytes(data)) is None


@pytest.mark.parametrize("data", [b"", b"\0", bytes(100_000), b"\xfe" * 600, b"short"])
def test_what_nobody_knows(data: bytes) -> None:
    assert contents.look(data) is None


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_tar_headers(format: int) -> None:
    header = tarfile.TarInfo("name").tobuf(format)[:512]
    assert contents.is_tar_header(header)
    assert tarheader.sums_up(header)
    v7 = bytearray(header)
    v7[257:265] = bytes(8)
    v7[148:156] = b" " * 8
    v7[148:156] = b"%6o\0 " % sum(v7)
    assert contents.is_tar_header(bytes(v7))
    assert tarheader.sums_up(bytes(v7))
    for at_ in (0, 100, 200, 511):
        broken = bytearray(header)
        broken[at_] ^= 1
        assert not contents.is_tar_header(bytes(broken))
        assert not tarheader.sums_up(bytes(broken))
    assert not contents.is_tar_header(bytes(512))
    assert not contents.is_tar_header(header[:511])


@pytest.mark.parametrize(
    "field,number",
    [
        (b"00000001750\0", 1000),
        (b"       1750 ", 1000),
        (b"1750\0\0\0\0\0\0\0\0", 1000),
        (b"77777777777\0", 8**11 - 1),
        (b"\x80" + (1 << 40).to_bytes(11, "big"), 1 << 40),
        (bytes(12), 0),
    ],
)
def test_numbers(field: bytes, number: int) -> None:
    assert tarheader.number(field) == number


@pytest.mark.parametrize(
    "field", [b"00000001780\0", b"x0000001750\0", b"-0000001750\0", b"\xff" * 12, b"+AAAA\0\0\0\0\0\0\0"]
)
def test_what_is_no_number(field: bytes) -> None:
    with pytest.raises(paxheader.Refused):
        tarheader.number(field)


def test_records_are_read_as_they_are_written() -> None:
    records = [(b"path", b"a\nb = c"), (b"GNU.sparse.offset", b"1"), (b"GNU.sparse.offset", b"2"), (b"size", b"9" * 90)]
    header = tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512]
    built = paxheader.build(header, records)
    assert contents.is_tar_header(built[:512])
    assert paxheader.parse(built[512 : 512 + tarheader.number(built[124:136])]) == records
    assert paxheader.build(header, []) == b""


@pytest.mark.parametrize(
    "body", [b"x", b"5 a=\n ", b"99 path=x\n", b"0 a=b\n", b"-7 a=b\n", b"6 ab\n\n", b"6 a=bc", b"99999999999999 a=b\n"]
)
def test_malformed_records(body: bytes) -> None:
    with pytest.raises(paxheader.Refused, match="malformed"):
        paxheader.parse(body)


def test_what_tar_gets_and_what_is_set_afterwards() -> None:
    found = paxheader.sort([
        (b"path", b"d"),
        (b"SCHILY.xattr.user.x", b"1"),
        (b"SCHILY.xattr.trusted.x", b"2"),
        (b"SCHILY.acl.access", b"user::rwx,user:lisa:rwx,group::---,mask::rwx,other::---"),
        (b"SCHILY.acl.default", b"user::rwx,group::---,other::---"),
        (b"SCHILY.dev", b"1"),
        (b"VENDOR.x", b"1"),
    ])  # fmt: skip
    assert [key for key, _ in found.kept] == [b"path", b"SCHILY.xattr.user.x", b"SCHILY.xattr.system.posix_acl_default"]
    assert set(found.deferred) == {b"trusted.x", b"SCHILY.acl.access"}
    assert found.dropped == [b"VENDOR.x"]
    assert found.changed
    assert not paxheader.sort([(b"path", b"d"), (b"mtime", b"1.5")]).changed


def test_acls_are_sorted_as_the_kernel_wants_them() -> None:
    text = b"other::---,mask::rwx,group:9:r--,user:8:r--,user:7:-w-,group::--x,user::rwx"
    raw = posixacl.encode(text, {})
    entries = [struct.unpack_from("<HHI", raw, 4 + 8 * number) for number in range(7)]
    assert [entry[0] for entry in entries] == [1, 2, 2, 4, 8, 16, 32]
    assert [entry[2] for entry in entries if entry[0] == 2] == [7, 8]


@pytest.mark.parametrize("text", [b"user", b"user:x", b"u:1:rwz", b"somebody::rwx", b":::", b"user:1:r"])
def test_what_is_no_acl(text: bytes) -> None:
    with pytest.raises(ValueError):
        posixacl.encode(text, {})


def test_names_in_acls() -> None:
    with pytest.raises(posixacl.UnknownName):
        posixacl.encode(b"user:lisa:rwx", {"group": {"lisa": 1}})
    assert posixacl.encode(b"user:lisa:rwx", {"user": {"lisa": 1}}) == posixacl.encode(b"user:1:rwx", {})
    for number in (b"4294967295", b"99999999999"):
        with pytest.raises(posixacl.UnknownName):
            posixacl.encode(b"user:%s:rwx" % number, {})
