#!/bin/sh
# Sets everything up and runs the tests; arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
venv=$(tools/setup.sh -e test)
exec "$venv/bin/python" -m pytest "$@"
