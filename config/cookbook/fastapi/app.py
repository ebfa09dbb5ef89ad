"""A recovery backend in FastAPI. It knows nothing of scopes; it does what the gate lets through."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Request, Response
from pydantic import BaseModel


class Execution(BaseModel):
    """What the gate judged, byte for byte. What is not listed (scope_id) is ignored, not refused."""

    incident_id: str
    action: Literal["retry_agent", "restart_agent"]
    parameters: dict[str, Any] = {}


class Done(BaseModel):
    """What a client sees. What the gate adds to it need not stand here."""

    success: bool
    action: str
    executed_before: bool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Opens what executions need before the first request, and closes it after the last."""
    # By decision. Keep yours in a database, with the decision's id as its unique key.
    app.state.done = {}
    yield
    app.state.done.clear()


app = FastAPI(lifespan=lifespan)


@app.get("/api/v1/agents")
async def agents(request: Request) -> dict[str, list[str]]:
    """Not gated: it passes through."""
    return {"recovered": sorted({done["incident_id"] for done in request.app.state.done.values()})}


@app.post("/api/v1/recovery/execute")
async def execute(
    asked: Execution,
    request: Request,
    response: Response,
    # Required: what did not come through the gate is answered 422. It is no secret, so it protects nothing.
    decision_id: Annotated[str, Header(alias="Scopegate-Decision-Id")],
) -> Done:
    """Executes once for each decision, and says what that cost."""
    done: dict[str, dict[str, Any]] = request.app.state.done
    before = decision_id in done
    if not before:
        done[decision_id] = asked.model_dump()  # written down first: the key of your own audit trail, too
        # ... here the agent is retried ...
    # What the execution really cost, in dollars. Without this header it counts as its action's max_cost_usd.
    response.headers["X-Recovery-Cost-USD"] = "0.04"
    return Done(success=True, action=asked.action, executed_before=before)
