#!/usr/bin/env python3
"""What the front end costs: CPU time per request against nginx and Dynamo, memory of open streams, added time to first token.

All fronts stand before engines in other processes, over HTTP/1.1, a write a token: the same mock back ends for nginx and
forebay, its own mock engines for Dynamo. Ours tokenises and routes by KV. They take turns in one run, in slices with fresh
prompts (Dynamo keeps tokens of earlier texts, and so do we); figures are ratios of a slice, absolute ones beside them.
JSON on standard output, a table on standard error. A bar that is missed fails nothing; a request that fails does.

The load generator, the mock back end and nginx are outside rulers (LOADGEN, MOCKBACKEND, PATH). Dynamo is found through
PEERS: a folder with its environment `dynamo` and a model folder `models/qwen3` (tokenizer.json, tokenizer_config.json,
config.json), which gives forebay its tokenizer, too. Without PEERS, Dynamo's part is left out and said to be.
"""

import argparse
import json
import os
import pathlib
import random
import sys
import time

from harness import Processes, free_ports, generate, nginx, print_table, rulers, skip, spread, wait_for

BACKENDS = 4
HELLO = json.dumps({"model": "mock", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()


class Seeds:
    """Fresh prompts for every slice."""

    def __init__(self):
        self.next = int(time.time())

    def draw(self):
        self.next += 1
        return self.next


class Bench:
    """The rulers, and what is measured so far."""

    def __init__(self, options, found, peers):
        self.options, self.peers = options, peers
        self.loadgen, self.mock, self.nginx = found["LOADGEN"], found["MOCKBACKEND"], found["nginx"]
        self.seeds, self.rows, self.figures = Seeds(), [], {}

    def backends(self, processes, *flags, count=BACKENDS):
        ports = free_ports(count)
        processes.start([self.mock, "--ports", ",".join(map(str, ports)), *flags], "mock")
        for port in ports:
            wait_for(f"http://127.0.0.1:{port}/health")
        return ports

    def forebay(self, processes, backends, *flags):
        port, admin = free_ports(2)
        engines = [part for backend in backends for part in ("--engine", f"openai=http://127.0.0.1:{backend}")]
        pid = processes.start(
            [self.options.binary, "serve", *engines, "--tokenizer", self.options.tokenizer, "--listen", f"127.0.0.1:{port}",
             "--admin-listen", f"127.0.0.1:{admin}", *flags], "forebay")
        wait_for(f"http://127.0.0.1:{port}/v1/chat/completions", body=HELLO)
        return port, pid

    def dynamo(self, processes, name, *flags):
        """Its front end with routing by KV, over mock engines of its own."""
        folder, [port] = f"{processes.folder}/{name}", free_ports(1)
        environment = {**os.environ, "DYN_FILE_KV": folder, "DYN_TCP_RPC_HOST": "127.0.0.1",
                       "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1", "DYN_EVENT_PLANE_HOST": "127.0.0.1", "DYN_LOG": "warn",
                       "DYN_DISCOVERY_BACKEND": "file", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        os.mkdir(folder)
        python = f"{self.peers}/dynamo/bin/python"
        processes.start([python, "-m", "dynamo.mocker", "--model-path", f"{self.peers}/models/qwen3", "--model-name", "mock",
                         "--discovery-backend", "file", "--num-workers", str(BACKENDS), "--speedup-ratio", "1000000",
                         "--block-size", "16", "--num-gpu-blocks-override", "65536"], f"{name}-mocker", env=environment)
        pid = processes.start([python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port),
                               "--discovery-backend", "file", "--router-mode", "kv", *flags], name, env=environment)
        wait_for(f"http://127.0.0.1:{port}/v1/chat/completions", 120, HELLO)
        return port, pid

    def alternate(self, fronts, flags, slices=None):
        """Slices of one load on several fronts in turn, the first of which warms them up; lists of reports by front."""
        reports = {name: [] for name in fronts}
        for number in range((slices or self.options.slices) + 1):
            for name, (port, pid) in fronts.items():
                flags_now = flags(self.seeds.draw())
                report = generate(self.loadgen, port, "mock", flags_now, pid)
                if number > 0:
                    reports[name].append(report)
        return reports

    def note(self, section, figure, value):
        self.figures.setdefault(section, {})[figure] = value

    def bar(self, figure, measured, most=None, text=None):
        bar = "" if most is None else f"<= {most:.3g}"
        self.rows.append((figure, bar, text or f"{measured:.3g}", None if most is None else measured <= most))

    def cpu(self, section, reports):
        """CPU seconds per 1,000 requests of every front."""
        cost = {}
        for name, slices in reports.items():
            cost[name] = [report["processes"]["front"]["cpu_s_per_1000_requests"] for report in slices]
            self.note(section, name, {
                "cpu_s_per_1000": spread(cost[name], 4),
                "requests_per_s": spread([report["requests_per_s"] for report in slices], 1),
                "reads_per_request": spread([report["reads_per_request"] for report in slices], 1),
                "rss_mib": round(max(report["processes"]["front"]["rss_mib"] for report in slices), 1),
                "other_cpu_s": round(sum(report["machine"]["other_cpu_s"] for report in slices), 2)})
        return cost

    def ratio(self, section, cost, over, most=None, of="forebay", title=None):
        """What one front costs over another, slice by slice."""
        if over not in cost or of not in cost:
            return
        # The kernel counts in hundredths of a second: a short slice may show nothing.
        pairs = [(mine, its) for mine, its in zip(cost[of], cost[over]) if its > 0]
        if not pairs:
            return
        ratios = spread([mine / its for mine, its in pairs])
        self.note(section, f"{of} over {over}", ratios)
        its = self.figures[section]
        absolute = f"{its[of]['cpu_s_per_1000']['median']:.3f} : {its[over]['cpu_s_per_1000']['median']:.3f} CPU-s/1,000"
        text = f"{ratios['median']:.3g} ({ratios['min']:.3g}-{ratios['max']:.3g}), {absolute}"
        self.bar(f"{section}: {title or f'CPU of {of} over {over}'}", ratios["median"], most, text)


def short(bench):
    """Short prompts, streamed: the cost of everything but tokenising."""
    load = ["-c", 64, "-n", bench.options.requests, "--prompt-tokens", 256, "--output-tokens", 64]
    with Processes() as processes:
        backends = bench.backends(processes, "--ttft-ms", "0", "--itl-ms", "0", "--flush-each")
        fronts = {"nginx": nginx(processes, bench.nginx, backends), "forebay": bench.forebay(processes, backends)}
        if bench.peers:
            fronts["dynamo"] = bench.dynamo(processes, "dynamo")
        cost = bench.cpu("256 in, 64 out", bench.alternate(fronts, lambda seed: [*load, "--seed", seed]))
    bench.ratio("256 in, 64 out", cost, "nginx", 2.0)
    bench.ratio("256 in, 64 out", cost, "dynamo")


def cold(bench):
    """Long prompts that nobody has seen: the cost of tokenising."""
    sections = {}
    with Processes() as processes:
        backends = bench.backends(processes, "--ttft-ms", "0", "--itl-ms", "0", "--flush-each")
        fronts = {"nginx": nginx(processes, bench.nginx, backends), "forebay": bench.forebay(processes, backends)}
        if bench.peers:
            fronts["dynamo"] = bench.dynamo(processes, "dynamo")
            fronts["fastokens"] = bench.dynamo(processes, "fastokens", "--tokenizer", "fastokens")
        for tokens, at_once, share in ((8_192, 8, 1 / 14), (32_768, 4, 1 / 20)):
            count = max(120, 1_200_000 // tokens)
            for text in ("words", "mixed text"):
                def flags(seed):
                    load = ["-c", at_once, "-n", count, "--output-tokens", 64, "--seed", seed]
                    if text == "words":
                        return [*load, "--prompt-tokens", tokens]
                    path = f"{processes.folder}/mixed-{tokens}.jsonl"
                    write_mixed(path, count, tokens, seed)
                    return [*load, "--trace", path]
                section = f"{tokens // 1024}k cold, {text}"
                sections[section] = (share, bench.cpu(section, bench.alternate(fronts, flags, min(3, bench.options.slices))))
    for section, (share, cost) in sections.items():
        bench.ratio(section, cost, "dynamo", share)
        bench.ratio(section, cost, "fastokens", 0.5)
        bench.ratio(section, cost, "nginx")


def turns(bench):
    """Conversations of 32k tokens that go on by 500, against as many cold ones."""
    known = ["--shared-tokens", 32_268, "--groups", 4, "--prompt-tokens", 500]
    with Processes() as processes:
        backends = bench.backends(processes, "--ttft-ms", "0", "--itl-ms", "0", "--flush-each")
        front = bench.forebay(processes, backends)
        load = ["-c", 4, "-n", 240, "--output-tokens", 64]
        reports = {"cold": [], "extended": []}
        for _ in range(bench.options.slices):
            for name in reports:
                seed = bench.seeds.draw()
                flags = [*load, "--seed", seed, "--warmup", 8, *(known if name == "extended" else ["--prompt-tokens", 32_768])]
                reports[name].append(generate(bench.loadgen, front[0], "mock", flags, front[1]))
        cost = bench.cpu("32k, 500 new", reports)
    bench.ratio("32k, 500 new", cost, "cold", 1 / 3, of="extended", title="CPU of extended over cold prompts")


def busy(bench):
    """A hundred prompts of 100,000 tokens a second, 95 % of each an earlier one's text."""
    rate, seconds = bench.options.busy_rate, 8
    with Processes() as processes:
        backends = bench.backends(processes, "--ttft-ms", "0", "--itl-ms", "0", "--flush-each")
        port, pid = bench.forebay(processes, backends, "--text-cache-bytes-max", str(256 << 20))
        path, seed = f"{processes.folder}/busy.jsonl", bench.seeds.draw()
        write_busy(path, 20 + rate * seconds, seed)
        words = ["--output-tokens", 4, "--seed", seed]
        generate(bench.loadgen, port, "mock", [*words, "--trace", path, "-n", 20], pid)
        report = generate(bench.loadgen, port, "mock", [*words, "--trace", path, "--rate", rate, "-n", rate * seconds], pid)
        front = report["processes"]["front"]
        used = front["cpu_s"] / report["wall_s"]
        bench.note("busy", "forebay", {"cpu_s_per_s": used, "requests_per_s": report["requests_per_s"],
                                       "late_ms": report.get("late_ms"), "ttft_ms": report["ttft_ms"]})
    text = f"{used:.2f} at {report['requests_per_s']:.0f} requests/s (asked {rate})"
    bench.bar("100k, 95 % known: CPU-seconds per second", used, 1.0, text)


def streams(bench):
    """Many open streams at a token a second: what each of them keeps."""
    count = bench.options.streams
    load = ["--prompt-tokens", 32, "--output-tokens", 20, "-c", count, "-n", count, "--ramp", 15, "--timeout", 150]
    for name in ("nginx", "forebay"):
        with Processes() as processes:
            # No engine is given more than 1,280 requests.
            backends = bench.backends(processes, "--ttft-ms", "100", "--itl-ms", "1000", count=10)
            start = {"nginx": lambda: nginx(processes, bench.nginx, backends),
                     "forebay": lambda: bench.forebay(processes, backends, "--requests-in-flight-max", str(count + 64))}[name]
            port, pid = start()
            generate(bench.loadgen, port, "mock", ["-n", 64, "-c", 16, "--prompt-tokens", 32, "--output-tokens", 2], pid)
            idle = resident_mib(pid)
            report = generate(bench.loadgen, port, "mock", [*load, "--seed", bench.seeds.draw()], pid)
            peak = report["processes"]["front"]["rss_mib"]
            each = (peak - idle) * 1024 / count
            bench.note("streams", name, {"idle_mib": idle, "peak_mib": peak, "kib_each": each,
                                         "cpu_s": report["processes"]["front"]["cpu_s"], "itl_ms": report["itl_ms"]})
            bench.bar(f"{count} streams: KiB each, {name}", each, 35.0 if name == "forebay" else None)


def resident_mib(pid):
    """Of a process and its children."""
    pids, total = [pid], 0
    while pids:
        each = pids.pop()
        status = pathlib.Path(f"/proc/{each}/status").read_text()
        total += int(status.split("VmRSS:")[1].split()[0])
        children = pathlib.Path(f"/proc/{each}/task/{each}/children").read_text()
        pids += map(int, children.split())
    return total / 1024


def added(bench):
    """Time to first token at a low rate, over a direct connection."""
    load = ["--rate", 25, "-n", 250, "--prompt-tokens", 256, "--output-tokens", 64]
    with Processes() as processes:
        backends = bench.backends(processes, "--ttft-ms", "0", "--itl-ms", "0", "--flush-each")
        fronts = {"direct": (backends, None), "nginx": nginx(processes, bench.nginx, backends),
                  "forebay": bench.forebay(processes, backends)}
        reports = bench.alternate(fronts, lambda seed: [*load, "--seed", seed], 3)
    of = lambda name, quantile: spread([report["ttft_ms"][quantile] for report in reports[name]])["median"]
    for name in fronts:
        bench.note("25 requests/s", name, {"ttft_ms_p50": of(name, "p50"), "ttft_ms_p99": of(name, "p99")})
    bench.bar("25 requests/s: TTFT P50 above direct, ms", of("forebay", "p50") - of("direct", "p50"), 0.5)
    bench.bar("25 requests/s: TTFT P99 above nginx's, ms", of("forebay", "p99") - of("nginx", "p99"), 0.5)


def corpus():
    """Paragraphs of this checkout: prose, code, tables, and the scripts of many languages in the tokenizer's tests."""
    root = pathlib.Path(__file__).resolve().parent.parent
    files = sorted(path for kind in ("*.md", "*.rs", "*.py", "*.toml", "*.json") for path in (root / "crates").rglob(kind))
    files += sorted((root / "docs").rglob("*.md"))
    texts = (path.read_text(errors="ignore") for path in files if "target" not in path.parts)
    return [part for text in texts for part in text.split("\n\n") if 40 < len(part) < 4_000]


PARAGRAPHS = []


def write_mixed(path, count, tokens, seed):
    """Prompts of about so many tokens: 3.6 bytes each in this text."""
    draw = random.Random(seed)
    if not PARAGRAPHS:
        PARAGRAPHS.extend(corpus())
    with open(path, "w") as file:
        for _ in range(count):
            parts, size = [], 0
            while size < tokens * 3.6:
                part = draw.choice(PARAGRAPHS)
                # Cut anew each time, so that no two prompts have many stretches in common.
                part = part[draw.randrange(len(part) // 2):]
                parts.append(part)
                size += len(part)
            message = {"role": "user", "content": "\n\n".join(parts)}
            file.write(json.dumps({"messages": [message], "output_length": 64}) + "\n")


def write_busy(path, count, seed):
    """Twenty prompts of 100,000 words, then others that begin with one of them and end in 5,000 words of their own."""
    draw = random.Random(seed)
    words = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
             "family", "student", "group", "country", "problem", "hand", "part"]
    text = lambda count: " ".join(draw.choice(words) for _ in range(count))
    heads = [text(95_000) for _ in range(20)]
    with open(path, "w") as file:
        for number in range(count):
            content = heads[number % len(heads)] + " " + text(5_000)
            file.write(json.dumps({"messages": [{"role": "user", "content": content}], "output_length": 4}) + "\n")


SECTIONS = {"short": short, "cold": cold, "turns": turns, "busy": busy, "streams": streams, "added": added}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True, help="a release build of forebay")
    parser.add_argument("--tokenizer", help="tokenizer.json or a GGUF file; default: that of PEERS, else the demo's model")
    parser.add_argument("--only", default=",".join(SECTIONS), help="parts, by comma: " + ", ".join(SECTIONS))
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3_000, help="of a slice of short prompts")
    parser.add_argument("--streams", type=int, default=9_500)
    parser.add_argument("--busy-rate", type=int, default=100)
    options = parser.parse_args()
    found, missing = rulers()
    if missing:
        return skip("front", missing)
    peers, skipped = os.environ.get("PEERS"), []
    if not (peers and pathlib.Path(peers, "dynamo/bin/python").exists() and pathlib.Path(peers, "models/qwen3").exists()):
        print("bench/front: without Dynamo: PEERS names no folder with it and a model", file=sys.stderr)
        peers, skipped = None, ["PEERS"]
    models = pathlib.Path(os.environ.get("FOREBAY_MODEL_FOLDER") or pathlib.Path.home() / ".cache/forebay/models")
    options.tokenizer = options.tokenizer or (f"{peers}/models/qwen3" if peers
                                              else str(models / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    bench = Bench(options, found, peers)
    for name in options.only.split(","):
        if name not in SECTIONS:
            parser.error(f"there is no part `{name}`; there are {', '.join(SECTIONS)}")
        SECTIONS[name](bench)
        print(f"{name} done", file=sys.stderr)
    print_table(bench.rows)
    bars = [dict(zip(("figure", "bar", "measured", "met"), row)) for row in bench.rows]
    print(json.dumps({"bench": "front", "skipped": skipped, "tokenizer": options.tokenizer, "bars": bars,
                      "figures": bench.figures, "load_average": os.getloadavg()}, indent=2))


if __name__ == "__main__":
    main()
