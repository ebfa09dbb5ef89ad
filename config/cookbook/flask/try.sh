#!/bin/sh
# Goes through the steps of the page, and fails at the first one that does not succeed. Needs ./run.sh running.
set -eu
gate=http://127.0.0.1:${GATE_PORT:-8000}
ops=http://127.0.0.1:${OPS_PORT:-9902}
PYTHON=${PYTHON:-python3}
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
curl -fs -m 15 -o /dev/null "$ops/health/ready" || { echo 'try.sh: no gate is ready; start ./run.sh first' >&2; exit 1; }

member() { # member NAME: that member of the last answer
  "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2], ""))' "$answer" "$1"
}
expect() { # expect WHAT WANTED FOUND
  if [ "$2" != "$3" ]; then
    printf '  FAILED %s: wanted "%s", found "%s"\n' "$1" "$2" "$3" >&2
    cat "$answer" >&2
    exit 1
  fi
  printf '  ok     %s: %s\n' "$1" "$2"
}
ask() { # ask STATUS ERROR CURL-ARGUMENTS...: sends a request and checks the answer
  status=$1 error=$2
  shift 2
  expect status "$status" "$(curl -s -m 15 -o "$answer" -w '%{http_code}' "$@")"
  [ -z "$error" ] || expect error "$error" "$(member error)"
}
post() { # post STATUS ERROR PATH JSON CURL-ARGUMENTS...
  wanted=$1 code=$2 path=$3 body=$4
  shift 4
  ask "$wanted" "$code" "$gate$path" -H 'Content-Type: application/json' -d "$body" "$@"
}

incident=inc_$(date +%s)_$$
retry=/incidents/$incident/actions/retry_agent/run
restart=/incidents/$incident/actions/restart_agent/run
asked='"incident_id": "'$incident'", "intent": "The agent loops on one tool"'

echo '1. Without a scope nothing is executed'
post 400 scoped_execution_required "$retry" '{}'

echo '2. Ask for a scope, and say why'
post 201 '' /api/v1/recovery/scope "{$asked, \"action\": \"retry_agent\"}"
scope=$(member scope_id)

echo '3. With it in its header the view runs, and its body says what that cost'
post 200 '' "$retry" '{"options": {"model": "small"}}' -H "X-Scope-Id: $scope"
expect done retry_agent "$(member done)"

echo '4. It works once'
post 400 scope_exhausted "$retry" '{}' -H "X-Scope-Id: $scope"

echo '5. And only for its own action'
post 403 action_outside_scope "$restart" '{"agents": ["agent_7"]}' -H "X-Scope-Id: $scope"

echo '6. A restart is granted for the agents that are named, and for no others'
post 403 policy_denied /api/v1/recovery/scope "{$asked, \"action\": \"restart_agent\"}"
post 201 '' /api/v1/recovery/scope "{$asked, \"action\": \"restart_agent\", \"target_agents\": [\"agent_7\"]}"
scope=$(member scope_id)
post 403 target_outside_scope "$restart" '{"agents": ["agent_9"]}' -H "X-Scope-Id: $scope"

echo '7. What WSGI could read as the scope header is refused, not read'
post 400 invalid_request "$restart" '{"agents": ["agent_7"]}' -H "X-Scope-Id: $scope" -H 'X_Scope_Id: scope_of_another'

echo '8. A prefix, which WSGI servers can be configured to remove, is no way around the gate'
post 400 scoped_execution_required "/elsewhere$restart" '{"agents": ["agent_7"]}'
post 400 override_refused "/elsewhere$restart" '{"agents": ["agent_7"]}' -H 'SCRIPT_NAME: /elsewhere'

echo '9. Everything else passes through'
ask 200 '' "$gate/incidents/$incident"
expect executed "['retry_agent']" "$(member executed)"
echo 'All of it holds.'
