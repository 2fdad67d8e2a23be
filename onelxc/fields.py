"""What stands at a place of an XML template, and is it what it has to be? Typed looks with errors that name the place.

An element of OpenNebula's XML is a set of attributes: child elements with text. Absent or empty is None or the default;
broken is a TemplateError `VM 24: DISK 2: SIZE is not a number: 'x'`. It knows no attribute by name.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from typing import Any, Union

from lxml import etree

from onelxc.errors import TemplateError

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]

MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")


class Fields:
    """The attributes of one element. `where` begins every error: `VM 24: NIC 0`."""

    def __init__(self, element: Any, where: str) -> None:
        self.element = element
        self.where = where

    def error(self, text: str) -> TemplateError:
        return TemplateError(f"{self.where}: {text}")

    def sub(self, name: str) -> Fields | None:
        """The first child vector of that name, None if there is none."""
        child = self.element.find(name)
        return None if child is None else Fields(child, f"{self.where}: {name}")

    def all(self, name: str, *, most: int = 4096) -> list[Any]:
        """All the child elements of that name, in order."""
        found = list(self.element.findall(name))
        if len(found) > most:
            raise self.error(f"{len(found)} times {name}: {most} at most")
        return found

    def text(self, *names: str, default: str = "") -> str:
        """The first of `names` (paths allowed) that is there and not empty, else `default`."""
        for name in names:
            found = (self.element.findtext(name) or "").strip()
            if found:
                return found
        return default

    def has(self, name: str) -> bool:
        return bool(self.text(name))

    def number(self, name: str, default: float) -> float:
        """A number above 0."""
        text = self.text(name)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            raise self.error(f"{name} is not a number: {text!r}") from None
        if not 0 < value < 1e6:
            raise self.error(f"{name} is out of range: {text!r}")
        return value

    def whole(self, name: str, what: str = "a whole number", *, least: int = 0, most: int = 2**62) -> int | None:
        """A whole number between `least` and `most`, None if nothing is there."""
        text = self.text(name)
        if not text:
            return None
        if not re.match(r"-?[0-9]{1,19}\Z", text):
            raise self.error(f"{name} is not {what}: {text!r}")
        value = int(text)
        if not least <= value <= most:
            limit = f"below {least}" if value < least else f"above {most}"
            raise self.error(f"{name} is {limit}: {text!r}")
        return value

    def yes(self, name: str, default: bool = False) -> bool:
        """YES/NO as OpenNebula takes it: anything else than yes, true and 1 is no."""
        text = self.text(name).lower()
        return text in ("yes", "true", "1") if text else default

    def mac(self, name: str) -> str:
        text = self.text(name).lower()
        if text and not MAC.match(text):
            raise self.error(f"{name} is not a MAC address: {text!r}")
        return text

    def address(self, *names: str, version: int) -> str:
        """An IP address of that version, in its canonical form, or ""."""
        for name in names:
            text = self.text(name)
            if not text:
                continue
            try:
                address: Address = ipaddress.ip_address(text.partition("/")[0])
            except ValueError:
                raise self.error(f"{name} is not an IP address: {text!r}") from None
            if address.version != version:
                raise self.error(f"{name} is not an IPv{version} address: {text!r}")
            return str(address)
        return ""


def parse_xml(data: bytes, where: str) -> Any:
    """The root element of a template, given plain or in base64. No entity is expanded, no network or file opened."""
    text = data.strip()
    if not text:
        raise TemplateError(f"{where}: the template is empty")
    if not text.startswith(b"<"):
        try:
            text = base64.b64decode(text, validate=True).strip()
        except (binascii.Error, ValueError):
            raise TemplateError(f"{where}: the template is neither XML nor base64: {_begin(text)}") from None
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, recover=False)
    try:
        root = etree.fromstring(text, parser)
    except etree.XMLSyntaxError as error:
        raise TemplateError(f"{where}: the template is no XML: {error.msg}: {_begin(text)}") from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise TemplateError(f"{where}: the template has a DOCTYPE, which none of OpenNebula's has")
    return root


def _begin(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))
