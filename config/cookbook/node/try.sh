#!/bin/sh
# Goes through the steps of the page, and fails at the first one that does not succeed. Needs ./run.sh running.
set -eu
cd "$(dirname "$0")"
gate=http://127.0.0.1:${GATE_PORT:-8000}
ops=http://127.0.0.1:${OPS_PORT:-9902}
admin=http://127.0.0.1:${ADMIN_PORT:-9901}
PYTHON=${PYTHON:-python3}
answer=$(mktemp)
trap './mode.sh shadow; rm -f "$answer"' EXIT # as it was before
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

mode() { # mode NAME: sets the mode of the route, and waits until it is in force
  ./mode.sh "$1"
  [ "$1" = shadow ] && wanted="['**/recovery/execute']" || wanted='[]'
  tries=100
  until ask 200 '' "$admin/api/v1/status" >/dev/null && [ "$(member shadow_routes)" = "$wanted" ]; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || { echo "  FAILED: the sidecar did not take up mode: $1" >&2; exit 1; }
    sleep 0.1
  done
  echo "  ok     mode: $1, without a restart"
}

incident=inc_$(date +%s)_$$
retry='"incident_id": "'$incident'", "action": "retry_agent"'

echo '1. In shadow mode an execution without a scope goes through'
mode shadow
post 200 '' /api/v1/recovery/execute "{$retry}"

echo '2. Its record says what would have been refused, and a metric counts it'
ask 200 '' "$admin/api/v1/decisions?incident_id=$incident&event=admitted"
expect would_refuse scoped_execution_required "$("$PYTHON" -c '
import json, sys
print(json.load(open(sys.argv[1]))["decisions"][0]["details"]["would_refuse"][0]["error"])' "$answer")"
curl -s -m 15 "$ops/metrics" | grep 'scopegate_shadow_refusals_total{.*scoped_execution_required'

echo '3. One edit later it is refused'
mode enforce
post 400 scoped_execution_required /api/v1/recovery/execute "{$retry}"

echo '4. With a scope it goes through, once, and only for its own action'
post 201 '' /api/v1/recovery/scope "{$retry, \"intent\": \"The agent stopped in the middle of a run\"}"
scope=$(member scope_id)
post 200 '' /api/v1/recovery/execute "{$retry, \"scope_id\": \"$scope\"}"
expect done retry_agent "$(member done)"
post 400 scope_exhausted /api/v1/recovery/execute "{$retry, \"scope_id\": \"$scope\"}"
post 403 action_outside_scope /api/v1/recovery/execute \
  "{\"incident_id\": \"$incident\", \"action\": \"restart_agent\", \"scope_id\": \"$scope\"}"

echo '5. Everything else passes through'
ask 200 '' "$gate/api/v1/executed"
echo 'All of it holds.'
