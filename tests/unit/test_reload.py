"""Reloading: all of it or nothing, one after another, and what is wrong is named."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from aiohttp import web

from sidecar.clock import wall_clock
from sidecar.core.instant import iso_time
from sidecar.core.policy import RiskClass
from sidecar.files.faults import ConfigurationError
from sidecar.live.reload import SETTLE_SECONDS, Cause, Files, Reloader, warn_of_openings
from sidecar.live.snapshot import Live, Snapshot
from sidecar.policies import files as policyfiles
from sidecar.settings.reading import Listen, default
from sidecar.telemetry.metrics import Metrics
from sidecar.web.api.routes import routes
from sidecar.web.api.state import STATE, StateApi, last_reload
from sidecar.web.wire.problem import problems
from tests.client import ask
from tests.described import DOCUMENT

UPSTREAM = "upstream: {url: http://127.0.0.1:9000}\npolicies: policies/\n"
SECRET = "s3cret"


@dataclass
class Place:
    """A folder with a configuration and policies, and the snapshot that was read from it."""

    folder: Path
    files: Files
    live: Live
    metrics: Metrics
    reloader: Reloader

    def configure(self, text: str) -> None:
        """The first two lines of the file stay; the text begins in line 3."""
        (self.folder / "c.yaml").write_text(UPSTREAM + text)

    def allow(self, *names: str) -> None:
        (self.folder / "policies" / "actions.yaml").write_text(
            "actions:\n" + "".join(f"  {name}: {{risk: low}}\n" for name in names)
        )

    def allowed(self) -> list[str]:
        assert self.live.snapshot.policies is not None
        return sorted(self.live.snapshot.policies.actions)

    def told(self, errors: tuple[str, ...]) -> list[str]:
        return [error.replace(f"{self.folder}/", "") for error in errors]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"scopegate_{name}", labels)

    def counted(self) -> tuple[float | None, ...]:
        return tuple(self.metric("reloads_total", result=result) for result in ("ok", "unchanged", "refused"))


def opened(
    folder: Path, text: str = "", *flags: tuple[str, str], environment: dict[str, str] | None = None
) -> Place:
    (folder / "policies").mkdir()
    (folder / "policies" / "actions.yaml").write_text("actions:\n  one: {risk: low}\n")
    (folder / "c.yaml").write_text(UPSTREAM + text)
    files = Files(folder / "c.yaml", environment=environment or {}, overrides=flags)
    loaded, policies, _ = files.read()
    live, metrics = Live(Snapshot(loaded.settings, policies)), Metrics()
    return Place(folder, files, live, metrics, Reloader(files, live=live, metrics=metrics, clock=wall_clock))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return opened(tmp_path)


# What is put in force -----------------------------------------------------------------------------------


async def test_configuration_and_policies_come_into_force_together(place: Place) -> None:
    before = place.live.snapshot
    place.configure("gate: {max_in_flight: 7}\n")
    place.allow("one", "two")
    reload = await place.reloader.reload("call")
    after = place.live.snapshot
    assert reload.snapshot is after
    assert after is not before
    assert (after.settings.gate.max_in_flight, place.allowed()) == (7, ["one", "two"])
    assert (reload.errors, reload.changed) == ((), ("gate.max_in_flight", "policies"))
    assert before.settings.gate.max_in_flight == 1024
    assert before.policies is not None
    assert list(before.policies.actions) == ["one"]
    assert after.revision != before.revision


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("upstream.response_timeout_seconds", "7", 7.0),
        ("gate.scope_required_from", "high", RiskClass.HIGH),
        ("gate.unlisted.writes", "refuse", "refuse"),
        ("scopes.defaults.ttl_seconds", "100", 100),
        ("care.min_confidence", "0.75", 0.75),
        ("shutdown.drain_seconds", "3", 3.0),
    ],
)
async def test_a_key_that_can_change_live_does(place: Place, text: str, key: str, value: object) -> None:
    *sections, name = text.split(".")
    opened_by = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    if sections == ["upstream"]:
        (place.folder / "c.yaml").write_text(
            f"upstream:\n  url: http://127.0.0.1:9000\n  {name}: {key}\npolicies: policies/\n"
        )
    else:
        place.configure(f"{opened_by}{'  ' * len(sections)}{name}: {key}\n")
    reload = await place.reloader.reload("call")
    assert (reload.errors, reload.changed) == ((), (text,))
    found: Any = place.live.snapshot.settings
    for step in text.split("."):
        found = getattr(found, step)
    assert found == value


async def test_routes_are_one_key(place: Place) -> None:
    place.configure("gate:\n  routes:\n    - path: /a\n    - path: /b\n      mode: shadow\n")
    assert (await place.reloader.reload("call")).changed == ("gate.routes",)
    assert [route.path.text for route in place.live.snapshot.settings.gate.routes] == ["/a", "/b"]
    assert [route.path.text for route in place.live.snapshot.enforced] == ["/a"]


async def test_another_folder_of_policies_may_be_named(place: Place) -> None:
    (place.folder / "other").mkdir()
    (place.folder / "other" / "a.yaml").write_text("actions: {six: {risk: high}}\n")
    (place.folder / "c.yaml").write_text(UPSTREAM.replace("policies/", "other/"))
    assert (await place.reloader.reload("call")).changed == ("policies",)
    assert place.allowed() == ["six"]


async def test_where_nothing_is_different_nothing_is_put_in_force(place: Place) -> None:
    before = place.live.snapshot
    place.configure("# a remark\ngate: {max_in_flight: 1024}\n")
    reload = await place.reloader.reload("signal")
    assert (reload.errors, reload.changed) == ((), ())
    assert place.live.snapshot is before
    assert reload.snapshot is before
    assert place.counted() == (0, 1, 0)


async def test_a_policy_file_that_differs_in_a_remark_is_another_set(place: Place) -> None:
    before = place.live.snapshot.policies
    (place.folder / "policies" / "actions.yaml").write_text("actions:\n  one: {risk: low}  # remark\n")
    assert (await place.reloader.reload("call")).changed == ("policies",)
    assert place.live.snapshot.policies is not before


# What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "policies", "expected"),
    [
        ("", "actions:\n  one: {risk: dreadful}\n", "policies/actions.yaml:2:9: actions.one.risk: expects"),
        ("", "actions: {one: {ri", "policies/actions.yaml:1:"),
        ("", "# nothing\n", "policies: actions: no file lists an action"),
        ("", "", "policies/actions.yaml: is empty"),
        ("gate:\n  max_in_flight: x\n", "", "c.yaml:4:3: gate.max_in_flight: expects a whole number"),
        ("gate: {routes: []}\n", "", "c.yaml:3:8: gate.routes: is empty"),
        ("policies: elsewhere\n", "", "c.yaml:3:1: policies: is already in line 2"),
    ],
)
async def test_what_cannot_be_used_changes_nothing_and_is_named_with_its_place(
    place: Place, config: str, policies: str, expected: str
) -> None:
    before = place.live.snapshot
    place.configure(config)
    (place.folder / "policies" / "actions.yaml").write_text(policies)
    reload = await place.reloader.reload("call")
    (error,) = place.told(reload.errors)
    assert error.startswith(expected)
    assert place.live.snapshot is before
    assert (reload.snapshot, reload.changed, reload.shadowed) == (before, (), ())


async def test_every_fault_is_named(place: Place) -> None:
    place.configure("gate: {max_in_flight: 0, max_body_bytes: 0}\nqate: {}\n")
    reload = await place.reloader.reload("call")
    assert [error.split(": ")[0] for error in place.told(reload.errors)] == [
        "c.yaml:3:8",
        "c.yaml:3:26",
        "c.yaml:4:1",
    ]


async def test_files_that_are_gone_change_nothing(place: Place) -> None:
    before = place.live.snapshot
    (place.folder / "policies" / "actions.yaml").unlink()
    (error,) = place.told((await place.reloader.reload("call")).errors)
    assert error.startswith("policies: contains no *.yaml file")
    os.unlink(place.folder / "c.yaml")
    (error,) = place.told((await place.reloader.reload("call")).errors)
    assert error.startswith("c.yaml: cannot be read (No such file or directory)")
    assert place.live.snapshot is before


PUT_BACK = "cannot change while it runs; restart to change it, or put back"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {listen: 127.0.0.1:1}\n", f'c.yaml:3:8: data.listen: {PUT_BACK} "127.0.0.1:8000"'),
        (
            "store:\n  deadline_seconds: 3\n",
            f"c.yaml:4:3: store.deadline_seconds: {PUT_BACK} 2.0",
        ),
        ("scopes: {serve_on: admin}\n", f'c.yaml:3:10: scopes.serve_on: {PUT_BACK} "data"'),
        ("gate:\n  head_timeout_seconds: 1\n", f"c.yaml:4:3: gate.head_timeout_seconds: {PUT_BACK} 10.0"),
        ("log: {mask: [/details/a]}\n", f"c.yaml:3:7: log.mask: {PUT_BACK} []"),
        (f"store: {{url: sqlite:///{SECRET}}}\n", f"c.yaml:3:9: store.url: {PUT_BACK} the old value"),
    ],
)
async def test_a_key_that_cannot_change_live_is_refused_by_name(
    place: Place, text: str, expected: str
) -> None:
    before = place.live.snapshot
    place.configure(text)
    place.allow("one", "two")
    reload = await place.reloader.reload("call")
    assert place.told(reload.errors) == [expected]
    assert place.live.snapshot is before
    place.configure("")
    assert (await place.reloader.reload("call")).changed == ("policies",)


async def test_a_secret_is_named_neither_old_nor_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    place = opened(tmp_path, f"store: {{url: sqlite:///{SECRET}-old}}\n")
    place.configure(f"store: {{url: sqlite:///{SECRET}-new}}\n")
    reload = await place.reloader.reload("call")
    assert len(reload.errors) == 1
    assert SECRET not in repr(reload.errors) + caplog.text + repr(last_reload(place.reloader.last))
    assert not [record for record in caplog.records if SECRET in repr(vars(record))]


async def test_every_key_that_cannot_change_live_is_named_beside_those_that_can(tmp_path: Path) -> None:
    place = opened(tmp_path, "ops: {listen: 127.0.0.1:1}\nstore: {deadline_seconds: 5}\n")
    before = place.live.snapshot
    place.configure("store:\ngate: {max_in_flight: 5, head_timeout_seconds: 5}\n")
    reload = await place.reloader.reload("call")
    assert place.told(reload.errors) == [
        f'c.yaml:1:1: ops.listen: {PUT_BACK} "127.0.0.1:1"',
        f"c.yaml:3:1: store.deadline_seconds: {PUT_BACK} 5.0",
        f"c.yaml:4:26: gate.head_timeout_seconds: {PUT_BACK} 10.0",
    ]
    assert place.live.snapshot is before


def test_a_checkpoint_file_in_a_closed_folder_is_a_mistake_in_the_configuration() -> None:
    before = os.geteuid()
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0)
        if before == 0:
            os.seteuid(65534)  # modes mean nothing to root
        try:
            with pytest.raises(
                ConfigurationError,
                match=r"log\.checkpoint_file: is in a folder that the sidecar cannot enter",
            ):
                default("http://127.0.0.1:9000", log={"checkpoint_file": f"{folder}/checkpoints"})
        finally:
            os.seteuid(before)
            os.chmod(folder, 0o700)


async def test_our_own_failure_to_read_them_changes_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: Path) -> None:
        raise ZeroDivisionError(SECRET)

    before = place.live.snapshot
    monkeypatch.setattr(policyfiles, "load", broken)
    (error,) = (await place.reloader.reload("call")).errors
    assert "ZeroDivisionError" in error
    assert SECRET not in error
    assert place.live.snapshot is before
    monkeypatch.undo()
    place.allow("two")
    assert (await place.reloader.reload("call")).changed == ("policies",)


# What overrides the files -------------------------------------------------------------------------------


async def test_the_environment_of_the_start_and_the_flags_still_win_and_shadow_keys(tmp_path: Path) -> None:
    environment = {
        "SCOPEGATE_GATE__MAX_IN_FLIGHT": "5",
        "BODY": "100",
        "SCOPEGATE_OPS__LISTEN": "127.0.0.1:7",
    }
    place = opened(tmp_path, "", ("gate.tenant_header", "X-Tenant"), environment=environment)
    environment |= {"SCOPEGATE_GATE__MAX_IN_FLIGHT": "6", "BODY": "200"}
    environment["SCOPEGATE_CARE__MIN_CONFIDENCE"] = "1"
    place.configure(
        "gate:\n  max_in_flight: 9\n  max_body_bytes: ${BODY}\n  tenant_header: X-Other\n"
        "ops: {listen: 127.0.0.1:8}\n"
    )
    reload = await place.reloader.reload("call")
    assert reload.errors == ()
    assert reload.changed == ("gate.max_body_bytes",)
    assert reload.shadowed == ("ops.listen", "gate.max_in_flight", "gate.tenant_header")
    settings = place.live.snapshot.settings
    assert (settings.gate.max_in_flight, settings.gate.max_body_bytes) == (5, 100)
    assert (settings.gate.tenant_header, settings.care.min_confidence) == ("X-Tenant", 0.5)


async def test_a_fault_in_what_overrides_the_file_names_it(tmp_path: Path) -> None:
    place = opened(tmp_path, "scopes: {limits: {max_attempts: 9}}\n", ("scopes.defaults.max_attempts", "5"))
    place.configure("scopes: {limits: {max_attempts: 4}}\n")
    (error,) = place.told((await place.reloader.reload("call")).errors)
    assert error.startswith("--set scopes.defaults.max_attempts: ")


# One after another --------------------------------------------------------------------------------------


async def test_a_reload_asked_for_during_another_reads_what_then_stands_there(place: Place) -> None:
    for round_ in range(20):
        first = asyncio.create_task(place.reloader.reload("signal"))
        await asyncio.sleep(0.0005 * (round_ % 4))
        place.allow(f"name{round_}")
        await place.reloader.reload("call")
        assert place.allowed() == [f"name{round_}"]
        await first
        assert place.allowed() == [f"name{round_}"]


async def test_reloads_do_not_overlap_and_each_has_a_run_of_its_own(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    most = [0]
    read = policyfiles.load

    def watched(folder: Path) -> Any:
        running.append(1)
        most[0] = max(most[0], len(running))
        try:
            return read(folder)
        finally:
            running.pop()

    monkeypatch.setattr(policyfiles, "load", watched)
    reloads = await asyncio.gather(*(place.reloader.reload("call") for _ in range(10)))
    assert most == [1]
    assert len({id(reload) for reload in reloads}) == 10
    assert place.counted() == (0, 10, 0)


async def test_the_loop_goes_on_while_files_are_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    going, read = threading.Event(), policyfiles.load

    def patient(folder: Path) -> Any:
        assert going.wait(5)
        return read(folder)

    monkeypatch.setattr(policyfiles, "load", patient)
    place.allow("two")
    reloading = asyncio.create_task(place.reloader.reload("call"))
    await asyncio.sleep(0.05)
    assert place.allowed() == ["one"]
    going.set()
    assert (await reloading).changed == ("policies",)


def versioned(folder: Path, number: int) -> None:
    """A configuration and policies in two files, which belong together and are shown by one rename."""
    version = folder / f"..{number}"
    (version / "policies").mkdir(parents=True)
    (version / "c.yaml").write_text(UPSTREAM + f"gate: {{max_in_flight: {number}}}\n")
    for name in ("a", "b"):
        (version / "policies" / f"{name}.yaml").write_text(f"actions: {{{name}{number}: {{risk: low}}}}\n")
    os.symlink(version.name, folder / "..data_tmp")
    os.replace(folder / "..data_tmp", folder / "..data")


@pytest.fixture
def exchanged(tmp_path: Path) -> Iterator[Path]:
    """The configuration of a folder that shows another version all the time."""
    versioned(tmp_path, 1)
    for name in ("c.yaml", "policies"):
        os.symlink(f"..data/{name}", tmp_path / name)
    ending = threading.Event()

    def exchange() -> None:
        number = 1
        while not ending.wait(0.002):
            number += 1
            versioned(tmp_path, number)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield tmp_path / "c.yaml"
    finally:
        ending.set()
        thread.join()


def test_files_that_are_exchanged_while_they_are_read_never_make_a_mixture(exchanged: Path) -> None:
    files = Files(exchanged, environment={})
    versions: set[int] = set()
    refused: set[str] = set()
    for _ in range(300):
        try:
            loaded, policies, _ = files.read()
        except ConfigurationError as exc:
            refused.add(exc.faults[0].message.partition(";")[0])
            continue
        number = loaded.settings.gate.max_in_flight
        assert sorted(policies.actions) == [f"a{number}", f"b{number}"]
        versions.add(number)
    assert len(versions) > 10
    assert refused <= {"this file or one that it names changes while it is read"}


# Catching up --------------------------------------------------------------------------------------------


async def test_catching_up_reloads_once_for_each_change(place: Place) -> None:
    await place.reloader.catch_up()
    assert place.counted() == (0, 0, 0)
    place.allow("two")
    for _ in range(3):
        await place.reloader.catch_up()
    assert (place.allowed(), place.counted()) == (["two"], (1, 0, 0))
    assert place.reloader.last.cause == "files changed"
    place.allow("six")
    await place.reloader.reload("signal")
    await place.reloader.catch_up()
    assert (place.allowed(), place.counted()) == (["six"], (2, 0, 0))


async def test_a_file_that_is_half_written_is_refused_once_and_read_when_it_is_whole(place: Place) -> None:
    file = place.folder / "policies" / "actions.yaml"
    file.write_text("actions:\n  two: {risk: lo")
    for _ in range(3):
        await place.reloader.catch_up()
    assert (place.allowed(), place.counted()) == (["one"], (0, 0, 1))
    assert not last_reload(place.reloader.last)["ok"]
    file.write_text("actions:\n  two: {risk: low}\n")
    await place.reloader.catch_up()
    assert (place.allowed(), place.counted()) == (["two"], (1, 0, 1))
    assert last_reload(place.reloader.last)["ok"]


async def test_what_is_written_with_pauses_is_read_once_and_whole(place: Place) -> None:
    """Each part of it could be used as it is, and would refuse less than the whole."""
    names = [f"name{number}" for number in range(8)]
    place.allow(*names[:1])
    catching_up = asyncio.create_task(place.reloader.catch_up())
    for number in range(2, len(names) + 1):
        await asyncio.sleep(SETTLE_SECONDS / 2)
        place.allow(*names[:number])
        assert place.allowed() == ["one"]
    await catching_up
    assert (place.allowed(), place.counted()) == (names, (1, 0, 0))


async def test_another_folder_rests_too_before_it_is_read_by_itself(place: Place) -> None:
    other = place.folder / "other"
    other.mkdir()
    (other / "a.yaml").write_text("actions: {six: {risk: high}}\n")
    (place.folder / "c.yaml").write_text(UPSTREAM.replace("policies/", "other/"))
    catching_up = asyncio.create_task(place.reloader.catch_up())
    while place.files.policies != other:
        await asyncio.sleep(0.005)
    (other / "a.yaml").write_text("actions: {six: {risk: high}, ten: {risk: high}}\n")
    await catching_up
    assert (place.allowed(), place.counted()) == (["six", "ten"], (1, 0, 0))


def test_what_is_no_longer_what_was_seen_stays_unread(place: Place) -> None:
    place.allow("two")
    seen = place.files.unread()
    assert seen is not None
    place.allow("six")
    assert place.files.read_if_still(seen) is None
    now = place.files.unread()
    assert now not in (None, seen)
    found = place.files.read_if_still(now or b"")
    assert found is not None
    assert list(found[1].actions) == ["six"]
    assert place.files.unread() is None


@pytest.mark.parametrize("cause", ["signal", "call"])
async def test_who_asks_for_a_reload_does_not_wait_until_files_rest(place: Place, cause: Cause) -> None:
    place.allow("two")
    catching_up = asyncio.create_task(place.reloader.catch_up())
    await asyncio.sleep(SETTLE_SECONDS / 4)
    begun = asyncio.get_running_loop().time()
    assert (await place.reloader.reload(cause)).changed == ("policies",)
    assert asyncio.get_running_loop().time() - begun < SETTLE_SECONDS / 2
    await catching_up
    assert (place.allowed(), place.counted()) == (["two"], (1, 0, 0))


async def test_a_thread_that_nobody_waits_for_is_known_to_read_until_it_ends(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, going, read = threading.Event(), threading.Event(), policyfiles.load

    def patient(folder: Path) -> Any:
        begun.set()
        assert going.wait(5)
        return read(folder)

    monkeypatch.setattr(policyfiles, "load", patient)
    assert not place.reloader.is_reading()
    reloading = asyncio.create_task(place.reloader.reload("call"))
    assert await asyncio.to_thread(begun.wait, 5)
    reloading.cancel()
    await asyncio.wait([reloading])
    assert place.reloader.is_reading()
    going.set()
    async with asyncio.timeout(5):
        while place.reloader.is_reading():
            await asyncio.sleep(0.005)


async def test_a_change_between_the_start_and_the_first_look_is_caught_up(place: Place) -> None:
    place.configure("gate: {max_in_flight: 3}\n")
    await place.reloader.catch_up()
    assert place.live.snapshot.settings.gate.max_in_flight == 3


async def test_a_folder_that_was_named_too_early_is_read_once_it_is_there(place: Place) -> None:
    (place.folder / "c.yaml").write_text(UPSTREAM.replace("policies/", "later/"))
    await place.reloader.catch_up()
    assert place.told(place.reloader.last.errors)[0].startswith("later: the policies folder cannot be read")
    (place.folder / "later").mkdir()
    (place.folder / "later" / "a.yaml").write_text("actions: {six: {risk: low}}\n")
    await place.reloader.catch_up()
    assert place.allowed() == ["six"]


# What is told -------------------------------------------------------------------------------------------


async def test_the_last_reload_is_remembered_shown_and_counted(place: Place) -> None:
    begun = place.reloader.last
    assert (begun.cause, begun.errors) == ("start", ())
    assert place.counted() == (0, 0, 0)
    assert place.metric("last_reload_success") == 1
    assert place.metric("last_reload_timestamp_seconds") == begun.time / 1e6

    (place.folder / "policies" / "actions.yaml").write_text("actions: 5\n")
    refused = await place.reloader.reload("signal")
    assert place.reloader.last is refused
    assert refused.time > begun.time
    assert last_reload(refused) == {
        "time": iso_time(refused.time),
        "ok": False,
        "errors": list(refused.errors),
    }
    assert (place.counted(), place.metric("last_reload_success")) == ((0, 0, 1), 0)
    assert place.metric("last_reload_timestamp_seconds") == refused.time / 1e6

    place.allow("two")
    done = await place.reloader.reload("call")
    assert place.reloader.last is done
    assert last_reload(done) == {"time": iso_time(done.time), "ok": True, "errors": []}
    assert (place.counted(), place.metric("last_reload_success")) == ((1, 0, 1), 1)


async def test_the_log_tells_what_came_of_it(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scopegate.reload")
    before = place.live.snapshot
    place.allow("two")
    place.configure("gate: {max_in_flight: 5}\n")
    await place.reloader.reload("signal")
    after = place.live.snapshot
    assert before.policies is not None
    assert after.policies is not None
    (line,) = caplog.records
    told = vars(line)
    assert (line.levelname, told["cause"]) == ("INFO", "signal")
    assert told["changed"] == ("gate.max_in_flight", "policies")
    assert (told["old_policy_revision"], told["policy_revision"]) == (
        before.policies.revision,
        after.policies.revision,
    )
    assert (told["old_config_revision"], told["config_revision"]) == (before.revision, after.revision)
    caplog.clear()
    place.configure("gate: {max_in_flight: 0, max_body_bytes: 0}\n")
    refused = await place.reloader.reload("call")
    (line,) = caplog.records
    assert (line.levelname, vars(line)["errors"]) == ("ERROR", refused.errors)
    assert len(refused.errors) == 2


async def test_the_log_tells_how_much_there_is_and_warns_where_it_got_less(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    rules = "rules:\n  - {id: a, on: issue, effect: deny}\n  - {id: b, on: issue, effect: deny}\n"

    async def told(actions: int, rules_: int, routes: str) -> tuple[str, str, list[int], list[int]]:
        file = place.folder / "policies" / "actions.yaml"
        listed = "".join(f"  act{number}: {{risk: low}}\n" for number in range(actions))
        file.write_text(f"actions:\n{listed}" + "".join(rules.splitlines(True)[: 1 + rules_]))
        place.configure(f"gate: {{routes: [{routes}]}}\n")
        caplog.clear()
        await place.reloader.reload("call")
        line = next(record for record in caplog.records if record.getMessage().startswith("reloaded"))
        names = ("actions", "rules", "gated_routes")
        before, after = ([vars(line)[prefix + name] for name in names] for prefix in ("old_", ""))
        return line.levelname, line.getMessage(), before, after

    caplog.set_level(logging.INFO, "scopegate.reload")
    both, one = "{path: /a}, {path: /b}", "{path: /a}, {path: /b, mode: shadow}"
    assert await told(2, 2, both) == ("INFO", "reloaded", [1, 0, 1], [2, 2, 2])
    assert await told(1, 2, both) == ("WARNING", "reloaded with fewer actions", [2, 2, 2], [1, 2, 2])
    assert await told(3, 1, both) == ("WARNING", "reloaded with fewer rules", [1, 2, 2], [3, 1, 2])
    assert await told(3, 1, one) == ("WARNING", "reloaded with fewer gated routes", [3, 1, 2], [3, 1, 1])
    assert await told(3, 1, one) == (
        "INFO",
        "reloaded; nothing is different",
        [3, 1, 1],
        [3, 1, 1],
    )
    assert await told(2, 0, one) == ("WARNING", "reloaded with fewer actions and rules", [3, 1, 1], [2, 0, 1])


def test_what_lets_actions_through_without_a_scope_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    warn_of_openings(default("http://127.0.0.1:9000"))
    assert caplog.records == []
    warn_of_openings(
        default(
            "http://127.0.0.1:9000",
            gate={
                "scope_required_from": "high",
                "routes": [{"path": "/a"}, {"path": "/b", "mode": "shadow"}],
            },
        )
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.messages[0] == "actions below high risk need no scope"
    assert "shadow" in caplog.messages[1]
    assert vars(caplog.records[1])["routes"] == ["/b"]


async def test_it_is_said_after_a_reload_too_and_not_where_nothing_changed(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    place.configure("gate: {scope_required_from: medium}\n")
    await place.reloader.reload("call")
    assert caplog.messages == ["actions below medium risk need no scope"]
    await place.reloader.reload("call")
    assert len(caplog.messages) == 1


# The call -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(place: Place) -> AsyncIterator[Listen]:
    """The call alone on a listener, so that nobody else reloads."""
    application = web.Application(middlewares=[problems])
    unused: Any = None
    api = StateApi(
        store=unused, gate=unused, live=place.live, reloader=place.reloader, readiness=unused, about=unused
    )
    application.add_routes(routes(STATE, api))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield Listen(*runner.addresses[0])
    finally:
        await runner.cleanup()


async def test_the_call_answers_with_the_revisions_and_what_changed(tmp_path: Path) -> None:
    place = opened(tmp_path, "care: {min_confidence: 1}\n", ("care.min_confidence", "0.25"))
    async with listening(place) as address:
        place.allow("two")
        place.configure("care: {min_confidence: 0}\ngate: {max_in_flight: 5}\n")
        answer = await ask(address, "POST", "/api/v1/reload")
    snapshot = place.live.snapshot
    assert snapshot.policies is not None
    assert (answer.status, answer.json()) == (
        200,
        {
            "policy_revision": snapshot.policies.revision,
            "config_revision": snapshot.revision,
            "changed": ["gate.max_in_flight", "policies"],
            "shadowed": ["care.min_confidence"],
        },
    )
    DOCUMENT.assert_answered("reload", answer)


async def test_the_call_answers_409_with_every_error(place: Place) -> None:
    async with listening(place) as address:
        place.configure("gate: {max_in_flight: 0, max_body_bytes: 0}\n")
        answer = await ask(address, "POST", "/api/v1/reload")
    body = answer.json()
    assert (answer.status, body["error"]) == (409, "reload_refused")
    assert tuple(body["errors"]) == place.reloader.last.errors
    assert len(body["errors"]) == 2
    assert body["errors"][0] in body["message"]
    assert "and 1 more" in body["message"]
    DOCUMENT.assert_answered("reload", answer)


# When there is nothing to reload ------------------------------------------------------------------------


async def test_without_a_file_a_reload_is_refused_and_leaves_no_trace() -> None:
    live, metrics = Live(Snapshot(default("http://127.0.0.1:9000"), None)), Metrics()
    reloader = Reloader(None, live=live, metrics=metrics, clock=wall_clock)
    before = live.snapshot
    reload = await reloader.reload("call")
    assert "without" in reload.errors[0]
    assert live.snapshot is before
    assert (reloader.last.cause, last_reload(reloader.last)["ok"]) == ("start", True)
    assert metrics.registry.get_sample_value("scopegate_last_reload_success") == 1
    await reloader.catch_up()


async def test_while_it_drains_nothing_is_put_in_force(place: Place) -> None:
    before = place.live.snapshot
    place.allow("two")
    place.reloader.draining = True
    reload = await place.reloader.reload("signal")
    assert "shutting down" in reload.errors[0]
    await place.reloader.catch_up()
    assert place.live.snapshot is before
    assert (place.reloader.last.cause, place.counted()) == ("start", (0, 0, 0))
