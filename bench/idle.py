#!/usr/bin/env python3
"""Resident memory of an idle `forebay serve --engine sim` and the time from start to ready. Prints JSON."""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request

from harness import free_ports


def once(binary):
    port, admin = free_ports(2)
    began = time.monotonic()
    server = subprocess.Popen(
        [binary, "serve", "--engine", "sim", "--listen", f"127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{admin}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            if server.poll() is not None:
                raise SystemExit(f"forebay serve ended with {server.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.001)
        ready_ms = (time.monotonic() - began) * 1000
        time.sleep(1)  # idle means idle: whatever start-up still frees is freed
        with open(f"/proc/{server.pid}/status") as status:
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) / 1024
        return ready_ms, resident
    finally:
        server.terminate()
        server.wait(10)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    runs = [once(options.binary) for _ in range(options.runs)]
    print(json.dumps({
        "bench": "idle",
        "ready_ms": {"median": round(statistics.median(run[0] for run in runs), 1),
                     "max": round(max(run[0] for run in runs), 1)},
        "resident_mib": {"median": round(statistics.median(run[1] for run in runs), 1),
                         "max": round(max(run[1] for run in runs), 1)},
        "runs": len(runs),
    }, indent=2))


if __name__ == "__main__":
    sys.exit(main())
