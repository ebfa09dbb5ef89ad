#!/bin/sh
# Goes through the steps of the page, and fails at the first one that does not succeed. Needs ./run.sh running.
set -eu
cd "$(dirname "$0")"
gate=http://127.0.0.1:${GATE_PORT:-8000}
admin=http://127.0.0.1:${ADMIN_PORT:-9901}
ops=http://127.0.0.1:${OPS_PORT:-9902}
tokens=var/tokens
export SCOPEGATE_TOKEN_FILE="$tokens/human.token" # for the commands below, which a person runs
SCOPEGATE=${SCOPEGATE:-scopegate} PYTHON=${PYTHON:-python3}
answer=$(mktemp) request=$(mktemp)
trap 'rm -f "$answer" "$request"' EXIT
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
# Header files for curl, so that no token stands among the arguments of a program.
(
  umask 077
  printf 'Scopegate-Authorization: Bearer %s\n' "$(cat "$tokens/agent.token")" >"$tokens/agent.header"
  printf 'Authorization: Bearer %s\n' "$(cat "$tokens/agent.token")" >"$tokens/agent-calls.header"
  printf 'Authorization: Bearer %s\n' "$(cat "$tokens/human.token")" >"$tokens/person.header"
)
post() { # post WHO STATUS ERROR URL JSON: WHO is one of these files
  ask "$2" "$3" "$4" -H "@$tokens/$1.header" -H 'Content-Type: application/json' -d "$5"
}
agent() { # agent EXIT-CODE ACTION AGENT ARGUMENTS...: runs the agent, and checks its exit code
  code=$1 action=$2 target=$3
  shift 3
  found=0
  "$PYTHON" agent.py --incident "$incident" --action "$action" --agent "$target" --request-file "$request" "$@" || found=$?
  expect 'exit code' "$code" "$found"
}

grant=$gate/api/v1/recovery/scope
execute=$gate/api/v1/recovery/execute
incident=inc_$(date +%s)_$$
writer=writer_$$

echo '1. Without a scope the agent is refused, asks a person for one, and ends'
agent 3 retry_agent "$writer"

echo '2. It cannot grant itself one, and without a token it can do nothing at all'
post agent-calls 403 role_required "$grant" "@$request"
ask 401 unauthenticated "$grant" -H 'Content-Type: application/json' -d "@$request"

echo '3. A person reads what it asks for, and grants it'
cat "$request" && echo
post person 201 '' "$grant" "@$request"
scope=$(member scope_id)

echo '4. With it the agent works: it waits for Retry-After, is braked at the third attempt, and reports'
agent 4 retry_agent "$writer" --scope "$scope"

echo '5. What was not granted it cannot do'
agent 3 restart_agent "$writer" --scope "$scope"
post agent 403 target_outside_scope "$execute" \
  "{\"incident_id\": \"$incident\", \"action\": \"retry_agent\", \"scope_id\": \"$scope\", \"target_agents\": [\"other\"]}"

echo '6. A restart is granted, once; it helps, and a second one is refused'
restart="\"incident_id\": \"$incident\", \"action\": \"restart_agent\", \"target_agents\": [\"$writer\"]"
once=$("$SCOPEGATE" scopes create --quiet --config scopegate.yaml --incident-id "$incident" --action restart_agent \
  --target-agent "$writer" --intent 'Two retries did not help')
echo "  granted $once"
agent 0 restart_agent "$writer" --scope "$once"
post agent 400 scope_exhausted "$execute" "{$restart, \"scope_id\": \"$once\"}"
post agent 403 action_outside_scope "$execute" \
  "{\"incident_id\": \"$incident\", \"action\": \"retry_agent\", \"scope_id\": \"$once\", \"target_agents\": [\"$writer\"]}"

echo '7. High risk is granted for one attempt, and with its reason written out'
rebuild="\"incident_id\": \"$incident\", \"action\": \"rebuild_memory\", \"target_agents\": [\"reader\"]"
post person 403 policy_denied "$grant" "{$rebuild, \"intent\": \"Its memory is broken, says its log\", \"max_attempts\": 2}"
post person 201 '' "$grant" "{$rebuild, \"intent\": \"Its memory is broken, says its log\"}"
scope=$(member scope_id)

echo '8. No answer in time: the outcome is unknown, so the agent stops, and nothing else starts on this incident'
agent 5 rebuild_memory reader --scope "$scope"
post person 201 '' "$grant" "{$restart, \"intent\": \"Restart it once more\"}"
again=$(member scope_id)
sleep 1 # the cooldown; after it only the brake one-thing-at-a-time holds
post agent 429 braked "$execute" "{$restart, \"scope_id\": \"$again\"}"
expect rules "['one-thing-at-a-time']" "$(member rules)"

echo '9. A person looks into it and says how it ended'
ask 200 '' -H "@$tokens/person.header" "$admin/api/v1/executions?status=unknown"
decision=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["executions"][0]["decision_id"])' "$answer")
"$SCOPEGATE" executions reconcile "$decision" --config scopegate.yaml --outcome executed --cost-usd 0.40 \
  --reason 'The rebuild is done, says the backend'

echo '10. In an emergency one command stops all agents'
freeze=$("$SCOPEGATE" freeze --config scopegate.yaml --principal-kind agent --reason 'The backend is being repaired' --json |
  "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["freeze_id"])')
post agent 403 frozen "$execute" "{$restart, \"scope_id\": \"$again\"}"
"$SCOPEGATE" unfreeze "$freeze" --config scopegate.yaml --reason 'It is repaired'
post agent 200 '' "$execute" "{$restart, \"scope_id\": \"$again\"}"

echo '11. What an auditor sees of it, newest first'
"$SCOPEGATE" decisions list --config scopegate.yaml --incident-id "$incident"
echo 'All of it holds.'
