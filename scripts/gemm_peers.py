#!/usr/bin/env python3
"""Times single-precision matrix multiplication of other libraries: cblas_sgemm of MKL, OpenBLAS and BLIS.

    python scripts/gemm_peers.py [--threads 2] [--rounds 7] [--seconds 0.05] [--json] [--only mkl,openblas]
                                 [--shapes 64,64,64:8,4096,4096] [--qkv PATH]

C (m, n) = A (m, k) B (k, n), all row-major and dense, alpha 1, beta 0; 2 m k n operations. How the turns are taken is
told in peers.py. The libraries are loaded through ctypes, from whatever is installed; one that is not is skipped:

    mkl               libmkl_rt of the Python package mkl
    openblas          the OpenBLAS that numpy brings along, or else scipy's
    openblas-system   libopenblas.so.0 (Debian: libopenblas0-pthread)
    blis              libblis.so.4 (Debian: libblis4-openmp; libblis4-pthread starts its threads anew in every call)

A call through ctypes costs a microsecond or so, which a C program would not pay. So libc's labs is timed in the same
way, called with the same fourteen arguments, and the least time it took in a turn is subtracted from each call's. The kernel
that a library picked for this processor is shown (asked through threadpoolctl, where that is installed).

--qkv PATH: one more column, from a program run as `PATH gemm --m M --k K --n N --seconds S` in each turn, whose last
printed word is GFLOP/s.
"""

import argparse
import array
import ctypes
import glob
import importlib.util
import math
import mmap
import os
import random
import sys
import sysconfig

import peers

CUBES = [(n, n, n) for n in (64, 128, 256, 512, 1024, 2048)]
SHAPES = CUBES + [(128, 384, 384), (128, 1536, 384), (512, 3072, 768), (8, 4096, 4096), (1, 4096, 4096)]
ROW_MAJOR, NO_TRANSPOSE = 101, 111


def package_files(package, pattern):
    """Files in the folder of bundled libraries that a wheel leaves beside its package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return []
    site = os.path.dirname(os.path.dirname(spec.origin))
    return sorted(glob.glob(os.path.join(site, f"{package}.libs", pattern)))


def candidates(name):
    """(file, symbol of cblas_sgemm, its integer type) in order of preference."""
    short, long = ctypes.c_int32, ctypes.c_int64
    if name == "mkl":
        found = sorted(glob.glob(os.path.join(sysconfig.get_path("data"), "lib", "libmkl_rt.so*")))
        return [(path, "cblas_sgemm", short) for path in found] + [("libmkl_rt.so", "cblas_sgemm", short)]
    if name == "openblas":
        wide = [(p, "scipy_cblas_sgemm64_", long) for p in package_files("numpy", "libscipy_openblas64_*.so*")]
        return wide + [(p, "scipy_cblas_sgemm", short) for p in package_files("scipy", "libscipy_openblas-*.so*")]
    if name == "openblas-system":
        return [("libopenblas.so.0", "cblas_sgemm", short)]
    found = sorted(glob.glob("/usr/lib/*/blis-openmp/libblis.so.*"), reverse=True)
    return [(path, "cblas_sgemm", short) for path in (*found, "libblis.so.4", "libblis.so.3")]


NAMES = ["mkl", "openblas", "openblas-system", "blis"]


def load(name):
    """(function, what to tell about it), or None and the reason."""
    why = "not installed"
    for path, symbol, integer in candidates(name):
        try:
            function = getattr(ctypes.CDLL(path), symbol)
        except (OSError, AttributeError) as problem:
            why = why if os.path.sep not in path else f"does not load: {os.path.basename(path)}: {problem}"
            continue
        function.restype = None
        function.argtypes = (
            [ctypes.c_int] * 3 + [integer] * 3 + [ctypes.c_float, ctypes.c_void_p, integer, ctypes.c_void_p, integer]
        ) + [ctypes.c_float, ctypes.c_void_p, integer]
        return function, {"file": os.path.basename(path)}
    return None, {"missing": why}


def describe(name):
    """Version, threads and kernel of the one BLAS that is loaded."""
    try:
        import threadpoolctl
    except ImportError:
        return {"kernel": "unknown (threadpoolctl is not installed)"}
    wanted = {"version": "version", "num_threads": "threads", "threading_layer": "threading", "architecture": "kernel"}
    for info in threadpoolctl.threadpool_info():
        if info["internal_api"] == name.split("-")[0]:
            return {wanted[key]: info[key] for key in wanted if info.get(key) is not None}
    return {"kernel": "unknown"}


def matrix(rows, columns, seed):
    """A page-aligned f32 matrix of repeated random numbers: (memory, address)."""
    count = rows * columns
    memory = mmap.mmap(-1, 4 * count)
    numbers = random.Random(seed)
    pattern = array.array("f", [numbers.uniform(-1, 1) for _ in range(min(count, 65521))]).tobytes()
    for start in range(0, 4 * count, len(pattern)):
        memory[start : start + len(pattern)] = pattern[: 4 * count - start]
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))


def check(shape, a, b, c):
    """The largest error of a few elements of C, computed again in double precision."""
    m, k, n = shape
    a, b, c = (memoryview(x).cast("B").cast("f") for x in (a, b, c))
    worst = 0.0
    for i, j in ((0, 0), (m // 2, n // 3), (m - 1, n - 1)):
        worst = max(worst, abs(c[i * n + j] - math.fsum(a[i * k + p] * b[p * n + j] for p in range(k))))
    return worst


def child(name):
    sgemm, about = load(name)
    state = {}
    nothing = ctypes.CDLL(None).labs
    if sgemm is not None:
        nothing.argtypes = sgemm.argtypes

    def product(shape):
        m, k, n = shape
        (a, pa), (b, pb), (c, pc) = matrix(m, k, 1), matrix(k, n, 2), matrix(m, n, 3)
        head, tail = (ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE), (1.0, pa, k, pb, n, 0.0, pc, n)
        whole = (*head, m, n, k, *tail)
        sgemm(*whole)
        error = check(shape, a, b, c)
        assert error < 1e-6 * k, f"wrong product, error {error}"
        state.update(shape=shape, memory=(a, b, c), whole=lambda: sgemm(*whole), nothing=lambda: nothing(*whole))
        return {"error": error}

    def answer(shape, seconds):
        extra = {} if state.get("shape") == shape else product(shape)
        # In the same turn, before and after: what it costs changes with the machine as everything does.
        overheads = [peers.stretch(state["nothing"], 0.001) for _ in range(5)]
        each = peers.stretch(state["whole"], seconds)
        overheads += [peers.stretch(state["nothing"], 0.001) for _ in range(5)]
        return {"gflops": 2e-9 * math.prod(shape) / (each - min(overheads)), **extra}

    def hello():
        if sgemm is not None:
            _memory, pa = matrix(64, 64, 1)
            sgemm(ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, 32, 32, 32, 1.0, pa, 64, pa, 64, 0.0, pa + 8192, 64)
            about.update(describe(name))
        return about

    peers.serve(hello, answer)


def qkv_arguments(shape):
    return ["gemm", "--m", shape[0], "--k", shape[1], "--n", shape[2]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    peers.add_arguments(parser)
    parser.add_argument("--shapes", help="m,k,n:m,k,n:... instead of the built-in list")
    parser.add_argument("--qkv", metavar="PATH", help="a program that times qkv's own product")
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    cases = [[int(x) for x in s.split(",")] for s in args.shapes.split(":")] if args.shapes else list(map(list, SHAPES))
    libraries = os.path.join(sysconfig.get_path("data"), "lib")
    paths = {"LD_LIBRARY_PATH": ":".join(filter(None, [libraries, os.environ.get("LD_LIBRARY_PATH")]))}
    names = [name for name in NAMES if not args.only or name in args.only.split(",")]
    columns = []
    try:
        for name in names:
            columns.append(peers.Child(sys.argv[0], name, args.threads, paths if name == "mkl" else None))
        if args.qkv:
            columns.append(peers.External("qkv", args.qkv, qkv_arguments, args.threads))
        results = peers.alternate(columns, cases, args.rounds, args.seconds)
    finally:
        for column in columns:
            column.close()
    peers.report(columns, cases, ["x".join(map(str, case)) for case in cases], results, args)


if __name__ == "__main__":
    main()
