"""The file of tokens and the table of principals: what is read, what is refused, and how the file changes."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.auth import principals, tokenfile, tokens
from sidecar.auth.callers import Callers
from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.auth.methods import Methods
from sidecar.auth.principals import KnownPrincipal, PrincipalTable
from sidecar.auth.tokens import Token, TokenSet, digest_of, new_secret
from sidecar.core.instant import SECOND
from sidecar.core.principal import Principal
from sidecar.files.faults import ConfigurationError

NOW = 1_800_000_000 * SECOND
DIGEST = "ab" * 32


def token(name: str = "ci", text: str = "sg_x", **more: Any) -> Token:
    return replace(Token(name=name, digest=digest_of(text), created_at=NOW), **more)


def faults(read: object, raw: str, name: str = "t.yaml") -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        read(raw.encode(), name)  # type: ignore[operator]  # either of the two readers
    return list(map(str, refused.value.faults))


# A token -----------------------------------------------------------------------------------------------


def test_a_token_is_256_random_bits_in_43_letters_and_digits() -> None:
    made = {new_secret() for _ in range(1_000)}
    assert len(made) == 1_000
    assert all(
        one.startswith("sg_") and len(one) == 46 and one[3:].isalnum() and one.isascii() for one in made
    )
    # Each bit is random: every letter and digit turns up.
    assert len({letter for one in made for letter in one[3:]}) == 62


def test_a_token_is_known_by_its_digest_alone() -> None:
    found = TokenSet([token("ci", "sg_a", kind="agent", groups=("bots",), tenant_id="t")])
    assert found.identity("sg_a", NOW) == Identity(id="ci", kind="agent", groups=("bots",), tenant_id="t")
    for wrong in ("", "sg_", "sg_A", "sg_a ", hashlib.sha256(b"sg_a").hexdigest(), "sg_\udc80"):
        assert isinstance(found.identity(wrong, NOW), AuthFailure), wrong


def test_a_token_is_valid_before_its_end_and_not_at_it() -> None:
    found = TokenSet([token("ci", "sg_a", not_after=NOW + SECOND)])
    assert isinstance(found.identity("sg_a", NOW + SECOND - 1), Identity)
    assert found.identity("sg_a", NOW + SECOND) == found.identity("sg_b", NOW), (
        "it says no more than of any other"
    )


def test_several_tokens_of_one_name_are_valid_side_by_side() -> None:
    found = TokenSet([token("ci", "sg_a"), token("ci", "sg_b"), token("anna", "sg_c")])
    names = [found.identity(text, NOW) for text in ("sg_a", "sg_b", "sg_c")]
    assert [isinstance(one, Identity) and one.id for one in names] == ["ci", "ci", "anna"]


def test_two_digests_with_one_beginning_are_told_apart() -> None:
    one = token("one", "sg_a")
    other = replace(one, name="other", digest=one.digest[:8] + bytes(24))
    for order in ([one, other], [other, one]):
        assert TokenSet(order).identity("sg_a", NOW) == Identity(id="one")


def test_a_bearer_that_begins_like_a_token_is_never_taken_for_a_json_web_token() -> None:
    class EveryToken:
        def identity(self, token: str, now: int) -> Identity:
            return Identity(id=f"jwt:{token}")

    both = Methods(Callers(TokenSet([token("ci", "sg_a")])), jwt=EveryToken())
    assert both.names == ("tokens", "jwt")
    found = both.bearer("sg_a", lambda: NOW)
    assert isinstance(found, Principal)
    assert (found.id, found.method) == ("ci", "tokens")
    assert both.bearer("sg_b", lambda: NOW) == AuthFailure("tokens", tokens.NOT_VALID)
    other = both.bearer("eyJ", lambda: NOW)
    assert isinstance(other, Principal)
    assert (other.id, other.method) == ("jwt:eyJ", "jwt")
    # Where there are no tokens, one is refused, and not handed to another method.
    assert isinstance(Methods(jwt=EveryToken()).bearer("sg_a", lambda: NOW), AuthFailure)


def test_a_cached_token_ends_when_it_expires() -> None:
    methods = Methods(Callers(TokenSet([token("ci", "sg_a", not_after=NOW + 1)])))
    assert isinstance(methods.bearer("sg_a", lambda: NOW), Principal)
    assert methods.bearer("sg_a", lambda: NOW + 1) == AuthFailure("tokens", tokens.NOT_VALID)


# The file ----------------------------------------------------------------------------------------------


def test_an_entry_needs_a_name_a_digest_and_a_time_and_may_say_more() -> None:
    raw = (
        f"tokens:\n- {{name: ci, sha256: {DIGEST}, created_at: 2026-12-01T08:00:00Z}}\n"
        f"- {{name: anna, kind: human, groups: [oncall], tenant_id: t, sha256: {'cd' * 32}, "
        "created_at: 2026-12-01T08:00:00+01:00, not_after: 2027-01-01T00:00:00Z}\n"
    )
    ci, anna = tokens.parse(raw.encode(), "t.yaml").tokens
    assert (ci.name, ci.kind, ci.groups, ci.tenant_id, ci.not_after) == ("ci", None, None, None, None)
    assert (anna.kind, anna.groups, anna.tenant_id) == ("human", ("oncall",), "t")
    assert ci.created_at - anna.created_at == 3_600 * SECOND


GOOD = f"{{name: a, sha256: {DIGEST}, created_at: 2026-12-01T08:00:00Z}}"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("", "t.yaml:1:1: expects a map such as {tokens: []}, found nothing"),
        ("tokens: {}", "t.yaml:1:1: tokens: expects a list, found a map"),
        ("tokens: [5]", "t.yaml:1:10: tokens[0]: expects a map such as"),
        ("token: []", 't.yaml:1:1: token: is not a known key; did you mean "tokens"?'),
        ("tokens: [{name: a}]", "t.yaml:1:10: tokens[0].sha256: is required"),
        (f"tokens: [{GOOD.replace(DIGEST, 'abc')}]", "t.yaml:1:20: tokens[0].sha256: expects the SHA-256"),
        (f"tokens: [{GOOD.replace(DIGEST, DIGEST.upper())}]", "tokens[0].sha256: expects the SHA-256"),
        (
            f"tokens: [{GOOD.replace('T08:00:00Z', 'T08:00:00')}]",
            "tokens[0].created_at: expects a time with its offset",
        ),
        (
            f"tokens: [{GOOD.replace('2026-12-01T08:00:00Z', '5')}]",
            "tokens[0].created_at: expects a time such as",
        ),
        (f"tokens: [{GOOD[:-1]}, kind: robot}}]", "tokens[0].kind: "),
        (f"tokens: [{GOOD[:-1]}, groups: {{}}}}]", "tokens[0].groups: expects text, found a map"),
        (f"tokens: [{GOOD[:-1]}, secret: x}}]", "tokens[0].secret: is not a known key"),
        (
            f"tokens: [{GOOD}, {GOOD.replace('name: a', 'name: b')}]",
            "tokens[1].sha256: is already at t.yaml:1:10",
        ),
        ('tokens: [{name: "a\\tb"}]', "tokens[0].name: expects 1 to 256 printable characters"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(raw: str, said: str) -> None:
    found = faults(tokens.parse, raw)
    assert any(said in one for one in found), found
    assert all(one.startswith("t.yaml:") for one in found)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_file_that_only_its_owner_can_read_is_read(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(f"tokens: [{GOOD}]")
    file.chmod(mode)
    assert [one.name for one in tokens.read(file).tokens] == ["a"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_a_file_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(f"tokens: [{GOOD}]")
    file.chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"mode {mode:04o}\); chmod 600 it"):
        tokens.read(file)


def test_a_file_that_is_not_there_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"No such file or directory.*scopegate auth token NAME` makes it"
    ):
        tokens.read(tmp_path / "tokens.yaml")


def test_a_file_that_is_there_does_not_say_what_would_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        tokens.read(tmp_path)
    assert "makes it" not in str(refused.value)


# Changing the file -------------------------------------------------------------------------------------

_NAMES = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)
_TIMES = st.integers(0, 4_000_000_000).map(lambda seconds: seconds * SECOND)
_TOKENS = st.lists(
    st.builds(
        Token,
        name=_NAMES,
        digest=st.binary(min_size=32, max_size=32),
        created_at=_TIMES,
        not_after=st.none() | _TIMES,
        kind=st.none() | st.sampled_from(["human", "service", "agent"]),
        groups=st.none() | st.lists(_NAMES, max_size=3, unique=True).map(tuple),
        tenant_id=st.none() | _NAMES,
    ),
    max_size=5,
    unique_by=lambda one: one.digest,
)


@given(_TOKENS)
def test_what_is_written_is_read_back(written: list[Token]) -> None:
    assert tokens.parse(tokenfile.written(written), "t.yaml").tokens == tuple(written)


def test_a_file_with_finer_or_older_times_than_it_is_written_with_can_be_changed(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    file.touch(0o600)
    times = "created_at: '0001-01-01T00:00:00.5Z', not_after: '2101-01-01T00:00:00.999Z'"
    file.write_text(f"tokens: [{{name: a, sha256: {'a' * 64}, {times}}}]")
    (before,) = tokens.read(file).tokens
    assert tokenfile.time_text(before.created_at) == "0001-01-01T00:00:00Z"
    assert tokenfile.time_text(before.not_after or 0) == "2101-01-01T00:00:00Z"
    tokenfile.change(file, lambda old: [*old, token("b", "sg_b")])
    assert tokens.read(file).tokens[0] == before


def test_a_new_file_is_for_its_owner_only_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    tokenfile.change(file, lambda _: [token()])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o400)
    tokenfile.change(file, lambda before: [*before, token("b", "sg_b")])
    assert stat.S_IMODE(file.stat().st_mode) == 0o400
    assert os.listdir(tmp_path) == ["tokens.yaml"], "nothing is left over"


def test_a_change_goes_through_a_link_and_leaves_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "tokens.yaml"
    link.symlink_to(tmp_path / "real" / "tokens.yaml")
    tokenfile.change(link, lambda _: [token()])
    assert link.is_symlink()
    assert tokens.read(link).tokens == (token(),)


@pytest.mark.parametrize("raw", ["tokens: [5]", "tokens: [{name: a", f"tokens: [{GOOD}, {GOOD}]"])
def test_a_file_with_mistakes_is_not_replaced(tmp_path: Path, raw: str) -> None:
    file = tmp_path / "tokens.yaml"
    file.write_text(raw)
    file.chmod(0o600)
    with pytest.raises(ConfigurationError):
        tokenfile.change(file, lambda before: [*before, token()])
    assert file.read_text() == raw


def test_a_folder_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    tokenfile.change(file, lambda _: [token()])
    before = file.read_bytes()

    def full(_: object) -> list[Token]:
        # As a full disk does: the new file cannot be made under this name.
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        tokenfile.change(file, full)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["tokens.yaml"]


def test_changes_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    begin = threading.Barrier(8)

    def more(made: Token, before: Sequence[Token]) -> list[Token]:
        return [*before, made]

    def add(worker: int) -> None:
        begin.wait()
        for number in range(10):
            tokenfile.change(file, partial(more, token(f"w{worker}", f"sg_{worker}_{number}")))

    workers = [threading.Thread(target=add, args=(worker,)) for worker in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(tokens.read(file).tokens) == 80


# The table of principals -------------------------------------------------------------------------------

TABLE = PrincipalTable(
    {
        "*": KnownPrincipal(groups=("all",)),
        "agent-*": KnownPrincipal(kind="agent", groups=("bots",), tenant_id="t"),
        "agent-1": KnownPrincipal(kind="human"),
    }
)


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (Identity(id="x"), Identity(id="x", groups=("all",))),
        (Identity(id="agent-2"), Identity(id="agent-2", kind="agent", groups=("bots",), tenant_id="t")),
        (Identity(id="agent-1"), Identity(id="agent-1", kind="human")),
        (
            Identity(id="agent-2", kind="service", groups=(), tenant_id="u"),
            Identity(id="agent-2", kind="service", groups=(), tenant_id="u"),
        ),
    ],
)
def test_the_most_specific_entry_says_what_a_credential_does_not_say(
    identity: Identity, expected: Identity
) -> None:
    assert TABLE.completed(identity) == expected


def test_the_table_counts_for_the_id_with_its_prefix() -> None:
    methods = Methods(
        Callers(TokenSet([token("a", "sg_a")]), PrincipalTable({"x:a": KnownPrincipal(kind="human")})),
        prefixes={"tokens": "x:"},
    )
    found = methods.bearer("sg_a", lambda: NOW)
    assert isinstance(found, Principal)
    assert (found.id, found.kind, found.groups, found.tenant_id) == ("x:a", "human", (), "default")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("principals: []", "t.yaml:1:1: principals: expects a map"),
        ("principals: {a: {kind: robot}}", "principals.a.kind: "),
        ("principals: {a: {group: x}}", 'principals.a.group: is not a known key; did you mean "groups"?'),
        ("principals: {anonymous: {}}", "principals.anonymous: is the caller without a credential"),
        ('principals: {"ab*": {}, "ab?": {}}', "begins like ab* and is as long, so neither decides"),
        ('principals: {"": {}}', "an id, or a glob of ids, is 1 to 256 printable characters"),
        ("principal: {}", "t.yaml:1:1: principal: is not a known key"),
    ],
)
def test_a_mistake_in_the_table_is_named_with_its_place(raw: str, said: str) -> None:
    found = faults(principals.parse, raw)
    assert any(said in one for one in found), found
    assert all(one.startswith("t.yaml:1:") for one in found)


def test_tokens_that_would_be_read_otherwise_are_not_written(tmp_path: Path) -> None:
    file = tmp_path / "tokens.yaml"
    made = Token(name="ci", digest=tokens.digest_of("sg_a"), created_at=NOW + 1)
    with pytest.raises(ValueError, match="cannot be written"):
        tokenfile.change(file, lambda _: [made])
    assert not file.exists()
