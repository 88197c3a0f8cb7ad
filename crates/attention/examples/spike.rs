//! scratch
use qkv_attention::*;
use qkv_simd::{Isa, Simd, SimdOp};
use std::time::Instant;
struct Peak(usize);
impl SimdOp for Peak {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut acc = [s.zero(); 12];
        let a = s.splat(std::hint::black_box(1.0));
        let b = s.splat(std::hint::black_box(1e-9));
        for _ in 0..self.0 {
            for x in acc.iter_mut() {
                *x = s.mul_add(a, b, *x);
            }
        }
        let mut t = s.zero();
        for x in acc {
            t = s.add(t, x);
        }
        s.reduce_add(t)
    }
}
fn peak(threads: usize) -> f64 {
    let isa = Isa::active().unwrap();
    let n = 2_000_000;
    let t = Instant::now();
    std::thread::scope(|sc| {
        for _ in 0..threads {
            sc.spawn(|| std::hint::black_box(isa.dispatch(Peak(n))));
        }
    });
    (threads * n * 12 * 2 * isa.lanes()) as f64 / t.elapsed().as_secs_f64() / 1e9
}
fn main() {
    let threads = rayon::current_num_threads();
    let shapes = [
        (1, 1, 1, 2048, 64),
        (1, 4, 4, 2048, 64),
        (1, 2, 2, 2048, 128),
        (1, 12, 12, 512, 64),
        (8, 12, 12, 128, 64),
        (32, 12, 12, 128, 32),
        (1, 12, 12, 32, 64),
        (1, 32, 8, 1024, 128),
    ];
    let only: Option<usize> = std::env::args().nth(1).map(|x| x.parse().unwrap());
    let only_causal: Option<usize> = std::env::args().nth(2).map(|x| x.parse().unwrap());
    for (idx, (b, h, hk, s, d)) in shapes.into_iter().enumerate() {
        if only.is_some_and(|o| o != idx) {
            continue;
        }
        let mut x = 1u64;
        let mut rnd = move |_| {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((x >> 40) as f32) / (1 << 23) as f32 - 1.0
        };
        let q = Tensor::from_fn([b, h, s, d], &mut rnd).unwrap();
        let k = Tensor::from_fn([b, hk, s, d], &mut rnd).unwrap();
        let v = Tensor::from_fn([b, hk, s, d], &mut rnd).unwrap();
        let mut o = Tensor::zeros([b, h, s, d]).unwrap();
        for causal in [None, Some(Causal::TopLeft)] {
            if only_causal.is_some_and(|c| (c == 1) != causal.is_some()) {
                continue;
            }
            let mut spec = AttentionSpec::new();
            spec.causal = causal;
            let plan = explain(q.view(), k.view(), v.view(), &spec).unwrap();
            let flops = (if causal.is_some() { 0.5 } else { 1.0 }) * (b * h * s * s * d * 4) as f64;
            let reps = (3e9 / flops).ceil().max(3.0) as usize;
            let mut best = vec![];
            for _ in 0..7 {
                let p = peak(threads);
                let t = Instant::now();
                for _ in 0..reps {
                    attention_into(q.view(), k.view(), v.view(), &spec, Outputs::new(o.view_mut())).unwrap();
                }
                let e = t.elapsed().as_secs_f64() / reps as f64;
                best.push((flops / e / 1e9 / p * 100.0, e, p));
            }
            best.sort_by(|a, b| a.0.total_cmp(&b.0));
            let m = best[3];
            println!(
                "B{b} H{h}/{hk} S{s} d{d} {:7} {:5.1} % of {:.0}  {:.1} us   best {:.1}",
                if causal.is_some() { "causal" } else { "full" },
                m.0,
                m.2,
                m.1 * 1e6,
                best[6].0
            );
            if causal.is_none() {
                println!("    {plan}");
            }
        }
    }
}
