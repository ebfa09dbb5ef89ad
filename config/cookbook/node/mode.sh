#!/bin/sh
# ./mode.sh enforce, ./mode.sh shadow: sets the mode of the route in scopegate.yaml. A running sidecar takes it up.
set -eu
cd "$(dirname "$0")"
case ${1:-} in
  enforce | shadow) ;;
  *) echo 'usage: ./mode.sh enforce|shadow' >&2; exit 2 ;;
esac
# Write a new file and rename it, so that the sidecar never reads half a file.
sed "s/^\( *mode:\) .*/\1 $1/" scopegate.yaml >scopegate.yaml.new
mv scopegate.yaml.new scopegate.yaml
