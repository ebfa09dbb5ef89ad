"""One request on the data listener, with the facts for its line in the access log."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Literal

from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from sidecar.core.principal import ANONYMOUS
from sidecar.core.shortid import shortened_path
from sidecar.telemetry.tracing import NO_TRACE, Trace
from sidecar.web.wire.headers import HeaderFields

if TYPE_CHECKING:
    from sidecar.web.serving.dataconnection import DataConnection

MAX_PATH_CHARS = 512
# A target that is not a path begins with a host. So does a target that begins with two slashes.
_AUTHORITY = re.compile(r"(?P<before>(?:[^/?#]*:)?//+|(?!/))(?:[^/?#]*@)?")
# The pattern matches any number of encodings, because a backend that decodes all of them reads a query there.
_QUERY = re.compile(r"[?#]|%(?:25)*(?:3f|23)", re.IGNORECASE)


class DataRequest:
    """A request as aiohttp's parser read it. It has the attributes of `web.BaseRequest` that are used here.

    The handler that answers the request sets the facts for its log line: `outcome`, the ids, `status`, and
    how much of an answer was sent.
    """

    __slots__ = (
        "_message",
        "_path",
        "access_log",
        "answering",
        "begun",
        "body_exists",
        "content",
        "decision_id",
        "fields",
        "head_sent",
        "keep_alive",
        "method",
        "outcome",
        "principal",
        "protocol",
        "raw_headers",
        "request_id",
        "route",
        "scope_id",
        "sent",
        "status",
        "target",
        "trace",
        "trace_id",
        "version",
        "withheld",
    )

    def __init__(
        self, protocol: DataConnection, message: RawRequestMessage, content: StreamReader = EMPTY_PAYLOAD
    ) -> None:
        self.protocol = protocol
        self._message = message  # checks that all listeners share read the raw target from it
        self.method = message.method
        self.target = message.path  # as it came; bytes that are not UTF-8 are surrogates
        self.version = message.version
        self.raw_headers = message.raw_headers
        self.fields = HeaderFields(message.raw_headers)
        self.content = content
        self.body_exists = content is not EMPTY_PAYLOAD
        self.keep_alive = not message.should_close  # the connection goes on after the answer
        self.answering = False  # bytes of the answer were handed to the transport

        self.principal = ANONYMOUS
        self.withheld = self.fields.credential  # the places of headers that do not go on to the backend
        self.begun = time.perf_counter()
        self._path: str | None = None
        self.access_log: str | None = None  # the setting when the request began
        self.route: Literal["gated", "scopes", "reports", "passed"] | None = "passed"  # None: unparsable
        self.status: int | None = None  # of the answer; None: there is none
        self.outcome: str | None = None
        self.request_id: str | None = None
        self.decision_id: str | None = None
        self.scope_id: str | None = None
        self.trace_id: str | None = None
        self.trace: Trace = NO_TRACE
        self.head_sent = False
        self.sent = 0  # bytes of the answer's body

    @property
    def transport(self) -> asyncio.Transport | None:
        """The transport; None once the client is gone."""
        return self.protocol.transport

    @property
    def path(self) -> str:
        """The path as records show it."""
        if self._path is None:
            self._path = shown_path(self.target)
        return self._path

    @property
    def logged_path(self) -> str:
        """The path as logs and traces show it: each scope_id in it has its short form."""
        short = shortened_path(self.target)
        # The path is cut after its ids are shortened, because a part of an id would not look like one.
        return self.path if short == self.target else shown_path(short)

    @property
    def content_length(self) -> int | None:
        """The declared length of the body."""
        declared = self.fields.text(b"content-length")
        return None if declared is None else int(declared)

    def whole_body(self) -> bytes | None:
        """Take the rest of the body. None: more of it is to come, or the body is broken."""
        content = self.content
        if not content.is_eof() or content.exception() is not None:
            return None
        return content.read_nowait()


def shown_path(target: str) -> str:
    """A raw target without its query, fragment and user, which may be secrets, cut to MAX_PATH_CHARS."""
    if target[:1] != "/" or target[:2] == "//":
        authority = _AUTHORITY.match(target)
        if authority is not None:
            target = authority["before"] + target[authority.end() :]
    if "%" in target or "#" in target:
        return _QUERY.split(target, maxsplit=1)[0][:MAX_PATH_CHARS]
    return target.partition("?")[0][:MAX_PATH_CHARS]
