#!/usr/bin/env python3
"""Forebay in front of real vLLM servers, from end to end.

In: a `forebay` binary and the virtual environment of scripts/vllm/install.sh. Out: a line for each check, exit code 0
if all passed, 1 if one failed, 2 if the suite could not run; with --json a summary as well. `make test-vllm` calls it.

Each check is a function of this file with one sentence of what must hold; it raises `Failed` where that does not. The
checks of a stage share servers, which take a minute to start, and run in the order in which they stand here. What is
right is always said by vLLM itself: answers are compared with those of a server that was asked directly, and KV that
moved is read from the decode server's own counters.

    run.py --binary target/release/forebay                all stages: about ten minutes on two cores
    run.py --binary target/release/forebay --stage split  one of them
"""
import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from harness import (  # engines is found by harness
    ANSWER_SECONDS_MAX, BLOCK_SIZE, LEASE_SECONDS, MODEL, RETRYABLE, SMALL_STEPS, STATE_SECONDS_MAX, Failed, Forebay, Stream,
    chat, completion, ends_once, must, path_of, right_or_retryable, streamed, wait, whole)
import engines
from engines import LOOPBACK, Vllm, request

# Checks on one aggregated engine -------------------------------------------------------------------------------------

def same_tokens_as_direct(at):
    """Answers are those of vLLM asked directly: completions and chat, whole and streamed."""
    for tag, body in [("a1", completion("a1")), ("a2", chat("a2")), ("a3", chat("a3", 80)), ("a4", completion("a4", facts=0))]:
        direct = whole(at.engine.url, body)
        must(direct.status == 200, lambda: f"vLLM itself refused: {direct.told()}")
        for kind, answer in [("whole", whole(at.forebay.url, body)), ("streamed", streamed(at.forebay.port, body))]:
            must(answer.status == 200 and answer.error is None, lambda: f"{tag}, {kind}: {answer.told()}")
            must(answer.same_as(direct), lambda: f"{tag}, {kind}: {answer.told()}; directly: {direct.told()}")
    return "4 requests, whole and streamed"


def discovered(at):
    """Model, context length, block count and a source of KV events were found, not configured."""
    row = at.forebay.engine(at.engine)
    must(row["kind"] == "vllm", lambda: f"kind {row['kind']}")
    must(row["model"] == MODEL, lambda: f"model {row['model']}")
    must(row["load"]["blocks_total"] in (at.engine.blocks, at.engine.blocks - 1),
         lambda: f"{row['load']['blocks_total']} blocks, vLLM has {at.engine.blocks}")
    models = request("GET", f"{at.forebay.url}/v1/models")[1]
    must([model["id"] for model in models["data"]] == [MODEL], lambda: f"models: {models}")
    return f"cache sight: {row.get('cache_sight') or 'not said'}"


def kv_events_counted(at):
    """The blocks that vLLM says it stored are in the index."""
    before = at.forebay.engine(at.engine)["indexed_blocks"]
    answer = whole(at.forebay.url, completion("events", facts=12))
    must(answer.status == 200, lambda: answer.told())
    full = (answer.usage["prompt_tokens"] + answer.usage["completion_tokens"] - 1) // BLOCK_SIZE
    after = wait(f"{full} more indexed blocks than {before}",
                 lambda: (found := at.forebay.engine(at.engine)["indexed_blocks"]) >= before + full and found)
    return f"{before} blocks before, {after} after {full} full blocks"


def errors_reach_the_client(at):
    """What vLLM refuses is a client error with a message, and engines are not blamed for it."""
    long = whole(at.forebay.url, completion("long", facts=80))
    must(long.status == 400 and long.error.get("message"), lambda: f"context too long: {long.told()}")
    unknown = whole(at.forebay.url, completion("unknown", model="other"))
    must(unknown.status == 404, lambda: f"unknown model: {unknown.told()}")
    row = at.forebay.engine(at.engine)
    must((row["state"], row["breaker"]) == ("ready", "closed"), lambda: f"engine is {row['state']}, breaker {row['breaker']}")
    return f"400 {long.error.get('code')}, 404 {unknown.error.get('code')}"


def transfer_parameters_of_clients_are_harmless(at):
    """`kv_transfer_params` from a client, which would end the engine, never reach it."""
    for params in [{"do_remote_prefill": True}, {"do_remote_decode": True, "do_remote_prefill": True}]:
        answer = whole(at.forebay.url, completion("crafted", 2, kv_transfer_params=params))
        must(answer.status in (200, 400), lambda: f"{params}: {answer.told()}")
    for engine in at.engines:
        must(engine.healthy(), f"{engine.name} is not healthy any more")
    answer = whole(at.forebay.url, completion("after crafted", 2))
    must(answer.status == 200, lambda: f"the next request: {answer.told()}")
    return "engine unharmed"


def disconnect_aborts(at):
    """A client that leaves ends its request in vLLM, streamed or not."""
    stream = Stream(at.forebay.port, completion("leave 1", 1000, ignore_eos=True, facts=1))
    stream.read(5)
    must(busy(at) == 1, lambda: f"{busy(at)} requests run in vLLM while one streams")
    wait("forebay's status shows the running request", lambda: at.forebay.engine(at.engines[-1])["load"]["running"] == 1)
    stream.close()
    wait("vllm:num_requests_running is 0 after a stream was left", lambda: busy(at) == 0)
    body = completion("leave 2", 1000, ignore_eos=True, facts=1)
    connection = http.client.HTTPConnection(LOOPBACK, at.forebay.port)
    connection.request("POST", path_of(body), json.dumps(body), {"content-type": "application/json"})
    wait("the whole answer's request runs", lambda: busy(at) == 1)
    connection.close()
    wait("vllm:num_requests_running is 0 after a whole answer was left", lambda: busy(at) == 0)
    at.forebay.wait_idle()
    return "both dropped"


def busy(at):
    """Requests in all vLLM servers of the stage that are up."""
    total = 0
    for engine in at.engines:
        if engine.running():
            metrics = engine.metrics()
            total += metrics.sum("vllm:num_requests_running") + metrics.sum("vllm:num_requests_waiting")
    return total


def engine_core_dies_mid_stream(at):
    """SIGKILL to the only engine's core: the stream ends once, with a clear retryable error, soon."""
    body = completion("core", 400, ignore_eos=True, facts=1)
    reference = whole(at.engine.url, body)
    stream = Stream(at.forebay.port, body)
    stream.read(10)
    at.engine.kill_core()
    started = time.monotonic()
    answer = stream.read()
    took = time.monotonic() - started
    stream.close()
    must(answer.error is not None, lambda: f"no error, though the only engine died: {answer.told()}")
    told = right_or_retryable(answer, reference, "the stream")
    must(took < 20, f"the end took {took:.1f} s")
    wait("forebay takes the engine out", lambda: at.forebay.engine(at.engine)["state"] != "ready")
    refused = whole(at.forebay.url, completion("while away", 2))
    must(refused.status in (429, 502, 503, 504) and refused.error.get("message"), lambda: f"while away: {refused.told()}")
    return f"{told}, {took:.1f} s after the kill; then {refused.status} {refused.error.get('code')}"


def restart_is_seen(at):
    """An engine that comes back at its address is a new incarnation with an empty index, and serves."""
    before = at.forebay.engine(at.engine)["incarnation"]
    at.engine.stop()
    at.engine.restart()
    row = wait("the engine is ready again", lambda: (row := at.forebay.engine(at.engine))["state"] == "ready" and row)
    must(row["incarnation"] != before, f"still incarnation {before}")
    must(row["indexed_blocks"] == 0, f"{row['indexed_blocks']} blocks of the former life are still indexed")
    body = completion("a1")
    answer, direct = whole(at.forebay.url, body), whole(at.engine.url, body)
    must(answer.status == 200 and answer.same_as(direct), lambda: f"{answer.told()}; directly: {direct.told()}")
    wait("its events are followed again", lambda: at.forebay.engine(at.engine)["indexed_blocks"] > 0)
    return f"incarnation {before} became {row['incarnation']}"


# Checks on a prefill and a decode engine -----------------------------------------------------------------------------

def moved(engine):
    """Prompt tokens that a decode server got from elsewhere, by its own count; and those that it computed."""
    metrics = engine.metrics()
    name = "vllm:prompt_tokens_by_source_total"
    return metrics.sum(name, source="external_kv_transfer"), metrics.sum(name, source="local_compute")


def split_answers_are_the_same(at):
    """Each request runs on both engines, its whole prompt is moved, and its tokens are those of an aggregated run."""
    bodies = [completion("s1"), chat("s2"), chat("s3", 60, facts=20), completion("s4", 60, facts=20)]
    moved_in_all = 0
    for number, body in enumerate(bodies):
        external, local = moved(at.decode)
        answer = (streamed if number % 2 else lambda _, body: whole(at.forebay.url, body))(at.forebay.port, body)
        must(answer.status == 200 and answer.error is None, lambda: f"request {number}: {answer.told()}")
        after_external, after_local = moved(at.decode)
        tokens = answer.usage["prompt_tokens"]
        must(after_external - external == tokens and after_local == local,
             lambda: f"request {number}: of {tokens} prompt tokens {after_external - external:.0f} were moved and "
                     f"{after_local - local:.0f} computed on the decode engine")
        # Asked last, so that the decode server had nothing of it in its cache.
        direct = whole(at.prefill.url, body)
        must(answer.same_as(direct), lambda: f"request {number}: {answer.told()}; aggregated: {direct.told()}")
        moved_in_all += tokens
    return f"{len(bodies)} requests, {moved_in_all} prompt tokens by external_kv_transfer, 0 computed on decode"


def split_requests_at_once(at):
    """Eight at a time are each answered right."""
    bodies = [completion(f"c{number}", 30, facts=4) for number in range(8)]
    answers = [None] * len(bodies)
    threads = [threading.Thread(target=lambda number=number: answers.__setitem__(
        number, streamed(at.forebay.port, bodies[number]))) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_SECONDS_MAX)
    for number, (body, answer) in enumerate(zip(bodies, answers)):
        must(answer is not None and answer.error is None and answer.status == 200,
             lambda: f"request {number}: {answer and answer.told()}")
        direct = whole(at.prefill.url, body)
        must(answer.same_as(direct), lambda: f"request {number}: {answer.told()}; aggregated: {direct.told()}")
    at.forebay.wait_idle()
    return "8 answers"


def what_doubles_are_held_against(at):
    """The suite that the doubles pass is passed by vLLM itself."""
    ran = subprocess.run([at.testkit, "suite", *[engine.url for engine in at.engines]], capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    must(ran.returncode == 0 and lines and not failed, lambda: "; ".join(failed) or ran.stderr[-500:])
    skipped = [line for line in lines if line.startswith("skip")]
    return f"{len(lines) - len(skipped)} checks passed, {len(skipped)} skipped {skipped or ''}".strip()


def blocks_go_back(at):
    """After split requests the prefill engine holds no block for anybody, and none had to expire."""
    def free():
        return at.prefill.metrics().sum("vllm:kv_cache_usage_perc") == 0

    def expired():
        return at.prefill.metrics().sum("vllm:nixl_num_kv_expired_reqs_total")
    # What was tried on it when it joined may have to expire.
    wait("the prefill engine's KV pool is free", free, LEASE_SECONDS + STATE_SECONDS_MAX)
    before = expired()
    for number in range(4):
        answer = streamed(at.forebay.port, completion(f"back {number}", 4))
        must(answer.error is None, lambda: answer.told())
    wait("the prefill engine's KV pool is free again", free, LEASE_SECONDS + STATE_SECONDS_MAX)
    must(expired() == before, lambda: f"{expired() - before:.0f} hand-overs expired")
    return "pool free, 0 expired"


def disconnect_aborts_both_legs(at):
    """A client that leaves, in prefill or in decode, ends its request on both; the blocks go back."""
    told = disconnect_aborts(at)
    body = completion("leave 3", 100, facts=30)
    connection = http.client.HTTPConnection(LOOPBACK, at.forebay.port)
    connection.request("POST", path_of(body), json.dumps(body), {"content-type": "application/json"})
    wait("the prefill leg runs", lambda: at.prefill.metrics().sum("vllm:num_requests_running") == 1)
    connection.close()
    wait("both engines are idle", lambda: busy(at) == 0)
    wait("the prefill engine's KV pool is free", lambda: at.prefill.metrics().sum("vllm:kv_cache_usage_perc") == 0,
         LEASE_SECONDS + STATE_SECONDS_MAX)
    at.forebay.wait_idle()
    return f"{told}, and one in its prefill"


def prefill_dies_while_decode_streams(at):
    """SIGKILL to the prefill engine's processes: what streams from the decode engine is not touched."""
    body = completion("p1", 300, ignore_eos=True)
    reference = whole(at.prefill.url, body)
    stream = Stream(at.forebay.port, body)
    stream.read(5)
    at.prefill.kill()
    answer = stream.read()
    stream.close()
    must(answer.error is None, lambda: f"{answer.told()}")
    right_or_retryable(answer, reference, "the stream")
    wait("forebay takes the engine out", lambda: at.forebay.engine(at.prefill)["state"] != "ready")
    next_answer = streamed(at.forebay.port, completion("p2"))
    direct = whole(at.decode.url, completion("p2"))
    told = right_or_retryable(next_answer, direct, "the next request")
    return f"stream finished; next request: {told}"


def prefill_dies_in_prefill(at):
    """SIGKILL to the prefill engine under a prefill: right tokens by another plan, or a clear retryable error."""
    body = completion("p3", 20, facts=30)
    result = []
    thread = threading.Thread(target=lambda: result.append(streamed(at.forebay.port, body)))
    thread.start()
    wait("the prefill leg runs", lambda: at.prefill.metrics().sum("vllm:num_requests_running") == 1)
    at.prefill.kill()
    thread.join(ANSWER_SECONDS_MAX)
    must(result, "no end")
    direct = whole(at.decode.url, body)
    return right_or_retryable(result[0], direct, "the request")


def kv_moves(at, tag):
    """Waits until a request's KV moves from one to the other: a pair is warmed first, and its breaker may be open."""
    def moves():
        external, _ = moved(at.decode)
        answer = streamed(at.forebay.port, completion(f"{tag} {time.monotonic()}", 4))
        must(answer.error is None or answer.error.get("code") in RETRYABLE, lambda: answer.told())
        return answer.error is None and moved(at.decode)[0] > external
    wait("KV moves between the two again", moves)
    at.forebay.wait_idle()
    return "KV moves; counters at zero"


def restarted_prefill_works_again(at):
    """A prefill engine that came back is paired again: KV moves as before."""
    return kv_moves(at, "prefill is back")


def decode_dies_mid_stream(at):
    """SIGKILL to the decode engine mid-stream: right tokens to the end, or the right beginning and a retryable error."""
    body = completion("d1", 300, ignore_eos=True)
    reference = whole(at.prefill.url, body)
    stream = Stream(at.forebay.port, body)
    stream.read(10)
    at.decode.kill()
    started = time.monotonic()
    answer = stream.read()
    took = time.monotonic() - started
    stream.close()
    told = right_or_retryable(answer, reference, "the stream")
    wait("forebay takes the engine out", lambda: at.forebay.engine(at.decode)["state"] != "ready")
    wait("the prefill engine's KV pool is free", lambda: at.prefill.metrics().sum("vllm:kv_cache_usage_perc") == 0,
         LEASE_SECONDS + STATE_SECONDS_MAX)
    return f"{told}; {took:.1f} s after the kill"


def restarted_decode_works_again(at):
    """A decode engine that came back is paired again."""
    return kv_moves(at, "decode is back")


# Checks on two aggregated engines ------------------------------------------------------------------------------------

def both_serve(at):
    """Two engines without roles share the load."""
    busiest = [0, 0]
    streams = [Stream(at.forebay.port, completion(f"m{number}", 200, ignore_eos=True, facts=1)) for number in range(6)]
    for stream in streams:
        stream.read(3)
    for index, engine in enumerate(at.engines):
        busiest[index] = engine.metrics().sum("vllm:num_requests_running")
    for stream in streams:
        answer = stream.read()
        stream.close()
        must(answer.error is None and answer.done == 1, lambda: answer.told())
    must(all(busiest), f"requests running on each: {busiest}")
    return f"{busiest[0]:.0f} and {busiest[1]:.0f} of 6 at once"


def killed_engine_s_answer_moves(at):
    """SIGKILL to the engine that streams: the other continues with the right tokens, or the error is retryable."""
    body = completion("move", 300, ignore_eos=True, facts=2)
    reference = whole(at.engines[0].url, body)
    stream = Stream(at.forebay.port, body)
    stream.read(10)
    running = [engine for engine in at.engines if engine.metrics().sum("vllm:num_requests_running")]
    must(len(running) == 1, f"{len(running)} engines run one request")
    running[0].kill()
    started = time.monotonic()
    answer = stream.read()
    took = time.monotonic() - started
    stream.close()
    told = right_or_retryable(answer, reference, "the stream")
    survivor = whole(at.forebay.url, completion("survivor", 4))
    must(survivor.status == 200, lambda: f"the next request: {survivor.told()}")
    at.forebay.wait_idle()
    return f"{told}, {took:.1f} s after the kill"


def seeded_sampling_does_not_move(at):
    """A request whose state cannot move ends in a retryable error, its beginning unchanged."""
    body = completion("seeded", 300, ignore_eos=True, facts=2) | {"temperature": 0.8, "seed": 7}
    stream = Stream(at.forebay.port, body)
    stream.read(10)
    running = [engine for engine in at.engines if engine.metrics().sum("vllm:num_requests_running")]
    must(len(running) == 1, f"{len(running)} engines run one request")
    running[0].kill()
    answer = stream.read()
    stream.close()
    ends_once(answer)
    must(answer.error is not None and answer.error.get("code") in RETRYABLE, lambda: answer.told())
    return f"error {answer.error['code']}"


# Stages --------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class At:
    """What the checks of a stage share."""
    forebay: Forebay
    engines: list

    @property
    def engine(self):
        return self.engines[0]

    prefill = engine

    @property
    def decode(self):
        return self.engines[1]

    def bring_back(self):
        """Starts again what a check before killed, so that each begins with every server up and ready."""
        for engine in self.engines:
            if not engine.running() or not engine.healthy():
                engine.stop()
                engine.restart()
        self.forebay.wait_ready(len(self.engines))
        if self.prefill.role:
            kv_moves(self, "before")


@dataclasses.dataclass
class Servers:
    """Servers without Forebay, and the program of crates/testkit."""
    engines: list
    testkit: str

    def bring_back(self):
        """Nothing is killed here."""


@contextlib.contextmanager
def aggregated(options, model, logs):
    """One engine."""
    with Vllm("aggregated", model, logs, block_size=BLOCK_SIZE, blocks=256, model_name=MODEL) as engine:
        engine.wait_ready()
        with Forebay(options.binary, [f"vllm={engine.url},name={engine.name}"], logs, "forebay-aggregated", options.flags) as forebay:
            forebay.wait_serving().wait_ready(1)
            yield At(forebay, [engine])


@contextlib.contextmanager
def two_servers(options, model, logs, stage, roles):
    connector = {"kv_connector_extra_config": {"kv_lease_duration": LEASE_SECONDS}, "kv_load_failure_policy": "fail"}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Vllm(
            f"{stage}-{number}", model, logs, role=("kv_producer", "kv_consumer")[number] if roles else None, core=number,
            block_size=BLOCK_SIZE, blocks=256, model_name=MODEL, connector=connector, extra=SMALL_STEPS)) for number in range(2)]
        for server in servers:
            server.wait_ready()
        specs = [f"vllm={server.url},name={server.name}{f',role={role}' if roles else ''}"
                 for server, role in zip(servers, ("prefill", "decode"))]
        flags = ["--tokenizer", f"{MODEL}={model}", "--kv-lease-seconds", f"{LEASE_SECONDS}s", *options.flags]
        with Forebay(options.binary, specs, logs, f"forebay-{stage}", flags) as forebay:
            forebay.wait_serving().wait_ready(2)
            yield At(forebay, servers)


def split(options, model, logs):
    """A prefill and a decode engine with the NIXL connector."""
    return two_servers(options, model, logs, "split", roles=True)


@contextlib.contextmanager
def doubles(options, model, logs):
    """A pair that can do all that the doubles in crates/testkit do, without Forebay."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Vllm(
            f"doubles-{number}", model, logs, role=("kv_producer", "kv_consumer")[number], core=number, block_size=BLOCK_SIZE,
            blocks=256, environment={"VLLM_SERVER_DEV_MODE": "1"}, extra=["--enable-scale-out"])) for number in range(2)]
        for server in servers:
            server.wait_ready()
        yield Servers(servers, options.testkit)


def moving(options, model, logs):
    """Two engines without roles, with a tokenizer, so that an answer can move."""
    return two_servers(options, model, logs, "moving", roles=False)


STAGES = {
    doubles: [what_doubles_are_held_against],
    aggregated: [discovered, same_tokens_as_direct, kv_events_counted, errors_reach_the_client,
                 transfer_parameters_of_clients_are_harmless, disconnect_aborts, engine_core_dies_mid_stream, restart_is_seen],
    split: [split_answers_are_the_same, split_requests_at_once, blocks_go_back, transfer_parameters_of_clients_are_harmless,
            disconnect_aborts_both_legs, prefill_dies_while_decode_streams, prefill_dies_in_prefill,
            restarted_prefill_works_again, decode_dies_mid_stream, restarted_decode_works_again],
    moving: [both_serve, killed_engine_s_answer_moves, seeded_sampling_does_not_move],
}


class Report:
    """Prints a line for each check and remembers it."""

    def __init__(self):
        self.results = []

    def run(self, stage, check, at):
        started = time.monotonic()
        try:
            at.bring_back()
            self.add(stage, check.__name__, "passed", check(at), started)
        except Failed as failed:
            self.add(stage, check.__name__, "failed", str(failed), started)
        except Exception as error:  # noqa: BLE001 - a bug of a check is a failure, not the end of the suite
            traceback.print_exc()
            self.add(stage, check.__name__, "failed", f"{type(error).__name__}: {error}", started)

    def add(self, stage, name, outcome, detail, started):
        seconds = round(time.monotonic() - started, 1)
        self.results.append({"stage": stage, "check": name, "outcome": outcome, "detail": detail, "seconds": seconds})
        print(f"{outcome:7} {stage}/{name} ({seconds} s): {detail}", flush=True)

    def count(self, outcome):
        return sum(result["outcome"] == outcome for result in self.results)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every server's clean-up
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--binary", required=True, type=pathlib.Path, help="the forebay to test")
    parser.add_argument("--testkit", help="the program of crates/testkit; without it the stage `doubles` is left out")
    parser.add_argument("--stage", action="append", choices=[stage.__name__ for stage in STAGES], help="only this; may be repeated")
    parser.add_argument("--json", type=pathlib.Path, help="file for a summary")
    parser.add_argument("--logs", type=pathlib.Path, help="folder for the servers' logs; by default a new one")
    parser.add_argument("--layers", type=int, help="use a model of so many layers: quicker, and its text is nonsense")
    parser.add_argument("--flag", dest="flags", action="append", default=[], help="one more word for forebay serve's command line")
    options = parser.parse_args()
    if not os.access(options.binary, os.X_OK):
        parser.error(f"{options.binary} is no program")
    if not (engines.virtual_environment() / "bin" / "vllm").exists():
        parser.error("vLLM is not installed; run scripts/vllm/install.sh")
    options.binary = str(options.binary.resolve())
    logs = options.logs or pathlib.Path(tempfile.mkdtemp(prefix="forebay-vllm-"))
    logs.mkdir(parents=True, exist_ok=True)
    logs = logs.resolve()
    print(f"logs in {logs}", flush=True)
    model = engines.model_folder(options.layers)
    report = Report()
    for stage, checks in STAGES.items():
        if options.stage and stage.__name__ not in options.stage:
            continue
        if stage is doubles and not options.testkit:
            print("skipped doubles: no --testkit", flush=True)
            continue
        started = time.monotonic()
        try:
            with stage(options, model, logs) as at:
                report.add(stage.__name__, "start", "passed", stage.__doc__, started)
                for check in checks:
                    report.run(stage.__name__, check, at)
        except (Failed, engines.EngineError) as error:
            report.add(stage.__name__, "start", "failed", str(error), started)
    passed, failed = report.count("passed"), report.count("failed")
    if options.json:
        summary = {"vllm": "0.32.0", "passed": passed, "failed": failed, "results": report.results}
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
