"""What a call through Python costs beyond the same call from Rust, in microseconds: tiny problems, every kind of array.

    python crates/python/benches/overhead.py

Builds and runs examples/tiny.rs for the Rust side (cargo is needed). The best of several rounds, on one thread's time: a
quiet machine gives the numbers that docs/PYTHON.md states.
"""

import pathlib
import subprocess
import timeit

import numpy as np

import qkv

HERE = pathlib.Path(__file__).parent


def microseconds(call):
    """The best of 20 rounds."""
    calls = 2000
    return min(timeit.repeat(call, number=calls, repeat=20)) / calls * 1e6


def rust():
    """(heads, length, dim) -> microseconds from Rust."""
    command = ["cargo", "run", "--release", "--quiet", "-p", "qkv-python", "--example", "tiny"]
    lines = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout.splitlines()
    return {tuple(map(int, line.split()[:3])): float(line.split()[3]) for line in lines}


class Exporter:
    """Some other library: nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


def main():
    try:
        import torch
    except ModuleNotFoundError:
        torch = None
    kinds = {"numpy": np.asarray, "DLPack": Exporter}
    if torch:
        kinds["torch"] = torch.from_numpy
    rng = np.random.default_rng(0)
    print(f"{'heads, length, dim':20} {'arrays':8} {'call':>8} {'attention':>10} {'+ lse, mask':>12} {'sdpa':>8}   over Rust, us")
    for (heads, length, dim), base in rust().items():
        arrays = [rng.standard_normal((1, heads, length, dim)).astype(np.float32) for _ in range(3)]
        print(f"{heads}, {length}, {dim:<14} {'Rust':8} {base:8.2f}")
        for kind, make in kinds.items():
            q, k, v = map(make, arrays)
            mask = make(np.ones((length, length), bool))
            call = microseconds(lambda: qkv.attention(q, k, v))
            full = microseconds(lambda: qkv.attention(q, k, v, mask=mask, return_lse=True))
            sdpa = microseconds(lambda: qkv.scaled_dot_product_attention(q, k, v))
            print(f"{'':20} {kind:8} {call:8.2f} {call - base:10.2f} {full - base:12.2f} {sdpa - base:8.2f}")
        if torch:
            q, k, v = map(torch.from_numpy, arrays)
            its = microseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
            print(f"{'':20} torch's own {its:5.2f}")


if __name__ == "__main__":
    main()
