//! LLaMA of candle-transformers with random weights, and the same model with its attention swapped; prints the times of each and
//! how far the logits are apart.
//!
//! ```text
//! cargo run --release -p qkv-candle --features llama-example --example llama -- [prompt length] [new tokens]
//! ```
//!
//! The attention of `candle_transformers::models::llama::Llama` is a private part of it and cannot be replaced from outside. So
//! the first row is that model as it comes, and the others are the model below: it is loaded from the same weights by the same
//! names, with the configuration, layers, rotary embedding and mask of candle's crates, and does what that one does except for
//! one line, the call of `attend`. That its logits agree with the first row's shows that it is the same model. The keys and
//! values are kept in candle-nn's `KvCache`, whose views into a larger buffer qkv reads in place.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_nn::attention::AttnMask;
use candle_nn::kv_cache::KvCache;
use candle_nn::{Embedding, Module, VarBuilder, VarMap, embedding};
use candle_transformers::models::llama::{Cache, Config, Llama};
use candle_transformers::models::with_tracing::{Linear, RmsNorm, linear_no_bias};
use candle_transformers::utils::{build_causal_mask, repeat_kv};

/// Attention of (batch, heads, length, dim): queries, keys, values, the number of tokens before the queries.
type Attend = fn(&Tensor, &Tensor, &Tensor, usize) -> Result<Tensor>;

/// As candle-transformers' LLaMA writes it: products, a mask and a softmax, keys and values repeated for the groups of heads.
fn written_out(q: &Tensor, k: &Tensor, v: &Tensor, before: usize) -> Result<Tensor> {
    let (_, heads, length, dim) = q.dims4()?;
    let groups = heads / k.dims4()?.1;
    let (k, v) = (repeat_kv(k.clone(), groups)?, repeat_kv(v.clone(), groups)?);
    let scores = (q.matmul(&k.t()?)? / (dim as f64).sqrt())?;
    let scores = if length == 1 {
        scores
    } else {
        let hidden = build_causal_mask(length, before, q.device())?.broadcast_as(scores.shape())?;
        let minus_infinity = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
        hidden.where_cond(&minus_infinity, &scores)?
    };
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v.contiguous()?)
}

/// The type that candle-nn's CPU flash attention and its drop-in share.
type Flash = fn(&Tensor, &Tensor, &Tensor, f32, AttnMask, Option<f32>, Option<f32>) -> Result<Tensor>;

/// A flash attention called as candle-transformers' Qwen3 calls it.
fn with_flash(flash: Flash, q: &Tensor, k: &Tensor, v: &Tensor, before: usize) -> Result<Tensor> {
    let [q, k, v] = [q.transpose(1, 2)?, k.transpose(1, 2)?, v.transpose(1, 2)?];
    let scale = 1.0 / (q.dims4()?.3 as f32).sqrt();
    flash(&q, &k, &v, scale, AttnMask::causal_with_offset(before), None, None)
}

fn candle_flash(q: &Tensor, k: &Tensor, v: &Tensor, before: usize) -> Result<Tensor> {
    with_flash(candle_nn::attention::flash_attn::<f32>, q, k, v, before)
}

fn qkv_flash(q: &Tensor, k: &Tensor, v: &Tensor, before: usize) -> Result<Tensor> {
    with_flash(qkv_candle::flash_attn::<f32>, q, k, v, before)
}

/// One layer.
struct Block {
    norms: [RmsNorm; 2],
    /// q, k, v, o.
    projections: [Linear; 4],
    /// Gate, up, down.
    mlp: [Linear; 3],
}

impl Block {
    fn load(vb: &VarBuilder<'_>, config: &Config) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let kv = hidden / config.num_attention_heads * config.num_key_value_heads;
        let linear = |input, output, name: &str| linear_no_bias(input, output, vb.pp(name));
        let norm = |name: &str| RmsNorm::new(hidden, config.rms_norm_eps, vb.pp(name));
        Ok(Self {
            norms: [norm("input_layernorm")?, norm("post_attention_layernorm")?],
            projections: [
                linear(hidden, hidden, "self_attn.q_proj")?,
                linear(hidden, kv, "self_attn.k_proj")?,
                linear(hidden, kv, "self_attn.v_proj")?,
                linear(hidden, hidden, "self_attn.o_proj")?,
            ],
            mlp: [
                linear(hidden, inner, "mlp.gate_proj")?,
                linear(hidden, inner, "mlp.up_proj")?,
                linear(inner, hidden, "mlp.down_proj")?,
            ],
        })
    }
}

/// LLaMA, whose attention is an argument.
struct Model {
    config: Config,
    tokens: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
}

impl Model {
    fn load(vb: &VarBuilder<'_>, config: &Config) -> Result<Self> {
        let hidden = config.hidden_size;
        let dim = hidden / config.num_attention_heads;
        let frequencies: Vec<f32> =
            (0..dim).step_by(2).map(|i| config.rope_theta.powf(-(i as f32) / dim as f32)).collect();
        let positions = Tensor::arange(0u32, config.max_position_embeddings as u32, vb.device())?;
        let frequencies = Tensor::from_vec(frequencies, (1, dim / 2), vb.device())?;
        let angles = positions.to_dtype(DType::F32)?.unsqueeze(1)?.matmul(&frequencies)?;
        let block = |i| Block::load(&vb.pp(format!("model.layers.{i}")), config);
        Ok(Self {
            tokens: embedding(config.vocab_size, hidden, vb.pp("model.embed_tokens"))?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: RmsNorm::new(hidden, config.rms_norm_eps, vb.pp("model.norm"))?,
            head: linear_no_bias(hidden, config.vocab_size, vb.pp("lm_head"))?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            config: config.clone(),
        })
    }

    fn caches(&self) -> Vec<KvCache> {
        self.blocks.iter().map(|_| KvCache::new(2, self.config.max_position_embeddings)).collect()
    }

    /// The logits of the last token; `spent` is increased by the time in `attend`.
    fn forward(
        &self,
        ids: &Tensor,
        before: usize,
        caches: &mut [KvCache],
        (attend, spent): (Attend, &mut Duration),
    ) -> Result<Tensor> {
        let (batch, length) = ids.dims2()?;
        let dim = self.config.hidden_size / self.config.num_attention_heads;
        let (cos, sin) = (self.cos.narrow(0, before, length)?, self.sin.narrow(0, before, length)?);
        let mut x = self.tokens.forward(ids)?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            let normed = block.norms[0].forward(&x)?;
            let heads = |projection: &Linear, heads: usize| -> Result<Tensor> {
                projection
                    .forward(&normed)?
                    .reshape((batch, length, heads, dim))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let q = heads(&block.projections[0], self.config.num_attention_heads)?;
            let k = heads(&block.projections[1], self.config.num_key_value_heads)?;
            let v = heads(&block.projections[2], self.config.num_key_value_heads)?;
            let q = candle_nn::rotary_emb::rope(&q, &cos, &sin)?;
            let k = candle_nn::rotary_emb::rope(&k, &cos, &sin)?;
            let (k, v) = cache.append(&k, &v)?;

            let start = Instant::now();
            let y = attend(&q, &k, &v, before)?;
            *spent += start.elapsed();

            let y = y.transpose(1, 2)?.reshape((batch, length, self.config.hidden_size))?;
            x = (x + block.projections[3].forward(&y)?)?;
            let normed = block.norms[1].forward(&x)?;
            let gate = candle_nn::ops::silu(&block.mlp[0].forward(&normed)?)?;
            x = (&x + block.mlp[2].forward(&(gate * block.mlp[1].forward(&normed)?)?)?)?;
        }
        self.head.forward(&self.norm.forward(&x)?.i((.., length - 1, ..))?.contiguous()?)
    }
}

/// A run: the logits of the prompt and of each new token, and times.
struct Run {
    logits: Vec<Tensor>,
    prompt: Duration,
    tokens: Duration,
    /// In attention: of the prompt, of the tokens. Not known for the model as it comes.
    attention: Option<[Duration; 2]>,
}

/// Reads the prompt, then the tokens that follow one by one (the same ones for all, so that logits can be compared).
fn run(
    ids: &Tensor,
    prompt: usize,
    mut forward: impl FnMut(&Tensor, usize, &mut Duration) -> Result<Tensor>,
    knows_attention: bool,
) -> Result<Run> {
    let mut attention = [Duration::ZERO; 2];
    let start = Instant::now();
    let mut logits = vec![forward(&ids.narrow(1, 0, prompt)?, 0, &mut attention[0])?];
    let of_prompt = start.elapsed();
    let start = Instant::now();
    for at in prompt..ids.dims2()?.1 {
        logits.push(forward(&ids.narrow(1, at, 1)?, at, &mut attention[1])?);
    }
    let tokens = start.elapsed();
    Ok(Run { logits, prompt: of_prompt, tokens, attention: knows_attention.then_some(attention) })
}

/// The largest difference between two runs' logits.
fn difference(a: &Run, b: &Run) -> Result<f32> {
    let mut most = 0f32;
    for (a, b) in a.logits.iter().zip(&b.logits) {
        most = most.max((a - b)?.abs()?.max_all()?.to_scalar()?);
    }
    Ok(most)
}

fn argument(index: usize, default: usize) -> Result<usize> {
    match std::env::args().nth(index) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| candle_core::Error::msg(format!("{text}: expected a number"))),
    }
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let (prompt, tokens) = (argument(1, 512)?.max(1), argument(2, 32)?);
    let config = Config {
        hidden_size: 512,
        intermediate_size: 1408,
        vocab_size: 4096,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        use_flash_attn: false,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: prompt + tokens,
        tie_word_embeddings: false,
    };
    // Random weights, made by loading once; then plain tensors, which need no gradient.
    let variables = VarMap::new();
    Llama::load(VarBuilder::from_varmap(&variables, DType::F32, &device), &config)?;
    let weights = variables
        .data()
        .lock()
        .map_err(|_| candle_core::Error::msg("the weights are locked"))?
        .iter()
        .map(|(name, variable)| (name.clone(), variable.as_tensor().detach()))
        .collect();
    let vb = VarBuilder::from_tensors(weights, DType::F32, &device);
    let theirs = Llama::load(vb.clone(), &config)?;
    let ours = Model::load(&vb, &config)?;
    let ids: Vec<u32> = (0..prompt + tokens).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
    let ids = Tensor::from_vec(ids, (1, prompt + tokens), &device)?;

    let ways: [(&str, Option<Attend>); 4] = [
        ("candle-transformers as it comes", None),
        ("softmax(QK^T)V, written out", Some(written_out)),
        ("candle-nn flash_attn", Some(candle_flash)),
        ("qkv_candle::flash_attn", Some(qkv_flash)),
    ];
    println!(
        "prompt of {prompt}, then {tokens} tokens; milliseconds, best of 3; in attention alone in brackets"
    );
    println!("{:32} {:>20} {:>22} {:>20}", "", "prompt", "per token", "logits differ by");
    let mut first: Option<Run> = None;
    for (name, attend) in ways {
        let mut best: Option<Run> = None;
        for _ in 0..3 {
            let new = match attend {
                None => {
                    let mut cache = Cache::new(true, DType::F32, &config, &device)?;
                    run(&ids, prompt, |ids, before, _| theirs.forward(ids, before, &mut cache), false)?
                }
                Some(attend) => {
                    let mut caches = ours.caches();
                    let forward = |ids: &Tensor, before, spent: &mut Duration| {
                        ours.forward(ids, before, &mut caches, (attend, spent))
                    };
                    run(&ids, prompt, forward, true)?
                }
            };
            if best.as_ref().is_none_or(|best| new.prompt + new.tokens < best.prompt + best.tokens) {
                best = Some(new);
            }
        }
        let Some(best) = best else { continue };
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let each = tokens.max(1) as f64;
        let [of_prompt, of_tokens] = match best.attention {
            Some([prompt, tokens]) => [format!("({:.1})", ms(prompt)), format!("({:.3})", ms(tokens) / each)],
            None => [String::new(), String::new()],
        };
        let apart = match &first {
            Some(first) => format!("{:.1e}", difference(&best, first)?),
            None => String::new(),
        };
        println!(
            "{name:32} {:>10.1} {of_prompt:>9} {:>11.3} {of_tokens:>10} {apart:>20}",
            ms(best.prompt),
            ms(best.tokens) / each
        );
        first.get_or_insert(best);
    }
    Ok(())
}
