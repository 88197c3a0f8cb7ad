"""Threads, forks, the environment, and the package itself: names, documentation, types."""

import ast
import doctest
import inspect
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import qkv


@pytest.fixture
def threads():
    """Puts the number of threads back."""
    before = qkv.num_threads()
    yield before
    qkv.set_num_threads(before)


@pytest.fixture
def problem(rng):
    """One that is large enough for several threads."""
    return [rng.standard_normal((1, 8, n, 64)).astype(np.float32) for n in (256, 512, 512)]


def python(code, **environment):
    """Runs code in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QKV_")} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


# -- threads ---------------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_threads(problem, threads):
    a, b = problem[0][0], problem[1][0].swapaxes(1, 2)
    expected = qkv.attention(*problem, return_lse=True), qkv.matmul(a, b)
    for n in (1, 2, 3, 7):
        qkv.set_num_threads(n)
        assert qkv.num_threads() == n
        out, lse = qkv.attention(*problem, return_lse=True)
        np.testing.assert_array_equal(out, expected[0][0])
        np.testing.assert_array_equal(lse, expected[0][1])
        np.testing.assert_array_equal(qkv.matmul(a, b), expected[1])


@pytest.mark.parametrize(
    "n, error",
    [
        (0, ValueError),
        (-1, ValueError),
        (10**6, ValueError),
        (2**70, ValueError),
        (-(2**70), ValueError),
        (1.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_counts_of_threads_that_are_refused(threads, n, error):
    with pytest.raises(error, match="^n: .*expected 1 to 1024 threads"):
        qkv.set_num_threads(n)
    assert qkv.num_threads() == threads


def test_threads_by_the_environment_and_before_the_first_use():
    code = "import qkv; {}; print(qkv.num_threads())"
    assert python(code.format("pass"), RAYON_NUM_THREADS="3").stdout == "3\n"
    assert python(code.format("qkv.set_num_threads(5)"), RAYON_NUM_THREADS="3").stdout == "5\n"
    count = """
import numpy as np, qkv, threading
def threads():
    return int(next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1])
before = threads()
qkv.set_num_threads(4)
x = np.ones((1, 8, 300, 64), np.float32)
qkv.attention(x, x, x)
print(threads() - before)
"""
    if os.path.exists("/proc/self/status"):
        # One pool, not a second one beside it.
        assert python(count).stdout == "4\n"


# Threads of a GiB each, and room for a few.
LIMITED = """
import resource, numpy as np, qkv
x = np.ones((1, 8, 256, 64), np.float32)
small = x[:, :1, :4]
expected = qkv.attention(small, small, small)
def limit():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (11 << 29), resource.RLIM_INFINITY))
def refused():
    try:
        qkv.set_num_threads(1024)
    except RuntimeError as error:
        assert str(error).startswith("threads could not be started"), error
        return True
def computes():
    for _ in range(3000):
        assert np.array_equal(qkv.attention(small, small, small), expected)
    assert np.allclose(qkv.attention(x, x, x), 1)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="not Linux")
@pytest.mark.parametrize(
    "code",
    [
        "limit(); assert refused(); computes(); qkv.set_num_threads(2); computes(); assert qkv.num_threads() == 2",
        # The pool that is there stays where another cannot be.
        "qkv.set_num_threads(2); limit(); assert refused(); computes(); assert qkv.num_threads() == 2",
        # The first use starts fewer than the environment asks for, whichever use it is.
        "limit(); computes(); assert 1 <= qkv.num_threads() < 64; qkv.set_num_threads(3); computes()",
        "limit(); qkv.attention(x, x, x); computes()",
        "limit(); assert 1 <= qkv.num_threads() < 64; computes()",
    ],
)
def test_threads_that_cannot_be_started(code):
    environment = {} if "refused" in code else {"RAYON_NUM_THREADS": "64"}
    ran = python(LIMITED + code, RUST_MIN_STACK=str(1 << 30), MALLOC_ARENA_MAX="1", **environment)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="not Linux")
def test_a_few_small_calls_start_no_threads():
    code = """
import numpy as np, qkv
def threads():
    return next(line for line in open("/proc/self/status") if line.startswith("Threads")).split()[1]
before = threads()
x = np.ones((1, 1, 4, 8), np.float32)
for _ in range(20):
    qkv.attention(x, x, x)
assert threads() == before
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stderr


def test_several_python_threads_at_once(problem, threads):
    expected = [qkv.attention(*problem, causal=offset) for offset in range(4)]
    failures = []

    def work(index):
        try:
            for turn in range(5):
                if index == 0:
                    qkv.set_num_threads(1 + turn % 3)
                np.testing.assert_array_equal(qkv.attention(*problem, causal=index), expected[index])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_the_gil_is_released(rng, threads):
    qkv.set_num_threads(1)
    x = rng.standard_normal((1, 8, 2048, 64)).astype(np.float32)
    count, stop = 0, threading.Event()

    def counter():
        nonlocal count
        while not stop.is_set():
            count += 1
            time.sleep(0)

    other = threading.Thread(target=counter)
    before = sys.getswitchinterval()
    # The counter cannot take the GIL away by force: it runs only where the call lets go of it.
    sys.setswitchinterval(100)
    try:
        other.start()
        time.sleep(0.05)
        at_start = count
        qkv.attention(x, x, x)
        during = count - at_start
    finally:
        sys.setswitchinterval(before)
        stop.set()
        other.join()
    # The call takes a tenth of a second or more; a turn of the counter takes microseconds.
    assert during > 20


def small_products(x):
    """So many in a row that threads of the pool stay awake for them."""
    x = np.ascontiguousarray(x[0, 0, :64])
    return [qkv.matmul(x, x) for _ in range(1000)][-1]


def in_child(queue, x, n):
    small = small_products(x)
    if n is not None:
        qkv.set_num_threads(n)
    large = qkv.attention(x, x, x, causal="top_left"), qkv.matmul(x, x.swapaxes(2, 3))
    queue.put((qkv.num_threads(), *large, small))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork")
@pytest.mark.parametrize("own_pool", [False, True])
@pytest.mark.parametrize("n", [None, 2])
def test_children_of_a_fork_compute(rng, threads, own_pool, n):
    if own_pool:
        qkv.set_num_threads(3)
    x = rng.standard_normal((1, 8, 300, 64)).astype(np.float32)
    # The parent's threads are there before the fork.
    expected = qkv.attention(x, x, x, causal="top_left"), qkv.matmul(x, x.swapaxes(2, 3)), small_products(x)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=in_child, args=(queue, x, n)) for _ in range(2)]
    for child in children:
        child.start()
    deadline = time.monotonic() + 120
    results = []
    while len(results) < 2 and time.monotonic() < deadline:
        if queue.empty():
            time.sleep(0.01)
        else:
            results.append(queue.get())
    for child in children:
        if len(results) < 2:
            child.kill()
        child.join()
    assert len(results) == 2, "a child hangs"
    for count, *found in results:
        assert count == n or n is None and count == (3 if own_pool else count) and count >= 1
        for result, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(result, other)
    # The parent goes on.
    np.testing.assert_array_equal(qkv.attention(x, x, x, causal="top_left"), expected[0])


# -- the environment -------------------------------------------------------------------------------------------------------


def test_cpu_info():
    info = qkv.cpu_info()
    assert list(info) == ["isa", "cores", "l1d", "l2", "l3"]
    assert info["isa"] in ("portable", "avx2", "avx512", "neon", "simd128") and info["cores"] >= 1
    assert info["l1d"] >= 4096 and info["l2"] >= info["l1d"] and info["l3"] >= 0


def test_an_instruction_set_by_the_environment():
    code = "import numpy as np, qkv; x = np.ones((1, 1, 2, 8), 'f'); {}; print(qkv.cpu_info()['isa'])"
    assert python(code.format("qkv.attention(x, x, x)"), QKV_ISA="portable").stdout == "portable\n"
    for call in (
        "qkv.attention(x, x, x)",
        "qkv.matmul(x, x.swapaxes(2, 3))",
        "qkv.scaled_dot_product_attention(x, x, x)",
        "pass",
    ):
        failed = python(code.format(call), QKV_ISA="mmx")
        assert failed.returncode == 1
        assert 'RuntimeError: QKV_ISA: unknown instruction set "mmx": expected one of portable' in failed.stderr


# -- the package -----------------------------------------------------------------------------------------------------------

NAMES = [
    "attention",
    "cpu_info",
    "matmul",
    "merge_states",
    "num_threads",
    "scaled_dot_product_attention",
    "set_num_threads",
]
SOURCES = pathlib.Path(qkv.__file__).parent


def test_names():
    assert sorted(name for name in qkv.__all__ if not name.startswith("_")) == NAMES
    assert qkv.__version__.count(".") == 2
    for name in NAMES:
        assert getattr(qkv, name).__doc__
    assert {"flash_attn", "onnx", "torch", "transformers"} <= set(dir(qkv))
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        qkv.flash  # noqa: B018
    assert (SOURCES / "py.typed").exists()


def test_importing_qkv_imports_no_other_library():
    code = "import qkv, sys; print(sorted({'torch', 'onnx', 'transformers', 'ml_dtypes'} & set(sys.modules)))"
    assert python(code).stdout == "[]\n"


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_types_agree(name):
    """What inspect says is what the stubs say: names, kinds and defaults."""
    tree = ast.parse((SOURCES / "_qkv.pyi").read_text())
    stubs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    signature = inspect.signature(getattr(qkv, name))
    assert stubs
    for stub in stubs:
        arguments = stub.args
        positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        keyword = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert [a.arg for a in arguments.args] == positional
        assert [a.arg for a in arguments.kwonlyargs] == keyword
        defaults = arguments.defaults + [d for d in arguments.kw_defaults if d is not None]
        required = sum(d is None for d in arguments.kw_defaults)
        given = [p.default for p in signature.parameters.values() if p.default is not p.empty]
        if not required:  # the overload with return_lse=True has no default for it
            assert [ast.literal_eval(d) for d in defaults] == given


def test_signatures_are_the_documented_ones():
    assert str(inspect.signature(qkv.scaled_dot_product_attention)) == (
        "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)"
    )
    assert str(inspect.signature(qkv.attention)) == (
        "(q, k, v, *, layout='bhsd', causal=None, window=None, mask=None, bias=None, alibi_slopes=None, softcap=None, "
        "sinks=None, scale=None, kv_lengths=None, return_lse=False, out=None)"
    )
    assert str(inspect.signature(qkv.merge_states)) == "(out_a, lse_a, out_b, lse_b)"
    assert str(inspect.signature(qkv.matmul)) == "(a, b, *, bias=None, activation=None, out=None)"


@pytest.mark.parametrize("name", ["", *NAMES])
def test_examples_in_the_documentation(name):
    """The doctests of native functions, which pytest's own search does not find."""
    thing = getattr(qkv, name) if name else qkv
    tests = doctest.DocTestFinder(recurse=False).find(thing, name=f"qkv.{name}", module=False, globs={})
    assert sum(len(test.examples) for test in tests) > 0
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.summarize().failed == 0


def blocks(path):
    """The Python programs of a page."""
    text = path.read_text()
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def pages():
    root = pathlib.Path(__file__).parents[1]
    return [page for page in (root / "README.md", root.parents[1] / "docs" / "PYTHON.md") if page.exists()]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_programs_in_the_pages(page):
    programs = blocks(page)
    assert programs
    for program in programs:
        done = python(program)
        assert done.returncode == 0, f"{program}\n{done.stderr}"
