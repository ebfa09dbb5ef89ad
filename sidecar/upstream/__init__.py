"""Nothing is sent twice, and nothing that may have left is ever called unsent.

HTTP/1.1 towards the one upstream: an asyncio Protocol, with llhttp as its parser (httptools). Target,
header names, values and their order go out and come back byte for byte; no redirect is followed and
nothing is retried. The errors say what can be proven: `NotSent` until the one write that begins a
request, `Unanswered` from then on, whatever goes wrong. Over TCP, TLS or a Unix socket. No pipelining;
trailers and interim answers are dropped.
"""

from sidecar.upstream.answer import Failed, Head, NotSent, TimedOut, Unanswered
from sidecar.upstream.client import Secured, Upstream
from sidecar.upstream.exchange import Exchange

__all__ = ["Exchange", "Failed", "Head", "NotSent", "Secured", "TimedOut", "Unanswered", "Upstream"]
