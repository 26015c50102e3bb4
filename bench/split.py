#!/usr/bin/env python3
"""TTFT and ITL of two engines that can hand KV over: asked directly, aggregated, split by role, and as placement likes.

In: a `forebay` binary and the URLs of two running servers of one model with a KV connector, both able to prefill and
to decode. Out: JSON. The load comes from an outside ruler, found through LOADGEN; without it the bench says so and
skips. All ways share the engines and take turns in slices, every slice with prompts that nobody has seen.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

LOOPBACK = "127.0.0.1"
START_SECONDS_MAX = 120
# What vLLM says of the KV that its NIXL connector moved.
NIXL = ["vllm:nixl_bytes_transferred_sum", "vllm:nixl_bytes_transferred_count", "vllm:nixl_xfer_time_seconds_sum",
        "vllm:nixl_num_descriptors_sum", "vllm:nixl_num_failed_transfers_total", "vllm:nixl_num_kv_expired_reqs_total"]


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def moved(engine):
    """Sums of the engine's NIXL counters."""
    page = get(f"{engine}/metrics")
    sums = {name: 0.0 for name in NIXL}
    for line in page.splitlines():
        name = re.split(r"[{ ]", line, maxsplit=1)[0]
        if name in sums:
            sums[name] += float(line.rsplit(" ", 1)[1])
    return sums


class Forebay:
    """`forebay serve` above the engines, on free ports."""

    def __init__(self, options, name, specs, flags, logs):
        tokenizer = ["--tokenizer", options.tokenizer] if options.tokenizer else []
        command = [str(options.binary), "serve", *[word for spec in specs for word in ("--engine", spec)],
                   "--listen", f"{LOOPBACK}:0", "--admin-listen", f"{LOOPBACK}:0", *tokenizer, *flags]
        self.log = logs / f"{name}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=open(self.log, "wb"),
                                        stderr=subprocess.STDOUT, env=environment | {"NO_COLOR": "1"})

    def wait(self, what, condition):
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                found = condition()
            except OSError:
                found = None
            if found:
                return found
            time.sleep(0.1)
        raise SystemExit(f"not in time: {what}\n{self.log.read_text(errors='replace')[-3000:]}")

    def serving(self):
        text = self.log.read_text(errors="replace")
        public, admin = re.search(r"public=\S+?:(\d+)", text), re.search(r"admin=\S+?:(\d+)", text)
        return public and admin and (int(public[1]), int(admin[1]))

    def admin_page(self, path):
        return json.loads(get(f"http://{LOOPBACK}:{self.admin}{path}"))["data"]

    def wait_ready(self, count):
        self.port, self.admin = self.wait("its addresses", self.serving)
        self.wait("engines ready", lambda: sum(e["state"] == "ready" for e in self.admin_page("/fleet/v1/engines")) == count)
        return self

    def wait_warm(self, pairs):
        self.wait("pairs warmed", lambda: len(self.admin_page("/fleet/v1/links")) >= pairs)
        return self

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def slice_of(options, loadgen, target, rate, seed):
    """One slice of load. Out: the generator's report."""
    tokens = options.output_tokens
    extra = {"ignore_eos": True, "temperature": 0}
    command = [loadgen, "--target", target, "--endpoint", "completions", "--model", options.model, "--rate", str(rate),
               "--duration", str(options.seconds), "--prompt-tokens", str(options.prompt_tokens), "--output-tokens",
               str(tokens), "--seed", str(seed), "--usage", "--extra", json.dumps(extra), "--threads", "2"]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"the load generator failed: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", type=pathlib.Path, required=True)
    parser.add_argument("--engine", action="append", required=True,
                        help="URL of a vLLM server, and options as of `forebay serve` (events=…); say it twice")
    parser.add_argument("--model", required=True, help="the model's name at the engines")
    parser.add_argument("--tokenizer", help="as of `forebay serve`; without it, text is passed on")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--rates", default="2,6", help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of a slice")
    parser.add_argument("--slices", type=int, default=1, help="of each way at each rate")
    parser.add_argument("--logs", type=pathlib.Path)
    options = parser.parse_args()
    loadgen = os.environ.get("LOADGEN")
    if not loadgen or not os.access(loadgen, os.X_OK):
        print("LOADGEN names no load generator: skipped", file=sys.stderr)
        print(json.dumps({"skipped": ["LOADGEN"]}))
        return
    if len(options.engine) != 2:
        parser.error("say --engine twice")
    logs = options.logs or pathlib.Path(tempfile.mkdtemp(prefix="forebay-split-"))
    logs.mkdir(parents=True, exist_ok=True)
    specs = [f"vllm={spec},name=e{number}" for number, spec in enumerate(options.engine)]
    urls = [spec.split(",")[0] for spec in options.engine]
    split = [f"{spec},role={role}" for spec, role in zip(specs, ("prefill", "decode"))]
    ways = {"aggregated": (specs, ["--policy", "least-load"]), "split": (split, []), "cost": (specs, [])}
    running, results, seed = {}, [], int(time.time())
    try:
        for name, (engines, flags) in ways.items():
            running[name] = Forebay(options, name, engines, flags, logs)
            # One after another: what one tries on an engine when it joins would be in the other's figures.
            running[name].wait_ready(2).wait_warm(1 if name == "split" else 2)
        links = {name: each.admin_page("/fleet/v1/links") for name, each in running.items()}
        direct = ",".join(url.split("//", 1)[1] for url in urls)
        targets = {"direct": direct} | {name: f"{LOOPBACK}:{each.port}" for name, each in running.items()}
        for rate in [float(rate) for rate in options.rates.split(",")]:
            for _ in range(options.slices):
                for name, target in targets.items():
                    seed += 1
                    before = [moved(url) for url in urls]
                    report = slice_of(options, loadgen, target, rate, seed)
                    after = [moved(url) for url in urls]
                    nixl = {key: sum(a[key] - b[key] for a, b in zip(after, before)) for key in NIXL}
                    results.append({"way": name, "rate": rate, "report": report, "nixl": nixl})
                    print(f"{name} at {rate}/s: ttft {report.get('ttft_ms')}, itl {report.get('itl_ms')}", file=sys.stderr)
        after_load = {name: each.admin_page("/fleet/v1/links") for name, each in running.items()}
    finally:
        for each in running.values():
            each.stop()
    print(json.dumps({
        "engines": urls, "prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens,
        "slice_seconds": options.seconds, "links_after_warming": links, "links_after_load": after_load,
        "summary": summary(results), "slices": results}, indent=1))


def summary(results):
    """Medians over the slices of each way at each rate."""
    rows = []
    for way, rate in dict.fromkeys((result["way"], result["rate"]) for result in results):
        reports = [r["report"] for r in results if (r["way"], r["rate"]) == (way, rate)]
        row = {"way": way, "rate": rate}
        for kind in ("ttft_ms", "itl_ms"):
            for quantile in ("p50", "p99"):
                values = [report[kind][quantile] for report in reports if report.get(kind)]
                row[f"{kind}_{quantile}"] = round(statistics.median(values), 2) if values else None
        nixl = [r["nixl"] for r in results if (r["way"], r["rate"]) == (way, rate)]
        seconds, count = (sum(each[key] for each in nixl) for key in (NIXL[2], NIXL[0]))
        row["nixl_transfers"] = sum(each[NIXL[1]] for each in nixl)
        row["nixl_gb_per_second"] = round(count / seconds / 1e9, 2) if seconds else None
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
