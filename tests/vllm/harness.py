"""What the checks of run.py share: requests, answers as a client sees them, and `forebay serve` as a child.

In: a `forebay` binary and running vLLM servers (scripts/vllm/engines.py). Start at `Forebay` and `Stream`; what a check
found instead of what must hold is a `Failed`.
"""
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "scripts" / "vllm"))
import engines  # noqa: E402
from engines import LOOPBACK, Metrics, request  # noqa: E402

# A machine of two cores that also compiles is slow; a state that does not come within this does not come.
STATE_SECONDS_MAX = 120
# No answer may take longer: what hangs fails.
ANSWER_SECONDS_MAX = 300
START_SECONDS_MAX = 300
# For how long a prefill server holds blocks for a decode leg that never comes: vLLM's default. A first hand-over on a busy
# machine takes more than a few seconds.
LEASE_SECONDS = 30
BLOCK_SIZE = 32
# A request shows in vLLM's metrics at the end of a step; a prefill in one step would never be seen running.
SMALL_STEPS = ["--max-num-batched-tokens", "256"]
MODEL = "smol"
FACTS = ("Paris is the capital of France, Berlin is the capital of Germany, Madrid is the capital of Spain, "
         "Rome is the capital of Italy, and Lisbon is the capital of Portugal. ")
# Here vLLM's HTTP server shares two cores with its arithmetic and answers a look at its load seconds late at times. A
# death is noticed by its broken connections all the same.
PATIENCE = ["--silence-seconds-max", "20s", "--lease-seconds", "60s"]
# Error codes of Forebay after which a client may send the request again.
RETRYABLE = {"engine_lost", "engine_lost_mid_stream", "no_engine", "engines_saturated", "too_many_requests"}


class Failed(Exception):
    """What a check found instead of what must hold."""


def must(condition, otherwise):
    if not condition:
        raise Failed(otherwise() if callable(otherwise) else otherwise)


def wait(what, condition, seconds=STATE_SECONDS_MAX):
    """Waits for a state; `condition` returns it, or something false. A server that is away counts as not yet."""
    deadline = time.monotonic() + seconds
    last = None
    while time.monotonic() < deadline:
        try:
            last = condition()
            if last:
                return last
        except OSError as error:
            last = error
        time.sleep(0.1)
    raise Failed(f"{what}: not within {seconds} s (last seen: {last})")


# Requests and answers ----------------------------------------------------------------------------------------------

def prompt(tag, facts=8):
    """About 37 tokens a fact. The tag comes first, so that no two prompts share a block."""
    return f"Note {tag}. {FACTS * facts}The capital of Italy is"


def completion(tag, max_tokens=24, facts=8, **more):
    return {"model": MODEL, "prompt": prompt(tag, facts), "temperature": 0, "max_tokens": max_tokens} | more


def chat(tag, max_tokens=24, facts=8, **more):
    question = f"Note {tag}. {FACTS * facts}In one short sentence: what is the capital of Italy?"
    return {"model": MODEL, "messages": [{"role": "user", "content": question}], "temperature": 0,
            "max_tokens": max_tokens} | more


def path_of(body):
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


@dataclasses.dataclass
class Answer:
    """One answer, streamed or whole, as a client sees it."""
    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    usage: dict | None = None
    error: dict | None = None
    done: int = 0
    after_end: int = 0
    cut: bool = False
    request_id: str = ""

    def same_as(self, other):
        return (self.text, self.finish_reason, (self.usage or {}).get("completion_tokens")) == (
            other.text, other.finish_reason, (other.usage or {}).get("completion_tokens"))

    def told(self):
        return (f"status {self.status}, {len(self.text)} characters ending in {self.text[-40:]!r}, finish "
                f"{self.finish_reason}, usage {self.usage}, error {self.error}, cut {self.cut}")


class Stream:
    """A streamed answer that is read line by line, so that a test can act in its middle."""

    def __init__(self, port, body, headers=None):
        self.connection = http.client.HTTPConnection(LOOPBACK, port, timeout=ANSWER_SECONDS_MAX)
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        self.connection.request("POST", path_of(body), json.dumps(body), {"content-type": "application/json", **(headers or {})})
        self.response = self.connection.getresponse()
        self.answer = Answer(status=self.response.status, request_id=self.response.headers.get("x-request-id") or "")
        self.chunks = 0
        if self.response.status != 200:
            self.answer.error = error_of(self.response.read().decode("utf-8", errors="replace"))

    def read(self, chunks=None):
        """Reads on until so many chunks with text came in all, or to the end; returns the answer so far."""
        try:
            while chunks is None or self.chunks < chunks:
                line = self.response.readline()
                if not line:
                    break
                self._take(line.decode("utf-8").rstrip("\r\n"))
        except (http.client.HTTPException, OSError):
            self.answer.cut = True
        return self.answer

    def _take(self, line):
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if self.answer.done or self.answer.error:
            self.answer.after_end += data != "[DONE]" or bool(self.answer.done)
        if data == "[DONE]":
            self.answer.done += 1
            return
        value = json.loads(data)
        if "error" in value:
            self.answer.error = value["error"]
            return
        self.answer.usage = value.get("usage") or self.answer.usage
        for choice in value["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self.answer.text += text
            self.chunks += bool(text)
            self.answer.finish_reason = choice.get("finish_reason") or self.answer.finish_reason

    def close(self):
        """Leaves, whatever was read."""
        with contextlib.suppress(OSError):
            self.response.close()
        self.connection.close()


def error_of(text):
    try:
        value = json.loads(text)
        return value.get("error") or {"message": text}
    except ValueError:
        return {"message": text}


def whole(url, body, headers=None):
    """An answer that is not streamed."""
    status, value = request("POST", url + path_of(body), body, headers, ANSWER_SECONDS_MAX)
    if status != 200:
        error = value.get("error") if isinstance(value, dict) else {"message": value}
        return Answer(status=status, error=error)
    choice = value["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Answer(status, text, choice["finish_reason"], value["usage"], done=1)


def streamed(port, body, headers=None):
    stream = Stream(port, body, headers)
    try:
        return stream.read()
    finally:
        stream.close()


def ends_once(answer):
    must(answer.after_end == 0 and answer.done <= 1, lambda: f"the stream goes on after its end: {answer.told()}")
    must(answer.done == 1 or answer.error, lambda: f"the stream ends without saying so: {answer.told()}")


def right_or_retryable(answer, reference, what):
    """Says which of the two it was: the whole right answer, or its beginning and a clear retryable error."""
    ends_once(answer)
    if answer.error is None:
        must(answer.same_as(reference), lambda: f"{what}: wrong answer: {answer.told()}; right: {reference.told()}")
        return "answered right"
    must(reference.text.startswith(answer.text),
         lambda: f"{what}: wrong text before the error: {answer.told()}; right: {reference.told()}")
    must(answer.error.get("code") in RETRYABLE, lambda: f"{what}: not a retryable error: {answer.error}")
    must(answer.error.get("message"), f"{what}: an error without a message")
    return f"error {answer.error['code']} after {len(answer.text)} characters"


# Forebay -----------------------------------------------------------------------------------------------------------

class Forebay:
    """`forebay serve` as a child, on free ports, ended by its own id."""

    def __init__(self, binary, specs, logs, name, extra=()):
        command = [binary, "serve", *[word for spec in specs for word in ("--engine", spec)],
                   "--listen", f"{LOOPBACK}:0", "--admin-listen", f"{LOOPBACK}:0", *PATIENCE, *extra]
        self.log_path = pathlib.Path(logs) / f"{name}.log"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("FOREBAY_")}
        with open(self.log_path, "wb") as log:
            log.write(f"$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                            env=kept | {"NO_COLOR": "1"}, preexec_fn=engines.end_with_parent)
        self.port = self.admin_port = None

    @property
    def url(self):
        return f"http://{LOOPBACK}:{self.port}"

    def log(self):
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def wait_serving(self):
        """Reads its addresses from its log."""
        def addresses():
            must(self.process.poll() is None, lambda: f"forebay ended with {self.process.poll()}\n{self.log()[-2000:]}")
            public, admin = re.search(r"public=\S+?:(\d+)", self.log()), re.search(r"admin=\S+?:(\d+)", self.log())
            return public and admin and (int(public[1]), int(admin[1]))
        self.port, self.admin_port = wait("forebay says where it serves", addresses, START_SECONDS_MAX)
        return self

    def wait_ready(self, count):
        """Waits until `count` engines are ready."""
        wait(f"{count} engines ready", lambda: sum(engine["state"] == "ready" for engine in self.engines()) == count)
        return self

    def admin(self, path):
        status, value = request("GET", f"http://{LOOPBACK}:{self.admin_port}{path}", seconds=10)
        must(status == 200, lambda: f"{path} answers {status}: {value}")
        return value

    def engines(self):
        return self.admin("/fleet/v1/engines")["data"]

    def engine(self, vllm):
        """The row of one vLLM server."""
        rows = self.engines()
        named = [row for row in rows if row["engine"] == vllm.name]
        must(len(named) == 1, lambda: f"engines named {vllm.name}: {len(named)} of {[row['engine'] for row in rows]}")
        return named[0]

    def decision(self, request_id):
        return self.admin(f"/fleet/v1/decisions/{request_id}")

    def metrics(self):
        return Metrics(self.admin("/metrics"))

    def wait_idle(self):
        """Its own counters are back at zero."""
        def idle():
            rows = self.engines()
            return all(row["load"]["running"] == 0 and row["load"]["waiting"] == 0 and
                       all(rank["reserved_sequences"] == 0 for rank in row.get("ranks", [])) for row in rows)
        wait("forebay's counters return to zero", idle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
