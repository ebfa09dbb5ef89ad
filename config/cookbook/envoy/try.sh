#!/bin/sh
# Goes through the steps of the page, and fails at the first one that does not succeed. Needs ./run.sh running.
set -eu
proxy=http://127.0.0.1:${PROXY_PORT:-8080}
admin=http://127.0.0.1:${ADMIN_PORT:-9901}
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
post() { # post STATUS ERROR TENANT PATH JSON CURL-ARGUMENTS...
  wanted=$1 code=$2 token="Authorization: Bearer token-of-$3" path=$4 body=$5
  shift 5
  ask "$wanted" "$code" "$proxy$path" -H "$token" -H 'Content-Type: application/json' -d "$body" "$@"
}

execute=/api/v1/recovery/execute
incident=inc_$(date +%s)_$$
retry='"incident_id": "'$incident'", "action": "retry_agent"'
restart='"incident_id": "'$incident'", "action": "restart_agent"'
intent='"intent": "The agent answers in the wrong language"'

echo '1. A request without a token is refused'
ask 401 '' "$proxy/" -H 'X-Tenant: red'

echo '2. A scope for one execution: without it refused, with it executed, then used up'
post 400 scoped_execution_required red $execute "{$retry}"
post 201 '' red /api/v1/recovery/scope "{$retry, $intent}"
scope=$(member scope_id)
post 200 '' red $execute "{$retry, \"scope_id\": \"$scope\"}" -H "X-Request-Id: req_$incident"
expect done retry_agent "$(member done)"
expect 'request_id at the backend' "req_$incident" "$(member request_id)"
post 400 scope_exhausted red $execute "{$retry, \"scope_id\": \"$scope\"}"
post 403 action_outside_scope red $execute "{$restart, \"scope_id\": \"$scope\"}"
ask 200 '' "$admin/api/v1/decisions?tenant_id=red&request_id=req_$incident&event=admitted"

echo '3. The scope belongs to the tenant that Envoy names, and not to the one that the client names'
post 404 scope_not_found blue $execute "{$retry, \"scope_id\": \"$scope\"}" -H 'X-Tenant: red'
post 403 policy_denied blue /api/v1/recovery/scope "{$restart, $intent}" -H 'X-Tenant: red' -H 'X_Tenant: red'
post 201 '' red /api/v1/recovery/scope "{$restart, $intent}"

echo '4. The gate sees the path as it was written, and refuses what can be read in two ways'
post 400 ambiguous_path red "/x/..$execute" "{$retry}" --path-as-is
post 400 ambiguous_path red "/$execute" "{$retry}" --path-as-is
post 400 ambiguous_path red /api/v1/recovery%2Fexecute "{$retry}"

echo '5. Everything else passes through as it came'
ask 200 '' --path-as-is "$proxy/files//a%2Fb/../c?d=%20" -H 'Authorization: Bearer token-of-red' -H 'X-Tenant: blue'
expect path '/files//a%2Fb/../c?d=%20' "$(member path)"
expect tenant red "$(member tenant)"

echo '6. A WebSocket passes, but not on the gated path'
websocket='-H Connection:Upgrade -H Sec-WebSocket-Version:13 -H Sec-WebSocket-Key:dGhlIHNhbXBsZSBub25jZQ=='
red='Authorization: Bearer token-of-red'
ask 101 '' $websocket -H 'Upgrade: websocket' -H "$red" "$proxy/events"
ask 400 upgrade_refused $websocket -H 'Upgrade: websocket' -H "$red" "$proxy$execute"

echo '7. A client cannot have Envoy repeat a request: the backend failed once, and one attempt is spent'
post 201 '' red /api/v1/recovery/scope "{$retry, $intent, \"max_attempts\": 3}"
scope=$(member scope_id)
post 503 '' red $execute "{$retry, \"scope_id\": \"$scope\", \"parameters\": {\"fail\": true}}" \
  -H 'x-envoy-retry-on: 5xx' -H 'x-envoy-max-retries: 2'
ask 200 '' "$proxy/api/v1/recovery/scopes/$incident" -H "$red"
expect 'attempts_remaining of 3' 2 "$("$PYTHON" -c '
import json, sys
print(json.load(open(sys.argv[1]))["scopes"][0]["attempts_remaining"])' "$answer")"
echo 'All of it holds.'
