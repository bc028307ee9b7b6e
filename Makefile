# The commands of the project; plain cargo underneath. Run as root on Debian or Ubuntu: the lab makes
# network namespaces, and `setup` installs packages.

SHELL := /bin/bash
CARGO_BIN := $(HOME)/.cargo/bin
export PATH := $(CARGO_BIN):$(PATH)
# The end-to-end suites and the demo run the binaries that are shipped.
export AMBIT_BIN_DIR := $(CURDIR)/target/release
# Each end-to-end test owns a lab; two at a time keep two cores busy.
E2E_THREADS ?= 2
CARGO_DENY := 0.20.2

.PHONY: help demo test test-unit test-e2e bench lint build setup root

help:
	@echo "make demo   two nodes, pods that talk mTLS without knowing it, and the proof from the wire"
	@echo "make test   everything that shows it works: unit, property, fuzz, conformance, end-to-end"
	@echo "make bench  what policies cost a connection, side by side with none"
	@echo "make lint   rustfmt, clippy, licences and bans"

demo: build
	$(AMBIT_BIN_DIR)/lab demo

test: test-unit test-e2e

test-unit: setup
	cargo test --locked --no-fail-fast --workspace --exclude lab --exclude ambit-e2e

test-e2e: build
	@tests/setup.sh spire
	cargo test --locked --no-fail-fast -p lab -p ambit-e2e -- --test-threads=$(E2E_THREADS)

bench: setup
	cargo bench --locked -p benches

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	[ "$$(cargo deny --version 2>/dev/null)" = "cargo-deny $(CARGO_DENY)" ] || cargo install --locked --quiet cargo-deny@$(CARGO_DENY)
	cargo deny --locked check bans licenses sources

build: setup
	cargo build --locked --release --bins

setup: root
	@tests/setup.sh

root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root (network namespaces, nftables, apt packages): sudo make $(MAKECMDGOALS)" >&2; exit 1; }
