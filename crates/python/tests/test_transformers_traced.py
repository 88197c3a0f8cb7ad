"""transformers models under torch.compile and torch.export: the same logits and tokens as eager's."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import qkv.transformers
from test_transformers import SEQ2SEQ, SPECIAL, VOCABULARY, WITHOUT_SDPA, assert_close, both, language_model, prompt, randomise


@pytest.mark.parametrize(
    "name,padding,dynamic",
    [(n, p, False) for n in ("llama", "mistral", "gemma2", "gpt_oss") for p in (None, "left")]
    + [("llama", None, True), ("mistral", "left", True), ("gpt_oss", "left", True)],
)
def test_compiled(name, padding, dynamic):
    ids, mask = prompt(padding)
    given = None if padding is None else mask
    model = language_model(name)
    torch.compiler.reset()
    expected, actual = both(model, lambda: model(ids, attention_mask=given).logits)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        actual = compiled(ids, attention_mask=given).logits
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("family", WITHOUT_SDPA)
def test_compiled_without_sdpa(family, padding):
    head, sizes = SEQ2SEQ[family]
    options = {"encoder_sparse_step": 0, "decoder_sparse_step": 0} if family == "NllbMoe" else {}
    sizes = {**sizes, **options, **SPECIAL}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, decoder_start_token_id=1, **sizes)
    model = randomise(getattr(transformers, head)(config))
    ids, mask = prompt(padding)
    given = None if padding is None else mask
    target = prompt(None, seed=5)[0][:, :9]

    def run(model):
        return model(ids, attention_mask=given, decoder_input_ids=target, use_cache=False).logits

    torch.compiler.reset()
    expected, _ = both(model, lambda: run(model))
    with torch.no_grad():
        actual = run(torch.compile(model, backend="aot_eager"))
    assert_close(actual, expected)


def test_layers_compiled_one_by_one():
    ids, mask = prompt("left")
    model = language_model("mistral")
    torch.compiler.reset()
    try:
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        expected, actual = both(model, lambda: model(ids, attention_mask=mask).logits)
    finally:
        language_model.cache_clear()
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_decoding_with_a_static_cache(name):
    ids, mask = prompt("left")
    model = language_model(name)
    torch.compiler.reset()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected = both(model, lambda: model.generate(ids, attention_mask=mask, disable_compile=True, **options))[0]
    compile_config = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    actual = model.generate(ids, attention_mask=mask, compile_config=compile_config, **options)
    language_model.cache_clear()
    assert torch.equal(actual, expected)


def test_exported():
    ids, mask = prompt("left")
    model = language_model("mistral")
    expected, _ = both(model, lambda: model(ids, attention_mask=mask).logits)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        shapes = ({0: batch, 1: length}, {0: batch, 1: length})
        program = torch.export.export(Logits(), (ids, mask), dynamic_shapes=shapes)
    assert "qkv.attention" in str(program.graph)
    assert_close(program.module()(ids, mask)[mask.bool()], expected[mask.bool()])
    shorter = program.module()(ids[:2, 4:], mask[:2, 4:])
    expected, _ = both(model, lambda: model(ids[:2, 4:], attention_mask=mask[:2, 4:]).logits)
    kept = mask[:2, 4:].bool()
    assert_close(shorter[kept], expected[kept])
