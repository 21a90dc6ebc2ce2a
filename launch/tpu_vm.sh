#!/usr/bin/env bash
# A Cloud TPU slice, of one host or many: made or found again, filled, run on, followed, and made anew when preempted.
set -euo pipefail

if [ "${1:-}" = "--help" ]; then
    cat <<'USAGE'
usage: ./launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE [--image=IMAGE] [--project=PROJECT] [--capacity=spot]
           [--setup=COMMAND] [--after=delete] [--dry_run] --config=FILE --workdir=DIRECTORY [ARGUMENT...]

Needs gcloud, logged in. In order:
  1. makes the slice NAME of TYPE (v5litepod-8, v5p-16, v6e-64, ...), or uses the one that is there
  2. copies the files that git tracks, as they are here, to every worker
  3. runs COMMAND on every worker (to mount what they share), and installs atp_jax with its tpu extra
  4. starts `python -m atp_jax` with the arguments on every worker, and follows the log of worker 0
  5. when the slice is preempted, deletes what is left and begins at 1; the run resumes from DIRECTORY
DIRECTORY must therefore outlive the slice, and be one place for all its workers: mount it with --setup.
Ctrl-C ends the following, not the run: the same command again follows it. Ends with the run's exit status.

--image     runtime image of the slice; v2-alpha-tpuv5-lite, v2-alpha-tpuv5 or v2-alpha-tpuv6e, as TYPE says
--capacity  spot or on-demand (default)
--after     delete: the slice is deleted when the run has ended; keep (default)
--dry_run   shows what would be done where there is no slice yet, and does nothing
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/options.sh
source launch/options.sh
name="" zone="" type="" image="" project="" capacity=on-demand setup=true after=keep
read_options "name zone type image project capacity setup after" "$@"
check_run
[ -n "$name" ] || fail "--name=NAME is missing: what the slice is called"
[ -n "$zone" ] || fail "--zone=ZONE is missing: where the slice is or shall be"
[ -n "$type" ] || fail "--type=TYPE is missing, as in --type=v5litepod-8"
case "$capacity" in spot | on-demand) ;; *) fail "--capacity must be spot or on-demand, not '$capacity'" ;; esac
case "$after" in delete | keep) ;; *) fail "--after must be delete or keep, not '$after'" ;; esac
if [ -z "$image" ]; then
    case "$type" in
    v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v6e-*) image=v2-alpha-tpuv6e ;;
    *) fail "--type=$type is not v5litepod-N, v5p-N or v6e-N: say --image=IMAGE" ;;
    esac
fi
[ "$dry_run" = yes ] || command -v gcloud >/dev/null || fail "gcloud is not on the PATH"

where=("--zone=$zone" "--quiet")
[ -z "$project" ] || where+=("--project=$project")
tpu() { # VERB ARGUMENT...
    step gcloud compute tpus tpu-vm "$1" "$name" "${@:2}" "${where[@]}"
}
on() { # WORKER COMMAND
    tpu ssh "--worker=$1" "--command=$2"
}
state() { # what the slice is doing; nothing where there is none
    tpu describe '--format=value(state)' 2>/dev/null || true
}

create() { # until it is ready
    local now
    while true; do
        now="$([ "$dry_run" = yes ] || state)"
        case "$now" in
        READY) return ;;
        "")
            local how=("--accelerator-type=$type" "--version=$image")
            [ "$capacity" = on-demand ] || how+=(--spot)
            if ! tpu create "${how[@]}"; then
                echo "no slice of $type to be had in $zone just now; asking again in 5 minutes" >&2
                sleep 300
            fi
            ;;
        PREEMPTED | TERMINATED | STOPPED) tpu delete ;;
        *) sleep 30 ;; # on its way up or down
        esac
        [ "$dry_run" = no ] || return 0
    done
}

fill() {
    local packed
    if [ "$dry_run" = yes ]; then
        packed=PACKED
        echo "+ git ls-files -z | tar --null --files-from=- -czf $packed"
    else
        packed="$(mktemp)"
        git ls-files -z | tar --null --files-from=- -czf "$packed"
    fi
    step gcloud compute tpus tpu-vm scp "$packed" "$name:atp_jax.tar.gz" --worker=all "${where[@]}"
    [ "$dry_run" = yes ] || rm -f "$packed"
    on all 'mkdir -p atp_jax && tar -xzf atp_jax.tar.gz -C atp_jax'
    on all "$setup"
    on all 'cd atp_jax && source launch/venv.sh && ATP_EXTRA=tpu enter_venv ""'
}

start() { # on every worker, in a session that outlives the connection
    local addresses worker command
    if [ "$dry_run" = yes ]; then
        addresses="ADDRESS_0 ADDRESS_1" # of as many workers as the slice has
        tpu describe "--format=value[delimiter=' '](networkEndpoints.ipAddress)"
    else
        addresses="$(tpu describe "--format=value[delimiter=' '](networkEndpoints.ipAddress)")"
    fi
    read -r -a addresses <<<"$addresses"
    for worker in "${!addresses[@]}"; do
        command=(.venv/bin/python -m atp_jax "${rest[@]}")
        if [ "${#addresses[@]}" -gt 1 ]; then
            command+=("--coordinator=${addresses[0]}:8476" "--processes=${#addresses[@]}" "--process_id=$worker")
        fi
        on "$worker" "cd atp_jax && ./launch/detach.sh$(quoted "${command[@]}")" &
        [ "$dry_run" = no ] || wait # shown in order
    done
    wait
}

while true; do
    create
    # A run that was left alone is followed again, not started a second time.
    if [ "$dry_run" = yes ] || ! on 0 'pgrep -F atp_jax/run.pid >/dev/null' 2>/dev/null; then
        fill
        start
    fi
    # shellcheck disable=SC2016 # the worker expands it
    on 0 'cd atp_jax && tail -n +1 --pid="$(cat run.pid)" -F run.log' || true
    if [ "$dry_run" = yes ]; then
        on 0 'cat atp_jax/run.status'
        echo "# where the slice was preempted, from the beginning"
        status=0
    else
        status="$(on 0 'cat atp_jax/run.status' 2>/dev/null || true)"
    fi
    if [[ "$status" =~ ^[0-9]+$ ]]; then
        [ "$after" = keep ] || tpu delete
        exit "$status"
    fi
    [ "$dry_run" = yes ] || sleep 30 # preempted, or only the connection was lost: `create` finds out
done
