#!/usr/bin/env bash
# AlexNet's training step beside PyTorch: the same net, batch and type, in turns, on this machine.
#
#     scripts/peers/alexnet.sh [--pairs 5] [--ranks 2] [--batch 32] [--precision f32] [--config configs/alexnet.toml]
#
# `scripts/peers/alexnet.sh --help` has the rest. Prints every pair, then medians, ratio and spread as a row for BENCHMARKS.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/peers/env.sh
cargo build --release --quiet
exec "$PYTHON" scripts/peers/alexnet_pairs.py "$@"
