#!/usr/bin/env bash
# Makes the disks that examples/bench.rs measures with, once: mkdisk.sh [DIR]
#
#   gen1.raw, gen1.qcow2   4 GiB of ext4 with about 2.2 GiB of this machine's own files, the rest holes; bitmap bm0 empty
#   gen2.qcow2             what gen1 became after some 1,200 scattered writes and 8 runs, which bm0 recorded
#   gen2.raw               the same, to compare with
#   huge.qcow2             10 TiB with 64 MiB of data; bitmap bm0 empty
#
# The files differ from machine to machine; on one machine the same seed makes the same disks.
set -euo pipefail

dir=${1:-target/bench/disks}
seed=${SEED:-7}
size=$((4 << 30))
budget_mib=2200
export PATH="$PATH:/usr/sbin:/sbin"

[ ! -e "$dir/complete" ] || exit 0
mkdir -p "$dir"
cd "$dir"
rm -rf stage slices ./*.raw ./*.qcow2

# Programs, libraries, texts and sources: they shrink to two fifths. 120 MiB of noise stand for photos and films.
mkdir -p stage/files stage/media slices
used_mib=120
toolchain=$(rustc --print sysroot)/lib
for from in /usr/bin /usr/share/doc /usr/share/locale /usr/include /usr/lib/gcc /usr/lib/python3 "$toolchain" /usr/lib/jvm \
  /usr/lib/x86_64-linux-gnu /usr/share; do
  [ -d "$from" ] || continue
  mib=$(du -sm "$from" | cut -f1)
  [ $((used_mib + mib)) -le $budget_mib ] || continue
  used_mib=$((used_mib + mib))
  cp -a "$from" "stage/files/$(printf %s "$from" | tr / _)"
done
for i in $(seq 30); do
  head -c 4M /dev/zero |
    openssl enc -aes-128-ctr -K "$(printf %032x $((seed * 1000 + i)))" -iv 0 -nosalt >"stage/media/$i" 2>/dev/null
done

truncate -s $size gen1.raw
uuid=12345678-1234-1234-1234-123456789abc
E2FSPROGS_FAKE_TIME=1700000000 mkfs.ext4 -q -F -U $uuid -E hash_seed=$uuid,lazy_itable_init=1,root_owner=0:0 -d stage gen1.raw
rm -rf stage

qemu-img convert -q -f raw -O qcow2 gen1.raw gen1.qcow2
qemu-img bitmap --add -g 64K gen1.qcow2 bm0
cp --reflink=auto gen1.qcow2 gen2.qcow2
python3 - "$seed" $size >writes <<'END'
import os, random, sys
seed, size = int(sys.argv[1]), int(sys.argv[2])
draw, disk = random.Random(seed), os.open("gen1.raw", os.O_RDONLY)
used, at = [], 0  # the granules of 64 KiB that hold data
while at < size:
    try:
        start = os.lseek(disk, at, os.SEEK_DATA)
    except OSError:
        break
    at = os.lseek(disk, start, os.SEEK_HOLE)
    used += range(start >> 16, (at + 65535) >> 16)

def content(length, number):
    kind = draw.random()
    if kind < 0.60:  # another place's bytes with a changed word in each page: new, and shrinks as the disk does
        start = min(draw.choice(used) << 16, size - length)
        changed = bytearray(os.pread(disk, length, start))
        for page in range(0, length, 4096):
            changed[page + 64:page + 72] = draw.randbytes(8)
        return bytes(changed)
    if kind < 0.85:
        return draw.randbytes(length)
    return (b"%08d a line in the log of a busy service, state=ok\n" % number) * (length // 50 + 1)

count = 0
def write(offset, length):
    global count
    name = f"slices/{count}"
    with open(name, "wb") as slice:
        slice.write(content(length, count)[:length])
    print(f"write -q -s {name} {offset} {length}")
    count += 1

for _ in range(1200):
    length = draw.choice([4, 4, 8, 8, 16, 16, 32, 48, 64]) << 10
    granule = draw.choice(used) if draw.random() < 0.85 else draw.randrange(size >> 16)
    write(min((granule << 16) + draw.randrange(0, 65536, 4096), size - length), length)
for _ in range(8):
    mib = draw.choice([4, 6, 8])
    first = draw.randrange((size >> 20) - mib)
    for i in range(mib):
        write((first + i) << 20, 1 << 20)
print("quit")
END
qemu-io -f qcow2 gen2.qcow2 <writes >/dev/null
rm -rf slices writes
qemu-img convert -q -f qcow2 -O raw gen2.qcow2 gen2.raw

qemu-img create -q -f qcow2 huge.qcow2 10T
for at in 0 1T 5T 9T; do qemu-io -f qcow2 -c "write -q -P 7 $at 16M" huge.qcow2 >/dev/null; done
qemu-img bitmap --add -g 64K huge.qcow2 bm0
sync
touch complete
du -sm ./*.raw ./*.qcow2 >&2
