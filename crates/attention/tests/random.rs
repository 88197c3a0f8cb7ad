//! Random problems, shrunk when they fail.

mod common;

use common::Case;
use common::problem::causal;
use proptest::prelude::*;

prop_compose! {
    fn cases()(
        batch in 0usize..3,
        kv_heads in 1usize..4,
        group in 1usize..6,
        query_len in 0usize..140,
        key_len in 0usize..220,
        key_dim in 1usize..70,
        value_dim in 0usize..70,
        causal in causal(),
        scale in prop_oneof![Just(None), (-2.0f32..2.0).prop_map(Some)],
        seed in any::<u64>(),
    ) -> Case {
        Case { batch, kv_heads, group, query_len, key_len, key_dim, value_dim, causal, scale, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn agrees_with_the_oracle(case in cases()) {
        case.check();
    }
}
