#!/usr/bin/env python3
"""Times attention of other libraries on the CPU in f32: PyTorch, ONNX Runtime and OpenVINO.

    python scripts/attention_peers.py [--threads 2] [--rounds 7] [--seconds 0.05] [--json] [--only torch,openvino]
                                      [--shapes full,1,12,512,64:causal,1,4,2048,64] [--qkv PATH]

    torch         scaled_dot_product_attention, backend flash
    onnxruntime   com.microsoft MultiHeadAttention; for causal GroupQueryAttention with as many KV heads as heads
    openvino      ScaledDotProductAttention (opset 13), inference precision f32

torch and openvino take (batch, heads, tokens, head_dim). ONNX Runtime's operators take (batch, tokens, heads *
head_dim), so a change of layout is part of its time, as it is for whoever uses them; GroupQueryAttention moreover
copies K and V into the cache that it returns.

A case counts 4 b h s s d operations, half of that for causal. How the turns are taken is told in peers.py; a library
that is not installed is skipped. Every output is compared once with float64 on one head, and the largest error shown.

--qkv PATH: one more column, from a program run in each turn as `PATH attention --batch B --heads H --seq S --dim D
[--causal] --seconds T`, whose last printed word is GFLOP/s.
"""

import argparse
import sys

import peers

CASES = [
    ("full", 1, 12, 512, 64),
    ("causal", 1, 12, 512, 64),
    ("full", 1, 4, 2048, 64),
    ("causal", 1, 4, 2048, 64),
    ("full", 1, 4, 2048, 128),
    ("causal", 1, 4, 2048, 128),
    ("full", 8, 12, 128, 64),
    ("full", 32, 12, 128, 32),
    ("full", 1, 12, 32, 64),
]


def torch_peer(threads):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    flash.__enter__()  # for as long as the process lives
    about = {"version": torch.__version__.split("+")[0], "capability": torch.backends.cpu.get_cpu_capability()}

    def prepare(mask, q, k, v):
        q, k, v = map(torch.from_numpy, (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(q, k, v, is_causal=mask == "causal"), lambda out: out.numpy()

    return about, prepare


def onnxruntime_peer(threads):
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    def model(mask, heads):
        def f32(name, rank=3):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)

        inputs, outputs, flags = [f32("q"), f32("k"), f32("v")], [f32("out")], {"num_heads": heads}
        operator, names = "MultiHeadAttention", ["q", "k", "v"]
        if mask == "causal":
            operator, names = "GroupQueryAttention", ["q", "k", "v", "", "", "last", "total"]
            flags["kv_num_heads"] = heads
            inputs.append(helper.make_tensor_value_info("last", TensorProto.INT32, [None]))
            inputs.append(helper.make_tensor_value_info("total", TensorProto.INT32, []))
            outputs += [f32("present_k", 4), f32("present_v", 4)]
        node = helper.make_node(operator, names, [o.name for o in outputs], domain="com.microsoft", **flags)
        graph = helper.make_graph([node], "attention", inputs, outputs)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()

    def prepare(mask, q, k, v):
        b, h, s, d = q.shape
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(model(mask, h), options, providers=["CPUExecutionProvider"])
        feed = {n: np.ascontiguousarray(x.swapaxes(1, 2)).reshape(b, s, h * d) for n, x in zip("qkv", (q, k, v))}
        if mask == "causal":
            feed.update(last=np.full(b, s - 1, np.int32), total=np.array(s, np.int32))
        return lambda: session.run(["out"], feed)[0], lambda out: out.reshape(b, s, h, d).swapaxes(1, 2)

    return {"version": ort.__version__}, prepare


def openvino_peer(threads):
    import openvino as ov
    from openvino import opset13

    core = ov.Core()
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}

    def prepare(mask, q, k, v):
        parameters = [opset13.parameter(q.shape, ov.Type.f32, name) for name in "qkv"]
        node = opset13.scaled_dot_product_attention(*parameters, causal=mask == "causal")
        request = core.compile_model(ov.Model([node], parameters), "CPU", config).create_infer_request()
        for i, x in enumerate((q, k, v)):
            request.set_input_tensor(i, ov.Tensor(x))
        return lambda: request.infer(share_outputs=True), lambda _: request.get_output_tensor(0).data

    return {"version": ov.__version__.split("-")[0]}, prepare


PEERS = {"torch": torch_peer, "onnxruntime": onnxruntime_peer, "openvino": openvino_peer}


def error_of_last_head(out, mask, q, k, v):
    """The largest difference from float64 in the last head of the last batch."""
    import numpy as np

    q, k, v = (x[-1, -1].astype(np.float64) for x in (q, k, v))
    scores = q @ k.T / np.sqrt(q.shape[-1])
    if mask == "causal":
        scores[np.triu_indices_from(scores, 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return float(np.abs(out[-1, -1] - p / p.sum(-1, keepdims=True) @ v).max())


def child(name, threads):
    state = {}

    def hello():
        try:
            about, state["prepare"] = PEERS[name](threads)
            return about
        except ImportError as problem:
            return {"missing": f"not installed ({problem})"}

    def set_up(case):
        import numpy as np

        state.update(case=case, call=None)
        mask, *shape = case
        random = np.random.default_rng(1)
        qkv = [random.uniform(-1, 1, shape).astype(np.float32) for _ in range(3)]
        call, as_heads_first = state["prepare"](mask, *qkv)
        error = error_of_last_head(as_heads_first(call()), mask, *qkv)
        if error > 1e-5:
            return {"skipped": f"wrong result, error {error:.1e}"}
        state["call"] = call
        return {"error": error}

    def answer(case, seconds):
        extra = {}
        if state.get("case") != case:
            try:
                extra = set_up(case)
            except Exception as problem:  # a peer that cannot do one case still does the others
                return {"skipped": f"{type(problem).__name__}: {problem}"[:200]}
        if state["call"] is None:
            return extra or {"skipped": "as before"}
        mask, b, h, s, d = case
        operations = (2 if mask == "causal" else 4) * b * h * s * s * d
        return {"gflops": 1e-9 * operations / peers.stretch(state["call"], seconds), **extra}

    peers.serve(hello, answer)


def qkv_arguments(case):
    mask, *shape = case
    flags = [x for pair in zip(("--batch", "--heads", "--seq", "--dim"), shape) for x in pair]
    return ["attention", *flags, *(["--causal"] if mask == "causal" else [])]


def parse_case(text):
    mask, *shape = text.split(",")
    if mask not in ("full", "causal") or len(shape) != 4:
        raise argparse.ArgumentTypeError(f"{text}: not of the form full,B,H,S,D")
    return (mask, *map(int, shape))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    peers.add_arguments(parser)
    parser.add_argument("--shapes", type=lambda text: [parse_case(case) for case in text.split(":")], default=CASES)
    parser.add_argument("--qkv", metavar="PATH", help="a program that times qkv's own attention")
    args = parser.parse_args()
    if args.child:
        child(args.child, args.threads)
        return
    columns = []
    try:
        for name in PEERS:
            if not args.only or name in args.only.split(","):
                columns.append(peers.Child(sys.argv[0], name, args.threads))
        if args.qkv:
            columns.append(peers.External("qkv", args.qkv, qkv_arguments, args.threads))
        cases = [list(case) for case in args.shapes]
        results = peers.alternate(columns, cases, args.rounds, args.seconds)
    finally:
        for column in columns:
            column.close()
    labels = [f"{mask:6} b{b} h{h} s{s} d{d}" for mask, b, h, s, d in cases]
    peers.report(columns, cases, labels, results, args)


if __name__ == "__main__":
    main()
