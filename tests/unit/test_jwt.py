"""JSON Web Tokens: which of them say who asks, and why the others do not."""

from __future__ import annotations

import hmac
import json
import time
from hashlib import sha256
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.auth.jwks import IssuerKeys, parse
from sidecar.auth.jwt import MAX_CHARS, JwtVerifier
from sidecar.auth.methods import Methods
from sidecar.core.instant import SECOND
from sidecar.core.principal import Principal
from sidecar.files.faults import ConfigurationError
from sidecar.settings.auth import JwtSection
from sidecar.settings.reading import default
from sidecar.telemetry.metrics import Metrics
from tests.tokens import (
    AUDIENCE,
    EC_KEY,
    ED_KEY,
    ISSUER,
    OTHER_RSA_KEY,
    P384_KEY,
    P521_KEY,
    RSA_KEY,
    SIGNING,
    assembled,
    b64,
    claims,
    jwk,
    key_set,
    signed,
    signed_as,
)

# The sidecar's clock stands years before that of the machine, so that no check can use the latter.
NOW = 1_500_000_000
RSA_SET = key_set(jwk(RSA_KEY, "k1"))
ALL_SET = key_set(
    jwk(RSA_KEY, "rsa"),
    jwk(EC_KEY, "p256"),
    jwk(P384_KEY, "p384"),
    jwk(P521_KEY, "p521"),
    jwk(ED_KEY, "ed"),
)
KID = {"ES256": "p256", "ES384": "p384", "ES512": "p521", "EdDSA": "ed"}


def section(**keys: Any) -> JwtSection:
    jwt = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": "https://issuer.test/jwks", **keys}
    return default("http://127.0.0.1:9000", auth={"jwt": jwt}).auth.jwt


def verifier(keys: bytes | None = RSA_SET, **settings: Any) -> JwtVerifier:
    """A verifier with a set of keys; None: none has been read so far."""
    known = IssuerKeys("https://issuer.test/jwks", metrics=Metrics())
    if keys is not None:
        known.keys = parse(keys, "jwks")
    return JwtVerifier(section(**settings), known)


def holder(token: str, keys: bytes | None = RSA_SET, now: float = NOW, **settings: Any) -> Identity:
    found = verifier(keys, **settings).identity(token, int(now * SECOND))
    assert isinstance(found, Identity), found
    return found


def refusal(token: str, keys: bytes | None = RSA_SET, now: float = NOW, **settings: Any) -> str:
    """Why a token is not accepted."""
    found = verifier(keys, **settings).identity(token, int(now * SECOND))
    assert isinstance(found, AuthFailure), found
    assert found.method == "jwt"
    return found.message.removeprefix("the token is not accepted: ")


# What is accepted ---------------------------------------------------------------------------------------


def test_a_token_says_who_holds_it_and_until_when() -> None:
    assert holder(signed(claims(NOW))) == Identity(id="alice", expires_at=(NOW + 3600) * SECOND)


def test_a_token_says_kind_groups_and_tenant() -> None:
    token = signed(claims(NOW, scopegate_kind="human", groups=["oncall", "sre", "oncall"], tenant="eu"))
    found = holder(token)
    assert (found.kind, found.groups, found.tenant_id) == ("human", ("oncall", "sre"), "eu")


def test_one_text_is_one_group_and_an_empty_list_is_none() -> None:
    assert holder(signed(claims(NOW, groups="on call, all"))).groups == ("on call, all",)
    assert holder(signed(claims(NOW, groups=[]))).groups == ()


def test_the_claims_have_the_configured_names() -> None:
    names = {"id": "email", "groups": "https://a/roles", "kind": "type", "tenant": "org"}
    more = {"email": "a@b", "https://a/roles": ["x"], "type": "agent", "org": "eu"}
    others = {"groups": 5, "scopegate_kind": 5, "tenant": 5}
    found = holder(signed(claims(NOW, **more, **others)), claims=names)
    assert (found.id, found.kind, found.groups, found.tenant_id) == ("a@b", "agent", ("x",), "eu")


@pytest.mark.parametrize("algorithm", SIGNING)
def test_every_algorithm_that_can_be_configured_verifies(algorithm: str) -> None:
    token = signed(claims(NOW), SIGNING[algorithm], algorithm, kid=KID.get(algorithm, "rsa"))
    assert holder(token, ALL_SET, algorithms=[algorithm]).id == "alice"
    others = [name for name in SIGNING if name != algorithm]
    assert refusal(token, ALL_SET, algorithms=others) == "its algorithm is none of auth.jwt.algorithms"


def test_the_audience_may_be_one_of_several() -> None:
    assert holder(signed(claims(NOW, aud=["other", AUDIENCE]))).id == "alice"


def test_a_token_without_kid_is_verified_by_the_only_key() -> None:
    token = signed(claims(NOW), kid=...)
    assert holder(token, key_set(jwk(RSA_KEY, "k1"))).id == "alice"
    assert holder(token, key_set(jwk(RSA_KEY))).id == "alice"
    # A key that cannot verify signatures is none of them.
    assert holder(token, key_set(jwk(RSA_KEY), jwk(OTHER_RSA_KEY, "e", use="enc"))).id == "alice"


# Times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "now", "leeway", "said"),
    [
        ({"exp": NOW}, NOW - 0.000001, 0, None),
        ({"exp": NOW}, NOW, 0, "it has expired"),
        ({"exp": NOW - 1}, NOW, 0, "it has expired"),
        ({"exp": NOW - 86_400}, NOW, 300, "it has expired"),
        ({"exp": NOW - 1}, NOW, 2, None),
        ({"exp": NOW - 2}, NOW, 2, "it has expired"),
        ({"exp": NOW + 0.5}, NOW + 0.4, 0, None),
        ({"exp": NOW + 0.5}, NOW + 0.5, 0, "it has expired"),
        ({"exp": ...}, NOW, 0, "it has no expiry (exp)"),
        ({"exp": None}, NOW, 0, "its claim exp must be a number of seconds"),
        ({"exp": str(NOW + 9)}, NOW, 0, "its claim exp must be a number of seconds"),
        ({"exp": True}, NOW, 0, "its claim exp must be a number of seconds"),
        ({"exp": [NOW + 9]}, NOW, 0, "its claim exp must be a number of seconds"),
        ({"nbf": NOW}, NOW, 0, None),
        ({"nbf": NOW + 1}, NOW, 0, "it is not valid yet"),
        ({"nbf": NOW + 1}, NOW, 1, None),
        ({"nbf": "soon"}, NOW, 0, "its claim nbf must be a number of seconds"),
        ({"iat": NOW}, NOW, 0, None),
        ({"iat": NOW + 1}, NOW, 0, "it was issued in the future"),
        ({"iat": NOW + 1}, NOW, 1, None),
        ({"iat": False}, NOW, 0, "its claim iat must be a number of seconds"),
    ],
)
def test_the_times_of_a_token_are_those_of_the_clock(
    more: dict[str, Any], now: float, leeway: int, said: str | None
) -> None:
    token = signed(claims(NOW, **more))
    if said is None:
        assert holder(token, now=now, leeway_seconds=leeway).id == "alice"
    else:
        assert refusal(token, now=now, leeway_seconds=leeway) == said


def test_a_token_that_never_ends_for_any_purpose_is_accepted_until_then() -> None:
    assert holder(signed(json.dumps(claims(NOW)).replace(str(NOW + 3600), "1e300").encode())).id == "alice"


def test_the_leeway_counts_for_the_time_that_a_result_is_kept() -> None:
    assert holder(signed(claims(NOW, exp=NOW + 5)), leeway_seconds=60).expires_at == (NOW + 65) * SECOND


# Who issued it, and for whom ----------------------------------------------------------------------------


@pytest.mark.parametrize("issuer", [..., None, "", ISSUER + "/", ISSUER.upper(), [ISSUER], {"a": ISSUER}])
def test_another_issuer_is_refused(issuer: Any) -> None:
    assert refusal(signed(claims(NOW, iss=issuer))) == "its issuer (iss) is not auth.jwt.issuer"


@pytest.mark.parametrize("audience", [..., None, "", "other", "Scopegate", [], ["other"], {AUDIENCE: 1}, 5])
def test_another_audience_is_refused(audience: Any) -> None:
    assert refusal(signed(claims(NOW, aud=audience))) == "its audience (aud) is not auth.jwt.audience"


# What a claim says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [..., None, "", 5, ["alice"], {"a": "b"}, "a\nb", "x" * 257])
def test_an_id_that_is_none_is_refused(value: Any) -> None:
    assert refusal(signed(claims(NOW, sub=value))) == "its claim sub must be 1 to 256 printable characters"


@pytest.mark.parametrize("value", [None, "", "Human", "robot", ["human"], 5, {"human": 1}])
def test_an_invalid_kind_is_refused(value: Any) -> None:
    said = refusal(signed(claims(NOW, scopegate_kind=value)))
    assert said == "its claim scopegate_kind must be one of human, service, agent"


@pytest.mark.parametrize("value", [None, "", 5, {"a": 1}, [""], ["a", 5], ["a", None], [["a"]], ["a\n"]])
def test_invalid_groups_are_refused(value: Any) -> None:
    said = refusal(signed(claims(NOW, groups=value)))
    assert said == "its claim groups must be a text or a list of texts, each 1 to 256 printable characters"


@pytest.mark.parametrize("value", [None, "", 5, ["eu"], "e\tu"])
def test_an_invalid_tenant_is_refused(value: Any) -> None:
    said = refusal(signed(claims(NOW, tenant=value)))
    assert said == "its claim tenant must be 1 to 256 printable characters"


# Algorithms and keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", ""])
@pytest.mark.parametrize("signature", [b"", b"x"])
def test_a_token_without_a_signature_is_refused(name: str, signature: bytes) -> None:
    token = assembled({"alg": name, "kid": "k1"}, claims(NOW), signature)
    assert isinstance(verifier().identity(token, NOW * SECOND), AuthFailure)


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
@pytest.mark.parametrize("name", ["HS256", "HS384", "RS256"])
def test_a_token_that_is_signed_with_the_public_key_as_a_secret_is_refused(
    encoding: Encoding, name: str
) -> None:
    secret = RSA_KEY.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
    head, body = b64(json.dumps({"alg": name, "kid": "k1"}).encode()), b64(json.dumps(claims(NOW)).encode())
    token = f"{head}.{body}.{b64(hmac.new(secret, f'{head}.{body}'.encode(), sha256).digest())}"
    said = "its signature is not valid" if name == "RS256" else "its algorithm is none of auth.jwt.algorithms"
    assert refusal(token) == said


def test_no_configuration_takes_an_algorithm_with_a_shared_secret_or_none() -> None:
    for name in ("HS256", "HS512", "none", "ES256K"):
        with pytest.raises(ConfigurationError, match=r"auth\.jwt\.algorithms\[0\]: expects one of RS256"):
            section(algorithms=[name])


def test_the_algorithm_of_a_token_must_fit_the_type_of_its_key() -> None:
    said = "its algorithm does not fit its key"
    assert refusal(signed(claims(NOW), EC_KEY, "ES256", kid="rsa"), ALL_SET) == said
    assert refusal(signed(claims(NOW), RSA_KEY, "RS256", kid="p256"), ALL_SET) == said
    token = signed(claims(NOW), EC_KEY, "ES256", kid="p384")
    assert refusal(token, ALL_SET, algorithms=["ES256", "ES384"]) == said


def test_a_key_for_one_algorithm_verifies_no_other() -> None:
    keys = key_set(jwk(RSA_KEY, "k1", alg="RS512"))
    both: dict[str, Any] = {"algorithms": ["RS256", "RS512"]}
    assert holder(signed(claims(NOW), RSA_KEY, "RS512"), keys, **both).id == "alice"
    assert refusal(signed(claims(NOW)), keys, **both) == "its algorithm does not fit its key"


def test_a_token_of_another_key_is_refused() -> None:
    assert refusal(signed(claims(NOW), OTHER_RSA_KEY)) == "its signature is not valid"


def test_a_token_of_an_unknown_key_is_refused() -> None:
    for kid in ("k2", "K1", "k1 ", ""):
        assert refusal(signed(claims(NOW), kid=kid)) == "its issuer has no key of this name (kid)"
    # A key without a name is not the one that a token names.
    said = refusal(signed(claims(NOW)), key_set(jwk(RSA_KEY)))
    assert said == "its issuer has no key of this name (kid)"


def test_a_token_without_kid_is_refused_if_there_are_two_keys() -> None:
    keys = key_set(jwk(RSA_KEY, "k1"), jwk(EC_KEY, "k2"))
    said = "it names no key (kid), and its issuer has more than one"
    assert refusal(signed(claims(NOW), kid=...), keys) == said


def test_before_the_keys_are_known_a_token_is_refused_with_that_reason() -> None:
    said = "no key of its issuer is known, because the key set could not be read so far"
    assert refusal(signed(claims(NOW)), None) == said


@pytest.mark.parametrize("name", ["jwk", "jku", "x5u", "x5c"])
def test_a_key_within_a_token_is_never_looked_at(name: str) -> None:
    theirs = {
        "jwk": jwk(OTHER_RSA_KEY, "k1"),
        "jku": "https://evil.test/jwks",
        "x5u": "https://evil.test/x",
        "x5c": ["MIIB"],
    }[name]
    head = {"alg": "RS256", "kid": "k1", name: theirs}
    payload = json.dumps(claims(NOW)).encode()
    assert refusal(signed_as(head, payload, OTHER_RSA_KEY)) == "its signature is not valid"
    assert holder(signed_as(head, payload)).id == "alice"


# Its form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"crit": ["exp"], "exp": 1}, "its header demands extensions (crit)"),
        ({"crit": []}, "its header demands extensions (crit)"),
        ({"crit": None}, "its header demands extensions (crit)"),
        ({"b64": False}, "its header demands extensions (crit)"),
        ({"b64": False, "crit": ["b64"]}, "its header demands extensions (crit)"),
        ({"kid": 5}, "its header names no key (kid) as text"),
        ({"kid": None}, "its header names no key (kid) as text"),
        ({"kid": ["k1"]}, "its header names no key (kid) as text"),
        ({"alg": None}, "its header names no algorithm (alg)"),
        ({"alg": ["RS256"]}, "its header names no algorithm (alg)"),
    ],
)
def test_a_header_that_says_something_strange_is_refused(header: dict[str, Any], said: str) -> None:
    payload = json.dumps(claims(NOW)).encode()
    assert refusal(signed_as({"alg": "RS256", "kid": "k1", **header}, payload)) == said


NOT_STRICT = [b'{"a":1,"a":2}', b'{"a":NaN}', b"[]", b"5", b"null", b'"x"', b"{", b"", b"\xff", b'{"a":1}x']


@pytest.mark.parametrize("text", NOT_STRICT)
def test_a_token_with_other_than_strict_objects_is_refused(text: bytes) -> None:
    said = "it is not encoded as a JSON Web Token" if not text else "it does not hold strict JSON objects"
    assert refusal(signed_as({"alg": "RS256", "kid": "k1"}, text)) == said
    assert refusal(signed_as(text, json.dumps(claims(NOW)).encode())) == said


def test_a_claim_that_stands_twice_is_refused() -> None:
    payload = json.dumps(claims(NOW)).encode().replace(b"{", b'{"sub": "root", ', 1)
    assert refusal(signed(payload)) == "it does not hold strict JSON objects"


def test_only_three_parts_in_canonical_base64url_are_a_token() -> None:
    token = signed(claims(NOW))
    head, body, signature = token.split(".")
    assert holder(token).id == "alice"
    form = f"it is no signed JSON Web Token of at most {MAX_CHARS} characters"
    for text in ("", "sg_x", "a.b", f"{head}.{body}", f"{token}.", f".{token}", f"{token}.{signature}"):
        assert refusal(text) == form
    odd = "it is not encoded as a JSON Web Token"
    for text in (
        *(f"{head}.{body}.", f".{body}.{signature}", f"{head}..{signature}", ".."),
        *(
            f"{token}=",
            f"{token}==",
            f"{token} ",
            f" {token}",
            f"{token}\n",
            f"{token[:-1]}/",
            f"{token[:-1]}+",
        ),
        f"{head}.{body}.{signature[:-1]}ä",
        f"{head}.{body}.{signature[:-1]}\ud800",
    ):
        assert refusal(text) == odd


def test_another_spelling_of_the_same_signature_is_refused() -> None:
    """The last character of a signature of 256 bytes has four bits that mean nothing."""
    token = signed(claims(NOW))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = [token[:-1] + letter for letter in alphabet if letter != token[-1]]
    assert [text for text in others if isinstance(verifier().identity(text, NOW * SECOND), Identity)] == []


def test_a_token_of_more_than_16_kib_is_refused_before_it_is_read() -> None:
    fits = signed(claims(NOW, pad="x" * 11_000))
    assert len(fits) <= MAX_CHARS == 16_384
    assert holder(fits).id == "alice"
    form = f"it is no signed JSON Web Token of at most {MAX_CHARS} characters"
    assert refusal(signed(claims(NOW, pad="x" * 12_300))) == form
    begun = time.process_time()
    assert refusal("." * 100_000_000) == form
    assert time.process_time() - begun < 1


def test_no_message_repeats_a_part_of_the_token() -> None:
    marked = dict.fromkeys(("iss", "aud", "nbf", "scopegate_kind"), "s3cret")
    tokens = [signed(claims(NOW, **{name: value})) for name, value in marked.items()]
    tokens += [signed(claims(NOW), kid="s3cret"), "s3cret.s3cret.s3cret", signed(claims(NOW, sub=["s3cret"]))]
    assert [said for said in map(refusal, tokens) if "s3cret" in said] == []


# Changed tokens -----------------------------------------------------------------------------------------

BASES = [
    signed(claims(NOW, groups=["oncall"], scopegate_kind="agent")),
    signed(claims(NOW), EC_KEY, "ES256", kid="k2"),
]
BOTH = key_set(jwk(RSA_KEY, "k1"), jwk(EC_KEY, "k2"))
VERIFIER = verifier(BOTH)
CHARACTERS = st.sampled_from("ABCXYZabcxyz0189-_.=+/ \n\u00e9{}\"'")


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, str]:
    """A valid token, and another text that a few changes make of it."""
    token = text = draw(st.sampled_from(BASES))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text) - 1))
        match draw(st.sampled_from(["put", "insert", "drop", "swap", "cut", "graft"])):
            case "put":
                text = text[:at] + draw(CHARACTERS) + text[at + 1 :]
            case "insert":
                text = text[:at] + draw(CHARACTERS) + text[at:]
            case "drop":
                text = text[:at] + text[at + 1 :]
            case "swap":
                text = text[:at] + text[at : at + 2][::-1] + text[at + 2 :]
            case "cut":
                text = text[: at + 1]
            case _:
                other = draw(st.sampled_from(BASES))
                parts, others = text.split("."), other.split(".")
                which = draw(st.integers(0, 2))
                parts[which % len(parts)] = others[which]
                text = ".".join(parts)
        text = text or "x"
    return token, text


@given(pair=changed())
def test_no_changed_token_is_accepted(pair: tuple[str, str]) -> None:
    token, text = pair
    found = VERIFIER.identity(text, NOW * SECOND)
    assert isinstance(found, AuthFailure) or text in BASES, (token, text)


@given(text=st.text(max_size=300) | st.binary(max_size=300).map(b64))
def test_no_other_text_is_accepted_or_fails_otherwise(text: str) -> None:
    for token in (text, f"{text}.{text}.{text}", BASES[0].rpartition(".")[0] + "." + text):
        assert isinstance(VERIFIER.identity(token, NOW * SECOND), AuthFailure)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    values=st.dictionaries(
        st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub", "groups", "scopegate_kind", "tenant"]),
        VALUES,
    )
)
def test_signed_claims_of_any_value_are_an_identity_or_a_failure(values: dict[str, Any]) -> None:
    found = VERIFIER.identity(signed(claims(NOW, **values), EC_KEY, "ES256", kid="k2"), NOW * SECOND)
    assert isinstance(found, Identity | AuthFailure)


@given(header=st.dictionaries(st.sampled_from(["alg", "kid", "crit", "b64", "typ", "jwk"]), VALUES))
def test_headers_of_any_value_are_an_identity_or_a_failure(header: dict[str, Any]) -> None:
    text = json.dumps({"alg": "RS256", "kid": "k1", **header}).encode()
    found = VERIFIER.identity(signed_as(text, json.dumps(claims(NOW)).encode()), NOW * SECOND)
    assert isinstance(found, Identity | AuthFailure)


# With the other methods ---------------------------------------------------------------------------------


def test_the_principal_of_a_token_is_kept_until_the_token_expires_or_the_keys_change() -> None:
    known = IssuerKeys("https://issuer.test/jwks", metrics=Metrics())
    known.keys = parse(RSA_SET, "jwks")
    settings = default("http://h", auth={"jwt": section().model_dump() | {"id_prefix": "idp:"}})
    methods = Methods.configured(settings.auth, jwt=JwtVerifier(settings.auth.jwt, known))
    token = signed(claims(NOW))
    assert methods.names == ("jwt",)
    found = methods.bearer(token, lambda: NOW * SECOND)
    assert isinstance(found, Principal)
    assert (found.id, found.method, found.kind) == ("idp:alice", "jwt", "service")
    known.keys = parse(key_set(jwk(OTHER_RSA_KEY, "k1")), "jwks")
    assert methods.bearer(token, lambda: NOW * SECOND) is found
    assert isinstance(methods.bearer(token, lambda: (NOW + 3600) * SECOND), AuthFailure)
    methods.forget()
    assert isinstance(methods.bearer(token, lambda: NOW * SECOND), AuthFailure)


def test_no_token_is_that_of_anonymous() -> None:
    known = IssuerKeys("https://issuer.test/jwks", metrics=Metrics())
    known.keys = parse(RSA_SET, "jwks")
    methods = Methods(jwt=JwtVerifier(section(), known))
    assert isinstance(methods.bearer(signed(claims(NOW, sub="anonymous")), lambda: NOW * SECOND), AuthFailure)
