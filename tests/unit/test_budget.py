"""The budget of a request: each count has its number, and a count above it is named with the way out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import budget

BUDGET = {"gated": {"calls": 5, "tasks": 1}, "passing": {"calls": 2, "tasks": 0}}


def test_the_file_has_a_number_for_each_count_of_each_kind_of_request() -> None:
    held = json.loads(budget.FILE.read_text(encoding="utf-8"))
    assert {kind: list(each) for kind, each in held.items()} == {
        kind: list(budget.COUNTS) for kind in ("gated", "passing")
    }


def test_a_count_that_is_lower_or_the_same_is_within_the_budget() -> None:
    assert budget.risen(BUDGET, BUDGET) == []
    assert budget.risen({"gated": {"calls": 4, "tasks": 0}}, BUDGET) == []


def test_what_rose_is_named_with_both_numbers() -> None:
    (line,) = budget.risen({"gated": {"calls": 5, "tasks": 2}}, BUDGET)
    assert line == "a gated request makes 2 tasks, and the budget is 1: asyncio tasks"


def test_a_rise_fails_and_says_how_to_see_why_and_how_to_raise_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = {name: {"a function": 3} for name in budget.COUNTS}
    monkeypatch.setattr(budget, "_in_a_process", lambda: {"gated": cost, "passing": cost})
    monkeypatch.setattr(budget, "FILE", tmp_path / "budget.json")
    monkeypatch.setattr(sys, "argv", ["budget", "--write"])
    assert budget.main() == 0

    cost["tasks"] = {"a function": 3, "another": 1}
    monkeypatch.setattr(sys, "argv", ["budget"])
    assert budget.main() == 1
    printed = capsys.readouterr().out
    assert "a gated request makes 4 tasks, and the budget is 3" in printed
    assert "--details gated" in printed
    assert "--write" in printed
