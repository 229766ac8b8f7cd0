#!/usr/bin/env bash
# What a repository of very many chunks costs, none of them stored: tests/acceptance/many_chunks.sh [CHUNKS...]
# Time and peak memory of a small full, its restore, a check, and prunes. 10^8 chunks take 12 GB of disk and some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

cargo build --release --locked --bin nbdbackup
tests=$(cargo test --release --locked --lib --no-run 2>&1 | sed -n 's/.*(\(target\/[^)]*\)).*/\1/p')
scratch=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
trap 'rm -rf "$scratch"' EXIT
head -c 64M /dev/urandom > "$scratch/small.raw"

measure() { # NAME COMMAND...
  local name=$1; shift
  /usr/bin/time -f '%e %M' -o "$scratch/cost" target/release/nbdbackup -q --repo "$scratch/repo" "$@" > "$scratch/out"
  awk -v name="$name" '{ printf "| %s | %s | %.2f | %.0f |\n", chunks, name, $1, $2 / 1024 }' chunks="$chunks" "$scratch/cost"
}

echo '| chunks | command | s | peak MiB |'
echo '|---|---|---|---|'
for chunks in "${@:-1000000}"; do
  NBDBACKUP_SYNTHETIC_CHUNKS=$chunks NBDBACKUP_SYNTHETIC_DIR=$scratch/repo \
    "$tests" --exact repo::synthetic::repository_of_many_chunks_is_looked_up_and_pruned > "$scratch/out"
  measure snapshots snapshots
  measure 'full of 64 MiB' full "$scratch/small.raw" --name small --disk vda
  measure 'full again' full "$scratch/small.raw" --name small --disk vda
  measure restore restore small --to "$scratch/restored.raw" --force
  cmp "$scratch/small.raw" "$scratch/restored.raw"
  measure 'prune, dry run' prune --dry-run
  measure 'prune of nothing' prune
  measure 'forget of all but the small ones' forget large --force
  measure 'prune of all but the small ones' prune --undelete-window 0s --max-freed 100
  measure 'full after it' full "$scratch/small.raw" --name small --disk vda
  rm -rf "$scratch/repo" "$scratch/restored.raw"
done
