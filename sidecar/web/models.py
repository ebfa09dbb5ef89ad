"""What may stand in the bodies of the sidecar's own endpoints. Pydantic stops here."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sidecar.core.facts import MAX_TARGET_AGENTS, is_identifier
from sidecar.core.money import is_whole_micros, to_micros
from sidecar.core.scope import MAX_INTENT_CHARS
from sidecar.errors import Refusal

MAX_ACTIONS = 100


def _identifier(value: object) -> object:
    if not is_identifier(value):
        raise ValueError("must be a string of 1 to 256 printable characters")
    return value


def _intent(value: object) -> object:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is required and must say why; it cannot be blank")
    if len(value) > MAX_INTENT_CHARS:
        raise ValueError(f"must have at most {MAX_INTENT_CHARS} characters")
    return value


def _micros(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError("must be a number of dollars")
    micros = to_micros(value)
    if not is_whole_micros(Decimal(value)):
        raise ValueError("must have at most six decimals")
    return micros


Identifier = Annotated[str, BeforeValidator(_identifier)]
Micros = Annotated[int, BeforeValidator(_micros)]


class WireModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ScopeRequest(WireModel):
    """The body of `POST /api/v1/recovery/scope`. What is None was not given and takes its default."""

    incident_id: Identifier
    action: Identifier | None = None
    allowed_actions: Annotated[list[Identifier], Field(min_length=1, max_length=MAX_ACTIONS)] | None = None
    intent: Annotated[str, BeforeValidator(_intent)]
    max_cost_usd: Micros | None = None
    max_attempts: int | None = None
    ttl_seconds: int | None = None
    target_agents: Annotated[list[Identifier], Field(max_length=MAX_TARGET_AGENTS)] = []
    created_by: Identifier = "api"

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_absent(cls, values: Any) -> Any:
        # The defaults are None here only to tell "not given"; on the wire null is a wrong value.
        return {name: (_Null() if value is None else value) for name, value in values.items()}

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions asked for, each once, in order."""
        named = [*([self.action] if self.action else []), *(self.allowed_actions or [])]
        return tuple(dict.fromkeys(named))


class ReconcileRequest(WireModel):
    """The body of `POST /api/v1/executions/{decision_id}/reconcile`."""

    outcome: Literal["executed", "not_executed"]
    cost_usd: Micros | None = None
    reason: Annotated[str, Field(max_length=MAX_INTENT_CHARS)] | None = None


class _Null:
    """A null that no field takes."""


Model = TypeVar("Model", bound=WireModel)

# Pydantic's words for what its own checks find, in ours.
_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is not known here",
    "int_type": "must be a whole number",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "too_short": "must not be empty",
    "too_long": "has too many entries",
    "string_too_long": "is too long",
    "literal_error": "must be one of {expected}",
}


def validated(model: type[Model], document: Mapping[str, Any], code: str) -> Model | Refusal:
    """The model, or a refusal under `code` that names the first wrong member and lists all of them."""
    try:
        return model.model_validate(document)
    except ValidationError as exc:
        found = [
            {"member": "/" + "/".join(str(part) for part in error["loc"]), "problem": _problem(error)}
            for error in exc.errors(include_url=False)
        ]
        return wrong(code, found[0]["member"].lstrip("/"), found[0]["problem"], found)


def wrong(code: str, member: str, problem: str, errors: list[dict[str, str]] | None = None) -> Refusal:
    """A refusal that is about one member."""
    listed = errors or [{"member": f"/{member}", "problem": problem}]
    return Refusal(code, f"{member} {problem}.", {"member": member, "errors": listed})


def _problem(error: Any) -> str:
    context: dict[str, Any] = error.get("ctx") or {}
    if error["type"] == "value_error":
        return str(context["error"])
    if isinstance(error["input"], _Null):
        return "must not be null"
    return _WORDS.get(error["type"], "has a wrong type or value").format_map({"expected": "", **context})
