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
post() { # post STATUS ERROR PATH JSON
  ask "$1" "$2" "$gate$3" -H 'Content-Type: application/json' -d "$4"
}

incident=inc_$(date +%s)_$$
retry='"incident_id": "'$incident'", "action": "retry_agent"'

echo '1. Without a scope nothing is executed'
post 400 scoped_execution_required /api/v1/recovery/execute "{$retry}"

echo '2. Ask for a scope, and say why'
post 201 '' /api/v1/recovery/scope "{$retry, \"intent\": \"The agent invented a ruling\", \"max_attempts\": 1}"
scope=$(member scope_id)

echo '3. With it the handler runs; the gate adds what is left of the scope'
post 200 '' /api/v1/recovery/execute "{$retry, \"scope_id\": \"$scope\"}"
expect success True "$(member success)"
expect executed_before False "$(member executed_before)"
expect attempts_remaining 0 "$(member attempts_remaining)"
expect 'cost_used_usd, as the handler says it' 0.04 "$(member cost_used_usd)"

echo '4. It works once'
post 400 scope_exhausted /api/v1/recovery/execute "{$retry, \"scope_id\": \"$scope\"}"

echo '5. And only for its own action'
post 403 action_outside_scope /api/v1/recovery/execute \
  "{\"incident_id\": \"$incident\", \"action\": \"restart_agent\", \"scope_id\": \"$scope\"}"

echo '6. The rule of policies/actions.yaml: a restart is granted once'
post 403 policy_denied /api/v1/recovery/scope \
  "{\"incident_id\": \"$incident\", \"action\": \"restart_agent\", \"intent\": \"Restart it\", \"max_attempts\": 2}"

echo '7. Everything else passes through'
ask 200 '' "$gate/api/v1/agents"
recovered=$(member recovered) # includes the recoveries of earlier runs
case $recovered in *"'$incident'"*) recovered=$incident ;; esac
expect recovered "$incident" "$recovered"
echo 'All of it holds.'
