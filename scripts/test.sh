#!/usr/bin/env bash
# Everything that continuous integration runs, in the order in which it fails fastest. `test.sh lint` stops before the
# tests that run code.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-auto}

step() { printf '\n== %s\n' "$*"; }

step "formatting"
cargo fmt --all -- --check
step "structure: dependency direction, pure cores, map, licences"
python3 scripts/check_structure.py
step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings
[ "${1:-}" = lint ] && exit 0
step "interleavings of the KV index's readers and writers"
cargo test --package forebay-kv-index --features shuttle --lib --locked --quiet
step "tests"
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --locked --no-fail-fast
    step "documentation examples"
    cargo test --workspace --locked --doc --quiet
else
    cargo test --workspace --locked --no-fail-fast
fi
