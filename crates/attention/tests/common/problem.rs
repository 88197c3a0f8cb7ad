//! A problem with any combination of the options, owning what they borrow, drawn at random.

use proptest::prelude::*;
use qkv_attention::{
    AttentionSpec, Bias, BlockMask, Broadcast, Causal, HalfKind, T5Bias, Tensor, Window, attention_with_lse,
    reference,
};

use super::{assert_close, random};

/// Which axes of a mask or bias are there, the others being broadcast: batch, heads, queries, keys.
pub type Axes = [bool; 4];

/// Which options are on, as numbers that shrink well.
#[derive(Clone, Debug)]
pub struct Options {
    pub causal: Option<Causal>,
    pub window: Option<(Option<usize>, Option<usize>, usize)>,
    pub softcap: Option<f32>,
    pub prefix: bool,
    pub mask: Option<Axes>,
    pub bias: Option<(Axes, u8)>,
    pub alibi: Option<bool>,
    pub t5: Option<bool>,
    pub key_lengths: bool,
    pub key_starts: bool,
    pub documents: bool,
    pub blocks: Option<([usize; 2], bool, bool)>,
    pub sinks: bool,
}

#[derive(Clone, Debug)]
pub struct Problem {
    pub batch: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub query_len: usize,
    pub key_len: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub seed: u64,
    pub options: Options,
}

fn axes() -> impl Strategy<Value = Axes> {
    any::<Axes>()
}

fn some<T: core::fmt::Debug + Clone>(s: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    proptest::option::weighted(0.25, s)
}

pub fn causal() -> impl Strategy<Value = Option<Causal>> {
    prop_oneof![
        Just(None),
        Just(Some(Causal::TopLeft)),
        Just(Some(Causal::BottomRight)),
        (-150i64..150).prop_map(|offset| Some(Causal::Offset(offset))),
    ]
}

prop_compose! {
    fn options()(
        causal in causal(),
        window in some((proptest::option::of(0usize..90), proptest::option::of(0usize..90), 1usize..4)),
        softcap in some(0.3f32..5.0),
        prefix in any::<bool>(),
        mask in some(axes()),
        bias in some((axes(), 0u8..3)),
        alibi in some(any::<bool>()),
        t5 in some(any::<bool>()),
        flags in proptest::collection::vec(proptest::bool::weighted(0.25), 4),
        blocks in some(((1usize..70, 1usize..150).prop_map(|(q, k)| [q, k]), any::<bool>(), any::<bool>())),
    ) -> Options {
        Options {
            causal, window, softcap, mask, bias, alibi, t5, blocks,
            prefix: prefix && causal.is_some(),
            key_lengths: flags[0], key_starts: flags[1], documents: flags[2], sinks: flags[3],
        }
    }
}

prop_compose! {
    pub fn problems()(
        batch in 1usize..3,
        kv_heads in 1usize..3,
        group in 1usize..4,
        query_len in 0usize..100,
        key_len in 0usize..300,
        key_dim in 1usize..40,
        value_dim in 1usize..40,
        seed in any::<u64>(),
        options in options(),
    ) -> Problem {
        Problem { batch, kv_heads, group, query_len, key_len, key_dim, value_dim, seed, options }
    }
}

/// What the options borrow.
pub struct Owned {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    mask: Vec<bool>,
    bias: Vec<f32>,
    half: Vec<u16>,
    slopes: Vec<f32>,
    table: Vec<f32>,
    lengths: Vec<usize>,
    starts: Vec<usize>,
    prefix: Vec<usize>,
    documents: Vec<usize>,
    blocks: Option<BlockMask>,
    sinks: Vec<f32>,
}

impl Problem {
    pub fn heads(&self) -> usize {
        self.kv_heads * self.group
    }

    fn sizes(&self, axes: Axes) -> [usize; 4] {
        let full = [self.batch, self.heads(), self.query_len, self.key_len];
        core::array::from_fn(|i| if axes[i] { full[i] } else { 1 })
    }

    fn numbers(&self, count: usize, salt: u64) -> Vec<f32> {
        random([1, 1, 1, count], self.seed.wrapping_mul(31).wrapping_add(salt)).into_vec()
    }

    fn below(&self, count: usize, limit: usize, salt: u64) -> Vec<usize> {
        let unit = self.numbers(count, salt);
        unit.into_iter()
            .map(|x| ((x + 1.0) / 2.0 * (limit + 1) as f32) as usize)
            .map(|x| x.min(limit))
            .collect()
    }

    pub fn own(&self) -> Owned {
        let o = &self.options;
        let count = |axes: Option<Axes>| axes.map_or(0, |axes| self.sizes(axes).iter().product());
        let mask = self.numbers(count(o.mask), 1).into_iter().map(|x| x < 0.6).collect();
        // Some of a bias masks.
        let bias: Vec<f32> = self
            .numbers(count(o.bias.map(|b| b.0)), 2)
            .into_iter()
            .map(|x| if x > 0.9 { f32::NEG_INFINITY } else { 2.0 * x })
            .collect();
        let half = bias
            .iter()
            .map(|&x| match o.bias {
                Some((_, 1)) => half::f16::from_f32(x).to_bits(),
                _ => half::bf16::from_f32(x).to_bits(),
            })
            .collect();
        let mut documents = self.below(3, self.key_len, 3);
        documents.sort_unstable();
        documents.push(self.key_len);
        let blocks = o.blocks.map(|(block, per_batch, per_head)| {
            let shape = [
                if per_batch { self.batch } else { 1 },
                if per_head { self.heads() } else { 1 },
                self.query_len.div_ceil(block[0]),
                self.key_len.div_ceil(block[1]),
            ];
            let mut numbers = self.numbers(shape.iter().product(), 4).into_iter();
            BlockMask::from_fn(shape, block, |_| numbers.next().unwrap() < 0.2).unwrap()
        });
        let slopes = if o.alibi == Some(true) { self.batch * self.heads() } else { self.heads() };
        Owned {
            q: random([self.batch, self.heads(), self.query_len, self.key_dim], self.seed),
            k: random([self.batch, self.kv_heads, self.key_len, self.key_dim], self.seed ^ 5),
            v: random([self.batch, self.kv_heads, self.key_len, self.value_dim], self.seed ^ 6),
            mask,
            bias,
            half,
            slopes: self.numbers(slopes, 7).into_iter().map(|x| x * 0.1).collect(),
            table: self.numbers(32 * self.heads(), 8),
            lengths: self.below(self.batch, self.key_len, 9),
            starts: self.below(self.batch, self.key_len, 10),
            prefix: self.below(self.batch, self.key_len, 11),
            documents,
            blocks,
            sinks: self.numbers(self.heads(), 12).into_iter().map(|x| 2.0 * x).collect(),
        }
    }

    pub fn spec<'a>(&self, owned: &'a Owned) -> AttentionSpec<'a> {
        let o = &self.options;
        let mut spec = AttentionSpec::new();
        spec.causal = o.causal;
        spec.window =
            o.window.map(|(left, right, dilation)| Window::new(left, right).with_dilation(dilation));
        spec.softcap = o.softcap;
        spec.prefix = o.prefix.then_some(&owned.prefix);
        spec.mask = o.mask.map(|axes| Broadcast::from_slice(&owned.mask, self.sizes(axes)).unwrap());
        spec.bias = o.bias.map(|(axes, kind)| match kind {
            0 => Bias::F32(Broadcast::from_slice(&owned.bias, self.sizes(axes)).unwrap()),
            1 => Bias::Half(HalfKind::F16, Broadcast::from_slice(&owned.half, self.sizes(axes)).unwrap()),
            _ => Bias::Half(HalfKind::Bf16, Broadcast::from_slice(&owned.half, self.sizes(axes)).unwrap()),
        });
        spec.alibi_slopes = o.alibi.map(|_| &*owned.slopes);
        spec.t5_bias = o.t5.map(|bidirectional| T5Bias {
            table: &owned.table,
            buckets: 32,
            max_distance: 128,
            bidirectional,
        });
        spec.key_lengths = o.key_lengths.then_some(&*owned.lengths);
        spec.key_starts = o.key_starts.then_some(&*owned.starts);
        spec.documents = o.documents.then_some(&*owned.documents);
        spec.block_mask = owned.blocks.as_ref();
        spec.sinks = o.sinks.then_some(&*owned.sinks);
        spec
    }

    /// Output and LSE against the oracle within the error model of docs/NUMERICS.md.
    pub fn check(&self) {
        let owned = self.own();
        let spec = self.spec(&owned);
        let (q, k, v) = (owned.q.view(), owned.k.view(), owned.v.view());
        let (out, lse) = attention_with_lse(q, k, v, &spec).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let exact = reference::oracle(q, k, v, &spec);
        // The largest magnitudes that are added up to a score: the product, the bias, T5's, ALiBi's.
        let dk = self.key_dim as f64;
        let mut largest = dk.sqrt();
        largest += if self.options.bias.is_some() { 2.0 } else { 0.0 };
        largest += if self.options.t5.is_some() { 1.0 } else { 0.0 };
        largest += if self.options.alibi.is_some() { 0.1 * 500.0 } else { 0.0 };
        let eps = f64::from(f32::EPSILON);
        // tanh is within 3 ULP of itself, and is multiplied by the cap.
        let cap = self.options.softcap.map_or(0.0, |cap| 3.0 * f64::from(cap));
        let tolerance = 8.0 * eps + 2.0 * eps * (dk.sqrt() * largest.max(1.0) + cap);
        assert_close(&format!("{self:?} output"), out.data(), exact.output.data(), tolerance);
        assert_close(&format!("{self:?} lse"), &lse, &exact.lse, tolerance * largest.max(8.0));
    }
}
