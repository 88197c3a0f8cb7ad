//! A query head of a group alone, with the key/value head that it reads, gives the bits that it has in its group and batch: however
//! many rows share a kernel, and whatever its keys are stored as.

mod common;

use common::random;
use half::{bf16, f16};
use qkv_attention::{
    AttentionSpec, Bias, Broadcast, Causal, Data, Int8Ref, Outputs, T5Bias, Tensor, TensorRef, Window,
    attention_into,
};

/// What keys and values are stored as, each contiguous.
#[derive(Clone, Copy, Debug)]
enum Kind {
    F32,
    F16,
    Bf16,
    Int8 { zeros: bool },
}

/// A tensor in all kinds.
struct Stored {
    shape: [usize; 4],
    f32s: Tensor,
    f16s: Vec<f16>,
    bf16s: Vec<bf16>,
    bytes: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
}

impl Stored {
    fn new(shape @ [batch, heads, length, _]: [usize; 4], seed: u64) -> Self {
        let f32s = random(shape, seed);
        let x = f32s.data();
        Self {
            shape,
            f16s: x.iter().map(|&x| f16::from_f32(x)).collect(),
            bf16s: x.iter().map(|&x| bf16::from_f32(x)).collect(),
            bytes: x.iter().map(|&x| (x * 127.0) as i8).collect(),
            scales: random([batch, heads, length, 1], seed + 10)
                .data()
                .iter()
                .map(|x| 0.01 + x * 0.002)
                .collect(),
            zeros: random([batch, heads, length, 1], seed + 20).data().iter().map(|x| x * 9.0).collect(),
            f32s,
        }
    }

    /// All of it, or a (batch, head) alone.
    fn data(&self, kind: Kind, only: Option<[usize; 2]>) -> Data<'_> {
        let [batch, heads, length, dim] = self.shape;
        let (shape, head) = match only {
            None => (self.shape, 0),
            Some([b, h]) => ([1, 1, length, dim], b * heads + h),
        };
        let rows = if only.is_some() { length } else { batch * heads * length };
        let (from, beside) = (head * length, [shape[0], shape[1], length, 1]);
        fn cut<T: Copy>(all: &[T], from: usize, rows: usize, shape: [usize; 4]) -> TensorRef<'_, T> {
            TensorRef::from_slice(&all[from * shape[3]..][..rows * shape[3]], shape).unwrap()
        }
        match kind {
            Kind::F32 => cut(self.f32s.data(), from, rows, shape).into(),
            Kind::F16 => cut(&self.f16s, from, rows, shape).into(),
            Kind::Bf16 => cut(&self.bf16s, from, rows, shape).into(),
            Kind::Int8 { zeros } => {
                let zeros = zeros.then(|| cut(&self.zeros, from, rows, beside));
                let scales = cut(&self.scales, from, rows, beside);
                Int8Ref::new(cut(&self.bytes, from, rows, shape), scales, zeros).unwrap().into()
            }
        }
    }
}

/// The bits of outputs, LSE and maxima.
fn run(q: Data<'_>, k: Data<'_>, v: Data<'_>, spec: &AttentionSpec<'_>) -> [Vec<u32>; 3] {
    let [batch, heads, length, _] = q.shape();
    let mut out = Tensor::zeros([batch, heads, length, v.shape()[3]]).unwrap();
    let (mut lse, mut maxima) = (vec![0.0; batch * heads * length], vec![0.0; batch * heads * length]);
    let outputs = Outputs::new(out.view_mut()).with_lse(&mut lse).with_maxima(&mut maxima);
    attention_into(q, k, v, spec, outputs).unwrap();
    [out.data(), &lse, &maxima].map(|x| x.iter().map(|x| x.to_bits()).collect())
}

/// Options that a head has its own part of, and those that it has not.
struct Options {
    mask: Vec<bool>,
    bias: Vec<f32>,
    slopes: Vec<f32>,
    sinks: Vec<f32>,
    table: Vec<f32>,
    tables: Vec<Vec<f32>>,
    lengths: Vec<usize>,
}

const BUCKETS: usize = 8;

/// Which of them, by number.
const WAYS: usize = 8;

impl Options {
    fn new([batch, heads, length, _]: [usize; 4], keys: usize) -> Self {
        let scores = random([batch, heads, length, keys], 5);
        let table = random([1, 1, BUCKETS, heads], 6);
        let column = |head| (0..BUCKETS).map(|bucket| table.data()[bucket * heads + head]).collect();
        Self {
            mask: scores.data().iter().map(|&x| x > -0.4).collect(),
            bias: scores.data().iter().map(|&x| if x < -0.7 { f32::NEG_INFINITY } else { x * 3.0 }).collect(),
            slopes: (0..heads).map(|head| 0.01 + 0.02 * head as f32).collect(),
            sinks: (0..heads).map(|head| 0.3 * head as f32 - 1.0).collect(),
            tables: (0..heads).map(column).collect(),
            table: table.data().to_vec(),
            lengths: (0..batch).map(|b| keys - (b * 37).min(keys)).collect(),
        }
    }

    fn spec(
        &self,
        way: usize,
        [batch, heads, length, _]: [usize; 4],
        keys: usize,
        only: Option<[usize; 2]>,
    ) -> AttentionSpec<'_> {
        let spec = AttentionSpec::new();
        let each = length * keys;
        let (shape, from) = match only {
            None => ([batch, heads, length, keys], 0),
            Some([b, h]) => ([1, 1, length, keys], (b * heads + h) * each),
        };
        let values = from..from + shape[0] * shape[1] * each;
        let of_head = only.map_or(0..heads, |[_, h]| h..h + 1);
        let of_batch = only.map_or(0..batch, |[b, _]| b..b + 1);
        match way {
            0 => spec,
            1 => spec.with_causal(Causal::BottomRight).with_window(Window::new(Some(300), None)),
            2 => spec.with_causal(Causal::BottomRight).with_key_lengths(&self.lengths[of_batch]),
            3 => spec.with_mask(Broadcast::from_slice(&self.mask[values], shape).unwrap()),
            4 => spec.with_bias(Bias::F32(Broadcast::from_slice(&self.bias[values], shape).unwrap())),
            5 => spec.with_alibi_slopes(&self.slopes[of_head]).with_softcap(2.0),
            6 => spec.with_sinks(&self.sinks[of_head]).with_window(Window::new(Some(700), Some(40))),
            _ => spec.with_t5_bias(T5Bias {
                table: only.map_or(&self.table[..], |[_, h]| &self.tables[h]),
                buckets: BUCKETS,
                max_distance: 64,
                bidirectional: true,
            }),
        }
    }
}

fn check(
    batch: usize,
    kv_heads: usize,
    group: usize,
    [length, keys]: [usize; 2],
    kinds: &[Kind],
    ways: &[usize],
) {
    let (dk, dv) = (36, 135);
    let q = Stored::new([batch, kv_heads * group, length, dk], 1);
    let k = Stored::new([batch, kv_heads, keys, dk], 2);
    let v = Stored::new([batch, kv_heads, keys, dv], 3);
    let options = Options::new(q.shape, keys);
    for (&kind, &way) in kinds.iter().flat_map(|kind| ways.iter().map(move |way| (kind, way))) {
        let spec = options.spec(way, q.shape, keys, None);
        let together = run(q.data(Kind::F32, None), k.data(kind, None), v.data(kind, None), &spec);
        // The first and the last head of each group: they lie in the first and the last rows.
        for (b, kv) in (0..batch).flat_map(|b| (0..kv_heads).map(move |kv| (b, kv))) {
            for h in [kv * group, kv * group + group - 1] {
                let spec = options.spec(way, q.shape, keys, Some([b, h]));
                let [q, k, v] = [
                    q.data(Kind::F32, Some([b, h])),
                    k.data(kind, Some([b, kv])),
                    v.data(kind, Some([b, kv])),
                ];
                let alone = run(q, k, v, &spec);
                let row = (b * kv_heads * group + h) * length;
                for (name, size, (together, alone)) in [("out", dv), ("lse", 1), ("maxima", 1)]
                    .into_iter()
                    .zip(together.iter().zip(&alone))
                    .map(|((n, s), x)| (n, s, x))
                {
                    assert!(
                        together[row * size..][..length * size] == alone[..],
                        "{name} of head {h}, group of {group}, {length} queries, {keys} keys, {kind:?}, way {way}"
                    );
                }
            }
        }
    }
}

/// NaN in another row, which has all looked at once more, moves no bit of this one.
#[test]
fn beside_a_row_that_is_nan() {
    let kinds = [Kind::F32, Kind::F16, Kind::Bf16, Kind::Int8 { zeros: false }, Kind::Int8 { zeros: true }];
    for (kind, dv) in kinds.into_iter().flat_map(|kind| [(kind, 32), (kind, 300)]) {
        let mut q = random([1, 1, 2, 16], 1);
        let (k, v) = (Stored::new([1, 1, 64, 16], 2), Stored::new([1, 1, 64, dv], 3));
        let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
        let clean = run(q.view().into(), k.data(kind, None), v.data(kind, None), &spec);
        q.data_mut()[16 + 5] = f32::NAN;
        let beside = run(q.view().into(), k.data(kind, None), v.data(kind, None), &spec);
        assert!(clean[0][..dv] == beside[0][..dv] && clean[1][0] == beside[1][0], "{kind:?}, {dv} dims");
        assert!(beside[0][dv..].iter().all(|&x| f32::from_bits(x).is_nan()), "{kind:?}, {dv} dims");
    }
}

const ALL: [usize; WAYS] = [0, 1, 2, 3, 4, 5, 6, 7];

#[test]
fn of_any_group() {
    for group in [2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 33, 65, 130] {
        check(1, 1, group, [1, 300], &[Kind::F32, Kind::Bf16], &[0, 1, 3]);
    }
}

#[test]
fn of_any_length() {
    for length in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 49, 65] {
        check(2, 2, 3, [length, 270], &[Kind::F32], &[0, 2, 5]);
    }
}

#[test]
fn over_any_number_of_keys() {
    for keys in [1, 15, 16, 17, 31, 33, 255, 256, 257, 1023, 1024, 1025, 2600] {
        for length in [1, 6, 20] {
            check(1, 2, 5, [length, keys], &[Kind::F32], &[0, 1]);
        }
    }
}

#[test]
fn with_any_option_and_storage() {
    let kinds = [Kind::F32, Kind::F16, Kind::Bf16, Kind::Int8 { zeros: false }, Kind::Int8 { zeros: true }];
    for length in [1, 4, 18] {
        check(2, 1, 10, [length, 1300], &kinds, &ALL);
    }
}
