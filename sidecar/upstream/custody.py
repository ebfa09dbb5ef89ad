"""Custody: the sidecar holds the credentials for the backend, and its callers do not.

1. The value of a credential is read from its file at the start, and again when the file changes. A change
   counts once two looks in a row have found the same, because a file that is being written may be empty, or
   hold a part.
2. If the file is missing, empty or wrong, its credential is unavailable: requests that need it are refused
   before they consume anything. A request that was let through before that is sent with the last value.
3. The value stands nowhere else: `repr` hides it, and no message contains it.
4. A backend may send it back. Such an answer passes on, but is counted, and is not kept for a repeat. This
   holds for the values before it, too, because requests that were sent with them may still be under way.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Sequence

from sidecar.core.targetheaders import read_as
from sidecar.errors import Refusal
from sidecar.files import keyfiles
from sidecar.files.keyfiles import KeyFileUnusable
from sidecar.settings.credentials import CredentialArea, CredentialSection
from sidecar.telemetry.events import LogEvent
from sidecar.upstream._head import AnswerHead

Headers = Sequence[tuple[bytes, bytes]]

# What stands for a credential in a text of the backend that is recorded.
HIDDEN = "[credential]"

LOOK_SECONDS = 0.5
# A shorter text turns up in answers by chance.
LEAST_SECRET_BYTES = 8
# The values before the present one that are still looked for.
MOST_PAST = 16
# The scheme before a credential (RFC 9110, section 11.1), which is no secret.
_SCHEME = re.compile(rb"[A-Za-z][A-Za-z0-9-]*")


class _Credential:
    """One credential: the last good value of its file, and why it cannot be read now, if it cannot."""

    __slots__ = ("_found", "_past", "file", "header", "on", "trouble", "value")

    def __init__(self, section: CredentialSection) -> None:
        self.header, self.file, self.on = section.header, section.value_file, section.on
        self.value = keyfiles.header_value(section.value_file)
        self.trouble: str | None = None
        self._found: bytes | str = self.value
        self._past: deque[bytes] = deque(maxlen=MOST_PAST)

    def __repr__(self) -> str:
        return f"_Credential({self.header!r}, {str(self.file)!r})"

    @property
    def secrets(self) -> frozenset[bytes]:
        """What is secret in the value, and in those before it."""
        return frozenset(text for value in (self.value, *self._past) for text in _secrets_in(value))

    def look(self) -> bool:
        """Read the file. True if what it says is new, and is what the look before has found. Blocks."""
        found: bytes | str
        try:
            found = keyfiles.header_value(self.file)
        except KeyFileUnusable as exc:
            found = str(exc)
        rests, self._found = found == self._found, found
        return rests and found != (self.value if self.trouble is None else self.trouble)

    def adopt(self) -> None:
        """Count what the last look has found."""
        if isinstance(self._found, bytes):
            if self._found != self.value:
                self._past.append(self.value)
            self.value, self.trouble = self._found, None
            LogEvent.CREDENTIAL_RENEWED.log(header=self.header)
        else:
            self.trouble = self._found
            LogEvent.CREDENTIAL_LOST.log(header=self.header, cause=self.trouble)


def _secrets_in(value: bytes) -> Sequence[bytes]:
    """The texts by which a value is recognised: its words without a scheme, as in `Bearer abc`, and the whole
    value where that is more."""
    scheme, *words = value.split()
    if not words or not _SCHEME.fullmatch(scheme):
        words = [scheme, *words]
    found = [word for word in words if len(word) >= LEAST_SECRET_BYTES]
    return found if len(words) == len(found) == 1 else [value, *found]


class Carried:
    """The credentials that go with the requests of one area."""

    __slots__ = ("_names", "_pairs", "_secrets", "trouble")

    def __init__(self, credentials: Iterable[_Credential]) -> None:
        held = tuple(credentials)
        self._pairs = tuple((each.header.encode(), each.value) for each in held)
        self._names = frozenset(read_as(each.header) for each in held)
        # The longest first, so that a part is not hidden before the whole.
        self._secrets = sorted({text for each in held for text in each.secrets}, key=len, reverse=True)
        lost = next((each for each in held if each.trouble is not None), None)
        self.trouble = None if lost is None else _unavailable(lost.header)

    def __repr__(self) -> str:
        return f"Carried({sorted(self._names)})"

    def put(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """The headers with the credentials in the place of what came under their names."""
        kept = [pair for pair in headers if read_as(pair[0].decode("latin-1")) not in self._names]
        return [*kept, *self._pairs]

    def is_echoed(self, head: AnswerHead, body: bytes) -> bool:
        """Whether a whole answer contains a credential."""
        echo = self.listening(head)
        echo.hear(body)
        return echo.heard

    def listening(self, head: AnswerHead) -> Echo:
        """What finds a credential in an answer with this head, whose body arrives in pieces."""
        return Echo(self._secrets, head)

    def hidden(self, text: str) -> str:
        """A text of the backend without the credentials in it."""
        for secret in self._secrets:
            text = text.replace(secret.decode("utf-8", "surrogateescape"), HIDDEN)
        return text


class Echo:
    """Finds a credential in an answer, also across two pieces of its body. `heard` says whether it has."""

    __slots__ = ("_overlap", "_rest", "_secrets", "heard")

    def __init__(self, secrets: Sequence[bytes], head: AnswerHead) -> None:
        self._secrets = secrets
        self._overlap = max(map(len, secrets)) - 1
        self._rest = b""
        texts = (head.reason, *(text for pair in head.headers for text in pair))
        self.heard = any(secret in text for secret in secrets for text in texts)

    def hear(self, piece: bytes) -> None:
        """Look at the next piece of the body."""
        if not self.heard:
            text = self._rest + piece
            self.heard = any(secret in text for secret in self._secrets)
            self._rest = text[max(0, len(text) - self._overlap) :]


class Custody:
    """The credentials of `upstream.credentials`, by the areas where they are sent; None where none is.

    Raises KeyFileUnusable if a file cannot be used at the start.
    """

    def __init__(self, sections: Sequence[CredentialSection]) -> None:
        self._credentials = [_Credential(section) for section in sections]
        self.reading = False  # whether a thread reads files; it may outlive the task that waited for it
        self.gated: Carried | None = None
        self.passing: Carried | None = None
        self._carry()

    def _carry(self) -> None:
        self.gated, self.passing = self._of("gated"), self._of("pass")

    def _of(self, area: CredentialArea) -> Carried | None:
        held = [each for each in self._credentials if area in each.on]
        return Carried(held) if held else None

    @property
    def holds(self) -> bool:
        """Whether any credential is in custody."""
        return bool(self._credentials)

    @property
    def trouble(self) -> str | None:
        """Which credentials cannot be read, and why; None if all can."""
        lost = [each for each in self._credentials if each.trouble is not None]
        found = (f"the file of the credential {each.header} {each.trouble}" for each in lost)
        return "; ".join(found) or None

    async def watch(self) -> None:
        """Read the files now and then until cancelled."""
        while self._credentials:
            await asyncio.sleep(LOOK_SECONDS)
            changed = await asyncio.to_thread(self._look)
            for each in changed:
                each.adopt()
            if changed:
                self._carry()

    def _look(self) -> list[_Credential]:
        self.reading = True
        try:
            return [each for each in self._credentials if each.look()]
        finally:
            self.reading = False


NO_CUSTODY = Custody(())


def _unavailable(header: str) -> Refusal:
    return Refusal(
        "credential_unavailable",
        f"The credential {header} for the backend cannot be read, so nothing is sent.",
        {"header": header},
    )
