# shellcheck shell=bash
# Sourced by the scripts that need PyTorch. Sets PYTHON to an interpreter that has what requirements.txt names:
# the caller's $PYTHON if given, else a virtual environment under target/, made on first use (several GB where only PyPI answers,
# which has PyTorch with CUDA).

peers_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$peers_dir/../.." && pwd)

if [ -z "${PYTHON:-}" ]; then
    venv=$repository/target/peers-venv
    PYTHON=$venv/bin/python
    # The copied list marks a complete installation: one that was interrupted, or has other versions, is made again.
    if ! cmp -s "$peers_dir/requirements.txt" "$venv/installed.txt"; then
        echo "installing PyTorch into $venv" >&2
        python3 -m venv "$venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$peers_dir/requirements.txt" >&2
        cp "$peers_dir/requirements.txt" "$venv/installed.txt"
    fi
fi

if ! "$PYTHON" -c 'import numpy, safetensors, torch' 2>/dev/null; then
    echo "$PYTHON cannot import numpy, safetensors and torch: install scripts/peers/requirements.txt into it," \
        "or leave PYTHON unset to have a virtual environment made" >&2
    exit 1
fi
export PYTHON
