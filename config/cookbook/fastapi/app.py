"""A recovery backend in FastAPI. It does not know scopes, and executes what the gate forwards."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Request, Response
from pydantic import BaseModel


class Execution(BaseModel):
    """The body that the gate judged. Other members of it (scope_id) are ignored."""

    incident_id: str
    action: Literal["retry_agent", "restart_agent"]
    parameters: dict[str, Any] = {}


class Done(BaseModel):
    """The answer. The gate adds its own members later."""

    success: bool
    action: str
    executed_before: bool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what executions need before the first request, and close it after the last."""
    # By decision. Keep yours in a database, with the decision id as its unique key.
    app.state.done = {}
    yield
    app.state.done.clear()


app = FastAPI(lifespan=lifespan)


@app.get("/api/v1/agents")
async def agents(request: Request) -> dict[str, list[str]]:
    """Not gated: requests pass through."""
    return {"recovered": sorted({done["incident_id"] for done in request.app.state.done.values()})}


@app.post("/api/v1/recovery/execute")
async def execute(
    asked: Execution,
    request: Request,
    response: Response,
    # Required, so a request past the gate gets 422. The header is not a secret, so it protects nothing.
    decision_id: Annotated[str, Header(alias="Scopegate-Decision-Id")],
) -> Done:
    """Execute once for each decision, and report the cost."""
    done: dict[str, dict[str, Any]] = request.app.state.done
    before = decision_id in done
    if not before:
        done[decision_id] = asked.model_dump()  # before the execution; also a key for your audit
        # ... here the agent is retried ...
    # The real cost, in dollars. Without this header the action's max_cost_usd counts as spent.
    response.headers["X-Recovery-Cost-USD"] = "0.04"
    return Done(success=True, action=asked.action, executed_before=before)
