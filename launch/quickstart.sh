#!/usr/bin/env bash
# The main job on the embedded model, from nothing but Python 3.11 or newer.
set -euo pipefail

if [ "${1:-}" = "--help" ]; then
    cat <<'USAGE'
usage: [ATP_EXTRA=cuda12] ./launch/quickstart.sh [ARGUMENT...]

Makes .venv, installs atp_jax into it, and runs configs/quickstart.py into runs/quickstart. Arguments go to
`python -m atp_jax` after these, so that --workdir=DIR or --config.seed=1 win; paths are taken from the repository root.
ATP_EXTRA names extras of setup.cfg to install as well: cuda12, cuda13, tpu.
Run again, it installs nothing and resumes where it stopped, or shows the finished result.
USAGE
    exit 0
fi

# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
enter_venv ""
exec .venv/bin/python -m atp_jax --config=configs/quickstart.py --workdir=runs/quickstart "$@"
