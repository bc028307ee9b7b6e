#!/usr/bin/env bash
# Installs what building, testing and the demo need on a fresh Debian or Ubuntu machine. Does nothing,
# and says nothing, where all of it is there.
#
# `setup.sh spire` also builds SPIRE, which the end-to-end suite of that name runs against.
set -euo pipefail
# Without this, $(...) goes on after a command that failed in it, such as the check of a checksum.
shopt -s inherit_errexit

# program:package, one for each program that the build, the lab or a suite calls.
needed=(
  cc:build-essential cmake:cmake curl:curl
  ip:iproute2 nft:nftables tcpdump:tcpdump ethtool:ethtool
  iperf3:iperf3 nginx:nginx-light socat:socat nc:netcat-openbsd
  redis-server:redis-server redis-cli:redis-tools openssl:openssl pgrep:procps
)

missing=()
for pair in "${needed[@]}"; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair##*:}")
done
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
# The suites prefer the packaged one; python3-minimal, which many images have, lacks most of the library.
python=/usr/bin/python3
[ -x "$python" ] || python=python3
"$python" -c 'import json, zipfile' >/dev/null 2>&1 || missing+=(python3)

# Installs packages whose services stay off: nginx would take port 80 of this machine, redis 6379.
# What starts a package's service asks this file first; where there is one already, it is obeyed.
install_packages() {
  local policy=/usr/sbin/policy-rc.d service
  if (set -o noclobber && cat >"$policy") 2>/dev/null <<'END'
#!/bin/sh
# Ambit's tests/setup.sh: here while it installs packages.
case " $* " in *" nginx "* | *" redis-server "*) exit 101 ;; esac
END
  then
    # shellcheck disable=SC2064 # this path, also when the function has ended
    trap "rm -f '$policy'" EXIT
    chmod +x "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null
  for service in nginx redis-server; do
    # Nor at the next boot, if it is we who have installed it.
    case " $*" in *" $service"*) systemctl --quiet disable "$service" >/dev/null 2>&1 || true ;; esac
  done
}

if [ ${#missing[@]} -gt 0 ]; then
  echo "installing: ${missing[*]}"
  # In a shell of its own, whose end takes the policy back, however it ends.
  (install_packages "${missing[@]}")
fi

# Whether the version $2 is $1 or later.
at_least() {
  [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

least_cargo=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")
have_cargo=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) || have_cargo=0
if ! at_least "$least_cargo" "$have_cargo"; then
  if command -v rustup >/dev/null 2>&1; then
    echo "Rust $least_cargo or later is needed, and rustup's is $have_cargo: rustup update stable && rustup default stable" >&2
    exit 1
  fi
  # Beside one of the distribution, if there is one: the Makefile looks into ~/.cargo/bin first.
  echo "installing: the Rust toolchain, by rustup ($least_cargo or later is needed)"
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
    RUSTUP_INIT_SKIP_PATH_CHECK=yes sh -s -- -y --profile minimal --component clippy --component rustfmt >/dev/null
fi

# Which SPIRE; its suite looks for the same (tests/e2e/src/spire/programs.rs).
spire_version=1.13.3
spire_folder=${AMBIT_SPIRE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/ambit/spire-$spire_version}

# Prints a go command of at least version $least_go, and installs Debian's where there is none.
# Go 1.21 and later select a newer toolchain by GOTOOLCHAIN. Debian 12 has 1.19, which can download
# the same toolchain as a module, into the module cache. The go command verifies both by checksum.
go_for_spire() {
  local go least_go=1.25.3 version=1.25.5 have arch folder
  go=$(command -v go || command -v /usr/local/go/bin/go) || {
    echo "installing: golang-go" >&2
    (install_packages golang-go >&2)
    go=$(command -v go)
  }
  have=$(GOTOOLCHAIN=local "$go" env GOVERSION)
  if at_least "$least_go" "${have#go}"; then
    echo "$go"
  elif at_least 1.21 "${have#go}"; then
    GOTOOLCHAIN=go$version "$go" env GOROOT | sed 's|$|/bin/go|'
  else
    arch=$("$go" env GOARCH)
    folder=$("$go" mod download -json "golang.org/toolchain@v0.0.1-go$version.linux-$arch" |
      "$python" -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
    chmod -R u+x "$folder/bin" "$folder/pkg/tool"
    echo "$folder/bin/go"
  fi
}

# Nobody packages SPIRE for Debian, but it is a Go module, whose checksum and whose dependencies' the
# go command verifies. Not optimised: that halves the five minutes of CPU which it then takes, once.
spire() {
  [ -x "$spire_folder/spire-server" ] && [ -x "$spire_folder/spire-agent" ] && return
  echo "building: SPIRE $spire_version, into $spire_folder"
  mkdir -p "$(dirname "$spire_folder")"
  work=$(mktemp -d "$spire_folder.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  export GOMODCACHE=$work/modules GOCACHE=$work/cache GOFLAGS='-modcacherw -buildvcs=false' CGO_CFLAGS=-O0
  go=$(go_for_spire)
  export GOTOOLCHAIN=local
  module=$("$go" mod download -json "github.com/spiffe/spire@v$spire_version" |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
  (cd "$module" && "$go" build -trimpath -gcflags='all=-N -l -dwarf=false' -ldflags='-s -w' \
    -o "$work/bin/" ./cmd/spire-server ./cmd/spire-agent)
  mkdir -p "$spire_folder"
  mv "$work/bin/"* "$spire_folder/"
}

if [ "${1:-}" = spire ]; then
  spire
fi
