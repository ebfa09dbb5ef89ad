"""Freezes of executions on the admin listener: setting one, listing them, lifting one."""

from __future__ import annotations

from aiohttp import web

from sidecar.core.command import Denied, FreezeLifted, FreezeSet, LiftFreeze, SetFreeze
from sidecar.core.freeze import describe, not_found
from sidecar.errors import Refusal
from sidecar.ids import new_decision_id
from sidecar.store.batch import Store
from sidecar.telemetry.events import LogEvent
from sidecar.web.api.access import asking
from sidecar.web.api.operation import (
    BODY_ERRORS,
    DECISION_ID,
    REQUEST_ID,
    STORE_ERRORS,
    Answer,
    Body,
    Operation,
    Parameter,
    Reply,
    choice,
)
from sidecar.web.api.routes import Query, read_model
from sidecar.web.wire import answers
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.models import FreezeRequest, LiftRequest, wrong
from sidecar.web.wire.request import request_id_of

# The most freezes that a list shows. The records of older ones are in the log.
MOST_LISTED = 1_000


class FreezeApi:
    """Handlers of the admin listener."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self, request: web.Request, query: Query) -> answers.FreezeList:
        del request
        now = self._store.now()
        found = await self._store.engine.freezes_in_force(now)
        if query.given.get("all") == "true":
            newest = await self._store.engine.freezes(limit=MOST_LISTED)
            listed = {each.freeze_id for each in newest}
            found = [*newest, *(each for each in found if each.freeze_id not in listed)]
        return {"freezes": [answers.freeze(each, now) for each in found]}

    async def set(self, request: web.Request) -> Reply[answers.Freeze] | Refusal:
        wanted = await read_model(request, FreezeRequest, "invalid_freeze")
        if isinstance(wanted, Refusal):
            return wanted
        if wanted.until is not None and wanted.until <= self._store.now():
            return wrong("invalid_freeze", "until", "must be in the future")
        command = SetFreeze(
            decision_id=new_decision_id(),
            match=wanted.match.pattern(),
            excepted=wanted.excepted.pattern(),
            reason=wanted.reason,
            ends_at=wanted.until,
            request_id=request_id_of(fields_of(request)),
            principal=asking(request),
        )
        reply = await self._store.submit(command)
        if isinstance(reply, Denied):
            return reply.refusal
        assert isinstance(reply, FreezeSet)
        shown = answers.freeze(reply.freeze, self._store.now())
        LogEvent.FROZEN.log(
            freeze_id=shown["freeze_id"],
            principal=command.principal.id,
            frozen=describe(command.match, command.excepted),
            reason=shown["reason"],
            ends_at=shown["ends_at"],
        )
        return Reply(shown, status=201)

    async def lift(self, request: web.Request) -> answers.Freeze | Refusal:
        wanted = await read_model(request, LiftRequest, "invalid_freeze")
        if isinstance(wanted, Refusal):
            return wanted
        freeze_id = request.match_info["freeze_id"]
        command = LiftFreeze(
            decision_id=new_decision_id(),
            freeze_id=freeze_id,
            reason=wanted.reason,
            request_id=request_id_of(fields_of(request)),
            principal=asking(request),
        )
        reply = await self._store.submit(command)
        if isinstance(reply, Denied):
            return not_found(freeze_id[:256])
        assert isinstance(reply, FreezeLifted)
        LogEvent.UNFROZEN.log(
            freeze_id=reply.freeze.freeze_id, principal=command.principal.id, reason=wanted.reason
        )
        return answers.freeze(reply.freeze, self._store.now())


FREEZES = (
    Operation(
        call="POST /api/v1/freezes",
        name="setFreeze",
        tag="Freezes",
        summary="Freeze executions",
        description="Once this is answered, no execution that matches is admitted: neither on shadow routes, "
        "nor where no scope is needed, nor as a repeat under an idempotency key. It holds across restarts. "
        "Scopes are still granted. A fact that a request does not say counts as matching. It is recorded.",
        parameters=(REQUEST_ID,),
        body=Body(
            schema=FreezeRequest,
            examples={
                "agents may only look": {
                    "match": {"principal_kind": "agent"},
                    "except": {"principal_group": "incident-commanders"},
                    "reason": "the primary is split",
                    "until": None,
                },
                "everything": {"match": {}, "reason": "a bad release of the backend"},
            },
        ),
        answers=(Answer("It is in force.", status="201"),),
        errors=(*BODY_ERRORS, "invalid_freeze", *STORE_ERRORS),
        roles=("operator",),
        handler=FreezeApi.set,
    ),
    Operation(
        call="GET /api/v1/freezes",
        name="listFreezes",
        tag="Freezes",
        summary="List freezes",
        description=f"Those in force, newest first; of all, the newest {MOST_LISTED:,} and those in force.",
        parameters=(choice("all", "`true`: those that have ended or were lifted, too.", ("true", "false")),),
        answers=(Answer("All of them."),),
        errors=("invalid_request", *STORE_ERRORS),
        roles=("observer",),
        handler=FreezeApi.list,
    ),
    Operation(
        call="DELETE /api/v1/freezes/{freeze_id}",
        name="liftFreeze",
        tag="Freezes",
        summary="Lift a freeze",
        description="Repeatable. Executions are admitted again with the answer.",
        parameters=(Parameter("freeze_id", "path", DECISION_ID.schema), REQUEST_ID),
        body=Body(schema=LiftRequest, examples={"it is over": {"reason": "the primary is whole again"}}),
        answers=(Answer("It does not hold any more."),),
        errors=(*BODY_ERRORS, "invalid_freeze", "freeze_not_found", *STORE_ERRORS),
        roles=("operator",),
        handler=FreezeApi.lift,
    ),
)
