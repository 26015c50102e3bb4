#!/usr/bin/env python3
"""The prefix index against the indexes of Dynamo's published crate, dynamo-kv-router, in one run on the same events.

Builds and runs bench/index (a cargo package of its own), prints its JSON, and on standard error a table: figure, bar,
aim, measured, met or not. Speed never fails the command; a wrong answer does.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

PACKAGE = pathlib.Path(__file__).resolve().parent / "index"
OURS = "forebay"
# The same behind engines' own hashes, with the map from them for each rank.
OPAQUE = "forebay-opaque"

# Times that the better of Dynamo's two radix trees takes over ours: (events, figure, {ranks: (bar, aim)}). At least.
RATIOS = [
    ("chains", "refill", {1: (2.0, 2.7), 8: (2.0, 2.7), 64: (2.0, 2.7), 1000: (2.0, 2.7)}),
    ("chains", "store", {8: (1.3, 1.8), 64: (1.3, 1.8), 1000: (1.3, 1.8)}),
    ("chains", "remove", {1: (2.5, 3.0), 8: (2.5, 3.0), 64: (2.5, 3.0), 1000: (2.5, 3.0)}),
    ("chains", "full-hit", {1: (2.2, 2.8), 8: (2.2, 2.8), 64: (3.0, 3.6), 1000: (3.5, 4.4)}),
    ("chains", "shared-hit", {8: (1.8, None), 64: (2.5, None)}),
    ("chains", "miss", {1: (1.0, None), 8: (1.0, None), 64: (1.0, None), 1000: (1.0, None)}),
    ("single", "store", {8: (1.8, 2.2)}),
    ("single", "remove", {8: (2.3, 3.5)}),
]
# Small events come sixteen in a batch, as an engine's step sends them, or each alone.
SINGLE = {"forebay-steps": "16 to a batch", OURS: "1 to a batch"}
NAMES = {
    "refill": "store into an index at size", "store": "store from empty", "remove": "remove",
    "full-hit": "look-up, all blocks held", "shared-hit": "look-up, the shared blocks held", "miss": "look-up, none held",
}
BYTES_A_BLOCK = (36, 28)
BYTES_A_FURTHER_RANK = (26, 17)
BYTES_WITHOUT_A_TABLE_OF_ALL_BLOCKS = (12, 10)
EVENT_US = 500
LOOK_UP_US = 1000
TURN_US = 60


def row(figure, bar, aim, measured, met):
    return {"figure": figure, "bar": bar, "aim": aim, "measured": measured, "met": met}


def ratio_rows(document):
    ratios = {(each["events"], each["figure"], each["ranks"]): each["ratio"] for each in document.get("speed", [])}
    rows = []
    for events, figure, bars in RATIOS:
        for ours, how in (SINGLE if events == "single" else {OURS: None}).items():
            for ranks, (bar, aim) in bars.items():
                ratio = ratios.get((events, figure, ranks), {}).get(ours)
                if ratio is None:
                    continue
                name = NAMES[figure] + (f", one block an event, {how}" if how else "")
                measured = f"{ratio['median']:.2f}x ({ratio['worst']:.2f}-{ratio['best']:.2f})"
                rows.append(row(f"{name}, {ranks} rank{'s' if ranks > 1 else ''}", f">= {bar}x", aim and f"{aim}x",
                                measured, ratio["median"] >= bar))
    return rows


def at_most(figure, bar, aim, unit, value):
    return [] if value is None else [row(figure, f"<= {bar} {unit}", aim and f"{aim} {unit}", f"{value:.1f} {unit}",
                                         value <= bar)]


def memory_rows(document):
    rows = []
    for contender, how in ((OURS, "our hashes"), (OPAQUE, "engines' hashes")):
        ours = [each for each in document.get("memory", []) if each["contender"] == contender]
        # With one rank every stored block is a distinct one. The worst phase of growth counts.
        fills = [each for each in ours if each["figure"] == "fill" and each["ranks"] == 1]
        worst = lambda figure: max((each[figure] for each in fills if figure in each), default=None)
        further = [each["bytes_per_block"] for each in ours if each["figure"] == "further-rank"]
        rows += at_most(f"memory, a distinct block, {how}", *BYTES_A_BLOCK, "B", worst("bytes_per_distinct_block"))
        if contender == OURS:
            rows += at_most("memory, the same without the table that finds every block",
                            *BYTES_WITHOUT_A_TABLE_OF_ALL_BLOCKS, "B", worst("without_names_per_block"))
        rows += at_most(f"memory, the same block on a further rank, {how}", *BYTES_A_FURTHER_RANK, "B",
                        max(further, default=None))
    return rows


def pause_rows(document):
    rows = []
    for each in document.get("pauses", []):
        if each["contender"] in (OURS, OPAQUE):
            how = "" if each["contender"] == OURS else ", engines' hashes"
            rows += at_most(f"longest event{how}, wall time", EVENT_US, None, "us", each["structure_us"])
            rows += at_most(f"longest event{how}, CPU time", EVENT_US, None, "us", each["structure_cpu_us"])
    turn = document.get("turn")
    if turn:
        rows += at_most("turn of 500 tokens onto 100,000: hashing and look-up", TURN_US, None, "us", turn["turn_us"])
    churn = document.get("churn")
    if churn:
        of_rounds = churn["smallest_of_rounds"]
        rows += at_most("longest look-up beside rank churn", LOOK_UP_US, None, "us", of_rounds["longest_us"]["churn"])
        rows += at_most("the same, while the thread kept its core", LOOK_UP_US, None, "us",
                        of_rounds["longest_kept_core_us"]["churn"])
    return rows


def print_table(rows):
    lines = [("figure", "bar", "aim", "measured", "met")]
    lines += [(each["figure"], each["bar"], each["aim"] or "", each["measured"], "yes" if each["met"] else "NO")
              for each in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), file=sys.stderr)


def cargo(command, options):
    """Runs cargo. Its progress belongs on standard error."""
    return subprocess.run(["cargo", command, "--release", "--locked", "--manifest-path", PACKAGE / "Cargo.toml",
                           *options.cargo_arguments], stdout=sys.stderr).returncode


def measure(arguments, options):
    """One process of the bench; its document. Ends this one if an answer was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "index.json"
        options.cargo_arguments = ["--quiet", "--", *arguments, "--out", str(out)]
        status = cargo("run", options)
        if status:
            raise SystemExit(status)
        return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to the bench itself: --ranks 8, "
                                     "--repetitions 3, --only speed,memory, --contenders crtc,forebay, ...")
    parser.add_argument("--quick", action="store_true", help="a fifth of the size, 3 repetitions: for a first look")
    parser.add_argument("--soak", type=int, default=0, help="also store this many blocks at a constant live set")
    parser.add_argument("--jobs", type=int, default=0, help="build with so many jobs")
    parser.add_argument("--out", help="where the JSON goes; standard output if absent")
    options, arguments = parser.parse_known_args()
    if options.quick:
        arguments = ["--blocks", "200000", "--repetitions", "3", "--queries", "20000", "--pause-blocks", "1000000",
                     "--churn-seconds", "2", *arguments]
    options.cargo_arguments = ["--jobs", str(options.jobs)] if options.jobs else []
    if cargo("build", options):
        raise SystemExit("the bench does not build")

    document = measure(arguments, options)
    if options.soak:
        # In a process of its own: what others left in malloc's arenas would hide growth of the resident set.
        soak = measure([*arguments, "--only", "soak", "--soak", str(options.soak)], options)
        document["soak"] = soak["soak"]
    document["bars"] = ratio_rows(document) + memory_rows(document) + pause_rows(document)
    document["load_average"] = os.getloadavg()
    print_table(document["bars"])
    text = json.dumps(document, indent=2) + "\n"
    if options.out:
        pathlib.Path(options.out).write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
