# shellcheck shell=bash
# Sourced by the scripts that start a run somewhere: their options, and what --dry_run does.
#
#   read_options "NAME..." ARGUMENT...   sets NAME from --NAME=VALUE and dry_run (yes or no), leaves the rest in rest=()
#   check_run                            the rest must be arguments that `python -m atp_jax` can begin with
#   step COMMAND...                      does it; with --dry_run only shows it
#   quoted WORD...                       the words as a shell reads them again

fail() {
    echo "error: $*" >&2
    exit 2
}

read_options() {
    local given_argument given_name known_names=" $1 " # names that no option has
    shift
    dry_run=no rest=()
    for given_argument in "$@"; do
        given_name="${given_argument%%=*}"
        given_name="${given_name#--}"
        if [ "$given_argument" = --dry_run ]; then
            dry_run=yes
        elif [[ "$given_argument" == --* && "$known_names" == *" $given_name "* ]]; then
            [[ "$given_argument" == *=?* ]] || fail "--$given_name needs a value: --$given_name=VALUE"
            printf -v "$given_name" '%s' "${given_argument#*=}"
        else
            rest+=("$given_argument")
        fi
    done
}

check_run() {
    local argument config="" workdir=""
    for argument in ${rest[@]+"${rest[@]}"}; do
        case "$argument" in
        --config=?*) config="${argument#*=}" ;;
        --workdir=?*) workdir="${argument#*=}" ;;
        --*=* | --noconfig.* | --config.*) ;;
        *) fail "argument '$argument' means nothing here; settings are written --config.NAME=VALUE" ;;
        esac
    done
    [ -n "$config" ] || fail "--config=FILE is missing, as in --config=configs/quickstart.py"
    [ -n "$workdir" ] || fail "--workdir=DIRECTORY is missing, as in --workdir=runs/quickstart"
    [ -f "${config%%:*}" ] || fail "--config: there is no file ${config%%:*}"
}

check_number() {
    [[ "$2" =~ ^[0-9]{1,6}$ ]] || fail "--$1 must be a whole number, not '$2'"
}

quoted() { # as a shell reads it again
    local word
    for word in "$@"; do
        if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            printf ' %s' "$word"
        else
            printf " '%s'" "${word//\'/\'\\\'\'}"
        fi
    done
}

step() {
    if [ "$dry_run" = yes ]; then
        echo "+$(quoted "$@")"
    else
        "$@"
    fi
}
