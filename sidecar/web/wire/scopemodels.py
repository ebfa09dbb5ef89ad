"""What the calls of `scopelists` answer, as models; as in answermodels, a test holds the answers to them."""

from __future__ import annotations

from sidecar.web.wire.answermodels import AnswerModel, Execution, Scope


class TenantScope(Scope):
    """A scope as operators see it."""

    tenant_id: str


class ScopePage(AnswerModel):
    """A page of scopes, newest first. A filtered one may be short, or empty, and still have a `next`."""

    scopes: list[TenantScope]
    next: str | None


class SpentScope(TenantScope):
    """A scope with the executions that it admitted, oldest first."""

    executions: list[Execution]
