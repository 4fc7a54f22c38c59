#!/usr/bin/env bash
# Counts the instructions that a message costs the server, and holds them against the figure in benches/instructions.txt.
# More than 5 % off in either direction is a failure: what makes a message cheaper is written down as well, or it could be
# lost again unseen. Expects `weft` and `weft-bench` to be built. See docs/decisions/0064.
#
#   instructions.sh            compares
#   instructions.sh --accept   makes what was counted the figure of this kind of processor
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}
built=${CARGO_TARGET_DIR:-$cache/target}/release
file=$root/benches/instructions.txt
# What both runs have in common, the start above all, is in neither figure: only the rounds between the two are counted.
few=100
many=500
batch=32
tolerated=5
export PATH="$PATH:$HOME/.cargo/bin"

case ${1:-} in
  '' | --accept) ;;
  *) echo "usage: instructions.sh [--accept]" >&2; exit 2 ;;
esac

fail() {
  echo "instructions.sh: $*" >&2
  exit 1
}

for binary in "$built/weft" "$built/weft-bench"; do
  [ -x "$binary" ] || fail "$binary is missing: cargo build --release --workspace --bins"
done
command -v valgrind >/dev/null || fail "valgrind is missing: scripts/setup.sh test"

mkdir -p "$cache"
work=$(mktemp -d "$cache/instructions.XXXXXX")
server=
finish() {
  [ -z "$server" ] || kill -KILL "$server" 2>/dev/null || true
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM
WEFT_JWT_SECRET=$(head -c 32 /dev/urandom | base64)
export WEFT_JWT_SECRET

count() { # count ROUNDS: prints how many instructions a server takes for that, from its start to its end
  local data=$work/$1 deadline=$((SECONDS + 120))
  # Search is beside the way of a message, and does its work by the clock.
  # With one worker the order of tasks is the same on each machine, however many cores that has.
  TOKIO_WORKER_THREADS=1 valgrind --tool=callgrind --callgrind-out-file="$data.callgrind" --log-file="$data.valgrind" \
    "$built/weft" serve --listen 127.0.0.1:0 --data "$data" --rate-user 0 --rate-agent 0 --search off >"$data.log" 2>&1 </dev/null &
  server=$!
  until WEFT_URL=$(grep -o 'http://[0-9.:]*' "$data.log" 2>/dev/null | head -n 1) && [ -n "$WEFT_URL" ]; do
    if ! kill -0 "$server" 2>/dev/null || [ $SECONDS -ge $deadline ]; then
      tail -n 30 "$data.log" "$data.valgrind" >&2
      fail "the server did not start; the above is what it said"
    fi
    sleep 0.1
  done
  export WEFT_URL
  "$built/weft-bench" rounds --rounds "$1" --batch "$batch" >"$data.bench" || fail "the work was not done; see above"
  kill -TERM "$server"
  wait "$server" || fail "the server ended with $?: $(tail -n 5 "$data.log")"
  server=
  sed -n 's/.*Collected : \([0-9]*\).*/\1/p' "$data.valgrind"
}

# Not in a subshell each, so that a server that is left over can be ended.
count "$few" >"$work/few"
count "$many" >"$work/many"
messages=$(((many - few) * batch))
counted=$((($(cat "$work/many") - $(cat "$work/few")) / messages))
[ "$counted" -gt 0 ] || fail "nothing was counted"

machine=$(uname -m)
toolchain=$(rustc --version)
accept="To accept $counted as the new figure, with the reason in the commit message: make instructions ARGS=--accept"

if [ "${1:-}" = --accept ]; then
  { grep -v "^$machine " "$file"; echo "$machine $counted $toolchain"; } >"$work/accepted"
  cat "$work/accepted" >"$file"
  echo "$counted instructions a message is the figure for $machine now, in ${file#"$root"/}"
  exit
fi

read -r _ expected made_with < <(grep "^$machine " "$file") || fail "$file has no figure for $machine. $accept"
off=$(awk -v counted="$counted" -v expected="$expected" 'BEGIN { printf "%+.1f", (counted / expected - 1) * 100 }')
said="$counted instructions a message, $off % from the figure of $expected"
if awk -v off="$off" -v tolerated="$tolerated" 'BEGIN { exit !(off > tolerated || off < -tolerated) }'; then
  echo "instructions.sh: $said, and $tolerated % is tolerated." >&2
  [ "$made_with" = "$toolchain" ] || echo "That was made with $made_with; this is $toolchain." >&2
  kept=$cache/instructions.callgrind
  cp "$work/$many.callgrind" "$kept"
  echo "Which functions they are in: callgrind_annotate $kept" >&2
  echo "$accept" >&2
  exit 1
fi
echo "$said"
