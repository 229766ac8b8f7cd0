#!/usr/bin/env bash
# Installs what the tests need and runs them all, the README's example included.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tests/setup.sh
# With the profile of the tests: another one would build every dependency again.
cargo run --locked --all-features --example quickstart
cargo test --locked --all-features
