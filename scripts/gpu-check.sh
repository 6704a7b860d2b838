#!/usr/bin/env bash
# All that needs a GPU, in one go: are the results right, and how fast is it, beside PyTorch on the same machine.
#
#     scripts/gpu-check.sh --build [--binaries DIR]                      where Rust is
#     scripts/gpu-check.sh [--binaries DIR] [--minutes 9.5] [--only REGEX] [--data DIR] [--out DIR]
#     scripts/gpu-check.sh --rehearse [--minutes 9.5] [--only REGEX] [--out DIR]
#
# --build puts stripped release binaries into DIR (target/gpu-check): the trainer, and the tests of tests/gpu. With them, and a copy
# of this folder, nothing of Rust is needed where the GPU is; Python 3.11 or newer is, and PyTorch with CUDA for its half of the
# benchmarks. The parts come in the order of their worth, each with a time limit of its own, and --minutes ends them all: what
# failed or was not reached is said in the summary. --only takes the parts in whose names the expression is found. --data is a
# folder with fashion-mnist in it. OUT (target/gpu-check-results) gets a Markdown file for BENCHMARKS.md, all figures as JSON, and
# a log. The exit code is 1 if a part has failed or a goal was missed; the goals are those of BENCHMARKS.md.
#
# --rehearse goes the same way without a GPU, with tiny nets on the emulator of tests/gpu, and PyTorch on the CPU: it shows that
# this script works, and measures nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

main() {
    local action=check binaries="" arguments=() given
    while [ $# -gt 0 ]; do
        case $1 in
            --build) action=build ;;
            --rehearse) action=rehearse ;;
            --binaries)
                binaries=$(value "$@")
                shift
                ;;
            --minutes | --only | --out | --data)
                given=$(value "$@")
                arguments+=("$1" "$given")
                shift
                ;;
            *)
                sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
                exit 2
                ;;
        esac
        shift
    done
    case $action in
        build) build release "${binaries:-target/gpu-check}" ;;
        check) check --binaries "${binaries:-target/gpu-check}" "${arguments[@]}" ;;
        rehearse)
            build dev target/gpu-rehearsal
            check --binaries target/gpu-rehearsal --rehearse "${arguments[@]}"
            ;;
    esac
}

# value OPTION VALUE...
value() {
    [ $# -gt 1 ] || { echo "$1 wants a value" >&2 && exit 2; }
    echo "$2"
}

# build PROFILE DIR
build() {
    local profile=$1 to=$2 tests
    cargo build --profile "$profile" --quiet
    tests=$(cargo test --profile "$profile" --quiet --test gpu --no-run --message-format json |
        sed -n 's/.*"name":"gpu".*"executable":"\([^"]*\)".*/\1/p')
    mkdir -p "$to"
    install --strip "${CARGO_TARGET_DIR:-target}/$([ "$profile" = dev ] && echo debug || echo "$profile")/trainer" "$to/trainer"
    install --strip "$tests" "$to/gpu-tests"
    git describe --always --dirty >"$to/commit"
    ls -l --human-readable "$to"
}

check() {
    exec "${PYTHON:-python3}" scripts/gpu_check/main.py "$@"
}

main "$@"
