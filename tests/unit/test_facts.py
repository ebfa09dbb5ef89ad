"""What a request claims: exact types, one place, one spelling."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.core.facts import (
    DEFAULT_SOURCES,
    MAX_TARGET_AGENTS,
    Claims,
    FactSources,
    Request,
    Source,
    is_identifier,
    read,
)
from sidecar.errors import Refusal

FACTS = ("scope_id", "incident_id", "action")
identifiers = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=256)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def claims_of(**members: Any) -> Claims:
    found = read(Request(document=members), DEFAULT_SOURCES)
    assert isinstance(found, Claims), found
    return found


def refusal_of(**members: Any) -> Refusal:
    found = read(Request(document=members), DEFAULT_SOURCES)
    assert isinstance(found, Refusal), found
    assert found.code == "invalid_request"
    return found


@given(st.text(max_size=300))
def test_an_identifier_is_1_to_256_printable_characters(text: str) -> None:
    controls = any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for each in text)
    odd_spaces = any(unicodedata.category(each) == "Zs" and each != " " for each in text)
    assert is_identifier(text) == (0 < len(text) <= 256 and not controls and not odd_spaces)


@given(st.sampled_from(FACTS), identifiers)
def test_an_identifier_is_read_as_it_stands(name: str, value: str) -> None:
    assert getattr(claims_of(**{name: value}), name) == value


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("value", [None, ""])
def test_null_and_the_empty_string_are_absent(name: str, value: object) -> None:
    assert getattr(claims_of(**{name: value}), name) is None


@given(st.dictionaries(st.sampled_from([*FACTS, "parameters", "target_agents"]), anything))
def test_whatever_stands_there_is_a_claim_of_exact_type_or_refused(document: dict[str, Any]) -> None:
    found = read(Request(document=document), DEFAULT_SOURCES)
    if isinstance(found, Refusal):
        assert found.code == "invalid_request"
        assert found.members["member"].startswith("/")
        return
    for name in FACTS:
        value = document.get(name)
        assert getattr(found, name) == (value if value else None)
        assert value in (None, "") or is_identifier(value)
    assert isinstance(found.parameters, dict)
    assert all(is_identifier(agent) for agent in found.target_agents)


SPELLINGS = st.sampled_from([str.upper, str.title, str.swapcase, str.capitalize])


@given(st.sampled_from([*FACTS, "parameters", "target_agents"]), SPELLINGS)
def test_a_key_that_equals_a_judged_one_but_for_case_is_refused(name: str, spell: Any) -> None:
    refusal_of(**{spell(name): "x"})
    refusal_of(**{spell(name): "x", name: {} if name == "parameters" else []})


@pytest.mark.parametrize(
    "key",
    ["\uff41ction", "\u017fcope_id", "inc\u0131dent_id", "\u0130ncident_id", "ACTI\u00d3N"[:4] + "ON"],
)
def test_compatibility_forms_are_case_twins_too(key: str) -> None:
    refusal_of(**{key: "x"})


CLEANED = [
    "action\0x",
    "act\u0001ion",
    " action",
    "action\t",
    "action\r\n",
    "\ufeffaction",
    "acti\u200bon",
    "acti\u00adon",
    "acti\ufe0fon",
    "act\u034fion",
    "action\u00a0",
    "\u3000action",
    "action\x7f",
    "action\u0085",
    " \u200bAct\u0001\uff49on\u2060 \0\u0001x",
    "\u200b action \u200b",
    "\0\u0001action",
    "\0action\0x",
    "\0 act\u0001ion\u001f\0tail",
    "action\u2028",
]


@pytest.mark.parametrize("key", CLEANED)
def test_a_key_that_becomes_a_judged_one_when_it_is_cleaned_or_cut_is_refused(key: str) -> None:
    for document in ({key: "failover", "action": "retry_agent"}, {key: "failover"}):
        found = read(Request(document=document), DEFAULT_SOURCES)
        assert isinstance(found, Refusal), key
        assert found.members == {"member": f"/{key}"}


@pytest.mark.parametrize(
    "key",
    ["x\0action", "ac tion", "action x", "actions", "acti\u00f3n", "a.action", "", "\0", " "],
)
def test_a_key_that_stays_another_one_is_left_alone(key: str) -> None:
    assert claims_of(**{key: "x", "action": "retry_agent"}).action == "retry_agent"


@pytest.mark.parametrize("name", ["i\u0001d", "id\0x", "i\u200bd", " id", "id\u00ad[x]", "ID\0"])
def test_a_query_name_that_becomes_a_judged_one_when_it_is_cleaned_is_refused(name: str) -> None:
    sources = FactSources(incident_id=Source.parse("query:id"))
    found = read(Request(document={}, query=[(name, "inc-2"), ("id", "inc-1")]), sources)
    assert isinstance(found, Refusal)


def test_a_member_that_javascript_takes_for_an_objects_prototype_is_refused() -> None:
    refusal_of(__proto__={"parameters": {}}, action="retry_agent")
    refusal_of(parameters={"__proto__": {"target_agents": []}})
    claims_of(other={"__proto__": 1}, constructor={}, proto=1)


def test_twins_elsewhere_are_nobodys_business() -> None:
    claims_of(parameters={"Action": 1, "SCOPE_ID": 2}, other={"Action": 1, "action": 2})
    refusal_of(parameters={"Target_Agents": []})


def test_target_agents_stand_in_two_places_that_must_agree() -> None:
    assert claims_of(target_agents=["a", "b"]).target_agents == ("a", "b")
    assert claims_of(parameters={"target_agents": ["a"]}).target_agents == ("a",)
    assert claims_of(target_agents=["a"], parameters={"target_agents": ["a"]}).target_agents == ("a",)
    assert claims_of(target_agents=None, parameters={"target_agents": ["a"]}).target_agents == ("a",)
    refusal_of(target_agents=["a"], parameters={"target_agents": ["b"]})
    refusal_of(target_agents=[], parameters={"target_agents": ["b"]})


def test_the_number_of_agents_is_bounded() -> None:
    assert len(claims_of(target_agents=["a"] * MAX_TARGET_AGENTS).target_agents) == MAX_TARGET_AGENTS
    refusal_of(target_agents=["a"] * (MAX_TARGET_AGENTS + 1))


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("/a", "pointer", "/a"),
        ("/a/b", "pointer", "/a/b"),
        ("path:x", "path", "x"),
        ("query:a b"[:7], "query", "a"),
        ("header:X-Scope", "header", "x-scope"),
        ("form:job[0]", "form", "job[0]"),
        ("const:restart a service", "const", "restart a service"),
        ("const:path:a/path:b", "const", "path:a/path:b"),
        ("path:*", "path", "*"),
        ("path:a/path:b", "joined", "path:a/path:b"),
        ("header:X-A:query:b.c+form:d_e", "joined", "header:x-a:query:b.c+form:d_e"),
        ("path:a path:b", "joined", "path:a path:b"),
    ],
)
def test_a_place_is_written_in_one_of_these_ways(text: str, kind: str, name: str) -> None:
    source = Source.parse(text)
    assert (source.kind, source.name) == (kind, name)
    assert Source.parse(str(source)) == source


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/",
            "a",
            "//",
            "/a/",
            "/a~",
            "/a~2",
            "cookie:x",
            "header:",
            "header",
            "query:a b",
            "path:\n",
            ":x",
        ),
        *("const:", "const:\n", "const:" + "x" * 257, "form:", "form:a b"),
        *("path:a/path:b/", "x/path:a/path:b", "path:a/const:x", "path:a/const:x/path:b"),
        *("const", "path:*/path:b", "path:a/path:*", "path:apath:b", "path:a/path:", "path:a\npath:b"),
        *("path:a/path:/path:b", "path:a/query:[x]"),
    ],
)
def test_any_other_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Source.parse(text)


def test_a_pointer_is_unescaped() -> None:
    sources = FactSources(scope_id=Source.parse("/a~1b/c~0d"))
    found = read(Request(document={"a/b": {"c~d": "s"}}), sources)
    assert isinstance(found, Claims)
    assert found.scope_id == "s"


def test_a_pointer_leads_through_lists_and_not_into_texts() -> None:
    sources = FactSources(scope_id=Source.parse("/a/0"))
    holder: Any
    for holder in (["x"], ["x", "y"], {"0": "x"}):
        found = read(Request(document={"a": holder}), sources)
        assert isinstance(found, Claims)
        assert found.scope_id == "x"
    for holder in ([], "x", {"1": "x"}, None, 7):
        found = read(Request(document={"a": holder}), sources)
        assert isinstance(found, Claims)
        assert found.scope_id is None


def test_facts_are_found_in_objects_of_lists_and_their_keys_are_watched_there() -> None:
    sources = FactSources(incident_id=Source.parse("/i/0/id"), parameters=Source.parse("/i/1"))
    found = read(Request(document={"i": [{"id": "inc-1"}, {"a": 1}]}), sources)
    assert isinstance(found, Claims)
    assert (found.incident_id, found.parameters) == ("inc-1", {"a": 1})
    found = read(Request(document={"i": [{"id": "inc-1", "ID": "inc-2"}]}), sources)
    assert isinstance(found, Refusal)
    assert found.members["member"] == "/i/0/ID"


def test_the_objects_on_the_way_are_watched_for_twins_too() -> None:
    sources = FactSources(scope_id=Source.parse("/Job/scope"))
    assert isinstance(read(Request(document={"job": {}}), sources), Refusal)
    assert isinstance(read(Request(document={"Job": {"SCOPE": 1}}), sources), Refusal)
    assert isinstance(read(Request(document={"Job": {"scope": "s"}, "scope": 1}), sources), Claims)


def test_path_query_and_header_hold_facts() -> None:
    sources = FactSources(
        scope_id=Source.parse("header:X-Scope"),
        incident_id=Source.parse("path:incident"),
        action=Source.parse("query:action"),
        target_agents=(Source.parse("query:agent"),),
    )
    request = Request(
        document={"scope_id": 7},
        path_params={"incident": "i"},
        query=[("action", "a"), ("agent", "g"), ("x", "y")],
        headers=[("x-scope", "s")],
    )
    assert read(request, sources) == Claims(scope_id="s", incident_id="i", action="a", target_agents=("g",))
    twice = Request(document={}, query=[("action", "a"), ("action", "a")])
    assert isinstance(read(twice, sources), Refusal)


@pytest.mark.parametrize(
    "pairs",
    [
        [("id", "a"), ("id", "b")],
        [("id", "a"), ("ID", "b")],
        [("id", "a"), ("id[]", "b")],
        [("id", "a"), ("x", "1;id=b")],
        [("id", "a;id=b")],
    ],
)
@pytest.mark.parametrize("fact", ["incident_id", "parameters", "target_agents"])
def test_a_query_that_can_be_read_twice_is_refused(pairs: list[tuple[str, str]], fact: str) -> None:
    source = Source.parse("query:id")
    sources: dict[str, Any] = {fact: (source,) if fact == "target_agents" else source}
    found = read(Request(document={}, query=pairs), FactSources(**sources))
    assert isinstance(found, Refusal)
    assert found.members == {"member": "query:id"}


@pytest.mark.parametrize("wrong", [7, [], "text", True])
def test_parameters_are_an_object(wrong: object) -> None:
    assert refusal_of(parameters=wrong).members == {"member": "/parameters"}


@pytest.mark.parametrize("absent", [None, ""])
def test_parameters_that_are_null_or_empty_are_absent(absent: object) -> None:
    assert claims_of(parameters=absent).parameters == {}


def test_a_query_names_one_target_agent() -> None:
    sources = FactSources(target_agents=(Source.parse("query:agent"),))
    found = read(Request(document={}, query=[("agent", "a-1")]), sources)
    assert isinstance(found, Claims)
    assert found.target_agents == ("a-1",)


@pytest.mark.parametrize("wrong", ["a-1", [7], [""], {"a": 1}, 7])
def test_target_agents_are_a_list_of_identifiers(wrong: object) -> None:
    assert refusal_of(target_agents=wrong).members == {"member": "/target_agents"}


def test_documents_with_the_same_keys_keep_their_own_values() -> None:
    for value in ("a", "b", "a"):
        assert claims_of(scope_id=value, parameters={"note": value}) == Claims(
            scope_id=value, parameters={"note": value}
        )


def test_a_list_of_keys_is_refused_as_often_as_it_comes_and_in_its_own_order() -> None:
    for _ in range(2):
        assert refusal_of(Action="a", __proto__={}).members == {"member": "/Action"}
        assert refusal_of(__proto__={}, Action="a").members == {"member": "/__proto__"}
        assert refusal_of(parameters={"Target_agents": []}).members == {"member": "/parameters/Target_agents"}
        # A key that is harmless in one object is a lookalike in another.
        assert refusal_of(Target_agents=[]).members == {"member": "/Target_agents"}
        assert claims_of(parameters={"Action": "a"}).parameters == {"Action": "a"}


def test_other_sources_judge_the_same_keys_by_themselves() -> None:
    elsewhere = FactSources(action=Source.parse("/Action"))
    document = {"Action": "a"}
    assert read(Request(document=document), elsewhere) == Claims(action="a")
    assert isinstance(read(Request(document=document), DEFAULT_SOURCES), Refusal)


def test_the_keys_that_many_clients_send_take_bounded_memory() -> None:
    sources = FactSources()
    for number in range(600):
        read(Request(document={f"key{number}": number}), sources)
    read(Request(document={"k" * 2000: 1}), sources)
    for _, judged in sources.watched:
        assert len(judged) <= 256
        assert all(len("".join(keys)) <= 1024 for keys in judged)


# Joined places ------------------------------------------------------------------------------------------

POD = FactSources(target_agents=(Source.parse("path:namespace/path:pod"),))


def agents_of(sources: FactSources, **parts: Any) -> tuple[str, ...] | Refusal:
    found = read(Request(**{"document": {}, **parts}), sources)
    return found if isinstance(found, Refusal) else found.target_agents


def test_a_joined_place_keeps_the_text_between_its_parts() -> None:
    assert agents_of(POD, path_params={"namespace": "shop", "pod": "cart-0"}) == ("shop/cart-0",)
    mixed = FactSources(target_agents=(Source.parse("header:X-Region:query:zone@form:host"),))
    parts = {"headers": [("x-region", "eu")], "query": [("zone", "1")], "form": [("host", "db")]}
    assert agents_of(mixed, **parts) == ("eu:1@db",)
    assert mixed.header_names == {"x-region"}


@pytest.mark.parametrize(
    "parts", [{}, {"namespace": "shop"}, {"pod": "cart-0"}, {"namespace": "", "pod": "x"}]
)
def test_a_part_that_is_absent_or_empty_makes_the_fact_absent(parts: dict[str, str]) -> None:
    assert agents_of(POD, path_params=parts) == ()


@pytest.mark.parametrize(("namespace", "pod"), [("shop/cart", "0"), ("shop", "cart/0"), ("/", "x")])
def test_a_part_that_contains_the_text_between_the_parts_is_refused(namespace: str, pod: str) -> None:
    found = agents_of(POD, path_params={"namespace": namespace, "pod": pod})
    assert isinstance(found, Refusal)
    assert found.members["member"] in ("path:namespace", "path:pod")


@given(*[st.text("ab/:", max_size=4)] * 4, st.sampled_from(["/", "//", ":/", "/:/", "/a/", ":a"]))
def test_two_pairs_of_parts_never_make_the_same_fact(
    one: str, two: str, three: str, four: str, literal: str
) -> None:
    place = Source("joined", "", parts=POD.target_agents[0].parts, literals=(literal,))
    sources = FactSources(target_agents=(place,))
    first = agents_of(sources, path_params={"namespace": one, "pod": two})
    second = agents_of(sources, path_params={"namespace": three, "pod": four})
    if isinstance(first, tuple) and first == second and first != ():
        assert (one, two) == (three, four)


def test_a_joined_fact_that_can_be_divided_in_two_ways_is_refused() -> None:
    sources = FactSources(target_agents=(Source.parse("path:namespace//path:pod"),))
    found = agents_of(sources, path_params={"namespace": "x/", "pod": "y"})
    assert isinstance(found, Refusal)
    assert "in more than one way" in found.message
    assert agents_of(sources, path_params={"namespace": "x", "pod": "/y"}) == ("x///y",)


def test_a_joined_fact_is_an_identifier_as_a_whole() -> None:
    assert agents_of(POD, path_params={"namespace": "a" * 127, "pod": "b" * 128}) == (
        "a" * 127 + "/" + "b" * 128,
    )
    assert isinstance(agents_of(POD, path_params={"namespace": "a" * 128, "pod": "b" * 128}), Refusal)


# Constants and the whole path ---------------------------------------------------------------------------


def test_a_constant_is_the_same_in_every_request() -> None:
    sources = FactSources(action=Source.parse("const:restart"), target_agents=(Source.parse("const:all"),))
    found = read(Request(document={"action": "other"}), sources)
    assert found == Claims(action="restart", target_agents=("all",))


WHOLE = FactSources(target_agents=(Source.parse("path:*"),))


@pytest.mark.parametrize(
    ("path", "agent"),
    [
        ("/job/shop/build", "/job/shop/build"),
        ("/job/%73hop/build", "/job/shop/build"),
        ("/job/a%20b/build", "/job/a b/build"),
        ("/job/%C3%BC/build", "/job/\u00fc/build"),
    ],
)
def test_the_whole_path_is_read_as_a_backend_decodes_it(path: str, agent: str) -> None:
    assert agents_of(WHOLE, path=path) == (agent,)


@pytest.mark.parametrize(
    "path", ["/job/a;b/build", "/job/%ff/build", "/job/%2573/build", "/job/%0a/x", "/" * 257]
)
def test_a_whole_path_that_reads_in_two_ways_or_is_no_identifier_is_refused(path: str) -> None:
    found = agents_of(WHOLE, path=path)
    assert isinstance(found, Refusal)
    assert found.members == {"member": "path:*"}


# Forms --------------------------------------------------------------------------------------------------

DO = FactSources(action=Source.parse("form:do"))


def action_of(form: list[tuple[str, str]] | None, query: Sequence[tuple[str, str]] = ()) -> Any:
    found = read(Request(document={}, form=form, query=query), DO)
    return found.members["member"] if isinstance(found, Refusal) else found.action


def test_a_form_holds_facts() -> None:
    assert action_of([("do", "restart"), ("note", "x")]) == "restart"
    assert action_of([("note", "x")]) is None
    assert action_of([]) is None
    assert action_of(None) is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "do",
            "DO",
            "Do",
            " do",
            "do ",
            "do[]",
            "do[x]",
            "do.x",
            "do[",
            "do\0",
            "do\0x",
            "d\u200bo",
            "\uff44o",
        ),
        *("x;do", "x;do[a]", ";do", "do;x"),
    ],
)
def test_another_name_that_could_be_read_as_the_fact_is_refused(name: str) -> None:
    for pairs in ([("do", "restart"), (name, "x")], [(name, "x"), ("do", "restart")]):
        assert action_of(pairs) == "form:do", name
    assert action_of([("do", "restart")], [(name, "x")]) == "form:do", name
    assert action_of([("note", "x")], [(name, "x")]) == "form:do", name
    if name != "do":
        assert action_of([(name, "x")]) == "form:do", name


@pytest.mark.parametrize("value", ["a;do=b", ";do", "a;x=1; do=b"])
def test_a_value_behind_whose_semicolon_the_fact_stands_is_refused(value: str) -> None:
    assert action_of([("do", "restart"), ("x", value)]) == "form:do"
    assert action_of([("do", "restart"), ("x", "1;done=1")]) == "restart"


def test_a_fact_of_the_query_is_refused_where_the_form_has_it_too() -> None:
    sources = FactSources(action=Source.parse("query:do"))
    request = Request(document={}, form=[("Do", "x")], query=[("do", "restart")])
    assert isinstance(read(request, sources), Refusal)
    request = Request(document={}, form=[("done", "x")], query=[("do", "restart")])
    assert read(request, sources) == Claims(action="restart")


def test_target_agents_may_stand_in_the_query_or_in_a_form_and_must_agree_in_both() -> None:
    sources = FactSources(target_agents=(Source.parse("query:job"), Source.parse("form:job")))
    for query, form in ([("job", "a")], []), ([], [("job", "a")]), ([("job", "a")], [("job", "a")]):
        assert agents_of(sources, query=query, form=form) == ("a",)
    for query, form in (
        ([("job", "a")], [("job", "b")]),
        ([("job", "a")], [("Job", "b")]),
        ([("job[]", "a")], [("job", "a")]),
    ):
        assert isinstance(agents_of(sources, query=query, form=form), Refusal)


@pytest.mark.parametrize("kind", ["query", "form"])
def test_a_fact_of_the_query_or_a_form_may_not_be_a_member_of_a_document(kind: str) -> None:
    sources = FactSources(action=Source.parse(f"{kind}:do"))
    for key in ("do", "Do", " do"):
        found = read(Request(document={key: "failover"}), sources)
        assert isinstance(found, Refusal)
        assert found.members == {"member": f"/{key}"}
    assert isinstance(read(Request(document={"parameters": {"do": 1}, "done": 1}), sources), Claims)
    agents = FactSources(target_agents=(Source.parse("/unit"), Source.parse(f"{kind}:unit")))
    assert agents_of(agents, document={"unit": ["a"]}) == ("a",)
    assert isinstance(agents_of(agents, document={"Unit": ["a"]}), Refusal)


def test_a_name_with_underscores_has_lookalikes_in_every_order_of_readings() -> None:
    sources = FactSources(action=Source.parse("form:job_name"))
    for twin in ("job.name", "job[name", "job name]", "job.name[x]", "job\u2024name.x", "job\u2024name[0].y"):
        pairs = [("job_name", "a"), (twin, "b")]
        assert isinstance(read(Request(document={}, form=pairs), sources), Refusal), twin


@pytest.mark.parametrize("twin", ["job_name", "job[name]", "job name", "JOB.NAME", "job[name"])
def test_a_dotted_name_has_lookalikes_of_its_own(twin: str) -> None:
    sources = FactSources(action=Source.parse("form:job.name"))
    pairs = [("job.name", "a"), (twin, "b")]
    assert isinstance(read(Request(document={}, form=pairs), sources), Refusal), twin
    pairs = [("job.name", "a"), ("job", "b"), ("name", "c")]
    assert read(Request(document={}, form=pairs), sources) == Claims(action="a")


# Documents that are lists, and bodies without one ---------------------------------------------------------


def test_a_pointer_leads_into_a_document_that_is_a_list() -> None:
    sources = FactSources(action=Source.parse("/0/op"), scope_id=Source.parse("/1"), lists=True)
    document = [{"op": "replace", "path": "/spec"}, "scope_1"]
    assert read(Request(document=document), sources) == Claims(scope_id="scope_1", action="replace")
    assert isinstance(read(Request(document=[{"op": "a", "Op": "b"}]), sources), Refusal)
    assert read(Request(document={"0": {"op": "a"}}), sources) == Claims(action="a")


def test_what_a_body_cannot_hold_is_absent() -> None:
    found = read(Request(document={}, opaque=True, body_bytes=7), DEFAULT_SOURCES)
    assert found == Claims(opaque=True, body_bytes=7)


def test_a_route_may_have_no_parameters() -> None:
    sources = FactSources(parameters=None)
    assert read(Request(document={"parameters": {"n": 1}}), sources) == Claims()
