#!/usr/bin/env python3
"""CPU time per request of the gateway against nginx proxying the same load, in one run, in alternating slices.

Prints JSON. The load generator and the mock back end are outside rulers, found through LOADGEN and MOCKBACKEND; without
them, or without nginx, the bench says so and skips. Both sides are unpaced and send one write a token; the whole
`forebay` process is counted: HTTP, tokenising, routing and 64 simulated engines.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request


def free_ports(count):
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def wait_for(url, seconds=60):
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return time.monotonic() - began
        except OSError:
            time.sleep(0.005)
    raise SystemExit(f"nothing answered at {url} within {seconds} s")


def nginx_conf(folder, port, backends):
    servers = "".join(f"server 127.0.0.1:{backend};" for backend in backends)
    return (
        f"worker_processes 1; pid {folder}/nginx.pid; daemon off; error_log {folder}/nginx.err warn;"
        "events { worker_connections 30000; }"
        "http { access_log off; client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000;"
        f"client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;"
        f"uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;"
        f"upstream b {{ keepalive 512; keepalive_requests 1000000; {servers} }}"
        f"server {{ listen 127.0.0.1:{port} backlog=8192; location / {{ proxy_pass http://b; proxy_http_version 1.1;"
        'proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; } } }')


class Processes:
    """Children, ended by their own ids."""

    def __init__(self):
        self.children = []

    def start(self, command, log):
        child = subprocess.Popen(command, stdout=open(log, "w"), stderr=subprocess.STDOUT)
        self.children.append(child)
        return child.pid

    def stop(self):
        for child in reversed(self.children):
            child.terminate()
        for child in self.children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def slice_of_load(loadgen, port, model, pid, seed, options):
    command = [loadgen, "--target", f"127.0.0.1:{port}", "--model", model, "-c", str(options.concurrency), "-n",
               str(options.requests), "--prompt-tokens", str(options.prompt_tokens), "--output-tokens",
               str(options.output_tokens), "--seed", str(seed), "--watch", f"front={pid}"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    if report["errors"]:
        raise SystemExit(f"the load saw errors: {report['error_kinds']}")
    front = report["processes"]["front"]
    return {
        "cpu_s_per_1000": round(front["cpu_s_per_1000_requests"], 4),
        "requests_per_s": round(report["requests_per_s"], 1),
        "reads_per_request": round(report["reads_per_request"], 1),
        "ttft_ms_p50": report["ttft_ms"].get("p50"),
        "e2e_ms_p50": report["e2e_ms"].get("p50"),
        "rss_mib": round(front["rss_mib"], 1),
        "cached_share": report["usage"]["cached_share"],
        "other_cpu_s": round(report["machine"]["other_cpu_s"], 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--tokenizer", default=str(pathlib.Path(
        os.environ.get("FOREBAY_MODEL_FOLDER") or pathlib.Path.home() / ".cache/forebay/models")
        / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--engines", type=int, default=64)
    options = parser.parse_args()

    loadgen, mock, nginx = os.environ.get("LOADGEN"), os.environ.get("MOCKBACKEND"), shutil.which("nginx")
    missing = [name for name, found in (("LOADGEN", loadgen), ("MOCKBACKEND", mock), ("nginx", nginx)) if not found]
    if missing:
        print(f"bench/gateway SKIPPED: {', '.join(missing)} not found", file=sys.stderr)
        print(json.dumps({"bench": "gateway", "skipped": missing}))
        return

    folder = tempfile.mkdtemp(prefix="forebay-bench-")
    processes = Processes()
    try:
        *backends, proxy, port, admin = free_ports(7)
        # mockbackend takes a range or a list of ports.
        processes.start([mock, "--ports", ",".join(map(str, backends)), "--ttft-ms", "0", "--itl-ms", "0",
                         "--flush-each"], f"{folder}/mock.log")
        for backend in backends:
            wait_for(f"http://127.0.0.1:{backend}/health")
        pathlib.Path(f"{folder}/nginx.conf").write_text(nginx_conf(folder, proxy, backends))
        nginx_pid = processes.start([nginx, "-p", folder, "-c", f"{folder}/nginx.conf"], f"{folder}/nginx.log")
        wait_for(f"http://127.0.0.1:{proxy}/health")
        ours = processes.start(
            [options.binary, "serve", "--engine", f"sim:{options.engines}", "--sim-speed", "0", "--tokenizer",
             options.tokenizer, "--listen", f"127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{admin}"],
            f"{folder}/forebay.log")
        wait_for(f"http://127.0.0.1:{port}/ready")
        models = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"))
        model = models["data"][0]["id"]

        rows, seed = [], int(time.time())
        for number in range(options.slices + 1):
            row = {}
            for name, where, served, pid in (("nginx", proxy, "mock", nginx_pid), ("forebay", port, model, ours)):
                seed += 1  # fresh prompts in every slice
                row[name] = slice_of_load(loadgen, where, served, pid, seed, options)
            row["ratio"] = round(row["forebay"]["cpu_s_per_1000"] / max(row["nginx"]["cpu_s_per_1000"], 1e-9), 2)
            if number > 0:  # the first warms both up
                rows.append(row)
        ratios = [row["ratio"] for row in rows]
        print(json.dumps({
            "bench": "gateway",
            "load": {"prompt_tokens": options.prompt_tokens, "output_tokens": options.output_tokens,
                     "concurrency": options.concurrency, "requests_per_slice": options.requests,
                     "engines": options.engines},
            "ratio_cpu_per_request_to_nginx": {"median": statistics.median(ratios), "min": min(ratios),
                                               "max": max(ratios)},
            "nginx_cpu_s_per_1000": statistics.median(row["nginx"]["cpu_s_per_1000"] for row in rows),
            "forebay_cpu_s_per_1000": statistics.median(row["forebay"]["cpu_s_per_1000"] for row in rows),
            "slices": rows,
        }, indent=2))
    finally:
        processes.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
