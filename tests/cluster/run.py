#!/usr/bin/env python3
"""A fleet over network namespaces, under faults: two gateways, six agents with engines, etcd.

In: a `forebay` binary, root, `ip`, `etcd`. Out: a line for each thing that must hold, exit code 0 if all do, 1 if one
does not, 2 with a sentence where it cannot run; with --json the figures. Every host is a namespace with an address of its
own on one bridge, which lies in a namespace too: nothing of this machine's network is touched.

Under 200 requests in flight: an agent is killed (its engine serves on, and the next agent adopts it), an engine is
killed, a gateway is killed, one host is cut off for 20 seconds, etcd is stopped for 30. What must hold: each request that
a surviving gateway took ends once, with the right tokens or a retryable error; nothing outlives its deadline; afterwards
nothing is held anywhere.

    sudo python3 tests/cluster/run.py --binary target/release/forebay --model ~/.cache/forebay/models/SmolLM2-….gguf
"""
import argparse
import http.client
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

PREFIX = f"fb{os.getpid() % 10000}"
NET = "10.77.0."
REGISTRY, GATEWAYS, HOSTS = 2, (11, 12), tuple(range(21, 27))
MODEL = "sim"
IN_FLIGHT = 200
LOAD_SECONDS = 75
DEADLINE_SECONDS = 60
KEY = "00112233445566778899aabbccddeeff"
RETRYABLE = {"engine_lost", "engine_lost_mid_stream", "no_engine", "engines_saturated", "too_many_requests",
             "deadline_exceeded", "model_not_found"}


class CannotRun(Exception):
    """What is missing on this machine."""


class Net:
    """Namespaces on one bridge; all of them are removed at the end."""

    def __init__(self):
        self.names = []

    def __enter__(self):
        self.add("hub")
        self.ip("-n", self.ns("hub"), "link", "add", "br0", "type", "bridge")
        self.ip("-n", self.ns("hub"), "link", "set", "br0", "up")
        return self

    def ns(self, name):
        return f"{PREFIX}-{name}"

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def add(self, name):
        self.ip("netns", "add", self.ns(name))
        self.names.append(name)
        self.ip("-n", self.ns(name), "link", "set", "lo", "up")

    def host(self, number):
        name = f"h{number}"
        self.add(name)
        inner, outer = f"{PREFIX}i{number}", f"{PREFIX}o{number}"
        self.ip("-n", self.ns(name), "link", "add", "eth0", "type", "veth", "peer", "name", outer, "netns", self.ns("hub"))
        self.ip("-n", self.ns(name), "addr", "add", f"{NET}{number}/24", "dev", "eth0")
        self.ip("-n", self.ns(name), "link", "set", "eth0", "up")
        self.ip("-n", self.ns("hub"), "link", "set", outer, "master", "br0")
        self.ip("-n", self.ns("hub"), "link", "set", outer, "up")
        del inner

    def link(self, number, up):
        self.ip("-n", self.ns("hub"), "link", "set", f"{PREFIX}o{number}", "up" if up else "down")

    def run(self, number, command, log, env=None):
        inside = ["ip", "netns", "exec", self.ns(f"h{number}"), *command]
        return subprocess.Popen(inside, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **(env or {})})

    def __exit__(self, *_):
        for name in reversed(self.names):
            for pid in subprocess.run(["ip", "netns", "pids", self.ns(name)], capture_output=True, text=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self.ns(name)], capture_output=True)


def inside(net, number, function):
    """Runs a function in a namespace, in a thread of its own: a namespace belongs to a thread."""
    result = []

    def run():
        with open(f"/var/run/netns/{net.ns(f'h{number}')}") as ns:
            os.setns(ns.fileno(), os.CLONE_NEWNET) if hasattr(os, "setns") else setns(ns.fileno())
        try:
            result.append((True, function()))
        except Exception as error:  # noqa: BLE001: handed on below
            result.append((False, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ok, value = result[0]
    if ok:
        return value
    raise value


def setns(descriptor):
    import ctypes
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) != 0:
        raise CannotRun("setns is refused: run as root")


def ask(address, path, body=None, timeout=DEADLINE_SECONDS):
    host, port = address
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body is not None else None,
                       {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def prompt(number):
    return f"Story {number}: " + "a river ran past the mill and the town, " * (3 + number % 5)


def request(number):
    return {"model": MODEL, "prompt": prompt(number), "max_tokens": 48, "temperature": 0, "stream": True}


def stream(address, number):
    """(how it ended, text): `right` is judged by the caller."""
    began = time.monotonic()
    try:
        connection = http.client.HTTPConnection(*address, timeout=DEADLINE_SECONDS)
        connection.request("POST", "/v1/completions", json.dumps(request(number)), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            code = json.loads(answer.read())["error"]["code"]
            return ("error", code, time.monotonic() - began)
        text, done = "", False
        for raw in answer:
            line = raw.decode().strip()
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return ("error", event["error"]["code"], time.monotonic() - began)
                text += "".join(choice["text"] for choice in event["choices"])
        return ("done" if done else "cut", text, time.monotonic() - began)
    except (OSError, http.client.HTTPException) as error:
        return ("broken", repr(error), time.monotonic() - began)


class Load:
    """Requests in flight from within the namespace of a gateway's neighbour."""

    def __init__(self, net, expected):
        self.net, self.expected = net, expected
        self.until = time.monotonic() + LOAD_SECONDS
        self.results = {gateway: [] for gateway in GATEWAYS}
        self.lock = threading.Lock()
        self.dead = set()

    def worker(self, index):
        with open(f"/var/run/netns/{self.net.ns(f'h{REGISTRY}')}") as ns:
            setns(ns.fileno())
        number = index
        while time.monotonic() < self.until:
            gateway = GATEWAYS[index % 2] if GATEWAYS[index % 2] not in self.dead else GATEWAYS[0]
            result = stream((f"{NET}{gateway}", 8080), number % len(self.expected))
            with self.lock:
                self.results[gateway].append((number % len(self.expected), *result))
            if result[0] in ("error", "broken"):
                time.sleep(0.2)  # as a client that retries would
            number += IN_FLIGHT

    def run(self):
        threads = [threading.Thread(target=self.worker, args=(index,)) for index in range(IN_FLIGHT)]
        for thread in threads:
            thread.start()
        return threads


def wait(what, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, http.client.HTTPException, ValueError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--model", required=True, help="a GGUF file, for its tokenizer")
    parser.add_argument("--json")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise CannotRun("network namespaces need root")
    for tool in ("ip", "etcd"):
        if not shutil.which(tool):
            raise CannotRun(f"`{tool}` is missing")
    binary = str(pathlib.Path(options.binary).resolve())
    folder = pathlib.Path(tempfile.mkdtemp(prefix="forebay-cluster-"))
    print(f"logs in {folder}")
    failures, figures = [], {}

    def check(what, holds, detail=""):
        print(f"{'ok  ' if holds else 'FAIL'} {what} {detail}")
        if not holds:
            failures.append(what)

    with Net() as net:
        for number in (REGISTRY, *GATEWAYS, *HOSTS):
            net.host(number)
        log = lambda name: open(folder / f"{name}.log", "a")  # noqa: E731
        registry = f"http://{NET}{REGISTRY}:2379"
        etcd = net.run(REGISTRY, ["etcd", "--data-dir", str(folder / "etcd"), "--listen-client-urls", registry,
                                  "--advertise-client-urls", registry, "--listen-peer-urls", "http://127.0.0.1:2380"],
                       log("etcd"))
        url = f"etcd://{NET}{REGISTRY}:2379/chaos"

        def gateway(number):
            return net.run(number, [binary, "serve", "--engine", "none", "--tokenizer", options.model, "--insecure",
                                    "--listen", f"{NET}{number}:8080", "--admin-listen", f"{NET}{number}:8081",
                                    "--cluster-listen", f"{NET}{number}:8082", "--registry", url],
                           log(f"gateway-{number}"), {"FOREBAY_HASH_KEY": KEY})

        def agent(number):
            return net.run(number, [binary, "agent", "--registry", url, "--name", f"e{number}", "--insecure",
                                    "--advertise", f"{NET}{number}", "--state-folder", str(folder / f"s{number}"), "--",
                                    binary, "engine", "sim", "--sim-speed", "4", "--tokenizer", options.model, "--blocks",
                                    "4096", "--port", "8000", "--insecure"], log(f"agent-{number}"))

        gateways = {number: gateway(number) for number in GATEWAYS}
        agents = {number: agent(number) for number in HOSTS}

        def engines(number):
            found = inside(net, REGISTRY, lambda: ask((f"{NET}{number}", 8081), "/fleet/v1/engines"))
            return json.loads(found[1])["data"]

        def ready(number, count):
            return sum(engine["state"] == "ready" for engine in engines(number)) == count

        for number in GATEWAYS:
            wait(f"gateway {number} knows six engines", lambda number=number: ready(number, len(HOSTS)), 90)
        expected = {}
        for number in range(20):
            kind, text, _ = inside(net, REGISTRY, lambda number=number: stream((f"{NET}{GATEWAYS[0]}", 8080), number))
            assert kind == "done", (kind, text)
            expected[number] = text

        def pid_of_engine(number):
            state = json.loads((folder / f"s{number}" / f"e{number}" / "state.json").read_text())
            return find(state, "pid")

        load = Load(net, expected)
        threads = load.run()
        began = time.monotonic()
        at = lambda seconds: time.sleep(max(0.0, began + seconds - time.monotonic()))  # noqa: E731

        at(5)
        first = pid_of_engine(HOSTS[0])
        lives = {engine["engine"]: engine["incarnation"] for engine in engines(GATEWAYS[0])}
        os.killpg(agents[HOSTS[0]].pid, signal.SIGKILL)
        at(7)
        agents[HOSTS[0]] = agent(HOSTS[0])
        at(10)
        os.kill(pid_of_engine(HOSTS[1]), signal.SIGKILL)
        at(12)
        etcd.send_signal(signal.SIGSTOP)
        at(14)
        load.dead.add(GATEWAYS[1])
        os.killpg(gateways[GATEWAYS[1]].pid, signal.SIGKILL)
        at(18)
        net.link(HOSTS[2], False)
        cut = time.monotonic()
        wait("the cut-off host leaves rotation", lambda: not any(
            engine["engine"] == f"e{HOSTS[2]}" and engine["state"] == "ready" for engine in engines(GATEWAYS[0])), 10)
        figures["out_of_rotation_seconds"] = round(time.monotonic() - cut, 2)
        at(38)
        net.link(HOSTS[2], True)
        at(42)
        etcd.send_signal(signal.SIGCONT)
        gateways[GATEWAYS[1]] = gateway(GATEWAYS[1])
        for thread in threads:
            thread.join(DEADLINE_SECONDS + 30)
        check("no client hangs", not any(thread.is_alive() for thread in threads))

        survivor = load.results[GATEWAYS[0]]
        outcomes = {}
        for number, kind, text, seconds in survivor:
            right = kind == "done" and text == expected[number]
            name = "right" if right else f"wrong: {kind}" if kind != "error" else f"error {text}"
            outcomes[name] = outcomes.get(name, 0) + 1
        figures["survivor"] = outcomes
        figures["slowest_seconds"] = round(max(seconds for *_, seconds in survivor), 1)
        wrong = [row for row in survivor if not (row[1] == "done" and row[2] == expected[row[0]])
                 and not (row[1] == "error" and row[2] in RETRYABLE)]
        check("each request of the surviving gateway ends right or retryable", not wrong, json.dumps(outcomes))
        for row in wrong[:3]:
            print("     ", row[1], repr(row[2])[:200])
        check("nothing outlives its deadline", figures["slowest_seconds"] < DEADLINE_SECONDS, f"{figures['slowest_seconds']} s")
        check("the killed agent's engine served on and was adopted", pid_of_engine(HOSTS[0]) == first and any(
            engine["engine"] == f"e{HOSTS[0]}" and engine["incarnation"] == lives[f"e{HOSTS[0]}"]
            for engine in engines(GATEWAYS[0])))
        for number in GATEWAYS:
            wait(f"gateway {number} knows six engines again", lambda number=number: ready(number, len(HOSTS)), 90)
        check("both gateways know all engines again", True)

        def idle(number):
            rows = engines(number)
            text = inside(net, REGISTRY, lambda: ask((f"{NET}{number}", 8081), "/metrics"))[1].decode()
            in_flight = [line for line in text.splitlines() if line.startswith("forebay_requests_in_flight ")]
            return in_flight[0].endswith(" 0") and all(
                rank["reserved_sequences"] == 0 and rank["load"]["running"] == 0 for row in rows for rank in row["ranks"])

        try:
            for number in GATEWAYS:
                wait(f"nothing is held by gateway {number}", lambda number=number: idle(number), 30)
            check("counters return to zero", True)
        except AssertionError as error:
            check("counters return to zero", False, str(error))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps({"failures": failures, **figures}, indent=1))
    print(json.dumps(figures))
    return 1 if failures else 0


def find(value, name):
    """The first field of that name, wherever it is."""
    if isinstance(value, dict):
        if name in value:
            return value[name]
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            found = find(inner, name)
            if found is not None:
                return found
    return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotRun as missing:
        print(f"skipped: {missing}", file=sys.stderr)
        sys.exit(2)
