#!/usr/bin/env python3
"""The quality of placement in virtual time: every policy's goodput, and each beside the others at three rates.

Builds and runs bench/placement (a cargo package of its own): first `check`, the simulation against recorded runs, then
`table` for each workload. JSON on standard output, progress and tables on standard error. Nothing here fails the command
but a bench that does not build or run.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).resolve().parent / "placement"
RECORDED = ["agg1-r2-i2000-o200.jsonl", "agg1-r6-i2000-o200.jsonl"]
# What each workload is asked beyond its defaults. A mixture of experts is searched in coarser steps: it carries more.
WORKLOADS = {"five-turn": [], "fresh": [], "stand-in": [], "trace": [], "moe": ["--rate-step", "1"]}


def cargo(command, options):
    """A cargo command line; progress goes to standard error."""
    jobs = ["--jobs", str(options.jobs)] if options.jobs else []
    return ["cargo", command, "--release", "--locked", "--manifest-path", str(PACKAGE / "Cargo.toml"), *jobs]


def bench(arguments, options):
    """Runs the bench; the JSON documents that it prints, one or one a line."""
    command = [*cargo("run", options), "--quiet", "--", *arguments]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    decoder, documents, at = json.JSONDecoder(), [], 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        document, at = decoder.raw_decode(text, at)
        documents.append(document)
    return documents


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to the bench itself: --policies "
                                     "cost,least-load, --engines 8, --weights '{\"harm\": 0.1}', ...")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="of " + ", ".join(WORKLOADS))
    parser.add_argument("--seeds", type=int, default=3, help="of each figure")
    parser.add_argument("--jobs", type=int, default=0, help="build with so many jobs")
    parser.add_argument("--out", help="where the JSON goes; standard output if absent")
    options, arguments = parser.parse_known_args()
    workloads = options.workloads.split(",")
    unknown = [name for name in workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workloads: {', '.join(unknown)}")
    if subprocess.run(cargo("build", options), stdout=sys.stderr).returncode:
        raise SystemExit("the bench does not build")

    try:
        files = [str(PACKAGE.parent.parent / "crates" / "twin" / "recorded" / name) for name in RECORDED]
        document = {"bench": "placement", "check": bench(["check", "--json", *files], options), "tables": []}
        for workload in workloads:
            print(f"\n{workload}", file=sys.stderr)
            own = ["table", "--workload", workload, "--seeds", str(options.seeds), *WORKLOADS[workload]]
            document["tables"] += bench([*own, *arguments], options)
    except subprocess.CalledProcessError as failed:
        raise SystemExit(failed.returncode)
    document["load_average"] = os.getloadavg()
    text = json.dumps(document, indent=2) + "\n"
    if options.out:
        pathlib.Path(options.out).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
