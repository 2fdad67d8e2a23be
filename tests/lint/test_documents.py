"""Documents and examples stay true: links lead somewhere, stanzas can be read, tables name what there is."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from onelxc import optext

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(path for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")))
SECTION = re.compile(r"^#### (.*?)$\n(.*?)^#### end$", re.MULTILINE | re.DOTALL)


# Every link of a document to a file leads to one.
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


# Every decision is in the index, with its own title.
def test_decisions() -> None:
    directory = REPOSITORY / "docs/decisions"
    listed = (directory / "README.md").read_text()
    for page in sorted(directory.glob("[0-9]*.md")):
        title = page.read_text().splitlines()[0][2:]
        assert f"* [{page.name[:4]}]({page.name}) {title}\n" in listed


# The README's map names every directory, and nothing that is not there.
def test_map_of_the_tree() -> None:
    text = (REPOSITORY / "README.md").read_text().split("## Map of the tree")[1]
    named = {
        word for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for word in re.findall(r"`([^`]+)`", cell)
    }
    for path in named:
        assert (REPOSITORY / path).exists(), path
    tops = {path.split("/")[0] for path in named}
    there = {entry.name for entry in REPOSITORY.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_"))}
    assert there - tops == set()


# The README's table speaks of every action that there is an executable for.
def test_every_action_is_in_the_table() -> None:
    text = (REPOSITORY / "README.md").read_text()
    table = re.sub(r"`", "", text.split("## What works")[1].split("## When something")[0])
    # `snapshot_create, _revert, _delete`
    for first, rest in re.findall(r"(\w+)_\w+((?:, _\w+)+)", table):
        table += "".join(f" {first}{part}" for part in re.findall(r"_\w+", rest))
    told = set(re.findall(r"\w+", table)) | {"migrate_local"}
    assert set(os.listdir(REPOSITORY / "remotes/vmm/lxc")) - told == set()


# What install.sh prints is in OpenNebula's own syntax, and names the directory that it installs.
@pytest.mark.parametrize(
    ("part", "driver"), [("3.2: ", "lxc"), ("6 and 7: ", "onelxc"), ("6 and 7, with --replace: ", "lxc")]
)
def test_stanzas(part: str, driver: str) -> None:
    sections = SECTION.findall((REPOSITORY / "oned.conf.example").read_text())
    found = [
        attribute
        for title, text in sections
        if title.startswith(f"OpenNebula {part}")
        for attribute in optext.parse(text, title)
    ]
    restricted = [attribute.value for attribute in found if attribute.name == "VM_RESTRICTED_ATTR"]
    assert restricted == ([] if part.startswith("3.2") else ["LXC_UNPRIVILEGED", "LXC_PROFILES", "RAW/TYPE"])
    drivers = [attribute for attribute in found if attribute.name != "VM_RESTRICTED_ATTR"]
    assert sorted(attribute.name for attribute in drivers) == ["IM_MAD", "VM_MAD"]
    for attribute in drivers:
        assert (attribute.get("ARGUMENTS") or "").split()[-1] == driver
        if attribute.name == "VM_MAD":
            assert attribute.get("TYPE") == "xml"


# docs/security.md names tests and code that there are, and each attack the test that holds it, or that there is none.
def test_attacks_name_their_tests() -> None:
    text = (REPOSITORY / "docs/security.md").read_text()
    for path in re.findall(r"tests/[\w/]+(?:\.py)?", text):
        assert (REPOSITORY / path).exists(), path
    rows = re.findall(r"^\| (.+) \|$", text.split("\n## Attacks\n")[1], re.MULTILINE)
    attacks = [row for row in rows if row not in ("attack | held by", "danger | held by", "--- | ---")]
    assert attacks
    for row in attacks:
        source, found = "", "No test" in row
        for word in re.findall(r"`([^`]+)`", row):
            if word.startswith("tests/"):
                source = (REPOSITORY / word).read_text()
            elif word.startswith("test_"):
                assert f"\ndef {word}(" in source, f"{word} is not in the file named before it: {row}"
                found = True
            elif word.endswith(".py"):
                assert (REPOSITORY / "onelxc" / word).is_file(), word
        assert found, f"no test is named: {row}"
        assert re.sub(r"`[^`]+`", "", row).count("tests/") == 0, f"a test that is not in backquotes: {row}"
