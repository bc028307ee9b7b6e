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

# Prints a go command that is new enough for SPIRE; Debian's is not, so the one that Go's own module
# proxy serves is fetched into the folder $1 where there is none.
go_for_spire() {
  local least=go1.25.3 version=1.25.5 arch sum go have
  for go in go /usr/local/go/bin/go; do
    have=$(GOTOOLCHAIN=local "$go" env GOVERSION 2>/dev/null) || continue
    if [ "$(printf '%s\n' "$least" "$have" | sort -V | head -n 1)" = "$least" ]; then
      command -v "$go"
      return
    fi
  done
  case $(uname -m) in
    x86_64) arch=amd64 sum=8cea6783dab64d68b38f5b81ecd38d45155a3c06638991acc6af19e0fca80edb ;;
    aarch64) arch=arm64 sum=4d31d22f75fed99025f7b082319eabeb74106d11e343fc203b336ba2afdeb3a1 ;;
    *) echo "no Go toolchain is known for $(uname -m): install Go 1.25.3 or later" >&2; return 1 ;;
  esac
  curl -fsSL -o "$1/go.zip" "https://proxy.golang.org/golang.org/toolchain/@v/v0.0.1-go$version.linux-$arch.zip"
  echo "$sum  $1/go.zip" | sha256sum --check --quiet >&2
  python3 -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' "$1/go.zip" "$1/go"
  go=$1/go/golang.org/toolchain@v0.0.1-go$version.linux-$arch
  chmod -R a+x "$go/bin" "$go/pkg/tool"
  echo "$go/bin/go"
}

# Nobody packages SPIRE for Debian, but it is a Go module, whose checksum and whose dependencies' the
# go command verifies. Not optimised: that halves the five minutes of CPU which it then takes, once.
spire() {
  [ -x "$spire_folder/spire-server" ] && [ -x "$spire_folder/spire-agent" ] && return
  echo "building: SPIRE $spire_version, into $spire_folder"
  mkdir -p "$(dirname "$spire_folder")"
  work=$(mktemp -d "$spire_folder.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  go=$(go_for_spire "$work")
  export GOMODCACHE=$work/modules GOCACHE=$work/cache GOFLAGS='-modcacherw -buildvcs=false' CGO_CFLAGS=-O0
  module=$("$go" mod download -json "github.com/spiffe/spire@v$spire_version" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
  (cd "$module" && "$go" build -trimpath -gcflags='all=-N -l -dwarf=false' -ldflags='-s -w' \
    -o "$work/bin/" ./cmd/spire-server ./cmd/spire-agent)
  mkdir -p "$spire_folder"
  mv "$work/bin/"* "$spire_folder/"
}

if [ "${1:-}" = spire ]; then
  spire
fi
