#!/usr/bin/env python3
"""How much of conversations' prompts engines find cached, and how evenly they are used, through the gateway.

Conversations of five turns that share system prompts run against four back ends with a small prefix cache each, once for
each policy and seed, from cold. The back ends announce no cache events and take text: the gateway goes by what it sent where.
Prints JSON: the share of blocks found cached, and the busiest back end's blocks over the mean. The load generator and the
mock back end are outside rulers, found through LOADGEN and MOCKBACKEND; without them the bench says so and skips.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import urllib.request

from harness import Processes, free_ports, wait_for

BACKENDS = 4
# What each back end costs and keeps: 2,048 blocks of 100 bytes, half a millisecond for a block that is new.
BACKEND = ["--flush-each", "--cache-blocks", "2048", "--block-bytes", "100", "--prefill-us-per-block", "500", "--itl-ms", "6"]
LOAD = ["--prompt-tokens", "256", "--output-tokens", "64", "--shared-tokens", "512", "--groups", "8", "--turns", "5", "--think",
        "0.3", "-c", "24", "-n", "160", "--warmup", "24", "--usage"]


def stats(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=5) as answer:
        return json.load(answer)


def run(binary, policy, seed, loadgen, mock):
    with Processes() as processes:
        *backends, port, admin = free_ports(BACKENDS + 2)
        processes.start([mock, "--ports", ",".join(map(str, backends)), *BACKEND], "mock")
        for backend in backends:
            wait_for(f"http://127.0.0.1:{backend}/health")
        engines = [part for backend in backends for part in ("--engine", f"openai=http://127.0.0.1:{backend}")]
        processes.start([binary, "serve", *engines, "--policy", policy, "--listen", f"127.0.0.1:{port}", "--admin-listen",
                         f"127.0.0.1:{admin}"], "forebay")
        wait_for(f"http://127.0.0.1:{port}/ready")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
        done = subprocess.run([loadgen, "--target", f"127.0.0.1:{port}", "--model", model, "--seed", str(seed), *LOAD],
                              check=True, capture_output=True)
        report = json.loads(done.stdout)
        if report["errors"]:
            raise SystemExit(f"the load saw errors: {report['error_kinds']}")
        of = [stats(backend) for backend in backends]
    total = [each["total_blocks"] for each in of]
    return {
        "policy": policy,
        "seed": seed,
        # Without the warm-up, which finds nothing; with it beside.
        "cached_share": round(report["usage"]["cached_share"], 4),
        "cached_share_with_warm_up": round(sum(each["hit_blocks"] for each in of) / sum(total), 4),
        "busiest_over_mean": round(max(total) * len(total) / sum(total), 3),
        "ttft_ms_p50": report["ttft_ms"].get("p50"),
        "ttft_ms_p99": report["ttft_ms"].get("p99"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--policies", default="cost,prefix-affinity,lmetric,least-load,round-robin")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    loadgen, mock = os.environ.get("LOADGEN"), os.environ.get("MOCKBACKEND")
    missing = [name for name, found in (("LOADGEN", loadgen), ("MOCKBACKEND", mock)) if not found]
    if missing:
        print(f"bench/routing SKIPPED: {', '.join(missing)} not found", file=sys.stderr)
        print(json.dumps({"bench": "routing", "skipped": missing}))
        return
    runs = []
    for seed in range(1, options.seeds + 1):
        for policy in options.policies.split(","):
            runs.append(run(options.binary, policy, seed, loadgen, mock))
            print(json.dumps(runs[-1]), file=sys.stderr)
    mean = lambda policy, key: round(statistics.mean(run[key] for run in runs if run["policy"] == policy), 4)
    print(json.dumps({
        "bench": "routing",
        "mean": {policy: {key: mean(policy, key) for key in ("cached_share", "cached_share_with_warm_up",
                                                             "busiest_over_mean", "ttft_ms_p50", "ttft_ms_p99")}
                 for policy in options.policies.split(",")},
        "runs": runs,
    }, indent=2))


if __name__ == "__main__":
    main()
