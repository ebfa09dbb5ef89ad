"""The schema of the configuration against the loader: what the loader accepts no editor marks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.files.faults import ConfigurationError
from sidecar.files.yamlfile import parse
from sidecar.settings.credentials import CredentialSection
from sidecar.settings.keys import keys
from sidecar.settings.presets import NAMES
from sidecar.settings.reading import load
from sidecar.settings.routes import Route
from sidecar.settings.schema import schema_of
from sidecar.settings.sections import Settings
from tests.described import STRANGE

ROOT = Path(__file__).parents[2]
SCHEMA = schema_of(Settings, title="Scopegate configuration", description="A test's.")
VALIDATOR = jsonschema_rs.Draft202012Validator(SCHEMA)
SHIPPED = sorted(
    file
    for pattern in ("*.yaml", "cookbook/*/scopegate.yaml", "deploy/**/config/*.yaml")
    for file in (ROOT / "config").glob(pattern)
)

KEYS = {key.name: key for key in keys(Settings)}
CREDENTIAL_KEYS = [f"upstream.credentials[0].{key.name}" for key in keys(CredentialSection)]
ROUTE_KEYS = {f"gate.routes[0].{key.name}": key for key in keys(Route)}
SECTIONS = [name for name, key in KEYS.items() if key.section]
LEAVES = [key for key in [*KEYS, *ROUTE_KEYS] if key not in SECTIONS]

LISTS = [
    "data.allowed_hosts",
    "admin.allowed_hosts",
    "auth.required_on",
    "auth.jwt.algorithms",
    "auth.proxy.trusted",
    "gate.presets",
    "gate.routes",
    "gate.routes[0].not_executed_on",
    "gate.unlisted.except",
    "log.mask",
    "upstream.credentials",
]

# Values that the loader takes for a key. Some take them only together with another key.
ADDRESSES = ["127.0.0.1:0", "localhost:7", "[::1]:65535", "unix:/run/x.sock", "unix:x y", "unix:///x"]
TOKEN = str(ROOT / "tests/unit/backend-token.txt")
FILES = [None, "x.pem", "/etc/x/y.pem", "../ü.pem"]
GOOD: dict[str, list[Any]] = {
    "data.listen": [*ADDRESSES, "0.0.0.0:1", "[::]:2", "some_host.example:3"],
    "admin.listen": [*ADDRESSES, "127.9.9.9:1", "[0:0:0:0:0:0:0:1]:2", "0.0.0.0:3", "a.b:4"],
    "ops.listen": [*ADDRESSES, "0.0.0.0:4"],
    "data.allowed_hosts": [None, [], ["a.b", "A_b~c-d.", "10.0.0.1"], ["[2001:db8::1]"]],
    "admin.allowed_hosts": [[], ["a.b"], ["[::1]", "localhost"]],
    **{
        f"{name}.tls.{key}": FILES
        for name in ("data", "admin", "ops")
        for key in ("certificate_file", "key_file", "client_ca_file")
    },
    **{f"{name}.tls.client_certificate": [None, "required", "optional"] for name in ("data", "admin", "ops")},
    "upstream.credentials": [
        [],
        [{"header": "X-Key", "value_file": TOKEN}, {"header": "Y", "value_file": TOKEN, "on": ["pass"]}],
    ],
    "upstream.url": ["http://h", "HTTPS://[::1]:9000/", "https://a.b:1", "http://a_b/", "unix:/x", "UNIX:x"],
    "upstream.connect_timeout_seconds": [0.001, 1, 86_400, "1s", "1440m", "24h", "1d"],
    "upstream.response_timeout_seconds": [0.001, 2.5, 86_400],
    "upstream.reuse_idle_seconds": [0, 0.5, 86_400],
    "upstream.max_connections": [1, 1_000_000],
    **{f"upstream.tls.{key}": FILES for key in ("ca_file", "certificate_file", "key_file")},
    "upstream.tls.server_name": [None, "a.b", "[::1]", "10.0.0.1"],
    "store.url": ["memory://", "sqlite:///x", "sqlite:////a b/ü.db", "sqlite:///../x:y@z"],
    "store.deadline_seconds": [0.001, 2, 86_400],
    "clock.settle_seconds": [0.001, 300, 86_400],
    "gate.presets": [[], ["awx"], list(NAMES)],
    "gate.routes": [
        [{"path": "/a"}],
        [{"path": "/a"}, {"path": "**/b/{c}/d", "mode": "shadow", "action": "path:c"}],
    ],
    "gate.unlisted.reads": ["pass", "record", "refuse"],
    "gate.unlisted.writes": ["pass", "record", "refuse"],
    "gate.unlisted.except": [[], ["/healthz"], ["/openapi.json", "/openapi", "**/static/{file}/x"]],
    "gate.max_body_bytes": [1, 1 << 30],
    "gate.max_answer_bytes": [1, 1 << 30],
    "gate.head_timeout_seconds": [0.001, 86_400],
    "gate.body_timeout_seconds": [0.001, 86_400],
    "gate.max_in_flight": [1, 1_000_000],
    "gate.annotate_response": [True, False],
    "gate.routes[0].name": [None, "restart-service", "awx.launch_2", "x" * 64],
    "gate.tenant_header": [None, "X-Tenant", "`|~!#$%&'*+.^_"],
    "gate.idempotency_ttl": [1, 86_400, 366 * 86_400],
    "gate.scope_required_from": ["low", "medium", "high", "critical"],
    "gate.completion_base_url": [
        None,
        "http://127.0.0.1:8000",
        "HTTPS://localhost",
        "http://[::1]:8/gate/a%20b/",
    ],
    "scopes.serve_on": ["data", "admin"],
    "scopes.defaults.max_attempts": [1, 10],
    "scopes.defaults.ttl_seconds": [1, 3600],
    "scopes.defaults.max_cost_usd": [0, 0.000001, 99.999999, 100],
    "scopes.limits.max_attempts": [1, 1_000_000],
    "scopes.limits.ttl_seconds": [300, 366 * 86_400, "366d", "5m"],
    "scopes.limits.max_cost_usd": [0.5, 0.500001, 1_000_000_000],
    "log.signing_key_file": FILES,
    "log.checkpoint_file": FILES,
    "log.mask": [[], ["/decision_reason"], ["/details/a", "/decision_inputs/parameters/a~1b~0/0"]],
    "log.mask_key_file": FILES,
    "telemetry.access_log": ["all", "gated", "none"],
    "telemetry.otlp_endpoint": [None, "http://127.0.0.1:4318/v1/traces", "HTTPS://a", "http://a/@?b=@c#d"],
    "care.min_confidence": [0, 0.5, 1],
    "shutdown.drain_seconds": [0, 25, 86_400],
    "policies": ["x", "/a b/c/", ".."],
    "auth.required": [True, False],
    "auth.required_on": [["gated"], ["scopes"], ["gated", "scopes", "pass"]],
    "auth.tokens.file": FILES,
    "auth.jwt.issuer": [None, "https://issuer.example"],
    "auth.jwt.audience": [None, "scopegate"],
    "auth.jwt.jwks": [None, "https://issuer.example/jwks", "jwks.json"],
    "auth.jwt.ca_file": FILES,
    "auth.jwt.algorithms": [["RS256"], ["ES256", "EdDSA"]],
    "auth.jwt.leeway_seconds": [0, 60, 300],
    **{f"auth.jwt.claims.{key}": ["x"] for key in ("id", "groups", "kind", "tenant")},
    "auth.mtls.id": [None, "uri", "dns", "common_name"],
    "auth.proxy.header": [None, "X-User"],
    "auth.proxy.groups_header": [None, "X-Groups"],
    "auth.proxy.trusted": [[], ["10.1.2.3"], ["10.1.0.0/16", "unix"]],
    "auth.principals": FILES,
    **{f"auth.{method}.id_prefix": [None, "x:"] for method in ("tokens", "jwt", "mtls", "proxy")},
    "gate.routes[0].path": [
        *("/a", "**/a", "/a/{b}/c", "/A!\"$&'()+,-.:<=>@[]^_`|~z", "/", "/a/", "**/a/", "/a/{b}", "/a/{b}:c"),
        *("/a/{b...}", ["/a"], ["/a", "/a/"], ["/a", "/a/{b...}"]),
    ],
    "gate.routes[0].methods": ["POST", ["GET"], ["POST", "DELETE"]],
    "gate.routes[0].other_methods": ["refuse", "pass"],
    "gate.routes[0].body": ["json", ["json"], ["any", "json", "empty"], ["form", "json"]],
    "gate.routes[0].content_types": [[], "application/merge-patch+json", ["application/x-amz-json-1.1"]],
    "gate.routes[0].mode": ["enforce", "shadow"],
    "gate.routes[0].scope_id": ["/a/b~0~1", "header:X-A", "query:a=b", "path:id"],
    "gate.routes[0].incident_id": ["/a", "header:x", "query:ü", "path:id"],
    "gate.routes[0].action": [
        "/a b",
        "header:X",
        "query:a/b",
        "path:id",
        "const:a b",
        "path:id:header:X",
        "path:*",
    ],
    "gate.routes[0].parameters": ["/a", "/a/0/b", None],
    "gate.routes[0].target_agents": ["/a", [], "path:id/query:b", ["/a", "query:b", "header:C", "path:id"]],
    "gate.routes[0].cost": ["/a", "header:X-Cost"],
    "gate.routes[0].not_executed_on": [[], [400], [404, 409, 599]],
    "gate.routes[0].completion": ["answer", "report"],
    "gate.routes[0].completion_timeout_seconds": [1, 3600, 366 * 86_400],
}
# Keys of `auth` that the loader takes only together with another one, or with a method.
NOT_ALONE = {
    *("auth.required", "auth.principals"),
    *("auth.jwt.issuer", "auth.jwt.audience", "auth.jwt.jwks", "auth.jwt.ca_file", "auth.mtls.id"),
    *("auth.proxy.header", "auth.proxy.groups_header", "auth.proxy.trusted"),
}
# Values that are wrong for every key of a kind; the sections and the file refuse them, too.
NO_TEXT: list[Any] = [5, True, 0.5, {}, [["/a"]], ""]
NO_NUMBER: list[Any] = [None, True, "5", [5], {}]
NO_DURATION: list[Any] = ["5 s", "1.5h", "1h30m", "5M", "1w", "05s", "-5s", "s", ""]
SPELLINGS: dict[str, list[Any]] = {
    "data.listen": ["localhost", ":8000", "::1:8000", "a b:1", "127.0.0.1:123456", "unix:", "unix:/x/"],
    "admin.listen": ["localhost", ":9901", "127.0.0.1", "127.0.0.1:123456", "unix:"],
    "data.allowed_hosts": ["a.b", [None], ["a.b:80"], ["http://a.b"], ["*"], [""], [5], {}, True],
    "admin.allowed_hosts": ["a.b", None, ["a b"], ["[::1]:80"], ["*.a.b"], ["u@a.b"], ["::1"], ["a/b"]],
    "upstream.url": ["ftp://h", "h:9000", "http://u:p@h", "http://h/base", "http://h?q", "http://", "unix:"],
    "upstream.tls.server_name": ["a.b:443", "a b"],
    "store.url": ["x.db", "sqlite://x", "sqlite:///", "sqlite:///x/", "sqlite:///x?mode=ro", "mysql://h/x"],
    "gate.unlisted.reads": ["allow", None],
    "gate.unlisted.writes": ["deny", None],
    "gate.unlisted.except": ["/a", None, [None], ["a"], ["/a b"], [5]],
    "gate.routes[0].name": ["", "a b", "**/x", "x" * 65],
    "gate.tenant_header": ["X Tenant", "X:"],
    "gate.idempotency_ttl": [0, 366 * 86_400 + 1, 1.5, None],
    "gate.scope_required_from": ["dreadful", "LOW", None],
    "gate.completion_base_url": [
        "h:8000",
        "ftp://h",
        "http://",
        "http://u@h",
        "http://h?q",
        "unix:/x",
        "http://h/ä",
    ],
    "scopes.serve_on": ["both", None],
    "scopes.defaults.max_cost_usd": [-0.01, 1_000_000_001],
    "scopes.limits.max_cost_usd": [-0.01, 1_000_000_001],
    "log.mask": ["/details/a", None, ["details/a"], ["/details"], ["/tenant_id"], ["/details/"]],
    "telemetry.access_log": ["some", None],
    "telemetry.otlp_endpoint": ["localhost:4317", "grpc://a", "http://u:p@a", "http://"],
    "gate.presets": ["awx", None, ["AWX"], ["none"], [None], [5]],
    "gate.routes": [{}, None, "/a", [5], [{}], [{"mode": "enforce"}], [{"path": "/a", "paht": "/b"}]],
    "gate.routes[0].path": ["a", "*/x", "/a//", "/a//b", [], ["a"], [5], "/a b", "/a?b", "/a*", "/ü", None],
    "gate.routes[0].methods": [[], "post", ["OPTIONS"], ["POST", None], None],
    "gate.routes[0].other_methods": ["deny", None],
    "gate.routes[0].body": ["yaml", [], None, ["json", "xml"], "JSON"],
    "gate.routes[0].content_types": ["json", ["application/json; charset=utf-8"], None, ["a/"], ["a/b/c"]],
    "gate.routes[0].mode": ["audit", None],
    "gate.routes[0].scope_id": ["scope", "/", "/a/", "/~2", "cookie:a", "header:a/b", "query:", None],
    "gate.routes[0].parameters": ["header:P", "query:p", "parameters"],
    "gate.routes[0].target_agents": [["path:"], [5], "a", ["a"], [None], None],
    "gate.routes[0].cost": ["query:c", "cost"],
    "gate.routes[0].not_executed_on": [[399], [600], ["404"], [404.5], [None], 404],
    "gate.routes[0].completion": ["later", None],
}


Accepts = Callable[..., bool]


@pytest.fixture(scope="module")
def accepts(tmp_path_factory: pytest.TempPathFactory) -> Accepts:
    """Whether the loader takes a file that holds this; JSON is YAML."""
    file = tmp_path_factory.mktemp("configured") / "scopegate.yaml"

    def accept(tree: Any, environment: Mapping[str, str] | None = None) -> bool:
        file.write_text(json.dumps(tree), encoding="utf-8")
        # The backend is given by the environment, so that a file without it can be right.
        backend = {"SCOPEGATE_UPSTREAM__URL": "http://127.0.0.1:9000"}
        upstream = tree.get("upstream")
        given = {} if isinstance(upstream, dict) and "url" in upstream else backend
        try:
            load(file, environment={**given, **(environment or {})}, read_keys=False)
        except ConfigurationError:
            return False
        return True

    return accept


def grown(values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that holds values by their dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        at = tree
        for step in above:
            if step.endswith("[0]"):
                at = at.setdefault(step[:-3], [{"path": "/{id}/run"}])[0]
            else:
                at = at.setdefault(step, {})
        at[last] = value
    return tree


def of_the_schema(key: str) -> dict[str, Any]:
    at: dict[str, Any] = SCHEMA
    for step in key.split("."):
        name, _, item = step.partition("[")
        at = at["properties"][name]
        at = at["items"] if item else at
    return at


def keys_of_the_schema(at: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, below in at["properties"].items():
        yield above + name, below
        items = below.get("items", {})
        if "properties" in below or "properties" in items:
            inner = (below, ".") if "properties" in below else (items, "[0].")
            yield from keys_of_the_schema(inner[0], above + name + inner[1])


def rules_of(key: str) -> dict[str, Any]:
    """What is checked of a value that is no variable."""
    found = of_the_schema(key)
    rules: dict[str, Any] = found["anyOf"][0] if "anyOf" in found else found
    return rules


# What it says -------------------------------------------------------------------------------------------


def test_it_is_a_schema_of_the_dialect_that_it_names() -> None:
    jsonschema_rs.meta.validate(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["title"]
    assert SCHEMA["$id"]


def test_it_has_every_key_and_no_other_in_the_order_of_the_file() -> None:
    in_order = [*KEYS]
    for list_of_sections, its_keys in (
        ("gate.routes", ROUTE_KEYS),
        ("upstream.credentials", CREDENTIAL_KEYS),
    ):
        at = in_order.index(list_of_sections) + 1
        in_order[at:at] = its_keys
    assert [key for key, _ in keys_of_the_schema(SCHEMA)] == in_order


def test_every_key_and_section_is_described_on_one_line() -> None:
    said = {key: below.get("description", "") for key, below in keys_of_the_schema(SCHEMA)}
    assert [key for key, words in said.items() if len(words) < 15 or not words.isprintable()] == []


def test_no_key_is_required_but_those_of_a_route_and_of_a_credential() -> None:
    required = {
        key: below["items"].get("required") for key, below in keys_of_the_schema(SCHEMA) if "items" in below
    }
    lists = {
        "admin.allowed_hosts": None,
        "auth.required_on": None,
        "auth.jwt.algorithms": None,
        "auth.proxy.trusted": None,
        "gate.presets": None,
        "gate.routes[0].not_executed_on": None,
        "gate.unlisted.except": None,
        "log.mask": None,
    }
    assert required == {
        "gate.routes": ["path"],
        "upstream.credentials": ["header", "value_file"],
        "upstream.credentials[0].on": None,
        **lists,
    }
    # Beside that list, `auth.required` is a key of this name.
    assert "required" in SCHEMA["properties"]["auth"]["properties"]
    assert json.dumps(SCHEMA).count('"required":') == 3


def test_the_defaults_are_those_of_the_loader(tmp_path: Path) -> None:
    defaults = {key: of_the_schema(key)["default"] for key in LEAVES if "default" in of_the_schema(key)}
    assert {*LEAVES} - {*defaults} == {"upstream.url", "gate.routes[0].path"}
    of_a_route = {key: value for key, value in defaults.items() if key in ROUTE_KEYS}
    whole = {key: value for key, value in defaults.items() if key not in ROUTE_KEYS}
    file = tmp_path / "scopegate.yaml"
    loaded = []
    for values in ({}, whole, {**of_a_route, "gate.routes[0].path": defaults["gate.routes"][0]["path"]}):
        file.write_text(json.dumps(grown({**values, "upstream.url": "http://h"})), encoding="utf-8")
        loaded.append(load(file, environment={}).settings)
    assert loaded[0] == loaded[1] == loaded[2]


# What it accepts ----------------------------------------------------------------------------------------


def test_the_shipped_files_are_among_those_that_are_tried() -> None:
    names = {str(file.relative_to(ROOT / "config")) for file in SHIPPED}
    assert {"scopegate.yaml", "container.yaml", "cookbook/fastapi/scopegate.yaml"} <= names


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_that_ships_is_accepted(file: Path) -> None:
    VALIDATOR.validate(parse(file.read_bytes(), str(file)).value)


def test_values_are_tried_for_every_key() -> None:
    assert GOOD.keys() == {*LEAVES}
    assert {*SPELLINGS} <= {*LEAVES}


@pytest.mark.parametrize("key", LEAVES)
def test_what_the_loader_takes_for_a_key_is_accepted(accepts: Accepts, key: str) -> None:
    taken = 0
    for value in GOOD[key]:
        VALIDATOR.validate(grown({key: value}))
        taken += accepts(grown({key: value}))
    assert taken


@pytest.mark.parametrize("key", [key for key in LEAVES if key not in LISTS])
def test_every_scalar_may_be_a_variable(accepts: Accepts, key: str) -> None:
    scalars = [value for value in GOOD[key] if isinstance(value, str | int | float)]
    text = next(value if isinstance(value, str) else json.dumps(value) for value in scalars)
    for written in ("${VALUE}", "${OTHER:" + text.replace("}", "") + "}", text[:3] + "${REST}"):
        tree = grown({key: written})
        VALIDATOR.validate(tree)
    # Quoted, as JSON has it, a variable is text; numbers and truth values come from plain ones.
    if (
        isinstance(scalars[0], str)
        and "tls" not in key
        and not key.startswith("log.")
        and key not in NOT_ALONE
    ):
        assert accepts(grown({key: "${VALUE}"}), {"VALUE": text})


# A variable can be null, so it may stand where a list need not.
@pytest.mark.parametrize("key", [*(key for key in LISTS if None not in GOOD[key]), "gate.routes[0]"])
def test_a_list_and_its_maps_are_no_variables(accepts: Accepts, key: str) -> None:
    tree = {"gate": {"routes": ["${A}"]}} if key.endswith("]") else grown({key: "${A}"})
    assert not accepts(tree, {"A": "[/details/a]"})
    assert not VALIDATOR.is_valid(tree)


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_may_be_left_empty(accepts: Accepts, key: str) -> None:
    for tree in (grown({key: None}), grown({key: {}})):
        assert accepts(tree)
        VALIDATOR.validate(tree)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """A few keys at a time, with values that are mostly right."""
    keys = draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=5, unique=True))
    strange = draw(st.sampled_from([0, 0, 1]))
    values = {
        key: draw(st.sampled_from([*GOOD[key], *(STRANGE if number < strange else ())]))
        for number, key in enumerate(keys)
        # A list as a whole, and a key of an item of it: only one of them can be given.
        if key != "gate.routes" or not any(other in ROUTE_KEYS for other in keys)
    }
    return grown(values)


@given(tree=configurations())
def test_what_the_loader_accepts_the_schema_accepts(accepts: Accepts, tree: dict[str, Any]) -> None:
    if accepts(tree):
        VALIDATOR.validate(tree)


# What it refuses ----------------------------------------------------------------------------------------


def bad(key: str) -> list[Any]:
    """Values that are wrong for a key: of another type, out of bounds, none of a few words, misspelled."""
    rules = rules_of(key)
    kinds = rules.get("type", "string")
    values = list(SPELLINGS.get(key, ()))
    if kinds in (["number", "string"], ["integer", "string"]):  # seconds, or a duration
        values += NO_DURATION
        kinds = kinds[0]
    if kinds in ("integer", "number"):
        low = rules["exclusiveMinimum"] if "exclusiveMinimum" in rules else rules["minimum"] - 1
        values += [*NO_NUMBER, low, rules["maximum"] + 1]
        values += [0.5] if kinds == "integer" else []
    elif kinds == "boolean":
        values += [*NO_NUMBER[:1], 1, "true", [True], {}]
    elif kinds == "array":
        values += [5, True, "/a", {}, *([] if None in GOOD[key] else [None])]
    else:
        values += NO_TEXT
        values += [] if "null" in kinds or None in GOOD[key] else [None]
    return values


@pytest.mark.parametrize("key", LEAVES)
def test_a_value_that_is_wrong_for_its_key_is_refused_by_both(accepts: Accepts, key: str) -> None:
    trees = [grown({key: value}) for value in bad(key)]
    assert len(trees) > 4
    assert [tree for tree in trees if accepts(tree)] == []
    assert [tree for tree in trees if VALIDATOR.is_valid(tree)] == []


@pytest.mark.parametrize("key", ["", *SECTIONS, "gate.routes[0]"])
def test_an_unknown_key_is_refused_by_both(accepts: Accepts, key: str) -> None:
    tree = grown({f"{key}.max_inflight".lstrip("."): 5})
    assert not accepts(tree)
    assert not VALIDATOR.is_valid(tree)


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize("value", [5, "text", True, []], ids=str)
def test_a_section_that_is_no_map_is_refused_by_both(accepts: Accepts, key: str, value: Any) -> None:
    assert not accepts(grown({key: value}))
    assert not VALIDATOR.is_valid(grown({key: value}))
