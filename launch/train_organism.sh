#!/usr/bin/env bash
# Makes the embedded organism anew: trains it from scratch on synthetic life stories, and examines it.
set -euo pipefail

if [ "${1:-}" = "--help" ]; then
    cat <<'USAGE'
usage: [ATP_EXTRA=cuda12] ./launch/train_organism.sh [SEED [OUT [CHUNKS]]]

Makes .venv, installs atp_jax into it, trains one organism with SEED (default 0) for CHUNKS chunks (a list with
commas, default 70,34,28,16,22, what the shipped weights saw: of role-play stories, then with threshold games, tool use and steps of
arithmetic as well), into OUT (default runs/organism/SEED/model), and examines it through the pipeline on the shipped packs. Interrupted at any moment, the same
command goes on from the last chunk. BUILD_NOTES.md says how long it takes. The shipped weights are seed 0; copy OUT
over atp_jax/models/organism to ship others.
USAGE
    exit 0
fi

seed="${1:-0}"
# shellcheck source=launch/venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
out="${2:-runs/organism/$seed/model}"
enter_venv ""
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}"
.venv/bin/python -m atp_jax.organism.train --seed="$seed" --out="$out" --workdir="runs/organism/$seed/training" ${3:+--chunks="$3"}
# Tool use begins with the third phase.
[[ "${3:-,,}" == *,*,* ]] && tools=--tools || tools=--notools
exec .venv/bin/python -m atp_jax.organism.examine --model="$out" --workdir="runs/organism/$seed/examination" "$tools"
