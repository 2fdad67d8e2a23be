"""How does a piece of libvirt XML from an administrator get into a domain? Element by element, by a few rules.

A fragment is one or more elements as they stand below `<domain>` (`<features>…</features><devices>…</devices>`), or a
whole `<domain>`. Rules, the same on every level:

* an element that may stand several times (devices, initarg, namespaces …) is added;
* any other that is there already is merged: attributes of the fragment win, its children follow these rules;
* text of the fragment replaces the text.

What names the domain or lets it out of what we made of it (name, uuid, idmap, privnet) cannot be changed.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from onelxc.errors import ConfigurationError

NAMESPACES = {"lxc": "http://libvirt.org/schemas/domain/lxc/1.0"}
MANY = frozenset(
    ("filesystem", "interface", "disk", "hostdev", "console", "initarg", "initenv", "device", "route", "ip")
)
OURS = frozenset(("name", "uuid", "idmap"))


def merge(domain: Element, fragments: tuple[str, ...], where: str) -> Element:
    """`domain` with the fragments in it, the later over the earlier; ConfigurationError names the one that is wrong."""
    for prefix, uri in NAMESPACES.items():
        ElementTree.register_namespace(prefix, uri)
    for text in fragments:
        for element in _elements(text, where):
            if element.tag in OURS:
                raise ConfigurationError(f"{where}: a fragment cannot change <{element.tag}>: {_begin(text)}")
            _merge_into(domain, element)
    return domain


def _merge_into(parent: Element, new: Element) -> None:
    old = None if new.tag in MANY else parent.find(new.tag)
    if old is None:
        parent.append(new)
        return
    old.attrib.update(new.attrib)
    if new.text and new.text.strip():
        old.text = new.text.strip()
    for child in new:
        _merge_into(old, child)


def _elements(text: str, where: str) -> list[Element]:
    if re.search(r"<!(DOCTYPE|ENTITY)", text):
        raise ConfigurationError(f"{where}: a fragment has a DOCTYPE: {_begin(text)}")
    spaces = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
    try:
        root = ElementTree.fromstring(f"<fragment {spaces}>{re.sub(r'<[?]xml[^>]*[?]>', '', text)}</fragment>")
    except ElementTree.ParseError as error:
        raise ConfigurationError(f"{where}: a fragment is no XML: {error}: {_begin(text)}") from None
    elements = []
    for element in root:
        elements.extend(list(element) if element.tag == "domain" else [element])
    for element in elements:
        _strip(element)
    return elements


def _strip(element: Element) -> None:
    """White space between elements goes, so that the result is indented as one."""
    for each in element.iter():
        each.tail = None
        if each.text and not each.text.strip():
            each.text = None


def _begin(text: str) -> str:
    return repr(" ".join(text.split())[:60])
