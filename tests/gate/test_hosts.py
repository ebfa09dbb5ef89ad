"""Which host a request names, and from which site it comes: over real sockets, on every listener."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sidecar.settings.addresses import Address, SocketFile
from sidecar.web.api.scopetest import PREFIX, SUFFIX
from tests.certificates import Authority
from tests.client import Message, as_json, ask, connect, send
from tests.support import EXECUTE, SCOPE, SCOPES, House, Open

SWITCH = "/api/v1/care/kill-switch"
SCOPE_TEST = f"{PREFIX}c{SUFFIX}"
MALFORMED = [
    "x/api/v1/recovery/execute?",
    "x/api/v1/recovery",
    "u@x/api/v1/recovery/execute#",
    "u@x",
    "x:",
    "x:80/",
    "x y",
    "x\ty",
    "x,y",
    "x\\y",
    "x%2f",
    "\xff",
    "caf\xc3\xa9",
    "[::1",
    "[::1%25eth0]",
    "",
]
EVIL = ["evil.example", "evil.example:80", "localhost.evil.example", "0.0.0.0", "[2001:db8::1]"]
OWN = ["localhost", "LOCALHOST.:1", "127.0.0.1", "127.8.8.8:9901", "[::1]:9901", "a.localhost"]


def a_get(target: str, *headers: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {target} HTTP/{version}", *headers, "", ""]).encode("latin-1")


def code(answer: Message) -> tuple[int, str]:
    return answer.status, answer.json()["error"]


# Well-formed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", MALFORMED)
async def test_a_request_that_names_no_well_formed_host_is_refused_everywhere(
    house: House, host: str
) -> None:
    headers = [("Host", host)]
    sidecar = house.sidecar
    for address, target in (
        (sidecar.data_address, "/foo"),
        (sidecar.data_address, "/execute"),
        (sidecar.data_address, SCOPES + "inc_1"),
        (sidecar.data_address, EXECUTE),
        (sidecar.admin_address, "/api/v1/status"),
        (sidecar.admin_address, "/nothing"),
        (sidecar.ops_address, "/health/live"),
        (sidecar.ops_address, "/metrics"),
    ):
        assert code(await ask(address, "GET", target, headers)) == (400, "invalid_request"), target
    for target in ("/foo", EXECUTE, SCOPE, SCOPE_TEST):
        kind, body = house.execution(None, incident_id="i", action="retry_agent", intent="why")
        answer = await house.data("POST", target, [*headers, *kind], body)
        assert code(answer) == (400, "invalid_request"), target
        assert ("decision_id" in answer.json()) == (target in (EXECUTE, SCOPE)), target
    assert house.backend.seen == []
    assert await house.scopes("i") == {"incident_id": "i", "scopes": [], "total": 0, "next": None}
    assert len(await house.records("&event=refused")) == 2


async def test_a_gated_request_without_a_host_leaves_its_record_in_shadow_too(open_house: Open) -> None:
    house = await open_house(gate={"routes": [{"path": "**/recovery/execute", "mode": "shadow"}]})
    answer = await house.execute(None, headers=[("Host", "u@x")])
    assert code(answer) == (400, "invalid_request")
    record = await house.record(answer.json()["decision_id"])
    assert (record["decision_outcome"], record["decision_reason"]) == ("blocked", "invalid_request")
    assert house.backend.seen == []
    reason = 'reason="invalid_request",route="**/recovery/execute"'
    assert await house.metric(f'scopegate_decisions_total{{action="none",outcome="blocked",{reason}}}') == 1
    assert (await house.execute(None)).status == 200


async def test_a_refusal_by_its_host_waits_for_no_body(house: House) -> None:
    head = "Host: u@x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    for target in ("/foo", EXECUTE, SCOPE):
        answer = await send(house.sidecar.data_address, f"POST {target} HTTP/1.1\r\n{head}".encode())
        assert code(answer) == (400, "invalid_request")
    assert await house.metric('scopegate_passed_through_total{outcome="invalid_request"}') == 1


async def test_http_1_0_may_come_without_a_host_and_nothing_else_may(house: House) -> None:
    sidecar = house.sidecar
    listeners = {
        sidecar.data_address: "/foo",
        sidecar.admin_address: "/api/v1/status",
        sidecar.ops_address: "/health/live",
    }
    for address, target in listeners.items():
        assert (await send(address, a_get(target, version="1.0"))).status == 200
        assert (await send(address, a_get(target, "Host: localhost", version="1.0"))).status == 200
        for raw in (
            a_get(target),
            a_get(target, "Host: localhost", "Host: localhost"),
            a_get(target, "Host: localhost", "host: evil.example"),
            a_get(target, "Host : localhost"),
            a_get(target, "Host:"),
            a_get(target, "Host: u@x", version="1.0"),
            a_get(target, "Host: a", "Host: b", version="1.0"),
            a_get(target, version="2.0"),
            f"GET {target}\r\n\r\n".encode(),
        ):
            assert (await send(address, raw)).status == 400, raw
    assert (await house.data("GET", SCOPES + "inc_1")).status == 200
    assert (await send(sidecar.data_address, a_get(SCOPES + "inc_1", version="1.0"))).status == 200


async def test_the_authority_of_an_absolute_target_is_held_to_the_same(house: House) -> None:
    for authority in ("u@x", "u:p@x:80", "x:", "x%2fy", "[::1%25eth0]", "x;y", "x,y"):
        for target in (f"http://{authority}/foo", f"http://{authority}", f"http://{authority}{EXECUTE}"):
            for method in ("GET", "POST"):
                answer = await house.data(method, target)
                assert answer.status == 400, (method, target)
        assert (await house.admin("GET", f"http://{authority}/api/v1/status")).status == 400
        assert (await ask(house.sidecar.ops_address, "GET", f"http://{authority}/metrics")).status == 400
    assert house.backend.seen == []
    target = "http://other.test:80/a?b@c#d"
    assert (await house.data("GET", target)).status == 200
    assert house.backend.seen[-1].target == target
    assert house.backend.seen[-1].header("Host") == "localhost"


async def test_what_passes_through_may_name_any_host(house: House) -> None:
    for host in ("evil.example", "a_b~c.", "[2001:DB8::1]:8", "10.0.0.1:00080", "EXAMPLE"):
        assert (await house.data("GET", "/foo", [("Host", host)])).status == 200
        assert house.backend.seen[-1].header("Host") == host
        assert (await house.execute(None, headers=[("Host", host)])).json()["error"] == (
            "scoped_execution_required"
        )


# Of this listener ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", EVIL)
async def test_admin_answers_to_no_other_host(house: House, host: str) -> None:
    headers = [("Host", host)]
    for method, target in (
        ("GET", "/api/v1/decisions"),
        ("HEAD", "/api/v1/status"),
        ("OPTIONS", "/api/v1/status"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("PUT", SWITCH),
        ("DELETE", SWITCH),
        ("POST", "/api/v1/reload"),
        ("POST", "/api/v1/explain"),
    ):
        answer = await house.admin(method, target, headers=headers)
        assert answer.status == 421, (method, target)
        if method != "HEAD":
            assert code(answer) == (421, "misdirected_request")
            assert "admin.allowed_hosts" in answer.json()["message"]
    answer = await house.admin("GET", f"http://{host}/api/v1/status")
    assert code(answer) == (421, "misdirected_request"), "the absolute form replaces Host"
    assert (await house.admin("GET", SWITCH)).json()["active"] is False


@pytest.mark.parametrize("host", OWN)
async def test_admin_answers_to_loopback_names(house: House, host: str) -> None:
    assert (await house.admin("GET", "/api/v1/status", headers=[("Host", host)])).status == 200
    assert (await house.data("GET", SCOPES + "i", [("Host", host)])).status == 200


async def test_admin_answers_to_the_names_that_it_is_told(open_house: Open) -> None:
    house = await open_house(
        admin={"listen": "127.0.0.1:0", "allowed_hosts": ["Gate.Example", "[2001:db8::1]"]}
    )
    for host in ("gate.example", "GATE.example.:443", "[2001:db8:0::1]:9", "localhost"):
        assert (await house.admin("GET", "/api/v1/status", headers=[("Host", host)])).status == 200
    for host in (*EVIL[:3], "x.gate.example"):
        assert (await house.admin("GET", "/api/v1/status", headers=[("Host", host)])).status == 421


@pytest.mark.parametrize("host", EVIL)
async def test_scopes_on_the_data_listener_answer_to_no_other_host(house: House, host: str) -> None:
    scope = await house.issue()
    headers = [("Host", host)]
    kind, body = as_json({"incident_id": "i", "action": "retry_agent", "intent": "why"})
    asked = await house.data("POST", SCOPE, [*headers, *kind], body)
    revoked = await house.data("DELETE", SCOPES + scope["scope_id"], headers)
    for answer, about in ((asked, None), (revoked, scope["scope_id"])):
        assert code(answer) == (421, "misdirected_request")
        assert "data.allowed_hosts" in answer.json()["message"]
        record = await house.record(answer.json()["decision_id"])
        assert record["decision_inputs"]["policy_id"] == "scope_grant"
        assert record["decision_reason"] == "misdirected_request"
        assert record["scope_id"] == about
    for method, target in (
        ("GET", SCOPES + "inc_1"),
        ("POST", SCOPE_TEST),
        ("PUT", SCOPE),
        ("DELETE", SCOPE),
        ("OPTIONS", SCOPE),
    ):
        answer = await house.data(method, target, headers)
        assert code(answer) == (421, "misdirected_request")
        assert "decision_id" not in answer.json(), "nothing was to be granted or withdrawn"
    assert (await house.scope(scope))["status"] == "active"
    assert (await house.data("GET", "/elsewhere", headers)).status == 200


@pytest.mark.parametrize(
    ("data", "answered"),
    [
        ({"listen": "127.0.0.1:0", "allowed_hosts": ["gate.example"]}, {"localhost", "gate.example"}),
        ({"listen": "127.0.0.1:0", "allowed_hosts": []}, {"localhost"}),
        ({"listen": "0.0.0.0:0"}, {"localhost", "gate.example", "other.example"}),
        ({"listen": "0.0.0.0:0", "allowed_hosts": ["gate.example"]}, {"localhost", "gate.example"}),
        ({"listen": "0.0.0.0:0", "allowed_hosts": []}, {"localhost"}),
    ],
)
async def test_scopes_answer_to_the_hosts_that_are_configured(
    open_house: Open, data: dict[str, object], answered: set[str]
) -> None:
    house = await open_house(data=data)
    for host in ("localhost", "gate.example", "other.example"):
        status = (await house.data("GET", SCOPES + "i", [("Host", host)])).status
        assert status == (200 if host in answered else 421), host


@pytest.mark.parametrize("allowed", [(), ("gate.example",)])
async def test_on_a_unix_socket_any_host_is_answered_unless_some_are_listed(
    open_house: Open, tmp_path: Path, allowed: tuple[str, ...]
) -> None:
    told = {"allowed_hosts": list(allowed)} if allowed else {}
    house = await open_house(
        data={"listen": f"unix:{tmp_path}/d.sock", **told},
        admin={"listen": f"unix:{tmp_path}/a.sock", **told},
    )
    assert isinstance(house.sidecar.admin_address, SocketFile)
    for host, status in (
        ("localhost", 200),
        ("gate.example", 200),
        ("x", 421 if allowed else 200),
        ("u@x", 400),
    ):
        assert (await house.admin("GET", "/api/v1/status", headers=[("Host", host)])).status == status
        assert (await house.data("GET", SCOPES + "i", [("Host", host)])).status == status


# Of this site -------------------------------------------------------------------------------------------

FOREIGN = [
    [("Origin", "http://evil.example")],
    [("Origin", "null")],
    [("Origin", "")],
    [("Origin", "https://{host}")],
    [("Origin", "http://localhost")],
    [("Origin", "http://{host}/")],
    [("Origin", "http://{host}"), ("Origin", "http://evil.example")],
    [("Origin", "http://{host} http://evil.example")],
    [("Sec-Fetch-Site", "cross-site")],
    [("Sec-Fetch-Site", "same-site")],
    [("Sec-Fetch-Site", "")],
    [("Sec-Fetch-Site", "Same-Origin")],
    [("Sec-Fetch-Site", "none"), ("Sec-Fetch-Site", "cross-site")],
    [("Sec-Fetch-Site", "same-origin, cross-site")],
    [("Origin", "http://{host}"), ("Sec-Fetch-Site", "cross-site")],
    [("Origin", "http://evil.example"), ("Sec-Fetch-Site", "same-origin")],
]
NATIVE = [
    [],
    [("Origin", "http://{host}")],
    [("Origin", "http://{host}"), ("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Mode", "cors")],
    [("Sec-Fetch-Site", "none"), ("Sec-Fetch-Mode", "navigate")],
]


def at(address: Address, headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Headers as a browser at this address would send them."""
    filled = [(name, value.replace("{host}", str(address))) for name, value in headers]
    return [("Host", str(address)), *filled]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_a_change_from_another_site_is_refused(house: House, headers: list[tuple[str, str]]) -> None:
    scope = await house.issue()
    sidecar = house.sidecar
    for method, target, document in (
        ("PUT", SWITCH, None),
        ("DELETE", SWITCH, None),
        ("POST", "/api/v1/reload", None),
        ("POST", "/api/v1/decisions/routing", {"routed": True}),
        ("POST", "/api/v1/runs/run_1/backfill", {"request_id": "r"}),
        ("POST", "/api/v1/executions/x/reconcile", {"outcome": "executed"}),
        ("POST", "/api/v1/explain", {}),
        ("PATCH", "/api/v1/status", None),
    ):
        answer = await house.admin(method, target, document, at(sidecar.admin_address, headers))
        assert code(answer) == (403, "cross_site"), (method, target)
    assert (await house.admin("GET", SWITCH)).json()["active"] is False
    own = at(sidecar.data_address, headers)
    asked = await house.ask_for_scope(headers=own)
    revoked = await house.data("DELETE", SCOPES + scope["scope_id"], own)
    for answer in (asked, revoked):
        assert code(answer) == (403, "cross_site")
        assert (await house.record(answer.json()["decision_id"]))["decision_outcome"] == "blocked"
    assert code(await house.data("POST", SCOPE_TEST, own)) == (403, "cross_site")
    assert (await house.scopes())["total"] == 1
    assert (await house.scope(scope))["status"] == "active"


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_looking_from_another_site_is_answered(house: House, headers: list[tuple[str, str]]) -> None:
    sidecar = house.sidecar
    for method in ("GET", "HEAD"):
        answer = await house.admin(method, "/api/v1/status", headers=at(sidecar.admin_address, headers))
        assert answer.status == 200
        assert not answer.headers("Access-Control-Allow-Origin"), "the page may not read it"
    assert (await house.data("GET", SCOPES + "i", at(sidecar.data_address, headers))).status == 200
    assert (await house.admin("OPTIONS", SWITCH, headers=at(sidecar.admin_address, headers))).status == 405
    assert (await house.data("PUT", "/elsewhere", at(sidecar.data_address, headers))).status == 200, (
        "not ours"
    )


@pytest.mark.parametrize("headers", NATIVE, ids=str)
async def test_a_change_from_a_page_of_the_listener_or_from_a_program_is_made(
    house: House, headers: list[tuple[str, str]]
) -> None:
    own = at(house.sidecar.admin_address, headers)
    assert (await house.admin("PUT", SWITCH, headers=own)).json() == {"active": True}
    assert (await house.admin("GET", SWITCH)).json() == {"active": True}
    assert (await house.ask_for_scope(headers=at(house.sidecar.data_address, headers))).status == 201


async def test_a_change_without_a_host_comes_from_a_program_only(house: House) -> None:
    address = house.sidecar.admin_address
    raw = f"PUT {SWITCH} HTTP/1.0\r\nContent-Length: 0\r\n"
    assert code(await send(address, f"{raw}Origin: http://{address}\r\n\r\n".encode())) == (403, "cross_site")
    assert (await send(address, f"{raw}\r\n".encode())).json() == {"active": True}


async def test_an_origin_is_held_against_both_forms_of_the_host(house: House) -> None:
    address = house.sidecar.admin_address
    headers = [("Host", str(address)), ("Origin", f"http://{address}")]
    assert (await house.admin("PUT", f"http://{address}{SWITCH}", headers=headers)).status == 200
    answer = await house.admin("DELETE", f"http://localhost:1{SWITCH}", headers=headers)
    assert code(answer) == (403, "cross_site")


async def test_with_tls_the_origin_begins_with_https(open_house: Open, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    admin = {"listen": "127.0.0.1:0", "tls": authority.issue("served").settings()}
    house = await open_house(admin=admin, tls=authority.client())
    host = "localhost:9"
    for scheme, status in (("https", 200), ("http", 403)):
        headers = [("Host", host), ("Origin", f"{scheme}://{host}")]
        assert (await house.admin("PUT", SWITCH, headers=headers)).status == status


async def test_scopes_on_admin_are_held_to_admins_hosts_and_recorded(open_house: Open) -> None:
    house = await open_house(
        scopes={"serve_on": "admin"}, data={"listen": "127.0.0.1:0", "allowed_hosts": ["x"]}
    )
    wanted = {"incident_id": "i", "action": "retry_agent", "intent": "why"}
    for headers, refusal in (
        ([("Host", "x")], (421, "misdirected_request")),
        ([("Host", "u@x")], (400, "invalid_request")),
        ([("Origin", "null")], (403, "cross_site")),
    ):
        for method, target in (("POST", SCOPE), ("DELETE", SCOPES + "scope_x")):
            answer = await house.admin(method, target, wanted if method == "POST" else None, headers)
            assert code(answer) == refusal
            assert (await house.record(answer.json()["decision_id"]))["decision_reason"] == refusal[1]
        assert "decision_id" not in (await house.admin("POST", SCOPE_TEST, {}, headers)).json()
    assert (await house.admin("POST", SCOPE, wanted)).status == 201


async def test_what_a_form_can_post_is_no_json(house: House) -> None:
    """Content types that a page can send elsewhere without asking first (Fetch, "CORS-safelisted")."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        for target in (
            "/api/v1/decisions/routing",
            "/api/v1/runs/run_1/backfill",
            "/api/v1/executions/x/reconcile",
        ):
            headers = [("Content-Type", kind)]
            answer = await ask(house.sidecar.admin_address, "POST", target, headers, b'{"routed": true}')
            assert code(answer) == (415, "unsupported_media_type"), target
        answer = await house.data("POST", SCOPE, [("Content-Type", kind)], b"{}")
        assert code(answer) == (415, "unsupported_media_type")


async def test_no_method_override_turns_a_look_into_a_change(house: House) -> None:
    for header in ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "_method"):
        await house.admin("GET", f"{SWITCH}?_method=PUT", headers=[(header, "PUT")])
        await house.admin("HEAD", SWITCH, headers=[(header, "PUT")])
    assert (await house.admin("GET", SWITCH)).json()["active"] is False


async def test_ops_answers_to_any_well_formed_host(house: House) -> None:
    for host in ("10.1.2.3:9902", "evil.example", "[2001:db8::1]"):
        for target in ("/health/live", "/health/ready", "/metrics"):
            answer = await ask(house.sidecar.ops_address, "GET", target, [("Host", host)])
            assert answer.status == 200


@pytest.mark.parametrize(
    "line", [b"POST /x\r\n\r\n", b"POST /x HTTP/2.0\r\nHost: localhost\r\n\r\n", b"GET /x HTTP/0.9\r\n\r\n"]
)
@pytest.mark.parametrize("listener", ["data", "admin", "ops"])
async def test_a_request_of_another_http_is_refused(house: House, listener: str, line: bytes) -> None:
    reader, writer = await connect(getattr(house.sidecar, f"{listener}_address"))
    writer.write(line)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b" 400 " in answer.split(b"\r\n")[0]
    assert not house.backend.seen
