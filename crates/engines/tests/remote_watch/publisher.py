"""Publishes messages as vLLM's ZMQ publisher does: PUB for what is new, ROUTER for what was.

Usage: publisher.py [EVENTS_PORT REPLAY_PORT]; without ports any are taken. Prints both ports, then obeys one command a
line and prints "done" after each:
  publish HEX   sends a payload under the next number and keeps it
  lose HEX      keeps a payload under the next number, but does not send it
  forget N      forgets all but the last N that were kept
Replies to a replay have the topic in them, as from vLLM 0.26 on, unless the environment has OLD_REPLIES. With FULL_SOCKET
those after the first ten of an answer are dropped but for every fourth, and so is the end, as a socket does that is full.
"""

import os
import sys

import zmq

TOPIC = b"kv-events"


def bind(context, kind, port):
    socket = context.socket(kind)
    socket.linger = 0
    if port == "0":
        return socket, socket.bind_to_random_port("tcp://127.0.0.1")
    socket.bind(f"tcp://127.0.0.1:{port}")
    return socket, int(port)


def answer(replay, kept):
    client, empty, start = replay.recv_multipart()
    old = "OLD_REPLIES" in os.environ
    asked = [(number, payload) for number, payload in kept if number >= int.from_bytes(start, "big")]
    is_full = "FULL_SOCKET" in os.environ and len(asked) > 10
    for index, (number, payload) in enumerate(asked):
        if is_full and index >= 10 and index % 4:
            continue
        topic = [] if old else [TOPIC]
        replay.send_multipart([client, empty, *topic, number.to_bytes(8, "big"), payload])
    if is_full:
        return
    end = (-1).to_bytes(8, "big", signed=True)
    replay.send_multipart([client, empty, *([] if old else [b""]), end, b""])


def main():
    ports = sys.argv[1:] or ["0", "0"]
    context = zmq.Context()
    events, events_port = bind(context, zmq.PUB, ports[0])
    replay, replay_port = bind(context, zmq.ROUTER, ports[1])
    print(events_port, replay_port, flush=True)
    poller = zmq.Poller()
    poller.register(sys.stdin, zmq.POLLIN)
    poller.register(replay, zmq.POLLIN)
    kept, number = [], 0
    while True:
        ready = dict(poller.poll())
        if replay in ready:
            answer(replay, kept)
        if sys.stdin.fileno() in ready:
            words = sys.stdin.readline().split()
            if not words:
                return
            if words[0] == "forget":
                kept = kept[-int(words[1]):] if int(words[1]) else []
            else:
                payload = bytes.fromhex(words[1])
                kept.append((number, payload))
                if words[0] == "publish":
                    events.send_multipart([TOPIC, number.to_bytes(8, "big"), payload])
                number += 1
            print("done", flush=True)


main()
