"""The public decision record, and the service that appends records without ever failing its callers.

A decision is already made when its record is written. So a failure of the store is logged and counted, and
the caller continues.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import fields
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
from prometheus_client import Counter
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sidecar.core.command import Bind, Emit, Reply, Turn
from sidecar.core.instant import to_datetime, to_instant
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
from sidecar.library.runtime import ThreadedStore, configured_store, opened
from sidecar.telemetry.events import LogEvent

MAX_RECORD_BYTES = 1 << 20

# In the default registry, because the embedding program publishes its metrics itself.
FAILED = Counter(
    "scopegate_library_emissions_failed",
    "Decision records, bindings of runs and turns of switches that the store did not confirm.",
)


# Ids and reasons of any type become text.
Text = Annotated[str, BeforeValidator(as_text)]
Members = Annotated[dict[str, Any], BeforeValidator(plain)]


class DecisionRecord(BaseModel):
    """A decision with its source, time and reason, in the 14 fields of a decision record. It is immutable.

    Values in `decision_inputs` and `details` are copied and become JSON at once. Times, enumerations, ids,
    sets, bytes and all other types that JSON lacks become text, lists and objects.
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
        """The 14 fields as JSON values: enumerations as their values, the time as ISO 8601 in UTC with six
        decimals. The dict is a deep copy."""
        return core_record(self).to_dict()


def core_record(record: DecisionRecord) -> Record:
    """Convert a record to the core's type. The result is a copy, so later changes to `record` have no effect.

    Raises TypeError for any other type, because that is an error of the caller and not of the store.
    """
    if not isinstance(record, DecisionRecord):
        raise TypeError(f"record must be a DecisionRecord, not {type(record).__name__}")
    values = {field.name: getattr(record, field.name) for field in fields(Record)}
    return Record(
        **{
            **values,
            "decision_inputs": plain(record.decision_inputs),
            "details": plain(record.details),
            "decided_at": to_instant(record.decided_at),
        }
    )


def decision_record(record: Record) -> DecisionRecord:
    """Convert a record of the core to the public type. Raises ValueError for invalid values."""
    values = {field.name: getattr(record, field.name) for field in fields(Record)}
    return DecisionRecord(**{**values, "decided_at": to_datetime(record.decided_at)})


class DecisionRecordService:
    """Appends decision records to the log. It never raises for a failing store, and waits at most for its
    deadline. An argument that is not a DecisionRecord raises TypeError.

    `db_url` names a store as `configure` does (`sqlite:///file.db`); None means the configured one. Raises
    ValueError for a URL that names no store. `failures` counts the calls that the store did not confirm.
    """

    def __init__(self, db_url: str | None = None) -> None:
        # The URL is made absolute now, because the program may change its working folder later.
        self._url = None if db_url is None else opened(db_url).url
        self._in_use: ThreadedStore | None = None
        self._counting = threading.Lock()
        self._failures = 0

    @property
    def failures(self) -> int:
        """How many records, bindings and turns the store did not confirm."""
        return self._failures

    async def emit(self, record: DecisionRecord) -> bool:
        """Append a record. True once it is on disk; False, logged and counted, if it could not be written.

        Cancelling the caller does not cancel the record.
        """
        emit = Emit(record=core_record(record), origin="library")
        try:
            chosen = self._library()
            if chosen is self._in_use:
                _check_size(emit)
                await chosen.submit(emit)
                return True
            # The first use opens the store on a thread, so that neither a cancellation nor the end of the
            # loop interrupts it.
            first = asyncio.get_running_loop().run_in_executor(None, self.submit, emit)
            return await asyncio.shield(first) is not None
        except Exception as exc:
            self._failed(emit, exc)
            return False

    def emit_sync(self, record: DecisionRecord) -> bool:
        """As `emit`, but synchronous. It also works inside a running loop."""
        return self.submit(Emit(record=core_record(record), origin="library")) is not None

    def submit(self, command: Emit | Bind | Turn) -> Reply | None:
        """Apply a command; None, logged and counted, if the store did not confirm it."""
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

    def _library(self) -> ThreadedStore:
        return configured_store() if self._url is None else opened(self._url)

    def _failed(self, command: Emit | Bind | Turn, exc: Exception) -> None:
        # Any exception but StoreUnavailable is a programming error, so its traceback is logged.
        trace = None if isinstance(exc, StoreUnavailable) else exc
        LogEvent.EMISSION_UNCONFIRMED.log(_called(command), exc, exc=trace)
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
    """The service of this process. It appends to the configured store."""
    global _service
    with _choosing:
        if _service is None:
            _service = DecisionRecordService()
        return _service
