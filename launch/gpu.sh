#!/usr/bin/env bash
# One host with NVIDIA GPUs: one process that uses all of them.
set -euo pipefail

if [ "${1:-}" = "--help" ]; then
    cat <<'USAGE'
usage: [ATP_EXTRA=cuda12] ./launch/gpu.sh [--dry_run] --config=FILE --workdir=DIRECTORY [ARGUMENT...]

Makes .venv, installs atp_jax for CUDA into it, and runs `python -m atp_jax` with the arguments on all GPUs of this
host (CUDA_VISIBLE_DEVICES picks some). How they are used is the mesh's to say: --config.mesh.data, .fsdp, .tensor.
ATP_EXTRA is cuda12 or cuda13; without it, cuda13 where the driver is 580 or newer, else cuda12.
92% of each GPU's memory is taken at the start; XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
The same command again resumes. --dry_run shows what would be done, and does nothing.
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
source launch/options.sh
read_options "" "$@"
check_run

if [ "$dry_run" = no ]; then
    command -v nvidia-smi >/dev/null || fail "no NVIDIA driver here (nvidia-smi is not on the PATH)"
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)"
    [[ "$driver" =~ ^[0-9]+\. ]] || fail "nvidia-smi finds no GPU here"
    extra=cuda12
    [ "${driver%%.*}" -lt 580 ] || extra=cuda13
else
    extra=cuda12
fi
export ATP_EXTRA="${ATP_EXTRA:-$extra}"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# shellcheck source=launch/venv.sh
source launch/venv.sh
if [ "$dry_run" = yes ]; then
    echo "+ export ATP_EXTRA=$ATP_EXTRA XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION"
fi
step enter_venv ""
step exec .venv/bin/python -m atp_jax "${rest[@]}"
