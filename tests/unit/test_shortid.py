"""A scope_id is shown as `scope_` and its first eight characters."""

from __future__ import annotations

import pytest

from sidecar.core.shortid import short_id, shortened, shortened_bytes, shortened_path
from sidecar.ids import new_scope_id

ID = "scope_0123456789abcdef0123456789abcdef"
SHORT = "scope_01234567"


def encoded(text: str, times: int = 1) -> str:
    """Every character percent-encoded, so many times."""
    return "".join(f"%{'25' * (times - 1)}{ord(character):02X}" for character in text)


def test_the_short_form_of_every_new_id_has_eight_characters_behind_the_prefix() -> None:
    scope_id = new_scope_id()
    assert short_id(scope_id) == scope_id[:14]
    assert short_id(short_id(scope_id)) == scope_id[:14]


@pytest.mark.parametrize(
    ("claimed", "shown"),
    [
        (ID, SHORT),
        (ID[:-1], SHORT),
        (ID + "0", SHORT),
        (ID.upper(), "SCOPE_01234567"),
        ("scope_0123", "scope_0123"),
        (" " + ID, " " + SHORT),
        ("inc_1", "inc_1"),
        ("", ""),
    ],
)
def test_what_a_client_claims_as_a_scope_id_shows_no_more_than_the_short_form(
    claimed: str, shown: str
) -> None:
    assert short_id(claimed) == shown


def test_a_text_shows_each_id_in_it_in_its_short_form_and_is_otherwise_the_same() -> None:
    assert shortened(f"({ID}) and {ID[:30]}, but {ID[:29]} é") == f"({SHORT}) and {SHORT}, but {ID[:29]} é"
    assert shortened_bytes(f'{{"cause":"{ID}é"}}'.encode()) == f'{{"cause":"{SHORT}é"}}'.encode()
    plain = "nothing is in it: scope_configuration scope_required_from"
    assert shortened(plain) is plain


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"/api/v1/recovery/scopes/{ID}", f"/api/v1/recovery/scopes/{SHORT}"),
        (f"/a/{ID}/b/{ID}", f"/a/{SHORT}/b/{SHORT}"),
        (f"/a/{ID.upper()}", f"/a/{SHORT.upper()}"),
        (f"/a/scope%5f{ID[6:]}", f"/a/scope%5f{ID[6:14]}"),
        (f"/a/{ID[:20]}%61{ID[21:]}", f"/a/{SHORT}"),
        (f"/a/{encoded(ID)}/b", f"/a/{encoded(SHORT)}/b"),
        (f"/a/{encoded(ID, 3)}", f"/a/{encoded(SHORT, 3)}"),
        (f"/a/{encoded(ID.upper(), 2)}", f"/a/{encoded(SHORT.upper(), 2)}"),
        ("/a/scope_configuration/decade", "/a/scope_configuration/decade"),
        (f"/a/{ID[:29]}", f"/a/{ID[:29]}"),
    ],
)
def test_a_path_shows_each_id_in_its_short_form_however_it_is_encoded(path: str, shown: str) -> None:
    assert shortened_path(path) == shown


def test_a_path_that_is_made_to_be_slow_is_not() -> None:
    """The time that a path takes grows with its length alone."""
    for path in (
        "%25" * 3_000,
        "%" + "25" * 4_000,
        ("%" + "25" * 100 + "73") * 40,
        "scope_" * 1_300,
        "s" * 8_000,
    ):
        assert shortened_path(path) == path
