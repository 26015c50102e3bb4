#!/usr/bin/env python3
"""Asks real vLLM servers everything that Forebay relies on, and keeps their raw answers in captures/.

In: the virtual environment of scripts/vllm/install.sh. Out: one JSON file for each probe: what was sent, the status,
and the answer as it came (`answer` if it was JSON, `text` if not, event streams included), with what the probe looked
at besides (`seen`). Groups of probes need differently started servers; a group can be run alone by naming it.
Nothing is checked here: docs/engines/roles.md says what the answers mean, and run.py checks what Forebay makes of them.

    capture.py                    every group: about half an hour on two cores
    capture.py pair               one of them
"""
import argparse
import contextlib
import http.client
import json
import pathlib
import re
import signal
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "scripts" / "vllm"))
import engines  # noqa: E402
from engines import Vllm  # noqa: E402

FACTS = ("Paris is the capital of France, Berlin is the capital of Germany, Madrid is the capital of Spain, "
         "Rome is the capital of Italy, and Lisbon is the capital of Portugal. ")
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
STATE_SECONDS_MAX = 60
# A request shows in the metrics at the end of a step, so one that needs a single step never shows.
SMALL_STEPS = ["--max-num-batched-tokens", "256"]
# Blocks of abandoned prefill legs go back after so many seconds; vLLM's default is 30.
LEASE = {"kv_connector_extra_config": {"kv_lease_duration": 6}}


class Capture:
    """Sends probes to one server and files what comes back."""

    def __init__(self, engine, folder, group):
        self.engine, self.folder, self.group = engine, folder, group

    def probe(self, name, path, body=None, headers=None, method=None, keep=True, seconds=300):
        """Sends one request; returns status and answer."""
        method = method or ("GET" if body is None else "POST")
        try:
            status, answer = engines.request(method, self.engine.url + path, body, headers, seconds)
        except OSError as error:
            status, answer = None, f"{type(error).__name__}: {error}"
        if keep:
            sent = body.decode() if isinstance(body, bytes) else body
            record = {"engine": self.engine.name, "method": method, "path": path, "headers": headers or {},
                      "request": sent, "status": status}
            record["text" if isinstance(answer, str) else "answer"] = answer
            self.save(name, record)
        return status, answer

    def note(self, name, seen):
        self.save(name, {"engine": self.engine.name, "seen": seen})

    def save(self, name, record):
        text = json.dumps(record, indent=1, ensure_ascii=False)
        text = text.replace(str(self.engine.model), "/models/smol").replace(str(engines.virtual_environment()), "VENV")
        folder = self.folder / self.group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{self.group}/{name}: {text[:160]!r}", flush=True)

    def metric(self, name, **labels):
        return self.engine.metrics().sum(name, **labels)

    def wait(self, condition, seconds=STATE_SECONDS_MAX):
        """Seconds until `condition()`, None if it did not come."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            with contextlib.suppress(OSError):  # a server that is ending
                if condition():
                    return round(time.monotonic() - start, 2)
            time.sleep(0.05)
        return None

    def open(self, path, body, headers=None):
        """Sends a request and returns the connection, its answer unread."""
        connection = http.client.HTTPConnection(engines.LOOPBACK, self.engine.port, timeout=120)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **(headers or {})})
        return connection

    def running(self):
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")

    def kv_use(self):
        return self.metric("vllm:kv_cache_usage_perc")


def long_prompt(tag, facts=6):
    """A prompt of about 37 tokens a fact, whose first block is different for each tag."""
    return f"({tag}) {FACTS * facts}The capital of Italy is"


def completion(prompt, **more):
    return {"model": "smol", "prompt": prompt, "temperature": 0, "max_tokens": 8, "return_token_ids": True} | more


def prefill_leg(prompt, **more):
    return completion(prompt, max_tokens=1, kv_transfer_params=PREFILL) | more


def chat(content, **more):
    return {"model": "smol", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8,
            "return_token_ids": True} | more


# Groups ------------------------------------------------------------------------------------------------------------

def plain(start, folder):
    """A server without a connector: shapes of answers, errors, discovery."""
    with start("plain", extra=["--enable-scale-out", "--enable-request-id-headers", *SMALL_STEPS]) as engine:
        engine.wait_ready()
        c = Capture(engine, folder, "plain")
        for name, path in [("version", "/version"), ("models", "/v1/models"), ("health", "/health"), ("ping", "/ping"),
                           ("load", "/load"), ("kv_event_sources", "/kv_event_sources"), ("server_info", "/server_info"),
                           ("not_found", "/nowhere"), ("wrong_method", "/v1/completions")]:
            c.probe(f"get_{name}", path)
        shapes(c)
        errors(c)
        kv_params_without_connector(c)
        aborts(c)
        metrics = engine.metrics()
        c.note("metrics", {"cache_config_info": metrics.labels("vllm:cache_config_info"),
                           "process_start_time_seconds": metrics.sum("process_start_time_seconds"),
                           "names": sorted({name for name, _, _ in metrics.samples if not name.endswith("_created")})})


def shapes(c):
    ids = c.probe("tokenize_prompt", "/tokenize", {"model": "smol", "prompt": "The capital of Italy is"})[1]["tokens"]
    c.probe("tokenize_chat", "/tokenize", {"model": "smol", "messages": chat("Hi")["messages"], "return_token_strs": True})
    c.probe("tokenize_chat_no_generation_prompt", "/tokenize",
            {"model": "smol", "messages": chat("Hi")["messages"], "add_generation_prompt": False})
    c.probe("tokenize_special_in_text", "/tokenize", {"model": "smol", "prompt": "<|im_start|>user"})
    c.probe("detokenize", "/detokenize", {"model": "smol", "tokens": ids})
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    c.probe("completion", "/v1/completions", completion("The capital of Italy is"), {"X-Request-Id": "forebay-1"})
    c.probe("completion_of_ids", "/v1/completions", completion(ids))
    c.probe("completion_stream", "/v1/completions", completion(ids, max_tokens=4, **usage))
    c.probe("completion_stream_without_ids", "/v1/completions", completion(ids, max_tokens=4, return_token_ids=False, **usage))
    c.probe("completion_stream_continuous_usage", "/v1/completions", completion(
        ids, max_tokens=3, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    c.probe("completion_stream_no_detokenize", "/v1/completions", completion(ids, max_tokens=4, detokenize=False, **usage))
    c.probe("completion_two_prompts", "/v1/completions", completion(["The capital", "The queen"], max_tokens=2))
    c.probe("completion_stream_two_choices", "/v1/completions", completion(ids, max_tokens=2, n=2, temperature=1, seed=1, **usage))
    c.probe("completion_logprobs", "/v1/completions", completion(ids, max_tokens=2, logprobs=2))
    c.probe("completion_stop_string", "/v1/completions", completion(ids, max_tokens=16, stop=["Empire"]))
    c.probe("completion_stop_id", "/v1/completions", completion(ids, max_tokens=16, stop_token_ids=[30]))
    c.probe("completion_stop_string_stream", "/v1/completions", completion(ids, max_tokens=16, stop=["Empire"], **usage))
    c.probe("chat", "/v1/chat/completions", chat("What is the capital of Italy?"), {"X-Request-Id": "forebay-2"})
    c.probe("chat_stream", "/v1/chat/completions", chat("What is the capital of Italy?", max_tokens=4, **usage))
    c.probe("chat_to_its_end", "/v1/chat/completions", chat("What is the capital of Italy?", max_tokens=60, **usage))
    c.probe("chat_unknown_field", "/v1/chat/completions", chat("Hi", max_tokens=2, no_such_field=1))
    generate = {"token_ids": ids, "sampling_params": {"max_tokens": 4, "temperature": 0}, "model": "smol"}
    c.probe("generate", "/inference/v1/generate", generate)
    c.probe("generate_text", "/inference/v1/generate", generate | {"output_mode": "text"})
    c.probe("generate_stream", "/inference/v1/generate", generate | usage)
    c.probe("generate_priority", "/inference/v1/generate", generate | {"priority": 3})
    c.probe("generate_id_out_of_vocabulary", "/inference/v1/generate", generate | {"token_ids": [999_999]})
    c.probe("generate_too_long", "/inference/v1/generate", generate | {"token_ids": ids * 500})
    c.probe("render_chat", "/v1/chat/completions/render", chat("What is the capital of Italy?"))
    c.probe("priority", "/v1/completions", completion(ids, max_tokens=1, priority=3))
    c.probe("cache_salt", "/v1/completions", completion(ids, max_tokens=1, cache_salt="tenant-7"))
    for rank in ["0", "1", "-1", "x"]:
        c.probe(f"dp_rank_{rank}", "/v1/completions", completion(ids, max_tokens=1), {"X-data-parallel-rank": rank})


def errors(c):
    post = lambda name, body, path="/v1/completions", headers=None: c.probe(f"error_{name}", path, body, headers)
    post("broken_json", b'{"model": "smol", ')
    post("not_an_object", [1, 2])
    post("no_prompt", {"model": "smol"})
    post("no_messages", {"model": "smol"}, "/v1/chat/completions")
    post("empty_messages", {"model": "smol", "messages": []}, "/v1/chat/completions")
    post("unknown_role", {"model": "smol", "messages": [{"role": "alien", "content": "Hi"}], "max_tokens": 1},
         "/v1/chat/completions")
    post("wrong_type", completion("Hi", max_tokens="many"))
    post("unknown_model", completion("Hi", model="other"))
    post("empty_prompt", completion(""))
    post("empty_ids", completion([]))
    post("id_out_of_vocabulary", completion([1, 999_999]))
    post("id_negative", completion([1, -5]))
    post("n_0", completion("Hi", n=0))
    post("n_negative", completion("Hi", n=-1))
    post("n_100000", completion("Hi", n=100_000))
    post("n_2_greedy", completion("Hi", n=2, max_tokens=1))
    post("logprobs_1000", completion("Hi", logprobs=1000))
    post("logprobs_negative", completion("Hi", logprobs=-5))
    post("top_logprobs_without_logprobs", chat("Hi", top_logprobs=2), "/v1/chat/completions")
    post("max_tokens_0", completion("Hi", max_tokens=0))
    post("max_tokens_negative", completion("Hi", max_tokens=-1))
    post("max_tokens_too_many", completion("Hi", max_tokens=100_000))
    post("context_too_long", completion(long_prompt("long", 80)))
    post("context_too_long_stream", completion(long_prompt("long", 80), stream=True))
    post("context_too_long_chat", chat(long_prompt("long", 80)), "/v1/chat/completions")
    post("prompt_fills_context", completion([504] * c.engine.max_model_len))
    post("temperature_negative", completion("Hi", temperature=-1))
    post("top_p_2", completion("Hi", top_p=2))
    post("stop_empty", completion("Hi", stop=[""]))
    post("cache_salt_empty", completion("Hi", cache_salt=""))
    post("stream_options_without_stream", completion("Hi", stream_options={"include_usage": True}))
    bad_schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    post("bad_schema", chat("Hi", response_format=bad_schema), "/v1/chat/completions")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    post("tools_without_parser", chat("Hi", max_tokens=2, tool_choice="auto", tools=[tool]), "/v1/chat/completions")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    post("image", chat([image], max_tokens=1), "/v1/chat/completions")
    post("content_type", b'{"model": "smol", "prompt": "Hi", "max_tokens": 1}', headers={"content-type": "text/plain"})
    post("tokenize_no_prompt", {"model": "smol"}, "/tokenize")


def kv_params_without_connector(c):
    prompt = long_prompt("no connector")
    c.probe("prefill_leg", "/v1/completions", prefill_leg(prompt))
    params = {"do_remote_prefill": True, "do_remote_decode": False, "remote_block_ids": [[1, 2]], "remote_engine_id": "e",
              "remote_request_id": "r", "remote_host": "127.0.0.1", "remote_port": 1, "tp_size": 1}
    c.probe("decode_leg_of_nobody", "/v1/completions", completion(prompt, kv_transfer_params=params))


def aborts(c):
    """Disconnects while waiting for the whole answer, in prefill and in mid-stream."""
    seen = {}
    for name, body in [("decode, not streamed", completion("Count: 1 2 3", max_tokens=1500, ignore_eos=True)),
                       ("prefill, not streamed", completion(long_prompt("abort", 50), max_tokens=1500, ignore_eos=True)),
                       ("decode, streamed", completion("Count: 4 5 6", max_tokens=1500, ignore_eos=True, stream=True))]:
        connection = c.open("/v1/completions", body)
        started = c.wait(lambda: c.running() == 1)
        if "stream" in body:
            connection.getresponse().readline()
        connection.sock.close() if connection.sock else None
        connection.close()
        seen[name] = {"seconds_until_running": started, "seconds_until_dropped": c.wait(lambda: c.running() == 0)}
    for reason in ["abort", "length", "stop"]:
        seen[f"request_success_total {reason}"] = c.metric("vllm:request_success_total", finished_reason=reason)
    c.note("aborts", seen)
    c.probe("abort_requests_unknown", "/inference/v1/abort_requests", {"request_ids": ["no-such"]})
    # By which id does the abort call know a request?
    ids = c.probe("", "/tokenize", {"model": "smol", "prompt": "Count: 7"}, keep=False)[1]["tokens"]
    endless = {"max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    for name, path, body, suffix in [
            ("completion", "/v1/completions", completion(ids, **endless), ""),
            ("completion_with_index", "/v1/completions", completion(ids, **endless), "-0"),
            ("chat", "/v1/chat/completions", chat("Count", **endless), ""),
            ("generate", "/inference/v1/generate", {"model": "smol", "token_ids": ids, "sampling_params": endless}, "")]:
        connection = c.open(path, body | {"stream": True}, {"X-Request-Id": f"forebay-{name}"})
        response = connection.getresponse()
        first = json.loads(response.readline().decode().removeprefix("data: "))
        found = (first.get("id") or first["request_id"]) + suffix
        c.probe(f"abort_requests_{name}", "/inference/v1/abort_requests", {"request_ids": [found]})
        after = c.wait(lambda: c.running() == 0, 4)
        c.note(f"abort_requests_{name}_effect", {"seconds_until_dropped": after,
               "stream_ends_with": None if after is None else response.read().decode()[-700:]})
        connection.close()
        c.wait(lambda: c.running() == 0)


def pair(start, folder):
    """A producer and a consumer of the NIXL connector: every leg that one can ask of each."""
    with start("producer", role="kv_producer", core=0, connector=LEASE, extra=SMALL_STEPS) as producer, \
            start("consumer", role="kv_consumer", core=1, connector=LEASE, extra=SMALL_STEPS) as consumer:
        producer.wait_ready()
        consumer.wait_ready()
        p, d = Capture(producer, folder, "pair"), Capture(consumer, folder, "pair")
        roles(p, d, "producer")
        roles(d, p, "consumer")
        split(p, d, "split")
        prefill_variants(p)
        releases(p, d)
        expiry(p)
        p.note("warnings_producer", interesting(producer))
        d.note("warnings_consumer", interesting(consumer))


def roles(c, other, name):
    """What a server in a role does with each kind of request."""
    prompt = long_prompt(f"role {name}")
    c.probe(f"{name}_plain", "/v1/completions", completion(prompt))
    _, answer = c.probe(f"{name}_prefill_leg", "/v1/completions", prefill_leg(long_prompt(f"role {name} prefill")))
    settle(c)
    params = handed_over(other, long_prompt(f"role {name} decode"))
    c.note(f"{name}_decode_leg_params", params)
    if params:
        c.probe(f"{name}_decode_leg", "/v1/completions", completion(long_prompt(f"role {name} decode"), kv_transfer_params=params))
    settle(other)


def handed_over(c, prompt):
    """Runs a prefill leg; returns its kv_transfer_params."""
    return c.probe("", "/v1/completions", prefill_leg(prompt), keep=False)[1].get("kv_transfer_params")


def settle(c):
    """Waits until nothing of earlier probes is held: the lease is 30 s."""
    return c.wait(lambda: c.kv_use() == 0, 60)


def split(p, d, name):
    """One request over both legs, and the same aggregated; what moved."""
    before = d.engine.metrics()
    for path, body, tag in [("/v1/completions", completion(long_prompt(f"{name} completion"), max_tokens=24), "completion"),
                            ("/v1/chat/completions", chat(long_prompt(f"{name} chat"), max_tokens=24), "chat")]:
        headers = {"X-Request-Id": f"{name}-{tag}"}
        _, first = p.probe(f"{name}_{tag}_prefill", path, body | {"max_tokens": 1, "kv_transfer_params": PREFILL}, headers)
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        d.probe(f"{name}_{tag}_decode_stream", path, body | stream | {"kv_transfer_params": first["kv_transfer_params"]}, headers)
        p.probe(f"{name}_{tag}_aggregated", path, body, headers)
    after = d.engine.metrics()
    moved = lambda metric, **labels: after.sum(metric, **labels) - before.sum(metric, **labels)
    d.note(f"{name}_moved", {
        "external_kv_transfer": moved("vllm:prompt_tokens_by_source_total", source="external_kv_transfer"),
        "local_compute": moved("vllm:prompt_tokens_by_source_total", source="local_compute"),
        "bytes": moved("vllm:nixl_bytes_transferred_sum"),
        "descriptors": moved("vllm:nixl_num_descriptors_sum"),
        "seconds": moved("vllm:nixl_xfer_time_seconds_sum"),
    })


def prefill_variants(p):
    """Prefill legs that are not the usual one."""
    leg = lambda name, body, path="/v1/completions": (p.probe(f"prefill_{name}", path, body), settle(p))
    leg("shorter_than_a_block", prefill_leg("Hi there"))
    leg("exactly_one_block", prefill_leg([504] * 32))
    leg("one_block_and_one_token", prefill_leg([505] * 33))
    leg("stream", prefill_leg(long_prompt("stream"), stream=True, stream_options={"include_usage": True}))
    leg("of_4_tokens", prefill_leg(long_prompt("four"), max_tokens=4))
    leg("ends_by_stop_string", prefill_leg(long_prompt("stop"), max_tokens=8, stop=["R", " ", "o"]))
    leg("two_choices", prefill_leg(long_prompt("two"), n=2, temperature=1))
    leg("two_prompts", prefill_leg([long_prompt("a"), long_prompt("b")]))
    leg("ends_by_stop_id", prefill_leg(long_prompt("stop id"), max_tokens=8, stop_token_ids=[7268]))
    leg("empty_params", prefill_leg(long_prompt("empty params"), kv_transfer_params={}))
    leg("unknown_key", prefill_leg(long_prompt("unknown key"), kv_transfer_params=PREFILL | {"colour": "red"}))
    leg("params_not_an_object", prefill_leg(long_prompt("no object"), kv_transfer_params="yes"))
    leg("chat", chat(long_prompt("chat leg"), max_tokens=1, kv_transfer_params=PREFILL), "/v1/chat/completions")
    prompt = long_prompt("cached")
    p.probe("", "/v1/completions", completion(prompt), keep=False)
    leg("of_a_cached_prompt", prefill_leg(prompt))


def releases(p, d):
    """What frees the producer's blocks."""
    seen = {}
    # A prefill that runs while its client leaves.
    connection = p.open("/v1/completions", prefill_leg(long_prompt("leaves", 30)))
    started = p.wait(lambda: p.running() == 1)
    connection.close()
    seen["client leaves during prefill"] = {
        "seconds_until_running": started, "running_0_after": p.wait(lambda: p.running() == 0),
        "blocks_free_after": p.wait(lambda: p.kv_use() == 0, 60), "expired": p.metric("vllm:nixl_num_kv_expired_reqs_total")}
    # The decode leg runs to its end, of one token.
    one_token = {"max_tokens": 1}
    for name, finish in [("decode leg of one token", lambda body: d.probe("", "/v1/completions", body | one_token, keep=False)),
                         ("decode leg, client leaves at once", lambda body: d.open("/v1/completions", body).close()),
                         ("decode leg, client leaves when it runs", lambda body: leave_running(d, body))]:
        prompt = long_prompt(name)
        params = handed_over(p, prompt)
        held = p.kv_use()
        start = time.monotonic()
        finish(completion(prompt, max_tokens=200, ignore_eos=True, kv_transfer_params=params))
        returned = round(time.monotonic() - start, 2)
        expired = p.metric("vllm:nixl_num_kv_expired_reqs_total")
        seen[name] = {"held_before": held, "decode_call_seconds": returned,
                      "blocks_free_after": p.wait(lambda: p.kv_use() == 0, 60),
                      "expired": p.metric("vllm:nixl_num_kv_expired_reqs_total") - expired,
                      "decode_running_0_after": d.wait(lambda: d.running() == 0)}
    # A decode leg that the decode server refuses: it tells the prefill server before it answers 400.
    prompt = long_prompt("refused")
    params = handed_over(p, prompt)
    status, _ = d.probe("decode_leg_refused", "/v1/completions", completion(prompt, max_tokens=-1, kv_transfer_params=params))
    seen["decode leg refused with 400"] = {"status": status, "blocks_free_after": p.wait(lambda: p.kv_use() == 0, 60)}
    # The same parameters for a second decode leg.
    prompt = long_prompt("twice")
    params = handed_over(p, prompt)
    d.probe("decode_leg_first_use", "/v1/completions", completion(prompt, kv_transfer_params=params))
    d.probe("decode_leg_second_use_cached", "/v1/completions", completion(prompt, kv_transfer_params=params))
    p.note("releases", seen)


def leave_running(c, body):
    connection = c.open("/v1/completions", body)
    c.wait(lambda: c.running() == 1, 5)
    connection.close()


def expiry(p):
    """A prefill leg whose decode leg never comes."""
    before = p.metric("vllm:nixl_num_kv_expired_reqs_total")
    handed_over(p, long_prompt("never"))
    held = p.kv_use()
    freed = p.wait(lambda: p.kv_use() == 0, 90)
    p.note("expiry", {"held": held, "blocks_free_after": freed,
                      "expired": p.metric("vllm:nixl_num_kv_expired_reqs_total") - before})


def odd(start, folder):
    """Legs whose parameters do not fit; the last ones end an engine."""
    with start("odd1", role="kv_producer", core=0, connector=LEASE, extra=SMALL_STEPS) as producer, \
            start("odd2", role="kv_consumer", core=1, connector=LEASE, extra=SMALL_STEPS) as consumer:
        producer.wait_ready()
        consumer.wait_ready()
        p, d = Capture(producer, folder, "odd"), Capture(consumer, folder, "odd")

        def leg(name, change):
            prompt = long_prompt(name)
            params = change(dict(handed_over(p, prompt)))
            d.probe(f"decode_{name}", "/v1/completions", completion(prompt, kv_transfer_params=params), seconds=60)
            settle(p)
        leg("dead_port_before_any_handshake", lambda params: params | {"remote_port": engines.free_ports()})
        leg("as_it_came", lambda params: params)
        leg("dead_port_after_a_handshake", lambda params: params | {"remote_port": engines.free_ports()})
        leg("unknown_engine", lambda params: params | {"remote_engine_id": "00000000-0000-0000-0000-000000000000"})
        # The decode leg of a shorter prompt, the beginning of the prefill leg's; and that prompt's right answer.
        whole = long_prompt("shorter")
        params = handed_over(p, whole)
        d.probe("decode_shorter_prompt", "/v1/completions", completion(whole[:len(whole) // 2], kv_transfer_params=params))
        settle(p)
        p.probe("decode_shorter_prompt_aggregated", "/v1/completions", completion(whole[:len(whole) // 2]))
        leg("extra_key", lambda params: params | {"colour": "red"})
        leg("do_remote_prefill_false", lambda params: params | {"do_remote_prefill": False})
        leg("without_tp_size", lambda params: {key: value for key, value in params.items() if key != "tp_size"})
        if d.engine.healthy():
            deadly("empty_group_of_block_ids", d, handed_over(p, long_prompt("empty")) | {"remote_block_ids": [[]]})
        deadly("both_flags", p, PREFILL | {"do_remote_prefill": True, "remote_block_ids": None, "remote_engine_id": None,
                                           "remote_host": None, "remote_port": None})
        consumer.stop()
        consumer.restart()
        deadly("no_block_ids", d, {"do_remote_prefill": True})


def deadly(name, c, params):
    """A body that ends the engine."""
    c.probe(f"deadly_{name}", "/v1/completions", completion(long_prompt(f"deadly {name}"), kv_transfer_params=params))
    c.probe(f"deadly_{name}_next_request", "/v1/completions", completion("Hi"), seconds=30)
    c.probe(f"deadly_{name}_health", "/health", seconds=30)
    ended = c.wait(lambda: not c.engine.running(), 60)
    log = c.engine.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
    c.note(f"deadly_{name}_end", {"process_ends_after": ended, "exit_code": c.engine.process.poll(),
                                  "log": [clean(line) for line in log if "AssertionError" in line or "assert " in line][-2:]})


def both(start, folder):
    """A pair in which each may do both, with the policy that recomputes, and what kills do to its streams."""
    policy = {"kv_load_failure_policy": "recompute"}
    with start("both1", role="kv_both", core=0, connector=policy) as one, \
            start("both2", role="kv_both", core=1, connector=policy) as two:
        one.wait_ready()
        two.wait_ready()
        a, b = Capture(one, folder, "both"), Capture(two, folder, "both")
        roles(a, b, "both")
        split(a, b, "split_both")
        prompt = long_prompt("recompute")
        params = handed_over(a, prompt)
        b.probe("recompute_dead_port", "/v1/completions", completion(prompt, kv_transfer_params=params | {"remote_port": engines.free_ports()}))
        prompt = long_prompt("restarted")
        params = handed_over(a, prompt)
        one.kill()
        b.probe("recompute_prefill_engine_killed", "/v1/completions", completion(prompt, kv_transfer_params=params))
        b.note("warnings_both", interesting(two))
        deaths(b)


def deaths(c):
    """The EngineCore dies under a stream; then SIGTERM under a stream, in a new life."""
    connection, response = stream_of(c)
    c.engine.kill_core()
    c.note("death_of_core", {"stream_ends_with": rest(response), "health": c.probe("", "/health", keep=False)[0],
                             "process_ends_after": c.wait(lambda: not c.engine.running()), "exit_code": c.engine.process.poll()})
    connection.close()
    c.engine.stop()
    c.engine.restart()
    c.note("sigterm", sigterm(c))


def sigterm(c):
    """SIGTERM to the server under a stream of some seconds: what the stream, a new request and /health show."""
    connection, response = stream_of(c, 400)
    c.engine.process.terminate()
    start = time.monotonic()
    new = c.probe("", "/v1/completions", completion("Hi", max_tokens=1), keep=False, seconds=20)
    health = c.probe("", "/health", keep=False, seconds=20)
    connection.sock.settimeout(60)
    ends = rest(response)
    after = round(time.monotonic() - start, 2)
    connection.close()
    return {"new_request": [new[0], str(new[1])[:200]], "health": [health[0], str(health[1])[:200]], "stream_ends_with": ends,
            "stream_ended_after": after, "process_ends_after_the_client_left": c.wait(lambda: not c.engine.running()),
            "exit_code": c.engine.process.poll()}


def stream_of(c, tokens=1500):
    connection = c.open("/v1/completions", completion("Count: 1 2 3", max_tokens=tokens, ignore_eos=True, stream=True))
    response = connection.getresponse()
    for _ in range(20):
        response.readline()
    return connection, response


def rest(response):
    try:
        return response.read().decode()[-900:]
    except (http.client.HTTPException, OSError) as error:
        partial = getattr(error, "partial", b"").decode()[-300:]
        return f"{type(error).__name__} after {partial!r}"


def push(start, folder):
    """The push variant: the prefill server writes to the decode server, which it knows by the request's id."""
    # With vLLM's own lease: once it ends before the write, the decode leg waits for nothing.
    connector = {"kv_connector": "NixlPushConnector"}
    with start("push1", role="kv_producer", core=0, connector=connector) as one, \
            start("push2", role="kv_consumer", core=1, connector=connector) as two:
        one.wait_ready()
        two.wait_ready()
        p, d = Capture(one, folder, "push"), Capture(two, folder, "push")
        split(p, d, "push")
        # Both legs at once, the decode leg's parameters put together from an earlier answer.
        known = handed_over(p, long_prompt("to learn the engine's id"))
        body, headers = completion(long_prompt("at once"), max_tokens=8), {"X-Request-Id": "push-at-once"}
        # The id of the prefill leg is not known yet, but must be there: without it the engine ends (KeyError).
        params = {key: known[key] for key in ["remote_engine_id", "remote_host", "remote_port", "tp_size"]}
        params["remote_request_id"] = "not known yet"
        params |= {"do_remote_prefill": True, "do_remote_decode": False}
        connection = d.open("/v1/completions", body | {"kv_transfer_params": params}, headers)
        waits = d.wait(lambda: d.running() == 1, 10)
        p.probe("at_once_prefill", "/v1/completions", body | {"max_tokens": 1, "kv_transfer_params": PREFILL}, headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        _, alone = p.probe("", "/v1/completions", body, keep=False)
        same = "choices" in answer and answer["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
        d.note("at_once_decode", {"waits_in_engine_after": waits, "answer": answer, "same": same})
        # Other ids on the two legs: nobody finds the other.
        prompt = long_prompt("other ids")
        _, first = p.probe("other_ids_prefill", "/v1/completions", prefill_leg(prompt), {"X-Request-Id": "push-x"})
        d.probe("other_ids_decode", "/v1/completions", completion(prompt, kv_transfer_params=first["kv_transfer_params"]),
                {"X-Request-Id": "push-y"}, seconds=30)
        d.note("other_ids_after_leaving", {"running_0_after": d.wait(lambda: d.running() == 0), "healthy": two.healthy()})


def layouts(start, folder):
    """`enable_cross_layers_blocks` on a pair; API keys."""
    extra = {"kv_connector_extra_config": {"enable_cross_layers_blocks": True}, "kv_load_failure_policy": "fail"}
    with start("cross1", role="kv_producer", core=0, connector=extra, environment={"VLLM_API_KEY": "secret"}) as one, \
            start("cross2", role="kv_consumer", core=1, connector=extra) as two:
        for engine in [one, two]:
            try:
                engine.wait_ready()
            except engines.EngineError as error:
                Capture(engine, folder, "layouts").note(f"start_{engine.name}", str(error)[-1500:])
                return
        a, b = Capture(one, folder, "layouts"), Capture(two, folder, "layouts")
        a.note("cross_layers_log", interesting(one))
        for name, path in [("health", "/health"), ("metrics", "/metrics"), ("version", "/version"), ("load", "/load"),
                           ("kv_event_sources", "/kv_event_sources"), ("models", "/v1/models")]:
            status, answer = a.probe("", path, keep=False)
            a.note(f"api_key_missing_{name}", {"status": status, "answer": str(answer)[:200]})
        a.probe("api_key_missing_completion", "/v1/completions", completion("Hi"))
        a.probe("api_key_wrong_completion", "/v1/completions", completion("Hi"), {"Authorization": "Bearer wrong"})
        a.probe("api_key_missing_tokenize", "/tokenize", {"model": "smol", "prompt": "Hi"})
        key = {"Authorization": "Bearer secret"}
        prompt = long_prompt("cross layers")
        _, first = a.probe("cross_prefill", "/v1/completions", prefill_leg(prompt), key)
        _, second = b.probe("cross_decode", "/v1/completions", completion(prompt, kv_transfer_params=first.get("kv_transfer_params")))
        _, alone = a.probe("cross_aggregated", "/v1/completions", completion(prompt), key)
        b.note("cross_moved", {"same": second["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"],
                               "descriptors": b.metric("vllm:nixl_num_descriptors_sum"),
                               "bytes": b.metric("vllm:nixl_bytes_transferred_sum")})


def ranks(start, folder):
    """Two data-parallel ranks in one server, with a connector."""
    with start("ranks", role="kv_both", ranks=2) as engine:
        engine.wait_ready()
        c = Capture(engine, folder, "ranks")
        c.probe("kv_event_sources", "/kv_event_sources")
        for rank in ["0", "1", "2"]:
            c.probe(f"prefill_leg_rank_{rank}", "/v1/completions", prefill_leg(long_prompt(f"rank {rank}")),
                    {"X-data-parallel-rank": rank})
        metrics = engine.metrics()
        c.note("metrics_by_rank", {rank: {name: metrics.sum(name, engine=rank) for name in
                                          ["vllm:prompt_tokens_total", "vllm:kv_cache_usage_perc", "vllm:num_requests_running"]}
                                   for rank in ["0", "1"]})
        c.note("processes", sorted(engine.children().values()))


REFUSAL = re.compile(r"\b(?:\w*Error|error):|Input should be|Unsupported|Value error")


def refusals(start, folder):
    """Configurations that a server does not start with."""
    cases = {
        "unknown_policy": {"role": "kv_consumer", "connector": {"kv_load_failure_policy": "shrug"}},
        "unknown_connector": {"role": "kv_consumer", "connector": {"kv_connector": "NoSuchConnector"}},
        "unknown_role": {"role": "kv_both", "connector": {"kv_role": "kv_nobody"}},
        "block_size_16": {"block_size": 16, "blocks": 256},
        "layout_with_block_outermost": {"environment": {"VLLM_KV_CACHE_LAYOUT": "BLHNC"}},
    }
    for name, options in cases.items():
        with start(name, **options) as engine:
            c = Capture(engine, folder, "refusals")
            try:
                engine.wait_ready(240)
                c.note(name, "started")
            except engines.EngineError:
                lines = engine.tail(200).splitlines()
                c.note(name, [clean(line) for line in lines if REFUSAL.search(line) and "WARNING" not in line][-3:])


def multi(start, folder):
    """MultiConnector of NIXL and a connector that keeps blocks in files, and a producer without KV events."""
    with tempfile.TemporaryDirectory() as store:
        connectors = [{"kv_connector": "NixlConnector", "kv_role": "kv_both"},
                      {"kv_connector": "ExampleConnector", "kv_role": "kv_both",
                       "kv_connector_extra_config": {"shared_storage_path": store}}]
        config = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": connectors}}
        with start("multi", role="kv_both", connector=config, kv_events=False, extra=["--shutdown-timeout", "120"]) as engine:
            engine.wait_ready()
            c = Capture(engine, folder, "multi")
            c.probe("plain", "/v1/completions", completion(long_prompt("multi")))
            c.probe("prefill_leg", "/v1/completions", prefill_leg(long_prompt("multi leg")))
            c.probe("kv_event_sources_when_off", "/kv_event_sources")
            c.probe("generate_without_scale_out", "/inference/v1/generate",
                    {"token_ids": [504], "sampling_params": {"max_tokens": 1}})
            c.note("warnings", interesting(engine))
            c.note("sigterm_with_shutdown_timeout", sigterm(c))


def interesting(engine):
    """Log lines that tell how the transfer is set up, without times and paths."""
    pattern = re.compile(r"deprecat|kv_role|cross.?layer|NIXL (?:is|compat)|kv_both|layout", re.IGNORECASE)
    return sorted({clean(line) for line in engine.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
                   if pattern.search(line) and not re.search("non-default args|Initializing|FutureWarning|KVTransferConfig", line)})[:20]


def clean(line):
    line = re.sub(r"^\(\S+ pid=\d+\) ", "", line)
    return re.sub(r"\d\d-\d\d \d\d:\d\d:\d\d ", "", line)[:600]


GROUPS = {group.__name__: group for group in [plain, pair, odd, both, push, layouts, multi, ranks, refusals]}


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every server's clean-up
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--folder", type=pathlib.Path, default=HERE / "captures", help="where the answers go")
    parser.add_argument("--logs", type=pathlib.Path, default=None, help="where the servers' logs go")
    parser.add_argument("--layers", type=int, help="use a model of so many layers: quicker, and its text is nonsense")
    arguments = parser.parse_args()
    unknown = set(arguments.groups) - set(GROUPS)
    if unknown:
        parser.error(f"no group {', '.join(unknown)}")
    logs = arguments.logs or pathlib.Path(tempfile.mkdtemp(prefix="forebay-vllm-"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"logs in {logs}")
    model = engines.model_folder(arguments.layers)
    for name in arguments.groups or GROUPS:
        started = time.monotonic()
        GROUPS[name](lambda engine, **options: Vllm(engine, model, logs, **options), arguments.folder)
        print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
