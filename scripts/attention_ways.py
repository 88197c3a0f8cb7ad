"""How python_peers.py calls each library: qkv, PyTorch, ONNX Runtime and OpenVINO, every one in its own best way.

A library often has several ways to the same result (operators, layouts, forms of a mask). Each class here lists those
that are worth a try for a row, and python_peers.py keeps the quickest. A way is one call of the library's own operator
with the whole problem; views, another layout made beforehand, and a widening of 16-bit inputs inside the call are fair,
cutting the problem into several by hand is not.

    library.ways(row, inputs)     [(name, set_up)], nothing computed yet
    set_up()                      ([call, ...], as_heads) or ([call, ...], as_heads, before): a call for each copy of
                                  the cache; what turns a call's result into a float32 array of shape (batch, heads,
                                  queries, dim); and what is to be done, untimed, before every stretch of calls

Inputs and outputs are allocated in set_up, so that a call computes and nothing else (PyTorch allocates its output).
"""

import numpy as np

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def numpy_type(kind):
    import ml_dtypes

    return np.dtype({"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind])


class Inputs:
    """What all contestants of a row are given: numpy arrays, (batch, heads, length, dim), of the row's type."""

    def __init__(self, row):
        random = np.random.default_rng(1)
        kind = numpy_type(row.kind)

        def normal(*shape):
            return random.standard_normal(shape, np.float32).astype(kind)

        self.q = normal(row.batch, row.heads, row.queries, row.dim)
        shape = (row.batch, row.kv_heads, row.keys, row.dim)
        k, v = normal(*shape), normal(*shape)
        # Copies hold the same numbers: what matters is that they lie elsewhere.
        self.caches = [(k, v)] + [(k.copy(), v.copy()) for _ in range(row.copies - 1)]
        self.bias = self.lengths = self.padding = self.band = None
        if row.bias:
            self.bias = random.standard_normal((1, row.heads, row.queries, row.keys), np.float32)
        if row.padded:
            self.lengths = np.linspace(row.keys // 4, row.keys, row.batch).astype(np.int32)
            self.padding = (np.arange(row.keys) < self.lengths[:, None])[:, None, None, :]
        if row.window:
            distance = np.arange(row.queries)[:, None] - np.arange(row.keys)
            self.band = (distance >= 0) & (distance < row.window)

    @property
    def mask(self):
        """The boolean mask as a matrix, for libraries that have no better form of it."""
        return self.padding if self.padding is not None else self.band


def additive(mask):
    """The boolean mask as zeros and negative infinities."""
    return np.where(mask, np.float32(0), np.float32(-np.inf))


def tokens_first(x):
    """(batch, heads, length, dim) to (batch, length, heads * dim)."""
    batch, heads, length, dim = x.shape
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(batch, length, heads * dim)


class Qkv:
    """qkv.attention with numpy arrays, into an output that is there already."""

    name = "qkv"

    def __init__(self, threads, spin):
        import qkv

        qkv.set_num_threads(threads)
        self.qkv = qkv
        self.about = {"version": qkv.__version__, "isa": qkv.cpu_info()["isa"]}

    def ways(self, row, inputs):
        options = {"causal": "top_left" if row.causal else None, "bias": inputs.bias}
        if row.window:
            options["window"] = (row.window - 1, None)
        ways = [("attention", options)]
        if row.padded:
            ways = [
                ("mask", options | {"mask": inputs.padding}),
                ("kv_lengths", options | {"kv_lengths": inputs.lengths}),
            ]

        def set_up(options):
            out = np.empty_like(inputs.q)

            def call(k, v):
                return lambda: self.qkv.attention(inputs.q, k, v, out=out, **options)

            return [call(k, v) for k, v in inputs.caches], lambda out: out.astype(np.float32)

        return [(name, lambda options=options: set_up(options)) for name, options in ways]


class Torch:
    """torch.nn.functional.scaled_dot_product_attention, and flex_attention compiled where there is a sparse mask."""

    name = "torch"

    def __init__(self, threads, spin):
        import torch

        torch.set_num_threads(threads)
        torch.inference_mode().__enter__()  # for as long as the process lives
        self.torch = torch
        self.about = {"version": torch.__version__.split("+")[0], "isa": torch.backends.cpu.get_cpu_capability()}

    def tensor(self, x):
        if x is None or x.dtype in (np.float32, np.float16, np.bool_):
            return None if x is None else self.torch.from_numpy(x)
        return self.torch.from_numpy(x.view(np.uint16)).view(self.torch.bfloat16)

    def ways(self, row, inputs):
        torch, tensor = self.torch, self.tensor
        sdpa = torch.nn.functional.scaled_dot_product_attention
        q = tensor(inputs.q)
        caches = [(tensor(k), tensor(v)) for k, v in inputs.caches]

        def way(attend):
            return lambda: ([lambda k=k, v=v: attend(k, v) for k, v in caches], lambda out: out.float().numpy())

        if row.bias:
            bias = tensor(inputs.bias)
            return [("attn_mask", way(lambda k, v: sdpa(q, k, v, attn_mask=bias)))]
        if row.padded or row.window:
            ways = []
            for name, mask in ("boolean mask", inputs.mask), ("additive mask", additive(inputs.mask)):
                mask = tensor(mask)
                ways.append((name, way(lambda k, v, mask=mask: sdpa(q, k, v, attn_mask=mask))))
            return [*ways, ("flex_attention", self.flex(row, inputs, q, caches))]
        if row.heads != row.kv_heads:
            group = row.heads // row.kv_heads
            # With one query and no mask, the heads of a group may as well be queries of one head.
            rows = q.reshape(row.batch, row.kv_heads, group, row.dim)
            return [
                ("enable_gqa", way(lambda k, v: sdpa(q, k, v, enable_gqa=True))),
                ("repeat_interleave", way(lambda k, v: sdpa(q, *(x.repeat_interleave(group, 1) for x in (k, v))))),
                ("groups as queries", way(lambda k, v: sdpa(rows, k, v).view(q.shape))),
            ]
        ways = [("sdpa", way(lambda k, v: sdpa(q, k, v, is_causal=row.causal)))]
        if row.kind != "f32" and row.queries > 1:
            widened = lambda k, v: sdpa(q.float(), k.float(), v.float(), is_causal=row.causal).to(q.dtype)
            ways.append(("through f32", way(widened)))
        return ways

    def flex(self, row, inputs, q, caches):
        """The compiler needs a C++ compiler and half a minute."""

        def set_up():
            from torch.nn.attention.flex_attention import (
                create_block_mask,
                flex_attention,
            )

            if row.window:
                batch, window = None, row.window
                visible = lambda b, h, i, j: (i >= j) & (i - j < window)
            else:
                batch, lengths = row.batch, self.torch.from_numpy(inputs.lengths)
                visible = lambda b, h, i, j: j < lengths[b]
            blocks = create_block_mask(visible, batch, None, row.queries, row.keys, device="cpu")
            compiled = self.torch.compile(flex_attention, fullgraph=True)
            calls = [lambda k=k, v=v: compiled(q, k, v, block_mask=blocks) for k, v in caches]
            return calls, lambda out: out.numpy()

        return set_up


class OnnxRuntime:
    """The operators Attention (opset 24), MultiHeadAttention and GroupQueryAttention, with inputs and outputs bound.

    The last two take (batch, tokens, heads * head_dim), given to them in that layout. GroupQueryAttention writes K and
    V into the cache that it returns; for decoding that is the cache which it was given, and one key is written.
    """

    name = "onnxruntime"

    def __init__(self, threads, spin):
        import onnxruntime as ort

        self.ort = ort
        self.options = ort.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        self.about = {"version": ort.__version__}

    def ways(self, row, inputs):
        if row.kind == "bf16" and row.queries == 1:
            return []  # no kernel, and the widened copy of the cache would take longer than the rest
        ways = [("Attention", self.attention), ("GroupQueryAttention", self.group_query)]
        if row.heads == row.kv_heads and not row.window:
            ways += [("MultiHeadAttention", self.multi_head), ("MultiHeadAttention, K and V heads first", self.mixed)]
        if row.bias:
            ways = [way for way in ways if way[0] != "GroupQueryAttention"]
        ways = [(name, lambda way=way: way(row, inputs, row.kind)) for name, way in ways]
        if row.kind == "f32":
            return ways
        # MultiHeadAttention knows f32 alone, no operator bf16.
        own = [] if row.kind == "bf16" else ways[:2]
        if row.queries > 1:
            for name, way in ("Attention", self.attention), ("GroupQueryAttention", self.group_query):
                own.append((f"{name} through f32", lambda way=way: way(row, inputs, "f32")))
        return own

    def attention(self, row, inputs, compute):
        mask = inputs.bias if row.bias else inputs.mask
        feeds = []
        lengths = None
        if row.padded:
            mask, lengths = None, inputs.lengths.astype(np.int64)
        for k, v in inputs.caches:
            feeds.append({"q": inputs.q, "k": k, "v": v, "mask": mask, "_k": None, "_v": None, "lengths": lengths})
        # The rows of a mask say all that is_causal says.
        causal = int(row.causal and not row.window)
        return self.session(row, "Attention", "", feeds, {"out": inputs.q.shape}, {"is_causal": causal}, compute)

    def multi_head(self, row, inputs, compute, heads_first=False):
        layout = (lambda x: x) if heads_first else tokens_first
        feeds = [
            {"q": tokens_first(inputs.q), "k": layout(k), "v": layout(v), "bias": None, "lengths": inputs.lengths,
             "scores": inputs.bias} for k, v in inputs.caches
        ]  # fmt: skip
        attributes = {"num_heads": row.heads, "unidirectional": int(row.causal)}
        outs = {"out": feeds[0]["q"].shape}
        return self.session(row, "MultiHeadAttention", MICROSOFT, feeds, outs, attributes, compute)

    def mixed(self, row, inputs, compute):
        return self.multi_head(row, inputs, compute, heads_first=True)

    def group_query(self, row, inputs, compute):
        last = np.full(row.batch, row.keys - 1, np.int32) if inputs.lengths is None else inputs.lengths - 1
        total = np.array(row.keys, np.int32)
        feeds = []
        for k, v in inputs.caches:
            feed = {"q": inputs.q, "k": k, "v": v}
            if row.queries == 1:  # the last key is the new one
                feed |= {"k": k[:, :, -1:], "v": v[:, :, -1:]}
            feed = {name: tokens_first(x) for name, x in feed.items()}
            past = (k.copy(), v.copy()) if row.queries == 1 else (None, None)
            feeds.append(feed | {"past_k": past[0], "past_v": past[1], "last": last, "total": total})
        cache = {"present_k": "past_k", "present_v": "past_v"}
        if row.queries > 1:
            cache = dict.fromkeys(cache, inputs.caches[0][0].shape)
        attributes = {"num_heads": row.heads, "kv_num_heads": row.kv_heads}
        if not row.causal and row.queries > 1:
            attributes["causal"] = 0
        if row.window:
            attributes["local_window_size"] = row.window
        outs = {"out": feeds[0]["q"].shape, **cache}
        return self.session(row, "GroupQueryAttention", MICROSOFT, feeds, outs, attributes, compute)

    def value(self, x):
        """An OrtValue over the array's own memory."""
        if x.dtype.name == "bfloat16":
            bits = x.view(np.uint16)
            return self.ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)  # TensorProto.BFLOAT16
        return self.ort.OrtValue.ortvalue_from_numpy(x)

    def session(self, row, operator, domain, feeds, outs, attributes, compute):
        """A model of one operator, bound to `feeds` (for each copy of the cache, input names in the operator's order to
        arrays, None for one that is left out) and to `outs` (names to shapes, or to the input whose buffer it is).
        Inputs of the row's type are cast to `compute` in the model, and the output back, where the two differ."""
        from onnx import TensorProto, helper

        types = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
        elements = {"float32": types["f32"], "float16": types["f16"], "bfloat16": types["bf16"]}
        elements |= {"bool": TensorProto.BOOL, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
        nodes, operands, inputs, results = [], [], [], list(outs)
        for name, x in feeds[0].items():
            if x is None:
                operands.append("")
                continue
            inputs.append(helper.make_tensor_value_info(name, elements[x.dtype.name], x.shape))
            operands.append(name)
            if row.kind != compute and x.dtype == feeds[0]["q"].dtype:
                operands[-1] = f"{name}_cast"
                nodes.append(helper.make_node("Cast", [name], operands[-1:], to=types[compute]))
        while not operands[-1]:
            operands.pop()
        cast_back = row.kind != compute
        if cast_back:
            results[0] = "wide"
        nodes.append(helper.make_node(operator, operands, results, domain=domain, **attributes))
        if cast_back:
            nodes.append(helper.make_node("Cast", ["wide"], ["out"], to=types[row.kind]))
        # The present keys and values stay in the type that the operator computes in.
        kinds = {name: row.kind if name == "out" else compute for name in outs}
        outputs = [helper.make_tensor_value_info(name, types[kinds[name]], None) for name in outs]
        graph = helper.make_graph(nodes, "attention", inputs, outputs)
        opsets = [helper.make_opsetid("", 24), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = self.ort.InferenceSession(model, self.options, providers=["CPUExecutionProvider"])

        def bind(feed):
            arrays = {name: x for name, x in feed.items() if x is not None}
            kept = {name: self.value(x) for name, x in arrays.items()}
            binding = session.io_binding()
            for name in arrays:
                binding.bind_ortvalue_input(name, kept[name])
            for name, to in outs.items():
                if isinstance(to, str):
                    kept[name] = kept[to]
                else:
                    arrays[name] = np.zeros(to, numpy_type(kinds[name]))
                    kept[name] = self.value(arrays[name])
                binding.bind_ortvalue_output(name, kept[name])

            def run():
                session.run_with_iobinding(binding)
                return arrays["out"], kept  # the values must live as long as the binding

            return run

        def as_heads(result):
            out = result[0].astype(np.float32)
            if out.ndim == 3:
                out = out.reshape(row.batch, row.queries, row.heads, row.dim).swapaxes(1, 2)
            return out

        return [bind(feed) for feed in feeds], as_heads


class OpenVino:
    """ScaledDotProductAttention (opset 13), one infer request over the arrays' own memory for each copy of the cache.

    For decoding also with the cache as the model's state, which is how its language models run: ReadValue, Concat of
    the new key, Assign, which the plugin fuses with the attention. Every call then makes the cache longer by a key; it
    is set back before each stretch, and the calls of one are few beside thousands of keys.
    """

    name = "openvino"

    def __init__(self, threads, spin):
        import openvino as ov

        self.ov, self.core, self.threads = ov, ov.Core(), threads
        self.about = {"version": ov.__version__.split("-")[0]}

    def ways(self, row, inputs):
        masks = {"sdpa": None}
        if row.bias:
            masks = {"bias": inputs.bias}
        elif inputs.mask is not None:
            masks = {"boolean mask": inputs.mask, "additive mask": additive(inputs.mask)}
        hints = ["f32"] if row.kind == "f32" else ["f32", row.kind]
        heads = ["as it is"] if row.heads == row.kv_heads else ["repeated", "groups as queries"]
        ways = []
        for name, mask in masks.items():
            for hint in hints:
                for head in heads:
                    words = [name, *([f"hint {hint}"] if hints[1:] else []), *([head] if heads[1:] else [])]
                    set_up = lambda mask=mask, hint=hint, head=head: self.set_up(row, inputs, mask, hint, head)
                    ways.append((", ".join(words), set_up))
        if row.queries == 1:
            for hint in hints:
                set_up = lambda hint=hint: self.stateful(row, inputs, hint)
                ways.append((f"stateful{f', hint {hint}' if hints[1:] else ''}", set_up))
        return ways

    def compiled(self, results, sinks, parameters, hint, **more):
        config = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint, **more}
        return self.core.compile_model(self.ov.Model(results, sinks, parameters), "CPU", config)

    def tensor(self, x):
        if x.dtype.name == "bfloat16":
            return self.ov.Tensor(x.view(np.uint16), self.ov.Shape(x.shape), self.ov.Type.bf16)
        return self.ov.Tensor(x, shared_memory=True)

    def set_up(self, row, inputs, mask, hint, heads):
        from openvino import opset13 as ops

        group = row.heads // row.kv_heads
        q = inputs.q
        if heads == "groups as queries":
            q = q.reshape(row.batch, row.kv_heads, group, row.dim)
        arrays = [q, *inputs.caches[0], *([] if mask is None else [mask])]
        values = [self.tensor(x) for x in arrays]
        names = ["q", "k", "v", "mask"]
        given = [ops.parameter(list(x.shape), x.element_type, name) for x, name in zip(values, names)]
        operands = list(given)
        if heads == "repeated":
            for i in (1, 2):
                five = ops.unsqueeze(given[i], 2)
                shape = [row.batch, row.kv_heads, group, row.keys, row.dim]
                operands[i] = ops.reshape(ops.broadcast(five, shape), [row.batch, row.heads, row.keys, row.dim], False)
        # The rows of a mask say all that `causal` says.
        node = ops.scaled_dot_product_attention(*operands, causal=row.causal and mask is None)
        model = self.compiled([ops.result(node)], [], given, hint)

        def bind(k, v):
            tensors = [values[0], self.tensor(k), self.tensor(v), *values[3:]]
            return self.call(model, tensors, (q, k, v, mask))

        return [bind(k, v) for k, v in inputs.caches], self.as_heads(inputs)

    def stateful(self, row, inputs, hint):
        from openvino import opset13 as ops
        from openvino.op.util import Variable, VariableInfo

        kind = {"f32": self.ov.Type.f32, "f16": self.ov.Type.f16, "bf16": self.ov.Type.bf16}[row.kind]
        group, i64 = row.heads // row.kv_heads, self.ov.Type.i64
        q, k, v = (
            ops.parameter([-1, heads, -1, row.dim], kind, name)
            for name, heads in (("q", row.heads), ("k", row.kv_heads), ("v", row.kv_heads))
        )
        order = ops.parameter([-1], self.ov.Type.i32, "order")  # of the batch; the plugin looks for it
        sinks, operands = [], [q]
        for name, new in ("k", k), ("v", v):
            info = VariableInfo()
            info.variable_id, info.data_type = name, kind
            info.data_shape = self.ov.PartialShape([-1, row.kv_heads, -1, row.dim])
            variable = Variable(info)
            empty = ops.constant(self.ov.Tensor(kind, self.ov.Shape([row.batch, row.kv_heads, 0, row.dim])))
            past = ops.gather(ops.read_value(empty, variable), order, ops.constant(0))
            present = ops.concat([past, new], 2)
            sinks.append(ops.assign(present, variable))
            if group > 1:
                shape = ops.shape_of(present)
                part = lambda *axes, shape=shape: ops.gather(shape, ops.constant(list(axes), i64), ops.constant(0))
                wide = ops.concat([part(0, 1), ops.constant([group], i64), part(2, 3)], 0)
                repeated = ops.broadcast(ops.unsqueeze(present, 2), wide, broadcast_spec="BIDIRECTIONAL")
                present = ops.reshape(repeated, ops.constant([0, row.heads, -1, row.dim], i64), True)
            operands.append(present)
        result = ops.result(ops.scaled_dot_product_attention(*operands, causal=False))
        model = self.compiled([result], sinks, [q, k, v, order], hint, KV_CACHE_PRECISION=kind)
        kept, requests, calls = [], [], []
        for cache in inputs.caches:
            arrays = [
                inputs.q,
                *(np.ascontiguousarray(x[:, :, -1:]) for x in cache),
                np.arange(row.batch, dtype=np.int32),
            ]
            calls.append(self.call(model, [self.tensor(x) for x in arrays], arrays))
            requests.append(calls[-1]()[0])
            kept.append({name: np.ascontiguousarray(x[:, :, :-1]) for name, x in zip("kv", cache)})

        def set_back():
            for request, pasts in zip(requests, kept):
                for state in request.query_state():
                    state.state = self.tensor(pasts[state.name])

        def before():
            set_back()
            for call in calls:  # the first call after that lays the cache out anew
                call()

        set_back()
        return calls, self.as_heads(inputs), before

    def call(self, model, tensors, arrays):
        request = model.create_infer_request()
        for i, tensor in enumerate(tensors):
            request.set_input_tensor(i, tensor)

        def call():
            request.start_async()
            request.wait()
            return request, tensors, arrays  # which must live as long as the request

        return call

    def as_heads(self, inputs):
        def convert(result):
            out = result[0].get_output_tensor(0)
            data = out.data.view(numpy_type("bf16")) if out.element_type == self.ov.Type.bf16 else out.data
            return data.astype(np.float32).reshape(inputs.q.shape)

        return convert


LIBRARIES = [Qkv, Torch, OnnxRuntime, OpenVino]
