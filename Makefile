# The commands of the project; plain cargo underneath. Run as root on Debian or Ubuntu: the lab makes
# network namespaces, and `setup` installs packages.

SHELL := /bin/bash
CARGO_BIN := $(HOME)/.cargo/bin
export PATH := $(CARGO_BIN):$(PATH)
# The end-to-end suites and the demo run the shipped binaries.
export AMBIT_BIN_DIR := $(CURDIR)/target/release
# Each end-to-end test has its own lab and mostly waits for timers; four at a time use two cores.
E2E_THREADS ?= 4
# A filter for test-e2e, such as SUITE=policy_live or SUITE=policy_live::name_of_a_test.
SUITE ?=
ifdef KEEP
export AMBIT_LAB_KEEP := $(KEEP)
endif
CARGO_DENY := 0.20.2
RELEASE := --locked --release
# The same profile and therefore the same dependencies; our own crates with assertions.
UNDER_TEST := $(RELEASE) --config tests/profile.toml

.PHONY: help demo test test-unit test-e2e test-e2e-serial bench lint build setup root

help:
	@echo "make demo   two nodes, pods that use mTLS without a change, and a capture of the wire"
	@echo "make test   all tests: unit, property, fuzz, conformance, end-to-end"
	@echo "make bench  the cost of policies per connection, compared with no policies"
	@echo "make lint   rustfmt, clippy, licences and bans"

demo: build
	$(AMBIT_BIN_DIR)/lab demo

test: test-unit test-e2e test-e2e-serial

# Always the whole workspace, with a choice of targets: cargo unifies features over the packages that it
# is given, and another choice of packages would compile half of the dependencies again.
test-unit: build
	cargo test $(UNDER_TEST) --no-fail-fast --workspace --exclude ambit-e2e

# After test-unit, which leaves binaries with assertions in target/release, `build` links the shipped ones.
test-e2e: build
	@tests/setup.sh spire
	cargo test $(UNDER_TEST) --workspace --test e2e -- --skip serial:: --test-threads=$(E2E_THREADS) $(SUITE)

# Tests that saturate the cores, or that measure what other tests would disturb.
test-e2e-serial: build
	cargo test $(UNDER_TEST) --workspace --test e2e -- --test-threads=1 serial::$(SUITE)

bench: setup
	cargo bench --locked -p benches

lint: setup
	cargo fmt --all --check
	cargo clippy $(UNDER_TEST) --workspace --all-targets -- -D warnings
	[ "$$(cargo deny --version 2>/dev/null)" = "cargo-deny $(CARGO_DENY)" ] || cargo install --locked --quiet cargo-deny@$(CARGO_DENY)
	cargo deny --locked check bans licenses sources

build: setup
	cargo build $(RELEASE) --bins

setup: root
	@tests/setup.sh

root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root (network namespaces, nftables, apt packages): sudo make $(MAKECMDGOALS)" >&2; exit 1; }
