#!/usr/bin/env python3
"""Shows Forebay at work on one machine: four engines, a short question, a long one under load, routing compared.

Uses the standard library only. `make demo` builds the binary, fetches the model and calls this.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ENGINES = 4
SHORT_QUESTION = "What is the capital of France? Answer in one sentence."
CHRONICLE = (
    "The forebay of the valley works was dug in the spring of 1893. It lies above the turbine hall, a basin of forty "
    "metres by ninety, lined with stone from the old quarry, and it takes whatever the river brings. In dry summers "
    "the keeper closes the upper gate at noon and lets the level rise until the evening, when the mills, the tramway "
    "and the street lamps all ask for power at once. In the thaw of March the river brings ice, branches and once, in "
    "1921, half a bridge; a rack of iron bars before the intake holds them back, and two men with long rakes clear it "
    "by hand. The first four turbines were built in Winterthur and carried up the valley on ox carts. Each had its own "
    "gate, its own governor and its own bell. When the load on one of them grew too great its bell rang, and the "
    "keeper opened the gate of its neighbour. In 1934 the town replaced the bells with a board of lamps, and in 1958 "
    "the lamps with a row of dials. A fifth turbine came in 1961. Nobody has found a better rule than that of the first "
    "keeper, who wrote in his book: keep the level, give each wheel what it can use, and write down why. "
)
GUIDE = (
    "The path around the basin is two hundred and sixty metres long and may be walked from April to October. It begins "
    "at the upper gate, whose oak leaves still carry the marks of the ice of 1929, and passes the keeper's house, a "
    "single room with a stove, a bed and a window towards the gauge. The gauge is a staff of enamel in the wall of the "
    "intake, with a red line at two metres ten; above it the spillway runs and the brook below the hall becomes a river "
    "for an hour. Behind the house stands the bell frame with its four bells, of which the third is cracked. The hall "
    "below has seven windows to the south and a crane that was turned by hand until 1947. Wheels one to four run in the "
    "morning, the fifth in the evening, and on the last Sunday of September all of them together, with the doors open "
    "and a band. Visitors are asked to keep children from the rack, not to feed the trout, and to read the keeper's book, "
    "a copy of which lies on a chain beside the door. "
)


def system(edition):
    """One document in editions that share no prefix, so that no engine has an edition in its cache before it is used."""
    return (f"Edition {edition}. You are the clerk of a small museum of water power. Answer briefly and only from the "
            f"chronicle and the guide that follow. {CHRONICLE}{GUIDE}")


class Screen:
    """What a person sees: headings, streams and progress, plain where there is no terminal."""

    def __init__(self):
        self.tty = sys.stdout.isatty()
        self.colour = self.tty and "NO_COLOR" not in os.environ
        self.width = min(shutil.get_terminal_size((100, 24)).columns, 110)

    def paint(self, code, text):
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def heading(self, text):
        print(f"\n{self.paint('1;36', '── ' + text + ' ' + '─' * max(0, self.width - len(text) - 4))}", flush=True)

    def say(self, text=""):
        print(text, flush=True)

    def dim(self, text):
        print(self.paint("2", text), flush=True)

    def piece(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, label, total):
        """Yields a function that is told how much is done; draws a bar on a terminal, one line elsewhere."""
        began, lock, done = time.monotonic(), threading.Lock(), [0]

        def step(amount=1):
            with lock:
                done[0] += amount
                if self.tty:
                    share = min(1.0, done[0] / total)
                    bar = "█" * int(share * 30) + "░" * (30 - int(share * 30))
                    self.piece(f"\r  {label:<28} {bar} {done[0]}/{total}  {time.monotonic() - began:4.1f} s ")

        yield step
        if self.tty:
            self.piece("\n")
        else:
            self.say(f"  {label}: {done[0]}/{total} in {time.monotonic() - began:.1f} s")


SCREEN = Screen()


class Server:
    """`forebay serve` as a child, ended by its own id."""

    def __init__(self, binary, port, admin_port):
        self.binary, self.port, self.admin_port = binary, port, admin_port
        self.log = tempfile.NamedTemporaryFile("w+", prefix="forebay-", suffix=".log", delete=False)
        command = [binary, "serve", "--engine", f"embedded:{ENGINES}", "--listen", f"127.0.0.1:{port}",
                   "--admin-listen", f"127.0.0.1:{admin_port}",
                   # An answer's own seconds in full: a few sequences on two cores are all there is to weigh.
                   "--transfer-weight", "0.3", "--decode-weight", "1", "--harm-weight", "0.05"]
        SCREEN.dim("  $ " + " ".join(["forebay"] + command[1:]))
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def wait_ready(self, seconds=120):
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(f"forebay serve ended with {self.process.returncode}:\n{self.log.read()}")
            try:
                status, _ = get(self.port, "/ready")
                if status == 200:
                    SCREEN.say(f"  ready after {time.monotonic() - began:.1f} s with {ENGINES} engines "
                               f"(log: {self.log.name})")
                    return
            except OSError:
                pass
            if SCREEN.tty:
                SCREEN.piece(f"\r  starting … {time.monotonic() - began:.1f} s\r")
            time.sleep(0.05)
        raise SystemExit(f"forebay serve was not ready within {seconds} s; its log is {self.log.name}")

    def run(self, *arguments):
        """Runs a forebay command against this server and prints what it prints."""
        SCREEN.dim("  $ forebay " + " ".join(arguments))
        command = [self.binary, *arguments, "--admin-url", f"http://127.0.0.1:{self.admin_port}"]
        subprocess.run(command, check=True)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


def get(port, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def put_policy(port, policy):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        body = json.dumps({"policy": policy})
        connection.request("PUT", "/fleet/v1/policy", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise SystemExit(f"the policy could not be set to {policy}: {answer.status} {text!r}")
    finally:
        connection.close()


class Answer:
    """One streamed answer: text, request id, usage and times."""

    def __init__(self):
        self.text, self.id, self.ttft, self.seconds, self.usage = "", "", None, 0.0, {}

    @property
    def cached(self):
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def ask(port, messages, tokens, show=None, stop=None, seed=1, request_id=None, ignore_eos=False):
    """Asks and streams; `show` gets each piece of text, a set `stop` event gives up."""
    body = {"messages": messages, "max_tokens": tokens, "stream": True, "temperature": 0.6, "seed": seed,
            "stream_options": {"include_usage": True}, "ignore_eos": ignore_eos,
            "model": MODEL}
    headers = {"content-type": "application/json"}
    if request_id:
        headers["x-request-id"] = request_id
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    answer, began = Answer(), time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        answer.id = response.headers.get("x-request-id", "")
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if stop is not None and stop.is_set():
                break
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            answer.usage = event.get("usage") or answer.usage
            for choice in event.get("choices", []):
                piece = choice.get("delta", {}).get("content")
                if piece:
                    if answer.ttft is None:
                        answer.ttft = time.monotonic() - began
                    answer.text += piece
                    if show:
                        show(piece)
        answer.seconds = time.monotonic() - began
        return answer
    finally:
        connection.close()


def show_answer(port, question, tokens, document=None, request_id=None):
    messages = ([{"role": "system", "content": document}] if document else []) + [{"role": "user", "content": question}]
    SCREEN.say(SCREEN.paint("1", "  you     ") + question)
    SCREEN.piece(SCREEN.paint("1", "  forebay "))
    answer = ask(port, messages, tokens, show=SCREEN.piece, request_id=request_id)
    SCREEN.say()
    SCREEN.dim(f"          {answer.usage.get('prompt_tokens')} tokens in ({answer.cached} from cache), "
               f"{answer.usage.get('completion_tokens')} out, first after {answer.ttft or 0:.2f} s, "
               f"all after {answer.seconds:.2f} s, request {answer.id}")
    return answer


class Load:
    """The background load of the second act: one engine is fed prompts all the time, another decodes.

    A reader asks one question after the other about one document, so the engine that has it in its cache keeps being fed
    their prefills; a writer has long answers generated from short prompts.
    """

    def __init__(self, port, document):
        self.port, self.document, self.stop, self.failures = port, document, threading.Event(), []
        self.turn = iter(range(1, 1_000_000))
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.read, self.write)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)

    def guard(self, work):
        try:
            work()
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if not self.stop.is_set():
                self.failures.append(str(error))
                self.stop.wait(0.2)

    def read(self):
        while not self.stop.is_set():
            note = f"Visitor {next(self.turn)} asks: " + "which year, which gate, which wheel? " * 12
            messages = [{"role": "system", "content": self.document}, {"role": "user", "content": note}]
            self.guard(lambda messages=messages: ask(self.port, messages, 1, stop=self.stop))

    def write(self):
        while not self.stop.is_set():
            messages = [{"role": "user", "content": f"Write a long story about river number {next(self.turn)}."}]
            self.guard(lambda messages=messages: ask(self.port, messages, 400, stop=self.stop, ignore_eos=True))


def wait_for_load(server, seconds=60):
    """Until one engine has been busy with prefills and another decodes, as `forebay status` shows it."""
    began = time.monotonic()
    with SCREEN.progress("background load settles", 10) as step:
        shown = 0
        while time.monotonic() - began < seconds and shown < 10:
            engines = json.loads(get(server.admin_port, "/fleet/v1/engines")[1])["data"]
            fed = any(engine["prefill_share"] > 0.3 for engine in engines)
            decoding = any(engine["load"]["decoding"] > 0 for engine in engines)
            wanted = min(10, int((time.monotonic() - began) / 0.5)) if not (fed and decoding) else shown + 2
            while shown < min(10, wanted):
                step()
                shown += 1
            time.sleep(0.25)


def split_under_load(server):
    """Asks long questions until one was split: the load is real, so at a given moment one engine may be cheaper."""
    questions = [
        "Tell the history of the forebay in four sentences: who dug it, what the river brings, and what rule was found.",
        "Describe how the keeper divides the water between the wheels, and how the signals changed over the years.",
        "Explain what happens in the thaw of March, and what the two men with the rakes do about it.",
        "Write a short guide for visitors of the basin, with its size, its age and its turbines.",
    ]
    for edition, question in enumerate(questions, 1):
        document = system(edition)
        with Load(server.port, document) as load:
            wait_for_load(server)
            if edition == 1:
                server.run("status")
            answer = show_answer(server.port, question, 96, document)
        if load.failures:
            SCREEN.dim(f"          the background load saw {len(load.failures)} failures, first: {load.failures[0]}")
        record = json.loads(get(server.admin_port, f"/fleet/v1/decisions/{answer.id}")[1])
        if any(transfer["outcome"] == "done" for transfer in record["transfers"]):
            return answer, True
        if edition < len(questions):
            SCREEN.dim("          at that moment one engine was the cheapest; asking again, about a new document")
    return answer, False


def conversations(port, label, seed, count=4, turns=4, at_once=2):
    """A small multi-turn load. Returns the answers of turns two and later."""
    answers, lock, waiting = [], threading.Lock(), list(range(count))

    def converse(step):
        while True:
            with lock:
                if not waiting:
                    return
                number = waiting.pop()
            document = f"You are guide number {seed}-{number}. {CHRONICLE}"
            messages = [{"role": "system", "content": document}]
            for turn in range(turns):
                messages.append({"role": "user", "content": f"Question {turn}: what should visitor {number} see next?"})
                answer = ask(port, messages, 12, seed=number)
                messages.append({"role": "assistant", "content": answer.text})
                step()
                if turn > 0:
                    with lock:
                        answers.append(answer)

    with SCREEN.progress(label, count * turns) as step:
        threads = [threading.Thread(target=converse, args=(step,)) for _ in range(at_once)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return answers


def compare(server):
    rows = []
    for seed, policy in enumerate(("round-robin", "cost")):
        put_policy(server.admin_port, policy)
        answers = conversations(server.port, policy, seed=seed + 1)
        ttft = sorted(answer.ttft or answer.seconds for answer in answers)
        tokens = sum(answer.usage["prompt_tokens"] for answer in answers)
        cached = sum(answer.cached for answer in answers)
        rows.append((policy, statistics.median(ttft), ttft[int(len(ttft) * 0.9)], cached / tokens))
    put_policy(server.admin_port, "cost")
    SCREEN.say()
    SCREEN.say(f"  {'policy':<14}{'TTFT P50':>12}{'TTFT P90':>12}{'cached share':>15}    (turns two to four)")
    for policy, p50, p90, share in rows:
        SCREEN.say(f"  {policy:<14}{p50 * 1000:>9.0f} ms{p90 * 1000:>9.0f} ms{share:>14.0%}")


def keep_serving(server):
    SCREEN.heading("Serving; Ctrl-C ends it")
    url = f"http://127.0.0.1:{server.port}"
    SCREEN.say(f"""  {SCREEN.paint('1', url)} speaks the OpenAI API. Try, in another terminal:

    curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
      -d '{{"model":"{MODEL}","messages":[{{"role":"user","content":"Name three rivers."}}],"max_tokens":40,"stream":true}}'

    {server.binary} chat --url {url}
    {server.binary} status --watch --admin-url http://127.0.0.1:{server.admin_port}
    {server.binary} explain --last --admin-url http://127.0.0.1:{server.admin_port}
    curl http://127.0.0.1:{server.admin_port}/metrics
""")
    try:
        server.process.wait()
    except KeyboardInterrupt:
        SCREEN.say("\n  stopping")


def main():
    global MODEL
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--admin-port", type=int, default=8081)
    parser.add_argument("--once", action="store_true", help="stop after the explanations")
    arguments = parser.parse_args()

    SCREEN.heading("One command, four engines")
    server = Server(arguments.binary, arguments.port, arguments.admin_port)
    code = 0
    try:
        server.wait_ready()
        MODEL = json.loads(get(server.port, "/v1/models")[1])["data"][0]["id"]

        SCREEN.heading("A short question to an idle fleet: one engine does both phases")
        short = show_answer(server.port, SHORT_QUESTION, 40)
        server.run("explain", short.id)

        SCREEN.heading("A long question under load: prefill on one engine, decode on another")
        answer, split = split_under_load(server)
        server.run("explain", answer.id)
        if not split:
            SCREEN.say("  No question was split this time: on this machine one engine was the cheapest throughout.")
            code = 3
        if not arguments.once:
            SCREEN.heading("The same small multi-turn load under two policies")
            compare(server)
            keep_serving(server)
    except KeyboardInterrupt:
        SCREEN.say("\n  stopping")
    finally:
        ended = server.stop()
    if ended not in (0, None):
        SCREEN.say(f"  forebay serve ended with {ended}; its log is {server.log.name}")
        return 1
    return code


MODEL = ""

if __name__ == "__main__":
    sys.exit(main())
