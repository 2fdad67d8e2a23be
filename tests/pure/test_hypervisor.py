"""libvirt's words become plain values and typed errors: on its own in-process driver for tests, without a daemon."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onelxc.errors import HypervisorError, NoSuchDomainError
from onelxc.hypervisor import Hypervisor, State

DOMAIN = """<domain type='test'><name>{name}</name><memory unit='KiB'>65536</memory><vcpu>1</vcpu>
    <os><type>hvm</type></os>{more}</domain>"""


@pytest.fixture
def libvirt() -> Iterator[Hypervisor]:
    with Hypervisor("test:///default") as connection:
        yield connection


def test_domains_are_found_by_name(libvirt: Hypervisor) -> None:
    created = libvirt.create(DOMAIN.format(name="one-5", more=""), "one-5")
    assert created.state() is State.RUNNING
    assert not created.persistent()
    found = libvirt.domain("one-5")
    assert found.uuid() == created.uuid()
    assert "one-5" in [domain.name for domain in libvirt.domains()]
    assert "<name>one-5</name>" in found.xml()
    assert found.controller_pid() is not None


def test_none_of_that_name_is_an_error_of_its_own(libvirt: Hypervisor) -> None:
    assert libvirt.find("one-6") is None
    with pytest.raises(NoSuchDomainError, match=r"^Cannot find one-6: no such container on this host$"):
        libvirt.domain("one-6")


@pytest.mark.parametrize(
    ("xml", "code", "words"),
    [
        ("<domain", 35, "Couldn't find end of Start Tag domain"),
        (DOMAIN.format(name="one-5", more="<nonsense/>"), 92, "nonsense"),
        (DOMAIN.format(name="", more=""), 92, "failed to validate"),
    ],
)
def test_what_libvirt_refuses_has_its_code_and_words(libvirt: Hypervisor, xml: str, code: int, words: str) -> None:
    with pytest.raises(HypervisorError) as caught:
        libvirt.create(xml, "one-5")
    assert caught.value.code == code
    assert str(caught.value).startswith("Cannot start one-5: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_taken(libvirt: Hypervisor) -> None:
    libvirt.create(DOMAIN.format(name="one-5", more=""), "one-5")
    with pytest.raises(HypervisorError, match="already") as caught:
        libvirt.create(DOMAIN.format(name="one-5", more=""), "one-5")
    assert caught.value.code == 9


def test_suspended_and_resumed(libvirt: Hypervisor) -> None:
    domain = libvirt.create(DOMAIN.format(name="one-5", more=""), "one-5")
    domain.suspend()
    assert domain.state() is State.PAUSED
    domain.resume()
    assert domain.state() is State.RUNNING


def test_nobody_there_is_said_with_libvirts_words(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        HypervisorError, match=r"^Cannot reach libvirt \(lxc\+unix:.*No such file or directory; see "
    ) as caught:
        Hypervisor("lxc+unix:///?socket=/nonexistent/socket")
    assert caught.value.code == 38
    assert capfd.readouterr() == ("", ""), "libvirt prints errors by itself unless it is told not to"
