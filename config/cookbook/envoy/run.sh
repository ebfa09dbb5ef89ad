#!/bin/sh
# Starts backend, gate and Envoy, until Ctrl-C. Their data is in a temporary folder, deleted at the end.
set -eu
cd "$(dirname "$0")"
export GATE_PORT="${GATE_PORT:-8000}" ADMIN_PORT="${ADMIN_PORT:-9901}" OPS_PORT="${OPS_PORT:-9902}"
export BACKEND_PORT="${BACKEND_PORT:-9000}" PROXY_PORT="${PROXY_PORT:-8080}"
export ENVOY_ADMIN_PORT="${ENVOY_ADMIN_PORT:-9903}"
SCOPEGATE=${SCOPEGATE:-scopegate} PYTHON=${PYTHON:-python3} ENVOY=${ENVOY:-envoy}
for port in "$GATE_PORT" "$ADMIN_PORT" "$OPS_PORT" "$BACKEND_PORT" "$PROXY_PORT" "$ENVOY_ADMIN_PORT"; do
  code=0
  curl -s -m 2 -o /dev/null "http://127.0.0.1:$port/" || code=$? # 7 if the port is free
  [ "$code" -eq 7 ] || { echo "run.sh: port $port is taken; choose another one" >&2; exit 1; }
done
work=$(mktemp -d)
export SCOPEGATE_STORE__URL="${SCOPEGATE_STORE__URL:-sqlite:///$work/scopegate.db}"
envoy='' gate='' backend=''
stop() {
  trap '' INT TERM
  for pid in $envoy $gate $backend; do # the backend last: what the gate has in flight still ends
    kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 0' TERM
trap 'sleep 1; exit 0' INT # Ctrl-C reached the gate as well, and a second signal would cut its end short

ready() { # ready PID CURL-ARGUMENTS...: waits until it answers, 20 seconds at most
  pid=$1 tries=200
  shift
  until curl -fs -m 2 -o /dev/null "$@"; do
    tries=$((tries - 1))
    kill -0 "$pid" 2>/dev/null && [ "$tries" -gt 0 ] || { echo "run.sh: nothing answers on $1" >&2; exit 1; }
    sleep 0.1
  done
}
"$PYTHON" backend.py &
backend=$!
ready "$backend" "http://127.0.0.1:$BACKEND_PORT/"
"$SCOPEGATE" run --config scopegate.yaml --log-format text &
gate=$!
ready "$gate" "http://127.0.0.1:$OPS_PORT/health/ready"
sed -e "s/\${GATE_PORT}/$GATE_PORT/" -e "s/\${PROXY_PORT}/$PROXY_PORT/" \
  -e "s/\${ENVOY_ADMIN_PORT}/$ENVOY_ADMIN_PORT/" envoy.template.yaml >"$work/envoy.yaml"
"$ENVOY" --mode validate -c "$work/envoy.yaml" -l error
"$ENVOY" -c "$work/envoy.yaml" -l warning --concurrency 1 --disable-hot-restart &
envoy=$!
ready "$envoy" "http://127.0.0.1:$PROXY_PORT/" -H 'Authorization: Bearer token-of-red'
echo "Ready: http://127.0.0.1:$PROXY_PORT. Now run ./try.sh in another terminal; Ctrl-C stops everything."
wait "$gate"
