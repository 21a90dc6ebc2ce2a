#!/usr/bin/env bash
# The tests, from nothing but Python 3.11 or newer.
set -euo pipefail

if [ "${1:-}" = "--help" ]; then
    cat <<'USAGE'
usage: [ATP_EXTRA=torch] ./launch/test.sh [ARGUMENT...]

Makes .venv, installs atp_jax with its test extra into it, and runs `pytest -q` in two processes. Arguments go to pytest:
-m "not slow", tests/test_chat.py, -k name, -n 0 for one process; paths are taken from the repository root.
ATP_EXTRA=torch also installs torch, so that the tests which compare live with transformers run instead of being skipped.
USAGE
    exit 0
fi

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
enter_venv test
export GLIBC_TUNABLES="${GLIBC_TUNABLES-$(.venv/bin/python -m atp_jax.memory)}" # pytest does not do it for itself
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
