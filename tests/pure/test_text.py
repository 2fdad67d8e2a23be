"""What a tenant wrote and we repeat only prints: it does nothing to the terminal or the log that it comes to."""

from __future__ import annotations

import unicodedata

import pytest

from onelxc import errors, monitoring
from onelxc.errors import HypervisorError, line
from onelxc.model import VmPaths
from onelxc.report import Report
from onelxc.root import consolelog, consoles

HOSTILE = {
    "escape": "\x1b[2J\x1b]0;title\x07",
    "C1": "\x9b31mRED\x85\x90",
    "line breaks of Unicode": "a\u2028b\u2029c\x0b\x0c\x1c\x1d\x1e",
    "carriage return": "Cannot\rERROR: all is lost",
    "bidirectional": "\u202egnp.exe \u2066\u2067\u2068\u2069\u200f\u061c",
    "zero width": "pay\u200bpal\ufeff\u2060\u00ad",
    "tags": "\U000e0001\U000e0041",
    "not text": b"/mnt/\x9b31m\xff".decode(errors="surrogateescape"),
    "private": "\ue000\U000f0000",
    "delete": "\x7f\x08\x00",
}
SAYS = "Cannot mount at /mnt/"


def only_prints(text: str) -> bool:
    """Nothing but letters, marks, numbers, punctuation, symbols and blanks, in one line."""
    return all(c == " " or unicodedata.category(c)[0] in "LMNPS" for c in text)


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_every_exit_gives_text_that_only_prints(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = SAYS + HOSTILE[what]
    report = Report("deploy", framed=False, verbose=True)
    report.error(text)
    report.error(HypervisorError(text))
    report.info(text)
    consoles.complain(text)
    said = capsys.readouterr().err.splitlines()
    said += [str(HypervisorError(text)), line(text), monitoring.word(text), *monitoring.lines({"A": text}).splitlines()]
    assert [one for one in said if not only_prints(one)] == []
    assert len(said) == 8
    assert all(SAYS in one for one in said)


def test_all_of_unicode() -> None:
    """Whatever else there is: no character gets through that is a control, a format, a separator, or unassigned."""
    everything = "".join(map(chr, range(0x110000)))
    step = errors.LINE_LIMIT
    assert all(only_prints(line(everything[at : at + step])) for at in range(0, len(everything), step))


def test_text_of_every_script_stays_as_it_is() -> None:
    assert line("Größe für 東京: «ok» – עברית 🙂") == "Größe für 東京: «ok» – עברית 🙂"


def test_a_line_is_bounded() -> None:
    assert len(line("x" * 10_000_000)) < 2100
    assert line("a\n" * 10) == "a a a a a a a a a a"


def test_what_a_console_said_only_prints(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{tmp_path}/one-5.log"
    with open(path, "wb") as log:
        log.write("".join(HOSTILE.values()).encode(errors="surrogateescape") + b"\n\x1b[31mend\x1b[0m\n")
    monkeypatch.setattr(VmPaths, "console_log", property(lambda _: path))
    said = consolelog.tail(5)
    assert all(map(only_prints, said))
    assert said[-1] == "end"
