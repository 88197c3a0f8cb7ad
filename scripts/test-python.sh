#!/usr/bin/env bash
# Builds the Python module, installs it with what its tests need, and runs all of them, the examples in the documentation
# among them.
#
#     bash scripts/test-python.sh [VENV] [pytest's options ...]
#
# VENV is the virtual environment to use, made if it is not there; without it QKV_TEST_VENV, an active one, or
# target/python-venv. Packages that it has already are not fetched again. Needs cargo, and python3 with venv.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${QKV_TEST_VENV:-${VIRTUAL_ENV:-target/python-venv}}
if [[ $# -gt 0 && $1 != -* ]]; then
    venv=$1
    shift
fi
[[ -x $venv/bin/python ]] || python3 -m venv "$venv"
python=$venv/bin/python

# The build back end from this environment: an isolated build would fetch it each time.
[[ -x $venv/bin/maturin ]] || "$python" -m pip install --quiet --disable-pip-version-check 'maturin>=1.9.4,<2'
PATH=$(cd "$venv/bin" && pwd):$PATH \
    "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation './crates/python[test]'

exec "$python" -m pytest -c crates/python/pyproject.toml --doctest-modules crates/python/tests --pyargs qkv "$@"
