#!/usr/bin/env bash
# Installs what building, testing and the demo need on a fresh Debian or Ubuntu machine. Does nothing,
# and says nothing, where all of it is there.
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
