"""Configuration: flag over environment over file, and every mistake with its place, all at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from pydantic import BaseModel

from sidecar.core.facts import DEFAULT_SOURCES
from sidecar.core.policy import RiskClass
from sidecar.core.target import conflicts
from sidecar.files.faults import ConfigurationError
from sidecar.files.signing import SigningKey
from sidecar.files.yamlfile import dotted, parse
from sidecar.settings.addresses import Address, SocketFile
from sidecar.settings.keys import LIVE, SECRET, Section, differing, values_of
from sidecar.settings.keys import keys as keys_in
from sidecar.settings.reading import Listen, Settings, default, load
from sidecar.settings.routes import Route
from sidecar.settings.sections import KEYS
from tests.certificates import Authority
from tests.unit.test_configschema import GOOD, NOT_ALONE

SHIPPED = Path(__file__).parents[2] / "config" / "scopegate.yaml"
UPSTREAM = "upstream: {url: http://127.0.0.1:9000}\n"


def settings_of(folder: Path, text: str, *flags: tuple[str, str], **environment: str) -> Settings:
    file = folder / "c.yaml"
    file.write_text(UPSTREAM + text, encoding="utf-8")
    return load(file, environment=environment, overrides=flags).settings


def faults(folder: Path, text: str, *flags: tuple[str, str], **environment: str) -> list[str]:
    """The faults of a file whose first line is `upstream:`, so that the text begins in line 2."""
    with pytest.raises(ConfigurationError) as caught:
        settings_of(folder, text, *flags, **environment)
    return [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]


def bare_faults(folder: Path, text: str) -> list[str]:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load(file, environment={})
    return [str(fault).replace(f"{folder}/", "") for fault in caught.value.faults]


def value_of(settings: Settings, key: str) -> Any:
    value: Any = settings
    for step in key.split("."):
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    return value


def test_only_the_upstream_has_no_default(tmp_path: Path) -> None:
    assert bare_faults(tmp_path, "") == [
        "c.yaml:1:1: upstream.url: is required; add it, for example http://127.0.0.1:9000"
    ]
    assert bare_faults(tmp_path, "data:\nupstream:\n  max_connections: 5\n") == [
        "c.yaml:2:1: upstream.url: is required; add it, for example http://127.0.0.1:9000"
    ]
    settings = settings_of(tmp_path, "")
    assert settings.data.listen == Listen("127.0.0.1", 8000)
    assert settings.gate.routes[0].path.text == "**/recovery/execute"
    assert settings.gate.routes[0].sources == DEFAULT_SOURCES
    assert (settings.scopes.defaults.max_cost, settings.scopes.limits.max_cost) == (500_000, 100_000_000)


def test_an_empty_section_is_all_defaults(tmp_path: Path) -> None:
    assert settings_of(tmp_path, "gate:\nscopes:\n  limits:\n") == settings_of(tmp_path, "")


def test_settings_cannot_be_changed() -> None:
    settings = default("http://127.0.0.1:9000")
    with pytest.raises(ValueError):
        settings.gate.max_in_flight = 5


def test_file_names_are_relative_to_the_file_wherever_they_are_given(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "store: {url: sqlite:///var/s.db}\npolicies: ../p")
    assert settings.store.url == f"sqlite:///{tmp_path}/var/s.db"
    assert settings.store.file == tmp_path / "var" / "s.db"
    assert settings.policies == tmp_path.parent / "p"
    assert settings_of(tmp_path, "").store.file == tmp_path / "var" / "scopegate.db"
    assert settings_of(tmp_path, "").policies == tmp_path.parent / "policies"
    assert settings_of(tmp_path, "", ("policies", "x")).policies == tmp_path / "x"
    assert settings_of(tmp_path, "store: {url: sqlite:////a/b.db}").store.file == Path("/a/b.db")
    assert settings_of(tmp_path, 'store: {url: "memory://"}').store.file is None


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ('data: {listen: "[::1]:8000"}', "data.listen", Listen("::1", 8000)),
        ("data: {listen: localhost:0}", "data.listen", Listen("localhost", 0)),
        ("data: {listen: 0.0.0.0:65535}", "data.listen", Listen("0.0.0.0", 65_535)),
        ("admin: {listen: localhost:1}", "admin.listen", Listen("localhost", 1)),
        ("admin: {listen: 127.9.9.9:1}", "admin.listen", Listen("127.9.9.9", 1)),
        ('admin: {listen: "unix:/run/a.sock"}', "admin.listen", SocketFile(Path("/run/a.sock"))),
        ('data: {listen: "unix:///run/a.sock"}', "data.listen", SocketFile(Path("/run/a.sock"))),
        ("store: {deadline_seconds: 86400}", "store.deadline_seconds", 86_400.0),
        ("store: {deadline_seconds: 0.001}", "store.deadline_seconds", 0.001),
        ("store: {deadline_seconds: 10s}", "store.deadline_seconds", 10.0),
        ("store: {deadline_seconds: 1d}", "store.deadline_seconds", 86_400.0),
        ("shutdown: {drain_seconds: 0s}", "shutdown.drain_seconds", 0.0),
        ("gate: {body_timeout_seconds: 5m}", "gate.body_timeout_seconds", 300.0),
        ("scopes: {defaults: {ttl_seconds: '1h'}}", "scopes.defaults.ttl_seconds", 3_600),
        ("shutdown: {drain_seconds: 0}", "shutdown.drain_seconds", 0.0),
        ("gate: {max_body_bytes: 1}", "gate.max_body_bytes", 1),
        ("gate: {tenant_header: X-Tenant}", "gate.tenant_header", "X-Tenant"),
        ("gate: {tenant_header: null}", "gate.tenant_header", None),
        ("gate: {annotate_response: true}", "gate.annotate_response", True),
        ("gate: {idempotency_ttl: 3600}", "gate.idempotency_ttl", 3600),
        ("gate: {idempotency_ttl: 24h}", "gate.idempotency_ttl", 86_400),
        ("gate: {scope_required_from: low}", "gate.scope_required_from", RiskClass.LOW),
        ("gate: {scope_required_from: critical}", "gate.scope_required_from", RiskClass.CRITICAL),
        ("gate: {routes: [{path: /a, mode: shadow}]}", "gate.routes.0.mode", "shadow"),
        ("scopes: {serve_on: admin}", "scopes.serve_on", "admin"),
        ("scopes: {defaults: {max_cost_usd: 0}}", "scopes.defaults.max_cost", 0),
        ("scopes: {defaults: {max_cost_usd: 0.000001}}", "scopes.defaults.max_cost", 1),
        ("scopes: {defaults: {max_cost_usd: 100}}", "scopes.defaults.max_cost", 100_000_000),
        ("scopes: {defaults: {ttl_seconds: 3600}}", "scopes.defaults.ttl_seconds", 3600),
        ("care: {min_confidence: 1}", "care.min_confidence", 1.0),
        ("log: {mask: [], signing_key_file: null}", "log.mask", ()),
    ],
)
def test_what_lies_just_inside_the_rules_is_read(tmp_path: Path, text: str, key: str, value: object) -> None:
    found = value_of(settings_of(tmp_path, text), key)
    assert found == value
    assert type(found) is type(value)


SCHEMES = "expects http://host:port, https://host:port or unix:/path"
RISKS = "expects one of low, medium, high, critical"
SECONDS = "expects a number of seconds, or a duration such as 10s, 5m, 2h or 1d"
LISTEN = 'expects host:port, for example "127.0.0.1:8000"'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {listen: 8000}", f"2:8: data.listen: {LISTEN}, found a number"),
        ("data: {listen: [a]}", f"2:8: data.listen: {LISTEN}, found a list"),
        ('data: {listen: ":8000"}', f'2:8: data.listen: {LISTEN} or "[::1]:8000"'),
        ('data: {listen: "::1:8000"}', f'2:8: data.listen: {LISTEN} or "[::1]:8000"'),
        ("data: {listen: localhost}", "2:8: data.listen: expects host:port; write the port, too"),
        (
            "data: {listen: 127.0.0.1:65536}",
            "2:8: data.listen: names a port above 65535; ports go from 0 to 65535",
        ),
        (
            "data: {listen: 127.0.0.256:1}",
            "2:8: data.listen: names no valid IP address; correct it, or give a host name",
        ),
        (
            "admin: {listen: 0.0.0.0:1}",
            "2:9: admin.listen: must be a loopback address, because no method of auth is configured; write "
            "127.0.0.1:9901, or configure a method, such as auth.tokens.file, and admin.tls.certificate_file",
        ),
        (
            "ops: {listen: 127.0.0.1:8000}",
            "2:7: ops.listen: is the address of data.listen, too; use another one",
        ),
        (
            "data: {listen: 127.0.0.1:9902}",
            "2:8: data.listen: is the address of ops.listen, too; use another one",
        ),
        ("store: {deadline_seconds: 0}", "2:9: store.deadline_seconds: must be above 0 and at most 86400"),
        (
            "store: {deadline_seconds: 86401}",
            "2:9: store.deadline_seconds: must be above 0 and at most 86400",
        ),
        ('store: {deadline_seconds: "2"}', f"2:9: store.deadline_seconds: {SECONDS}, found text"),
        ("store: {deadline_seconds: 1.5h}", f"2:9: store.deadline_seconds: {SECONDS}, found text"),
        ("store: {deadline_seconds: 1h30m}", f"2:9: store.deadline_seconds: {SECONDS}, found text"),
        ("store: {deadline_seconds: 10 s}", f"2:9: store.deadline_seconds: {SECONDS}, found text"),
        ("store: {deadline_seconds: 5M}", f"2:9: store.deadline_seconds: {SECONDS}, found text"),
        ("store: {deadline_seconds: 1w}", f"2:9: store.deadline_seconds: {SECONDS}, found text"),
        (
            "store: {deadline_seconds: 0s}",
            "2:9: store.deadline_seconds: must be above 0 and at most 86400 seconds",
        ),
        (
            "store: {deadline_seconds: 25h}",
            "2:9: store.deadline_seconds: must be above 0 and at most 86400 seconds",
        ),
        (
            "scopes: {defaults: {ttl_seconds: 367d}}",
            "2:21: scopes.defaults.ttl_seconds: must be from 1 to 31622400 seconds",
        ),
        ("gate: {max_in_flight: 5m}", "2:8: gate.max_in_flight: expects a whole number, found text"),
        (
            "store: {deadline_seconds: true}",
            f"2:9: store.deadline_seconds: {SECONDS}, found true or false",
        ),
        ("store: {url: 5}", "2:9: store.url: expects text, found a number; write it in quotes"),
        ("shutdown: {drain_seconds: -1}", "2:12: shutdown.drain_seconds: must be from 0 to 86400"),
        ("shutdown: 5", "2:1: shutdown: expects keys below it such as drain_seconds, found a number"),
        ("gate: {max_in_flight: 0}", "2:8: gate.max_in_flight: must be from 1 to 1000000"),
        (
            "gate: {max_in_flight: true}",
            "2:8: gate.max_in_flight: expects a whole number, found true or false",
        ),
        ("gate: {max_in_flight: '5'}", "2:8: gate.max_in_flight: expects a whole number, found text"),
        (
            "gate: {max_in_flight: 5.0}",
            "2:8: gate.max_in_flight: expects a whole number, found a decimal number",
        ),
        ("gate: {max_in_flight: null}", "2:8: gate.max_in_flight: expects a whole number, found nothing"),
        (
            "gate: {annotate_response: 1}",
            "2:8: gate.annotate_response: expects true or false, found a number",
        ),
        (
            "gate: {tenant_header: X Tenant}",
            "2:8: gate.tenant_header: expects the name of a header, for example X-Tenant, or null",
        ),
        ("gate: {scope_required_from: dreadful}", f"2:8: gate.scope_required_from: {RISKS}"),
        ("gate: {scope_required_from: [low]}", f"2:8: gate.scope_required_from: {RISKS}"),
        ("gate: {scope_required_from: null}", f"2:8: gate.scope_required_from: {RISKS}"),
        (
            "gate: {routes: []}",
            "2:8: gate.routes: is empty; add a route here or a name to gate.presets, or remove the key",
        ),
        ("gate: {routes: {}}", "2:8: gate.routes: expects a list, found a map"),
        (
            "gate:\n  routes:\n    - 5",
            "4:7: gate.routes[0]: expects keys below it such as name, found a number",
        ),
        ("gate:\n  routes:\n    - mode: enforce", "4:7: gate.routes[0].path: is required; add it"),
        (
            'gate:\n  routes:\n    - path: "*/x"',
            '4:7: gate.routes[0].path: a route path begins with "/", or with "**/" for any prefix',
        ),
        (
            "gate:\n  routes:\n    - path: [/a, 5]",
            "4:18: gate.routes[0].path[1]: expects text, found a number; write it in quotes",
        ),
        (
            "gate:\n  routes:\n    - path: [/a, /b, /A]",
            "4:22: gate.routes[0].path[2]: stands in this list twice; remove one of them",
        ),
        (
            "gate:\n  routes:\n    - path: /a\n    - path: /b\n      name: x\n    - path: /c\n      name: x",
            "8:7: gate.routes[2].name: is the name of gate.routes[1], too; use another one",
        ),
        (
            "gate:\n  routes:\n    - path: /a\n      methods: [GET, OPTIONS]",
            "5:22: gate.routes[0].methods[1]: expects one of GET, HEAD, POST, PUT, PATCH, DELETE",
        ),
        (
            "gate: {unlisted: {writes: deny}}",
            "2:19: gate.unlisted.writes: expects one of pass, record, refuse",
        ),
        ("gate: {unlisted: refuse}", "2:8: gate.unlisted: expects keys below it such as reads, found text"),
        ("gate: {unlisted: {except: /a}}", "2:19: gate.unlisted.except: expects a list, found text"),
        (
            "gate:\n  unlisted:\n    except:\n      - /healthz\n      - /openapi.json\n",
            "6:9: gate.unlisted.except[1]: can also be read as /openapi; add that path, too",
        ),
        (
            "gate: {unlisted: {except: ['**/{id}/doc.html', /a/doc, /a/doc.html]}}",
            "2:28: gate.unlisted.except[0]: can also be read as **/x/doc; add that path, too",
        ),
        (
            "gate: {unlisted: {except: [healthz]}}",
            '2:28: gate.unlisted.except[0]: a route path begins with "/", or with "**/" for any prefix',
        ),
        ("scopes: {serve_on: both}", "2:10: scopes.serve_on: expects one of data, admin"),
        (
            "scopes: {defaults: {max_attempts: 11}}",
            "2:21: scopes.defaults.max_attempts: is above scopes.limits.max_attempts; lower it, "
            "or raise the limit",
        ),
        (
            "scopes: {defaults: {max_cost_usd: 100.000001}}",
            "2:21: scopes.defaults.max_cost_usd: is above scopes.limits.max_cost_usd; lower it, "
            "or raise the limit",
        ),
        (
            "scopes: {limits: {ttl_seconds: 299}}",
            "2:19: scopes.limits.ttl_seconds: is below scopes.defaults.ttl_seconds; lower that one, too",
        ),
        (
            "scopes: {defaults: {max_cost_usd: 0.0000001}}",
            "2:21: scopes.defaults.max_cost_usd: has a fraction of a micro-dollar; "
            "use at most six digits after the point",
        ),
        (
            'scopes: {defaults: {max_cost_usd: "1"}}',
            "2:21: scopes.defaults.max_cost_usd: expects an amount of dollars, found text",
        ),
        ("care: {min_confidence: 1.01}", "2:8: care.min_confidence: must be from 0 to 1"),
        ("log: {mask: /details/a}", "2:7: log.mask: expects a list, found text"),
        ("admin: {allowed_hosts: a.b}", "2:9: admin.allowed_hosts: expects a list, found text"),
        (
            'admin: {allowed_hosts: [a.b, "a.b:80"]}',
            "2:30: admin.allowed_hosts[1]: contains a port; remove it, names are compared without one",
        ),
        (
            "data:\n  allowed_hosts:\n    - https://a.b\n",
            "4:7: data.allowed_hosts[0]: expects a host name as in the Host header, such as gate.example or "
            "[2001:db8::1]",
        ),
        (
            "log: {mask_key_file: 5}",
            "2:7: log.mask_key_file: expects text, found a number; write it in quotes",
        ),
        ("log: {checkpoint_file: .}", "2:7: log.checkpoint_file: names a folder; name a file in it"),
        (
            "log: {checkpoint_file: cp}",
            "2:7: log.checkpoint_file: has no effect without log.signing_key_file; set both",
        ),
        (
            "log: {signing_key_file: gone}",
            "2:7: log.signing_key_file: cannot be read (No such file or directory); "
            "`scopegate log keygen FILE` makes one",
        ),
        (
            "log: {mask: [/details/a], mask_key_file: gone}",
            "2:27: log.mask_key_file: cannot be read (No such file or directory); "
            "`openssl rand -hex 32` prints one",
        ),
        ("policies: 5", "2:1: policies: expects text, found a number; write it in quotes"),
        ('policies: ""', "2:1: policies: expects text that is not empty and has no line ends or controls"),
        ("gaet: {}", '2:1: gaet: is not a known key; did you mean "gate"?'),
        (
            "gate: {max_inflight: 5}",
            '2:8: gate.max_inflight: is not a known key; did you mean "max_in_flight"?',
        ),
        ("scopes: {limits: {ttl: 5}}", "2:19: scopes.limits.ttl: is not a known key"),
        ("max_in_flight: 5", '2:1: max_in_flight: is not a known key; did you mean "gate.max_in_flight"?'),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    assert faults(tmp_path, text) == [f"c.yaml:{expected}"]


NEVER_ARRIVES = "is a header that never reaches the backend; name another one"


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (
            "scope_id: path:id",
            "names a segment that the route's path does not have (it has {name}); add it there as {name}",
        ),
        (
            "scope_id: scope",
            "write a JSON pointer (/member), path:name, query:name, header:Name, form:name or const:text",
        ),
        ("target_agents: path:{name}", "names a segment with braces; write path:name"),
        ("methods: post", 'expects one of GET, HEAD, POST, PUT, PATCH, DELETE; did you mean "POST"?'),
        ("scope_id: const:s", "would be the scope of every request; name a place in the request"),
        ("scope_id: header:Connection", NEVER_ARRIVES),
        ("scope_id: header:scopegate_scope-id", NEVER_ARRIVES),
        ("action: path:name/header:TE", NEVER_ARRIVES),
        ("cost: header:Scopegate-Cost", NEVER_ARRIVES),
        (
            "action: form:do",
            "is read from a form, which this route does not take; add form to body, or name another place "
            "such as header:Name",
        ),
        (
            "action: path:name/path:id",
            "names a segment that the route's path does not have (it has {name}); add it there as {name}",
        ),
        ("body: yaml", "expects one of json, form, empty, any"),
        ("body: []", "is empty; add a value, or remove the key"),
        (
            "content_types: json",
            "expects a media type without parameters, such as application/merge-patch+json",
        ),
        (
            "content_types: multipart/form-data",
            "is a form and never JSON; remove it, and add form or any to body",
        ),
        ("action: header:a/b", "is not a valid header name; write header:Name"),
        ("incident_id: 5", "expects text, found a number; write it in quotes"),
        (
            "parameters: header:P",
            "is a JSON object, which only the body can hold; write a JSON pointer (/member)",
        ),
        ("target_agents: null", "expects text, found nothing; write it in quotes"),
        ("cost: query:c", "is read from the answer; write a JSON pointer (/member) or header:Name"),
        ("mode: audit", "expects one of enforce, shadow"),
        ("mode: [shadow]", "expects one of enforce, shadow"),
        ("paht: /x", 'is not a known key; did you mean "path"?'),
        ("scope: /x", 'is not a known key; did you mean "scope_id"?'),
    ],
)
def test_a_mistake_in_a_route_is_named(tmp_path: Path, member: str, message: str) -> None:
    key = member.partition(":")[0]
    assert faults(tmp_path, f"gate:\n  routes:\n    - path: /v/{{name}}/run\n      {member}\n") == [
        f"c.yaml:5:7: gate.routes[0].{key}: {message}"
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *(
            (path, "a route path has no :name, <name>, [name] or regular expression; write {name}")
            for path in ("/a/:id/b", "/a/<id>", "/a/[id]", "/a/[^/]+/b", "/(a|b)")
        ),
        *(
            (
                path,
                'a "*" of a route path is only in "**/" at its beginning; write {name} for one segment, and '
                "{name...} at the end for one or more",
            )
            for path in ("/a/*/b", "/a/**", "/a/v*")
        ),
    ],
)
def test_the_variables_of_other_routers_are_mistakes_because_they_would_gate_nothing(
    tmp_path: Path, path: str, message: str
) -> None:
    assert faults(tmp_path, f"gate:\n  routes:\n    - path: '{path}'\n") == [
        f"c.yaml:4:7: gate.routes[0].path: {message}"
    ]


def test_a_colon_within_a_segment_is_text(tmp_path: Path) -> None:
    assert settings_of(tmp_path, "gate:\n  routes:\n    - path: /jobs/{job}:run\n")


def test_an_item_of_a_list_is_named_by_its_number(tmp_path: Path) -> None:
    assert faults(tmp_path, "gate:\n  routes:\n    - path: /x\n      target_agents: [/a, 5]\n") == [
        "c.yaml:5:27: gate.routes[0].target_agents[1]: expects text, found a number; write it in quotes"
    ]
    assert faults(tmp_path, "gate:\n  routes:\n    - path: /x\n      target_agents: 5\n") == [
        "c.yaml:5:7: gate.routes[0].target_agents: expects text, found a number; write it in quotes"
    ]


NO_JSON = "is read from a JSON body, which this route does not take; add json to body, or name another place "


@pytest.mark.parametrize(
    ("member", "place", "message"),
    [
        ("scope_id: /scope", "6:7: gate.routes[0].scope_id", NO_JSON + "such as header:Name"),
        ("parameters: /job", "6:7: gate.routes[0].parameters", NO_JSON + "such as header:Name"),
        ("target_agents: /job", "6:7: gate.routes[0].target_agents", NO_JSON + "such as header:Name"),
        (
            "target_agents: [path:name, /job]",
            "6:34: gate.routes[0].target_agents[1]",
            NO_JSON + "such as header:Name",
        ),
        (
            "content_types: application/merge-patch+json",
            "6:7: gate.routes[0].content_types",
            "has no effect without json in body; add it there, or remove this key",
        ),
    ],
)
@pytest.mark.parametrize("body", ["empty", "[empty]", "any", "[form, any, empty]"])
def test_a_place_that_no_body_of_the_route_has_is_a_mistake(
    tmp_path: Path, body: str, member: str, place: str, message: str
) -> None:
    text = f"gate:\n  routes:\n    - path: /v/{{name}}/run\n      body: {body}\n      {member}\n"
    assert faults(tmp_path, text) == [f"c.yaml:{place}: {message}"]


@pytest.mark.parametrize("body", ["form", "[form, empty]", "empty", "any", "[any, empty]"])
def test_without_json_the_facts_stand_in_headers_and_the_action_is_the_route(
    tmp_path: Path, body: str
) -> None:
    for name, action in (("name: run-it, ", "run-it"), ("", "/run")):
        route = settings_of(
            tmp_path, f"gate: {{routes: [{{{name}path: /run, body: {body}}}]}}\n"
        ).gate.routes[0]
        assert (str(route.scope_id), str(route.incident_id), str(route.action)) == (
            "header:x-recovery-scope-id",
            "header:x-recovery-incident-id",
            f"const:{action}",
        )
        assert (route.parameters, route.target_agents) == (None, ())
        dumped = json.loads(route.model_dump_json())
        assert (dumped["action"], dumped["parameters"]) == (f"const:{action}", None)
        again = Route.model_validate(dumped)
        assert again.sources == route.sources


@pytest.mark.parametrize("body", ["json", "[json]", "[json, empty]", "[form, json]", "[any, json]"])
def test_with_json_the_defaults_are_those_of_an_execute_body(tmp_path: Path, body: str) -> None:
    route = settings_of(tmp_path, f"gate: {{routes: [{{path: /run, body: {body}}}]}}\n").gate.routes[0]
    assert route.sources == DEFAULT_SOURCES


def test_what_is_given_replaces_the_defaults_of_any_body(tmp_path: Path) -> None:
    route = settings_of(
        tmp_path,
        "gate:\n  routes:\n    - path: /v/{name}/run\n      body: form\n      action: form:do\n"
        "      target_agents: path:name/form:unit\n",
    ).gate.routes[0]
    assert (str(route.action), [str(place) for place in route.target_agents]) == (
        "form:do",
        ["path:name/form:unit"],
    )
    assert str(route.scope_id) == "header:x-recovery-scope-id"


def test_a_path_too_long_for_an_action_asks_for_a_name(tmp_path: Path) -> None:
    path = "/" + "a" * 256
    assert faults(tmp_path, f"gate:\n  routes:\n    - path: {path}\n      body: empty\n") == [
        "c.yaml:4:7: gate.routes[0].path: is too long for the name of an action; add a name, or the key "
        "action"
    ]
    named = settings_of(tmp_path, f"gate:\n  routes:\n    - {{name: a, path: {path}, body: empty}}\n")
    assert str(named.gate.routes[0].action) == "const:a"


def test_a_route_may_read_its_facts_from_other_places(tmp_path: Path) -> None:
    route = settings_of(
        tmp_path,
        "gate:\n  routes:\n    - path: /v/{name}/run\n      scope_id: header:X-Scope\n"
        "      incident_id: query:i\n"
        "      action: path:name\n      parameters: /a/b\n      target_agents: /t\n      cost: /cost\n",
    ).gate.routes[0]
    names = ("scope_id", "incident_id", "action", "parameters", "cost")
    assert [str(getattr(route.sources, name)) for name in names] == [
        "header:x-scope",
        "query:i",
        "path:name",
        "/a/b",
        "/cost",
    ]
    assert [str(source) for source in route.sources.target_agents] == ["/t"]
    assert route.sources.action.name in route.path.names


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://h", SCHEMES),
        ("h:9000", SCHEMES),
        ("https:h:9000", SCHEMES),
        ("unix://host/x.sock", "expects unix:/path; a socket's URL has no host"),
        ("unix:", "expects unix:/path, the path of a socket"),
        ("unix:/run/", "expects unix:/path, the path of a socket"),
        ("unix:/" + "x" * 103, "is a socket path of more than 103 bytes; use a shorter one"),
        (
            "https://u:s3cret@h",
            "contains a user or a password; remove them, requests are forwarded unchanged",
        ),
        (
            "http://u:s3cret@h:1",
            "contains a user or a password; remove them, requests are forwarded unchanged",
        ),
        ("http://h:1/base", "has a path or a query; remove it, targets are forwarded unchanged"),
        ("http://h:1/?q=s3cret", "has a path or a query; remove it, targets are forwarded unchanged"),
        ("http://h:0", "names port 0; write the port on which the backend listens"),
        ("http://:9000", f'{LISTEN} or "[::1]:8000"'),
        ("http://127.0.0.1:8000", "is the address of data.listen, too; use another one"),
    ],
)
def test_an_upstream_that_cannot_be_used_is_refused_without_its_secret(
    tmp_path: Path, url: str, message: str
) -> None:
    assert bare_faults(tmp_path, f'upstream:\n  url: "{url}"\n') == [f"c.yaml:2:3: upstream.url: {message}"]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h", Listen("h", 80)),
        ("HTTP://h:9000/", Listen("h", 9000)),
        ("http://[::1]:9000", Listen("::1", 9000)),
        ("http://backend_1:9000", Listen("backend_1", 9000)),
        ("https://h", Listen("h", 443)),
        ("HTTPS://[::1]:9000", Listen("::1", 9000)),
        ("unix:/run/b.sock", SocketFile(Path("/run/b.sock"))),
    ],
)
def test_an_upstream_is_a_host_and_a_port_or_a_socket(url: str, address: Address) -> None:
    assert default(url).upstream.address == address


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://var/x.db",
        "sqlite:///",
        "sqlite:///x/",
        "sqlite:///x?mode=ro",
        "sqlite:///:memory:",
        "mysql://u:s3cret@h/x",
        "x.db",
    ],
)
def test_a_store_that_cannot_be_used_is_refused_without_its_secret(tmp_path: Path, url: str) -> None:
    assert faults(tmp_path, f'store:\n  url: "{url}"') == [
        "c.yaml:3:3: store.url: expects sqlite:///file (relative to this file), sqlite:////absolute/file "
        "or memory://"
    ]


def test_postgresql_is_known_by_name_and_comes_later(tmp_path: Path) -> None:
    for scheme in ("postgresql", "postgres", "postgresql+asyncpg"):
        assert faults(tmp_path, f"store: {{url: {scheme}://u:s3cret@h/x}}") == [
            "c.yaml:2:9: store.url: postgresql is not supported yet; write sqlite:///file"
        ]


# The log ------------------------------------------------------------------------------------------------


ONLY = "cannot be masked; only members below /decision_inputs and /details can, and /decision_reason"


def key_files(folder: Path, *, mode: int = 0o600) -> None:
    """Files that hold each kind of key, and some that hold none."""
    ed25519 = SigningKey.generate()
    contents = {
        "signing.key": ed25519.pem(),
        "public.pub": ed25519.public.pem(),
        "x25519.key": X25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
        "locked.key": Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"s3cret")
        ),
        "mask.key": b"s3cret s3cret s3cret",
        "least.key": b"s3cret s3cret s3\r\n",
        "short.key": b"s3cret s3cret s\n",
        "empty.key": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(mode)


def test_the_log_may_be_signed_and_masked(tmp_path: Path) -> None:
    key_files(tmp_path)
    log = settings_of(
        tmp_path,
        "log:\n  signing_key_file: signing.key\n  checkpoint_file: sub/cp.jsonl\n"
        "  mask: [/decision_inputs/parameters/a~1b, /details/list/0, /decision_reason]\n"
        "  mask_key_file: least.key\n",
    ).log
    assert log.signing_key_file == tmp_path / "signing.key"
    assert log.checkpoint_file == tmp_path / "sub" / "cp.jsonl"
    assert log.mask_key_file == tmp_path / "least.key"
    mask = log.masking()
    assert mask is not None
    assert mask.key == b"s3cret s3cret s3"
    assert set(mask.pointers) == {
        ("decision_inputs", "parameters", "a/b"),
        ("details", "list", "0"),
        ("decision_reason",),
    }
    assert "s3cret" not in repr(mask)


def test_nothing_is_signed_or_masked_by_default(tmp_path: Path) -> None:
    log = settings_of(tmp_path, "").log
    assert (log.signing_key_file, log.checkpoint_file, log.mask, log.masking()) == (None, None, (), None)


@pytest.mark.parametrize(
    ("pointer", "message"),
    [
        ("details/a", "expects a JSON pointer: /member or /member/member, with ~ as ~0 and / as ~1"),
        ("/details/~2", "expects a JSON pointer: /member or /member/member, with ~ as ~0 and / as ~1"),
        ("/details/~~01", "expects a JSON pointer: /member or /member/member, with ~ as ~0 and / as ~1"),
        ("/details/", "names no member, or an empty one; write /member or /member/member"),
        ("/details", "/details as a whole cannot be masked; name a member below it, /details/member"),
        *(
            (
                pointer,
                ONLY,
            )
            for pointer in (
                "/decision_id",
                "/tenant_id",
                "/run_id",
                "/decided_at",
                "/decision_reason/a",
                "/x",
            )
        ),
        *(
            (pointer, f"{pointer} tells records apart and cannot be masked; mask another member")
            for pointer in (
                "/decision_inputs/policy_id",
                "/decision_inputs/principal",
                "/details/admission_id",
                "/details/policy_revision",
                "/details/rules",
                "/details/count",
            )
        ),
        (
            "/details/rules/0/name",
            "/details/rules tells records apart and cannot be masked; mask another member",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused_by_name(tmp_path: Path, pointer: str, message: str) -> None:
    text = f"log:\n  mask:\n    - /details/a\n    - {pointer}\n"
    assert faults(tmp_path, text) == [f"c.yaml:5:7: log.mask[1]: {message}"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("public.pub", "holds no Ed25519 private key (PEM, PKCS8, without a passphrase)"),
        ("x25519.key", "holds no Ed25519 private key (PEM, PKCS8, without a passphrase)"),
        ("locked.key", "holds no Ed25519 private key (PEM, PKCS8, without a passphrase)"),
        ("mask.key", "holds no Ed25519 private key (PEM, PKCS8, without a passphrase)"),
        ("empty.key", "holds no Ed25519 private key (PEM, PKCS8, without a passphrase)"),
        (".", "cannot be read (Is a directory)"),
        ("/dev/null", "is not a regular file"),
    ],
)
def test_a_signing_key_is_an_ed25519_key(tmp_path: Path, name: str, message: str) -> None:
    key_files(tmp_path)
    text = f"log:\n  checkpoint_file: cp\n  signing_key_file: {name}\n"
    advice = "`scopegate log keygen FILE` makes one"
    assert faults(tmp_path, text) == [f"c.yaml:4:3: log.signing_key_file: {message}; {advice}"]


@pytest.mark.parametrize("name", ["short.key", "empty.key"])
def test_a_mask_key_cannot_be_guessed(tmp_path: Path, name: str) -> None:
    key_files(tmp_path)
    text = f"log:\n  mask: [/details/a]\n  mask_key_file: {name}\n"
    assert faults(tmp_path, text) == [
        "c.yaml:4:3: log.mask_key_file: has fewer than 16 bytes, which can be guessed; "
        "`openssl rand -hex 32` prints one"
    ]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    key_files(tmp_path, mode=mode)
    found = faults(
        tmp_path,
        "log:\n  checkpoint_file: cp\n  signing_key_file: signing.key\n"
        "  mask: [/details/a]\n  mask_key_file: mask.key\n",
    )
    assert [fault.partition(";")[0] for fault in found] == [
        f"c.yaml:{place}: may be read or written by others than its owner (mode {mode:04o})"
        for place in ("4:3: log.signing_key_file", "6:3: log.mask_key_file")
    ]
    assert "chmod 600" in found[0]
    assert "s3cret" not in "".join(found)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "signing_key_file: signing.key",
            "log.signing_key_file: has no effect without log.checkpoint_file; set both",
        ),
        (
            "mask_key_file: mask.key",
            "log.mask_key_file: has no effect without log.mask; set what is masked there",
        ),
        (
            "{signing_key_file: signing.key, checkpoint_file: signing.key}",
            "log.checkpoint_file: is the file of a key, too; name another one",
        ),
        (
            "{signing_key_file: signing.key, checkpoint_file: var/scopegate.db}",
            "log.checkpoint_file: is the file of store.url, too; name another one",
        ),
    ],
)
def test_keys_that_make_no_sense_together_are_refused(tmp_path: Path, log: str, expected: str) -> None:
    key_files(tmp_path)
    (found,) = faults(tmp_path, f"log: {log}" if log[0] == "{" else f"log: {{{log}}}")
    assert found.partition(": ")[2] == expected


def test_a_socket_may_stand_beside_the_configuration(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, 'ops: {listen: "unix:run/ops.sock"}', ("upstream.url", "unix:b.sock"))
    assert settings.ops.listen == SocketFile(tmp_path / "run" / "ops.sock")
    assert settings.upstream.address == SocketFile(tmp_path / "b.sock")
    assert settings.upstream.verified_name is None


def test_two_listeners_cannot_share_a_socket(tmp_path: Path) -> None:
    text = 'data: {listen: "unix:/run/s"}\nops: {listen: "unix:///run/s"}'
    assert faults(tmp_path, text) == [
        "c.yaml:3:7: ops.listen: is the address of data.listen, too; use another one"
    ]


@pytest.mark.parametrize(
    ("tls", "name"),
    [
        ("", "backend"),
        (", tls: {server_name: gate.test}", "gate.test"),
        (", tls: {server_name: 10.0.0.1}", "10.0.0.1"),
    ],
)
def test_the_backend_is_verified_by_the_name_of_its_url_unless_another_is_given(
    tmp_path: Path, tls: str, name: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"upstream: {{url: https://backend{tls}}}")
    upstream = load(tmp_path / "c.yaml", environment={}).settings.upstream
    assert (upstream.url, upstream.verified_name) == ("https://backend:443", name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {tls: {certificate_file: a.pem}}", "data.tls.certificate_file: requires key_file"),
        (
            "ops: {tls: {key_file: a.key}}",
            "ops.tls.key_file: has no effect without certificate_file; set both",
        ),
        (
            "admin: {tls: {client_ca_file: authority.pem}}",
            "admin.tls.client_ca_file: has no effect without certificate_file; set both",
        ),
        (
            "data: {tls: {certificate_file: a.pem, key_file: b.key}}",
            "data.tls.key_file: does not belong to the certificate; name the key of the certificate",
        ),
        (
            "data: {tls: {certificate_file: a.pem, key_file: gone}}",
            "data.tls.key_file: cannot be read (No such file or directory); check the name",
        ),
        (
            "data: {tls: {certificate_file: a.pem, key_file: a.key, client_ca_file: a.key}}",
            "data.tls.client_ca_file: contains no certificate in PEM; name a file that does",
        ),
    ],
)
def test_tls_that_cannot_be_spoken_is_refused_at_its_key(tmp_path: Path, text: str, expected: str) -> None:
    authority = Authority(tmp_path)
    authority.issue("a")
    authority.issue("b")
    (found,) = faults(tmp_path, text)
    key = expected.partition(":")[0].rpartition(".")[2]
    place, _, said = found.partition(": ")
    assert said.startswith(expected)
    line, column = place.removeprefix("c.yaml:").split(":")
    assert (tmp_path / "c.yaml").read_text().splitlines()[int(line) - 1][int(column) - 1 :].startswith(key)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9000", "unix:/run/b.sock"])
def test_tls_towards_a_backend_that_speaks_none_is_refused(tmp_path: Path, url: str) -> None:
    Authority(tmp_path)
    (tmp_path / "c.yaml").write_text(
        f'upstream:\n  url: "{url}"\n  tls: {{server_name: x, ca_file: authority.pem}}\n'
    )
    with pytest.raises(ConfigurationError) as refused:
        load(tmp_path / "c.yaml", environment={})
    assert [(fault.key, fault.message) for fault in refused.value.faults] == [
        (
            f"upstream.tls.{key}",
            "has no effect without https; write url: https://host:port, or remove this key",
        )
        for key in ("server_name", "ca_file")
    ]


def test_whoever_only_reads_the_log_needs_no_certificates(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(UPSTREAM + "data: {tls: {certificate_file: gone, key_file: gone}}")
    assert load(file, environment={}, read_keys=False).settings.data.tls.key_file == tmp_path / "gone"
    with pytest.raises(ConfigurationError):
        load(file, environment={})


def test_whoever_only_reads_the_log_needs_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        UPSTREAM + "log: {signing_key_file: gone, checkpoint_file: cp, mask: [/details/a], mask_key_file: g}"
    )
    settings = load(file, environment={}, read_keys=False).settings
    assert settings.log.signing_key_file == tmp_path / "gone"
    with pytest.raises(ConfigurationError):
        load(file, environment={})


def test_pointers_and_key_files_may_come_from_variables_and_flags(tmp_path: Path) -> None:
    key_files(tmp_path)
    environment = {"SCOPEGATE_LOG__MASK": "[/details/a, /details/b]"}
    settings = settings_of(tmp_path, "", ("log.mask_key_file", "mask.key"), **environment)
    assert settings.log.mask == ("/details/a", "/details/b")
    assert settings.log.mask_key_file == tmp_path / "mask.key"
    assert faults(tmp_path, "", SCOPEGATE_LOG__MASK="[/details]") == [
        "environment SCOPEGATE_LOG__MASK: log.mask[0]: /details as a whole cannot be masked; "
        "name a member below it, /details/member"
    ]
    # Somebody who takes the key itself for the name of its file must not read it again in a log.
    (fault,) = faults(tmp_path, "log: {mask: [/details/a]}", ("log.mask_key_file", "s3cret"))
    assert "s3cret" not in fault


def test_the_key_is_no_part_of_what_settings_dump(tmp_path: Path) -> None:
    key_files(tmp_path)
    settings = settings_of(tmp_path, "log: {mask: [/details/a], mask_key_file: mask.key}")
    assert "s3cret" not in settings.model_dump_json() + repr(settings)


def test_all_faults_are_reported_at_once_and_in_order(tmp_path: Path) -> None:
    text = "gate:\n  annotate_response: yes\n  max_in_flight: 0\n  max_in_flight: 1\n"
    text += "ops: {lsten: 1}\ncare: 017\n"
    found = faults(
        tmp_path, text, ("store.url", "x"), ("gate", "x"), ("gate.mode", "x"), SCOPEGATE_OPS__LISTEN="x"
    )
    assert [line.split(": ")[0] for line in found] == [
        "c.yaml:3:22",
        "c.yaml:4:3",
        "c.yaml:5:3",
        "c.yaml:6:7",
        "c.yaml:7:7",
        "--set gate",
        "--set gate.mode",
        "--set store.url",
        "environment SCOPEGATE_OPS__LISTEN",
    ]


def test_a_file_that_is_no_map_or_no_file_is_a_fault(tmp_path: Path) -> None:
    assert bare_faults(tmp_path, "- a") == ["c.yaml:1:1: expects keys below it such as data, found a list"]
    assert bare_faults(tmp_path, "a: [") == [
        "c.yaml:1:5: a value is missing here; text that begins with a bracket needs quotes"
    ]
    with pytest.raises(ConfigurationError, match=r"gone\.yaml: cannot be read \(No such file or directory\)"):
        load(tmp_path / "gone.yaml", environment={})
    with pytest.raises(ConfigurationError, match=r"cannot be read \(Is a directory\)"):
        load(tmp_path, environment={})


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text, variable, flag = (
        "gate: {max_in_flight: 1}",
        {"SCOPEGATE_GATE__MAX_IN_FLIGHT": "2"},
        ("gate.max_in_flight", "3"),
    )
    assert settings_of(tmp_path, text).gate.max_in_flight == 1
    assert settings_of(tmp_path, text, **variable).gate.max_in_flight == 2
    assert settings_of(tmp_path, text, flag, **variable).gate.max_in_flight == 3
    assert settings_of(tmp_path, "gate:", **variable).gate.max_in_flight == 2


@pytest.mark.parametrize(
    ("variable", "text", "key", "value"),
    [
        ("UPSTREAM__URL", "http://b:1", "upstream.url", "http://b:1"),
        ("GATE__ANNOTATE_RESPONSE", "true", "gate.annotate_response", True),
        ("GATE__TENANT_HEADER", "yes", "gate.tenant_header", "yes"),
        ("GATE__TENANT_HEADER", "null", "gate.tenant_header", None),
        ("SCOPES__LIMITS__MAX_COST_USD", "2.5", "scopes.limits.max_cost", 2_500_000),
        ("SHUTDOWN__DRAIN_SECONDS", "1e1", "shutdown.drain_seconds", 10.0),
        ("SHUTDOWN__DRAIN_SECONDS", "10s", "shutdown.drain_seconds", 10.0),
        ("SCOPES__DEFAULTS__TTL_SECONDS", "2m", "scopes.defaults.ttl_seconds", 120),
        ("GATE__ROUTES", "[{path: /a}, {path: /b}]", "gate.routes.1.path.text", "/b"),
        ("LOG__SIGNING_KEY_FILE", "null", "log.signing_key_file", None),
        ("DATA__ALLOWED_HOSTS", "null", "data.allowed_hosts", None),
        ("DATA__ALLOWED_HOSTS", "[A.b., '[::01]']", "data.allowed_hosts", ("a.b", "[::1]")),
        ("ADMIN__ALLOWED_HOSTS", "[a.b]", "admin.allowed_hosts", ("a.b",)),
    ],
)
def test_a_variable_is_typed_as_its_key_is(
    tmp_path: Path, variable: str, text: str, key: str, value: object
) -> None:
    settings = settings_of(tmp_path, "", **{f"SCOPEGATE_{variable}": text})
    assert value_of(settings, key) == value
    name = variable.lower().replace("__", ".")
    assert value_of(settings_of(tmp_path, "", (name, text)), key) == value


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("gate.max_in_flight", "many", "gate.max_in_flight: expects a whole number, found text"),
        ("gate.max_in_flight", "", "gate.max_in_flight: expects a whole number, found nothing"),
        (
            "gate.annotate_response",
            "yes",
            "gate.annotate_response: the value is a truth value to YAML 1.1 only: write true or false, "
            "or put it in quotes if text is meant",
        ),
        ("gate.routes", "/x", "gate.routes: expects a list, found text"),
        (
            "gate.routes",
            "[",
            "gate.routes: a value is missing here; text that begins with a bracket needs quotes",
        ),
        (
            "gate.routes",
            "[{path: no}]",
            "gate.routes[0].path: no is a truth value to YAML 1.1 only: write true or false, "
            "or put it in quotes if text is meant",
        ),
        (
            "gate.routes",
            "[{path: /a, mode: off}]",
            "gate.routes[0].mode: off is a truth value to YAML 1.1 only: "
            "write true or false, or put it in quotes if text is meant",
        ),
        ("gate.scope_required_from", "some", f"gate.scope_required_from: {RISKS}"),
    ],
)
def test_a_mistake_in_a_variable_or_a_flag_names_it(
    tmp_path: Path, key: str, text: str, expected: str
) -> None:
    variable = "SCOPEGATE_" + key.upper().replace(".", "__")
    assert faults(tmp_path, "", **{variable: text}) == [f"environment {variable}: {expected}"]
    assert faults(tmp_path, "", (key, text)) == [f"--set {key}: {expected}"]


def test_a_flag_for_no_key_or_for_a_section_is_a_fault(tmp_path: Path) -> None:
    assert faults(tmp_path, "", ("gate.maxinflight", "5"), ("scopes.limits", "5")) == [
        '--set gate.maxinflight: gate.maxinflight: is not a known key; did you mean "gate.max_in_flight"?',
        "--set scopes.limits: scopes.limits: is a section; name one of its keys",
    ]


def test_the_keys_of_the_file_that_something_overrides_are_named(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = "gate:\n  max_in_flight: 1\n  tenant_header: null\n  routes: [{path: /a}]\n"
    file.write_text(f"{UPSTREAM}{text}scopes: {{limits: {{max_cost_usd: 9}}}}\n")
    environment = {
        "SCOPEGATE_SCOPES__LIMITS__MAX_COST_USD": "8",
        "SCOPEGATE_GATE__MAX_IN_FLIGHT": "1",
        "SCOPEGATE_GATE__TENANT_HEADER": "X-Tenant",
        "SCOPEGATE_GATE__MAX_BODY_BYTES": "2",
        "SCOPEGATE_UNKNOWN": "3",
    }
    flags = [("gate.routes", "[{path: /b}]"), ("care.min_confidence", "1")]
    assert load(file, environment=environment, overrides=flags).shadowed == (
        "gate.routes",
        "gate.max_in_flight",
        "gate.tenant_header",
        "scopes.limits.max_cost_usd",
    )


# What can change while it runs --------------------------------------------------------------------------


def leaves_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key that holds a value; a list is one."""
    for name, field in model.model_fields.items():
        key = above + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves_of(field.annotation, f"{key}.")
        else:
            yield key


def test_every_key_is_known_by_its_name() -> None:
    assert len(KEYS) > 30
    assert [*KEYS] == list(leaves_of(Settings))


def test_a_key_says_that_it_is_live_or_secret_and_is_neither_by_default() -> None:
    class Example(Section):
        one: Annotated[int, LIVE] = 1
        two: Annotated[str, SECRET] = ""
        three: Annotated[int | None, LIVE, SECRET] = None
        four: int = 4

    marks = {key.name: (key.is_live, key.is_secret) for key in keys_in(Example)}
    assert marks == {
        "one": (True, False),
        "two": (False, True),
        "three": (True, True),
        "four": (False, False),
    }
    assert {name for name, key in KEYS.items() if key.is_secret} == {"store.url", "telemetry.otlp_endpoint"}
    # Sockets, connections and the database are made at the start.
    assert not any(KEYS[name].is_live for name in ("data.listen", "upstream.url", "store.url"))


# Those that go only with each other; a test of their own has them.
TOGETHER = {"log.signing_key_file", "log.checkpoint_file", "log.mask_key_file"}
TOGETHER |= {key for key in KEYS if ".tls." in key} | NOT_ALONE
DEFAULTS = values_of(default("http://127.0.0.1:9000"))
# For each key a value that is not its default.
OTHER: dict[str, Any] = {
    key: next(value for value in GOOD[key] if value != DEFAULTS[key]) for key in KEYS if key not in TOGETHER
}


def as_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("key", OTHER)
def test_settings_that_differ_in_one_key_are_told_apart_by_its_name(tmp_path: Path, key: str) -> None:
    one = settings_of(tmp_path, "")
    other = settings_of(tmp_path, "", (key, as_flag(OTHER[key])))
    # Presets add their routes to the configured ones.
    keys = (key, "gate.routes") if key == "gate.presets" else (key,)
    assert differing(one, other) == keys
    assert differing(other, one) == keys
    assert differing(one, settings_of(tmp_path, "")) == ()


# For each key of `auth` that does not go alone, another value than in the text below.
WITH_METHODS = """\
auth:
  jwt: {issuer: "https://a", audience: a, jwks: "https://a/jwks", ca_file: a.pem}
  proxy: {header: X-User, groups_header: X-Groups, trusted: [unix]}
"""
OTHER_WITH_METHODS = {
    "auth.required": "true",
    "auth.principals": "other.yaml",
    "auth.jwt.issuer": "https://b",
    "auth.jwt.audience": "b",
    "auth.jwt.jwks": "https://b/jwks",
    "auth.jwt.ca_file": "b.pem",
    "auth.proxy.header": "X-Other",
    "auth.proxy.groups_header": "X-Teams",
    "auth.proxy.trusted": '["10.1.2.3"]',
}


# `auth.mtls.id` needs certificates; test_auth_settings has it.
@pytest.mark.parametrize("key", sorted(NOT_ALONE - {"auth.mtls.id"}))
def test_settings_with_methods_that_differ_in_one_key_are_told_apart_by_its_name(
    tmp_path: Path, key: str
) -> None:
    one = settings_of(tmp_path, WITH_METHODS)
    other = settings_of(tmp_path, WITH_METHODS, (key, OTHER_WITH_METHODS[key]))
    assert differing(one, other) == (key,)
    assert differing(other, one) == (key,)


SAME_PATH = "is the path of gate.routes[{}] for the same methods, too; keep one of them"
SAME_REQUESTS = (
    "matches requests that {} of gate.routes[{}] matches, too, with the same methods; change one of them, or "
    "join the two routes"
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/a", "/a"),
        ("/a", "/A"),
        ("/v/{name}/run", "/V/{name}/run"),
        ("**/run", "**/RUN"),
        ("/a/{rest...}", "/a/{rest...}"),
    ],
)
def test_two_routes_with_one_path_and_method_are_both_named(tmp_path: Path, one: str, other: str) -> None:
    text = f'gate:\n  routes:\n    - path: "{one}"\n    - path: "{other}"\n      methods: [PUT, POST]\n'
    assert faults(tmp_path, text) == [
        "c.yaml:4:7: gate.routes[0].path: " + SAME_PATH.format(1),
        "c.yaml:5:7: gate.routes[1].path: " + SAME_PATH.format(0),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/a", "/a/"),
        ("/a/{b}", "/a/{c}"),
        ("/a/{b}", "/a/{c}/"),
        ("/{a}/b", "/c/{d}"),
        ("/v1/{kind}s/run", "/v1/pod{kind}/run"),
        ("/a/{b}:run", "/a/{c}"),
        ("**/run", "/v1/{name}/run"),
        ("**/run", "**/tasks/run"),
        ("**/{name}/run", "**/tasks/run"),
        ("**/run", "/tasks/{rest...}"),
        ("/tasks/{rest...}", "/tasks/{name}/run"),
        ("/tasks/{rest...}", "/{kind}/{rest...}"),
    ],
)
def test_two_routes_that_some_request_would_both_have_are_named(tmp_path: Path, one: str, other: str) -> None:
    for first, second in ((one, other), (other, one)):
        text = f'gate:\n  routes:\n    - path: [/x, "{first}"]\n    - path: "{second}"\n'
        assert faults(tmp_path, text) == [
            "c.yaml:4:7: gate.routes[0].path: " + SAME_REQUESTS.format(second, 1),
            "c.yaml:5:7: gate.routes[1].path: " + SAME_REQUESTS.format(first, 0),
        ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/a", "/b"),
        ("/a/{b}", "/a/c"),  # the exact path goes before the one with a variable
        ("**/run", "/v1/run"),
        ("/a/{b}", "/a/{b}/{c}"),
        ("/a/{b}", "/c/{b}"),
        ("/a/{b}:run", "/a/{b}:stop"),
        ("/a/{b}", "/a/x/{rest...}"),
        ("**/run", "**/stop"),
        ("**/a/run", "/run/{b}"),
        ("/v1/{kind}s/run", "/v1/{kind}s/stop"),
        ("/", "/{a}"),
    ],
)
def test_two_routes_that_no_request_has_both_of_are_accepted(tmp_path: Path, one: str, other: str) -> None:
    text = f'gate:\n  routes:\n    - path: "{one}"\n    - path: "{other}"\n'
    assert [route.label for route in settings_of(tmp_path, text).gate.routes] == [one, other]


def test_routes_that_share_a_path_with_different_methods_need_names(tmp_path: Path) -> None:
    text = "gate:\n  routes:\n    - path: /a\n    - path: [/b, /a]\n      methods: [DELETE]\n"
    message = "is a path of gate.routes[{}], too; give each of the two a name"
    assert faults(tmp_path, text) == [
        "c.yaml:4:7: gate.routes[0].path: " + message.format(1),
        "c.yaml:5:7: gate.routes[1].path: " + message.format(0),
    ]
    named = text.replace("- path", "- name: one\n      path", 1)
    assert faults(tmp_path, named) == ["c.yaml:6:7: gate.routes[1].path: " + message.format(0)]
    named = named.replace("- path", "- name: two\n      path", 1)
    assert [route.label for route in settings_of(tmp_path, named).gate.routes] == ["one", "two"]


def test_head_is_listed_where_get_is(tmp_path: Path) -> None:
    text = (
        "gate:\n  routes:\n    - {path: /a, name: one, methods: [GET]}\n"
        "    - {path: /a, name: two, methods: [HEAD]}\n"
    )
    assert len(faults(tmp_path, text)) == 2


def test_only_names_that_all_paths_of_a_route_have_are_places(tmp_path: Path) -> None:
    text = "gate:\n  routes:\n    - path: ['/a/{b}/{c}', '/a/{b}']\n      action: path:NAME\n"
    assert settings_of(tmp_path, text.replace("NAME", "b"))
    (fault,) = faults(tmp_path, text.replace("NAME", "c"))
    assert fault.startswith("c.yaml:5:7: gate.routes[0].action: names a segment that")


def test_five_hundred_routes_are_compared_in_less_than_a_second(tmp_path: Path) -> None:
    routes = "".join(
        f"    - path: ['/v1/kinds/{{kind}}/things/{{thing}}/do{number}', '/v1/{{thing}}/do{number}/']\n"
        for number in range(500)
    )
    sections = settings_of(tmp_path, "gate:\n  routes:\n" + routes).gate
    begun = time.process_time()
    assert list(conflicts([route.calls for route in sections.routes])) == []
    assert time.process_time() - begun < 1


def test_settings_that_differ_in_many_keys_are_told_apart_in_the_files_order(tmp_path: Path) -> None:
    key_files(tmp_path)
    text = (
        "log: {signing_key_file: signing.key, checkpoint_file: cp, mask: [/details/a],"
        " mask_key_file: mask.key}\n"
        "gate: {routes: [{path: /a}, {path: /b, mode: shadow}], max_in_flight: 1}\n"
    )
    assert differing(settings_of(tmp_path, ""), settings_of(tmp_path, text)) == (
        "gate.routes",
        "gate.max_in_flight",
        "log.signing_key_file",
        "log.checkpoint_file",
        "log.mask",
        "log.mask_key_file",
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("gate: {max_body_bytes: 1048576}", ""),
        ("scopes: {defaults: {max_cost_usd: 0.50}}", "scopes: {defaults: {max_cost_usd: 5e-1}}"),
        ('gate: {routes: [{path: "**/recovery/execute"}]}', "gate:"),
        ("policies: p/", "policies: ./q/../p"),
    ],
)
def test_what_means_the_same_does_not_differ(tmp_path: Path, one: str, other: str) -> None:
    assert differing(settings_of(tmp_path, one), settings_of(tmp_path, other)) == ()


def test_an_unknown_variable_warns_and_names_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(UPSTREAM)
    environment = {
        "SCOPEGATE_STORE_URL": "sqlite:///s3cret",
        "SCOPEGATE_DATA": "x",
        "SCOPEGATE_PORT": "tcp://10.0.0.1:80",
        "SCOPEGATE_gate__max_in_flight": "5",
        "OTHER": "x",
    }
    loaded = load(file, environment={**environment, "SCOPEGATE_CONFIG": "elsewhere.yaml"})
    warnings = loaded.warnings
    assert loaded.settings.gate.max_in_flight == 1024
    assert [warning.partition(":")[0] for warning in warnings] == [
        f"environment {name}" for name in sorted(environment) if name != "OTHER"
    ]
    assert (
        "environment SCOPEGATE_STORE_URL: no key has this name, ignored; the nearest is store.url "
        in warnings[2]
    )
    assert "data.listen (SCOPEGATE_DATA__LISTEN)" in warnings[0]
    assert "s3cret" not in "".join(warnings)


def test_variables_inside_the_file_are_filled_in(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "gate:\n  max_in_flight: ${N}\npolicies: ${GONE:here}\n", N="7")
    assert settings.gate.max_in_flight == 7
    assert settings.policies == tmp_path / "here"
    assert faults(tmp_path, "policies: ${GONE}") == [
        "c.yaml:2:11: policies: the variable GONE is not set; set it, or write ${GONE:default}"
    ]


def test_settings_without_a_file_are_checked_as_well() -> None:
    settings = default(
        "http://127.0.0.1:9000",
        store={"url": "memory://"},
        data={"listen": "127.0.0.1:0"},
        policies=Path("/p"),
    )
    assert (settings.store.url, settings.data.listen) == ("memory://", Listen("127.0.0.1", 0))
    assert settings.policies == Path("/p")
    with pytest.raises(ConfigurationError, match=r"store\.url: expects sqlite"):
        default("http://127.0.0.1:9000", store={"url": "x"})


# Reports ------------------------------------------------------------------------------------------------

REPORTING = "gate: {routes: [{path: /a}, {path: /b, completion: report}]}\n"


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("data: {listen: 127.0.0.1:8000}\n", "http://127.0.0.1:8000"),
        ("data: {listen: '[::1]:8000'}\n", "http://[::1]:8000"),
        ("data: {listen: 10.0.0.5:8000}\n", "http://10.0.0.5:8000"),
        ("data: {listen: gate.internal:8000}\n", "http://gate.internal:8000"),
    ],
)
def test_reports_go_to_the_address_of_the_data_listener_unless_a_url_is_given(
    tmp_path: Path, text: str, base: str
) -> None:
    settings = settings_of(tmp_path, text + REPORTING)
    assert settings.completion_base == base
    given = settings_of(tmp_path, text + "gate: {completion_base_url: 'HTTPS://localhost:1/gate/'}\n")
    assert given.completion_base == "https://localhost:1/gate"


@pytest.mark.parametrize("listen", ["0.0.0.0:8000", "[::]:8000", "127.0.0.1:0", "unix:/run/data.sock"])
def test_an_address_that_cannot_be_called_needs_a_url_for_reports(tmp_path: Path, listen: str) -> None:
    text = f"data: {{listen: '{listen}'}}\n"
    assert faults(tmp_path, text + REPORTING) == [
        "c.yaml:3:40: gate.routes[1].completion: needs gate.completion_base_url, since data.listen "
        f"({listen}) cannot be called as it is; set it to the URL under which the backend reaches that "
        "listener"
    ]
    with_url = REPORTING.replace("{routes", "{completion_base_url: 'http://gate.internal:8000', routes")
    allowed = "" if "127" not in listen else "data.allowed_hosts"
    flags = [(allowed, "[gate.internal]")] if allowed else []
    settings = settings_of(tmp_path, text + with_url, *flags)
    assert settings.completion_base == "http://gate.internal:8000"
    settings_of(tmp_path, text + REPORTING.replace("report}", "answer}"))


@pytest.mark.parametrize(
    ("data", "base", "place"),
    [
        ("{listen: 127.0.0.1:8000}", "'http://gate.internal'", "3:8: gate.completion_base_url"),
        ("{listen: 10.0.0.5:80, allowed_hosts: [a.b]}", "null", "3:67: gate.routes[1].completion"),
    ],
)
def test_the_host_of_reports_must_be_one_to_which_the_listener_answers(
    tmp_path: Path, data: str, base: str, place: str
) -> None:
    text = f"data: {data}\n" + REPORTING.replace("{routes", f"{{completion_base_url: {base}, routes")
    host = "10.0.0.5" if base == "null" else "gate.internal"
    assert faults(tmp_path, text) == [
        f"c.yaml:{place}: lets the backend report to {host}, which data.allowed_hosts lacks; add it there"
    ]


@pytest.mark.parametrize("status", [399, 600, 204])
def test_only_statuses_of_errors_can_say_that_nothing_was_executed(tmp_path: Path, status: int) -> None:
    text = f"gate: {{routes: [{{path: /a, not_executed_on: [404, {status}]}}]}}\n"
    (fault,) = faults(tmp_path, text)
    assert fault == "c.yaml:2:51: gate.routes[0].not_executed_on[1]: must be from 400 to 599"


def test_settings_dump_as_the_text_of_the_file() -> None:
    settings = default(
        "http://127.0.0.1:9000", data={"listen": "[::1]:8000"}, ops={"listen": "unix:/run/ops.sock"}
    )
    assert settings.gate.routes[0].sources == DEFAULT_SOURCES
    dumped = json.loads(settings.model_dump_json())
    off = dict.fromkeys(("certificate_file", "key_file", "client_ca_file", "client_certificate"))
    assert dumped["data"] == {"listen": "[::1]:8000", "allowed_hosts": None, "tls": off}
    assert dumped["ops"]["listen"] == "unix:/run/ops.sock"
    assert dumped["gate"]["routes"] == [
        {
            "name": None,
            "path": "**/recovery/execute",
            "methods": ["POST"],
            "other_methods": "refuse",
            "body": ["json"],
            "content_types": [],
            "mode": "enforce",
            "scope_id": "/scope_id",
            "incident_id": "/incident_id",
            "action": "/action",
            "parameters": "/parameters",
            "target_agents": ["/target_agents", "/parameters/target_agents"],
            "cost": "header:x-recovery-cost-usd",
            "not_executed_on": [],
            "completion": "answer",
            "completion_timeout_seconds": 3600,
        }
    ]


def test_the_shipped_file_holds_every_key_with_its_default() -> None:
    document = parse(SHIPPED.read_bytes(), "scopegate.yaml")
    names = {dotted(path) for path in document.marks}
    assert names >= {*KEYS, *(f"gate.routes[0].{key.name}" for key in keys_in(Route))}
    loaded = load(SHIPPED, environment={})
    assert (loaded.warnings, loaded.shadowed) == ((), ())
    # File names are relative to the file, so the defaults are those beside it.
    assert loaded.settings == default(
        "http://127.0.0.1:9000",
        store={"url": f"sqlite:///{SHIPPED.parent}/var/scopegate.db"},
        policies=SHIPPED.parent.parent / "policies",
    )
