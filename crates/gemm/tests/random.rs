//! Random products: sizes, layouts, scales, epilogues and block sizes against the oracle, with shrinking.

mod common;

use common::{Layout, Matrix, Rng, assert_close, reference};
use proptest::prelude::*;
use qkv_gemm::{Activation, Blocking, GemmSpec, gemm};
use qkv_simd::Isa;

fn blocking() -> impl Strategy<Value = Option<Blocking>> {
    let size = 1usize..80;
    let given = (size.clone(), size.clone(), size.clone(), size, any::<bool>(), any::<bool>())
        .prop_map(|(kc, mc, nc, rows, pack_a, pack_b)| Blocking { kc, mc, nc, rows, pack_a, pack_b });
    prop_oneof![3 => Just(None), 1 => given.prop_map(Some)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn product_is_within_the_error_bound(
        m in 0usize..70, k in 0usize..90, n in 0usize..70,
        long_k in prop::bool::weighted(0.1),
        a in prop::sample::select(&Layout::INPUTS[..]),
        b in prop::sample::select(&Layout::INPUTS[..]),
        c in prop::sample::select(&Layout::OUTPUTS[..]),
        alpha in prop_oneof![Just(1.0f32), -2.0f32..2.0],
        beta in prop_oneof![Just(0.0f32), Just(1.0f32), -2.0f32..2.0],
        with_bias in any::<bool>(),
        activation in prop::option::of(prop::sample::select(&Activation::ALL[..])),
        blocking in blocking(),
        isa in 0usize..8,
        seed in any::<u64>(),
    ) {
        let k = if long_k { k + 500 } else { k };
        let available = Isa::available();
        let isa = available[isa % available.len()];
        let mut rng = Rng::new(seed);
        let bias: Vec<f32> = (0..n).map(|_| rng.value()).collect();
        let a = Matrix::random(a, m, k, &mut rng);
        let b = Matrix::random(b, k, n, &mut rng);
        let mut c = Matrix::filled(c, m, n, || if beta == 0.0 { f32::NAN } else { rng.value() });
        let spec = GemmSpec {
            alpha, beta, bias: with_bias.then_some(&bias[..]), activation, isa: Some(isa), blocking,
        };
        let expected = reference(a.view(), b.view(), c.view(), &spec);
        gemm(a.view(), b.view(), &mut c.view_mut(), &spec).expect("a product");
        assert_close(&c, &expected, "random product");
    }
}
