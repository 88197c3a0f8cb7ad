"""qkv.torch: the operators in torch's dispatcher, traced and not, against torch's own attention."""

import math

import pytest

torch = pytest.importorskip("torch")

import qkv.torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

SDPA = torch.ops.qkv.scaled_dot_product_attention.default
ATTENTION = torch.ops.qkv.attention.default
WITH_LSE = torch.ops.qkv.attention_with_lse.default


def inputs(batch=2, heads=8, kv_heads=2, q_len=16, kv_len=24, size=32, value_size=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, q_len, size, generator=g).to(dtype),
        torch.randn(batch, kv_heads, kv_len, size, generator=g).to(dtype),
        torch.randn(batch, kv_heads, kv_len, value_size, generator=g).to(dtype),
    )


def close(actual, expected, atol=3e-6, rtol=3e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def reference(q, k, v, *, visible=None, bias=None, softcap=None, sinks=None, scale=None):
    """(out, lse) of the formula, in float64, bhsd."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    s = q.double() @ k.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if visible is not None:
        s = s.masked_fill(~visible, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    lse = torch.logsumexp(s, -1)
    weights = torch.exp(s - lse[..., None])[..., : k.shape[2]]
    return (weights @ v).float(), lse.float()


def options(q, k):
    """Every option of `attention` at once, and what it means for the reference."""
    g = torch.Generator().manual_seed(5)
    batch, heads, q_len, kv_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    mask = torch.rand(batch, 1, q_len, kv_len, generator=g) > 0.2
    bias = torch.randn(1, heads, q_len, kv_len, generator=g)
    slopes = torch.rand(heads, generator=g) * 0.2
    sinks = torch.randn(heads, generator=g)
    lengths = torch.tensor([kv_len, kv_len - 5])[:batch]
    position = torch.arange(q_len)[None, :] + lengths[:, None] - q_len
    distance = position[:, None, :, None] - torch.arange(kv_len)
    visible = mask & (distance >= 0) & (distance <= 7) & (torch.arange(kv_len) < lengths[:, None, None, None])
    given = {
        "causal": "bottom_right",
        "window": (7, None),
        "mask": mask,
        "bias": bias,
        "alibi_slopes": slopes,
        "softcap": 5.0,
        "sinks": sinks,
        "scale": 0.25,
        "kv_lengths": lengths,
    }
    total_bias = bias - slopes[:, None, None] * distance.abs()
    expected = {"visible": visible, "bias": total_bias, "softcap": 5.0, "sinks": sinks, "scale": 0.25}
    return given, expected


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
@pytest.mark.parametrize("gqa", [False, True])
def test_sdpa_is_torchs(dtype, mask, gqa):
    q, k, v = inputs(kv_heads=2 if gqa else 8, dtype=dtype)
    given = {"is_causal": mask == "causal", "enable_gqa": gqa, "scale": 0.2}
    if mask == "bool":
        given["attn_mask"] = torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(1)) > 0.3
    elif mask == "float":
        given["attn_mask"] = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = qkv.torch.scaled_dot_product_attention(q, k, v, **given)
    if given.get("attn_mask") is not None and mask == "float":
        given["attn_mask"] = given["attn_mask"].float()
    expected = torch_sdpa(q.float(), k.float(), v.float(), **given)
    assert actual.dtype == dtype and actual.is_contiguous()
    tolerance = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    close(actual.float(), expected, **tolerance)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_sdpa_ranks(rank):
    q, k, v = (t[:, :1].expand(2, 3, *t.shape[2:]) for t in inputs())
    q, k, v = ([t[0, 0], t[0], t, t.expand(2, *t.shape)][rank - 2] for t in (q, k, v))
    close(qkv.torch.scaled_dot_product_attention(q, k, v), torch_sdpa(q, k, v))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_attention_with_every_option(layout):
    q, k, v = inputs()
    given, meaning = options(q, k)
    expected, expected_lse = reference(q, k, v, **meaning)
    if layout == "bshd":
        q, k, v, expected = (t.transpose(1, 2) for t in (q, k, v, expected))
    out, lse = qkv.torch.attention(q, k, v, layout=layout, return_lse=True, **given)
    assert out.is_contiguous() and out.shape == expected.shape and lse.dtype == torch.float32
    close(out, expected)
    close(lse, expected_lse)
    given["kv_lengths"] = given["kv_lengths"].tolist()
    assert torch.equal(qkv.torch.attention(q, k, v, layout=layout, **given), out)


@pytest.mark.parametrize("causal,offset", [("top_left", 0), ("bottom_right", 8), (3, 3), (-2, -2)])
def test_attention_causal(causal, offset):
    q, k, v = inputs()
    visible = torch.arange(24) <= torch.arange(16)[:, None] + offset
    expected = torch.nan_to_num(reference(q, k, v, visible=visible)[0])
    close(qkv.torch.attention(q, k, v, causal=causal), expected)


def test_attention_out():
    q, k, v = inputs()
    expected = qkv.torch.attention(q, k, v)
    out = torch.full((2, 8, 16, 16), 9.0)
    assert qkv.torch.attention(q, k, v, out=out) is out and torch.equal(out, expected)
    out.fill_(9.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def traced(q, k, v, out):
        qkv.torch.attention(q, k, v, out=out)

    traced(q, k, v, out)
    assert torch.equal(out, expected)


# --- registration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_sdpa(dtype):
    q, k, v = inputs(dtype=dtype)
    mask = torch.rand(2, 8, 16, 24) > 0.3
    torch.library.opcheck(SDPA, (q, k, v, None, 0.0, False, None, True))
    torch.library.opcheck(SDPA, (q, k, v, mask, 0.0, False, 0.3, True))
    torch.library.opcheck(SDPA, (q[0, 0], k[0, 0], v[0, 0], None, 0.0, True))


@pytest.mark.parametrize("op", [ATTENTION, WITH_LSE])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_opcheck_attention(op, layout):
    q, k, v = inputs()
    given, _ = options(q, k)
    if layout == "bshd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    torch.library.opcheck(op, (q, k, v, None, None, None, None, None, layout))
    flat = tuple(given[n] for n in ("mask", "bias", "alibi_slopes", "sinks", "kv_lengths"))
    torch.library.opcheck(op, (q, k, v, *flat, layout, "bottom_right", None, 7, None, 5.0, 0.25))
    torch.library.opcheck(op, (q, k, v, None, None, None, None, None, layout, None, 3, None, 2, None, None))


def test_opcheck_with_gradients():
    """All that can be checked of an operator whose backward pass refuses."""
    q, k, v = (t.requires_grad_() for t in inputs())
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ATTENTION, (q, k, v), test_utils=utils)
    torch.library.opcheck(SDPA, (q, k, v, None, 0.0, False, None, True), test_utils=utils)


# --- traced ------------------------------------------------------------------------------------------------------


def calls_of(graph, op):
    return [n for n in graph.nodes if n.target in (op, op.overloadpacket)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.compiler.reset()
    graphs = []

    def backend(module, example_inputs):
        graphs.append(module.graph)
        return module

    def f(q, k, v, mask):
        a = qkv.torch.attention(q + 1, k, v, mask=mask, causal="bottom_right", window=(9, None), return_lse=True)
        b = qkv.torch.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return a[0] * 2 + b, a[1]

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)
    for q_len, kv_len in ((16, 24), (5, 30), (7, 7)):
        q, k, v = inputs(q_len=q_len, kv_len=kv_len)
        mask = torch.rand(2, 1, 1, kv_len, generator=torch.Generator().manual_seed(3)) > 0.2
        for actual, expected in zip(compiled(q, k, v, mask), f(q, k, v, mask)):
            assert torch.equal(actual, expected)
    assert all(len(calls_of(g, WITH_LSE)) == 1 and len(calls_of(g, SDPA)) == 1 for g in graphs)
    assert not dynamic or len(graphs) <= 2, "recompiled for each length"


def test_compile_with_inductor():
    torch.compiler.reset()
    q, k, v = (t.transpose(1, 2) for t in inputs())

    def f(q, k, v):
        return qkv.torch.attention(q * 2, k.cos(), v + 1, layout="bshd", causal="bottom_right").relu()

    close(torch.compile(f, fullgraph=True)(q, k, v), f(q, k, v))


def test_compile_under_autocast():
    torch.compiler.reset()
    q, k, v = inputs()

    def f(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return qkv.torch.attention(q, k, v), qkv.torch.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    for result in (f(q, k, v), torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v)):
        assert all(t.dtype == torch.bfloat16 for t in result)
        assert torch.equal(result[0], qkv.torch.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_bias_under_autocast():
    q, k, v = (t.half() for t in inputs())
    bias = torch.randn(16, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = qkv.torch.attention(q, k, v, bias=bias.half())
        whole = qkv.torch.attention(q, k, v, bias=bias)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    assert torch.equal(half, qkv.torch.attention(q, k, v, bias=bias.half().bfloat16()))
    assert torch.equal(whole, qkv.torch.attention(q, k, v, bias=bias))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return qkv.torch.attention(q, k, v, causal="bottom_right", softcap=20.0) + 1

    batch, q_len, kv_len = (torch.export.Dim(n, min=2, max=99) for n in ("batch", "q_len", "kv_len"))
    shapes = ({0: batch, 2: q_len}, {0: batch, 2: kv_len}, {0: batch, 2: kv_len})
    program = torch.export.export(Model(), inputs(), dynamic_shapes=shapes)
    for p in (program, program.run_decompositions()):
        assert len(calls_of(p.graph, ATTENTION)) == 1
        other = inputs(batch=3, q_len=4, kv_len=40)
        assert torch.equal(p.module()(*other), Model()(*other))


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    q, k, v = inputs(dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (q, k, v)]
        out, lse = qkv.torch.attention(*fake, return_lse=True)
        same = qkv.torch.scaled_dot_product_attention(*fake, enable_gqa=True)
        with pytest.raises(ValueError, match="k: head dim"):
            qkv.torch.attention(fake[0], fake[2], fake[2])
        with pytest.raises(NotImplementedError, match="dropout_p.*not supported"):
            qkv.torch.scaled_dot_product_attention(*fake, dropout_p=0.5)
    assert out.shape == same.shape == (2, 8, 16, 16) and out.dtype == torch.bfloat16
    assert lse.shape == (2, 8, 16) and lse.dtype == torch.float32


def test_meta_tensors():
    q, k, v = (t.to("meta") for t in inputs())
    assert qkv.torch.attention(q, k, v).shape == (2, 8, 16, 16)
    assert qkv.torch.scaled_dot_product_attention(q, k, v, enable_gqa=True).device.type == "meta"


def test_make_fx_and_functionalize():
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = inputs()
    graph = make_fx(lambda a, b, c: qkv.torch.attention(a, b, c))(q, k, v)
    assert len(calls_of(graph.graph, ATTENTION)) == 1
    assert torch.equal(functionalize(qkv.torch.attention)(q, k, v), qkv.torch.attention(q, k, v))


def test_vmap():
    q, k, v = inputs()
    sinks = torch.randn(3, 8)
    by_slice = [qkv.torch.attention(q, k, v, sinks=s) for s in sinks]
    assert torch.equal(torch.vmap(lambda s: qkv.torch.attention(q, k, v, sinks=s))(sinks), torch.stack(by_slice))
    out, lse = torch.vmap(lambda a: qkv.torch.attention(a, k, v, return_lse=True))(q[None].expand(4, -1, -1, -1, -1))
    assert torch.equal(out[3], qkv.torch.attention(q, k, v)) and lse.shape == (4, 2, 8, 16)
    rows = torch.vmap(lambda a, b, c: qkv.torch.scaled_dot_product_attention(a, b, c, enable_gqa=True))(q, k, v)
    close(rows, torch_sdpa(q, k, v, enable_gqa=True))


def test_vmap_over_nothing():
    q, k, v = inputs(kv_heads=8)
    assert torch.vmap(qkv.torch.scaled_dot_product_attention)(q[:0], k[:0], v[:0]).shape == (0, 8, 16, 16)
    lengths = torch.zeros(2, 0, dtype=torch.int64)
    out, lse = torch.vmap(lambda n: qkv.torch.attention(q, k, v, kv_lengths=n, return_lse=True), in_dims=1)(lengths)
    assert out.shape == (0, 2, 8, 16, 16) and lse.shape == (0, 2, 8, 16) and out.dtype == lse.dtype == torch.float32


def test_a_mode_sees_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        qkv.torch.attention(*inputs())
    assert ATTENTION in seen


def test_subclasses_pass_through():
    class Named(torch.Tensor):
        pass

    q, k, v = inputs()
    out = qkv.torch.attention(q.as_subclass(Named), k, v)
    assert type(out) is Named and torch.equal(out.as_subclass(torch.Tensor), qkv.torch.attention(q, k, v))


def test_lazy_negation_is_resolved():
    z = torch.randn(2, 2, 9, 8, dtype=torch.complex64)
    q = z.conj().imag
    assert q.is_neg()
    k = torch.randn(2, 2, 9, 8)
    close(qkv.torch.attention(q, k, k), qkv.torch.attention(-z.imag.contiguous(), k, k))


# --- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
def test_backward_is_refused(which):
    tensors = list(inputs())
    tensors[which] = tensors[which].requires_grad_()
    for call in (
        lambda: qkv.torch.attention(*tensors),
        lambda: qkv.torch.attention(*tensors, return_lse=True)[1],
        lambda: qkv.torch.scaled_dot_product_attention(*tensors, enable_gqa=True),
    ):
        out = call()
        assert out.requires_grad and out.grad_fn is not None
        with pytest.raises(NotImplementedError, match="not supported"):
            out.sum().backward()
        with torch.no_grad():
            quiet = call()
        assert not quiet.requires_grad and torch.equal(quiet, out)
    assert tensors[which].grad is None


def test_backward_of_options_is_refused():
    q, k, v = inputs()
    bias = torch.zeros(16, 24, requires_grad=True)
    sinks = torch.zeros(8, requires_grad=True)
    for out in (qkv.torch.attention(q, k, v, bias=bias), qkv.torch.attention(q, k, v, sinks=sinks)):
        with pytest.raises(NotImplementedError, match="not supported"):
            out.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_under_grad(backend):
    torch.compiler.reset()
    q, k, v = inputs()
    q.requires_grad_()
    f = torch.compile(lambda *t: qkv.torch.attention(*t) * 2, fullgraph=True, backend=backend)
    out = f(q, k, v)
    assert out.grad_fn is not None
    close(out.detach(), 2 * qkv.torch.attention(q.detach(), k, v))
    with pytest.raises(NotImplementedError, match="not supported"):
        out.sum().backward()


def directions(f, x):
    """Each way to ask torch for the derivative of f at x."""
    from torch import func
    from torch.autograd import forward_ad

    def dual():
        with forward_ad.dual_level():
            f(forward_ad.make_dual(x, torch.ones_like(x)))

    def total(a):
        return f(a).sum()

    return {
        "jvp": lambda: func.jvp(f, (x,), (x,)),
        "jacfwd": lambda: func.jacfwd(total)(x),
        "linearize": lambda: func.linearize(f, x),
        "forward_ad": dual,
        "vmap(jvp)": lambda: func.vmap(lambda a: func.jvp(f, (a,), (a,)))(x[None]),
        "jvp(vmap)": lambda: func.jvp(lambda a: func.vmap(f)(a[None]), (x,), (x,)),
        "grad": lambda: func.grad(total)(x),
        "jacrev": lambda: func.jacrev(total)(x),
        "hessian": lambda: func.hessian(total)(x),
        "vmap(grad)": lambda: func.vmap(func.grad(total))(x[None]),
        "grad(vmap)": lambda: func.grad(lambda a: func.vmap(f)(a[None]).sum())(x),
        "compiled jvp": lambda: torch.compile(lambda a: func.jvp(f, (a,), (a,)), backend="eager")(x),
        "compiled grad": lambda: torch.compile(func.grad(total), backend="eager")(x),
    }


@pytest.mark.parametrize("way", list(directions(None, torch.zeros(1))))
def test_derivatives_of_functions_are_refused(way):
    torch.compiler.reset()
    q, k, v = inputs(heads=2)
    bias = torch.zeros(16, 24)
    for f, x in (
        (lambda a: qkv.torch.scaled_dot_product_attention(a, k, v), q),
        (lambda a: qkv.torch.attention(q, k, v, bias=a, return_lse=True)[1], bias),
        (lambda a: SDPA(a, k, v), q),
    ):
        with pytest.raises(NotImplementedError, match="not supported"):
            directions(f, x)[way]()


def test_what_is_detached_goes_through_derivatives():
    from torch.func import grad, jvp

    q, k, v = inputs(heads=2)
    expected = qkv.torch.attention(q, k, v)

    def quiet(a):
        with torch.no_grad():
            return qkv.torch.attention(a, k, v)

    for f in (lambda a: qkv.torch.attention(a.detach(), k, v) * a.mean(), lambda a: quiet(a.detach()) * a.mean()):
        out, tangent = jvp(f, (q,), (torch.ones_like(q),))
        close(out, expected * q.mean())
        close(tangent, expected)
        close(grad(lambda a: f(a).sum())(q), torch.full_like(q, expected.sum() / q.numel()))


def test_out_with_a_gradient_is_refused():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="out.*not supported"):
        qkv.torch.attention(q.requires_grad_(), k, v, out=torch.empty(2, 8, 16, 16))
