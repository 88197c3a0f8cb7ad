//! Matrix products, threads and the machine through the C functions.

mod support;

use std::ptr::null;

use qkv_capi::qkv_status::*;
use qkv_capi::*;
use support::*;

/// alpha A B + beta C + bias in f64, of row-major matrices.
fn by_the_book(
    a: &[f32],
    b: &[f32],
    c: &[f32],
    [m, k, n]: [usize; 3],
    by: [f32; 2],
    bias: &[f32],
) -> Vec<f64> {
    (0..m * n)
        .map(|at| {
            let (i, j) = (at / n, at % n);
            let sum: f64 = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum();
            let bias = bias.get(j).map_or(0.0, |&x| f64::from(x));
            f64::from(by[0]) * sum + f64::from(by[1]) * f64::from(c[at]) + bias
        })
        .collect()
}

#[test]
fn products_with_all_options() {
    for seed in 0..100 {
        let random = &mut Random::new(seed);
        let size @ [m, k, n] = [random.below(30) + 1, random.below(40), random.below(30) + 1];
        let (a, b, c) = (random.floats(m * k), random.floats(k * n), random.floats(m * n));
        let bias = random.floats(n);
        let mut options: qkv_gemm_options = zeroed();
        (options.has_alpha, options.alpha, options.beta) = (1, 0.5, [0.0, 2.0][random.below(2)]);
        options.bias = floats(&bias);
        let want = by_the_book(&a, &b, &c, size, [0.5, options.beta], &bias);

        let mut got = c.clone();
        let (ta, tb) =
            (qkv_matrix(a.as_ptr(), m as i64, k as i64), qkv_matrix(b.as_ptr(), k as i64, n as i64));
        let tc = qkv_matrix_mut(got.as_mut_ptr(), m as i64, n as i64);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_gemm(&ta, &tb, &tc, &options) });
        assert!(difference(&got, &want) < 1e-5, "seed {seed}");

        // Packed, and as B^T A^T = C^T.
        let mut packed = std::ptr::null_mut();
        let mut again = c.clone();
        let tc = qkv_matrix_mut(again.as_mut_ptr(), m as i64, n as i64);
        // SAFETY: everything described is there.
        unsafe {
            ok(qkv_packed_matrix_create(&tb, &mut packed));
            ok(qkv_gemm_packed(&ta, packed, &tc, &options));
        }
        assert!(difference(&again, &want) < 1e-5, "seed {seed}");
        ok(qkv_packed_matrix_destroy(packed));
        // SAFETY: everything described is there; the handle is gone.
        assert_eq!(unsafe { qkv_gemm_packed(&ta, packed, &tc, &options) }, QKV_ERROR_HANDLE);

        let mut turned = vec![f32::NAN; m * n];
        let tc = qkv_matrix_mut(turned.as_mut_ptr(), n as i64, m as i64);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_gemm(&qkv_transposed(tb), &qkv_transposed(ta), &tc, null()) });
        let want = by_the_book(&a, &b, &c, size, [1.0, 0.0], &[]);
        let turned: Vec<f32> = (0..m * n).map(|at| turned[at % n * m + at / n]).collect();
        assert!(difference(&turned, &want) < 1e-5, "seed {seed}");
    }
}

#[test]
fn batches_repeat_and_activations() {
    let random = &mut Random::new(1);
    let (m, k, n) = (5, 7, 6);
    let (a, b) = (random.floats(2 * m * k), random.floats(3 * k * n));
    let mut c = vec![f32::NAN; 6 * m * n];
    let ta = qkv_tensor_bhsd(a.as_ptr().cast(), QKV_DTYPE_F32, 2, 1, 5, 7);
    let tb = qkv_tensor_bhsd(b.as_ptr().cast(), QKV_DTYPE_F32, 1, 3, 7, 6);
    let tc = qkv_tensor_mut_bhsd(c.as_mut_ptr().cast(), QKV_DTYPE_F32, 2, 3, 5, 6);
    let activation = |x: f64, which| match which {
        QKV_ACTIVATION_RELU => x.max(0.0),
        QKV_ACTIVATION_SILU => x / (1.0 + (-x).exp()),
        QKV_ACTIVATION_GELU_TANH => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        _ => x,
    };
    for which in [QKV_ACTIVATION_NONE, QKV_ACTIVATION_RELU, QKV_ACTIVATION_SILU, QKV_ACTIVATION_GELU_TANH] {
        let mut options: qkv_gemm_options = zeroed();
        options.activation = which;
        // SAFETY: everything described is there.
        ok(unsafe { qkv_gemm(&ta, &tb, &tc, &options) });
        for i in 0..6 {
            let (a, b) = (&a[i / 3 * m * k..][..m * k], &b[i % 3 * k * n..][..k * n]);
            let zeros = vec![0.0; m * n];
            let want = by_the_book(a, b, &zeros, [m, k, n], [1.0, 0.0], &[]);
            let want: Vec<f64> = want.into_iter().map(|x| activation(x, which)).collect();
            assert!(difference(&c[i * m * n..][..m * n], &want) < 1e-5, "{which} {i}");
        }
    }
}

#[test]
fn refusals_of_products() {
    let (a, mut c) = (vec![1.0f32; 64], vec![7.0f32; 64]);
    let t = qkv_matrix(a.as_ptr(), 4, 4);
    let tc = qkv_matrix_mut(c.as_mut_ptr(), 4, 4);
    let gemm = |a: qkv_tensor, b: qkv_tensor, c: qkv_tensor_mut| {
        // SAFETY: everything described is there, or refused.
        let status = unsafe { qkv_gemm(&a, &b, &c, null()) };
        (status, message())
    };
    let said = |status, text: &str| (status, text.to_owned());
    assert_eq!(
        gemm(t, qkv_matrix(a.as_ptr(), 5, 4), tc),
        said(QKV_ERROR_SHAPE, "b: a 5 x 4 matrix given, expected 4 x 4")
    );
    let mut half = t;
    half.dtype = QKV_DTYPE_F16;
    assert_eq!(gemm(t, half, tc), said(QKV_ERROR_DTYPE, "b: f16, expected f32"));
    let mut same = tc;
    same.strides = [0, 0, 0, 1];
    assert_eq!(gemm(t, t, same).0, QKV_ERROR_STRIDES);
    let mut own = tc;
    own.data = a.as_ptr().cast_mut().cast();
    assert_eq!(gemm(t, t, own).0, QKV_ERROR_OVERLAP);
    let mut batch = t;
    batch.shape[0] = 2;
    let mut bounded = tc;
    (bounded.shape[0], bounded.strides[0]) = (3, 16);
    assert_eq!(gemm(batch, t, bounded).0, QKV_ERROR_SHAPE);
    (bounded.buffer, bounded.buffer_size) = (bounded.data.cast_const(), 4 * 47);
    assert_eq!(
        gemm(t, t, bounded),
        said(
            QKV_ERROR_OUT_OF_BOUNDS,
            "c: shape [3, 1, 4, 4] with strides [16, 16, 4, 1] takes bytes 0 to 192 of its buffer, which has 188"
        )
    );
    let mut packed = std::ptr::null_mut();
    // SAFETY: two matrices are refused.
    assert_eq!(unsafe { qkv_packed_matrix_create(&batch, &mut packed) }, QKV_ERROR_SHAPE);
    assert!(packed.is_null() && c.iter().all(|&x| x == 7.0));
}

#[test]
fn threads_change_nothing_and_the_machine_is_described() {
    let random = &mut Random::new(2);
    let shape = [1, 4, 300, 32];
    let [q, k, v] = [0; 3].map(|_| Made::f32(random, shape));
    let mut results = Vec::new();
    assert_eq!(qkv_set_num_threads(0), QKV_ERROR_VALUE);
    assert_eq!(qkv_set_num_threads(1 << 20), QKV_ERROR_VALUE);
    for threads in [2, 1, 3, 2] {
        ok(qkv_set_num_threads(threads));
        assert_eq!(qkv_num_threads(), threads);
        let mut out = vec![f32::NAN; shape.iter().product()];
        let to = output(&mut out, shape);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_attention(&q.tensor(), &k.tensor(), &v.tensor(), null(), &to) });
        results.push(out);
    }
    assert!(results.iter().all(|out| *out == results[0]));

    let mut info: qkv_cpu_info = zeroed();
    // SAFETY: the struct is there.
    ok(unsafe { qkv_cpu_info_get(&mut info) });
    // SAFETY: C strings that are never freed.
    let [isa, version] = unsafe { [info.isa, qkv_version()].map(|text| std::ffi::CStr::from_ptr(text)) };
    assert!(["portable", "avx2", "avx512", "neon", "simd128"].contains(&isa.to_str().unwrap_or("")));
    assert_eq!(version.to_str(), Ok(env!("CARGO_PKG_VERSION")));
    assert!(info.cores > 0 && info.l1d > 0 && info.l2 >= info.l1d);
}

/// Sizes are part of the binary interface: growing a struct is allowed, moving what is there is not.
#[test]
#[cfg(target_pointer_width = "64")]
fn sizes_of_structs() {
    assert_eq!(size_of::<qkv_tensor>(), 112);
    assert_eq!(size_of::<qkv_tensor_mut>(), 96);
    assert_eq!(size_of::<qkv_attention_options>(), 8 + 16 + 6 * 16 + 4 * 8 + 16 + 16 + 3 * 8 + 8 + 16 + 24);
    assert_eq!(size_of::<qkv_attention_outputs>(), 8 + 96 + 32);
    assert_eq!(size_of::<qkv_gemm_options>(), 40);
    assert_eq!(size_of::<qkv_cache_config>(), 72);
    assert_eq!(size_of::<qkv_paged_cache_config>(), 64);
    assert_eq!(size_of::<qkv_rotary_config>(), 136);
    assert_eq!(size_of::<qkv_cpu_info>(), 48);
}
