"""A mask replaces what its pointers find, all of it and nothing else, and leaves what it is given alone."""

from __future__ import annotations

import copy
import hashlib
import hmac
import re
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sidecar.core.command import Refuse
from sidecar.core.entries import gate_entry
from sidecar.core.facts import Claims
from sidecar.core.masking import IDENTITY, MASKED, Mask, canonical, pointer
from sidecar.errors import Refusal

KEY = b"0123456789abcdef"


def record(**inputs: Any) -> dict[str, Any]:
    """A real record that was refused; `inputs` become the parameters that were asked for."""
    command = Refuse(
        decision_id="id",
        refusal=Refusal("scope_not_found", "No scope has this scope_id.", {"scope_id": "scope_1"}),
        claims=Claims(scope_id="scope_1", parameters=inputs),
    )
    entry = gate_entry(
        command, "refused", command.refusal, command.claims, "rev", 0, count=2, hold_usd=Decimal("0.1")
    )
    return entry.record.to_dict()


def mask(*pointers: str, key: bytes | None = None) -> Mask:
    return Mask(pointers=tuple(map(pointer, pointers)), key=key)


def parameters(masked: dict[str, Any]) -> Any:
    return masked["decision_inputs"]["parameters"]


def test_what_a_pointer_finds_is_replaced_whatever_it_is() -> None:
    given_ = record(name="Jane", card={"number": [1, 2]}, keep=1, nothing=None)
    masked = mask(
        "/decision_inputs/parameters/name",
        "/decision_inputs/parameters/card",
        "/decision_inputs/parameters/nothing",
        "/details/message",
        "/decision_reason",
    )(given_)
    assert parameters(masked) == {"name": MASKED, "card": MASKED, "keep": 1, "nothing": MASKED}
    assert masked["details"] == {**given_["details"], "message": MASKED}
    assert masked["decision_reason"] == MASKED


def test_all_else_of_the_record_stays_and_in_its_order() -> None:
    given_ = record(name="Jane")
    masked = mask("/decision_inputs/parameters/name")(given_)
    assert list(masked) == list(given_)
    assert {**masked, "decision_inputs": 0} == {**given_, "decision_inputs": 0}
    assert list(masked["decision_inputs"]) == list(given_["decision_inputs"])


def test_what_is_not_there_leaves_the_record_as_it_is() -> None:
    given_ = record(a={"b": [1]}, text="text")
    for text in (
        "a/c",
        "a/b/1",
        "a/b/-",
        "a/b/00",
        "a/b/x",
        "a/b/0/0",
        "text/0",
        "text/x",
        "b",
        "a/b/" + "9" * 99,
    ):
        assert mask(f"/decision_inputs/parameters/{text}")(given_) is given_


def test_lists_are_counted_from_0_and_keys_may_hold_slash_and_tilde() -> None:
    masked = mask(
        "/decision_inputs/parameters/list/1",
        "/decision_inputs/parameters/tuple/0/x",
        "/decision_inputs/parameters/a~1b",
        "/decision_inputs/parameters/c~0d",
        "/decision_inputs/parameters/e~01f",
    )(record(**{"list": [1, 2, 3], "tuple": ({"x": 1},), "a/b": 1, "c~d": 2, "e~1f": 3}))
    assert parameters(masked) == {
        "list": [1, MASKED, 3],
        "tuple": [{"x": MASKED}],
        "a/b": MASKED,
        "c~d": MASKED,
        "e~1f": MASKED,
    }


def test_a_key_that_looks_like_a_number_is_a_key_of_an_object() -> None:
    assert parameters(mask("/decision_inputs/parameters/0")(record(**{"0": "x"}))) == {"0": MASKED}


def test_what_cannot_be_changed_is_copied() -> None:
    inner = MappingProxyType({"secret": 1, "other": 2})
    given_ = {**record(), "details": MappingProxyType({"inner": inner})}
    assert mask("/details/inner/secret")(given_)["details"] == {"inner": {"secret": MASKED, "other": 2}}
    assert inner["secret"] == 1


def test_with_a_key_a_mask_is_the_beginning_of_an_hmac() -> None:
    masked = mask("/decision_inputs/parameters/name", key=KEY)(record(name="Jané"))
    digest = hmac.new(KEY, b'"Jan\\u00e9"', hashlib.sha256).hexdigest()
    assert parameters(masked) == {"name": f"[masked:{digest[:16]}]"}


def test_a_mask_stands_for_the_value_as_it_came_in_whatever_order_pointers_are_given() -> None:
    outer, inner = "/decision_inputs/parameters/card", "/decision_inputs/parameters/card/number"
    alone = mask(outer, key=KEY)(record(card={"number": 1}))
    assert mask(inner, outer, key=KEY)(record(card={"number": 1})) == alone
    assert mask(outer, inner, outer, key=KEY)(record(card={"number": 1})) == alone


def test_the_key_is_never_shown() -> None:
    assert "0123456789abcdef" not in repr(mask("/details/a", key=KEY))


def test_every_identity_member_is_refused_and_so_is_what_stands_below_it() -> None:
    for tokens in IDENTITY:
        for text in ("/" + "/".join(tokens), "/" + "/".join(tokens) + "/0"):
            with pytest.raises(ValueError, match=f"/{'/'.join(tokens)} tells records apart"):
                pointer(text)


def test_only_members_below_inputs_and_details_and_the_reason_can_be_masked() -> None:
    for name in record():
        if name != "decision_reason":
            with pytest.raises(ValueError, match="cannot be masked"):
                pointer(f"/{name}")
    assert pointer("/decision_reason") == ("decision_reason",)
    assert pointer("/decision_inputs/principals") == ("decision_inputs", "principals")


@pytest.mark.parametrize(
    "text", ["", "details/a", "/details/", "/details//a", "/details/~", "/details/~2", "/details/~~01"]
)
def test_what_is_no_pointer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expects a JSON pointer|names no member"):
        pointer(text)


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (-0.0, "0"),
        (Decimal("-0E+7"), "0"),
        (1, "1e0"),
        (1.0, "1e0"),
        (Decimal("1.000"), "1e0"),
        (-120, "-12e1"),
        (0.1, "1e-1"),
        (Decimal("0.1"), "1e-1"),
        (1e300, "1e300"),
        (5e-324, "5e-324"),
        (10**70 + 1, "1" + "0" * 69 + "1e0"),
        (Decimal("0." + "123456789" * 7), "123456789" * 7 + "e-63"),
        (Decimal("NaN"), '"NaN"'),
        (float("inf"), '"Infinity"'),
        ("é\n\ud800", '"\\u00e9\\n\\ud800"'),
        ([1, (2,)], "[1e0,[2e0]]"),
        ({"b": 1, "a": {"d": [], "c": {}}}, '{"a":{"c":{},"d":[]},"b":1e0}'),
        (MappingProxyType({1: "x"}), '{"1":"x"}'),
        (Colour.RED, '"Colour.RED"'),
        (b"x", "\"b'x'\""),
    ],
)
def test_the_canonical_form_has_one_spelling_for_each_value(value: Any, expected: str) -> None:
    assert canonical(value) == expected


numbers = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.decimals(allow_nan=False, allow_infinity=False, places=6),
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def shape(value: Any) -> Any:
    """What is equal where two values are: true is no number, an object knows no order."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    if isinstance(value, list):
        return [shape(member) for member in value]
    if isinstance(value, float):
        value = Decimal(str(value))
    return (isinstance(value, bool), value)


@given(values, values)
def test_equal_values_have_one_canonical_form_and_others_another(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (shape(one) == shape(other))
    assert canonical(one) == canonical(copy.deepcopy(one))


paths = st.lists(st.sampled_from(["a", "b", "0", "1", "~", "/"]), min_size=1, max_size=4)


def at(value: Any, tokens: list[str]) -> Any:
    """What stands at the end of a path; LookupError where nothing does."""
    for token in tokens:
        if isinstance(value, dict):
            value = value[token]
        elif isinstance(value, list) and re.fullmatch("0|[1-9][0-9]*", token):
            value = value[int(token)]
        else:
            raise LookupError(token)
    return value


documents = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "0", "1", "~", "/"]), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "0"]), documents, min_size=1), paths, st.booleans())
def test_any_pointer_masks_its_place_and_no_other(
    document: dict[str, Any], path: list[str], key: bool
) -> None:
    text = "/details/" + "/".join(token.replace("~", "~0").replace("/", "~1") for token in path)
    given_ = {"decision_inputs": {"principal": "p"}, "details": document}
    before = copy.deepcopy(given_)
    masked = mask(text, key=KEY if key else None)(given_)
    assert given_ == before
    try:
        at(document, path)
    except LookupError:
        assert masked is given_
        return
    assert re.fullmatch(r"\[masked:[0-9a-f]{16}\]" if key else r"\[masked\]", at(masked["details"], path))
    # Put back what was there, and nothing differs.
    holder = copy.deepcopy(masked)
    step: Any = path[-1]
    place = at(holder["details"], path[:-1])
    place[int(step) if isinstance(place, list) else step] = at(document, path)
    assert holder == before


@given(values, values)
def test_equal_values_stay_recognizable_and_different_ones_different(one: Any, other: Any) -> None:
    assume(shape(one) != shape(other))
    a = mask("/decision_inputs/parameters/x", key=KEY)
    again = parameters(a(record(x=copy.deepcopy(one))))
    assert parameters(a(record(x=one, y=1)))["x"] == again["x"]
    assert parameters(a(record(x=other)))["x"] != again["x"]
    b = mask("/decision_inputs/parameters/x", key=KEY + b"!")
    assert parameters(b(record(x=one)))["x"] != again["x"]
