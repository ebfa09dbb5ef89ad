"""Reloading: the files are read again, checked as a whole, and put in force in one assignment.

If the files are invalid, or change a key that is fixed at the start, the old snapshot stays in force. Only a
valid file of tokens counts all the same, because a token that was revoked must end. An automatic reload
waits until the files stop changing, because a partly written file may be valid and hold fewer rules.

Changes are found by reading the files twice a second and comparing hashes of their contents. This takes about
half a millisecond for ten files. It works on every file system and for every way of changing a file: writing,
renaming, swapping a symbolic link anywhere in the path. Notifications of the system (inotify) miss some of
these, and they report every write to a database or a log in the same folder.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from sidecar.auth import callers as callerfiles
from sidecar.auth import tokens
from sidecar.auth.callers import Callers
from sidecar.core.instant import SECOND
from sidecar.core.policy import PolicySet, RiskClass
from sidecar.files.faults import ConfigurationError, Fault
from sidecar.files.yamlfile import contents, in_order
from sidecar.live.snapshot import Live, Snapshot
from sidecar.policies import files as policyfiles
from sidecar.settings import reading as settings
from sidecar.settings.keys import differing, values_of
from sidecar.settings.reading import Loaded, Settings
from sidecar.settings.sections import KEYS
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics

# The interval at which the files are read to find changes.
LOOK_SECONDS = 0.5
# The number of times that changing files are read before that is an error.
TRIES = 3
# The time that changed files must stay the same before an automatic reload.
SETTLE_SECONDS = 0.4

Cause = Literal["start", "signal", "call", "files changed"]
T = TypeVar("T")


class Contents(NamedTuple):
    """What all files say at one moment."""

    loaded: Loaded
    policies: PolicySet
    callers: Callers


class Files:
    """The files of the snapshot, and a hash of their contents at the last read.

    The overrides are fixed at the start, so later changes of the environment have no effect.
    """

    def __init__(
        self, config: Path, *, environment: Mapping[str, str], overrides: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.config = config
        # The folder and the files that the configuration named last.
        self.policies: Path | None = None
        self.callers: tuple[Path, ...] = ()
        self.warnings: tuple[str, ...] = ()  # about the environment
        self.starting = True  # whether the sidecar has not read them yet
        self._environment = dict(environment)
        self._overrides = tuple(overrides)
        self._digest = b""

    def read(self) -> Contents:
        """The contents of all files at one moment. Blocks. Raises ConfigurationError."""
        for _ in range(TRIES):
            found = self._once()
            if self.changed():
                continue  # the read contents may be a mixture of two versions
            if isinstance(found, ConfigurationError):
                raise found
            return found
        message = "this file or one that it names changes while it is read; reload again once they rest"
        raise ConfigurationError([Fault(str(self.config), "", message)])

    def read_if_still(self, seen: bytes) -> Contents | None:
        """Read the files as `read` does, if their hash is still `seen`.

        Otherwise the result is None, and the files still count as unread.
        """
        before = self._digest
        found = self._once()
        # If the configuration now names another folder, `seen` does not cover that folder's contents.
        if self._digest != seen or self.changed():
            self._digest = before
            return None
        if isinstance(found, ConfigurationError):
            raise found
        return found

    def unread(self) -> bytes | None:
        """A hash of the contents, or None if they are the same as at the last read. Blocks."""
        now = _digest([self.config]) + self._named()
        return None if now == self._digest else now

    def changed(self) -> bool:
        """Whether the contents differ from those at the last read. Blocks."""
        return self.unread() is not None

    def _named(self) -> bytes:
        """A hash of the contents of the files that the configuration named last."""
        return _digest(_policy_files(self.policies)) + _digest(self.callers)

    def _once(self) -> Contents | ConfigurationError:
        config = _digest([self.config])
        try:
            loaded = settings.load(
                self.config,
                environment=self._environment,
                overrides=self._overrides,
                starting=self.starting,
            )
            self.policies, self.warnings = loaded.settings.policies, loaded.warnings
            self.callers = callerfiles.files_of(loaded.settings.auth)
        except ConfigurationError as exc:
            return exc
        finally:
            self._digest = config + self._named()
        faults: list[Fault] = []
        try:
            policies = policyfiles.load(loaded.settings.policies)
        except ConfigurationError as exc:
            faults += exc.faults
        try:
            callers = callerfiles.read(loaded.settings.auth)
        except ConfigurationError as exc:
            faults += exc.faults
        return ConfigurationError(faults) if faults else Contents(loaded, policies, callers)


def _policy_files(folder: Path | None) -> Iterable[Path]:
    """The YAML files of the folder, or the folder itself if it cannot be read."""
    if folder is None:
        return ()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return (folder,)
    return [folder / name for name in names if name.endswith((".yaml", ".yml")) and name[0] != "."]


def _digest(files: Iterable[Path]) -> bytes:
    """A hash of the names and contents of files. For an unreadable file, the error is hashed instead."""
    whole = sha256()
    for file in files:
        try:
            content = b"+" + contents(file)
        except ConfigurationError as exc:
            content = b"-" + str(exc).encode("utf-8", "surrogateescape")
        for part in (os.fsencode(file), content):
            whole.update(len(part).to_bytes(8, "big") + part)
    return whole.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """One reload: the snapshot in force after it, and the changed keys or the errors.

    `changed` holds keys of the configuration. A key whose files say something else is among them: `policies`,
    `auth.tokens.file`, `auth.principals`. `shadowed`
    holds the keys of the file that the environment or a flag overrides.
    """

    time: int
    cause: Cause
    snapshot: Snapshot
    errors: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    shadowed: tuple[str, ...] = ()


class Reloader:
    """Puts new snapshots in force, one reload after another. Without files, every reload is refused."""

    def __init__(
        self, files: Files | None, *, live: Live, metrics: Metrics, clock: Callable[[], int]
    ) -> None:
        if files is not None:
            files.starting = False
        self._files = files
        self._live = live
        self._metrics = metrics
        self._clock = clock
        self._turn = asyncio.Lock()
        self._reads: set[object] = set()
        self.draining = False
        self.renew: Callable[[], Awaitable[None]] | None = None  # renews the certificates
        self.last = Reload(time=clock(), cause="start", snapshot=live.snapshot)
        self._show_last()

    async def reload(self, cause: Cause) -> Reload:
        """Reload everything, one call at a time. `errors` of the result holds the faults."""
        if self.renew is not None:
            await self.renew()
        async with self._turn:
            if self._files is None:
                return self._impossible(cause, "there is no configuration file; it was started without one")
            return await self._reload(cause, self._files, self._files.read)

    async def watch(self) -> None:
        """Reload whenever the files have changed, until cancelled."""
        while True:
            await self.catch_up()
            await asyncio.sleep(LOOK_SECONDS)

    async def catch_up(self) -> None:
        """If the files changed since the last read, reload once they stop changing."""
        seen = None
        while self._files is not None:
            now = await self._aside(self._files.unread)
            if now is None:
                return
            if now == seen:
                async with self._turn:
                    if await self._aside(self._files.changed):  # no other reload came first
                        still = partial(self._files.read_if_still, now)
                        await self._reload("files changed", self._files, still)
                seen = None
            else:
                seen = now
                await asyncio.sleep(SETTLE_SECONDS)

    def is_reading(self) -> bool:
        """Whether a thread still reads files. The thread may outlive the task that waited for it."""
        return bool(self._reads)

    async def _aside(self, work: Callable[[], T]) -> T:
        """Run blocking work in a thread. The thread continues if the waiting task is cancelled."""

        def counted() -> T:
            token = object()
            self._reads.add(token)
            try:
                return work()
            finally:
                self._reads.discard(token)

        return await asyncio.to_thread(counted)

    async def _reload(self, cause: Cause, files: Files, read: Callable[[], Contents | None]) -> Reload:
        before = self._live.snapshot
        try:
            found = await self._aside(read)
            if found is None:
                return self.last
            loaded, policies, callers = found
            faults = tuple(in_order(unchangeable(before.settings, loaded)))
        except ConfigurationError as exc:
            faults = exc.faults
        except Exception as exc:  # a defect of the sidecar must not end the watching
            LogEvent.RELOAD_FAILED.log(exc=exc)
            message = f"the sidecar failed to read it ({type(exc).__name__}); see the log"
            faults = (Fault(str(files.config), "", message),)
        if self.draining:
            return self._impossible(cause, "the sidecar is shutting down; its next start reads everything")
        if faults:
            return self._refused(cause, faults, changed=await self._renew_tokens(before))
        after = Snapshot(loaded.settings, policies, before.methods.replaced(callers))
        changed = _changed(before, after)
        if changed:
            self._live.snapshot = after
        self.last = Reload(
            time=self._clock(),
            cause=cause,
            snapshot=self._live.snapshot,
            changed=changed,
            shadowed=loaded.shadowed,
        )
        self._metrics.reloads.labels("ok" if changed else "unchanged").inc()
        self._show_last()
        old, new = _numbers(before), _numbers(after)
        fields: dict[str, Any] = {
            **new,
            **{f"old_{name}": number for name, number in old.items()},
            "cause": cause,
            "changed": changed,
            "shadowed": loaded.shadowed,
            "policy_revision": policies.revision,
            "old_policy_revision": before.policies.revision if before.policies else None,
            "config_revision": after.revision,
            "old_config_revision": before.revision,
        }
        if not changed:
            LogEvent.RELOADED_UNCHANGED.log(**fields)
        elif fewer := [name.replace("_", " ") for name in new if new[name] < old[name]]:
            LogEvent.RELOADED_WITH_FEWER.log(" and ".join(fewer), **fields)
        else:
            LogEvent.RELOADED.log(**fields)
        if any(key.startswith("gate.unlisted.") for key in changed):
            announce_unlisted(loaded.settings)
        if changed:
            warn_of_openings(loaded.settings)
        return self.last

    async def _renew_tokens(self, before: Snapshot) -> tuple[str, ...]:
        """Put the tokens in force that their file names, although the rest of a reload is refused. The keys
        that have changed: that of the file, or none, also if the file is not valid."""
        file, callers = before.settings.auth.tokens.file, before.methods.callers
        if file is None:
            return ()
        try:
            renewed = replace(callers, tokens=await self._aside(partial(tokens.read, file)))
        except ConfigurationError:
            return ()  # it is among the faults of the reload
        changed = tuple(callers.differing(renewed))
        if changed:
            self._live.snapshot = replace(before, methods=before.methods.replaced(renewed))
            LogEvent.TOKENS_RELOADED.log(tokens=len(renewed.tokens.tokens if renewed.tokens else ()))
        return changed

    def _refused(self, cause: Cause, faults: Sequence[Fault], *, changed: tuple[str, ...]) -> Reload:
        errors = tuple(map(str, faults))
        self.last = Reload(
            time=self._clock(), cause=cause, snapshot=self._live.snapshot, errors=errors, changed=changed
        )
        self._metrics.reloads.labels("refused").inc()
        self._show_last()
        LogEvent.RELOAD_REFUSED.log(cause=cause, errors=errors)
        return self.last

    def _impossible(self, cause: Cause, why: str) -> Reload:
        """Refuse a reload that is impossible with any files. `last` does not record it."""
        LogEvent.RELOAD_IMPOSSIBLE.log(cause=cause, errors=(why,))
        return Reload(time=self._clock(), cause=cause, snapshot=self._live.snapshot, errors=(why,))

    def _show_last(self) -> None:
        self._metrics.expect(route.label for route in self._live.snapshot.settings.gate.routes)
        self._metrics.last_reload_success.set(not self.last.errors)
        self._metrics.last_reload_time.set(self.last.time / SECOND)


def unchangeable(before: Settings, loaded: Loaded) -> Iterator[Fault]:
    """A fault for each changed key that cannot change while the sidecar runs."""
    values = values_of(before)
    for key in differing(before, loaded.settings):
        if not KEYS[key].is_live:
            value = "the old value" if KEYS[key].is_secret else json.dumps(values[key], ensure_ascii=False)
            message = f"cannot change while it runs; restart to change it, or put back {value}"
            yield Fault(loaded.document.place(tuple(key.split("."))), key, message)


def _changed(before: Snapshot, after: Snapshot) -> tuple[str, ...]:
    keys = (
        *differing(before.settings, after.settings),
        *before.methods.callers.differing(after.methods.callers),
    )
    revisions = [snapshot.policies.revision if snapshot.policies else None for snapshot in (before, after)]
    return keys if revisions[0] == revisions[1] or "policies" in keys else (*keys, "policies")


def _numbers(snapshot: Snapshot) -> dict[str, int]:
    """The numbers of entries in the catalogue, rules and gated routes. A drop reveals a truncated file."""
    policies = snapshot.policies
    return {
        "actions": len(policies.actions) + len(policies.globs) if policies else 0,
        "rules": len(policies.rules) if policies else 0,
        "gated_routes": len(snapshot.enforced),
    }


def announce_unlisted(in_force: Settings) -> None:
    """Log what becomes of requests that no route lists."""
    unlisted = in_force.gate.unlisted
    LogEvent.UNLISTED.log(
        reads=unlisted.reads, writes=unlisted.writes, excepted=[path.text for path in unlisted.excepted]
    )


def warn_of_openings(in_force: Settings) -> None:
    """Log a warning for each setting that admits actions without a scope."""
    least = in_force.gate.scope_required_from
    if least > RiskClass.LOW:
        LogEvent.SCOPELESS_ACTIONS.log(least.value)
    shadowed = [route.label for route in Snapshot(in_force, None).shadow_routes]
    if shadowed:
        LogEvent.SHADOW_ROUTES.log(routes=shadowed)
