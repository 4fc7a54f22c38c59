# `make` lists the targets. One cargo profile (release) builds everything, so that RocksDB is compiled once (docs/decisions/0002).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

# Build output outlives the checkout: a fresh clone on the same machine builds in seconds. A CARGO_TARGET_DIR that is set wins.
export WEFT_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft
export CARGO_TARGET_DIR ?= $(WEFT_CACHE)/target
export PATH := $(PATH):$(HOME)/.cargo/bin:$(WEFT_CACHE)/tools/bin

.DEFAULT_GOAL := help
.PHONY: help setup run test lint fmt bench bench-peers instructions kafka

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what building Weft needs and this machine lacks
	@scripts/setup.sh

run: setup ## build, start on the embedded log in ./data, play the demo, stay up (ARGS="--listen …")
	cargo build --release --bin weft
	@exec "$$CARGO_TARGET_DIR/release/weft" serve --dev --demo $(ARGS)

# The integration tests are one binary (tests/it) and run last, so that the output ends with one summary, theirs. Unit
# tests, documentation examples and the count of instructions come first; a failure in them stops the run before it. They
# run weft-bench, too.
test: ## run every test, on both logs (ONLY=name: the integration tests whose name contains it)
	@scripts/setup.sh test
ifndef ONLY
	cargo test --release --workspace --lib --bins
	cargo test --release --doc
endif
	cargo build --release --package weft-bench
ifndef ONLY
	cargo test --release --test it --no-run
	scripts/instructions.sh
endif
	cargo test --release --test it -- $(ONLY)

lint: ## formatting, clippy, licences and sources of dependencies, syntax of scripts, JSON and YAML
	@scripts/setup.sh lint
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets --locked -- -D warnings
	cargo deny --locked check bans licenses sources
	scripts/check-files.sh

fmt: ## format the Rust sources
	cargo fmt --all

instructions: ## count what a message costs, against benches/instructions.txt (ARGS=--accept: make that the figure)
	@scripts/setup.sh test
	cargo build --release --workspace --bins
	@scripts/instructions.sh $(ARGS)

bench: ## measure on both logs, beside what the log and the store can do bare (ARGS=embedded: on that one alone)
	@scripts/setup.sh test
	cargo build --release --workspace --bins
	scripts/bench.sh $(ARGS)

bench-peers: ## measure Weft beside NATS, Redis, Socket.IO and Centrifugo, one table (ARGS=3: the median of three rounds)
	@scripts/setup.sh peers
	cargo build --release --workspace --bins
	@scripts/bench-peers.sh $(ARGS)

kafka: ## start a real Kafka broker (KRaft) in .kafka/ and print its address
	@scripts/setup.sh test
	@scripts/kafka.sh start
	@echo 'Weft on it:  make run ARGS="--log kafka"'
	@echo "Stop it:     scripts/kafka.sh stop"
