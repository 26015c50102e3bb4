"""What several benches share: free ports, children that end by their own ids, an nginx that only proxies, bars."""

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


def wait_for(url, seconds=60, body=None):
    """Waits for an answer of 200; the seconds that took."""
    began = time.monotonic()
    headers = {"content-type": "application/json"} if body else {}
    while time.monotonic() - began < seconds:
        try:
            asked = urllib.request.Request(url, data=body, headers=headers)
            with urllib.request.urlopen(asked, timeout=5) as answer:
                if answer.status == 200:
                    return time.monotonic() - began
        except OSError:
            time.sleep(0.005)
    raise SystemExit(f"nothing answered at {url} within {seconds} s")


def rulers():
    """The load generator, the mock back end and nginx; and which of them are not found."""
    found = {"LOADGEN": os.environ.get("LOADGEN"), "MOCKBACKEND": os.environ.get("MOCKBACKEND"),
             "nginx": shutil.which("nginx")}
    return found, [name for name, where in found.items() if not where]


def skip(bench, missing):
    print(f"bench/{bench} SKIPPED: {', '.join(missing)} not found", file=sys.stderr)
    print(json.dumps({"bench": bench, "skipped": missing}))


class Processes:
    """Children and a folder for their logs; both gone at the end."""

    def __init__(self):
        self.children = []
        self.folder = tempfile.mkdtemp(prefix="forebay-bench-")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, command, name, **options):
        with open(f"{self.folder}/{name}.log", "w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
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
                child.wait()
        self.children = []


def nginx(processes, program, backends):
    """A plain proxy of one worker that holds nothing back; its port and process id."""
    folder, [port] = processes.folder, free_ports(1)
    servers = "".join(f"server 127.0.0.1:{backend};" for backend in backends)
    temporary = "".join(f"{name}_temp_path {folder}/{name};" for name in ("proxy", "fastcgi", "uwsgi", "scgi"))
    pathlib.Path(f"{folder}/nginx.conf").write_text(
        f"worker_processes 1; worker_rlimit_nofile 60000; pid {folder}/nginx.pid; daemon off;"
        f"error_log {folder}/nginx.err warn; events {{ worker_connections 30000; }}"
        "http { access_log off; client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000;"
        f"client_body_temp_path {folder}/body; {temporary}"
        f"upstream b {{ keepalive 512; keepalive_requests 1000000; {servers} }}"
        f"server {{ listen 127.0.0.1:{port} backlog=8192; location / {{ proxy_pass http://b; proxy_http_version 1.1;"
        'proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; } } }')
    pid = processes.start([program, "-p", folder, "-c", f"{folder}/nginx.conf"], "nginx")
    wait_for(f"http://127.0.0.1:{port}/health")
    return port, pid


def generate(loadgen, port, model, flags, pid=None):
    """One run of the load generator: its report, unless a request failed."""
    watch = ["--watch", f"front={pid}"] if pid else []
    target = ",".join(f"127.0.0.1:{each}" for each in (port if isinstance(port, list) else [port]))
    command = [loadgen, "--target", target, "--model", model, *watch, *map(str, flags)]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    if report["errors"]:
        raise SystemExit(f"the load saw errors: {report['error_kinds']} ({' '.join(command)})")
    return report


def spread(values, digits=3):
    """Median, least and most."""
    values = sorted(values)
    return {"median": round(statistics.median(values), digits), "min": round(values[0], digits),
            "max": round(values[-1], digits)}


def print_table(rows):
    """Rows of figure, bar, measured and whether it is met (`None`: there is no bar), on standard error."""
    word = {True: "yes", False: "NO", None: ""}
    lines = [("figure", "bar", "measured", "met"), *((f, b, m, word[met]) for f, b, m, met in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip(), file=sys.stderr)
