"""Real vLLM servers on this machine's CPU, for tests.

In: the virtual environment that install.sh made and a model folder (`model_folder` makes one). Out: running servers
with addresses, logs and metrics. Start at `Vllm`; it is a context manager:

    with Vllm("prefill", model_folder(layers=4), logs, role="kv_producer") as engine:
        engine.wait_ready()
        status, answer = engine.post("/v1/completions", {"model": engine.model_name, "prompt": "Hello"})

Always: ports are free when chosen and kept over a restart; a server is a process group of its own, and only groups
that were started here are signalled; servers end with the process that started them. Standard library only, so any
Python 3.11 or newer can import it.
"""
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"
# vLLM takes 20 to 60 s to start on an idle machine of two cores, three times that on a busy one.
START_SECONDS_MAX = 600
# A server whose client is still there does not end by itself.
STOP_SECONDS_MAX = 20
REQUEST_SECONDS_MAX = 300
# Below Linux's ephemeral range, so that no outgoing connection takes a port between its choice and its use.
PORTS = range(20_000, 32_000)
ROLES = (None, "kv_producer", "kv_consumer", "kv_both")


def cache_folder():
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "forebay"


def virtual_environment():
    """Where install.sh puts vLLM."""
    return pathlib.Path(os.environ.get("FOREBAY_VLLM_VENV") or cache_folder() / "vllm-0.32")


def model_folder(layers=None):
    """SmolLM2-135M-Instruct in float32 as vLLM loads it, converted once; with `layers`, only so many of its 30."""
    gguf = subprocess.run([HERE.parent / "fetch-model.sh"], check=True, stdout=subprocess.PIPE, text=True)
    source = pathlib.Path(gguf.stdout.splitlines()[-1])
    converter = HERE / "gguf_llama_to_hf.py"
    name = f"SmolLM2-135M-Instruct-f32{'' if layers is None else f'-{layers}-layers'}"
    folder = source.parent / name
    # A folder made by another converter is made anew.
    recipe = hashlib.sha256(converter.read_bytes()).hexdigest()[:16]
    stamp = folder / "converted-by"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != recipe:
        command = [virtual_environment() / "bin" / "python", converter, source, folder]
        subprocess.run([*command, *([] if layers is None else ["--layers", str(layers)])], check=True)
        stamp.write_text(recipe, encoding="utf-8")
    return folder


_ports_taken = set()


def free_ports(count=1):
    """The first of `count` consecutive free TCP ports; never the same ones twice in one process."""
    for _ in range(1000):
        first = random.SystemRandom().randrange(PORTS.start, PORTS.stop - count)
        ports = set(range(first, first + count))
        if ports & _ports_taken:
            continue
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in ports:
                stack.enter_context(socket.socket()).bind((LOOPBACK, port))
            _ports_taken.update(ports)
            return first
    raise RuntimeError(f"no {count} consecutive free ports in {PORTS}")


class EngineError(Exception):
    """A server that did not do what a test needs; the text has its last log lines."""


class Vllm:
    """One vLLM server: start, wait, ask, stop, kill, restart.

    `role` is the kv_role of a NIXL connector, None for a server without one. `core` is the core that its arithmetic is
    bound to: two servers side by side want two. `blocks` is the size of the KV pool in blocks. `ranks` above 1 makes
    a server of that many data-parallel ranks. `connector` adds to the transfer configuration or replaces its keys,
    `extra` adds flags, `environment` variables.
    """

    def __init__(self, name, model, logs, *, role=None, block_size=32, blocks=128, max_model_len=2048, core=0, ranks=1,
                 kv_events=True, model_name="smol", connector=None, environment=None, extra=()):
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {ROLES}")
        self.name, self.model, self.role, self.model_name = name, pathlib.Path(model), role, model_name
        self.block_size, self.blocks, self.max_model_len = block_size, blocks, max_model_len
        self.core, self.ranks, self.extra = core % (os.cpu_count() or 1), ranks, list(extra)
        self.connector, self.environment = connector or {}, environment or {}
        self.port = free_ports()
        self.side_channel_port = free_ports(ranks) if role else None
        # Rank r publishes at port + r.
        self.events_port = free_ports(ranks) if kv_events else None
        self.replay_port = free_ports(ranks) if kv_events else None
        self.log_path = pathlib.Path(logs) / f"{name}.log"
        self.process = None
        self.starts = 0

    @property
    def url(self):
        return f"http://{LOOPBACK}:{self.port}"

    def command(self):
        """The command line, as an operator would type it."""
        flags = {
            "--host": LOOPBACK,
            "--port": self.port,
            "--served-model-name": self.model_name,
            "--dtype": "float32",
            "--max-model-len": self.max_model_len,
            "--block-size": self.block_size,
            "--num-gpu-blocks-override": self.blocks,
        }
        if self.ranks > 1:
            flags["--data-parallel-size"] = self.ranks
        if self.events_port:
            flags["--kv-events-config"] = json.dumps({
                "enable_kv_cache_events": True,
                "publisher": "zmq",
                "endpoint": f"tcp://*:{self.events_port}",
                "replay_endpoint": f"tcp://*:{self.replay_port}",
                "topic": "kv-events",
            })
        if self.role:
            transfer = {"kv_connector": "NixlConnector", "kv_role": self.role, "kv_load_failure_policy": "fail"}
            flags["--kv-transfer-config"] = json.dumps(transfer | self.connector)
        words = [str(word) for flag in flags.items() for word in flag]
        return [str(virtual_environment() / "bin" / "vllm"), "serve", str(self.model), *words,
                "--enforce-eager", "--enable-prompt-tokens-details", *self.extra]

    def variables(self):
        """The environment, less what would change what vLLM does."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "UCX_", "NIXL_"))}
        return kept | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": LOOPBACK,
            # `auto` would bind every server to the first core.
            "VLLM_CPU_OMP_THREADS_BIND": str(self.core) if self.ranks == 1 else
                "|".join(str((self.core + rank) % (os.cpu_count() or 1)) for rank in range(self.ranks)),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_channel_port or 0),
            "UCX_TLS": "tcp,shm,self",
        } | self.environment

    def start(self):
        """Starts the server; `wait_ready` waits for it."""
        if self.running():
            raise EngineError(f"{self.name} runs already")
        self.starts += 1
        with open(self.log_path, "ab") as log:
            log.write(f"==== start {self.starts}\n".encode())
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.variables(),
                cwd=self.log_path.parent, start_new_session=True, preexec_fn=end_with_parent)
        return self

    def wait_ready(self, seconds=START_SECONDS_MAX):
        """Waits until /health answers 200; an error if the process ends or the time is over first."""
        deadline = time.monotonic() + seconds
        while True:
            if not self.running():
                raise EngineError(f"{self.name} ended with {self.process.returncode} while starting\n{self.tail()}")
            if self.healthy():
                return self
            if time.monotonic() > deadline:
                raise EngineError(f"{self.name} is not ready after {seconds} s\n{self.tail()}")
            time.sleep(0.25)

    def running(self):
        return self.process is not None and self.process.poll() is None

    def healthy(self):
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def children(self):
        """Names of the server's other processes by their ids: its EngineCore and workers."""
        found = {}
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                text = stat.read_text(encoding="utf-8", errors="replace")
                command, fields = text[text.index("(") + 1:text.rindex(")")], text[text.rindex(")") + 2:].split()
                pid, group = int(stat.parent.name), int(fields[2])
                if group == self.process.pid and pid != self.process.pid:
                    found[pid] = command
        return found

    def kill(self):
        """SIGKILL to every process of the server, as when a host dies."""
        self._signal_group(signal.SIGKILL)
        self.process.wait()

    def kill_core(self):
        """SIGKILL to the EngineCore alone: the HTTP server sees its engine die. Returns the id of what was killed."""
        for pid, command in self.children().items():
            if command.startswith("VLLM::EngineCor"):  # the kernel keeps 15 characters
                os.kill(pid, signal.SIGKILL)
                return pid
        raise EngineError(f"{self.name} has no EngineCore: {self.children()}")

    def pause(self):
        """SIGSTOP to every process of the server; `resume` undoes it."""
        self._signal_group(signal.SIGSTOP)

    def resume(self):
        self._signal_group(signal.SIGCONT)

    def stop(self):
        """SIGTERM, then SIGKILL for whatever is left of the group."""
        if self.process is None:
            return
        self._signal_group(signal.SIGCONT)
        self._signal_group(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS_MAX)
        self._signal_group(signal.SIGKILL)
        self.process.wait()

    def restart(self):
        """A new life at the same addresses, after `kill` or `stop`."""
        return self.start().wait_ready()

    def _signal_group(self, number):
        # The group's id is the first process's, which stays taken while the group has members.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def tail(self, lines=30):
        """The last lines of its log."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def get(self, path, headers=None, seconds=REQUEST_SECONDS_MAX):
        return request("GET", self.url + path, None, headers, seconds)

    def post(self, path, body, headers=None, seconds=REQUEST_SECONDS_MAX):
        return request("POST", self.url + path, body, headers, seconds)

    def metrics(self):
        return Metrics(self.get("/metrics")[1])


def end_with_parent():
    """In a new child: SIGTERM when the process that started it is gone, however it went."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def request(method, url, body=None, headers=None, seconds=REQUEST_SECONDS_MAX):
    """Status and answer: a JSON value where the server says so, else text. Errors of HTTP are answers too."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"content-type": "application/json", **(headers or {})}, method=method)
    try:
        answer = urllib.request.urlopen(asked, timeout=seconds)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read().decode("utf-8", errors="replace")
        is_json = "json" in (answer.headers.get("content-type") or "")
        return answer.status, json.loads(text) if is_json else text


SAMPLE = re.compile(r'^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)')
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One reading of a Prometheus text page."""

    def __init__(self, text):
        self.samples = []
        for line in text.splitlines():
            match = None if line.startswith("#") else SAMPLE.match(line)
            if match:
                name, labels, value = match.groups()
                self.samples.append((name, dict(LABEL.findall(labels or "")), float(value)))

    def sum(self, name, **labels):
        """Sum of the samples of that name and those labels; 0 if there are none."""
        return sum(value for found, its, value in self.samples if found == name and labels.items() <= its.items())

    def labels(self, name):
        """The labels of the first sample of that name."""
        return next((its for found, its, _ in self.samples if found == name), {})
