"""Takes the records of a tar's extended header (pax) apart, and sorts them: what tar restores, what we set ourselves.

Pure. The keys are those of POSIX, GNU tar, star (SCHILY) and libarchive; one that nobody knows is left out and named.
"""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from dataclasses import dataclass, field

from onelxc.root import posixacl

_BLOCK = 512
XATTR, ACL = b"SCHILY.xattr.", b"SCHILY.acl."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_XATTR_MAX = 64 << 10
"""The kernel's XATTR_SIZE_MAX."""
ACCESS = XATTR + b"system.posix_acl_access"
_RAW_ACL = {b"access": ACCESS, b"default": XATTR + b"system.posix_acl_default"}

_TAR = frozenset(
    b"atime comment ctime gid gname linkpath mtime path size uid uname GNU.dumpdir GNU.volume.label".split()
) | {b"GNU.sparse." + word for word in b"name major minor realsize numblocks offset numbytes map size".split()}
"""What GNU tar itself makes something of; ACLs and xattrs apart."""
_EMPTY_WORDS = frozenset(
    b"charset hdrcharset SCHILY.dev SCHILY.ino SCHILY.nlink SCHILY.archtype SCHILY.release SCHILY.volhdr.dumpdate"
    b" LIBARCHIVE.creationtime LIBARCHIVE.symlinktype".split()
)
"""Nothing of a file is lost with these."""
_CANNOT = {
    b"SCHILY.acl.ace": "an NFSv4 ACL, which Linux file systems cannot keep",
    b"SCHILY.realsize": "a sparse file in the form of star",
    b"SCHILY.devmajor": "a device number in the form of star",
    b"SCHILY.devminor": "a device number in the form of star",
    b"SCHILY.offset": "a part of a multi-volume archive",
    b"SCHILY.volno": "a part of a multi-volume archive",
    b"SUN.holesdata": "a sparse file in the form of Solaris",
    b"GNU.volume.filename": "a part of a multi-volume archive",
    b"GNU.volume.size": "a part of a multi-volume archive",
    b"GNU.volume.offset": "a part of a multi-volume archive",
}
_ALSO_GLOBAL = frozenset(b"atime comment ctime gid gname mtime uid uname GNU.volume.label".split())
NOBODY = 0xFFFFFFFF
NOBODYS = f"its owner is {NOBODY}, which Linux takes for no number at all"
_NAMESPACES = (b"user.", b"trusted.", b"security.", b"system.")

Records = list[tuple[bytes, bytes]]
"""Keys and values, in their order: those of sparse files are there more than once."""


class Refused(Exception):
    """The archive cannot be imported; the text says why."""


@dataclass
class Sorted:
    """The records of one member."""

    kept: Records = field(default_factory=list)
    """For tar."""
    deferred: dict[bytes, bytes] = field(default_factory=dict)
    """Attributes to be set when all is unpacked: an xattr by its name, or ACL and which."""
    dropped: list[bytes] = field(default_factory=list)
    """Keys that are left out, and that somebody may miss."""
    changed: bool = False
    """Whether `kept` is not all there was."""

    def xattr_bytes(self) -> int:
        """What the attributes take in a file system, at most."""
        named = [*self.kept, *self.deferred.items()]
        return sum(len(key) + len(value) + 32 for key, value in named if key not in _TAR)


def parse(body: bytes) -> Records:
    """The records of a header: `<length> <key>=<value>` and a newline, length in decimal and of all of it."""
    records: Records = []
    position = 0
    while position < len(body) and body[position]:
        blank = body.find(b" ", position, position + 12)
        digits = body[position:blank] if blank > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        equals = body.find(b"=", blank, end)
        if end > len(body) or equals < 0 or body[end - 1 : end] != b"\n":
            raise Refused("the archive is corrupt: an extended header is malformed")
        records.append((body[blank + 1 : equals], body[equals + 1 : end - 1]))
        position = end
    return records


def sort(records: Records) -> Sorted:
    """What is to be done with each record of a member."""
    found = Sorted()
    keys = {key for key, _ in records}
    for key, value in records:
        if key in (b"uid", b"gid") and value.lstrip(b"0") == b"%d" % NOBODY:
            raise Refused(NOBODYS)
        if key in _TAR:
            found.kept.append((key, value))
        elif key in _EMPTY_WORDS:
            found.changed = True
        elif key in _CANNOT:
            raise Refused(_CANNOT[key])
        elif key.startswith(XATTR):
            _sort_xattr(found, key, value)
        elif key.startswith(_LIBARCHIVE):
            found.changed = True
            name = urllib.parse.unquote_to_bytes(key[len(_LIBARCHIVE) :])
            if XATTR + name not in keys and XATTR + _encoded(name) not in keys:
                _sort_xattr(found, XATTR + _encoded(name), _unbase64(value))
        elif key.startswith(ACL):
            _sort_acl(found, keys, key, value)
        elif key == b"RHT.security.selinux":
            found.changed = True
            if XATTR + b"security.selinux" not in keys:
                found.deferred[b"security.selinux"] = value.rstrip(b"\0") + b"\0"
        else:
            found.changed = True
            found.dropped.append(key)
    return found


def _sort_xattr(found: Sorted, key: bytes, value: bytes) -> None:
    name = key[len(XATTR) :].replace(b"%3D", b"=").replace(b"%25", b"%")
    if len(value) > _XATTR_MAX:
        raise Refused(
            f"its attribute {name.decode(errors='replace')} has {len(value)} bytes, Linux allows {_XATTR_MAX}"
        )
    if not name.startswith(_NAMESPACES):
        found.changed = True
        found.dropped.append(name)
    elif name.startswith((b"trusted.", b"security.")) and name != b"security.capability":
        found.changed = True  # more than tar may do in the jail
        found.deferred[name] = value
    else:
        found.kept.append((key, value))


def _sort_acl(found: Sorted, keys: set[bytes], key: bytes, value: bytes) -> None:
    """As an xattr, which has numbers only; names nobody can look up in the jail, and not before all is unpacked."""
    which = key[len(ACL) :]
    found.changed = True
    if which not in _RAW_ACL:
        found.dropped.append(key)
    elif _RAW_ACL[which] not in keys and value:
        try:
            found.kept.append((_RAW_ACL[which], posixacl.encode(value, {})))
        except posixacl.UnknownName:
            found.deferred[key] = value
        except ValueError as error:
            raise Refused(str(error)) from None


def _encoded(name: bytes) -> bytes:
    return name.replace(b"%", b"%25").replace(b"=", b"%3D")


def _unbase64(value: bytes) -> bytes:
    try:
        return base64.b64decode(value.rstrip(b"=\n") + b"=" * (-len(value.rstrip(b"=\n")) % 4), validate=True)
    except binascii.Error:
        raise Refused("the archive is corrupt: an extended header is malformed") from None


def sort_global(records: Records) -> Sorted:
    """The same for a header that holds for all members behind it: no attributes, and nothing of one file's size."""
    found = sort(records)
    beyond = [*(key for key, _ in found.kept if key not in _ALSO_GLOBAL), *found.deferred]
    if beyond:
        raise Refused(
            f"a global header sets {beyond[0].decode(errors='replace')} for all files, which is not supported"
        )
    return found


def build(header: bytes, records: Records) -> bytes:
    """An extended header like `header` with these records; nothing at all for none."""
    if not records:
        return b""
    body = b"".join(_record(key, value) for key, value in records)
    block = bytearray(header)
    block[124:136] = b"%011o\0" % len(body)
    return summed_up(block) + body + bytes(-len(body) % _BLOCK)


def summed_up(block: bytearray) -> bytes:
    """A header that was changed, with its checksum."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(b"%d" % length):
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest
