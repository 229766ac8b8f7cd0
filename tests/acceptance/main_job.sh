#!/usr/bin/env bash
# The main job at full size: a 10 GiB qcow2 with an ext4 of more than 2 GiB of real files and a persistent bitmap, served
# by qemu-nbd, backed up in full and by an increment, and restored in each way; and an increment of a 10 TiB disk.
# usage: main_job.sh [WORKDIR]   (needs 20 GiB of room and tests/setup.sh; takes some minutes)
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --release --locked --quiet
program=$PWD/target/release/nbdbackup
work=$(mktemp -d "${1:-/tmp}/nbdbackup-main-job.XXXXXX")
pids=()
cleanup() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; rm -rf "$work"; }
trap cleanup EXIT
cd "$work"
export PATH=$PATH:/usr/sbin:/sbin NBDBACKUP_REPOSITORY=$work/repository

# Serves an image with its bitmap; --fork returns when the server answers.
serve() { qemu-nbd -r -t -f qcow2 -B bm0 -x vda -e 8 -k "$work/socket" --fork --pid-file="$work/pid" "$1"; pids+=("$(cat pid)"); }
stop() { kill "$(cat pid)"; while kill -0 "$(cat pid)" 2>/dev/null; do read -rt 0.05 <> <(:) || true; done; }
field() { jq -r "$2" <<<"$1"; }
uri="nbd+unix:///vda?socket=$work/socket"

echo "== the disk"
mkdir -p files/usr files/noise
for folder in /usr/bin /usr/lib /usr/share /usr/include "${RUSTUP_HOME:-$HOME/.rustup}"/toolchains; do
  [ -d "$folder" ] && cp -a "$folder" "files/usr/$(tr / _ <<<"$folder")"
  [ "$(du -sm files | cut -f1)" -lt 2300 ] || break
done
for n in $(seq 30); do head -c 4M /dev/zero | openssl enc -aes-128-ctr -K "$(printf %032x "$n")" -iv "$(printf %032x 0)" -nosalt >"files/noise/$n"; done
du -sm files
truncate -s 10G ext4.raw
mkfs.ext4 -q -F -d files ext4.raw
rm -rf files
qemu-img convert -f raw -O qcow2 ext4.raw disk.qcow2
rm ext4.raw
qemu-img bitmap --add disk.qcow2 bm0
"$program" init --encryption none

echo "== full"
serve disk.qcow2
full=$("$program" full "$uri" --name web1 --disk vda --bitmap bm0 --json | tail -n 1)
field "$full" '{status, duration_seconds, disk: .disks[0] | {kind, size_bytes, read_bytes, zero_bytes, stored_bytes}}'
stop
qemu-img convert -f qcow2 -O raw disk.qcow2 first.raw

echo "== scattered writes of 4 to 64 KiB, discards and zeroes"
awk 'BEGIN { srand(7); for (n = 0; n < 1200; n++) { len = 4096 * int(1 + rand() * 16); at = 4096 * int(rand() * (10 * 2^30 - len) / 4096);
  printf "write -q -P %d %d %d\n", int(rand() * 255) + 1, at, len }
  for (n = 0; n < 40; n++) { at = 65536 * int(rand() * 150000); printf "discard -q %d 1048576\nwrite -q -z %d 262144\n", at, at + 2097152 } print "quit" }' |
  qemu-io -f qcow2 -d unmap disk.qcow2 >/dev/null

echo "== incremental"
serve disk.qcow2
dirty=$(nbdinfo --map=qemu:dirty-bitmap:bm0 --json "$uri")
rounded=$(jq '[.[] | select(.type == 1) | {first: (.offset / 131072 | floor), end: ((.offset + .length) / 131072 | ceil)}]
  | reduce .[] as $e ({sum: 0, at: 0}; ([.at, $e.first] | max) as $from | {sum: (.sum + ([0, $e.end - $from] | max)), at: ([.at, $e.end] | max)})
  | .sum * 131072' <<<"$dirty")
incremental=$("$program" incremental "$uri" --name web1 --disk vda --bitmap bm0 --no-fallback --json | tail -n 1)
field "$incremental" '{status, duration_seconds, disk: .disks[0] | {kind, dirty_bytes, read_bytes, zero_bytes, chunks_new, stored_bytes}}'
stop
qemu-img convert -f qcow2 -O raw disk.qcow2 second.raw
read_bytes=$(field "$incremental" '.disks[0].read_bytes')
echo "read $read_bytes of at most $rounded bytes: dirty ranges rounded out to chunks"
[ "$read_bytes" -le "$rounded" ]

echo "== restores"
for which in first:"$(field "$full" .snapshot)" second:"$(field "$incremental" .snapshot)"; do
  reference=${which%%:*}.raw snapshot=${which##*:}
  "$program" restore "$snapshot" --disk vda --to restored.raw
  cmp restored.raw "$reference"
  rm restored.raw
  "$program" restore "$snapshot" --serve "unix:$work/served" --json >serving &
  server=$!
  pids+=("$server")
  until grep -q serving serving; do kill -0 "$server"; read -rt 0.05 <> <(:) || true; done
  served="nbd+unix:///vda?socket=$work/served"
  nbdcopy "$served" copied.raw
  cmp copied.raw "$reference"
  qemu-img convert -f raw -O raw "$served" copied.raw
  cmp copied.raw "$reference"
  nbdinfo --map --totals "$served"
  kill -INT "$server"
  wait "$server"
  rm copied.raw
  echo "$reference: identical by restore --to, nbdcopy and qemu-img convert"
done
rm first.raw second.raw

echo "== 10 TiB with one dirty 64 KiB"
qemu-img create -q -f qcow2 huge.qcow2 10T
qemu-io -f qcow2 -c "write -q -P 1 0 1M" -c "write -q -P 2 9T 1M" huge.qcow2
qemu-img bitmap --add huge.qcow2 bm0
serve huge.qcow2
"$program" full "$uri" --name huge --disk vda --bitmap bm0 --json | tail -n 1 | jq -c '{status, duration_seconds}'
stop
qemu-io -f qcow2 -c "write -q -P 3 5T 64k" huge.qcow2
serve huge.qcow2
find repository -type f | sort >before
/usr/bin/time -f '%e s of wall, %M KiB at most' "$program" incremental "$uri" --name huge --disk vda --bitmap bm0 --no-fallback --json |
  tail -n 1 | jq -c '{status, duration_seconds, disk: .disks[0] | {dirty_bytes, read_bytes, chunks_new}}'
find repository -type f | sort | comm -13 before - | xargs ls -l
stop
echo "== done"
