#!/usr/bin/env python3
"""How fast `forebay simulate` replays a trace, against Dynamo's own offline replay of the same trace and engines.

Writes a trace with the statistics of a chat service's (or takes one with --trace), then runs both in turn, each in a
process of its own. CPU time: of ours the whole process, of theirs the call alone, its import left out. JSON on standard
output, a table on standard error. A bar that is missed fails nothing; a request that is not finished does.
"""

import argparse
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

REQUESTS = 12_031  # as many as Mooncake's published conversation trace has, in an hour
SECONDS = 3600
BLOCK_TOKENS = 512
ENGINES = 16
KV_BLOCK_TOKENS = 64
# 80 GiB x 0.9 less 15 GiB of weights and 2 GiB of activations, at 8 MiB a block: what the fleet file leaves as it is.
KV_BLOCKS = 7_040
CPU_SECONDS, MEMORY_MIB, RATIO = 2.0, 300, 4.0
LARGE = {"engines": 1000, "rate": 4000, "seconds": 250}  # a million requests
LARGE_CPU_SECONDS = 600

# Runs in the peer's own Python. The last line of its output is the answer; its log goes to standard error.
PEER = """
import json, resource, sys, time
from dynamo.replay import run_trace_replay
engine = {"num_gpu_blocks": int(sys.argv[3]), "block_size": int(sys.argv[4]), "enable_prefix_caching": True}
began = time.process_time()
report = run_trace_replay([sys.argv[1]], extra_engine_args={"engine": engine}, num_workers=int(sys.argv[5]),
                          router_mode=sys.argv[2], trace_block_size=int(sys.argv[6]))
cpu = time.process_time() - began
keys = ("completed_requests", "duration_ms", "prefix_cache_reused_ratio", "mean_ttft_ms", "mean_tpot_ms")
print(json.dumps({"cpu_s": cpu, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                  **{key: report.summary.get(key) for key in keys}}))
"""
MODES = {"cost": "kv_router", "round-robin": "round_robin"}


def conversations(seed, enough):
    """Requests of conversations: each turn repeats the blocks of the one before and adds to them."""
    draw = random.Random(seed)
    rows, ids = [], 8
    while len(rows) < enough:
        at, blocks = draw.uniform(-600, SECONDS), [draw.randrange(8)]
        tokens = min(120_000, max(64, int(draw.lognormvariate(math.log(4800), 1.1))))
        while at < SECONDS:
            answer = min(4000, max(1, int(draw.lognormvariate(math.log(240), 0.85))))
            whole, part = divmod(tokens, BLOCK_TOKENS)
            del blocks[whole:]
            while len(blocks) < whole:
                ids += 1
                blocks.append(ids)
            ids += 1
            if at >= 0:
                rows.append((at, tokens, answer, blocks + ([ids] if part else [])))
            tokens += answer + max(16, int(draw.lognormvariate(math.log(1800), 1.2)))
            if draw.random() > 0.45 or tokens > 120_000:
                break
            at += draw.expovariate(1 / 40)
    return rows


def write_trace(path, requests, seed):
    rows = conversations(seed, requests)
    rows = sorted(random.Random(seed).sample(rows, requests))
    with open(path, "w") as file:
        for at, tokens, answer, ids in rows:
            file.write(json.dumps({"timestamp": int(at * 1000), "input_length": tokens, "output_length": answer,
                                   "hash_ids": ids}) + "\n")


def statistics_of(path):
    """Lengths, and the share of prompt tokens that an endless cache would have seen."""
    rows = [json.loads(line) for line in open(path) if line.strip()]
    seen, reused, tokens = set(), 0, sum(row["input_length"] for row in rows)
    for row in rows:
        known = True
        for number in row["hash_ids"]:
            known = known and number in seen
            seen.add(number)
            reused += BLOCK_TOKENS if known else 0
    return {"requests": len(rows), "input_tokens": tokens, "mean_input": tokens / len(rows),
            "mean_output": sum(row["output_length"] for row in rows) / len(rows), "reuse": min(1.0, reused / tokens)}


def run(command, log):
    """A process to its end: standard output, CPU seconds, peak MiB."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}")
    return out, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def ours(options, folder, policy, arrivals, engines=ENGINES, block=KV_BLOCK_TOKENS):
    fleet = pathlib.Path(folder) / f"fleet-{engines}.toml"
    fleet.write_text(f"[[engine]]\ncount = {engines}\nblock_size_tokens = {block}\n")
    command = [options.binary, "simulate", "--fleet", str(fleet), "--policy", policy, "--json", "-", *arrivals]
    out, cpu, mib = run(command, subprocess.DEVNULL)
    summary = json.loads(out)["runs"][0]["summary"]
    if summary["unfinished"]:
        raise SystemExit(f"{policy}: {summary['unfinished']} of {summary['requests']} requests were not finished")
    return {"cpu_s": cpu, "mib": mib, "requests": summary["requests"], "cached": summary["cached_share"],
            "mean_ttft_ms": summary["ttft_mean_ms"], "mean_itl_ms": summary["itl_mean_ms"]}


def theirs(python, trace, mode, log):
    sizes = [KV_BLOCKS, KV_BLOCK_TOKENS, ENGINES, BLOCK_TOKENS]
    out, _, _ = run([python, "-c", PEER, str(trace), mode, *map(str, sizes)], log)
    answer = json.loads(out.strip().splitlines()[-1])
    return {"cpu_s": answer["cpu_s"], "mib": answer["mib"], "requests": answer["completed_requests"],
            "cached": answer["prefix_cache_reused_ratio"], "mean_ttft_ms": answer["mean_ttft_ms"],
            "mean_itl_ms": answer["mean_tpot_ms"]}


def summed(rounds):
    cpu = sorted(each["cpu_s"] for each in rounds)
    return {"cpu_s": {"median": statistics.median(cpu), "best": cpu[0], "worst": cpu[-1]},
            "requests_per_cpu_s": rounds[0]["requests"] / statistics.median(cpu),
            "mib": max(each["mib"] for each in rounds),
            **{key: rounds[0][key] for key in ("requests", "cached", "mean_ttft_ms", "mean_itl_ms")}}


def print_table(rows):
    lines = [("figure", "bar", "measured", "met"), *((f, b, m, "yes" if met else "NO") for f, b, m, met in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, help="a release build of forebay")
    parser.add_argument("--trace", help="a trace in Mooncake's form; one is made up if absent")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of the trace that is made up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also a million short requests on 1,000 engines, once")
    parser.add_argument("--large-block-tokens", type=int, default=KV_BLOCK_TOKENS,
                        help="tokens of a KV block of those engines; a quarter of them takes twice the time")
    options = parser.parse_args()
    peers = os.environ.get("PEERS")
    python = peers and pathlib.Path(peers) / "dynamo" / "bin" / "python"
    document, rows = {"bench": "twin", "skipped": []}, []
    if not (python and python.exists()):
        print("skipped: Dynamo's replay; PEERS names no folder with its environment", file=sys.stderr)
        document["skipped"].append("PEERS")
        python = None

    with tempfile.TemporaryDirectory() as folder, open(pathlib.Path(folder) / "peer.log", "w") as log:
        trace = pathlib.Path(options.trace) if options.trace else pathlib.Path(folder) / "trace.jsonl"
        if not options.trace:
            write_trace(trace, options.requests, options.seed)
        document["trace"] = statistics_of(trace)
        rounds = {}
        for _ in range(options.repetitions):
            for policy, mode in MODES.items():
                rounds.setdefault(("forebay", policy), []).append(ours(options, folder, policy, ["--trace", str(trace)]))
                if python:
                    rounds.setdefault(("dynamo", policy), []).append(theirs(python, trace, mode, log))
        document["replay"] = {f"{who}, {policy}": summed(each) for (who, policy), each in rounds.items()}
        if options.large:
            arrivals = ["--workload", "fresh", "--warm-up", "0", "--rate", str(LARGE["rate"]),
                        "--seconds", str(LARGE["seconds"])]
            document["large"] = ours(options, folder, "cost", arrivals, LARGE["engines"],
                                     options.large_block_tokens)

    found = document["replay"]["forebay, cost"]
    cpu, mib = found["cpu_s"], found["mib"]
    rows.append(("CPU seconds, 16 engines", f"<= {CPU_SECONDS}", f"{cpu['median']:.2f} ({cpu['best']:.2f}-{cpu['worst']:.2f})",
                 cpu["median"] <= CPU_SECONDS))
    rows.append(("peak memory", f"<= {MEMORY_MIB} MiB", f"{mib:.0f} MiB", mib <= MEMORY_MIB))
    for policy, mode in MODES.items():
        if python:
            ratio = (document["replay"][f"dynamo, {policy}"]["cpu_s"]["median"]
                     / document["replay"][f"forebay, {policy}"]["cpu_s"]["median"])
            document.setdefault("ratio", {})[policy] = ratio
            rows.append((f"Dynamo's CPU time over ours, {mode}", f">= {RATIO}x", f"{ratio:.2f}x", ratio >= RATIO))
    if options.large:
        seconds = document["large"]["cpu_s"]
        rows.append((f"CPU seconds, {document['large']['requests']} requests on {LARGE['engines']} engines",
                     f"<= {LARGE_CPU_SECONDS}", f"{seconds:.0f}", seconds <= LARGE_CPU_SECONDS))
    document["bars"] = [dict(zip(("figure", "bar", "measured", "met"), row)) for row in rows]
    document["load_average"] = os.getloadavg()
    print_table(rows)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
