//! What the tests share: random tensors, cases, and the comparison with the oracle.
#![allow(dead_code, unreachable_pub, reason = "each test file is a crate of its own and uses its part")]

pub mod problem;

use qkv_attention::{AttentionSpec, Causal, Tensor, attention_with_lse, reference};

/// Uniform in [-1, 1) from splitmix64.
pub fn random(shape: [usize; 4], seed: u64) -> Tensor {
    let mut state = seed;
    Tensor::from_fn(shape, |_| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
    .expect("a small shape")
}

/// One problem.
#[derive(Clone, Debug)]
pub struct Case {
    pub batch: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub query_len: usize,
    pub key_len: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub causal: Option<Causal>,
    pub scale: Option<f32>,
    pub seed: u64,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            batch: 1,
            kv_heads: 1,
            group: 1,
            query_len: 1,
            key_len: 1,
            key_dim: 16,
            value_dim: 16,
            causal: None,
            scale: None,
            seed: 1,
        }
    }
}

impl Case {
    pub fn spec(&self) -> AttentionSpec<'static> {
        let mut spec = AttentionSpec::new();
        spec.causal = self.causal;
        spec.scale = self.scale;
        spec
    }

    pub fn tensors(&self) -> [Tensor; 3] {
        let heads = self.kv_heads * self.group;
        [
            random([self.batch, heads, self.query_len, self.key_dim], self.seed),
            random([self.batch, self.kv_heads, self.key_len, self.key_dim], self.seed + 1),
            random([self.batch, self.kv_heads, self.key_len, self.value_dim], self.seed + 2),
        ]
    }

    /// Output and LSE against the oracle within the error model of docs/NUMERICS.md.
    pub fn check(&self) {
        let [q, k, v] = self.tensors();
        let (q, k, v) = (q.view(), k.view(), v.view());
        let spec = self.spec();
        let (out, lse) = attention_with_lse(q, k, v, &spec).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let exact = reference::oracle(q, k, v, &spec);
        // Scores are at most |scale| dk in magnitude here, and their error is an error of the exponent.
        let largest = spec.scale_for(self.key_dim).abs() * self.key_dim as f64;
        let score_error = f64::from(f32::EPSILON) * (self.key_dim as f64).sqrt() * largest.max(1.0);
        let tolerance = 8.0 * f64::from(f32::EPSILON) + 2.0 * score_error;
        assert_close(&format!("{self:?} output"), out.data(), exact.output.data(), tolerance);
        assert_close(&format!("{self:?} lse"), &lse, &exact.lse, tolerance * largest.max(8.0));
    }
}

/// Equal within an absolute tolerance; infinities and NaN must be the same.
pub fn assert_close(what: &str, got: &[f32], exact: &[f64], tolerance: f64) {
    assert_eq!(got.len(), exact.len(), "{what}: lengths");
    for (i, (&got, &exact)) in got.iter().zip(exact).enumerate() {
        let got = f64::from(got);
        let same = got == exact || (got.is_nan() && exact.is_nan()) || (got - exact).abs() <= tolerance;
        assert!(same, "{what}[{i}]: {got} against {exact}, off by {:e} of {tolerance:e}", got - exact);
    }
}
