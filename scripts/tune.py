#!/usr/bin/env python3
"""Sweeps block sizes: which ones does this machine like best?

    python scripts/tune.py attention [--key-blocks 96,128,192] [--max-rows 64,96,128] [--shapes full,1,4,2048,64:...]
    python scripts/tune.py gemm [--kc 192,256,384] [--mc 48,96,192] [--nc 128,256,512] [--rows 128,256]
                                [--packed ab,a] [--shapes 512,512,512:128,384,384]
                                [--threads N] [--rounds 5] [--seconds 0.05] [--json]

A variant is one choice of every size, and all of them are tried. attention's sizes are constants: each variant is a
build of its own of benches' `measure`, with QKV_TUNE_KEY_BLOCK and QKV_TUNE_MAX_ROWS in the environment of the compiler
(one after the other in one folder, target/tune, so that few crates are compiled again). The sizes of a product are
arguments: `measure gemm --blocking`. "default" is the build or the call without any of it.

Every round runs every variant once on each shape, in an order that rotates from round to round; a run is `measure ...
--percent`, which measures the peak of multiply-adds right before and after the calls. The table shows the median over
the rounds, in percent of that peak, best first by the mean over the shapes. "default" is run twice in every round: what
lies between it and "default again" is noise, and so is any other difference of that size.

Exit codes: 0 done, 1 a build or a run failed, 2 bad arguments.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
AGAIN = "default again"
ALL_ROWS = 1 << 30


def numbers(text):
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("sizes are at least 1")
    return values


def attention_shape(text):
    mask, *sizes = text.split(",")
    if mask not in ("full", "causal") or len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text}: not of the form full,B,H,S,D")
    flags = [word for pair in zip(("--batch", "--heads", "--seq", "--dim"), sizes) for word in pair]
    return text, ["attention", *flags, *(["--causal"] if mask == "causal" else [])]


def gemm_shape(text):
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text}: not of the form M,K,N")
    return text, ["gemm", *(word for pair in zip(("--m", "--k", "--n"), sizes) for word in pair)]


def build(name, settings):
    """Builds `measure` with these variables set, and keeps a copy under this name."""
    target = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")), "tune")
    env = {k: v for k, v in os.environ.items() if not k.startswith("QKV_TUNE_")} | settings
    command = ["cargo", "build", "--quiet", "--release", "--package", "qkv-benches", "--bin", "measure"]
    subprocess.run([*command, "--target-dir", target], cwd=ROOT, env=env, check=True)
    program = os.path.join(target, "release", "measure")
    copy = os.path.join(target, "measure-" + name.replace(" ", "-"))
    shutil.copy2(program, copy)
    return copy


def attention_variants(args):
    """{name: (program, further arguments)}"""
    variants = {"default": (build("default", {}), [])}
    for key_block, max_rows in itertools.product(args.key_blocks, args.max_rows):
        name = f"keys {key_block} rows {max_rows}"
        say(f"building {name}")
        settings = {"QKV_TUNE_KEY_BLOCK": str(key_block), "QKV_TUNE_MAX_ROWS": str(max_rows)}
        variants[name] = (build(name, settings), [])
    return variants


def gemm_variants(args):
    program = build("default", {})
    variants = {"default": (program, [])}
    for kc, mc, nc, rows, packed in itertools.product(args.kc, args.mc, args.nc, args.rows, args.packed.split(",")):
        name = f"kc {kc} mc {mc} nc {nc} rows {'all' if rows == ALL_ROWS else rows} packed {packed}"
        variants[name] = (program, ["--blocking", f"{kc},{mc},{nc},{rows},{packed}"])
    return variants


def say(text):
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def percent(program, arguments, args):
    command = [program, *arguments, "--percent", "--seconds", str(args.seconds)]
    if args.threads:
        command += ["--threads", str(args.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def measure(variants, args):
    """{variant: [percents of all rounds] for each shape}"""
    names = [*variants, AGAIN]
    results = {name: [[] for _ in args.shapes] for name in names}
    for turn in range(args.rounds):
        shift = turn % len(names)
        for i, (label, shape) in enumerate(args.shapes):
            for name in names[shift:] + names[:shift]:
                say(f"round {turn + 1} of {args.rounds}, {label}: {name}")
                program, further = variants["default" if name == AGAIN else name]
                results[name][i].append(percent(program, [*shape, *further], args))
    say("")
    return results


def report(results, args):
    medians = {name: [statistics.median(p) for p in percents] for name, percents in results.items()}
    labels = [label for label, _ in args.shapes]
    if args.json:
        print(json.dumps({"shapes": labels, "medians": medians, "rounds": results}, indent=1))
        return
    width = max(map(len, medians))
    columns = [max(6, len(label) + 1) for label in labels]
    print(f"percent of the peak of multiply-adds, median of {args.rounds} rounds")
    print(" " * width + f"{'mean':>7}" + "".join(f"{label:>{w}}" for label, w in zip(labels, columns)))
    for name in sorted(medians, key=lambda n: -statistics.mean(medians[n])):
        cells = "".join(f"{p:{w}.1f}" for p, w in zip(medians[name], columns))
        print(f"{name:{width}}{statistics.mean(medians[name]):7.1f}{cells}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=int)
    common.add_argument("--rounds", type=int, default=5)
    common.add_argument("--seconds", type=float, default=0.05, help="least length of the timed calls of a run")
    common.add_argument("--json", action="store_true")
    kinds = parser.add_subparsers(dest="kind", required=True)

    attention = kinds.add_parser("attention", parents=[common])
    attention.add_argument("--key-blocks", type=numbers, default=[64, 96, 128, 192, 256])
    attention.add_argument("--max-rows", type=numbers, default=[48, 96, 192])
    attention.add_argument(
        "--shapes",
        type=lambda text: [attention_shape(shape) for shape in text.split(":")],
        default="full,1,4,2048,64:causal,1,4,2048,64:full,1,4,2048,128:full,1,12,512,64:full,8,12,128,64",
    )

    gemm = kinds.add_parser("gemm", parents=[common])
    gemm.add_argument("--kc", type=numbers, default=[192, 256, 384])
    gemm.add_argument("--mc", type=numbers, default=[48, 96, 192])
    gemm.add_argument("--nc", type=numbers, default=[128, 256, 512])
    gemm.add_argument("--rows", type=numbers, default=[ALL_ROWS], help="rows of a task; default: all")
    gemm.add_argument("--packed", default="ab", help="what is packed: a, b, ab or none, separated by commas")
    gemm.add_argument(
        "--shapes",
        type=lambda text: [gemm_shape(shape) for shape in text.split(":")],
        default="256,256,256:512,512,512:1024,1024,1024:128,1536,384",
    )
    args = parser.parse_args()
    try:
        variants = (attention_variants if args.kind == "attention" else gemm_variants)(args)
        report(measure(variants, args), args)
    except subprocess.CalledProcessError as problem:
        say("")
        print(f"tune: {' '.join(map(str, problem.cmd))} failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
