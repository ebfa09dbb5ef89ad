#!/bin/sh
# ./mode.sh enforce, ./mode.sh shadow: puts the route of scopegate.yaml into this mode. A running sidecar sees it.
set -eu
cd "$(dirname "$0")"
case ${1:-} in
  enforce | shadow) ;;
  *) echo 'usage: ./mode.sh enforce|shadow' >&2; exit 2 ;;
esac
# Written beside it and renamed, so that nobody ever reads half a file.
sed "s/^\( *mode:\) .*/\1 $1/" scopegate.yaml >scopegate.yaml.new
mv scopegate.yaml.new scopegate.yaml
