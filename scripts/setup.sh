#!/usr/bin/env bash
# Installs what building, testing and the demonstration need and this machine lacks. Quiet when nothing is missing.
set -euo pipefail

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
command -v python3 >/dev/null || missing+=(python3)
command -v curl >/dev/null || missing+=(curl)
python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
# For the messages between agents and gateways, and for etcd's; needed to build.
command -v protoc >/dev/null || missing+=(protobuf-compiler)
# The registry is tested against a real one. Its package would start a server of its own: it is not needed.
command -v etcd >/dev/null || missing+=(etcd-server)
if ! command -v pip3 >/dev/null && ! python3 -m pip --version >/dev/null 2>&1; then missing+=(python3-pip); fi
# A fast linker halves the time of a rebuild; optional, so a failure to install it is no error.
command -v mold >/dev/null || optional=mold

if ! command -v cargo >/dev/null; then
    echo "setup: no Rust toolchain found. Install Rust 1.95 or newer (https://rustup.rs), then try again." >&2
    exit 1
fi

if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then run=(); elif command -v sudo >/dev/null; then run=(sudo); else
        echo "setup: please install: ${missing[*]}" >&2
        exit 1
    fi
    echo "setup: installing ${missing[*]}"
    "${run[@]}" apt-get update -qq
    # No service starts by being installed.
    printf '#!/bin/sh\nexit 101\n' | "${run[@]}" tee /usr/sbin/policy-rc.d.forebay >/dev/null
    "${run[@]}" chmod +x /usr/sbin/policy-rc.d.forebay
    [ -e /usr/sbin/policy-rc.d ] || { "${run[@]}" mv /usr/sbin/policy-rc.d.forebay /usr/sbin/policy-rc.d; own_policy=1; }
    "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}"
    "${run[@]}" rm -f /usr/sbin/policy-rc.d.forebay
    [ -z "${own_policy:-}" ] || "${run[@]}" rm -f /usr/sbin/policy-rc.d
fi
if [ -n "${optional:-}" ] && [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -y -qq "$optional"; } >/dev/null 2>&1 || true
fi
