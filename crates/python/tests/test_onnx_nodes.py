"""ONNX's own node tests of Attention and RotaryEmbedding, from the installed onnx package, through `qkv.onnx.Backend`.

Cases, data and comparison are those of `onnx.backend.test`, at its tolerances. Beside each case onnx has the operator's function
body as a model of ordinary operators ("expanded"); those contain nothing that qkv computes, and are skipped. The list and the
counts are printed at the end (`pytest -s`).
"""

import unittest

import numpy as np
import onnx
import pytest
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner, _normalize_tensor

from qkv.onnx import Backend

OPERATORS = ("Attention", "RotaryEmbedding")

with np.errstate(all="ignore"):  # of other operators' cases
    ALL = [case for case in load_model_tests(kind="node") if case.name.startswith(("test_attention", "test_rotary_embedding"))]
EXPANDED = [case for case in ALL if "_expanded" in case.name]
CASES = [case for case in ALL if "_expanded" not in case.name]
passed: list[str] = []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_node(case):
    assert [node.op_type for node in case.model.graph.node] in [[name] for name in OPERATORS]
    prepared = Backend.prepare(case.model, "CPU")
    assert case.data_sets
    for inputs, expected in case.data_sets:
        inputs, expected = ([_normalize_tensor(x) for x in side] for side in (inputs, expected))
        outputs = prepared.run(inputs)
        Runner.assert_similar_outputs(expected, outputs, rtol=case.rtol, atol=case.atol)
        types = [onnx.helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type) for o in case.model.graph.output]
        assert [output.dtype for output in outputs] == types
    passed.append(case.name)


@pytest.mark.parametrize("case", EXPANDED, ids=lambda case: case.name)
def test_expanded(case):
    operators = {node.op_type for node in case.model.graph.node}
    assert not operators & set(OPERATORS), "it has something to compute here after all"
    assert not Backend.is_compatible(case.model)
    pytest.skip("a function body of ordinary operators")


def test_list_and_count():
    """There are cases of both operators, every one of them has passed, and none is left out."""
    names = {case.name for case in CASES}
    print(f"\nonnx {onnx.__version__}: {len(passed)} of {len(CASES)} node tests pass; {len(EXPANDED)} expanded ones skipped")
    for name in sorted(passed):
        print(f"  {name}")
    using = {
        case.name for case in load_model_tests(kind="node") if any(node.op_type in OPERATORS for node in case.model.graph.node)
    }
    assert using == names
    assert sum(name.startswith("test_attention") for name in names) >= 60
    assert sum(name.startswith("test_rotary_embedding") for name in names) >= 8
    if passed:  # not where this test was chosen alone
        assert sorted(passed) == sorted(names)


def test_through_onnx_runner():
    """The back end runs under onnx's own runner, which collects the cases by itself."""
    runner = Runner(Backend, __name__)
    runner.include(r"^test_(attention|rotary_embedding)(?!.*_expanded).*_cpu$")
    result = unittest.TestResult()
    runner.test_suite.run(result)
    assert not result.failures and not result.errors
    assert result.testsRun - len(result.skipped) == len(CASES)
