#!/usr/bin/env bash
# Holds two builds of the server against each other in one run, alternating, so that what the machine does meanwhile is in
# both: prints each figure's median for either build and their ratio. The load comes from the same `weft-bench`.
#
#   bench-pair.sh OLD NEW [ROUNDS]     OLD and NEW are `weft` binaries; 4 rounds unless given
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ $# -ge 2 ] || { echo "usage: bench-pair.sh OLD NEW [ROUNDS]" >&2; exit 2; }
old=$(realpath "$1")
new=$(realpath "$2")
rounds=${3:-4}
cache=${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}
bench=${WEFT_BENCH:-${CARGO_TARGET_DIR:-$cache/target}/release/weft-bench}
# Not /tmp: where that is memory, a sync costs nothing and says nothing.
work=$(mktemp -d "$cache/pair.XXXXXX")
server=
stop() { [ -z "$server" ] || { kill -TERM "$server"; wait "$server" || true; server=; }; }
trap 'stop; rm -rf "$work"' EXIT
WEFT_JWT_SECRET=$(head -c 32 /dev/urandom | base64)
export WEFT_JWT_SECRET
ulimit -n "$(ulimit -Hn)"

measure() { # measure NAME BINARY ROUND: all benches against a fresh server of this build
  local name=$1 binary=$2 round=$3 data=$work/$1-$3
  "$binary" serve --listen 127.0.0.1:0 --data "$data" --rate-user 0 --rate-agent 0 >"$data.log" 2>&1 </dev/null &
  server=$!
  until WEFT_URL=$(grep -o 'http://[0-9.:]*' "$data.log" | head -n 1) && [ -n "$WEFT_URL" ]; do
    kill -0 "$server" || { tail "$data.log" >&2; exit 1; }
    sleep 0.1
  done
  export WEFT_URL
  local number=0 arguments
  while read -r arguments; do
    number=$((number + 1))
    # shellcheck disable=SC2086 # the arguments are words
    "$bench" $arguments --json </dev/null >"$work/figures.$name.$round.$number.json"
  done <<'BENCHES'
ack --clients 1 --window 1024 --seconds 4
ack --clients 32 --window 64 --seconds 4
one-at-a-time --seconds 3
latency --users 30 --rate 1000 --seconds 4
fanout
replay
BENCHES
  stop
  rm -rf "$data"
}

for round in $(seq "$rounds"); do
  echo "round $round of $rounds" >&2
  # Each build goes first as often as the other: the second of a round pays for what the disk still does for the first.
  if ((round % 2)); then
    measure old "$old" "$round"
    measure new "$new" "$round"
  else
    measure new "$new" "$round"
    measure old "$old" "$round"
  fi
done

python3 - "$work" <<'PYTHON'
import collections, glob, json, statistics, sys
found = collections.defaultdict(lambda: {"old": [], "new": []})
for path in sorted(glob.glob(sys.argv[1] + "/figures.*.json")):
    _, build, _, number, _ = path.rsplit("/", 1)[1].split(".")
    for figure in json.load(open(path))["figures"]:
        key = number, figure["name"], figure.get("unit", "")
        found[key][build].append(figure["value"])
print(f'{"figure":44} {"old":>12} {"new":>12}  new/old')
for (number, name, unit), builds in sorted(found.items()):
    if builds["old"] and builds["new"]:
        old, new = (statistics.median(builds[build]) for build in ("old", "new"))
        ratio = f"{new / old:.2f}" if old else "-"
        print(f"{name + ' ' + unit:44} {old:12,.1f} {new:12,.1f}  {ratio}")
PYTHON
