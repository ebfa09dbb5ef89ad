"""Client certificates and trusted proxies: which names say who asks, and which peers are believed."""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from pathlib import Path
from ssl import CERT_REQUIRED, MemoryBIO, SSLWantReadError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.auth.certificates import CertificateNames
from sidecar.auth.failure import AuthFailure
from sidecar.auth.identity import Identity
from sidecar.auth.methods import Methods
from sidecar.auth.proxy import MOST_PEERS, TrustedProxies
from sidecar.core.principal import Principal
from sidecar.settings.auth import CertificateName, Network
from sidecar.settings.reading import default
from tests.certificates import Authority, Pair

# Certificates -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def shown(authority: Authority, pair: Pair) -> dict[str, Any]:
    """A client's certificate as the server sees it after a real handshake."""
    own = authority.issue("server")
    up, down = MemoryBIO(), MemoryBIO()
    server = authority.server(own, asks_clients=True)
    assert server.verify_mode == CERT_REQUIRED
    client = authority.client(pair).wrap_bio(down, up, server_hostname="gate.test")
    serving = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (client, serving):
            with suppress(SSLWantReadError):
                side.do_handshake()
    found = serving.getpeercert()
    assert found
    return dict(found)


SPIFFE = "spiffe://prod/agent/restarter"


@pytest.mark.parametrize(
    ("kind", "issued", "expected"),
    [
        ("uri", {"uris": [SPIFFE]}, SPIFFE),
        ("uri", {"uris": ["https://a.test/x?y#z"]}, "https://a.test/x?y#z"),
        ("uri", {}, "no URI"),
        ("uri", {"uris": [SPIFFE, "spiffe://prod/agent/other"]}, "more than one URI"),
        ("uri", {"uris": [SPIFFE, SPIFFE]}, "more than one URI"),
        ("dns", {}, "gate.test"),
        ("dns", {"host": "Agent.Test"}, "agent.test"),
        ("dns", {"host": ""}, "no DNS name"),
        ("dns", {"hosts": ["other.test"]}, "more than one DNS name"),
        ("common_name", {"uris": [SPIFFE]}, "holder"),
    ],
)
def test_a_certificate_names_its_holder_once_by_the_configured_type(
    authority: Authority, kind: CertificateName, issued: dict[str, Any], expected: str
) -> None:
    found = CertificateNames(kind).identity(shown(authority, authority.issue("holder", **issued)))
    if expected.startswith(("no ", "more ")):
        said = f"the client certificate has {expected}, and needs exactly one"
        assert found == AuthFailure("mtls", said)
    else:
        assert found == Identity(id=expected)


@pytest.mark.parametrize(
    ("kind", "certificate", "said"),
    [
        ("common_name", {}, "has no common name"),
        ("common_name", {"subject": ()}, "has no common name"),
        ("common_name", {"subject": ((("organizationName", "x"),),)}, "has no common name"),
        (
            "common_name",
            {"subject": ((("commonName", "a"),), (("commonName", "b"),))},
            "has more than one common name",
        ),
        (
            "common_name",
            {"subject": ((("commonName", "a"), ("commonName", "b")),)},
            "has more than one common name",
        ),
        ("uri", {"subjectAltName": (("DNS", SPIFFE), ("email", SPIFFE))}, "has no URI"),
        ("dns", {"subjectAltName": (("DNS", "*.prod.test"),)}, "has a wildcard"),
    ],
)
def test_a_certificate_without_exactly_one_such_name_is_refused(
    kind: CertificateName, certificate: dict[str, Any], said: str
) -> None:
    found = CertificateNames(kind).identity(certificate)
    assert isinstance(found, AuthFailure)
    assert (found.method, said in found.message) == ("mtls", True)


def test_a_name_that_is_no_id_is_refused_as_is_anonymous() -> None:
    settings = default("http://h", auth={"mtls": {"id_prefix": "x:"}}).auth
    assert Methods.configured(settings).names == ()
    methods = Methods(mtls=CertificateNames("common_name"))
    for name in ("anonymous", "", "a\x00b", "x" * 257):
        assert isinstance(methods.certificate({"subject": ((("commonName", name),),)}), AuthFailure)
    found = methods.certificate({"subject": ((("commonName", "agent-1"),),)})
    assert isinstance(found, Principal)
    assert (found.id, found.method) == ("agent-1", "mtls")


# Proxies ------------------------------------------------------------------------------------------------


def proxies(*trusted: str) -> TrustedProxies:
    networks: list[Network] = ["unix" if each == "unix" else ipaddress.ip_network(each) for each in trusted]
    return TrustedProxies(networks)


@pytest.mark.parametrize(
    ("trusted", "believed", "others"),
    [
        (
            ["127.0.0.1"],
            ["127.0.0.1", "::ffff:127.0.0.1"],
            ["127.0.0.2", "::1", "unix", "", "127.0.0.1.evil"],
        ),
        (["10.1.0.0/16"], ["10.1.0.0", "10.1.255.255", "::ffff:10.1.2.3"], ["10.2.0.0", "::10.1.2.3"]),
        (["::1"], ["::1", "0:0:0:0:0:0:0:1"], ["127.0.0.1", "::2", "unix"]),
        (["fd00::/8"], ["fd12::1", "fd12::1%eth0"], ["fe80::1", "10.0.0.1"]),
        (["unix"], ["unix"], ["127.0.0.1", "", "unix:/run/x", "UNIX"]),
        (["unix", "10.0.0.1"], ["unix", "10.0.0.1"], ["10.0.0.2"]),
        ([], [], ["127.0.0.1", "unix", ""]),
    ],
)
def test_only_the_listed_peers_are_believed(
    trusted: list[str], believed: list[str], others: list[str]
) -> None:
    proxy = proxies(*trusted)
    for _ in range(2):  # the second time from memory
        assert [peer for peer in believed if not proxy.trusts(peer)] == []
        assert [peer for peer in others if proxy.trusts(peer)] == []


def test_what_is_remembered_of_peers_is_bounded() -> None:
    proxy = proxies("10.0.0.0/8")
    for number in range(MOST_PEERS + 10):
        assert proxy.trusts(str(ipaddress.ip_address("10.0.0.0") + number))
    assert len(proxy._known) <= MOST_PEERS


@pytest.mark.parametrize(
    ("ids", "groups", "expected"),
    [
        (["alice"], [], Identity(id="alice")),
        ([" alice\t"], [], Identity(id="alice")),
        (["alice"], [""], Identity(id="alice", groups=())),
        (["alice"], ["oncall"], Identity(id="alice", groups=("oncall",))),
        (
            ["alice"],
            ["on call, sre,,oncall ,\tsre,"],
            Identity(id="alice", groups=("on call", "sre", "oncall")),
        ),
    ],
)
def test_a_proxy_names_one_caller_and_groups_between_commas(
    ids: list[str], groups: list[str], expected: Identity
) -> None:
    assert proxies("unix").identity(ids, groups) == expected


@pytest.mark.parametrize(
    ("ids", "groups", "said"),
    [
        ([], [], "must name exactly one caller"),
        (["alice", "alice"], [], "must name exactly one caller"),
        (["root", "alice"], [], "must name exactly one caller"),
        # As a proxy on the way joins the header of a client and its own.
        (["root, alice"], [], "must name exactly one caller"),
        (["root,alice"], [], "must name exactly one caller"),
        (["alice"], ["a", "b"], "must stand there once"),
        (["alice"], ["a", "a"], "must stand there once"),
        (["alice"], ["a\x7fb"], "each group of the trusted proxy must be"),
        (["alice"], ["a,\udcff"], "each group of the trusted proxy must be"),
        (["alice"], ["x" * 257], "each group of the trusted proxy must be"),
    ],
)
def test_headers_that_can_be_read_in_two_ways_are_refused(
    ids: list[str], groups: list[str], said: str
) -> None:
    found = proxies("unix").identity(ids, groups)
    assert isinstance(found, AuthFailure)
    assert (found.method, said in found.message) == ("proxy", True)


@pytest.mark.parametrize("name", ["", " ", "anonymous", " anonymous ", "a\x00b", "\udcff", "x" * 257])
def test_a_proxy_that_names_nobody_is_refused(name: str) -> None:
    assert isinstance(Methods(proxy=proxies("unix")).proxied([name], []), AuthFailure)


@given(ids=st.lists(st.text(max_size=9), max_size=3), groups=st.lists(st.text(max_size=9), max_size=3))
def test_headers_of_any_text_are_an_identity_or_a_failure(ids: list[str], groups: list[str]) -> None:
    assert isinstance(proxies("unix").identity(ids, groups), Identity | AuthFailure)


@given(peer=st.text(max_size=20) | st.ip_addresses().map(str))
def test_a_peer_of_any_text_is_judged(peer: str) -> None:
    assert proxies("0.0.0.0/0", "::/0").trusts(peer) == _is_address(peer)


def _is_address(peer: str) -> bool:
    try:
        ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return False
    return True


# What is configured -------------------------------------------------------------------------------------


def test_the_methods_of_a_section_have_their_prefixes(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("served")
    settings = default(
        "http://h",
        data={"tls": pair.settings(client_ca_file=authority.certificate_file)},
        auth={
            "mtls": {"id": "dns", "id_prefix": "cert:"},
            "proxy": {"header": "X-User", "trusted": ["unix", "10.0.0.0/8"], "id_prefix": "proxy:"},
        },
    )
    methods = Methods.configured(settings.auth)
    assert methods.names == ("mtls", "proxy")
    by_certificate = methods.certificate({"subjectAltName": (("DNS", "a.test"),)})
    by_proxy = methods.proxied(["alice"], ["a, b"])
    assert isinstance(by_certificate, Principal)
    assert isinstance(by_proxy, Principal)
    assert (by_certificate.id, by_certificate.method) == ("cert:a.test", "mtls")
    assert (by_proxy.id, by_proxy.groups, by_proxy.method) == ("proxy:alice", ("a", "b"), "proxy")
