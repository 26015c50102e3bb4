#!/usr/bin/env python3
"""Fits the numbers of the built-in profiles to what was measured: `python3 profiles/fit.py`, from the crate's folder.

In: `measured/*.json`. Out: the terms of each profile, in ms, and how far the fit is from each row, on standard output.
The profiles hold these numbers rounded to three digits; `README.md` says what was chosen by hand.

All terms are linear, so one least squares of relative errors gives them.
"""

import json
import math
import pathlib

HERE = pathlib.Path(__file__).parent
# ms that a client sees for each prompt token outside of steps (reading, tokenising). Prefills of one length cannot tell
# it from the launch curve's slope: it comes from a simulation of open-loop runs of the same engine.
REQUEST_TOKEN = 1.2e-3
# Middle of the contexts at which the chunk-budget table was measured.
CONTEXT = 4375
LAUNCH = [1, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
SEQUENCES = [1, 2, 16, 32, 64, 128]


def curve(knots, prefix, x):
    """Linear interpolation as a row of features, one for each knot; beyond the last, its last slope."""
    if x <= knots[0]:
        return {(prefix, knots[0]): 1.0}
    i = next((i for i in range(1, len(knots) - 1) if x <= knots[i]), len(knots) - 1)
    share = (x - knots[i - 1]) / (knots[i] - knots[i - 1])
    return {(prefix, knots[i - 1]): 1 - share, (prefix, knots[i]): share}


def add(*rows):
    total = {}
    for row in rows:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total


def prefill(new, cached, budget, decodes=0, context=0):
    """The row of a prefill in chunks, beside `decodes` sequences that read `context` tokens."""
    row, done, chunk = {"request": 1.0, "constant": REQUEST_TOKEN * (new + cached)}, 0, budget - decodes
    while done < new:
        m = min(chunk, new - done)
        row = add(row, curve(LAUNCH, "L", m + decodes), {"attention": m * (cached + done) + m * m / 2})
        row = add(row, {"context": context, "mix_context": context})
        done += m
    return row


def solve(rows, names):
    """Weighted least squares by the normal equations; `rows` are (label, features, ms)."""
    n = len(names)
    a = [[0.0] * (n + 1) for _ in range(n)]
    for _, features, ms in rows:
        x = [features.get(name, 0.0) / ms for name in names]
        y = (ms - features.get("constant", 0.0)) / ms
        for i in range(n):
            for j in range(n):
                a[i][j] += x[i] * x[j]
            a[i][n] += x[i] * y
    scale = [math.sqrt(a[i][i]) or 1.0 for i in range(n)]
    a = [[a[i][j] / scale[i] / (scale[j] if j < n else 1.0) for j in range(n + 1)] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(a[k][i]))
        a[i], a[pivot] = a[pivot], a[i]
        for k in range(n):
            if k != i:
                factor = a[k][i] / a[i][i]
                a[k] = [u - factor * v for u, v in zip(a[k], a[i])]
    return {name: a[i][n] / a[i][i] / scale[i] for i, name in enumerate(names)}


def predicted(features, terms):
    return sum(terms.get(name, 1.0 if name == "constant" else 0.0) * value for name, value in features.items())


def show(title, terms, rows):
    print(f"# {title}")
    for name, value in terms.items():
        print(f"{name!s:>20} {value:.4g}")
    for label, features, ms in rows:
        guess = predicted(features, terms)
        print(f"{label:>40} {ms:8.1f} {guess:8.1f} {100 * (guess / ms - 1):+6.1f} %")


def load(name):
    return json.loads((HERE / "measured" / name).read_text())


def rank():
    """Llama 8B on one H100. Out: terms, rows that were fitted, rows that were not."""
    base, chunks = load("h100-llama8b.json"), load("h100-llama8b-chunk-budget.json")
    rows, apart = [], []
    for row in base["prefill"]:
        rows.append((f"prefill {row['isl']}", prefill(row["isl"], 0, 8192), row["ms"]))
    for layout in ("per_layer_blocks", "cross_layer_blocks"):
        for row in base[layout]:
            rows.append((f"prefill leg {row['isl']}", prefill(row["isl"], 0, 8192), row["prefill"]))
    for row in base["prefix"]:
        new = row["isl"] - row["cached"]
        rows.append((f"prefix {row['cached']} of {row['isl']}", prefill(new, row["cached"], 8192), row["ms"]))
    for row in base["prefill_batch"]:
        first, rest = prefill(row["isl"], 0, 8192), (row["batch"] - 1) * row["isl"]
        others = prefill(rest, 0, 8192)
        others["attention"] = (row["batch"] - 1) * row["isl"] ** 2 / 2
        label = f"batch {row['batch']} x {row['isl']}"
        apart.append((label, add(first, others, {"request": -1.0}), row["ms"]))
    for row in base["decode_shared"]:
        features = add(curve(LAUNCH, "L", row["batch"]), {"shared_context": row["batch"] * row["ctx"]})
        where = apart if row["batch"] == 256 else rows
        where.append((f"decode, shared {row['batch']} x {row['ctx']}", features, row["ms"]))
    for row in chunks["idle"]:
        where = apart if row["budget"] == 512 else rows
        where.append((f"idle {row['isl']} at {row['budget']}", prefill(row["isl"], 0, row["budget"]), row["ms"]))
    for row in chunks["decode"]:
        features = add(curve(LAUNCH, "L", row["batch"]), {"context": row["batch"] * CONTEXT})
        rows.append((f"decode {row['batch']} at {row['budget']}", features, row["ms"]))
    for row in chunks["mixed"]:
        n, context = row["batch"], row["batch"] * CONTEXT
        # The prompt arrives in the middle of a decode step, on average.
        wait = {name: value / 2 for name, value in add(curve(LAUNCH, "L", n), {"context": context}).items()}
        where = apart if row["budget"] == 512 else rows
        label = f"mixed 8000 beside {n} at {row['budget']}"
        where.append((label, add(prefill(8000, 0, row["budget"], n, context), wait), row["ttft8k"]))
    names = [("L", knot) for knot in LAUNCH]
    names += ["request", "attention", "context", "shared_context", "mix_context"]
    return solve(rows, names), rows, apart


def hand_over(terms):
    """What is left of a decode leg's TTFT without its request and its first step: fixed + per token."""
    for layout in ("per_layer_blocks", "cross_layer_blocks"):
        rows = []
        for row in load("h100-llama8b.json")[layout]:
            step = add(curve(LAUNCH, "L", 1), {"context": row["isl"], "request": 1.0})
            features = {"constant": predicted(step, terms), "fixed": 1.0, "token": row["isl"]}
            rows.append((f"{layout} {row['isl']}", features, row["decode_ttft"]))
        show(layout, solve(rows, ["fixed", "token"]), rows)


def group():
    """Qwen3 30B-A3B on two ranks of one expert-parallel group."""
    measured = load("h100x2-qwen3-30b-a3b.json")
    rows = []
    for row in measured["decode"]:
        fullest = max(row["b0"], row["b1"])
        features = curve(SEQUENCES, "base", row["b0"] + row["b1"])
        features = add(features, {"decode": fullest, "context": fullest * row["ctx"]})
        times = [row[rank] for rank in ("itl0", "itl1") if row[rank] is not None]
        rows.append((f"{row['b0']} + {row['b1']} x {row['ctx']}", features, sum(times) / len(times)))
    terms = solve(rows, [("base", knot) for knot in SEQUENCES] + ["decode", "context"])
    show("group, decode", terms, rows)
    rows = []
    for row in measured["prefill"]:
        features = {"constant": REQUEST_TOKEN * row["prefill"], "step": 1.0, "token": row["prefill"]}
        rows.append((f"prefill {row['prefill']}", features, row["ttft"]))
    show("group, prefill (step includes the request's fixed part)", solve(rows, ["step", "token"]), rows)


def main():
    terms, rows, apart = rank()
    show("rank", terms, rows)
    show("rank, rows that the fit did not use", {}, [(l, {"constant": predicted(f, terms)}, ms) for l, f, ms in apart])
    hand_over(terms)
    group()


if __name__ == "__main__":
    main()
