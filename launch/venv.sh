# shellcheck shell=bash
# Sourced by the other scripts: stands in the repository root and makes .venv hold the package.
#
#   enter_venv EXTRAS     installs atp_jax with these extras and those named in ATP_EXTRA (comma-separated, may be empty)
#
# What was installed is remembered in .venv/atp_jax-EXTRAS: while setup.cfg and pyproject.toml stay as they were,
# another call costs nothing.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer found on the PATH" >&2
    return 1
}

enter_venv() {
    local extras python stamp state
    extras="$1${ATP_EXTRA:+${1:+,}$ATP_EXTRA}"
    stamp=".venv/atp_jax-${extras:-plain}"
    state="$PWD $(cat setup.cfg pyproject.toml | cksum)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
        return
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        "$python" -m venv .venv
    fi
    echo "Installing atp_jax${extras:+ with extras $extras} into .venv (once, a few minutes)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
    echo "$state" >"$stamp"
}
