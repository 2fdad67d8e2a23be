"""The administrator's files: their syntax, their defaults, and what is said about mistakes in them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onelxc import config, optext
from onelxc.config import Defaults, FrontEnd, Generation, HostConfig, Privileged
from onelxc.errors import ConfigurationError
from tests.conftest import REPOSITORY


def uncommented(path: str) -> str:
    """The file as it is when every value that it documents is put in force."""
    with open(os.path.join(REPOSITORY, path), encoding="utf-8") as file:
        return re.sub(r"^#(?=[A-Z_]+ *=)", "", file.read(), flags=re.MULTILINE)


def remotes(directory: Path, text: str, place: str = "vmm/lxc") -> str:
    file = directory / place / "vmm_exec_lxc.conf"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return str(directory)


def test_absent_files_are_defaults(tmp_path: Path) -> None:
    assert config.defaults(str(tmp_path), "lxc") == Defaults()
    assert config.host(str(tmp_path / "host.conf")) == HostConfig()
    assert config.front_end(str(tmp_path)) == FrontEnd()


def test_host_conf_documents_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "host.conf"
    file.write_text(uncommented("etc/host.conf"))
    assert config.host(str(file)) == HostConfig()
    assert len(optext.parse(file.read_text(), "x")) >= 9


def test_vmm_conf_documents_names_that_are_read(tmp_path: Path) -> None:
    got = config.defaults(remotes(tmp_path, uncommented("etc/vmm_exec_lxc.conf")), "lxc")
    assert (got.cpu, got.vcpu, got.memory_mb, got.init) == (1.0, 1, 512, "/sbin/init")
    assert (got.nic_bridge, got.nic_filter, got.nic_guest) == ("br0", "clean-traffic", "eth")
    assert (got.shutdown_timeout_s, got.reboot_timeout_s) == (Defaults.shutdown_timeout_s, Defaults.reboot_timeout_s)
    assert (got.privileged, got.verbose, got.shutdown_force) == (Privileged.ASKED, False, True)
    assert got.raw[0].startswith("<features>")


def test_the_newer_place_goes_first(tmp_path: Path) -> None:
    remotes(tmp_path, "MEMORY = 100")
    remotes(tmp_path, "MEMORY = 200", "etc/vmm/lxc")
    assert config.defaults(str(tmp_path), "lxc").memory_mb == 200
    assert config.defaults(str(tmp_path), "onelxc").memory_mb == 512


def test_capabilities(tmp_path: Path) -> None:
    text = 'FEATURES = [ KEEP = "mknod, sys_time", DROP = "NET_RAW", PRIVILEGED = always ]'
    got = config.defaults(remotes(tmp_path, text), "lxc")
    assert got.capabilities == (("mknod", True), ("sys_time", True), ("net_raw", False))
    assert got.privileged is Privileged.ALWAYS


def test_front_end(tmp_path: Path) -> None:
    (tmp_path / "onelxc").mkdir()
    file = tmp_path / "onelxc" / "front_end.conf"
    file.write_text('FRAMED = "yes"\nDRIVER = "lxc"\nONE_VERSION = "3.2.1"\n')
    assert config.front_end(str(tmp_path)) == FrontEnd(framed=True, driver="lxc", version="3.2.1")
    assert config.front_end(str(tmp_path)).generation is Generation.PULL
    file.write_text('FRAMED = "no"\nDRIVER = "onelxc"\nONE_VERSION = "7.4.0"\n')
    assert config.front_end(str(tmp_path)).generation is Generation.MONITORD


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("MEMROY = 1", "MEMROY in line 1 is no name known here"),
        ("CPU = 1\nNIC = [ BRIGDE = br0 ]", "NIC/BRIGDE in line 2 is no name known here"),
        ("MEMORY = x", "MEMORY is not a whole number: 'x'"),
        ("CPU = -1", "CPU is not above 0: '-1'"),
        ("CPU = one", "CPU is not a number: 'one'"),
        ("MEMORY = [ A = 1 ]", "MEMORY is a vector, not a value"),
        ("OS = /sbin/init", "OS is a value, not a vector: OS = [ … ]"),
        ("TIMEOUTS = [ SHUTDOWN_FORCE = perhaps ]", "TIMEOUTS/SHUTDOWN_FORCE is neither yes nor no: 'perhaps'"),
        ("FEATURES = [ PRIVILEGED = perhaps ]", "FEATURES/PRIVILEGED is not yes, no or always: 'perhaps'"),
        ('FEATURES = [ KEEP = "<x>" ]', "FEATURES/KEEP is no capability: '<x>'"),
    ],
)
def test_mistakes_in_the_defaults(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        config.defaults(remotes(tmp_path, text), "lxc")
    assert str(error.value) == f"Cannot use {tmp_path}/vmm/lxc/vmm_exec_lxc.conf: {line}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('BLOCK_DEVICES = "/dev/sd*, /etc/x"', "BLOCK_DEVICES has a path that is not below /dev: '/etc/x'"),
        ('DATASTORES = [ "/a", "b" ]', "DATASTORES is not an absolute path: 'b'"),
        ("ID_BASE = 0", "ID_BASE and ID_COUNT do not fit between 65536 and 4294967294"),
        ("ID_COUNT = 65536", "ID_BASE and ID_COUNT do not fit between 65536 and 4294967294"),
        ("CACHE = [ DIRECTORY = here ]", "CACHE/DIRECTORY is not an absolute path: 'here'"),
    ],
)
def test_mistakes_in_the_hosts_policy(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "host.conf"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        config.host(str(file))
    assert str(error.value) == f"Cannot use {file}: {line}"


def test_datastores(tmp_path: Path) -> None:
    file = tmp_path / "host.conf"
    file.write_text('DATASTORES = [ "/var/lib/one", "/mnt//ds/" ]\nPRIVILEGED = YES')
    assert config.host(str(file)).datastores == ("/var/lib/one", "/mnt/ds")
    assert config.host(str(file)).privileged
    file.write_text('DATASTORES = "/a, /b"')
    assert config.host(str(file)).datastores == ("/a", "/b")


def test_ids_of_a_vm_are_its_own() -> None:
    host = HostConfig()
    first = [host.first_id(vm_id) for vm_id in (0, 1, 32767, 32768)]
    assert first[1] - first[0] == 65536
    assert first[2] + 65535 < 2**32 - 1
    assert first[3] == first[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A", "line 1: `=` expected instead of the end of the line"),
        ("A = [ B = 1", "line 1: `,` expected instead of the end of the line"),
        ('\nA = "x', "line 2: a quote that does not end"),
        ('A = "x" "y"', "line 1: one value only expected instead of 'y'"),
        ("= 1", "line 1: a name expected instead of '='"),
        ("A = [ = ]", "line 1: a value expected instead of '='"),
        ("A = ]", "line 1: a value expected instead of ']'"),
    ],
)
def test_syntax_errors_name_the_line(text: str, line: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        optext.parse(text, "/etc/x")
    assert str(error.value) == f"Cannot read /etc/x: {line}"


def test_syntax() -> None:
    text = 'D = [ "p", q ]\nE = ""\n'
    text += '# c\na = "1 # no comment" # comment\nB = two words\nC = [ k = "v, \\"w\\"",\n  L = x ] \n'
    got = {attribute.name: attribute for attribute in optext.parse(text, "x")}
    assert got["A"].value == "1 # no comment"
    assert got["B"].value == "two words"
    assert got["C"].items == (("K", 'v, "w"'), ("L", "x"))
    assert (got["C"].get("K"), got["C"].get("M"), got["C"].line) == ('v, "w"', None, 6)
    assert got["D"].items == (("", "p"), ("", "q"))
    assert got["E"].value == ""


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_an_error_of_ours(text: str) -> None:
    try:
        optext.parse(text, "x")
    except ConfigurationError as error:
        assert str(error).startswith("Cannot read x: line ")


@given(st.lists(st.tuples(st.from_regex(r"[A-Z_]{1,9}", fullmatch=True), st.text(max_size=20)), max_size=5))
def test_what_is_quoted_comes_back(pairs: list[tuple[str, str]]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    text = "".join(f"{name} = {quoted(value)}\n" for name, value in pairs)
    assert [(one.name, one.value) for one in optext.parse(text, "x")] == pairs
    vector = "V = [ " + ", ".join(f"{name} = {quoted(value)}" for name, value in pairs) + " ]"
    assert list(optext.parse(vector, "x")[0].items) == pairs
