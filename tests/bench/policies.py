"""What policies cost: reading a large set, and judging by many rules instead of few.

    python -m tests.bench.policies [--files 100] [--rules 10000] [--actions 1000] [--rounds 5]

The many rules are spread over all actions, the few are about one; so about one action there are ten rules in
either set: limits with requirements, brakes, conditions on the request, and conditions on the scope.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from sidecar.core.policy import Phase, PolicySet, RiskClass, Subject
from sidecar.core.rules import preview
from sidecar.policies.files import load

RISKS = tuple(risk.value for risk in RiskClass)
KINDS = (
    """    on: issue
    match: {{action: {action}, risk: [low, medium, high, critical], tenant_id: "team-*"}}
    limit: {{max_attempts: 1, ttl_seconds: 300, max_cost_usd: 1.00}}
    require: {{intent_min_chars: 20, target_agents: true}}
""",
    """    on: execute
    match: {{action: {action}}}
    brake: {{per: [incident_id, action], max_attempts: 3, window_seconds: 3600, cooldown_seconds: 60,
            one_in_flight: true}}
""",
    """    on: execute
    match: {{action: {action}, incident_id: "inc-*"}}
    when: risk != "low" && now >= timestamp("2026-12-24T00:00:00Z") && action != "x{number}"
    effect: deny
    mode: shadow
""",
    """    on: execute
    match: {{action: {action}}}
    when: attempts_used > {number}
    effect: deny
""",
)


def write(folder: Path, files: int, rules: int, actions: int, spread: int) -> None:
    """A folder of policy files that name so many actions and rules in all; the rules of each file are about
    `spread` of its actions."""
    for file in range(files):
        text = "actions:\n"
        for number in range(actions // files):
            risk = RISKS[number % len(RISKS)]
            text += f"  act_{file}_{number}: {{risk: {risk}, max_cost_usd: 0.25, targets_required: true}}\n"
        text += "rules:\n"
        for number in range(rules // files):
            # Kinds and actions take turns so that each action has rules of every kind.
            action = f"act_{file}_{number // len(KINDS) % spread}"
            text += f"  - id: rule-{file}-{number}\n"
            text += KINDS[number % len(KINDS)].format(action=action, number=number % 100)
            text += f"    reason: Rule {number} of file {file}, with as many words as a reason has.\n"
        (folder / f"{file:04}.yaml").write_text(text, encoding="utf-8")


def subject(action: str, number: int) -> Subject:
    return Subject(
        action=action,
        risk=RiskClass.HIGH,
        incident_id=f"inc-{number}-1",
        tenant_id=f"team-{number}-1",
        principal="bench",
        target_agents=("a-1", "a-2"),
        parameters={"number": number, "agent": "a-1", "reason": "stuck"},
        intent="measure what rules cost",
        now=time.time_ns() // 1000,
    )


def judging(policies: PolicySet, phase: Phase, rounds: int) -> tuple[float, float]:
    """Microseconds to look at one request, and how many rules are about it, on the average."""
    names = [name for name in policies.actions if policies.about(phase, name)][:500]
    subjects = [subject(name, number % 10) for number, name in enumerate(names)]
    for each in subjects:
        preview(policies, phase, each)  # the rules of an action are found once
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for each in subjects:
            preview(policies, phase, each)
        taken.append((time.perf_counter() - begun) / len(subjects) * 1e6)
    about = statistics.mean(len(policies.about(phase, name)) for name in names)
    return statistics.median(taken), about


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--rules", type=int, default=10_000)
    parser.add_argument("--actions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        many, few = Path(name, "many"), Path(name, "few")
        costs: list[float] = []
        each = arguments.actions // arguments.files
        for folder, files, rules, spread in (
            (many, arguments.files, arguments.rules, each),
            (few, 1, 10, 1),
        ):
            folder.mkdir()
            write(folder, files, rules, arguments.actions, spread)
            taken = []
            for _ in range(arguments.rounds):
                begun = time.perf_counter()
                policies = load(folder)
                taken.append(time.perf_counter() - begun)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(
                f"{len(policies.rules):6d} rules, {len(policies.actions)} actions, {files} files, {size} B, "
                f"read in {min(taken):.2f} s (middle {statistics.median(taken):.2f} s)"
            )
            for phase in ("issue", "execute"):
                microseconds, about = judging(policies, phase, arguments.rounds)
                costs.append(microseconds)
                print(
                    f"       {phase:7} judged in {microseconds:7.1f} us, {about:.1f} rules about the action"
                )
        issue, execute = costs[0] / costs[2], costs[1] / costs[3]
        print(f"many rules cost {issue:.2f} times what few cost on issue, {execute:.2f} times on execute")


if __name__ == "__main__":
    main()
