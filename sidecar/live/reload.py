"""Reloading: the files are read anew, checked as a whole, and put in force in one assignment.

What cannot be used, or cannot change while the sidecar runs, changes nothing: the old terms stay in force.
What is taken up without being asked for has rested first: the beginning of a file may be valid, and say less.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

from sidecar.core.policy import PolicySet, RiskClass
from sidecar.core.record import iso_time
from sidecar.errors import ConfigurationError, Fault
from sidecar.files.yamlfile import contents, in_order
from sidecar.live.terms import Live, Terms
from sidecar.policies import files as policyfiles
from sidecar.settings import reading as settings
from sidecar.settings.keys import LIVE, SECRET, differing, values_of
from sidecar.settings.reading import Loaded, Settings
from sidecar.telemetry.metrics import Metrics

logger = logging.getLogger("scopegate.reload")

# How often files are read that change while they are read, before that is an error.
TRIES = 3
# How long files that changed must hold the same before they are taken up without being asked for.
SETTLE_SECONDS = 0.4

Cause = Literal["start", "signal", "call", "files changed"]
T = TypeVar("T")


class Files:
    """The files that the terms are read from, and what they held when they were last read.

    What overrides them stays as it was at the start, whatever becomes of the environment.
    """

    def __init__(
        self, config: Path, *, environment: Mapping[str, str], overrides: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.config = config
        self.policies: Path | None = None  # the folder that the configuration named last
        self.warnings: tuple[str, ...] = ()  # about the environment
        self._environment = dict(environment)
        self._overrides = tuple(overrides)
        self._digest = b""

    def read(self) -> tuple[Loaded, PolicySet]:
        """What stands in them, all of it at one moment. Blocks. Raises ConfigurationError."""
        for _ in range(TRIES):
            found = self._once()
            if self.changed():
                continue  # what was read may be a mixture
            if isinstance(found, ConfigurationError):
                raise found
            return found
        message = "this file or the policies change while they are read; reload again once they rest"
        raise ConfigurationError([Fault(str(self.config), "", message)])

    def read_if_still(self, seen: bytes) -> tuple[Loaded, PolicySet] | None:
        """As `read`, where they hold what `unread` gave; None, and they stay unread, where they do not."""
        before = self._digest
        found = self._once()
        # Where the configuration names another folder now, what that one holds was not seen either.
        if self._digest != seen or self.changed():
            self._digest = before
            return None
        if isinstance(found, ConfigurationError):
            raise found
        return found

    def unread(self) -> bytes | None:
        """A hash of what they hold, None where that is what was last read. Blocks."""
        now = _digest([self.config]) + _digest(_policy_files(self.policies))
        return None if now == self._digest else now

    def changed(self) -> bool:
        """Whether they hold anything else than when they were last read. Blocks."""
        return self.unread() is not None

    def _once(self) -> tuple[Loaded, PolicySet] | ConfigurationError:
        config = _digest([self.config])
        try:
            loaded = settings.load(self.config, environment=self._environment, overrides=self._overrides)
            self.policies, self.warnings = loaded.settings.policies, loaded.warnings
        except ConfigurationError as exc:
            return exc
        finally:
            self._digest = config + _digest(_policy_files(self.policies))
        try:
            return loaded, policyfiles.load(self.policies)
        except ConfigurationError as exc:
            return exc


def _policy_files(folder: Path | None) -> Iterable[Path]:
    """What the folder holds of YAML; the folder itself where it cannot be read."""
    if folder is None:
        return ()
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return (folder,)
    return [folder / name for name in names if name.endswith((".yaml", ".yml")) and name[0] != "."]


def _digest(files: Iterable[Path]) -> bytes:
    """A hash of names and contents, or of why there are none."""
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
    """One reload: the terms in force after it, and either what it changed in them or why it changed nothing.

    `changed` are keys of the configuration, `policies` among them where the set is another one. `shadowed`
    are the keys of the file that the environment or a flag overrides.
    """

    time: int
    cause: Cause
    terms: Terms
    errors: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    shadowed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As `status` shows the last one."""
        return {"time": iso_time(self.time), "ok": not self.errors, "errors": list(self.errors)}


class Reloader:
    """Puts new terms in force, one reload after another. Without files there is nothing to read anew."""

    def __init__(
        self, files: Files | None, *, live: Live, metrics: Metrics, clock: Callable[[], int]
    ) -> None:
        self._files = files
        self._live = live
        self._metrics = metrics
        self._clock = clock
        self._turn = asyncio.Lock()
        self._reads: set[object] = set()
        self.draining = False
        self.renew: Callable[[], Awaitable[None]] | None = None  # certificates, which are files, too
        self.last = Reload(time=clock(), cause="start", terms=live.terms)
        self._show_last()

    async def reload(self, cause: Cause) -> Reload:
        """Read everything anew, in turn. What is wrong with it stands in `errors`."""
        if self.renew is not None:
            await self.renew()
        async with self._turn:
            if self._files is None:
                return self._impossible(cause, "there is no configuration file; it was started without one")
            return await self._reload(cause, self._files, self._files.read)

    async def catch_up(self) -> None:
        """If the files were changed since they were last read, reload once they rest."""
        seen = None
        while self._files is not None:
            now = await self._aside(self._files.unread)
            if now is None:
                return
            if now == seen:
                async with self._turn:
                    if await self._aside(self._files.changed):  # no call was faster
                        still = partial(self._files.read_if_still, now)
                        await self._reload("files changed", self._files, still)
                seen = None
            else:
                seen = now
                await asyncio.sleep(SETTLE_SECONDS)

    def is_reading(self) -> bool:
        """Whether a thread still reads files, even one that nobody waits for any more."""
        return bool(self._reads)

    async def _aside(self, work: Callable[[], T]) -> T:
        """What takes long, in a thread. That goes on where the waiting for it is cancelled."""

        def counted() -> T:
            token = object()
            self._reads.add(token)
            try:
                return work()
            finally:
                self._reads.discard(token)

        return await asyncio.to_thread(counted)

    async def _reload(
        self, cause: Cause, files: Files, read: Callable[[], tuple[Loaded, PolicySet] | None]
    ) -> Reload:
        before = self._live.terms
        try:
            found = await self._aside(read)
            if found is None:
                return self.last
            loaded, policies = found
            faults = tuple(in_order(unchangeable(before.settings, loaded)))
        except ConfigurationError as exc:
            faults = exc.faults
        except Exception as exc:  # our own mistake must not end the watching
            logger.exception("reading configuration and policies failed")
            message = f"the sidecar failed to read it ({type(exc).__name__}); see the log"
            faults = (Fault(str(files.config), "", message),)
        if self.draining:
            return self._impossible(cause, "the sidecar is shutting down; its next start reads everything")
        if faults:
            return self._refused(cause, faults)
        after = Terms(loaded.settings, policies)
        changed = _changed(before, after)
        if changed:
            self._live.terms = after
        self.last = Reload(
            time=self._clock(),
            cause=cause,
            terms=self._live.terms,
            changed=changed,
            shadowed=loaded.shadowed,
        )
        self._metrics.reloads.labels("ok" if changed else "unchanged").inc()
        self._show_last()
        old, new = _numbers(before), _numbers(after)
        fewer = [name.replace("_", " ") for name in new if new[name] < old[name]]
        less = f"reloaded with fewer {' and '.join(fewer)}" if fewer else "reloaded"
        logger.log(
            logging.WARNING if fewer else logging.INFO,
            less if changed else "reloaded; nothing is different",
            extra={
                **new,
                **{f"old_{name}": number for name, number in old.items()},
                "cause": cause,
                "changed": changed,
                "shadowed": loaded.shadowed,
                "policy_revision": policies.revision,
                "old_policy_revision": before.policies.revision if before.policies else None,
                "config_revision": after.revision,
                "old_config_revision": before.revision,
            },
        )
        if changed:
            warn_of_openings(loaded.settings)
        return self.last

    def _refused(self, cause: Cause, faults: Sequence[Fault]) -> Reload:
        errors = tuple(map(str, faults))
        self.last = Reload(time=self._clock(), cause=cause, terms=self._live.terms, errors=errors)
        self._metrics.reloads.labels("refused").inc()
        self._show_last()
        logger.error(
            "reload refused; the old configuration and policies stay in force",
            extra={"cause": cause, "errors": errors},
        )
        return self.last

    def _impossible(self, cause: Cause, why: str) -> Reload:
        """Nothing can come of it whatever the files hold, so it is not remembered either."""
        logger.warning("reload refused", extra={"cause": cause, "errors": (why,)})
        return Reload(time=self._clock(), cause=cause, terms=self._live.terms, errors=(why,))

    def _show_last(self) -> None:
        self._metrics.last_reload_success.set(not self.last.errors)
        self._metrics.last_reload_time.set(self.last.time / 1_000_000)


def unchangeable(before: Settings, loaded: Loaded) -> Iterator[Fault]:
    """A fault for each key that differs and cannot change while the sidecar runs."""
    values = values_of(before)
    for key in differing(before, loaded.settings):
        if key not in LIVE:
            value = "the old value" if key in SECRET else json.dumps(values[key], ensure_ascii=False)
            message = f"cannot change while it runs; restart to change it, or put back {value}"
            yield Fault(loaded.document.place(tuple(key.split("."))), key, message)


def _changed(before: Terms, after: Terms) -> tuple[str, ...]:
    keys = differing(before.settings, after.settings)
    revisions = [terms.policies.revision if terms.policies else None for terms in (before, after)]
    return keys if revisions[0] == revisions[1] or "policies" in keys else (*keys, "policies")


def _numbers(terms: Terms) -> dict[str, int]:
    """How much there is that refuses, so that it shows where a file was cut short."""
    policies = terms.policies
    return {
        "actions": len(policies.actions) if policies else 0,
        "rules": len(policies.rules) if policies else 0,
        "gated_routes": len(terms.enforced),
    }


def warn_of_openings(in_force: Settings) -> None:
    """Say aloud what lets actions through without a scope."""
    least = in_force.gate.scope_required_from
    if least > RiskClass.LOW:
        logger.warning("actions below %s risk need no scope", least.value)
    shadowed = [route.path.text for route in Terms(in_force, None).shadow_routes]
    if shadowed:
        logger.warning("routes in shadow mode protect nothing, they only record", extra={"routes": shadowed})
