"""What vm/status says, and when it asks the root helper: over time, with containers and verdicts as given."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from onelxc import helperinfo, names, samples
from onelxc.errors import HelperError
from onelxc.probes import statusprobe

SYNC = "SYNC_STATE=yes\nMISSING_STATE=POWEROFF\n"


def vm(vm_id: int, state: str) -> str:
    return f'VM = [ ID="{vm_id}", DEPLOY_ID="one-{vm_id}", STATE="{state}" ]\n'


class Host:
    """A host as the probe finds it: what there is to see, and what the helper would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.now = 1000.0
        self.seen: list[str] = []
        self.verdicts: dict[int, str] | None = {}
        self.asked = 0
        self.hub_died = 0.0
        monkeypatch.setattr(statusprobe, "look", lambda: list(self.seen))
        monkeypatch.setattr(samples, "now_s", lambda: self.now)
        monkeypatch.setattr(helperinfo, "ask", self._ask)

    def _ask(self, verb: str) -> dict[str, object]:
        assert verb == "reap"
        self.asked += 1
        if self.verdicts is None:
            raise HelperError("Cannot ask")
        return {"vms": [{"id": vm_id, "state": state} for vm_id, state in self.verdicts.items()]}

    def tick(self, passed_s: float = 5.0, configuration: str = "") -> str:
        self.now += passed_s
        Path(names.HUB_BEAT).write_text(f"{self.hub_died or self.now:.0f}\n")
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(configuration))
        return statusprobe.run()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(samples, "DIRECTORY", str(tmp_path))
    monkeypatch.setattr(names, "HUB_BEAT", str(tmp_path / "hub.beat"))
    return Host(monkeypatch)


def test_the_first_time_says_all_then_only_what_changed(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    assert host.tick() == SYNC + vm(5, "RUNNING")
    assert host.tick(55) == vm(5, "RUNNING"), "a change is repeated: oned may have ignored it"
    assert host.tick() == ""
    assert host.asked == 1
    assert host.tick(200) == SYNC + vm(5, "RUNNING")
    assert host.asked == 2


def test_the_period_is_monitords(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    text = "<X><PROBES_PERIOD><SYNC_STATE_VM><![CDATA[70]]></SYNC_STATE_VM></PROBES_PERIOD></X>"
    assert host.tick(69, text) == ""
    assert host.tick(1, text).startswith(SYNC)


def test_a_container_that_ended_is_off_when_the_helper_says_so(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77", "one-6/78"], {5: "running", 6: "running"}
    host.tick()
    host.tick(70)
    host.seen, host.verdicts = ["one-6/78"], {5: "off", 6: "running"}
    assert host.tick() == vm(5, "POWEROFF")
    host.verdicts = {6: "running"}
    assert host.tick(50) == vm(5, "POWEROFF")
    assert host.tick(20) == ""
    assert host.tick(200) == SYNC + vm(6, "RUNNING")


def test_what_is_off_is_repeated_when_something_else_changes(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.tick(70)
    host.seen, host.verdicts = [], {5: "off"}
    assert host.tick() == vm(5, "POWEROFF")
    host.seen, host.verdicts = ["one-6/78"], {6: "running"}
    assert host.tick(10) == vm(5, "POWEROFF") + vm(6, "RUNNING"), "the helper tells an end once"


def test_a_hub_that_shows_no_life_has_the_helper_asked(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.tick(70)
    assert host.asked == 1
    host.hub_died = host.now
    for _ in range(3):
        host.tick()
    assert host.asked == 4
    host.hub_died = 0.0
    host.tick()
    assert host.asked == 4
    host.seen, host.hub_died = [], 1.0
    host.tick()
    host.tick()
    assert host.asked == 5, "where nothing runs no hub is needed"


def test_nothing_is_off_while_an_action_works_on_it(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.tick(70)
    host.seen, host.verdicts = [], {5: "busy"}
    assert host.tick() == vm(5, "UNKNOWN")
    assert host.tick(200) == SYNC + vm(5, "UNKNOWN"), "it must not be taken for missing"
    host.seen, host.verdicts = ["one-5/99"], {5: "running"}
    assert host.tick() == vm(5, "RUNNING")


def test_a_deploy_in_flight_is_looked_at_again(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "busy"}
    assert host.tick() == SYNC + vm(5, "UNKNOWN")
    host.verdicts = {5: "running"}
    assert host.tick() == vm(5, "RUNNING"), "nothing to be seen has changed, but the action has ended"


def test_what_nobody_knows_any_more_is_off(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.seen, host.verdicts = [], {}
    assert host.tick() == vm(5, "POWEROFF")


def test_frozen_is_suspended_only_by_our_record(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.tick(70)
    host.seen = ["one-5/77/frozen"]
    assert host.tick() == "", "frozen while its disks are copied"
    host.verdicts = {5: "paused"}
    assert host.tick(30) == vm(5, "SUSPENDED")
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    assert host.tick() == vm(5, "RUNNING")


def test_containers_that_are_not_ours_are_listed_and_left_alone(host: Host) -> None:
    host.seen, host.verdicts = ["one-9/5"], {}
    assert host.tick() == SYNC + vm(9, "RUNNING")


def test_a_reboot_of_the_host_is_told(host: Host) -> None:
    host.seen, host.verdicts = [], {5: "off"}
    assert host.tick() == SYNC + vm(5, "POWEROFF")


def test_without_an_answer_nothing_is_guessed(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.seen, host.verdicts = [], None
    with pytest.raises(HelperError):
        host.tick()
    host.verdicts = {5: "off"}
    assert host.tick() == vm(5, "POWEROFF")


def test_a_new_client_hears_all(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.seen, host.verdicts = ["one-5/77"], {5: "running"}
    host.tick()
    host.tick(70)
    monkeypatch.setattr(statusprobe.os, "getppid", lambda: 4711)
    assert host.tick() == SYNC + vm(5, "RUNNING")


def test_3_2_1_lets_go_of_the_dead(host: Host) -> None:
    host.seen = ["one-5/77"]
    assert statusprobe.reap_if_needed() == ""
    assert statusprobe.reap_if_needed() == ""
    assert host.asked == 1
    host.seen = ["one-5/77/lost"]
    statusprobe.reap_if_needed()
    assert host.asked == 2
    host.verdicts, host.seen = None, []
    assert statusprobe.reap_if_needed() == 'ONELXC_WARNING="Cannot ask"\n'


def test_disks_left_mounted_for_no_container_are_asked_about_until_they_are_gone(host: Host) -> None:
    host.seen, host.verdicts = ["one-5/left"], {5: "busy"}
    assert host.tick() == SYNC + vm(5, "UNKNOWN")
    host.verdicts = {}
    host.tick()
    assert host.asked == 2
    host.seen = []
    host.tick()
    assert host.asked == 3
    host.tick()
    assert host.asked == 3
