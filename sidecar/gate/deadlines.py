"""The outer deadline, which ends every gated request and every execution.

Each step has its own deadline: reading the body, the store, connecting, the backend's answer, writing it to
the client. These deadlines cover only the steps that can be expected to hang. A defect can hang elsewhere: an
answer was once refused after its step had been marked complete, so no deadline applied. The request hung, and
its execution kept its place until the gate was full.

One outer deadline therefore surrounds all steps and does not depend on any of them. It is the sum of the
inner deadlines and a margin, so that it never passes before an inner one:

1. `judging_seconds` limits a gated request until its execution begins, including refusals and their records.
   The data listener enforces it, and answers 503.
2. `executing_seconds` limits an execution, even if its client hangs up. The gate enforces it in `Gate._end`:
   the client is answered, the place in flight is freed, and the execution is settled. The outcome is
   `not_sent` if no byte was sent, and `unknown` otherwise. A long answer, which streams, has
   `streaming_seconds` from its head.
3. `answering_seconds` limits the writing of an answer. A client that exceeds it is disconnected.
4. After a pause of the whole process (`docker pause`, a suspended machine), all deadlines pass in one
   iteration of the event loop. The execution's deadline then takes precedence. Only the gate knows whether a
   byte was sent, and the data listener must not report that nothing was sent.
"""

from __future__ import annotations

from sidecar.gate.messages import GatedRequest
from sidecar.settings.sections import Settings

# The margin for a busy event loop, so that the inner deadlines always pass first.
MARGIN_SECONDS = 2.0


def judging_seconds(settings: Settings) -> float:
    """The time to read a gated request, judge it and record its refusal."""
    return settings.gate.body_timeout_seconds + settings.store.deadline_seconds + MARGIN_SECONDS


def response_seconds(request: GatedRequest) -> float:
    """The time for the backend's whole answer: the action's timeout, else the upstream's."""
    policies = request.snapshot.policies
    patience = request.snapshot.settings.upstream.response_timeout_seconds
    if policies is None:
        return patience
    action = request.facts.claims.action or ""
    entry = policies.actions.get(action) or policies.action(action)
    return (entry and entry.timeout_seconds) or patience


def executing_seconds(request: GatedRequest) -> float:
    """The time to admit, connect, read the whole answer and settle."""
    settings = request.snapshot.settings
    connect = settings.upstream.connect_timeout_seconds
    return 2 * settings.store.deadline_seconds + connect + response_seconds(request) + MARGIN_SECONDS


def streaming_seconds(settings: Settings, backend_seconds: float, client_seconds: float) -> float:
    """The time for the rest of a long answer: the backend's remaining time, the client's, and settlement."""
    return backend_seconds + client_seconds + settings.store.deadline_seconds + MARGIN_SECONDS


def answering_seconds(request: GatedRequest) -> float:
    """The time to write a long answer to its client while it arrives, and to flush it at its end."""
    seconds, patience = response_seconds(request), client_seconds(request)
    return streaming_seconds(request.snapshot.settings, seconds, 2 * patience)


def client_seconds(request: GatedRequest) -> float:
    """The total time that a slow client may delay a long answer."""
    return max(response_seconds(request), request.snapshot.settings.upstream.response_timeout_seconds)
