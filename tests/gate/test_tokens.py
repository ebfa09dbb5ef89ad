"""Tokens over real sockets: what a change of their file does to the callers of a running sidecar."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sidecar.auth import tokenfile
from sidecar.auth.tokens import NOT_VALID, Token, digest_of
from sidecar.live.reload import Files
from sidecar.serve import Sidecar
from tests.client import Message, ask
from tests.support import Backend, Clock, eventually

CONFIG = """\
upstream: {{url: "{upstream}", credentials: [{credential}]}}
store: {{url: "sqlite:///gate.db"}}
data: {{listen: "127.0.0.1:0"}}
admin: {{listen: "127.0.0.1:0"}}
ops: {{listen: "127.0.0.1:0"}}
policies: policies
auth: {{required: true, tokens: {{file: tokens.yaml}}, principals: principals.yaml}}
"""
POLICIES = "actions: {restart: {risk: low}}\nroles: {observer: {groups: [seers]}}\n"
SEERS = "principals: {seer: {groups: [seers]}}\n"


def token(name: str, text: str, not_after: int | None = None) -> Token:
    return Token(name=name, digest=digest_of(text), created_at=0, not_after=not_after)


@asynccontextmanager
async def running(
    folder: Path, backend: Backend, clock: Clock, *made: Token, credential: str = ""
) -> AsyncIterator[Sidecar]:
    (folder / "c.yaml").write_text(CONFIG.format(upstream=backend.url, credential=credential))
    (folder / "policies").mkdir()
    (folder / "policies" / "p.yaml").write_text(POLICIES)
    (folder / "principals.yaml").write_text(SEERS)
    tokenfile.change(folder / "tokens.yaml", lambda _: made)
    files = Files(folder / "c.yaml", environment={})
    contents = files.read()
    async with Sidecar(
        contents.loaded.settings,
        contents.policies,
        callers=contents.callers,
        files=files,
        clock=clock,
        elapsed=clock.elapsed,
    ) as sidecar:
        yield sidecar


async def status(sidecar: Sidecar, secret: str) -> Message:
    return await ask(sidecar.admin_address, "GET", "/api/v1/status", [("Authorization", f"Bearer {secret}")])


async def reloaded(sidecar: Sidecar, change: Callable[[], object]) -> tuple[str, ...]:
    """Change files, and wait until the watcher has taken notice. The errors of the reload."""
    before = sidecar.reloader.last
    change()
    await eventually(lambda: sidecar.reloader.last is not before)
    return sidecar.reloader.last.errors


async def test_a_token_is_valid_from_its_line_in_the_file_to_its_removal(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    file = tmp_path / "tokens.yaml"
    async with running(tmp_path, backend, clock, token("seer", "sg_a")) as sidecar:
        assert (await status(sidecar, "sg_a")).status == 200
        assert (await status(sidecar, "sg_b")).status == 401
        added = await reloaded(
            sidecar, lambda: tokenfile.change(file, lambda old: [*old, token("seer", "sg_b")])
        )
        assert added == ()
        assert sidecar.reloader.last.changed == ("auth.tokens.file",)
        assert [(await status(sidecar, text)).status for text in ("sg_a", "sg_b")] == [200, 200]
        await reloaded(sidecar, lambda: tokenfile.change(file, lambda old: old[1:]))
        # The answer to the revoked one was cached until now.
        assert [(await status(sidecar, text)).status for text in ("sg_a", "sg_b")] == [401, 200]


@pytest.mark.parametrize(
    "value",
    [
        "Bearer sg_a\u00a0",
        "\u00a0Bearer sg_a",
        "Bearer sg_a\u0085",
        "Bearer\tsg_a",
        "Bearer sg_a,",
        "sg_a",
        "Bearer",
    ],
)
async def test_a_token_among_other_characters_is_no_token(
    tmp_path: Path, backend: Backend, clock: Clock, value: str
) -> None:
    async with running(tmp_path, backend, clock, token("seer", "sg_a")) as sidecar:
        sent = [("Authorization", value.encode().decode("latin-1"))]
        answer = await ask(sidecar.admin_address, "GET", "/api/v1/status", sent)
        assert (answer.status, answer.json()["error"]) == (401, "unauthenticated")


@pytest.mark.parametrize("how", ["broken", "gone", "readable"])
async def test_a_broken_file_keeps_the_last_good_tokens_and_the_reload_says_why(
    tmp_path: Path, backend: Backend, clock: Clock, how: str
) -> None:
    file = tmp_path / "tokens.yaml"

    def spoil() -> None:
        if how == "gone":
            file.unlink()
        elif how == "broken":
            file.write_text("tokens: [{name: seer}]")
        else:
            file.chmod(0o644)
            file.write_text("tokens: []")

    async with running(tmp_path, backend, clock, token("seer", "sg_a")) as sidecar:
        errors = await reloaded(sidecar, spoil)
        said = {
            "broken": ":1:10: tokens[0].sha256: is required",
            "gone": "No such file",
            "readable": "chmod 600",
        }
        assert any(said[how] in error for error in errors), errors
        assert (await status(sidecar, "sg_a")).status == 200
        file.unlink(missing_ok=True)
        assert (
            await reloaded(sidecar, lambda: tokenfile.change(file, lambda _: [token("seer", "sg_b")])) == ()
        )
        assert [(await status(sidecar, text)).status for text in ("sg_a", "sg_b")] == [401, 200]


@pytest.mark.parametrize("what", ["policies/p.yaml", "principals.yaml", "c.yaml", "a key that is fixed"])
async def test_a_token_is_revoked_whatever_else_cannot_be_reloaded(
    tmp_path: Path, backend: Backend, clock: Clock, what: str
) -> None:
    file = tmp_path / "tokens.yaml"
    mine = token("seer", "sg_a")
    async with running(tmp_path, backend, clock, mine, token("seer", "sg_b")) as sidecar:
        if what == "a key that is fixed":
            text = CONFIG.format(upstream="http://127.0.0.1:1", credential="")
            errors = await reloaded(sidecar, lambda: (tmp_path / "c.yaml").write_text(text))
            assert any("cannot change while it runs" in error for error in errors)
        else:
            assert await reloaded(sidecar, lambda: (tmp_path / what).write_text("- [")) != ()
        assert [(await status(sidecar, text)).status for text in ("sg_a", "sg_b")] == [200, 200]
        assert await reloaded(sidecar, lambda: tokenfile.change(file, lambda old: old[1:])) != ()
        assert list(sidecar.reloader.last.changed) == ["auth.tokens.file"]
        assert [(await status(sidecar, text)).status for text in ("sg_a", "sg_b")] == [401, 200]
        # Neither is another token lost if that file is spoilt, too.
        assert await reloaded(sidecar, lambda: file.write_text("tokens: [")) != ()
        assert list(sidecar.reloader.last.changed) == []
        assert [(await status(sidecar, text)).status for text in ("sg_a", "sg_b")] == [401, 200]


async def test_a_reload_goes_on_while_the_credential_for_the_backend_cannot_be_read(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    (tmp_path / "credential").write_text("Bearer s3cr3t-of-the-backend")
    held = "{header: Authorization, value_file: credential}"
    async with running(tmp_path, backend, clock, token("seer", "sg_a"), credential=held) as sidecar:
        (tmp_path / "credential").unlink()
        gone = "principals: {seer: {groups: [blind]}}"
        assert await reloaded(sidecar, lambda: (tmp_path / "principals.yaml").write_text(gone)) == ()
        assert (await status(sidecar, "sg_a")).json()["error"] == "role_required"


async def test_a_change_of_the_table_of_principals_counts_for_the_next_request(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    async with running(tmp_path, backend, clock, token("seer", "sg_a")) as sidecar:
        assert (await status(sidecar, "sg_a")).status == 200
        table = tmp_path / "principals.yaml"
        await reloaded(sidecar, lambda: table.write_text("principals: {seer: {groups: [blind]}}"))
        assert sidecar.reloader.last.changed == ("auth.principals",)
        assert (await status(sidecar, "sg_a")).json()["error"] == "role_required"


async def test_a_token_ends_at_its_time_and_the_answer_does_not_say_that_it_existed(
    tmp_path: Path, backend: Backend, clock: Clock
) -> None:
    day = 86_400
    ends = (clock() // 1_000_000 + day) * 1_000_000
    async with running(tmp_path, backend, clock, token("seer", "sg_a", not_after=ends)) as sidecar:
        assert (await status(sidecar, "sg_a")).status == 200
        clock.move(day + 1)
        late, unknown = await status(sidecar, "sg_a"), await status(sidecar, "sg_zzz")
        assert late.status == unknown.status == 401
        assert (
            late.json()["message"] == unknown.json()["message"] == f"{NOT_VALID[0].upper()}{NOT_VALID[1:]}."
        )
        assert late.json()["methods"] == ["tokens"]
