"""The reload call of the admin listener. The answer lists the changes, or every error in the files."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from sidecar.errors import Refusal
from sidecar.live.reload import Reload, Reloader
from sidecar.web.wire.problem import answer, problem


class ReloadApi:
    """A handler of the admin listener. It reloads as SIGHUP does, and waits until the reload has ended."""

    def __init__(self, reloader: Reloader) -> None:
        self._reloader = reloader

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/api/v1/reload", self._reload)]

    def last(self) -> dict[str, Any]:
        """The last reload, or the start if there was none, as `status` shows it."""
        return self._reloader.last.to_dict()

    async def _reload(self, request: web.Request) -> web.Response:
        del request
        reload = await self._reloader.reload("call")
        if reload.errors:
            return problem(_refusal(reload))
        policies = reload.terms.policies
        return answer(
            {
                "policy_revision": policies.revision if policies else None,
                "config_revision": reload.terms.revision,
                "changed": list(reload.changed),
                "shadowed": list(reload.shadowed),
            }
        )


def _refusal(reload: Reload) -> Refusal:
    first, *others = reload.errors
    more = f" (and {len(others)} more)" if others else ""
    return Refusal("reload_refused", f"Nothing was changed: {first}{more}.", {"errors": list(reload.errors)})
