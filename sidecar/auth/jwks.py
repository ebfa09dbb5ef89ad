"""The public keys of an issuer: a JSON Web Key Set (RFC 7517) in a file, or behind an https URL.

1. The set is read again in the background: a file when it changes, a URL every few minutes. The last good set
   stays in force until there is a better one.
2. A set with a secret in it is refused as a whole: a private key or a shared secret that was published proves
   nothing any more.
3. A key that cannot verify a signature here is ignored, as RFC 7517 wants it: a key for encryption, of an
   unknown type, or too short. A set without any other key is refused.
4. Each key verifies only the algorithms of its own type.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
from jwt.algorithms import get_default_algorithms
from jwt.exceptions import InvalidKeyError

from sidecar.core.facts import is_identifier
from sidecar.files import foreign
from sidecar.files.faults import ConfigurationError, Fault, shown
from sidecar.files.tls import TlsFileUnusable, client_context, describe_failure
from sidecar.files.yamlfile import Document, contents
from sidecar.telemetry.events import LogEvent
from sidecar.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from jwt.algorithms import AllowedPublicKeys

# A set of a dozen keys with their certificates takes some 20 KiB.
MAX_BYTES = 256 * 1024
# An RSA key below 2048 bits is too weak (RFC 7518, section 3.3). A very long one is slow to verify with.
RSA_BITS = range(2048, 8193)

# The algorithms of each type of key, by `kty` and `crv`.
_ALGORITHMS: dict[tuple[str, str | None], frozenset[str]] = {
    ("RSA", None): frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
    ("OKP", "Ed448"): frozenset({"EdDSA"}),
}
# The members of private keys and of shared secrets.
_SECRETS = ("d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv")


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """One public key, and the algorithms that it verifies. `kid`: its name in the set, if it has one."""

    kid: str | None
    key: AllowedPublicKeys
    algorithms: frozenset[str]


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable keys of a set, and for each other key why it is ignored."""

    keys: tuple[IssuerKey, ...] = ()
    ignored: tuple[str, ...] = ()


NO_KEYS = KeySet()


# Reading a set ------------------------------------------------------------------------------------------


def parse(raw: bytes, name: str) -> KeySet:
    """The keys of a set. `name` is its file or URL, for messages, which never repeat a part of a key.

    Raises ConfigurationError.
    """
    if len(raw) > MAX_BYTES:
        raise _error(name, f"is larger than {MAX_BYTES} bytes, so it is no JSON Web Key Set")
    if raw.lstrip()[:1] != b"{":
        raise _error(name, 'is no JSON Web Key Set; it must be JSON of the form {"keys": [...]}')
    document = foreign.parse(raw, name)
    entries = document.value.get("keys")
    if not isinstance(entries, list):
        raise _error(document.place(("keys",)), 'is no JSON Web Key Set; it must have a list "keys"')
    return _set_of(entries, document)


def read(file: Path) -> KeySet:
    """The keys of a file. Blocks. Raises ConfigurationError."""
    return parse(contents(file), str(file))


def _set_of(entries: list[Any], document: Document) -> KeySet:
    keys: list[IssuerKey] = []
    faults: list[Fault] = []
    ignored: list[str] = []
    taken: set[tuple[str | None, str]] = set()
    for index, entry in enumerate(entries):
        place = document.place(("keys", index))
        fault = _fault(entry)
        if fault is not None:
            faults.append(Fault(place, "", fault))
            continue
        found = _key(entry)
        if isinstance(found, str):
            ignored.append(f"{place}: {found}")
            continue
        names = {(found.kid, algorithm) for algorithm in found.algorithms}
        if found.kid is not None and names & taken:
            faults.append(Fault(place, "", f"another key of the set is also called {shown(found.kid)}"))
        taken |= names
        keys.append(found)
    if not keys and not faults:
        reasons = "".join(f"; {each}" for each in ignored)
        faults.append(Fault(document.place(("keys",)), "", f"has no key that verifies signatures{reasons}"))
    if faults:
        raise ConfigurationError(faults)
    return KeySet(tuple(keys), tuple(ignored))


def _fault(entry: object) -> str | None:
    """Why an entry makes the whole set unusable, if it does."""
    if not isinstance(entry, dict):
        return "must be a JSON object"
    secret = "k" if entry.get("kty") == "oct" else next((name for name in _SECRETS if name in entry), None)
    if secret is not None:
        return f"holds a secret (member {secret}); publish public keys only, and replace this one"
    kid = entry.get("kid")
    return None if kid is None or is_identifier(kid) else "has a kid that is no text of 1 to 256 characters"


def _key(entry: dict[str, Any]) -> IssuerKey | str:
    """The key of an entry, or why it is ignored."""
    kty = entry.get("kty")
    named = (kty, None if kty == "RSA" else entry.get("crv"))
    fitting = next((found for each, found in _ALGORITHMS.items() if each == named), None)
    operations = entry.get("key_ops")
    if entry.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return "is not for verifying signatures"
    if fitting is None:
        return "is of a type that is not known here"
    if "alg" in entry:
        fitting &= {entry["alg"]} if isinstance(entry["alg"], str) else frozenset()
        if not fitting:
            return "is for an algorithm that does not fit its type"
    try:
        key = get_default_algorithms()[min(fitting)].from_jwk(entry)
    except (InvalidKeyError, ValueError, TypeError, KeyError, AttributeError):
        return "is not a well-formed key of its type"
    if kty == "RSA" and key.key_size not in RSA_BITS:
        return f"has {key.key_size} bits, and needs {RSA_BITS[0]} to {RSA_BITS[-1]}"
    return IssuerKey(entry.get("kid"), key, fitting)


def _error(place: str, message: str) -> ConfigurationError:
    return ConfigurationError([Fault(place, "", message)])


# Keeping it up to date ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """The times of `IssuerKeys`, in seconds."""

    look: float = 1.0  # between two looks at a file
    fetch: float = 300.0  # between two fetches of a URL
    timeout: float = 5.0  # for one fetch
    retry: float = 5.0  # after a failed fetch, and twice as long after each further one
    max_retry: float = 60.0
    unknown: float = 60.0  # between two fetches because of a kid that is not in the set


class IssuerKeys:
    """The keys in force, from `source`: an https URL, or the path of a file.

    `start` reads them for the first time, and then a task keeps them up to date until `close`. `on_change` is
    called whenever other keys are in force.
    """

    def __init__(
        self,
        source: str,
        *,
        metrics: Metrics,
        ca_file: Path | None = None,
        times: Times = Times(),
    ) -> None:
        self.keys = NO_KEYS
        self.on_change: Callable[[], object] | None = None
        self.reading = False  # whether a thread reads a file; it may outlive the task that waited for it
        self._source = source
        self._file = None if source.startswith("https://") else Path(source)
        self._metrics = metrics
        self._ca_file = ca_file
        self._times = times
        self._digest = b""  # of the set in force
        self._seen = b""  # of what the last look at the file found
        self._failures = 0  # in a row
        self._wanted = asyncio.Event()
        self._not_before = float("-inf")  # the time of the next fetch because of an unknown kid
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the keys, and keep them up to date from now on.

        Raises ConfigurationError if a file cannot be used. A URL that does not answer is not an error: its
        keys come later.
        """
        if self._file is not None:
            raw = await asyncio.to_thread(self._read, self._file)
            self._seen = sha256(raw).digest()
            await self._adopt(raw)
        else:
            await self.fetch()
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def find(self, kid: str | None, algorithm: str) -> IssuerKey | str:
        """The key that verifies a token, or why there is none. An unknown `kid` brings a fetch forward."""
        keys = self.keys.keys
        if not keys:
            return "no key of its issuer is known, because the key set could not be read so far"
        if kid is None:
            if len(keys) > 1:
                return "it names no key (kid), and its issuer has more than one"
            named = keys
        else:
            named = tuple(key for key in keys if key.kid == kid)
            if not named:
                self._want()
                return "its issuer has no key of this name (kid)"
        found = next((key for key in named if algorithm in key.algorithms), None)
        return "its algorithm does not fit its key" if found is None else found

    def _want(self) -> None:
        """Fetch soon, unless that was done lately. A caller cannot make the sidecar fetch more often."""
        now = time.monotonic()
        if self._file is None and now >= self._not_before:
            self._not_before = now + self._times.unknown
            self._wanted.set()

    async def _keep(self) -> None:
        while True:
            if self._file is not None:
                await asyncio.sleep(self._times.look)
                await self.look(self._file)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wanted.wait()
            self._wanted.clear()
            await self.fetch()

    def _pause(self) -> float:
        """The time to the next fetch."""
        times = self._times
        if not self._failures:
            return times.fetch
        return min(times.max_retry, times.retry * 2.0 ** min(self._failures - 1, 16))

    async def look(self, file: Path) -> None:
        """Look at the file, and take its keys if it has changed since the last look."""
        try:
            raw: bytes | None = await asyncio.to_thread(self._read, file)
            cause = None
        except ConfigurationError as exc:
            raw, cause = None, exc
        seen = sha256(raw if raw is not None else str(cause).encode("utf-8", "surrogateescape")).digest()
        if seen == self._seen:
            return
        self._seen = seen
        if raw is None:
            self._failed(str(cause))
            return
        try:
            await self._adopt(raw)
        except ConfigurationError as exc:
            self._failed(str(exc))

    def _read(self, file: Path) -> bytes:
        self.reading = True
        try:
            return contents(file)
        finally:
            self.reading = False

    async def fetch(self) -> None:
        """Fetch the keys of the URL. A failure leaves those in force, and is logged."""
        try:
            await self._adopt(await self._fetched())
        except TimeoutError:
            self._failed(f"{self._source}: no whole answer within {self._times.timeout:g} s")
        except aiohttp.ClientConnectorCertificateError as exc:
            self._failed(f"{self._source}: {describe_failure(exc.certificate_error)}")
        except aiohttp.ClientConnectorError as exc:
            self._failed(f"{self._source}: {describe_failure(exc.os_error)}")
        except (aiohttp.ClientError, OSError) as exc:
            self._failed(f"{self._source}: {shown(str(exc) or type(exc).__name__, 200)}")
        except TlsFileUnusable as exc:
            self._failed(f"auth.jwt.{exc}")
        except ConfigurationError as exc:
            self._failed(str(exc))
        except Exception as exc:  # a defect of the sidecar must not end the fetching
            self._failures += 1
            self._metrics.jwt_key_failures.inc()
            LogEvent.ISSUER_KEYS_FAILED.log(exc=exc)

    async def _fetched(self) -> bytes:
        # A new context each time, so that renewed authorities count. Reading them blocks.
        context = await asyncio.to_thread(client_context, self._ca_file)
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, force_close=True),
                timeout=aiohttp.ClientTimeout(total=self._times.timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a small answer could otherwise become a large one
            ) as session,
            session.get(
                self._source,
                allow_redirects=False,  # the operator trusts this address, and no other one
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            ) as answer,
        ):
            if answer.status != 200:
                redirect = "; redirects are not followed" if 300 <= answer.status < 400 else ""
                raise _error(self._source, f"the answer has the status {answer.status}{redirect}")
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > MAX_BYTES:
                    break  # `parse` refuses it
            return bytes(body)

    async def _adopt(self, raw: bytes) -> None:
        """Put the keys of a set in force. Raises ConfigurationError."""
        digest = sha256(raw).digest()
        if digest != self._digest:
            self.keys = await asyncio.to_thread(parse, raw, self._source)
            self._digest = digest
            self._metrics.jwt_keys.set(len(self.keys.keys))
            if self.on_change is not None:
                self.on_change()
        elif not self._failures:
            return
        self._failures = 0
        LogEvent.ISSUER_KEYS_IN_FORCE.log(count=len(self.keys.keys), ignored=self.keys.ignored)

    def _failed(self, cause: str) -> None:
        self._failures += 1
        self._metrics.jwt_key_failures.inc()
        event = LogEvent.ISSUER_KEYS_KEPT if self.keys.keys else LogEvent.ISSUER_KEYS_MISSING
        event.log(cause=cause)
