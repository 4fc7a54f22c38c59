#!/usr/bin/env bash
# Puts Weft and others under the same load, one after the other on this machine, and prints one table: rates, and beside each
# the processor time that a message costs the server. docs/PERFORMANCE.md says how each is set up, and why so. Expects `weft`
# and `weft-bench` to be built, and what `setup.sh peers` installs.
#
#   bench-peers.sh [ROUNDS]     with more than one round (3, say), the table has the median of each figure
#
# ONLY=weft,nats-synced limits it to these; PEERS_ARGS has more arguments for `weft-bench peers`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
rounds=${1:-1}
cache=${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}
built=${CARGO_TARGET_DIR:-$cache/target}/release
peers=$cache/peers
# Not /tmp: where that is memory, a sync costs nothing and says nothing.
mkdir -p "$cache"
work=$(mktemp -d "$cache/bench-peers.XXXXXX")
pids=()
failed=0

fail() {
  echo "bench-peers.sh: $*" >&2
  exit 1
}

stop() { # ends what was started, the last one first
  local at
  for ((at = ${#pids[@]} - 1; at >= 0; at--)); do
    kill -TERM "${pids[at]}" 2>/dev/null || true
    wait "${pids[at]}" 2>/dev/null || true
  done
  pids=()
}
trap 'stop; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

start() { # start LOG COMMAND…: in the background
  local log=$1
  shift
  "$@" >"$log" 2>&1 </dev/null &
  pids+=($!)
}

until_true() { # until_true LOG COMMAND…: waits until the command succeeds
  local log=$1 deadline=$((SECONDS + 30))
  shift
  until "$@" 2>/dev/null; do
    if ! kill -0 "${pids[-1]}" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
      tail -n 20 "$log" >&2
      fail "a server did not start; the above is what it said"
    fi
    sleep 0.1
  done
}

free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
}
listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1"); }
said() { grep -q "$2" "$1"; }
address_in() { grep -o '127\.0\.0\.1:[0-9]*' "$1" | head -n 1; }

# Each leaves its processes in `pids` and sets `address` and `dialect`.

weft() {
  start "$work/log" "$built/weft" serve --listen 127.0.0.1:0 --data "$work/data" --rate-user 0 --rate-agent 0
  until_true "$work/log" said "$work/log" 'weft is up on'
  address=$(address_in "$work/log")
  dialect=weft
}

nats() { # nats SYNC
  local port
  port=$(free_port)
  cat >"$work/nats.conf" <<CONF
listen: 127.0.0.1:$port
jetstream { store_dir: "$work/data", sync_interval: $1 }
CONF
  start "$work/log" "$peers/nats/bin/nats-server" --config "$work/nats.conf"
  until_true "$work/log" listens "$port"
  address=127.0.0.1:$port
  dialect=nats
}

redis() { # redis FSYNC
  mkdir -p "$work/data"
  start "$work/redis.log" redis-server --port 0 --unixsocket "$work/redis.sock" --dir "$work/data" --save '' \
    --appendonly yes --appendfsync "$1"
  until_true "$work/redis.log" test -S "$work/redis.sock"
  # Beside the packages that it uses.
  cp "$root/benches/peers/relay.mjs" "$peers/"
  REDIS_SOCKET=$work/redis.sock NODE_ENV=production start "$work/log" node "$peers/relay.mjs"
  until_true "$work/log" said "$work/log" 'listening on'
  address=$(address_in "$work/log")
  dialect=relay
}

socketio() {
  cp "$root/benches/peers/socketio.mjs" "$peers/"
  NODE_ENV=production start "$work/log" node "$peers/socketio.mjs"
  until_true "$work/log" said "$work/log" 'listening on'
  address=$(address_in "$work/log")
  dialect=socket-io
}

centrifugo_binary() { type -P centrifugo || { [ -x "$peers/bin/centrifugo" ] && echo "$peers/bin/centrifugo"; }; }
centrifugo() {
  local port
  port=$(free_port)
  # Anybody may publish and read; 20,000 messages are kept, and as many are given back at once.
  cat >"$work/centrifugo.json" <<CONF
{
  "http_server": {"address": "127.0.0.1", "port": "$port"},
  "log": {"level": "error"},
  "client": {
    "insecure": true,
    "recovery_max_publication_limit": 20000,
    "queue_max_size": 67108864
  },
  "channel": {
    "without_namespace": {
      "history_size": 20000,
      "history_ttl": "10m",
      "force_recovery": true
    }
  }
}
CONF
  start "$work/log" "$(centrifugo_binary)" --config "$work/centrifugo.json"
  until_true "$work/log" listens "$port"
  address=127.0.0.1:$port
  dialect=centrifugo
}

measure() { # measure NAME ROUND COMMAND…: starts it and runs the load; goes on when that fails, since the others are worth having
  local name=$1 round=$2 pid file
  shift 2
  if [ -n "${ONLY:-}" ] && [[ ",$ONLY," != *",$name,"* ]]; then return 0; fi
  echo "$name" >&2
  rm -rf "$work/data" "$work/log"
  "$@"
  file=$work/figures.$name.$round.json
  pid=$(IFS=,; echo "${pids[*]}")
  # shellcheck disable=SC2086 # the arguments are words
  if ! "$built/weft-bench" peers --json --peer "$dialect" --url "http://$address" --pids "$pid" ${PEERS_ARGS:-} >"$file"; then
    failed=1
    rm -f "$file"
    tail -n 5 "$work/log" >&2
  fi
  stop
}

for binary in "$built/weft" "$built/weft-bench" "$peers/nats/bin/nats-server" "$peers/node_modules/socket.io"; do
  [ -e "$binary" ] || fail "$binary is missing: make bench-peers"
done
ulimit -n "$(ulimit -Hn)"
WEFT_JWT_SECRET=$(head -c 32 /dev/urandom | base64)
export WEFT_JWT_SECRET

for round in $(seq "$rounds"); do
  measure weft "$round" weft
  measure nats-synced "$round" nats always
  measure redis-synced "$round" redis always
  measure nats "$round" nats 2m
  measure redis "$round" redis everysec
  measure socketio "$round" socketio
  if [ -n "$(centrifugo_binary)" ]; then measure centrifugo "$round" centrifugo; fi
done

version() { "$@" 2>/dev/null | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1; }
names=(
  "weft=Weft $(version "$built/weft" --version), embedded log"
  "nats-synced=NATS JetStream $(version "$peers/nats/bin/nats-server" --version), \`sync_interval: always\`"
  "redis-synced=Redis streams $(version redis-server --version), \`appendfsync always\`, relay"
  "nats=NATS JetStream, as it is by default"
  "redis=Redis streams, \`appendfsync everysec\`, relay"
  "socketio=Socket.IO $(version cat "$peers/node_modules/socket.io/package.json"), state recovery"
  "centrifugo=Centrifugo $(version "$(centrifugo_binary)" version || true)"
)
python3 - "$work" "${names[@]}" <<'PYTHON'
import collections, glob, json, statistics, sys

KEPT = {
    "weft": "synced to the disk",
    "nats-synced": "synced to the disk",
    "redis-synced": "synced to the disk",
    "nats": "written; synced every 2 minutes",
    "redis": "written; synced every second",
    "socketio": "in memory",
    "centrifugo": "in memory",
}
found = collections.defaultdict(list)
columns = []
for path in sorted(glob.glob(sys.argv[1] + "/figures.*.json")):
    name = path.rsplit("/", 1)[1].split(".")[1]
    with open(path, encoding="utf-8") as file:
        for figure in json.load(file)["figures"]:
            found[name, figure["name"]].append(figure["value"])
            if not figure["name"].endswith(": CPU") and figure["name"] not in columns:
                columns.append(figure["name"])
TITLES = {"1 to 1000": "1 to 1,000 readers", "10000 missed": "10,000 missed", "1 × 1024": "1 × 1,024"}
print("| | an answered publish is | " + " | ".join(TITLES.get(column, column) for column in columns) + " |")
print("|---|---|" + "--:|" * len(columns))
for name, title in (pair.split("=", 1) for pair in sys.argv[2:]):
    cells = []
    for column in columns:
        if (name, column) in found:
            rate, cost = (statistics.median(found[name, key]) for key in (column, column + ": CPU"))
            cells.append(f"{rate:,.0f}/s · {cost:,.1f} µs")
        else:
            cells.append("" if (name, columns[0]) in found else "not there")
    print(f"| {title} | {KEPT[name]} | " + " | ".join(cells) + " |")
PYTHON
[ "$failed" -eq 0 ] || fail "not everything could be measured; see above"
