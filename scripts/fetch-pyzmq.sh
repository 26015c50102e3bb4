#!/usr/bin/env bash
# Fetches pyzmq into ~/.cache/forebay/pyzmq: tests use it as the publisher of KV events, which is what engines use.
#
# Usage: scripts/fetch-pyzmq.sh
# Needs python3 and the Python package index. Does nothing if it is there already.
set -euo pipefail

VERSION=27.1.0
folder=${HOME}/.cache/forebay/pyzmq

if "$folder/bin/python" -c "import zmq, sys; sys.exit(zmq.__version__ != '$VERSION')" 2>/dev/null; then
    exit 0
fi
command -v python3 >/dev/null || { echo "fetch-pyzmq: python3 is not there" >&2; exit 1; }
mkdir -p "$(dirname "$folder")"
# Its interpreter's path is written into an environment, so it is made where it stays.
rm -rf "$folder"
python3 -m venv "$folder"
"$folder/bin/python" -m pip --quiet --disable-pip-version-check install "pyzmq==$VERSION"
echo "fetch-pyzmq: pyzmq $VERSION is in $folder"
