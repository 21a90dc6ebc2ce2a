#!/usr/bin/env bash
# Starts a command that goes on when the connection is gone: used by tpu_vm.sh on each worker.
set -euo pipefail

if [ "${1:-}" = "--help" ] || [ "$#" = 0 ]; then
    cat <<'USAGE'
usage: ./launch/detach.sh COMMAND [ARGUMENT...]

Starts COMMAND in a session of its own and returns at once. In the directory it is called from: run.log holds what it
says, run.pid its process, and run.status, once it has ended, its exit status.
USAGE
    exit 0
fi

rm -f run.status
# shellcheck disable=SC2016 # expanded by the bash that it starts
setsid nohup bash -c '"$@"; echo "$?" >run.status' run "$@" >run.log 2>&1 </dev/null &
echo "$!" >run.pid
