"""What does a file in OpenNebula's own syntax say? `NAME = "v"`, `NAME = [ K = "v", … ]`, `NAME = [ "a", "b" ]`.

Pure text in, tuples out: it knows no name and no default. The grammar is that of OpenNebula's templates
(src/template/template_parser.y): names are case-insensitive, `#` begins a comment outside of quotes, a quoted value may
span lines, and `\\"` and `\\\\` are the only escapes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from onelxc.errors import ConfigurationError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\#[^\n]*)
      | (?P<newline>\n)
      | "(?P<quoted>(?:[^"\\]|\\.)*)"
      | (?P<sign>[\[\]=,])
      | (?P<word>[^\s"\[\]=,\#]+)""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r'\\(["\\])')


@dataclass(frozen=True)
class Attribute:
    """One attribute. A plain value is in `value`; `items` of a vector has (key, value), "" for no key."""

    name: str
    line: int
    value: str = ""
    items: tuple[tuple[str, str], ...] = ()
    vector: bool = False

    def get(self, key: str) -> str | None:
        """The value at `key` of a vector, None where there is none; the last one wins."""
        return next((value for name, value in reversed(self.items) if name == key), None)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str, where: str) -> tuple[Attribute, ...]:
    """The attributes of a file, in order. ConfigurationError names `where` and the line."""
    return tuple(_Parser(_tokens(text, where), where).attributes())


def _tokens(text: str, where: str) -> list[_Token]:
    tokens = []
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ConfigurationError(f"Cannot read {where}: line {line}: a quote that does not end")
        kind = str(match.lastgroup)
        if kind != "space":
            value = _ESCAPE.sub(r"\1", match.group(kind)) if kind == "quoted" else match.group(kind)
            tokens.append(_Token(kind, value, line))
        line += match.group().count("\n")
        position = match.end()
    tokens.append(_Token("newline", "", line))
    return tokens


class _Parser:
    def __init__(self, tokens: list[_Token], where: str) -> None:
        self.tokens = tokens
        self.where = where
        self.position = 0

    def attributes(self) -> list[Attribute]:
        found = []
        self._skip_newlines()
        while self.position < len(self.tokens):
            found.append(self._attribute())
            self._skip_newlines()
        return found

    def _attribute(self) -> Attribute:
        name = self._next("word")
        self._sign("=")
        if self._at("sign", "["):
            return Attribute(name.text.upper(), name.line, items=self._vector(), vector=True)
        if self._at("quoted"):
            value = self._next("quoted").text
        else:
            words = []
            while not self._at("newline"):
                words.append(self._next("word", "quoted").text)
            value = " ".join(words)
        if not self._at("newline"):
            self._fail("one value only")
        return Attribute(name.text.upper(), name.line, value=value)

    def _vector(self) -> tuple[tuple[str, str], ...]:
        self._sign("[")
        items = []
        self._skip_newlines()
        while not self._at("sign", "]"):
            first = self._next("word", "quoted")
            if first.kind == "word" and self._at("sign", "="):
                self._sign("=")
                items.append((first.text.upper(), self._next("word", "quoted").text))
            else:
                items.append(("", first.text))
            self._skip_newlines()
            if not self._at("sign", "]"):
                self._sign(",")
                self._skip_newlines()
        self._sign("]")
        return tuple(items)

    def _skip_newlines(self) -> None:
        while self._at("newline"):
            self.position += 1

    def _at(self, kind: str, text: str | None = None) -> bool:
        if self.position >= len(self.tokens):
            return False
        token = self.tokens[self.position]
        return token.kind == kind and text in (None, token.text)

    def _next(self, *kinds: str) -> _Token:
        if not any(self._at(kind) for kind in kinds):
            self._fail("a value" if "quoted" in kinds else "a name")
        self.position += 1
        return self.tokens[self.position - 1]

    def _sign(self, text: str) -> None:
        if not self._at("sign", text):
            self._fail(f"`{text}`")
        self.position += 1

    def _fail(self, expected: str) -> NoReturn:
        token = self.tokens[min(self.position, len(self.tokens) - 1)]
        seen = "the end of the line" if token.kind == "newline" else repr(token.text)
        raise ConfigurationError(f"Cannot read {self.where}: line {token.line}: {expected} expected instead of {seen}")
