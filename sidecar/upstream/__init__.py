"""The HTTP/1.1 client for the upstream. It sends a request at most once, and reports no sent byte as unsent.

The client is an asyncio Protocol with llhttp (httptools) as its parser. It connects over TCP, TLS or a Unix
socket. It passes the target and the header names, values and order on byte for byte, in both directions. It
follows no redirects, retries nothing and does not pipeline. It drops trailers and interim answers.

The errors say what can be proven. A failure before the one write that begins a request raises `NotSent`.
Every failure from that write on raises `Unanswered`.
"""

from sidecar.upstream._answer import Failed, NotSent, TimedOut, Unanswered
from sidecar.upstream._client import Upstream, UpstreamTls
from sidecar.upstream._exchange import Exchange
from sidecar.upstream._head import AnswerHead

__all__ = ["Exchange", "Failed", "AnswerHead", "NotSent", "UpstreamTls", "TimedOut", "Unanswered", "Upstream"]
