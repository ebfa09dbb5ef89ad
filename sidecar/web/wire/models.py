"""Models of the request bodies of the sidecar's own endpoints. The core does not use Pydantic.

Each type states its rule twice: as code, and as JSON Schema for the OpenAPI document. Tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from sidecar.core.facts import IDENTIFIER_RULE, MAX_ID_CHARS, MAX_TARGET_AGENTS, is_identifier
from sidecar.core.freeze import Pattern
from sidecar.core.globs import globbed
from sidecar.core.instant import parse_time
from sidecar.core.money import MAX_MICROS, MICROS_PER_DOLLAR, is_whole_micros, to_micros
from sidecar.core.policy import RiskClass
from sidecar.core.principal import PrincipalKind
from sidecar.core.scope import MAX_INTENT_CHARS, ReportedOutcome
from sidecar.core.wording import UNSEEN_LETTERS, visible_chars
from sidecar.errors import Refusal

MAX_ACTIONS = 100
MAX_DETAIL_CHARS = 2_000

# As JSON Schema -------------------------------------------------------------------------------------

# The characters that Python calls printable: letters, marks, numbers, punctuation, symbols and the space.
# ASCII is listed for readers without \p, such as the page under /docs.
PRINTABLE = r"^[ -~\p{L}\p{M}\p{N}\p{P}\p{S}]*$"
# One character that `visible_chars` counts. Marks that stand alone are left out, because a reader with \p{M}
# but without \p{Mc}, such as Schemathesis, cannot tell visible marks from invisible ones.
_NOT_BLANK = r"[!-~]|(?![" + "".join(sorted(UNSEEN_LETTERS)) + r"])[\p{L}\p{N}\p{P}\p{S}]"

IDENTIFIER: JsonSchemaValue = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_ID_CHARS,
    "pattern": PRINTABLE,
}
# An identifier in a header. A header carries only ASCII unchanged, and loses surrounding blanks.
IN_A_HEADER: JsonSchemaValue = {
    "type": "string",
    "maxLength": MAX_ID_CHARS,
    "pattern": "^[!-~]([ -~]*[!-~])?$",
}
INTENT: JsonSchemaValue = {"type": "string", "maxLength": MAX_INTENT_CHARS, "pattern": _NOT_BLANK}
DOLLARS: JsonSchemaValue = {
    "type": "number",
    "minimum": 0,
    "maximum": MAX_MICROS // MICROS_PER_DOLLAR,
    "multipleOf": 1 / MICROS_PER_DOLLAR,
}
MAX_EXECUTORS = 256
MAX_GLOBS = 100
TARGET_AGENTS: JsonSchemaValue = {"type": "array", "items": IDENTIFIER, "maxItems": MAX_TARGET_AGENTS}

# As code --------------------------------------------------------------------------------------------


def _identifier(value: object) -> object:
    if not is_identifier(value):
        raise ValueError(f"must be a string of {IDENTIFIER_RULE}")
    return value


def _intent(value: object) -> object:
    if not isinstance(value, str) or not visible_chars(value):
        raise ValueError("is required and must say why; it cannot be blank")
    if len(value) > MAX_INTENT_CHARS:
        raise ValueError(f"must have at most {MAX_INTENT_CHARS} characters")
    return value


def _reason(value: object) -> object:
    if isinstance(value, str) and not visible_chars(value):
        raise ValueError("must say how you know; it cannot be blank")
    return value


def _micros(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError("must be a number of dollars")
    micros = to_micros(value)
    if not is_whole_micros(Decimal(value)):
        raise ValueError("must have at most six decimals")
    return micros


def _fraction(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError("must be a number")
    return float(value)


FreezeReason = Annotated[str, BeforeValidator(_intent), WithJsonSchema(INTENT)]
Identifier = Annotated[str, BeforeValidator(_identifier), WithJsonSchema(IDENTIFIER)]
Micros = Annotated[int, BeforeValidator(_micros), WithJsonSchema(DOLLARS)]


class WireModel(BaseModel):
    # A model is built on first use, because the start of the sidecar needs none of them.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


class NoNulls(WireModel):
    """A default of None tells "not given"; on the wire null is a wrong value."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values  # which pydantic refuses
        return {name: (_Null() if value is None else value) for name, value in values.items()}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The JSON schema without null and without the defaults of None."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["properties"] = {
            name: _never_null(member) for name, member in schema.get("properties", {}).items()
        }
        return schema


def _never_null(member: JsonSchemaValue) -> JsonSchemaValue:
    others = {name: value for name, value in member.items() if (name, value) != ("default", None)}
    kinds = [kind for kind in others.pop("anyOf", []) if kind != {"type": "null"}]
    return {**others, **kinds[0]} if len(kinds) == 1 else {**others, "anyOf": kinds} if kinds else others


class ScopeRequest(NoNulls):
    """The scope that is requested. `action` or `allowed_actions` is required. If both are given, the first
    must be one of the second."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["action"]}, {"required": ["allowed_actions"]}]}
    )

    incident_id: Annotated[Identifier, Field(description="The only incident that the scope is for.")]
    action: Identifier | None = None
    allowed_actions: Annotated[list[Identifier], Field(min_length=1, max_length=MAX_ACTIONS)] | None = None
    intent: Annotated[
        str,
        BeforeValidator(_intent),
        WithJsonSchema(INTENT),
        Field(description="Why the action is to be allowed; not blank."),
    ]
    max_cost_usd: Annotated[
        Micros | None,
        Field(
            description="The cost ceiling, in dollars; whole millionths. At least what an execution of each "
            "of the actions holds."
        ),
    ] = None
    max_attempts: Annotated[int | None, Field(description="How many executions it allows.")] = None
    ttl_seconds: Annotated[int | None, Field(description="For how long, from now.")] = None
    target_agents: Annotated[
        list[Identifier],
        Field(
            max_length=MAX_TARGET_AGENTS,
            description="The only agents that may be acted on; empty: any.",
        ),
    ] = []
    executors: Annotated[
        Annotated[list[Identifier], Field(min_length=1, max_length=MAX_EXECUTORS)] | None,
        Field(
            description="The only principals that may spend it: ids, or globs. It needs a method of "
            "authentication."
        ),
    ] = None
    created_by: Annotated[
        Identifier,
        Field(
            description="The creator, which is not verified. If the caller is authenticated, the caller is "
            "the creator, and this is kept as `on_behalf_of`."
        ),
    ] = "api"

    @property
    def actions(self) -> tuple[str, ...]:
        """The requested actions, each once, in order."""
        named = [*([self.action] if self.action else []), *(self.allowed_actions or [])]
        return tuple(dict.fromkeys(named))


class ReconcileRequest(WireModel):
    """What became of an execution that ended unknown. What was not executed cost nothing."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"outcome": {"const": "not_executed"}}, "required": ["outcome"]},
            "then": {"properties": {"cost_usd": {"enum": [None, 0]}}},
        }
    )

    outcome: Literal["executed", "not_executed"]
    cost_usd: Annotated[Micros | None, Field(description="What it cost; absent or null: its hold.")] = None
    reason: (
        Annotated[str, Field(max_length=MAX_INTENT_CHARS), BeforeValidator(_reason), WithJsonSchema(INTENT)]
        | None
    ) = None
    reconciled_by: Annotated[
        Identifier | None, Field(description="The person or service that says so, which is not verified.")
    ] = None


class ExecutionReport(WireModel):
    """How an execution ended. What was not executed cost nothing."""

    model_config = ReconcileRequest.model_config

    outcome: ReportedOutcome
    cost_usd: Annotated[Micros | None, Field(description="What it cost; absent or null: its hold.")] = None
    detail: Annotated[str | None, Field(max_length=MAX_DETAIL_CHARS, description="The record keeps it.")] = (
        None
    )


def _globs(names: tuple[str, ...] = ()) -> BeforeValidator:
    """One identifier or glob, or a list of them. With `names`, each matches one of these, because one that
    matches none freezes nothing."""

    def checked(value: object) -> object:
        listed = value if isinstance(value, list) else [value]
        if not 1 <= len(listed) <= MAX_GLOBS:
            raise ValueError(f"must have 1 to {MAX_GLOBS} entries")
        for one in listed:
            if not is_identifier(one):
                raise ValueError(f"must be a string of {IDENTIFIER_RULE}, or a list of such strings")
            if names and not any(globbed((one,), name) for name in names):
                raise ValueError(f"must be one of {', '.join(names)}, or a glob that matches one")
        return listed

    return BeforeValidator(checked)


def _one_or_more(item: JsonSchemaValue) -> WithJsonSchema:
    listed = {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_GLOBS}
    return WithJsonSchema({"anyOf": [item, listed]})


def _one_of(names: tuple[str, ...]) -> JsonSchemaValue:
    globbed: JsonSchemaValue = {**IDENTIFIER, "allOf": [{"pattern": r"[*?\[]"}]}
    return {"anyOf": [{"enum": list(names)}, globbed]}


_KINDS: tuple[str, ...] = get_args(PrincipalKind)
_RISKS = tuple(risk.value for risk in RiskClass)
Globs = Annotated[list[str], _globs(), _one_or_more(IDENTIFIER)]
KindGlobs = Annotated[list[str], _globs(_KINDS), _one_or_more(_one_of(_KINDS))]
RiskGlobs = Annotated[list[str], _globs(_RISKS), _one_or_more(_one_of(_RISKS))]


class FreezePattern(NoNulls):
    """Which executions are meant: those of which every named fact matches. A fact is a value, a glob, or a
    list of these, of which one must match."""

    action: Globs | None = None
    risk: RiskGlobs | None = None
    incident_id: Globs | None = None
    tenant_id: Globs | None = None
    principal: Globs | None = None
    principal_kind: KindGlobs | None = None
    principal_group: Globs | None = None
    target_agents: Globs | None = None
    route: Annotated[Globs | None, Field(description="The name of a route.")] = None

    def pattern(self) -> Pattern:
        """The facts that are named, each with its globs."""
        return {fact: tuple(globs) for fact, globs in self if globs is not None}


def _moment(value: object) -> object:
    if value is None:
        return None
    try:
        return parse_time(value if isinstance(value, str) else "")
    except ValueError as exc:
        raise ValueError("must be a time with its offset, such as 2026-12-01T08:00:00Z, or null") from exc


class FreezeRequest(WireModel):
    """What to freeze, and why. A freeze without `until` holds until it is lifted."""

    match: Annotated[FreezePattern, Field(description="What is frozen; `{}`: every execution.")]
    excepted: Annotated[
        FreezePattern,
        Field(alias="except", description="What is not; `{}`: nothing is excepted."),
    ] = FreezePattern.model_construct()
    reason: FreezeReason
    until: Annotated[
        int | None,
        BeforeValidator(_moment),
        WithJsonSchema({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]}),
        Field(description="When it ends, in the future; null: when it is lifted."),
    ] = None


class LiftRequest(WireModel):
    """Why a freeze is lifted."""

    reason: FreezeReason


class ScopeTestRequest(NoNulls):
    """A recovery action, and on what part of it to rehearse it."""

    action_type: Annotated[str, Field(description="retry, fallback, circuit_break, scale or another.")]
    risk_class: Literal["low", "medium", "high", "critical"]
    action_name: Annotated[Identifier | None, Field(description="Absent: the id.")] = None
    parameters: Annotated[
        dict[str, Any],
        WithJsonSchema(
            {
                "type": "object",
                "properties": {
                    "target_agents": {"anyOf": [{"type": "array", "items": IDENTIFIER}, {"type": "null"}]}
                },
            }
        ),
    ] = {}
    scope_type: Literal["agent_subset", "request_sample", "budget_fraction", "dry_run"] = "dry_run"
    scope_fraction: Annotated[
        float,
        BeforeValidator(_fraction),
        WithJsonSchema({"type": "number"}),
        Field(description="Clamped to 0.01 to 1."),
    ] = 0.1


class _Null:
    """Stands for a null. No field accepts it."""


Model = TypeVar("Model", bound=WireModel)

# The sidecar's messages for the error types of Pydantic's own checks.
_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is not known here",
    "int_type": "must be a whole number",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "too_short": "must not be empty",
    "too_long": "has too many entries",
    "string_too_long": "is too long",
    "literal_error": "must be one of {expected}",
}


def validated(model: type[Model], document: Mapping[str, Any], code: str) -> Model | Refusal:
    """The model, or a refusal with `code` that names the first wrong member and lists all wrong members."""
    try:
        return model.model_validate(document)
    except ValidationError as exc:
        found = [
            {"member": "/" + "/".join(str(part) for part in error["loc"]), "problem": _problem(error)}
            for error in exc.errors(include_url=False)
        ]
        return wrong(code, found[0]["member"].lstrip("/"), found[0]["problem"], found)


def wrong(code: str, member: str, problem: str, errors: list[dict[str, str]] | None = None) -> Refusal:
    """A refusal because of one member."""
    listed = errors or [{"member": f"/{member}", "problem": problem}]
    return Refusal(code, f"{member} {problem}.", {"member": member, "errors": listed})


def _problem(error: Any) -> str:
    context: dict[str, Any] = error.get("ctx") or {}
    if error["type"] == "value_error":
        return str(context["error"])
    if isinstance(error["input"], _Null):
        return "must not be null"
    return _WORDS.get(error["type"], "has a wrong type or value").format_map({"expected": "", **context})
