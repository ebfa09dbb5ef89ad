"""A decision record as its callers see it, and the service that keeps it without ever standing in their way.

A decision was made already when its record is written. So a store that fails is logged and counted, and
whoever decided goes on.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import orjson
from prometheus_client import Counter
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sidecar.core.command import Bind, Emit, Reply, Turn
from sidecar.core.record import (
    CausalRole,
    DecisionOutcome,
    DecisionSource,
    DecisionTrigger,
    DecisionType,
    Record,
)
from sidecar.errors import StoreUnavailable
from sidecar.files.jsonvalue import as_text, plain
from sidecar.ids import new_decision_id
from sidecar.library.runtime import Library, library, opened

logger = logging.getLogger("scopegate.decisions")

MAX_RECORD_BYTES = 1 << 20

# In the registry of the embedding program, which knows how to publish it.
FAILED = Counter(
    "scopegate_library_emissions_failed",
    "Decision records, bindings of runs and turns of switches that the store did not confirm.",
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


# Ids and reasons are text, whatever they came as.
Text = Annotated[str, BeforeValidator(as_text)]
Members = Annotated[dict[str, Any], BeforeValidator(plain)]


class DecisionRecord(BaseModel):
    """Who decided what, when and why: the 14 fields of the contract. It does not change once it is made.

    What is put into `decision_inputs` and `details` is copied, and becomes JSON at once: times, enumerations,
    ids, sets, bytes and whatever else JSON does not know become text, lists and objects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    decision_id: Text = Field(default_factory=new_decision_id)
    decision_type: DecisionType
    decision_source: DecisionSource
    decision_trigger: DecisionTrigger
    decision_inputs: Members = Field(default_factory=dict)
    decision_outcome: DecisionOutcome
    decision_reason: Text | None = None
    run_id: Text | None = None
    workflow_id: Text | None = None
    tenant_id: Text = "default"
    request_id: Text | None = None
    causal_role: CausalRole = CausalRole.IN_RUN
    decided_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    details: Members = Field(default_factory=dict)

    @field_validator("decided_at")
    @classmethod
    def _in_utc(cls, value: datetime) -> datetime:
        try:
            return value.astimezone(UTC)
        except OverflowError as exc:
            raise ValueError("is outside the years 1 to 9999 in UTC") from exc

    def to_dict(self) -> dict[str, Any]:
        """The 14 fields as JSON has them: enumerations as their values, the time as ISO 8601 in UTC with six
        decimals. The dict and all in it are the caller's own."""
        return core_record(self).to_dict()


def core_record(record: DecisionRecord) -> Record:
    """The record as the core has it, and a copy: what becomes of the one that was given does not matter.

    Raises TypeError for what is no DecisionRecord: that is a mistake of the caller, not of the store.
    """
    if not isinstance(record, DecisionRecord):
        raise TypeError(f"record must be a DecisionRecord, not {type(record).__name__}")
    values = {field.name: getattr(record, field.name) for field in fields(Record)}
    return Record(
        **{
            **values,
            "decision_inputs": plain(record.decision_inputs),
            "details": plain(record.details),
            "decided_at": (record.decided_at - _EPOCH) // _MICROSECOND,
        }
    )


def decision_record(record: Record) -> DecisionRecord:
    """A record of the core as callers see it. Raises ValueError for what is no record."""
    values = {field.name: getattr(record, field.name) for field in fields(Record)}
    return DecisionRecord(**{**values, "decided_at": _EPOCH + record.decided_at * _MICROSECOND})


class DecisionRecordService:
    """Appends decision records to the log. It never raises for a store that fails, and never waits for long.
    What is no DecisionRecord raises TypeError.

    `db_url` names a store as `configure` does (`sqlite:///file.db`); None means the configured one. Raises
    ValueError for a URL that names no store. `failures` counts what could not be kept.
    """

    def __init__(self, db_url: str | None = None) -> None:
        # A relative file stays where it was, though the program may change its working folder.
        self._url = None if db_url is None else opened(db_url).url
        self._in_use: Library | None = None
        self._counting = threading.Lock()
        self._failures = 0

    @property
    def failures(self) -> int:
        """How many records, bindings and turns the store did not confirm."""
        return self._failures

    async def emit(self, record: DecisionRecord) -> bool:
        """Append a record. True once it is on disk; False, logged and counted, where it could not be kept.

        Once it was called, a caller that is cancelled does not keep the record from being written.
        """
        emit = Emit(record=core_record(record), origin="library")
        try:
            chosen = self._library()
            if chosen is self._in_use:
                _check_size(emit)
                await chosen.submit(emit)
                return True
            # The first use opens the store, on a thread: there no cancellation ends it, and no loop's end.
            first = asyncio.get_running_loop().run_in_executor(None, self.submit, emit)
            return await asyncio.shield(first) is not None
        except Exception as exc:
            self._failed(emit, exc)
            return False

    def emit_sync(self, record: DecisionRecord) -> bool:
        """As `emit`, for callers that do not await; inside a running loop, too."""
        return self.submit(Emit(record=core_record(record), origin="library")) is not None

    def submit(self, command: Emit | Bind | Turn) -> Reply | None:
        """Apply a command; None, logged and counted, where the store did not confirm it."""
        try:
            if isinstance(command, Emit):
                _check_size(command)
            chosen = self._library()
            reply = chosen.submit_sync(command)
        except Exception as exc:
            self._failed(command, exc)
            return None
        self._in_use = chosen
        return reply

    def _library(self) -> Library:
        return library() if self._url is None else opened(self._url)

    def _failed(self, command: Emit | Bind | Turn, exc: Exception) -> None:
        # What is not the store's own word for its trouble is a mistake: then it matters where it came from.
        trace = None if isinstance(exc, StoreUnavailable) else exc
        logger.error("the store did not confirm %s: %s", _called(command), exc, exc_info=trace)
        with self._counting:
            self._failures += 1
        FAILED.inc()


def _check_size(emit: Emit) -> None:
    size = len(orjson.dumps(emit.record.to_dict()))
    if size > MAX_RECORD_BYTES:
        raise StoreUnavailable(f"it has {size} bytes, and at most {MAX_RECORD_BYTES} are kept")


def _called(command: Emit | Bind | Turn) -> str:
    match command:
        case Emit():
            return (
                f"the decision record {command.record.decision_id!r} ({command.record.decision_type.value})"
            )
        case Bind():
            return f"the run {command.run_id!r} of the request {command.request_id!r}"
        case Turn():
            return f"the turn of {command.switch} to {'on' if command.on else 'off'}"


_choosing = threading.Lock()
_service: DecisionRecordService | None = None


def get_decision_service() -> DecisionRecordService:
    """The one service of this process. It records in the configured store."""
    global _service
    with _choosing:
        if _service is None:
            _service = DecisionRecordService()
        return _service
