"""The rows of the OpenAPI document itself and of its page."""

from __future__ import annotations

from sidecar.web.api.docs import FILES
from sidecar.web.api.operation import Answer, Operation, Parameter

DOCUMENTATION = (
    Operation(
        call="GET /openapi.json",
        name="getDocument",
        tag="Documentation",
        summary="This document",
        answers=(
            Answer(
                status="200",
                description="OpenAPI 3.1, for this version and configuration.",
                contents={"application/json": {"type": "object", "required": ["openapi", "info", "paths"]}},
            ),
        ),
    ),
    Operation(
        call="GET /docs",
        name="getPage",
        tag="Documentation",
        summary="This document as a page",
        answers=(
            Answer(
                status="200",
                description="The page.",
                contents={"text/html": {"type": "string"}},
                headers=("Content-Security-Policy",),
            ),
        ),
    ),
    Operation(
        call="GET /docs/",
        name="getPageElsewhere",
        tag="Documentation",
        summary="The page under another spelling",
        answers=(Answer(status="308", description="It is at /docs.", contents={}, headers=("Location",)),),
    ),
    Operation(
        call="GET /docs/{file}",
        name="getPageFile",
        tag="Documentation",
        summary="A file of the page",
        parameters=(
            Parameter(
                name="file", place="path", schema={"type": "string", "enum": list(FILES)}, required=True
            ),
        ),
        answers=(
            Answer(
                status="200",
                description="The file.",
                contents={"text/css": {"type": "string"}},
                headers=("Content-Security-Policy",),
            ),
        ),
        errors=("not_found",),
    ),
)
