#!/usr/bin/env python3
"""Checks what prose forgets: which crate may use which, that cores are pure, that the map names every crate, licences.

Prints each finding and exits with 1 if there is one.
"""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Rows use only rows above them.
ROWS = [
    "types",
    "kv-hash",
    "kv-index",
    "perf-model",
    "placement",
    "admission",
    "planner",
    "fleet",
    "lifecycle",
    "routing",
    "engine-model",
    "twin",
    "profiler",
    "engine-events",
    "engine-wire",
    "audit",
    "bpe",
    "loadgen",
    "text",
    "kv-move",
    "engine-embedded",
    "engines",
    "proto",
    "registry",
    "dialect",
    "testkit",
    "index-server",
    "agent",
    "gateway",
    "forebay",
]
CORES = ["types", "kv-hash", "kv-index", "perf-model", "placement", "admission", "planner", "fleet", "lifecycle", "routing",
         "engine-model", "twin", "profiler", "engine-events", "engine-wire", "audit",
         "bpe", "loadgen"]
# What a core may not have anywhere below it: runtimes, sockets, entropy, clocks.
IMPURE = ["tokio", "async-std", "smol", "mio", "socket2", "hyper", "getrandom", "rand", "rand_core", "chrono", "time",
          "rustix", "libc", "parking_lot"]
# What a core's source may not name: the standard library's doors to the outside.
IMPURE_SOURCE = re.compile(
    r"\b(Instant::now|SystemTime|std::env|std::fs|std::net|std::process|std::thread|RandomState|thread_rng|async fn)\b")
LICENCES = {
    "MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "0BSD",
    "Unicode-3.0", "Unicode-DFS-2016", "BSL-1.0", "CC0-1.0", "Unlicense", "MIT-0", "CDLA-Permissive-2.0",
}
BANNED = {"openssl": "rustls is the project's TLS", "openssl-sys": "rustls is the project's TLS"}


def package_name(row):
    return row if row == "forebay" else f"forebay-{row}"


def metadata():
    out = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--locked"], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.stdout)


def licence_ok(expression):
    """Whether an SPDX expression can be met by the allowed licences (OR: any part; AND: every part)."""
    text = expression.replace("/", " OR ")
    def parse(tokens):
        value = parse_and(tokens)
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            right = parse_and(tokens)
            value = value or right
        return value
    def parse_and(tokens):
        value = atom(tokens)
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            right = atom(tokens)
            value = value and right
        return value
    def atom(tokens):
        token = tokens.pop(0)
        if token == "(":
            value = parse(tokens)
            tokens.pop(0)
            return value
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            token = f"{token} WITH {tokens.pop(0)}"
        return token in LICENCES
    return parse(re.findall(r"\(|\)|[^\s()]+", text))


def check_rows(packages, findings):
    order = {package_name(row): index for index, row in enumerate(ROWS)}
    for name, package in packages.items():
        if name not in order:
            findings.append(f"{name}: not in ROWS of {pathlib.Path(__file__).name}: decide where it stands")
            continue
        for dependency in package["dependencies"]:
            below = order.get(dependency["name"])
            if dependency["kind"] != "dev" and below is not None and below >= order[name]:
                findings.append(f"{name} uses {dependency['name']}, which stands above it")


def check_cores(findings):
    for core in CORES:
        out = subprocess.run(
            ["cargo", "tree", "--locked", "--package", package_name(core), "--edges", "normal", "--prefix", "none",
             "--format", "{p}"], cwd=ROOT, check=True, capture_output=True, text=True)
        below = {line.split()[0] for line in out.stdout.splitlines() if line.strip()}
        for name in sorted(below & set(IMPURE)):
            findings.append(f"core {core}: {name} in its dependency tree (cargo tree -p {package_name(core)} -i {name})")
        for source in sorted((ROOT / "crates" / core / "src").rglob("*.rs")):
            for number, line in enumerate(source.read_text().splitlines(), 1):
                code = line.split("//")[0]
                found = IMPURE_SOURCE.search(code)
                if found and source.name != "tests.rs":
                    findings.append(f"core {core}: {source.relative_to(ROOT)}:{number} names {found.group(0)}")


def check_map(findings):
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for row in ROWS:
        if f"`{row}`" not in text:
            findings.append(f"ARCHITECTURE.md does not name crate `{row}`")


def check_outside(packages, findings):
    for package in packages:
        where = f"{package['name']} {package['version']}"
        if package["source"] is None:
            continue
        if not package["source"].startswith("registry+"):
            findings.append(f"{where}: comes from {package['source']}, not from a registry")
        if not package["license"] or not licence_ok(package["license"]):
            findings.append(f"{where}: licence {package['license']!r} is not among the allowed ones")
        if package["name"] in BANNED:
            findings.append(f"{where}: banned, {BANNED[package['name']]}")


def main():
    data = metadata()
    members = set(data["workspace_members"])
    own = {package["name"]: package for package in data["packages"] if package["id"] in members}
    findings = []
    check_rows(own, findings)
    check_cores(findings)
    check_map(findings)
    check_outside(data["packages"], findings)
    for finding in findings:
        print(finding)
    print(f"{len(own)} crates, {len(CORES)} cores, {len(data['packages'])} packages: "
          + (f"{len(findings)} findings" if findings else "in order"))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
