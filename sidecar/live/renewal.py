"""Renewal of certificates while the sidecar runs.

The sidecar loads changed certificate files. If they are unusable, the old certificate stays in force. Open
connections keep the certificate that they began with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sidecar.core.instant import to_datetime
from sidecar.files.tls import Credentials, TlsFileUnusable
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics

LOOK_SECONDS = 60.0


class Renewal:
    """Checks the files of all credentials periodically and on request."""

    def __init__(
        self,
        credentials: Sequence[Credentials],
        *,
        metrics: Metrics,
        clock: Callable[[], int],
        every: float = LOOK_SECONDS,
    ) -> None:
        """`clock` is in microseconds since 1970, `every` in seconds."""
        self._credentials = credentials
        self._metrics = metrics
        self._clock = clock
        self._every = every
        self._turn = asyncio.Lock()
        self.reading = False  # whether a thread reads files; it may outlive the task that waited for it
        for each in credentials:
            self._show(each)

    async def watch(self) -> None:
        """Check the files periodically until cancelled."""
        while self._credentials:
            await asyncio.sleep(self._every)
            await self.look()

    async def look(self) -> None:
        """Check all files now and load the changed ones."""
        async with self._turn:
            for each in self._credentials:
                try:
                    renewed = await asyncio.to_thread(self._renew, each)
                except TlsFileUnusable as exc:
                    LogEvent.CERTIFICATE_NOT_RENEWED.log(listener=each.name, cause=str(exc))
                except Exception as exc:  # a defect of the sidecar must not end the checks
                    LogEvent.RENEWAL_FAILED.log(exc=exc)
                else:
                    if renewed:
                        ends = None if each.ends is None else each.ends.isoformat()
                        LogEvent.CERTIFICATE_RENEWED.log(listener=each.name, valid_until=ends)
                        self._show(each)

    def _renew(self, each: Credentials) -> bool:
        self.reading = True
        try:
            return each.renew()
        finally:
            self.reading = False

    def _show(self, each: Credentials) -> None:
        if each.ends is None:
            return
        self._metrics.certificate_expiry.labels(each.name).set(each.ends.timestamp())
        if each.ends <= to_datetime(self._clock()):
            LogEvent.CERTIFICATE_EXPIRED.log(listener=each.name, valid_until=each.ends.isoformat())
