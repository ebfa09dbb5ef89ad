"""Granting and revoking scopes, and explaining executions. The core makes all decisions."""

from __future__ import annotations

from dataclasses import replace

from sidecar.core.bounds import incomplete
from sidecar.core.command import Admit, Denied, Issue, Issued, Refuse, Reply, Revoke, Revoked
from sidecar.core.granting import granted
from sidecar.core.rules import Objection
from sidecar.core.scope import Scope
from sidecar.errors import Refusal, StoreUnavailable
from sidecar.gate.execution import Gate
from sidecar.gate.messages import Prediction, Refused, RequestFacts
from sidecar.gate.observer import Observer
from sidecar.ids import new_decision_id
from sidecar.live.snapshot import Snapshot
from sidecar.store.batch import Store, freeze_on, predicted


class Grants:
    """The operations of the scope endpoints and of `explain`."""

    def __init__(self, *, store: Store, gate: Gate, observer: Observer) -> None:
        self._store = store
        self._gate = gate
        self._observer = observer

    async def issue(
        self, scope: Scope, ttl_seconds: int, defaulted: frozenset[str], facts: RequestFacts
    ) -> Issued | Refused:
        """Grant a scope if the policies allow it. `defaulted` names the terms that the request omitted."""
        assert facts.policies is not None
        command = Issue(
            decision_id=new_decision_id(),
            scope=scope,
            ttl=ttl_seconds,
            defaulted=defaulted,
            policies=facts.policies,
            request_id=facts.request_id or None,
            principal=facts.principal,
        )
        # The rules judge here and not in the writer, because all commands wait for the writer.
        command = replace(command, judged=granted(command, self._store.now()))
        reply = await self._submit(command, facts)
        assert isinstance(reply, Issued | Refused)
        return reply

    async def revoke(
        self, scope_id: str, facts: RequestFacts, *, own_only: bool = False
    ) -> Revoked | Refused:
        """Revoke a scope. With `own_only`, it must be one that the same principal asked for."""
        command = Revoke(
            decision_id=new_decision_id(),
            scope_id=scope_id,
            policy_revision=None if facts.policies is None else facts.policies.revision,
            tenant_id=facts.tenant_id,
            request_id=facts.request_id or None,
            principal=facts.principal,
            own_only=own_only,
        )
        reply = await self._submit(command, facts)
        assert isinstance(reply, Revoked | Refused)
        return reply

    async def _submit(self, command: Issue | Revoke, facts: RequestFacts) -> Reply | Refused:
        refusals = self._gate.refusals
        try:
            reply = await refusals.submit(command, late=self._gate.give_back)
        except StoreUnavailable as exc:
            return await refusals.unconfirmed(exc, facts)
        if isinstance(reply, Denied):
            return await refusals.denied(reply, facts)
        self._observer.allowed(facts, reply.shadow if isinstance(reply, Issued) else ())
        return reply

    async def explain(self, facts: RequestFacts, snapshot: Snapshot, *, shadow: bool) -> Prediction:
        """Predict the decision on an execution with the same judgment. `shadow` is true on a shadow route.

        It consumes and records nothing (G10). Raises StoreUnavailable.
        """
        unready = self._gate.unready_to_send(snapshot)
        if unready is not None or snapshot.policies is None:
            return Prediction(refusal=unready.refusal if unready else None)
        missing = incomplete(facts.claims) if shadow else None
        if missing is not None:
            return await self.unread(missing, facts, snapshot, shadow=True)
        command = Admit(
            decision_id=new_decision_id(),
            claims=facts.claims,
            policies=snapshot.policies,
            tenant_id=facts.tenant_id,
            principal=facts.principal,
            route=facts.route,
            scope_required_from=snapshot.settings.gate.scope_required_from,
            shadow=shadow,
        )
        now = self._store.now()
        found = await predicted(self._store.engine, command, now)
        scope = found.case.scope
        mine = scope is not None and scope.tenant_id == facts.tenant_id
        return Prediction(
            refusal=found.refusal,
            scope=scope if mine else None,
            scope_required=found.waived is None,
            hold=found.case.hold,
            shadow=found.shadow,
            uses=found.uses,
            now=now,
        )

    async def unread(
        self, refusal: Refusal, facts: RequestFacts, snapshot: Snapshot, *, shadow: bool
    ) -> Prediction:
        """Explain a request that cannot be judged. It is refused, or passed through on a shadow route unless
        a freeze holds. Raises StoreUnavailable."""
        if not shadow:
            return Prediction(refusal=refusal)
        unready = self._gate.unready_to_send(snapshot)
        if unready is not None:
            return Prediction(refusal=unready.refusal)
        command = Refuse(
            decision_id=new_decision_id(),
            refusal=refusal,
            claims=facts.claims,
            tenant_id=facts.tenant_id,
            principal=facts.principal,
            route=facts.route,
            shadow=True,
        )
        frozen = await freeze_on(self._store.engine, command, self._store.now())
        if frozen is not None:
            return Prediction(refusal=frozen)
        return Prediction(refusal=None, shadow=(Objection(refusal, None, shadow=True),))
