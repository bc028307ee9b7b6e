#!/usr/bin/env bash
# Installs what building, testing and the demo need on a fresh Debian or Ubuntu machine. Does nothing,
# and says nothing, where all of it is there.
#
# `setup.sh spire` also builds SPIRE, which the end-to-end suite of that name runs against.
set -euo pipefail

# program:package, one for each program that the build, the lab or a suite calls.
needed=(
  cc:build-essential cmake:cmake curl:curl
  ip:iproute2 nft:nftables tcpdump:tcpdump ethtool:ethtool
  iperf3:iperf3 nginx:nginx-light socat:socat nc:netcat-openbsd
  redis-server:redis-server redis-cli:redis-tools openssl:openssl pgrep:procps python3:python3-minimal
)

missing=()
for pair in "${needed[@]}"; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)

if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if ! command -v cargo >/dev/null 2>&1; then
  echo "installing: the Rust toolchain, by rustup"
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy --component rustfmt >/dev/null
fi

# Which SPIRE; its suite looks for the same (tests/e2e/src/spire/programs.rs).
spire_version=1.13.3
spire_folder=${AMBIT_SPIRE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/ambit/spire-$spire_version}

# Nobody packages SPIRE for Debian, but it is a Go module, whose checksum and whose dependencies' the
# go command verifies. Not optimised: that halves the five minutes of CPU which it then takes, once.
spire() {
  [ -x "$spire_folder/spire-server" ] && [ -x "$spire_folder/spire-agent" ] && return
  echo "building: SPIRE $spire_version, into $spire_folder"
  if ! command -v go >/dev/null 2>&1; then
    # Old as it may be, it brings the one that is needed by itself.
    apt-get install -y -qq --no-install-recommends golang-go >/dev/null
  fi
  mkdir -p "$(dirname "$spire_folder")"
  work=$(mktemp -d "$spire_folder.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  export GOMODCACHE=$work/modules GOCACHE=$work/cache GOFLAGS='-modcacherw -buildvcs=false' CGO_CFLAGS=-O0
  module=$(go mod download -json "github.com/spiffe/spire@v$spire_version" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
  (cd "$module" && go build -trimpath -gcflags='all=-N -l -dwarf=false' -ldflags='-s -w' \
    -o "$work/bin/" ./cmd/spire-server ./cmd/spire-agent)
  mkdir -p "$spire_folder"
  mv "$work/bin/"* "$spire_folder/"
}

if [ "${1:-}" = spire ]; then
  spire
fi
