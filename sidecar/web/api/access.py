"""Who may call what on the admin listener: the caller of each call, and the role that its row asks for."""

from __future__ import annotations

from aiohttp import web

from sidecar.core.command import RequestLine
from sidecar.core.principal import ANONYMOUS, Principal
from sidecar.errors import Refusal
from sidecar.gate.messages import RequestFacts
from sidecar.gate.refusal_log import RefusalLog
from sidecar.live.snapshot import Live
from sidecar.web.api.operation import Operation
from sidecar.web.serving.identity import Identities
from sidecar.web.serving.roles import lacking
from sidecar.web.wire.headers import fields_of
from sidecar.web.wire.problem import refused_problem
from sidecar.web.wire.request import request_id_of, shown_tenant

_ASKING = web.RequestKey("asking", Principal)


def asking(request: web.Request) -> Principal:
    """The principal that asks, which `Access` has found out."""
    found: Principal = request.get(_ASKING, ANONYMOUS)
    return found


class Access:
    """Finds out who asks, and refuses the caller that may not make a call. Each refusal is recorded."""

    def __init__(self, identities: Identities, refusals: RefusalLog, live: Live) -> None:
        self._identities = identities
        self._refusals = refusals
        self._live = live

    async def check(self, request: web.Request, operation: Operation) -> web.Response | None:
        """The answer to a caller that may not make the call, else None."""
        snapshot = self._live.snapshot
        if not snapshot.methods.names:
            return None
        found = self.identify(request)
        refusal = found if isinstance(found, Refusal) else lacking(found, snapshot, *operation.roles)
        if refusal is None:
            return None
        return await self._refuse(request, refusal)

    def identify(self, request: web.Request) -> Principal | Refusal:
        """The principal that asks, or why it is not known."""
        found = self._identities.of(
            fields_of(request), request.transport, self._live.snapshot, place="call", area=None
        )
        if isinstance(found, Principal):
            request[_ASKING] = found
        return found

    async def _refuse(self, request: web.Request, refusal: Refusal) -> web.Response:
        snapshot, principal = self._live.snapshot, asking(request)
        fields = fields_of(request)
        facts = RequestFacts(
            gatekept="access",
            tenant_id=shown_tenant(principal, fields, snapshot.settings.gate.tenant_header),
            request_id=request_id_of(fields),
            principal=principal,
            policies=snapshot.policies,
            line=RequestLine(request.method, request.path),
        )
        return refused_problem(await self._refusals.refuse(refusal, facts), facts.request_id)
