#!/usr/bin/env bash
# One process of several: started once on every host, by hand or by whatever starts things there.
set -euo pipefail

if [ "${1:-}" = "--help" ]; then
    cat <<'USAGE'
usage: [ATP_EXTRA=cuda12] ./launch/multihost.sh --coordinator=HOST:PORT --processes=N --process_id=I [--dry_run]
           --config=FILE --workdir=DIRECTORY [ARGUMENT...]

Run on each of N hosts with the same arguments but its own I, from 0 to N - 1. HOST is host 0 as the others reach it,
PORT any free port there; JAX takes another one beside it, so no firewall may stand between the hosts. Makes .venv,
installs atp_jax with the extras in ATP_EXTRA (cuda12, cuda13, tpu), and runs `python -m atp_jax` as process I on all
devices of this host.
DIRECTORY, the model and the data must be the same files on all hosts. The same commands again resume.
--dry_run shows what would be done, and does nothing.
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
source launch/options.sh
coordinator="" processes="" process_id=""
read_options "coordinator processes process_id" "$@"
check_run
[[ "$coordinator" =~ ^[^:]+:[0-9]{1,5}$ ]] || fail "--coordinator=HOST:PORT must name host 0 and a port there, not '$coordinator'"
[ -n "$processes" ] || fail "--processes=N is missing: how many hosts take part"
[ -n "$process_id" ] || fail "--process_id=I is missing: which of them this is, from 0"
check_number processes "$processes"
check_number process_id "$process_id"
[ "$process_id" -lt "$processes" ] || fail "--process_id=$process_id must be below --processes=$processes: it counts from 0"

# shellcheck source=launch/venv.sh
source launch/venv.sh
[ "$dry_run" = no ] || echo "+ export ATP_EXTRA=${ATP_EXTRA:-}"
step enter_venv ""
step exec .venv/bin/python -m atp_jax --coordinator="$coordinator" --processes="$processes" --process_id="$process_id" \
    "${rest[@]}"
