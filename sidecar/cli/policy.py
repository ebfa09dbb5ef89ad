"""`scopegate policy`: tests policies with the cases beside them, and replays the log against another set."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from sidecar.cli.lists import since_option
from sidecar.cli.options import (
    FAILED,
    TAMPERED,
    config_option,
    failed,
    load_settings,
    misconfigured,
    set_option,
)
from sidecar.errors import LogTampered, StoreUnavailable
from sidecar.files.faults import ConfigurationError, Fault, shown
from sidecar.policies import files as policyfiles
from sidecar.policies import testing as policytests
from sidecar.policies.gaterecords import Finding, Kind
from sidecar.policies.replay import Replay, replayed

# The least number of records per step of the progress bar. A shorter log is read in one step.
LONG = 20_000

# The kinds of findings, in the order of the summary.
_KINDS: dict[Kind, str] = {
    "unchanged": "unchanged",
    "refused": "would be refused",
    "allowed": "would be allowed",
    "otherwise": "refused for another reason",
    "lowered": "granted on lower terms",
    "shadow": "otherwise only in shadow",
    "undecidable": "undecidable",
}
_ROW = "{:<36}  {:<20}  {:<7}  {:<20}  {:<20}  {}"


@click.group(
    epilog="""\b
Examples:
  scopegate policy test
  scopegate policy replay --config config/scopegate.yaml --policies new/ --since 7d"""
)
def policy() -> None:
    """Test policies, and decide recorded decisions again under another set."""


# Testing ------------------------------------------------------------------------------------------------


@policy.command(
    "test",
    epilog="""\b
Examples:
  scopegate policy test
  scopegate policy test /etc/scopegate/policies
\b
policies/tests/freeze.yaml:
  tests:
    - name: a restart in the holidays is refused
      on: execute
      now: 2026-12-24T12:00:00Z
      facts: {action: restart_pod, scope: {attempts_used: 1}}
      history: [{seconds_ago: 90, status: unknown}]
      want: {verdict: refused, error: policy_denied, rules: [change-freeze]}""",
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path("policies"))
def check_tests(folder: Path) -> None:
    """Run the tests of a policies folder, FOLDER/tests/*.yaml; FOLDER is ./policies unless given. The
    exit code is 1 if one does not hold.

    Each test gives facts and the expected decision: verdict, error, rules. Nothing is executed, and no store
    is opened.
    """
    faults: list[Fault] = []
    policies, tests = None, []
    try:
        policies = policyfiles.load(folder)
    except ConfigurationError as exc:
        faults += exc.faults
    try:
        tests = policytests.read(folder)
    except ConfigurationError as exc:
        faults += exc.faults
    if policies is None or faults:
        misconfigured("\n".join(map(str, faults)))
    broken = 0
    for test in tests:
        outcome = policytests.run(test, policies)
        broken += bool(outcome.differences)
        word = "FAIL" if outcome.differences else "ok"
        click.echo(f"{word:<4}  {Path(test.document.file).name}: {test.case.name}")
        for difference in outcome.differences:
            click.echo(f"      {difference}")
        if outcome.differences and outcome.message is not None:
            click.echo(f"      the gate says {outcome.message}")
    held = f"{broken} of {len(tests)} tests do not hold" if broken else f"all {len(tests)} tests hold"
    click.echo(f"{held}, policies revision {policies.revision}")
    sys.exit(FAILED if broken else 0)


# Replaying ----------------------------------------------------------------------------------------------


@policy.command(
    epilog="""\b
Examples:
  scopegate policy replay --config config/scopegate.yaml --policies new/
  scopegate policy replay --config config/scopegate.yaml --policies new/ --since 24h
  scopegate policy replay --config config/scopegate.yaml --policies new/ --json | jq .summary"""
)
@config_option
@set_option
@click.option(
    "--policies",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="FOLDER",
    help="The policy set to try.",
)
@since_option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document, with undecidable records, too.",
)
def replay(
    config: Path, overrides: tuple[str, ...], folder: Path, since: int | None, *, as_json: bool
) -> None:
    """Decide the recorded decisions again under another policy set, and show those that would change.

    It works beside a running sidecar and changes nothing. Records that lack a fact which a rule reads cannot
    be decided again; they are counted. The exit code is 0 even if decisions would change.
    """
    loaded = load_settings(config, overrides, read_keys=False)
    if loaded.store.file is None:
        misconfigured(f"{config}: store.url: a store in memory has no log to replay")
    try:
        policies = policyfiles.load(folder)
    except ConfigurationError as exc:
        misconfigured(str(exc))
    again = Replay(policies, since=since or 0, scope_required_from=loaded.gate.scope_required_from)
    summary = _ReplaySummary(policies.revision)
    show = _show_as_json if as_json else _show_as_row
    written = 0
    try:
        with _progress() as (progress, clear):
            for finding in replayed(loaded.store.file, again, progress):
                summary.add(finding)
                # These rows would hide the changes in the table. The summary counts them and says why.
                if finding.kind == "unchanged" or (finding.kind == "undecidable" and not as_json):
                    continue
                clear()
                show(finding, first=not written)
                written += 1
    except LogTampered as exc:
        click.echo(f"TAMPERED: {exc}; scopegate log verify says more", err=True)
        sys.exit(TAMPERED)
    except StoreUnavailable as exc:
        failed(f"cannot replay: {exc}")
    if as_json:
        begun = "]" if written else '{"changes": []'
        click.echo(f'{begun}, "summary": {json.dumps(summary.to_dict())}}}')
    else:
        click.echo("\n" * bool(written) + "\n".join(summary.lines(folder)))


@dataclass
class _ReplaySummary:
    """The totals of all findings. Requests are counted, so a record that sums up a flood counts many
    times."""

    revision: str
    kinds: Counter[Kind] = field(default_factory=Counter)
    revisions: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        self.kinds[finding.kind] += finding.count
        self.revisions[str(finding.record.details.get("policy_revision"))] += finding.count
        if finding.why is not None:
            self.why[finding.why] += finding.count
            self.examples.setdefault(finding.why, finding.record.decision_id)

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": {kind: self.kinds[kind] for kind in _KINDS},
            "undecidable": [
                {"why": why, "count": count, "decision_id": self.examples[why]}
                for why, count in self.why.most_common()
            ],
            "recorded_under": dict(self.revisions.most_common()),
            "replayed_under": self.revision,
        }

    def lines(self, folder: Path) -> Iterator[str]:
        under = ", ".join(f"{revision} ({count})" for revision, count in self.revisions.most_common())
        yield f"recorded under revision  {under or 'none'}"
        yield f"replayed under revision  {self.revision}, {folder}"
        yield f"decided again            {self.kinds.total()}"
        for kind, words in _KINDS.items():
            if self.kinds[kind] or kind in ("unchanged", "refused", "allowed"):
                yield f"  {words:<24}{self.kinds[kind]:>9}"
        for why, count in self.why.most_common():
            yield f"    {count:>9}  {why}, for example {self.examples[why]}"


def _show_as_json(finding: Finding, *, first: bool) -> None:
    click.echo(('{"changes": [\n' if first else ",") + json.dumps(finding.to_dict()))


def _show_as_row(finding: Finding, *, first: bool) -> None:
    if first:
        click.echo(_ROW.format("decision", "time", "what", "action", "incident", "recorded -> now"))
    record = finding.record
    about = (shown(finding.action or "-", 40), shown(record.incident_id or "-", 40))
    time = f"{record.decided_at[:19]}Z"
    change = f"{finding.recorded} -> {finding.now}"
    click.echo(_ROW.format(record.decision_id, time, finding.what, *about, change))


@contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[], None]]]:
    """Draw a bar on a terminal. Yields the function that takes (done, total), and the function that clears
    the line before other output."""
    shown_up_to = 0
    hidden = not sys.stderr.isatty()
    with click.progressbar(length=1, label="Replaying", file=sys.stderr, hidden=hidden) as bar:

        def progress(done: int, total: int) -> None:
            nonlocal shown_up_to
            if done - shown_up_to >= max(LONG, total / 200) or done == total:
                bar.length = total
                bar.update(done - shown_up_to)
                shown_up_to = done

        def clear() -> None:
            if not hidden:
                click.echo("\r\033[K", nl=False, err=True)

        yield progress, clear
