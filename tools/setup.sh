#!/bin/sh
# Installs pepr-profiler with the given extras into the active virtual environment, or into .venv,
# which is made if it is not there. Prints the environment's folder on stdout, all else on stderr.
#
#   tools/setup.sh [-e] [EXTRA...]        -e: editable, for working on the code
set -eu
cd "$(dirname "$0")/.."

editable=
if [ "${1-}" = -e ]; then
    editable=-e
    shift
fi
extras=$(IFS=,; echo "$*")
python=${PYTHON:-python3}

if [ -n "${VIRTUAL_ENV-}" ]; then
    venv=$VIRTUAL_ENV
else
    venv=$PWD/.venv
    if [ ! -x "$venv/bin/pip" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "pepr-profiler needs Python 3.10 or newer; $python is $("$python" --version 2>&1)" >&2
            exit 1
        }
        "$python" -m venv "$venv" >&2 || {
            echo "no virtual environment could be made (Debian: sudo apt-get install python3-venv)" >&2
            exit 1
        }
    fi
fi

# An older pip cannot install editable packages by pyproject.toml, and does not know new wheels.
"$venv/bin/pip" install --quiet --upgrade pip >&2
case ",$extras," in
*,examples,* | *,launchers,*)
    # Before anything that asks for any torch: left to itself, pip may pick a much larger build.
    "$venv/bin/pip" install --quiet torch==2.13.0 >&2
    ;;
esac
"$venv/bin/pip" install --quiet $editable ".${extras:+[$extras]}" >&2
echo "$venv"
