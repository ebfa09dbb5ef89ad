"""The outer deadline, which ends every gated request and every execution.

Each step has a bound of its own: reading the body, the store, connecting, the backend's answer, writing it to
the client. But such a bound holds only where its author foresaw what can hang. Once an answer was refused in
a step that had already called it complete; no bound was left to end it, so its request hung, its execution
stayed in flight and its place was lost, until the gate was full.

So there is one more bound around all of them, which knows nothing of what is inside. It is the sum of the
others and a margin, so that it never comes before one of them:

1. `judging_seconds` bounds a gated request until its execution begins, refusals and their records included.
   The data listener keeps it, and answers 503.
2. `executing_seconds` bounds an execution, whether its client stays or not. The gate keeps it, in
   `Gate._end`: the client is answered, the place in flight is free, and the execution is settled, as
   `not_sent` where no byte was sent and as `unknown` otherwise. A long answer, which streams, is given
   `streaming_seconds` from its head on.
3. `answering_seconds` bounds the writing of an answer to its client, who is cut off.
4. After a pause of the whole process (`docker pause`, a suspended machine) all of them pass in one turn of
   the event loop. Then that of the execution counts: only the gate knows whether a byte was sent, and the
   data listener must not say that nothing was.
"""

from __future__ import annotations

from sidecar.gate.messages import Judged
from sidecar.settings.sections import Settings

# For a loop that is busy, so that the bound inside is always the one that ends things.
MARGIN_SECONDS = 2.0


def judging_seconds(settings: Settings) -> float:
    """To read a gated request, judge it and record its refusal."""
    return settings.gate.body_timeout_seconds + settings.store.deadline_seconds + MARGIN_SECONDS


def response_seconds(judged: Judged) -> float:
    """What the backend may take for the whole answer: the action's timeout, else the upstream's."""
    policies = judged.terms.policies
    action = policies.actions.get(judged.claims.action or "") if policies else None
    patience = judged.terms.settings.upstream.response_timeout_seconds
    return (action and action.timeout_seconds) or patience


def executing_seconds(judged: Judged) -> float:
    """To admit, connect, get the whole answer and settle."""
    settings = judged.terms.settings
    connect = settings.upstream.connect_timeout_seconds
    return 2 * settings.store.deadline_seconds + connect + response_seconds(judged) + MARGIN_SECONDS


def streaming_seconds(settings: Settings, backend_seconds: float, client_seconds: float) -> float:
    """For the rest of a long answer: what the backend has left, what its client may take, and settling."""
    return backend_seconds + client_seconds + settings.store.deadline_seconds + MARGIN_SECONDS


def answering_seconds(judged: Judged) -> float:
    """To write a long answer to its client while it comes in, and what waits for the client at its end."""
    seconds, patience = response_seconds(judged), client_seconds(judged)
    return streaming_seconds(judged.terms.settings, seconds, 2 * patience)


def client_seconds(judged: Judged) -> float:
    """What a client that reads slowly may hold up a long answer, in all."""
    return max(response_seconds(judged), judged.terms.settings.upstream.response_timeout_seconds)
