#!/usr/bin/env bash
# Measures Weft on each log, and in the same run what the log and the store can do bare; prints each figure beside its
# limit and as a ratio to both. Expects `weft` and `weft-bench` to be built. A figure below its limit is marked and is no
# failure, since figures depend on the machine; a bench that meets an error is one.
#
#   bench.sh [embedded] [kafka]     both unless named
#
# WEFT_BENCH_DIR (made under ~/.cache/weft, and removed) holds data and logs; one that is given is kept, with the
# figures as JSON in it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}
built=${CARGO_TARGET_DIR:-$cache/target}/release
weft=$built/weft
bench=$built/weft-bench
# Not /tmp: where that is memory, a sync costs nothing and says nothing.
mkdir -p "$cache"
work=${WEFT_BENCH_DIR:-$(mktemp -d "$cache/bench.XXXXXX")}
mkdir -p "$work"
server=
broker=
failed=0

finish() {
  stop_server
  [ -z "$broker" ] || "$root/scripts/kafka.sh" stop || true
  [ -n "${WEFT_BENCH_DIR:-}" ] || rm -rf "$work"
}

fail() {
  echo "bench.sh: $*" >&2
  exit 1
}

stop_server() {
  [ -n "$server" ] || return 0
  kill -TERM "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=
}

# A port that is free, and so is the one after it (for the controller of Kafka).
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && continue
    (exec 3<>"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null && continue
    echo "$port"
    return
  done
}

ready() {
  timeout 2 bash -c '
    exec 3<>/dev/tcp/127.0.0.1/'"$1"' || exit 1
    printf "GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" >&3
    grep -q "^HTTP/1.1 200" <&3' 2>/dev/null
}

start_server() {
  local log=$1 port deadline
  port=$(free_port)
  export WEFT_URL=http://127.0.0.1:$port
  # Without limits of rates: one user of a bench publishes as much as the server can accept.
  "$weft" serve --listen "127.0.0.1:$port" --data "$work/$log" --log "$log" --rate-user 0 --rate-agent 0 >"$work/$log.log" 2>&1 \
    </dev/null &
  server=$!
  deadline=$((SECONDS + 60))
  until ready "$port"; do
    if ! kill -0 "$server" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
      tail -n 30 "$work/$log.log" >&2
      fail "the server did not get ready; the above is the end of its log"
    fi
    sleep 0.1
  done
}

# Runs a bench and keeps its figures; goes on when it fails, since the others are worth having.
measure() {
  local file=$work/$1.json
  shift
  echo "weft-bench $*" >&2
  if ! "$bench" "$@" --json >"$file"; then
    failed=1
    # One that failed before it measured anything has printed nothing.
    [ -s "$file" ] || rm -f "$file"
  fi
}

bench_log() {
  local log=$1
  if [ "$log" = kafka ]; then
    WEFT_KAFKA_PORT=$(free_port)
    export WEFT_KAFKA_PORT WEFT_KAFKA_DIR=$work/broker WEFT_BROKERS=127.0.0.1:$WEFT_KAFKA_PORT
    broker=started
    "$root/scripts/kafka.sh" start >&2
  fi
  start_server "$log"
  measure "$log-server" all --log "$log"
  stop_server
  measure "$log-rebuild" rebuild --log "$log" --data "$work/$log"
  measure "$log-bare" bare --log "$log" --dir "$work/$log-bare"
}

for built in "$weft" "$bench"; do
  [ -x "$built" ] || fail "$built is missing: cargo build --release --workspace --bins"
done
# Thousands of connections on both ends.
ulimit -n "$(ulimit -Hn)"
WEFT_JWT_SECRET=$(head -c 32 /dev/urandom | base64)
export WEFT_JWT_SECRET
trap finish EXIT
trap 'exit 130' INT TERM

logs=("$@")
[ $# -gt 0 ] || logs=(embedded kafka)
for log in "${logs[@]}"; do
  case $log in
    embedded | kafka) bench_log "$log" ;;
    *) fail "usage: bench.sh [embedded] [kafka]" ;;
  esac
done

shopt -s nullglob
figures=("$work"/*-server.json "$work"/*-rebuild.json "$work"/*-bare.json)
[ ${#figures[@]} -gt 0 ] || fail "nothing could be measured"
"$bench" report "${figures[@]}"
[ "$failed" -eq 0 ] || fail "not everything could be measured; see above"
