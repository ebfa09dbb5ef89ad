"""Watching the configuration and policy files, so that changes cause an automatic reload.

A notification for a folder only triggers a check. The contents of the files decide whether anything changed.
The system's notifications (inotify) arrive at once, but some changes cause none: on network file systems,
behind a link further up the path, or while a folder is missing. The files are therefore also checked every
second, or twice a second if there are no notifications at all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from watchfiles import awatch

from sidecar.live.reload import Files
from sidecar.telemetry.events import LogEvent

LOOK_SECONDS = 1.0
POLL_SECONDS = 0.5
# An editor or a ConfigMap update causes several notifications at once. They are gathered until one step has
# none.
STEP_SECONDS = 0.05
GATHER_SECONDS = 0.5


async def watch(files: Files, look: Callable[[], Awaitable[None]]) -> None:
    """Call `look` whenever the files may have changed, until cancelled."""
    polling = _polling_is_wanted()
    while True:
        places = await asyncio.to_thread(_places, files)
        if polling or places is None:
            await look()
            await asyncio.sleep(POLL_SECONDS)
            continue
        try:
            async with aclosing(_notices(places)) as notices:
                async for moved in notices:
                    await look()
                    if moved or await asyncio.to_thread(_places, files) != places:
                        break
        except FileNotFoundError:
            await asyncio.sleep(POLL_SECONDS)  # a folder disappeared a moment ago
        except (OSError, RuntimeError, ExceptionGroup) as exc:
            polling = True
            LogEvent.FILES_POLLED.log(cause=str(exc))


def _polling_is_wanted() -> bool:
    """Whether the variable of watchfiles asks for polling, parsed as watchfiles parses it."""
    text = os.environ.get("WATCHFILES_FORCE_POLLING", "")
    return text.lower() not in ("", "false", "disable", "disabled")


@dataclass(frozen=True, slots=True)
class Places:
    """The folders and names where a change of the files is noticed.

    `folders` maps resolved paths to device and inode, because another folder may replace one of the same
    name.
    """

    folders: Mapping[str, tuple[int, int]]
    names: frozenset[str]

    def hold(self, path: str) -> bool:
        """Whether a notification may concern the files. Kubernetes replaces only the link `..data`."""
        name = os.path.basename(path)
        return (
            name in self.names
            or name.endswith((".yaml", ".yml"))
            or name.startswith("..")
            or path in self.folders
        )


def _places(files: Files) -> Places | None:
    """The places to watch, or None if one of the folders is missing."""
    config = os.path.abspath(files.config)
    behind = os.path.realpath(config)
    folders = [os.path.dirname(config), os.path.dirname(behind)]
    names = [os.path.basename(config), os.path.basename(behind)]
    if files.policies is not None:
        folders += [str(files.policies), str(files.policies.parent)]
        names.append(files.policies.name)
    found: dict[str, tuple[int, int]] = {}
    try:
        for folder in folders:
            status = os.stat(folder)
            found[os.path.realpath(folder)] = status.st_dev, status.st_ino
    except OSError:
        return None
    return Places(found, frozenset(names))


async def _notices(places: Places) -> AsyncGenerator[bool, None]:
    """Yield at the beginning, at each notification and each second, whether a folder may be another one."""
    changes = awatch(
        *places.folders,
        watch_filter=lambda _, path: places.hold(path),
        step=round(STEP_SECONDS * 1000),
        debounce=round(GATHER_SECONDS * 1000),
        rust_timeout=round(LOOK_SECONDS * 1000),
        yield_on_timeout=True,
        recursive=False,
        force_polling=False,  # watchfiles' polling compares times; a check compares contents
        ignore_permission_denied=True,
    )
    coming = asyncio.ensure_future(anext(changes))
    try:
        await asyncio.sleep(0)  # the watch has begun, so changes from now on are noticed
        yield False
        while True:
            stirred = await coming
            coming = asyncio.ensure_future(anext(changes))
            yield any(path in places.folders for _, path in stirred)
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await changes.aclose()
