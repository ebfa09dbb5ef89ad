"""Which bodies a route takes, and how the content type of a request names one of them."""

from __future__ import annotations

import pytest

from sidecar.core.bodies import Bodies, BodyKind, Reading, is_media_type

JSON, FORM, PATCH = b"application/json", b"application/x-www-form-urlencoded", b"application/json-patch+json"


@pytest.mark.parametrize(
    ("kinds", "content_type", "reading"),
    [
        (["json"], JSON, "json"),
        (["json"], b"Application/JSON ; charset=UTF-8", "json"),
        (["json"], FORM, None),
        (["json"], b"text/json", None),
        (["json"], b"application/json; charset=utf-16", None),
        (["json"], None, None),
        (["form"], FORM, "form"),
        (["form"], FORM + b"; charset=utf-8", "form"),
        (["form"], FORM + b"; charset=latin-1", None),
        (["form"], b"multipart/form-data; boundary=x", None),
        (["form"], JSON, None),
        (["form"], None, None),
        (["json", "form"], FORM, "form"),
        (["json", "form"], JSON, "json"),
        (["empty"], None, "empty"),
        (["empty"], JSON, "empty"),
        (["json", "empty"], None, "empty"),
        (["json", "empty"], JSON, "json"),
        (["json", "empty"], b"text/plain", "empty"),
        (["any"], None, "any"),
        (["any"], JSON, "any"),
        (["any"], b"nonsense", "any"),
        (["any", "empty"], FORM, "any"),
        (["json", "any"], JSON, "json"),
        (["json", "any"], b"text/yaml", "any"),
        (["json", "any"], FORM, "any"),
        # What could be read as JSON is never opaque beside it. Without bytes it may come.
        (["json", "any"], None, "empty"),
        (["json", "any"], b"text/json", "empty"),
        (["json", "any"], b"application/json;charset=utf-16", "empty"),
        (["json", "any"], b"application/vnd.x+json", "empty"),
        (["json", "any"], b"nonsense", "empty"),
        (["json", "any"], b"text/plain, application/json", "empty"),
        (["form", "any"], b"multipart/form-data; boundary=x", "empty"),
        (["form", "any"], b"text/json", "any"),
    ],
)
def test_the_content_type_decides_how_a_body_is_read(
    kinds: list[BodyKind], content_type: bytes | None, reading: Reading | None
) -> None:
    bodies = Bodies(tuple(kinds))
    assert (bodies.untyped if content_type is None else bodies.by_type[content_type]) == reading


def test_further_media_types_are_json_that_may_be_an_array() -> None:
    bodies = Bodies(("json",), (PATCH.decode(),))
    assert bodies.by_type[PATCH] == "array or object"
    assert bodies.by_type[JSON] == "json"
    assert bodies.by_type[b"application/merge-patch+json"] is None


def test_no_opaque_body_is_a_form_or_json_where_a_fact_is_read_from_the_query() -> None:
    assert Bodies(("any",), facts_in_query=True).by_type[JSON] == "empty"
    assert Bodies(("form", "any"), facts_in_query=True).by_type[FORM] == "form"
    for kinds in (("any",), ("json", "any")):
        bodies = Bodies(kinds, facts_in_query=True)
        assert bodies.by_type[FORM] == bodies.by_type[b"multipart/form-data;boundary=x"] == "empty"
        assert bodies.by_type[b"text/plain"] == "any"


@pytest.mark.parametrize(
    ("kinds", "encoded"),
    [
        (("any",), True),
        (("any", "empty"), True),
        (("empty",), False),
        (("json", "any"), False),
        (("form",), False),
    ],
)
def test_only_where_every_body_is_opaque_may_it_be_encoded(
    kinds: tuple[BodyKind, ...], encoded: bool
) -> None:
    assert Bodies(kinds).may_be_encoded is encoded


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("application/json", True),
        ("a/b", True),
        ("application/x-amz-json-1.1", True),
        ("", False),
        ("a", False),
        ("a/", False),
        ("/b", False),
        ("a/b/c", False),
        ("a/b c", False),
        ("\u00e4/b", False),
    ],
)
def test_a_media_type_is_two_tokens(text: str, valid: bool) -> None:
    assert is_media_type(text) is valid
