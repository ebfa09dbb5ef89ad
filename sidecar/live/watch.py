"""Watching the files that the terms are read from, so that a change is taken up without being asked for.

What stirs in a folder only wakes somebody who looks; whether anything changed is for the contents to say. The
system's notices (inotify) come at once. Some changes come without one: on network file systems, behind a link
further up the path, or while a folder is gone. So there is a look every second, too, and where there are no
notices at all, two a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from watchfiles import awatch

from sidecar.live.reload import Files

logger = logging.getLogger("scopegate.reload")

LOOK_SECONDS = 1.0
POLL_SECONDS = 0.5
# An editor and a ConfigMap leave several notices at a time: wait until there is none for a step.
STEP_SECONDS = 0.05
GATHER_SECONDS = 0.5


async def watch(files: Files, look: Callable[[], Awaitable[None]]) -> None:
    """Call `look` whenever the files may hold something else, until cancelled."""
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
            await asyncio.sleep(POLL_SECONDS)  # a folder went a moment ago
        except (OSError, RuntimeError, ExceptionGroup) as exc:
            polling = True
            logger.warning(
                "changes of configuration and policies give no notice; they are looked for twice a second",
                extra={"cause": str(exc)},
            )


def _polling_is_wanted() -> bool:
    """What watchfiles' own variable says, read as it reads it."""
    text = os.environ.get("WATCHFILES_FORCE_POLLING", "")
    return text.lower() not in ("", "false", "disable", "disabled")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a change of the files is noticed.

    `folders` are free of links, each with its device and number: one of the same name may take its place.
    """

    folders: Mapping[str, tuple[int, int]]
    names: frozenset[str]

    def hold(self, path: str) -> bool:
        """Whether a notice can be about the files. Kubernetes swaps `..data`, whatever the files' names."""
        name = os.path.basename(path)
        return (
            name in self.names
            or name.endswith((".yaml", ".yml"))
            or name.startswith("..")
            or path in self.folders
        )


def _places(files: Files) -> Places | None:
    """None as long as one of the folders is not there."""
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
    """Whether a folder may be another one now: at the beginning, when something stirred, and each second."""
    changes = awatch(
        *places.folders,
        watch_filter=lambda _, path: places.hold(path),
        step=round(STEP_SECONDS * 1000),
        debounce=round(GATHER_SECONDS * 1000),
        rust_timeout=round(LOOK_SECONDS * 1000),
        yield_on_timeout=True,
        recursive=False,
        force_polling=False,  # its polling compares times; a look compares contents
        ignore_permission_denied=True,
    )
    coming = asyncio.ensure_future(anext(changes))
    try:
        await asyncio.sleep(0)  # it has begun: what is changed from here on is noticed
        yield False
        while True:
            stirred = await coming
            coming = asyncio.ensure_future(anext(changes))
            yield any(path in places.folders for _, path in stirred)
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await changes.aclose()
