"""The log of decisions for operators: its pages, and one decision with its execution."""

from __future__ import annotations

from aiohttp import web

from sidecar.errors import Refusal
from sidecar.store.batch import Store
from sidecar.store.lists import KINDS
from sidecar.web.api.operation import (
    AFTER_NUMBER,
    DECISION_ID,
    LIMIT,
    SINCE,
    STORE_ERRORS,
    Answer,
    Operation,
    choice,
    link,
)
from sidecar.web.api.routes import Query
from sidecar.web.wire import answers


class DecisionLists:
    """Handlers of the admin listener for the list of decisions and for one decision."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def list(self, request: web.Request, query: Query) -> answers.DecisionList:
        del request
        page = await self._store.engine.decisions(
            query.given, since=query.since, before=query.before, limit=query.limit
        )
        return {
            "decisions": [answers.logged_decision(row.envelope, row.bound_run_id) for row in page.rows],
            "next": page.next,
        }

    async def one(self, request: web.Request) -> answers.Decision | Refusal:
        decision_id = request.match_info["decision_id"]
        stored = await self._store.engine.decision(decision_id)
        if stored is None:
            named = {"decision_id": decision_id[:256]}
            return Refusal("decision_not_found", "No decision has this decision_id.", named)
        logged = answers.logged_decision(stored.envelope, stored.bound_run_id)
        execution = await self._store.engine.execution(logged["admission_id"] or decision_id)
        return {
            **logged,
            "hash": stored.hash.hex(),
            "previous_hash": stored.previous.hex(),
            "execution": None if execution is None else answers.execution(execution),
            "outcome": None if execution is None else execution.status,
        }


DECISIONS = (
    Operation(
        call="GET /api/v1/decisions",
        name="listDecisions",
        tag="Decisions",
        summary="List decisions",
        description="Newest first. Filters narrow each other. With `action`, and without a scope, incident, "
        "request or run, a page reads only a part of the list. It may then be short or empty, and still have "
        "a `next`.",
        parameters=(
            choice("type", "Of this type.", KINDS["type"]),
            choice("outcome", "With this outcome.", KINDS["outcome"]),
            choice("event", "Left by this event.", KINDS["event"]),
            choice("scope_id", "About this scope."),
            choice("incident_id", "About this incident."),
            choice("action", "About this action."),
            choice("request_id", "Of this request."),
            choice("run_id", "Of this run, named in the record or bound later."),
            choice("tenant_id", "Of this tenant."),
            SINCE,
            LIMIT,
            AFTER_NUMBER,
        ),
        answers=(
            Answer(
                "A page of them.",
                links={"Newest": link("getDecision", decision_id="$response.body#/decisions/0/decision_id")},
            ),
        ),
        errors=("invalid_request", *STORE_ERRORS),
        roles=("observer",),
        handler=DecisionLists.list,
    ),
    Operation(
        call="GET /api/v1/decisions/{decision_id}",
        name="getDecision",
        tag="Decisions",
        summary="One decision",
        parameters=(DECISION_ID,),
        answers=(Answer("With its hash link, and its execution."),),
        errors=("decision_not_found", *STORE_ERRORS),
        roles=("observer",),
        handler=DecisionLists.one,
    ),
)
