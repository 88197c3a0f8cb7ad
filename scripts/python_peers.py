#!/usr/bin/env python3
"""Times attention through Python on the CPU: qkv beside PyTorch, ONNX Runtime, OpenVINO and candle's flash attention.

    python scripts/python_peers.py [--only causal-512,decode-f32] [--threads 2] [--rounds 7] [--seconds 0.2] [--json]
                                   [--candle PATH] [--without WORDS] [--spin] [--list]

prints one table of times per call, and of how many times quicker qkv is than the quickest of them and than PyTorch:

    | row                |     qkv |   torch | onnxruntime | openvino |  best/qkv (goal) | torch/qkv (goal) | error |
    | full, S 2048, d 64 | 20.0 ms | 25.0 ms |     21.0 ms |  22.0 ms | 1.05 x (1.08) no | 1.25 x (1.20) ok | 9e-07 |

(made-up numbers). Below it stands how each library was called, and how its other ways did. --json prints everything,
every round included.

All contestants of a row live in this process, are given the same numbers, and must agree: qkv's result is compared
with float64 on one head ("error"), all others with qkv's ("difference", the largest; both as parts of the largest
output); who is further off than the tolerance of the row's type is skipped. A library that has several ways to call
it (attention_ways.py) is timed on each, shortly, and keeps the quickest (--without stateful,flex leaves out those
with such a word in their name). Then come the rounds: in each every contestant gets one stretch of at least
--seconds, after an untimed one of a tenth, and the order rotates from round to round. The result is the median of
rounds. Decoding goes through copies of the cache in turn, together more than three times the last-level cache, so
that keys and values come from memory.

Each library has --threads threads. Their pools should not spin while it is not their turn, so OMP_WAIT_POLICY and
KMP_BLOCKTIME (PyTorch) and session.intra_op.allow_spinning (ONNX Runtime) say so; OpenVINO (TBB) and qkv (rayon) do
not for long. --spin leaves the first two as they come, which can be a little quicker on short calls; a pause before
every stretch then keeps them out of the next one's way.

A library that is not installed is skipped with a word. --candle PATH adds a column for some rows: a program run in
every turn as `PATH --batch B --heads H --seq S --dim D [--causal] --seconds T`, whose last printed word is GFLOP/s,
built by

    cargo build --release -p qkv-benches --example candle_flash     (target/release/examples/candle_flash)
"""

import argparse
import dataclasses
import gc
import itertools
import json
import os
import statistics
import sys
import time

import peers

TOLERANCE = {"f32": 2e-5, "f16": 5e-3, "bf16": 3e-2}
PAUSE = 0.25  # seconds, with --spin: longer than Intel's OpenMP keeps spinning


@dataclasses.dataclass
class Row:
    name: str
    label: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    goal: float
    torch_goal: float | None = None
    candle_goal: float | None = None
    kind: str = "f32"
    causal: bool = False
    window: int | None = None  # keys that a query sees, its own among them
    bias: bool = False
    padded: bool = False
    candle: bool = False
    copies: int = 1

    def __str__(self):
        return self.name

    def flops(self):
        """As the other scripts count them: 4 d for each score, half of them for causal. For candle's column only."""
        return (2 if self.causal else 4) * self.batch * self.heads * self.queries * self.keys * self.dim

    def cache_bytes(self):
        return 2 * self.batch * self.kv_heads * self.keys * self.dim * (4 if self.kind == "f32" else 2)


def square(name, label, batch, heads, length, dim, goal, *goals, **more):
    return Row(name, label, batch, heads, heads, length, length, dim, goal, *goals, **more)


def decode(name, label, kv_heads, keys, goal, *goals, **more):
    return Row(name, label, 1, 32, kv_heads, 1, keys, 128, goal, *goals, **more)


ROWS = [
    square("full-64", "full, S 2048, d 64", 1, 4, 2048, 64, 1.08, 1.2, 8.0, candle=True),
    square("full-128", "full, S 2048, d 128", 1, 4, 2048, 128, 1.12, 1.15, 8.0, candle=True),
    square("causal-2048", "causal, S 2048, d 64", 1, 4, 2048, 64, 1.35, 1.45, 8.0, causal=True, candle=True),
    square("causal-512", "causal, S 512, d 64", 1, 12, 512, 64, 1.8, 2.2, 8.0, causal=True, candle=True),
    square("batch-8", "full, B 8, S 128, d 64", 8, 12, 128, 64, 1.05, 1.3, 8.0, candle=True),
    square("bias", "bias (1,H,S,S), S 2048, d 64", 1, 4, 2048, 64, 1.0, 1.2, bias=True),
    square("padding", "padding mask, B 8, S 512, d 64", 8, 12, 512, 64, 1.5, padded=True),
    square("window", "window 256, causal, S 4096, d 64", 1, 4, 4096, 64, 4.0, 8.0, causal=True, window=256),
    decode("decode-f32", "decode f32, 32 heads over 8", 8, 8192, 2.1),
    decode("decode-bf16", "decode bf16, 32 heads over 8", 8, 8192, 2.2, kind="bf16"),
    decode("decode-f16", "decode f16, 32 heads over 8", 8, 8192, 2.2, kind="f16"),
    decode("decode-ungrouped", "decode f32, 32 heads over 32", 32, 4096, 1.1, 1.7),
    square("prefill-bf16", "prefill bf16, causal, S 2048, d 128", 1, 4, 2048, 128, 1.25, causal=True, kind="bf16"),
    square("prefill-f16", "prefill f16, causal, S 2048, d 128", 1, 4, 2048, 128, 1.25, causal=True, kind="f16"),
]


def last_level_cache():
    """Bytes of the largest cache of the first CPU, or 32 MiB where the system does not say."""
    folder, sizes = "/sys/devices/system/cpu/cpu0/cache", []
    try:
        for index in os.listdir(folder):
            if index.startswith("index"):
                with open(f"{folder}/{index}/size", encoding="ascii") as file:
                    sizes.append(int(file.read().strip().rstrip("K")) << 10)
    except (OSError, ValueError):
        pass
    return max(sizes, default=32 << 20)


def copies(row):
    """How many caches it takes to fill more than three times the last-level cache; one where nothing is decoded."""
    if row.queries > 1:
        return 1
    return 3 * last_level_cache() // row.cache_bytes() + 1


def environment(threads, spin):
    """Set before anything is imported that reads it."""
    os.environ.update(peers.child_environment(threads))
    if not spin:
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0")


def reference(row, inputs):
    """The last head of the last batch in float64."""
    import numpy as np

    group = row.heads // row.kv_heads
    (k, v), head = inputs.caches[0], row.heads - 1
    q, k, v = (x.astype(np.float64) for x in (inputs.q[-1, head], k[-1, head // group], v[-1, head // group]))
    scores = q @ k.T / np.sqrt(row.dim)
    if row.bias:
        scores += inputs.bias[-1, head]
    if row.padded:
        scores[:, inputs.lengths[-1] :] = -np.inf
    if row.causal:
        scores[np.triu_indices_from(scores, 1)] = -np.inf
    if row.window:
        scores[~inputs.band] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


class Contestant:
    """A library on one row, called in its quickest way. `tried` is what is told of every way."""

    def __init__(self, library, row, inputs, expected, args):
        self.name, self.call, self.tried, self.error, self.result = library.name, None, {}, None, None
        self.pause, self.way, self.before = PAUSE if args.spin else 0.0, None, None
        best = None
        for name, set_up in library.ways(row, inputs):
            if any(word in name for word in args.without):
                continue
            try:
                calls, as_heads, *before = set_up()
                results = [as_heads(call()) for call in calls]
                scale = float(abs(results[0]).max())
                error = max(self.difference(result, expected) for result in results) / scale
                if not error <= TOLERANCE[row.kind]:
                    self.tried[name] = {"skipped": f"another result: {error:.1e} off"}
                    continue
                turns = itertools.cycle(calls)
                call = lambda turns=turns: next(turns)()
                rounds = [self.stretch(call, before, min(args.seconds, 0.1)) for _ in range(3)]
                self.tried[name] = {"seconds": statistics.median(rounds), "error": error}
                if best is None or self.tried[name]["seconds"] < best:
                    best = self.tried[name]["seconds"]
                    self.call, self.before, self.way, self.error, self.result = call, before, name, error, results[0]
            except Exception as problem:  # a way that a library does not have, or no longer
                self.tried[name] = {"skipped": f"{type(problem).__name__}: {problem}".split("\n")[0][:160]}
            set_up = calls = as_heads = before = turns = call = results = None  # memory for the next way
            gc.collect()

    @staticmethod
    def difference(result, expected):
        import numpy as np

        # qkv is compared with one head, the others with all that qkv gave.
        if expected.ndim == 2:
            result = result[-1, -1]
        if result.shape != expected.shape:
            return float("inf")
        return float(np.abs(result - expected).max())

    def time(self, row, seconds):
        """Calls per second."""
        if self.call is None:
            return None
        time.sleep(self.pause)
        return 1 / self.stretch(self.call, self.before, seconds)

    @staticmethod
    def stretch(call, before, seconds):
        for prepare in before:
            prepare()
        return peers.stretch(call, seconds)


class Candle(peers.External):
    """candle's flash attention, in a program of its own; the rate is calls per second here too."""

    def __init__(self, path, threads):
        def arguments(row):
            sizes = {"--batch": row.batch, "--heads": row.heads, "--seq": row.queries, "--dim": row.dim}
            return [*itertools.chain(*sizes.items()), *(["--causal"] if row.causal else [])]

        super().__init__("candle flash", path, arguments, threads)

    def time(self, row, seconds):
        rate = super().time(row, seconds)
        return None if rate is None else 1e9 * rate / row.flops()


def measure(row, libraries, candle, args):
    """Everything about one row, as it is printed by --json."""
    from attention_ways import Inputs

    row.copies = copies(row)
    inputs = Inputs(row)
    expected, contestants = reference(row, inputs), []
    for library in libraries:
        contestants.append(Contestant(library, row, inputs, expected, args))
        if library.name == "qkv":
            if contestants[0].result is None:
                raise SystemExit(f"{row.name}: qkv failed: {contestants[0].tried}")
            expected = contestants[0].result
    timed = contestants + ([candle] if candle and row.candle else [])
    rates = peers.alternate(timed, [row], args.rounds, args.seconds)[0]
    rounds = {name: [1 / rate for rate in values] for name, values in rates.items()}
    medians = {name: statistics.median(values) for name, values in rounds.items() if values}
    found = {"row": row.name, "label": row.label, "seconds": medians, "rounds": rounds}
    megabytes = row.cache_bytes() >> 20
    found["caches"] = f"{row.copies} x {megabytes} MiB of keys and values in turn" if row.queries == 1 else None
    found["ways"] = {c.name: {"taken": c.way, "tried": c.tried} for c in contestants}
    found["error"] = contestants[0].error
    found["largest difference"] = max((c.error for c in contestants[1:] if c.error is not None), default=None)
    rivals = [medians[name] for name in ("torch", "onnxruntime", "openvino") if name in medians]
    for name, rival, goal in (
        ("best", min(rivals, default=None), row.goal),
        ("torch", medians.get("torch"), row.torch_goal),
        ("candle flash", medians.get("candle flash"), row.candle_goal),
    ):
        found[f"{name} ratio"] = {"ratio": rival and rival / medians["qkv"], "goal": goal}
    return found


def duration(seconds):
    if seconds is None:
        return "-"
    value, unit = (1e6 * seconds, "us") if seconds < 1e-3 else (1e3 * seconds, "ms")
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def ratio(entry):
    if entry["ratio"] is None:
        return "-"
    if entry["goal"] is None:
        return f"{entry['ratio']:.2f} x"
    return f"{entry['ratio']:.2f} x ({entry['goal']:.2f}) {'ok' if entry['ratio'] >= entry['goal'] else 'no'}"


def table(found, names, candle):
    """The table as lines of Markdown, which reads as well on a terminal."""
    head = ["row", *names, "best/qkv (goal)", "torch/qkv (goal)"]
    head += ["candle/qkv (goal)"] * candle + ["error", "difference"]
    lines = [head]
    for row in found:
        cells = [row["label"], *(duration(row["seconds"].get(name)) for name in names)]
        cells += [ratio(row[f"{name} ratio"]) for name in ["best", "torch", *["candle flash"] * candle]]
        errors = (row["error"], row["largest difference"])
        lines.append(cells + ["-" if e is None else f"{e:.0e}" for e in errors])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in lines:
        yield (
            "| "
            + " | ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths)))
            + " |"
        )


def ways(found):
    """Who was called how: the way taken first, with the time of its trial, then the others."""
    for row in found:
        yield row["label"] + (f" ({row['caches']})" if row["caches"] else "")
        for name, entry in row["ways"].items():
            tried = entry["tried"]
            words = [
                f"{way} {duration(tried[way]['seconds']) if 'seconds' in tried[way] else tried[way]['skipped']}"
                for way in sorted(tried, key=lambda way: tried[way].get("seconds", float("inf")))
            ]
            yield f"  {name}: " + ("; ".join(words) or "no way to do it")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    peers.add_timing_arguments(parser, seconds=0.2, only="rows")
    parser.add_argument("--candle", metavar="PATH", help="the program candle_flash")
    parser.add_argument(
        "--without",
        type=lambda words: words.split(","),
        default=[],
        help="no ways with one of these words in their name",
    )
    parser.add_argument("--spin", action="store_true", help="let idle thread pools spin, as they do by default")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{row.name:18}{row.label}" for row in ROWS))
        return
    wanted = args.only.split(",") if args.only else [row.name for row in ROWS]
    unknown = set(wanted) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))} (see --list)")
    environment(args.threads, args.spin)
    from attention_ways import LIBRARIES

    libraries, about = [], {}
    for kind in LIBRARIES:
        try:
            libraries.append(kind(args.threads, args.spin))
            about[kind.name] = libraries[-1].about
        except ImportError as problem:
            if kind.name == "qkv":
                parser.error(f"qkv is not installed: {problem}")
            about[kind.name] = {"missing": f"not installed ({problem})"}
    candle = Candle(args.candle, args.threads) if args.candle else None
    if candle:
        about[candle.name] = candle.about
    started, found = time.perf_counter(), []
    for row in ROWS:
        if row.name in wanted:
            found.append(measure(row, libraries, candle, args))
            gc.collect()
    took = time.perf_counter() - started
    setting = {"command": " ".join(sys.argv), "cpu": peers.cpu_name(), "threads": args.threads, "rounds": args.rounds}
    setting |= {"seconds": args.seconds, "spin": args.spin, "last-level cache": last_level_cache(), "took": took}
    if args.json:
        print(json.dumps({**setting, "libraries": about, "rows": found}, indent=1))
        return
    print(
        f"python {setting['command']}\n"
        f"{setting['cpu']}, {args.threads} threads, last-level cache {last_level_cache() >> 20} MiB"
    )
    for name, facts in about.items():
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"Time per call, median of {args.rounds} rounds of {args.seconds} s.\n")
    names = [library.name for library in libraries] + ([candle.name] if candle else [])
    print("\n".join(table(found, names, bool(candle))))
    print("\nHow each was called (the first is what the table shows; times of a short trial):\n")
    print("\n".join(ways(found)))
    print(f"\n{took:.0f} s in all.")


if __name__ == "__main__":
    main()
