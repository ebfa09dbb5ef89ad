"""The table of who.md over real sockets: who may make which call, and the record of each refusal."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.auth import tokenfile
from sidecar.auth.tokens import Token, digest_of, new_secret
from sidecar.core.roles import ROLES, Holders, Role, Roles
from tests.certificates import Authority
from tests.client import HeaderList, Message, as_json, ask
from tests.support import EXECUTE, POLICIES, SCOPE, SCOPES, SECOND, Clock, House, Open
from tests.tokens import AUDIENCE, ISSUER, RSA_KEY, claims, jwk, key_set, signed

# Each role is held by a caller of its name.
BY_NAME = replace(POLICIES, roles=Roles({role: Holders(ids=(role,)) for role in ROLES}))
RECONCILE = "/api/v1/executions/01961234-5678-7abc-8def-0123456789ab/reconcile"
WANTED = {"incident_id": "inc_1", "action": "retry_agent", "intent": "a test"}
OBSERVED = (
    *("/api/v1/decisions", "/api/v1/decisions/none", "/api/v1/executions", "/api/v1/scopes"),
    *("/api/v1/freezes", "/api/v1/status", "/api/v1/care/kill-switch", "/openapi.json", "/docs"),
)

# The listener, the call, its body, and the roles that may make it, the weakest first.
CALLS: tuple[tuple[str, str, str, Any, tuple[Role, ...]], ...] = (
    ("data", "POST", SCOPE, WANTED, ("issuer",)),
    ("data", "GET", SCOPES + "inc_1", None, ("issuer", "operator")),
    ("data", "DELETE", SCOPES + "scope_none", None, ("issuer", "operator")),
    ("data", "POST", "/api/v1/recovery/candidates/retry/scope-test", {"action_type": "retry"}, ("observer",)),
    ("data", "POST", EXECUTE, {"incident_id": "inc_1", "action": "retry_agent"}, ("executor",)),
    *(("admin", "GET", path, None, ("observer",)) for path in OBSERVED),
    ("admin", "POST", "/api/v1/explain", {}, ("observer",)),
    ("admin", "POST", "/api/v1/decisions/memory", {"queried": True}, ("recorder",)),
    ("admin", "POST", "/api/v1/runs/run_1/backfill", {"request_id": "r"}, ("recorder",)),
    ("admin", "POST", RECONCILE, {"outcome": "executed"}, ("operator",)),
    ("admin", "POST", "/api/v1/reload", {}, ("operator",)),
    ("admin", "POST", "/api/v1/freezes", {"match": {"action": "x"}, "reason": "a test"}, ("operator",)),
    ("admin", "DELETE", "/api/v1/freezes/none", {"reason": "a test"}, ("operator",)),
    ("admin", "POST", "/api/v1/store/accept-clock", {}, ("operator",)),
    ("admin", "PUT", "/api/v1/care/kill-switch", {}, ("operator",)),
    ("admin", "DELETE", "/api/v1/care/kill-switch", None, ("operator",)),
)


CALLERS = (*ROLES, "stranger")


@dataclass
class Presenting:
    """How the callers of the table present themselves by one method: the sections of the configuration, and
    for each caller its headers and its TLS context."""

    sections: dict[str, Any]
    # Of a caller: the headers on calls of the sidecar, and those on requests for the backend.
    headers: Callable[[str], tuple[HeaderList, HeaderList]] = lambda _: ((), ())
    tls: Callable[[str | None], ssl.SSLContext | None] = lambda _: None


def by_tokens(folder: Path, now: int) -> Presenting:
    secrets = {name: new_secret() for name in CALLERS}
    made = [Token(name=name, digest=digest_of(secrets[name]), created_at=0) for name in CALLERS]
    tokenfile.change(folder / "tokens.yaml", lambda _: made)
    return Presenting({"auth": {"tokens": {"file": str(folder / "tokens.yaml")}}}, bearing(secrets))


def by_jwt(folder: Path, now: int) -> Presenting:
    (folder / "jwks.json").write_bytes(key_set(jwk(RSA_KEY, "k1")))
    issuer = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(folder / "jwks.json")}
    return Presenting(
        {"auth": {"jwt": issuer}},
        bearing({name: signed(claims(now // SECOND, sub=name)) for name in CALLERS}),
    )


def by_mtls(folder: Path, now: int) -> Presenting:
    authority = Authority(folder)
    tls = authority.issue("served").settings(client_ca_file=authority.certificate_file)
    listener = {"listen": "127.0.0.1:0", "tls": tls | {"client_certificate": "optional"}}
    contexts = {name: authority.client(authority.issue(name, uris=[name])) for name in CALLERS}
    return Presenting(
        {"auth": {"mtls": {"id": "uri"}}, "data": listener, "admin": listener},
        tls=lambda user: authority.client() if user is None else contexts[user],
    )


def by_proxy(folder: Path, now: int) -> Presenting:
    proxy = {"header": "X-User", "groups_header": "X-Groups", "trusted": ["127.0.0.1"]}
    return Presenting({"auth": {"proxy": proxy}}, lambda user: ([("X-User", user)],) * 2)


def bearing(secrets: Mapping[str, str]) -> Callable[[str], tuple[HeaderList, HeaderList]]:
    def headers(user: str) -> tuple[HeaderList, HeaderList]:
        value = f"Bearer {secrets[user]}"
        return [("Authorization", value)], [("Scopegate-Authorization", value)]

    return headers


PRESENTING: dict[str, Callable[[Path, int], Presenting]] = {
    "tokens": by_tokens,
    "jwt": by_jwt,
    "mtls": by_mtls,
    "proxy": by_proxy,
}


async def called(
    house: House, presenting: Presenting, listener: str, method: str, path: str, body: Any, user: str | None
) -> Message:
    on_calls, on_requests = ((), ()) if user is None else presenting.headers(user)
    kind, document = ([], None) if body is None else as_json(body)
    address = house.sidecar.admin_address if listener == "admin" else house.sidecar.data_address
    headers = on_requests if path == EXECUTE else on_calls
    return await ask(address, method, path, [*kind, *headers], document, tls=presenting.tls(user))


@pytest.mark.parametrize("by", PRESENTING)
@pytest.mark.parametrize("call", CALLS, ids=[f"{method} {path}" for _, method, path, _, _ in CALLS])
async def test_a_call_is_for_those_who_hold_its_role_and_each_refusal_is_recorded(
    open_house: Open,
    tmp_path: Path,
    clock: Clock,
    by: str,
    call: tuple[str, str, str, Any, tuple[Role, ...]],
) -> None:
    listener, method, path, body, roles = call
    presenting = PRESENTING[by](tmp_path, clock())
    house = await open_house(policies=BY_NAME, **presenting.sections)
    for user in (*CALLERS, None):
        answer = await called(house, presenting, listener, method, path, body, user)
        if user in roles:
            assert answer.status not in (401, 403), answer.body
            continue
        refused = answer.json()
        assert (answer.status, refused["error"]) == (403, "role_required"), (user, answer.body)
        assert refused["role"] == roles[0]
        found = await called(
            house, presenting, "admin", "GET", f"/api/v1/decisions/{refused['decision_id']}", None, "observer"
        )
        record = found.json()
        assert (record["event"], record["decision_reason"]) == ("refused", "role_required")
        assert record["principal"] == {
            "id": user or "anonymous",
            "kind": "service",
            "method": "none" if user is None else by,
        }
    assert house.backend.seen == []


async def test_without_a_method_every_caller_may_make_every_call(open_house: Open) -> None:
    house = await open_house(policies=BY_NAME)
    for listener, method, path, body, _ in CALLS:
        answer = await called(house, Presenting({}), listener, method, path, body, None)
        assert answer.status not in (401, 403), (path, answer.body)


async def test_health_and_metrics_ask_no_caller(open_house: Open) -> None:
    house = await open_house(
        policies=BY_NAME, auth={"proxy": {"header": "X-User", "trusted": ["unix"]}, "required": True}
    )
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert (await ask(house.sidecar.ops_address, "GET", path)).status == 200
