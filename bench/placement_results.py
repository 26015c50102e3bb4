#!/usr/bin/env python3
"""Makes the tables of bench/placement/RESULTS.md anew, in virtual time, and leaves the words around them.

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Same code, same tables, to the last digit; a figure that the
words repeat is for a person to check. `--out` says where the file goes, `--only` which tables. Needs twenty minutes of two cores.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).resolve().parent / "placement"
RESULTS = PACKAGE / "RESULTS.md"
POLICIES = ("cost round-robin least-load random power-of-two prefix-affinity lmetric dynamo sticky "
            "static-2p6d static-4p4d").split()
SEEDS = {"five-turn": 5, "fresh": 5, "stand-in": 6}
SHARES = (0.4, 0.7, 0.95)
CELL = "share | policy | TTFT mean | P99 | ITL mean | P99 | worst gap P99 | cached | within the SLO"
# 95 % of requests with a first token within 0.5 s and a mean ITL of 20 ms.
TWO_ENGINES = "--workload fresh --engines 2 --seeds 4 --slo 0.5,0,0.02"
LEANING_DECODER = "--budget 8192,832 --chunk 8192,768"


class Bench:
    """The bench's binary, and as many runs at a time as there are cores."""

    def __init__(self, jobs):
        build = ["cargo", "build", "--release", "--locked", "--message-format", "json-render-diagnostics",
                 "--manifest-path", str(PACKAGE / "Cargo.toml")]
        built = subprocess.run(build, stdout=subprocess.PIPE, text=True, check=True).stdout
        messages = (json.loads(line) for line in built.splitlines())
        self.binary = next(filter(None, (message.get("executable") for message in messages)))
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)

    def ask(self, arguments):
        """What a run says, once it is over: call the answer's `result`."""
        return self.pool.submit(self.now, arguments)

    def now(self, arguments):
        print(arguments, file=sys.stderr, flush=True)
        command = [self.binary, *arguments.split()]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return json.loads(done.stdout)

    def run(self, arguments):
        """One run, `Summary` of it."""
        return self.ask("run --json " + arguments)


def lines(head, rows):
    """A table. `head` is its first line as written."""
    bar = " | ".join("---" for _ in head.split("|"))
    return "\n".join(f"| {row} |" for row in [head, bar, *rows])


class Goodput:
    """Of every policy on a workload of eight engines, searched once."""

    def __init__(self, bench):
        self.bench, self.found = bench, {}

    def ask(self, workload):
        if workload not in self.found:
            seeds = SEEDS[workload]
            self.found[workload] = {policy: self.bench.ask(
                f"goodput --workload {workload} --engines 8 --seeds {seeds} --policies {policy}")
                for policy in POLICIES}
        return self.found[workload]

    def of(self, workload, policy):
        return self.ask(workload)[policy].result()["goodput"][0]["rate"]

    def table(self):
        for workload in SEEDS:
            self.ask(workload)
        return lines("policy | " + " | ".join(SEEDS), (
            " | ".join([policy, *(f"{self.of(workload, policy):g}" for workload in SEEDS)]) for policy in POLICIES))

    def cells(self, workload):
        capacity = self.of(workload, "least-load")
        common = f"--workload {workload} --engines 8 --seeds {SEEDS[workload]}"
        asked = [(share, policy, self.bench.run(f"{common} --rate {share * capacity} --policy {policy}"))
                 for share in SHARES for policy in POLICIES]
        rows = []
        for share, policy, answer in asked:
            of = answer.result()["summary"]
            rows.append(f"{share} | {policy} | {of['ttft_mean_ms']:.0f} | {of['ttft_p99_ms']:.0f} | "
                        f"{of['itl_mean_ms']:.1f} | {of['itl_p99_ms']:.1f} | {of['worst_gap_p99_ms']:.0f} | "
                        f"{of['cached_share']:.0%} | {of['slo_share']:.1%}".replace("%", " %"))
        return f"Least-load carries {capacity:g} a second.\n\n" + lines(CELL, rows)


def groups(bench):
    """Expert-parallel groups at two rates."""
    ways = {"cost": "--policy cost", "cost, `--gather 0,1`": "--policy cost --gather 0,1",
            **{name: f"--policy {name}" for name in ("round-robin", "least-load", "random")}}
    asked = {name: [bench.run(f"--workload moe --seeds 5 --rate {rate} {way}") for rate in (30, 39)]
             for name, way in ways.items()}
    def cell(answer):
        of = answer.result()["summary"]
        return f"{of['ttft_mean_ms']:.0f} | {of['itl_mean_ms']:.1f} | {of['worst_gap_p99_ms']:.0f}"
    return lines("policy | 30/s: TTFT | ITL | gap P99 | 39/s: TTFT | ITL | gap P99",
                 (" | ".join([name, *map(cell, answers)]) for name, answers in asked.items()))


def gateways(bench):
    """One gateway and sixteen, with what they see once a second."""
    loads = ("--workload five-turn --rate 60", "--workload fresh --rate 32")
    asked = [(count, policy, [bench.run(f"--sight sampled --engines 8 --seeds 1 --gateways {count} --policy {policy} {load}")
                              for load in loads])
             for count in (1, 16) for policy in ("cost", "lmetric", "least-load", "power-of-two")]
    def cell(answer):
        of = answer.result()["summary"]
        return f"{of['ttft_mean_ms']:.0f}, {of['ttft_p99_ms']:.0f}, {of['itl_mean_ms']:.1f}"
    return lines("gateways | policy | five-turn at 60/s | fresh at 32/s",
                 (" | ".join([str(count), policy, *map(cell, answers)]) for count, policy, answers in asked))


def two_engines(bench):
    """Steps of two engines, and which leg sends the first token."""
    ways = [("8192", "early", "", True), ("1024", "", "--budget 1024", False),
            ("8192; 832, 768", "early", LEANING_DECODER, True),
            ("8192; 832, 768, imports first", "early", f"{LEANING_DECODER} --imports first", True),
            ("8192; 832, 768", "smooth", f"{LEANING_DECODER} --first-token of-decode", True)]
    rows = []
    for rate in (6, 10):
        for steps, first, way, ours in ways:
            run = lambda policy: bench.run(f"{TWO_ENGINES} --rate {rate} {way} --policy {policy}")
            equal = ";" not in steps
            rows.append((rate, steps, first, run("cost") if ours else None, run("round-robin") if equal else None))
    def cell(answer):
        if answer is None:
            return ""
        of = answer.result()["summary"]
        return (f"{of['ttft_p50_ms']:.0f}, {of['itl_p50_ms']:.1f}, {of['e2e_p50_s']:.2f}, "
                f"{of['worst_gap_p99_ms']:.0f}, {of['slo_share'] * 100:.1f} %")
    return lines("rate | engines' steps | first token | cost | round robin", (
        f"{rate} | {steps} | {first} | {cell(cost)} | {cell(robin)}" for rate, steps, first, cost, robin in rows))


def leanings(bench):
    """Engines kept for a phase, or not."""
    rows = []
    for engines, rate in ((2, 6), (2, 10), (4, 12), (4, 20), (8, 24), (8, 40)):
        own = f"{LEANING_DECODER} --imports first --seeds 4" if engines == 2 else "--seeds 2"
        rows.append((engines, rate, [bench.run(f"--workload fresh --engines {engines} --rate {rate} --slo 0.5,0,0.02 "
                                               f"--policy cost --leanings {leaning} {own}") for leaning in ("off", "on")]))
    def cell(answer):
        of = answer.result()["summary"]
        return (f"{of['ttft_p50_ms']:.0f}, {of['itl_mean_ms']:.1f}, {of['worst_gap_p99_ms']:.0f}, "
                f"{of['e2e_p50_s']:.2f}, {of['slo_share'] * 100:.1f} %")
    return lines("engines | rate | off | on",
                 (" | ".join([str(engines), str(rate), *map(cell, pair)]) for engines, rate, pair in rows))


def replaced(text, tables):
    """The file with these tables in place of those that it had."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"{RESULTS} has no place for the table `{name}`: give it a line <!-- table {name} -->")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="tables, by name, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", default=str(RESULTS), help="where the file goes")
    options = parser.parse_args()
    bench = Bench(options.jobs)
    goodput = Goodput(bench)
    makers = {
        "goodput": goodput.table,
        **{workload: lambda workload=workload: goodput.cells(workload) for workload in SEEDS},
        "groups": lambda: groups(bench),
        "gateways": lambda: gateways(bench),
        "two-engines": lambda: two_engines(bench),
        "leanings": lambda: leanings(bench),
    }
    names = options.only.split(",") if options.only else list(makers)
    unknown = [name for name in names if name not in makers]
    if unknown:
        parser.error(f"no such tables: {', '.join(unknown)}; there are {', '.join(makers)}")
    text = replaced(RESULTS.read_text(), {name: "" for name in names})  # refused now rather than in an hour
    tables = {}
    for name in names:
        tables[name] = makers[name]()
        print(f"\n{name}\n{tables[name]}\n", file=sys.stderr, flush=True)
    out = pathlib.Path(options.out)
    partial = out.with_name(out.name + ".part")
    partial.write_text(replaced(text, tables))
    partial.replace(out)


if __name__ == "__main__":
    main()
