"""An agent that recovers other agents through the gate: its tools, the client behind them, and its loop.

It calls no model. Fixed rules (`decide`) take the place of yours; you can use everything else as it is.
Exit codes: 0 recovered, 3 it needs a scope from a person, 4 it gave up, 5 the outcome is unknown.
"""

import argparse
import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# The agent's own token. With it the agent can execute what was granted, and grant nothing.
TOKEN_FILE = os.environ.get("AGENT_TOKEN_FILE", "var/tokens/agent.token")
GATE = ("127.0.0.1", int(os.environ.get("GATE_PORT", "8000")))
MOST_STEPS = 12
DEFAULT_WAIT_SECONDS = 30  # the wait if an answer names none
PATIENCE_SECONDS = 5  # the agent waits this long for a brake, and reports a longer one
EXIT_CODES = {"recovered": 0, "needs_scope": 3, "gave_up": 4, "unknown": 5}
CLIENT_TIMEOUT_SECONDS = 90  # above every timeout of the gate, because only the gate knows the outcome

# 1. Tools. Give these to your model, in the form of its interface. None of them grants a scope.

TARGET = {"type": "string", "description": "The agent to recover."}
TOOLS: list[dict[str, Any]] = [
    {
        "name": "look",
        "description": "How an agent is doing. Free, and never refused.",
        "parameters": {"type": "object", "properties": {"agent": TARGET}, "required": ["agent"]},
    },
    {
        "name": "execute_recovery",
        "description": (
            "Execute one recovery action. Each call is one attempt of the scope and costs money. "
            "The result says what to do next; obey it, and never repeat a call whose end is unknown."
        ),
        "parameters": {
            "type": "object",
            "properties": {
                "action": {"type": "string", "enum": ["retry_agent", "restart_agent", "rebuild_memory"]},
                "agent": TARGET,
            },
            "required": ["action", "agent"],
        },
    },
    {
        "name": "request_scope",
        "description": "Ask a person for permission to execute one action. It ends your turn; they decide.",
        "parameters": {
            "type": "object",
            "properties": {
                "action": {"type": "string"},
                "agent": TARGET,
                "intent": {"type": "string", "description": "Why, in one sentence that a person can judge."},
                "max_attempts": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "required": ["action", "agent", "intent", "max_attempts"],
        },
    },
    {
        "name": "report",
        "description": "End your work, and say how it stands.",
        "parameters": {
            "type": "object",
            "properties": {
                "outcome": {"type": "string", "enum": ["recovered", "needs_scope", "gave_up", "unknown"]},
                "summary": {"type": "string"},
            },
            "required": ["outcome", "summary"],
        },
    },
]

# 2. The client. It turns every answer into a result that a model can read, and never sends a request twice.

ASK, WAIT, CORRECT, STOP, UNKNOWN = "ask_for_scope", "wait", "correct_the_call", "stop", "ask_a_person"
ADVICE = {
    "scoped_execution_required": (ASK, "You have no scope. Ask for one, and say why."),
    "scope_not_found": (ASK, "There is no such scope. Ask for one."),
    "scope_expired": (ASK, "The scope ran out of time. Ask for another one, if it still makes sense."),
    "scope_exhausted": (ASK, "The scope is used up. Say what it achieved before you ask for another one."),
    "scope_revoked": (STOP, "A person withdrew the scope. Do nothing more."),
    "incident_mismatch": (STOP, "The scope belongs to another incident."),
    "action_outside_scope": (ASK, "This action was not granted. Ask for it, or stay with what was granted."),
    "target_outside_scope": (CORRECT, "Name only agents that the scope was granted for."),
    "executor_outside_scope": (ASK, "The scope is for others. Ask for one that you may spend."),
    "unauthenticated": (STOP, "The credential is missing or not valid. A person has to give you one."),
    "auth_throttled": (STOP, "Credentials from here failed too often. A person has to look."),
    "role_required": (STOP, "You may not execute. A person has to give you the role."),
    "tenant_mismatch": (STOP, "The call names a tenant that is not yours."),
    "frozen": (STOP, "An operator has stopped this. Wait for a person to tell you that it goes on."),
    "policy_denied": (STOP, "A rule forbids it; asking again will not change that."),
    "braked": (WAIT, "It was executed too often, or something is still running. Wait, or report."),
    "invalid_request": (CORRECT, "The call is malformed; the message says where."),
    "store_unavailable": (WAIT, "The gate cannot write its log. Nothing was executed."),
    "policy_unavailable": (WAIT, "The gate has no valid policies. Nothing was executed."),
    "credential_unavailable": (WAIT, "The gate cannot reach the backend as itself. Nothing was executed."),
    "overloaded": (WAIT, "The gate is busy. Nothing was executed."),
    "draining": (WAIT, "The gate is restarting. Nothing was executed."),
    "upstream_unreachable": (WAIT, "The backend is down. Nothing was executed, and the attempt came back."),
    "upstream_failed": (UNKNOWN, "The answer was lost: it may have been executed. Never repeat it."),
    "upstream_timeout": (UNKNOWN, "No answer in time: it may have been executed. Never repeat it."),
}
NO_ANSWER = "No answer came back: it may have been executed. Never repeat it."


class Client:
    """The agent's side of the gate, for one incident."""

    def __init__(self, incident: str, scope: str | None, request_file: str) -> None:
        self.incident = incident
        self.scope = scope
        self.request_file = request_file

    def look(self, agent: str) -> dict[str, Any]:
        _, _, body = send("GET", f"/api/v1/agents/{agent}")
        return body

    def execute_recovery(self, action: str, agent: str) -> dict[str, Any]:
        asked = {"incident_id": self.incident, "action": action, "target_agents": [agent]}
        if self.scope is not None:
            asked["scope_id"] = self.scope
        try:
            status, headers, body = send("POST", "/api/v1/recovery/execute", asked)
        except ConnectionRefusedError:
            refused = {"ok": False, "error": "gate_unreachable", "message": "Nothing was executed."}
            return refused | {"next": WAIT, "retry_after_seconds": DEFAULT_WAIT_SECONDS}
        except (OSError, http.client.HTTPException, ValueError):
            return {"ok": False, "error": "no_answer", "next": UNKNOWN, "message": NO_ANSWER}
        if headers.get_content_type() != "application/problem+json" or body.get("error") not in ADVICE:
            return answered(status, headers, body)
        step, advice = ADVICE[body["error"]]
        result = {
            "ok": False,
            "error": body["error"],
            "message": body["message"],
            "next": step,
            "advice": advice,
        }
        result |= {name: body[name] for name in ("rules", "bound", "member", "decision_id") if name in body}
        if step == WAIT:
            seconds = headers.get("Retry-After", "")
            result["retry_after_seconds"] = int(seconds) if seconds.isdecimal() else DEFAULT_WAIT_SECONDS
        return result

    def request_scope(self, action: str, agent: str, intent: str, max_attempts: int) -> dict[str, Any]:
        """Write a request that a person decides. It grants nothing. You could open a ticket instead."""
        wanted = {
            "incident_id": self.incident,
            "action": action,
            "target_agents": [agent],
            "intent": intent,
            "max_attempts": max_attempts,
            "executors": ["recovery-agent"],  # no other caller can spend it
        }
        with open(self.request_file, "w", encoding="utf-8") as file:
            json.dump(wanted, file, indent=2)
        return {
            "asked": True,
            "message": "A person has the request. You will be started again with the scope.",
        }


def answered(status: int, headers: http.client.HTTPMessage, body: dict[str, Any]) -> dict[str, Any]:
    """Describe an error of the backend, or of a proxy before it."""
    if status >= 500 and "Scopegate-Decision-Id" not in headers:
        return {"ok": False, "error": f"http_{status}", "next": UNKNOWN, "message": NO_ANSWER}
    left = int(headers.get("Scopegate-Attempts-Remaining", "0"))
    return {"ok": status < 400, "status": status, "answer": body, "attempts_remaining": left}


def credential() -> dict[str, str]:
    """The token in its header: `Authorization` is the backend's. It is read anew, because it is rotated."""
    try:
        with open(TOKEN_FILE, encoding="ascii") as file:
            return {"Scopegate-Authorization": f"Bearer {file.read().strip()}"}
    except FileNotFoundError:
        return {}


def send(
    method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[int, http.client.HTTPMessage, dict[str, Any]]:
    """Send one request on its own connection, without retries or redirects."""
    connection = http.client.HTTPConnection(*GATE, timeout=CLIENT_TIMEOUT_SECONDS)
    try:
        text = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", **credential()} if text else {}
        connection.request(method, path, text, headers)
        response = connection.getresponse()
        return response.status, response.headers, json.loads(response.read() or b"{}")
    finally:
        connection.close()


# 3. The loop. Call your model in `decide`: pass it TOOLS and the history, return its call.

Call = tuple[str, dict[str, Any]]


def decide(goal: dict[str, str], history: list[tuple[Call, dict[str, Any]]]) -> Call:
    """Choose the next tool call. Fixed rules take the place of a model, so that the steps can be checked."""
    if not history:
        return "look", {"agent": goal["agent"]}
    (name, _), last = history[-1]
    if name == "look":
        if last.get("healthy"):
            return report("recovered", f"{goal['agent']} is well")
        return "execute_recovery", dict(goal)
    if name == "request_scope":
        return report("needs_scope", "waiting for a person to grant it")
    step = last.get("next")
    if step == ASK:
        return "request_scope", goal | {
            "intent": f"{goal['agent']} does not answer; {goal['action']} is the usual next step",
            "max_attempts": 3,
        }
    if step == UNKNOWN:
        return report("unknown", f"see decision {last.get('decision_id', 'in the log')}: {last['message']}")
    if step == WAIT and last["retry_after_seconds"] <= PATIENCE_SECONDS:
        time.sleep(last["retry_after_seconds"])
        return "execute_recovery", dict(goal)
    if not last["ok"]:
        return report("gave_up", f"{last.get('error', 'the backend failed')}: {last.get('message', '')}")
    return "look", {"agent": goal["agent"]}


def report(outcome: str, summary: str) -> Call:
    return "report", {"outcome": outcome, "summary": summary}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Recovers an agent through the gate, as far as it is allowed to."
    )
    parser.add_argument("--incident", required=True)
    parser.add_argument("--agent", required=True)
    parser.add_argument("--action", required=True)
    parser.add_argument("--scope", help="The scope that a person granted.")
    parser.add_argument(
        "--request-file", default="scope-request.json", help="Where it leaves what it asks for."
    )
    given = parser.parse_args()
    client = Client(given.incident, given.scope, given.request_file)
    tools: dict[str, Callable[..., dict[str, Any]]] = {
        "look": client.look,
        "execute_recovery": client.execute_recovery,
        "request_scope": client.request_scope,
    }
    goal = {"action": given.action, "agent": given.agent}
    history: list[tuple[Call, dict[str, Any]]] = []
    for _ in range(MOST_STEPS):
        name, arguments = decide(goal, history)
        if name == "report":
            say(f"  agent reports {arguments['outcome']}: {arguments['summary']}")
            return EXIT_CODES[arguments["outcome"]]
        say(f"  agent calls {name} {json.dumps(arguments)}")
        history.append(((name, arguments), tools[name](**arguments)))
        say(f"    {json.dumps(history[-1][1])}")
    say("  agent is stopped: too many steps")
    return EXIT_CODES["gave_up"]


if __name__ == "__main__":
    sys.exit(main())
