#!/bin/sh
# Starts the backend and the gate before it, until Ctrl-C. Their data is in a temporary folder, deleted at the end.
set -eu
cd "$(dirname "$0")"
export GATE_PORT="${GATE_PORT:-8000}" ADMIN_PORT="${ADMIN_PORT:-9901}" OPS_PORT="${OPS_PORT:-9902}"
export BACKEND_PORT="${BACKEND_PORT:-9000}"
SCOPEGATE=${SCOPEGATE:-scopegate} PYTHON=${PYTHON:-python3}
for port in "$GATE_PORT" "$ADMIN_PORT" "$OPS_PORT" "$BACKEND_PORT"; do
  code=0
  curl -s -m 2 -o /dev/null "http://127.0.0.1:$port/" || code=$? # 7 if the port is free
  [ "$code" -eq 7 ] || { echo "run.sh: port $port is taken; choose another one" >&2; exit 1; }
done
work=$(mktemp -d)
tokens=var/tokens
export SCOPEGATE_STORE__URL="${SCOPEGATE_STORE__URL:-sqlite:///$work/scopegate.db}"
gate='' backend=''
stop() {
  trap '' INT TERM
  for pid in $gate $backend; do # the gate first, so that what is in flight still gets its answer
    kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work" "$tokens"
  rmdir var 2>/dev/null || true
}
trap stop EXIT
trap 'exit 0' TERM
trap 'sleep 1; exit 0' INT # Ctrl-C reached the gate as well, and a second signal would cut its end short

ready() { # ready PID URL: waits until it answers, 20 seconds at most
  tries=200
  until curl -fs -m 2 -o /dev/null "$2"; do
    tries=$((tries - 1))
    kill -0 "$1" 2>/dev/null && [ "$tries" -gt 0 ] || { echo "run.sh: nothing answers on $2" >&2; exit 1; }
    sleep 0.1
  done
}
# One token for the agent and one for a person, each in a file that only you can read.
token() { "$SCOPEGATE" auth token "$1" --kind "$2" --group "$3" --config scopegate.yaml --output "$tokens/$2.token"; }
rm -rf "$tokens" && mkdir -p "$tokens"
token recovery-agent agent agents && token anna human people || true # the gate below says if this does not work
"$PYTHON" backend.py &
backend=$!
ready "$backend" "http://127.0.0.1:$BACKEND_PORT/api/v1/agents/any"
"$SCOPEGATE" run --config scopegate.yaml --log-format text &
gate=$!
ready "$gate" "http://127.0.0.1:$OPS_PORT/health/ready"
echo "Ready: http://127.0.0.1:$GATE_PORT. Now run ./try.sh in another terminal; Ctrl-C stops everything."
wait "$gate"
