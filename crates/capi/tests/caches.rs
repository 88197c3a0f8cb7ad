//! Caches, decoding and rotary positions through the C functions.

mod support;

use std::ptr::null;

use qkv::reference::oracle;
use qkv::rotary::{Pairing, Rotary, RotaryConfig, Scaling};
use qkv::{AttentionSpec, Causal, TensorRef};
use qkv_capi::qkv_status::*;
use qkv_capi::*;
use support::*;

const DIM: usize = 16;

fn contiguous(batch: i64, capacity: i64, window: i64) -> *mut qkv_cache {
    let mut config: qkv_cache_config = zeroed();
    (config.batch, config.kv_heads, config.capacity, config.window) = (batch, 2, capacity, window);
    (config.key_dim, config.value_dim) = (DIM as i64, DIM as i64);
    let mut cache = std::ptr::null_mut();
    // SAFETY: the structs are there.
    ok(unsafe { qkv_cache_create(&config, &mut cache) });
    cache
}

fn paged(pages: i64, page_size: i64) -> *mut qkv_paged_cache {
    let mut config: qkv_paged_cache_config = zeroed();
    (config.pages, config.page_size, config.kv_heads) = (pages, page_size, 2);
    (config.key_dim, config.value_dim) = (DIM as i64, DIM as i64);
    let mut cache = std::ptr::null_mut();
    // SAFETY: the structs are there.
    ok(unsafe { qkv_paged_cache_create(&config, &mut cache) });
    cache
}

/// Keys or values of one sequence as they come, (heads, tokens, dim) in the end.
#[derive(Clone, Default)]
struct History(Vec<[[f32; DIM]; 2]>);

impl History {
    /// Takes batch `batch` of new tokens.
    fn take(&mut self, made: &Made, batch: usize) {
        let [_, _, length, _] = made.shape;
        for s in 0..length {
            let row = |h: usize| {
                let first = ((batch * 2 + h) * length + s) * DIM;
                std::array::from_fn(|d| made.values[first + d])
            };
            self.0.push([row(0), row(1)]);
        }
    }

    fn values(&self) -> Vec<f32> {
        (0..2).flat_map(|h| self.0.iter().flat_map(move |token| token[h])).collect()
    }
}

/// What attention of one batch of queries over histories should be.
fn expected(
    q: &Made,
    batch: usize,
    keys: &History,
    values: &History,
    spec: &AttentionSpec<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let [_, heads, length, dim] = q.shape;
    let one = heads * length * dim;
    let (k, v) = (keys.values(), values.values());
    let shape = [1, 2, keys.0.len(), DIM];
    let view = |data, shape| TensorRef::from_slice(data, shape).expect("fits");
    let q = view(&q.values[batch * one..][..one], [1, heads, length, dim]);
    let result = oracle(q, view(&k, shape), view(&v, shape), spec);
    (result.output.data().to_vec(), result.lse)
}

#[test]
fn decoding_with_a_contiguous_cache() {
    let random = &mut Random::new(1);
    let cache = contiguous(2, 64, 0);
    let mut histories = [0; 4].map(|_| History::default());
    let prompt = [0; 2].map(|_| Made::random(random, [2, 2, 11, DIM], QKV_DTYPE_F16, true));
    // SAFETY: everything described is there.
    ok(unsafe { qkv_cache_append(cache, &prompt[0].tensor(), &prompt[1].tensor(), null()) });
    for batch in 0..2 {
        histories[2 * batch].take(&prompt[0], batch);
        histories[2 * batch + 1].take(&prompt[1], batch);
    }
    // One sequence goes on alone, so that they differ in length.
    let more = [0; 2].map(|_| Made::f32(random, [1, 2, 3, DIM]));
    // SAFETY: everything described is there.
    ok(unsafe { qkv_cache_append_to(cache, 1, &more[0].tensor(), &more[1].tensor(), null()) });
    histories[2].take(&more[0], 0);
    histories[3].take(&more[1], 0);
    assert_eq!([0, 1].map(|batch| qkv_cache_length(cache, batch)), [11, 14]);

    let mut options: qkv_attention_options = zeroed();
    options.causal = QKV_CAUSAL_BOTTOM_RIGHT;
    let spec = AttentionSpec::new().with_causal(Causal::BottomRight);
    for step in 0..8 {
        let new = step % 3 + 1;
        let q = Made::f32(random, [2, 4, new, DIM]);
        let kv = [0; 2].map(|_| Made::f32(random, [2, 2, new, DIM]));
        let shape = [2, 4, new, DIM];
        let (mut out, mut lse) = (vec![f32::NAN; shape.iter().product()], vec![f32::NAN; 8 * new]);
        let mut to = output(&mut out, shape);
        to.lse = list(&mut lse);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_decode(cache, &q.tensor(), &kv[0].tensor(), &kv[1].tensor(), &options, &to) });
        for batch in 0..2 {
            histories[2 * batch].take(&kv[0], batch);
            histories[2 * batch + 1].take(&kv[1], batch);
            let (want, want_lse) =
                expected(&q, batch, &histories[2 * batch], &histories[2 * batch + 1], &spec);
            let one = 4 * new * DIM;
            assert!(difference(&out[batch * one..][..one], &want) < 1e-5);
            assert!(difference(&lse[batch * 4 * new..][..4 * new], &want_lse) < 1e-5);
        }
    }

    // A refused step leaves the cache as it was.
    let q = Made::f32(random, [2, 4, 1, DIM]);
    let kv = Made::f32(random, [2, 2, 1, DIM]);
    let before = qkv_cache_length(cache, 0);
    let mut out = vec![7.0; 8 * DIM];
    let to = output(&mut out, [2, 4, 1, DIM]);
    options.softcap = -1.0;
    // SAFETY: everything described is there.
    let status = unsafe { qkv_decode(cache, &q.tensor(), &kv.tensor(), &kv.tensor(), &options, &to) };
    assert_eq!(
        (status, message().as_str()),
        (QKV_ERROR_VALUE, "softcap: -1, expected a positive finite number")
    );
    assert_eq!(qkv_cache_length(cache, 0), before);
    assert!(out.iter().all(|&x| x == 7.0));

    ok(qkv_cache_truncate(cache, 0, 2));
    assert_eq!(qkv_cache_length(cache, 0), 2);
    ok(qkv_cache_clear(cache, 0));
    assert_eq!((qkv_cache_length(cache, 0), qkv_cache_dropped(cache, 0)), (0, 0));
    assert_eq!(qkv_cache_truncate(cache, 0, 1), QKV_ERROR_VALUE);
    assert_eq!(message(), "length: 1, expected at most the 0 tokens held");
    assert_eq!(qkv_cache_truncate(cache, 2, 0), QKV_ERROR_VALUE);
    assert_eq!(qkv_cache_length(cache, -1), -1);
    let long = Made::f32(random, [2, 2, 64, DIM]);
    // SAFETY: everything described is there.
    let status = unsafe { qkv_cache_append(cache, &long.tensor(), &long.tensor(), null()) };
    assert_eq!(status, QKV_ERROR_FULL);
    assert_eq!(qkv_cache_bytes(cache), 2 * 2 * 2 * 64 * DIM * 4);
    ok(qkv_cache_destroy(cache));
    assert_eq!(qkv_cache_length(cache, 1), -1);
}

#[test]
fn a_rolling_cache_keeps_its_window() {
    let random = &mut Random::new(2);
    let cache = contiguous(1, 16, 8);
    for _ in 0..30 {
        let kv = Made::f32(random, [1, 2, 1, DIM]);
        // SAFETY: everything described is there.
        ok(unsafe { qkv_cache_append(cache, &kv.tensor(), &kv.tensor(), null()) });
    }
    let (length, dropped) = (qkv_cache_length(cache, 0), qkv_cache_dropped(cache, 0));
    assert!((8..=16).contains(&length) && length + dropped == 30, "{length} {dropped}");
    ok(qkv_cache_destroy(cache));
}

#[test]
fn decoding_with_pages_that_sequences_share() {
    let random = &mut Random::new(3);
    let cache = paged(40, 8);
    let first = qkv_paged_cache_sequence(cache);
    let prompt = [0; 2].map(|_| Made::f32(random, [1, 2, 19, DIM]));
    // SAFETY: everything described is there.
    ok(unsafe { qkv_paged_cache_append(cache, first, &prompt[0].tensor(), &prompt[1].tensor(), null()) });
    let second = qkv_paged_cache_fork(cache, first);
    assert!(first != 0 && second != 0 && first != second);
    assert_eq!((qkv_paged_cache_pages(cache), qkv_paged_cache_free_pages(cache)), (40, 37));
    let mut history = History::default();
    let mut other = History::default();
    history.take(&prompt[0], 0);
    other.take(&prompt[1], 0);
    let mut keys = [history.clone(), history];
    let mut values = [other.clone(), other];

    let list = [second, first];
    for _ in 0..9 {
        let q = Made::random(random, [2, 4, 1, DIM], QKV_DTYPE_F32, true);
        let kv = [0; 2].map(|_| Made::f32(random, [2, 2, 1, DIM]));
        let (mut out, mut lse, mut maxima) = (vec![f32::NAN; 8 * DIM], vec![f32::NAN; 8], vec![f32::NAN; 8]);
        let mut to = output(&mut out, [2, 4, 1, DIM]);
        (to.lse, to.maxima) = (support::list(&mut lse), support::list(&mut maxima));
        let [k, v] = [kv[0].tensor(), kv[1].tensor()];
        // SAFETY: everything described is there.
        ok(unsafe { qkv_paged_decode(cache, list.as_ptr(), &q.tensor(), &k, &v, null(), &to) });
        for i in 0..2 {
            keys[i].take(&kv[0], i);
            values[i].take(&kv[1], i);
            let (want, want_lse) = expected(&q, i, &keys[i], &values[i], &AttentionSpec::new());
            assert!(difference(&out[i * 4 * DIM..][..4 * DIM], &want) < 1e-5);
            assert!(difference(&lse[i * 4..][..4], &want_lse) < 1e-5);
            assert!((0..4).all(|h| maxima[i * 4 + h] <= lse[i * 4 + h]));
        }
    }
    // Both share the first two pages; the third was copied, and each has a fourth.
    assert_eq!(qkv_paged_cache_free_pages(cache), 40 - 2 - 4);

    // A chunk and a step in one call.
    let q = Made::f32(random, [1, 4, 6, DIM]);
    let mut options: qkv_attention_options = zeroed();
    options.causal = QKV_CAUSAL_BOTTOM_RIGHT;
    let mut out = vec![f32::NAN; 4 * 6 * DIM];
    let to = output(&mut out, [1, 4, 6, DIM]);
    let ends = integers(&[0, 5, 6]);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_paged_cache_attention(cache, list.as_ptr(), &q.tensor(), ends, &options, &to) });
    assert!(out.iter().all(|x| x.is_finite()));

    // Refusals: a sequence twice, one that is gone, a pool that is full; all leave the lengths as they were.
    let lengths = || [first, second].map(|sequence| qkv_paged_cache_length(cache, sequence));
    let before = lengths();
    let step = |list: &[qkv_sequence; 2]| {
        let kv = Made::f32(&mut Random::new(4), [2, 2, 1, DIM]);
        let q = Made::f32(&mut Random::new(5), [2, 4, 1, DIM]);
        let mut out = vec![f32::NAN; 8 * DIM];
        let to = output(&mut out, [2, 4, 1, DIM]);
        let [q, kv] = [q.tensor(), kv.tensor()];
        // SAFETY: everything described is there.
        unsafe { qkv_paged_decode(cache, list.as_ptr(), &q, &kv, &kv, null(), &to) }
    };
    assert_eq!(step(&[first, first]), QKV_ERROR_VALUE);
    assert_eq!(step(&[first, 99]), QKV_ERROR_SEQUENCE);
    let filler = qkv_paged_cache_sequence(cache);
    let rest = Made::f32(random, [1, 2, qkv_paged_cache_free_pages(cache) as usize * 8, DIM]);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_paged_cache_append(cache, filler, &rest.tensor(), &rest.tensor(), null()) });
    assert_eq!(qkv_paged_cache_free_pages(cache), 0);
    // `first` has room in its last page, the full one has not, and comes second.
    assert_eq!(step(&[first, filler]), QKV_ERROR_FULL);
    assert_eq!(lengths(), before);
    ok(qkv_paged_cache_free(cache, filler));
    assert_eq!(qkv_paged_cache_free(cache, filler), QKV_ERROR_SEQUENCE);
    ok(qkv_paged_cache_truncate(cache, first, 0));
    assert_eq!(qkv_paged_cache_length(cache, first), 0);
    ok(qkv_paged_cache_destroy(cache));
    assert_eq!(qkv_paged_cache_sequence(cache), 0);
}

/// A prompt of 2 tokens in a page of 4, held by four sequences, in a pool of that many pages and storage.
fn shared_page(pages: i64, dtype: qkv_dtype) -> (*mut qkv_paged_cache, [qkv_sequence; 4]) {
    let mut config: qkv_paged_cache_config = zeroed();
    (config.pages, config.page_size, config.kv_heads, config.dtype) = (pages, 4, 2, dtype);
    (config.key_dim, config.value_dim) = (DIM as i64, DIM as i64);
    let mut cache = std::ptr::null_mut();
    // SAFETY: the structs are there.
    ok(unsafe { qkv_paged_cache_create(&config, &mut cache) });
    let first = qkv_paged_cache_sequence(cache);
    append(cache, first, 2);
    (cache, std::array::from_fn(|i| if i == 0 { first } else { qkv_paged_cache_fork(cache, first) }))
}

fn append(cache: *mut qkv_paged_cache, sequence: qkv_sequence, tokens: usize) {
    let kv = Made::f32(&mut Random::new(7), [1, 2, tokens, DIM]);
    // SAFETY: everything described is there.
    ok(unsafe { qkv_paged_cache_append(cache, sequence, &kv.tensor(), &kv.tensor(), null()) });
}

/// A step of these sequences, with something about it changed.
fn step(
    cache: *mut qkv_paged_cache,
    list: &[qkv_sequence],
    change: &dyn Fn(&mut qkv_attention_options, &mut qkv_attention_outputs, &mut [f32]),
) -> qkv_status {
    let n = list.len();
    let q = Made::f32(&mut Random::new(8), [n, 4, 1, DIM]);
    let mut values = Random::new(9).floats(n * 2 * DIM);
    let mut out = vec![f32::NAN; n * 4 * DIM];
    let mut outputs = output(&mut out, [n, 4, 1, DIM]);
    let mut options = zeroed();
    change(&mut options, &mut outputs, &mut values);
    let kv = Made::of(values, [n, 2, 1, DIM]);
    let [q, kv] = [q.tensor(), kv.tensor()];
    // SAFETY: everything described is there.
    let status = unsafe { qkv_paged_decode(cache, list.as_ptr(), &q, &kv, &kv, &options, &outputs) };
    assert!(status == QKV_OK || out.iter().all(|x| x.is_nan()));
    status
}

#[test]
fn a_refused_step_copies_no_page() {
    let (cache, list) = shared_page(8, QKV_DTYPE_I8);
    let refused = |change: &dyn Fn(&mut qkv_attention_options, &mut qkv_attention_outputs, &mut [f32])| {
        let status = step(cache, &list, change);
        assert_eq!(qkv_paged_cache_free_pages(cache), 7, "{}", message());
        assert!(list.iter().all(|&sequence| qkv_paged_cache_length(cache, sequence) == 2));
        (status, message())
    };
    for (change, argument) in [
        (
            (|options, _, _| options.softcap = -1.0) as fn(&mut qkv_attention_options, &mut _, &mut [f32]),
            "softcap",
        ),
        (|options, _, _| options.prefix = integers(&[0, 0, 0, 9]), "prefix"),
        (|_, outputs: &mut qkv_attention_outputs, _| outputs.output.shape[3] -= 1, "output"),
        // The last of the tokens that the cache has no scale for.
        (|_, _, values| values[values.len() - 1] = f32::INFINITY, "key"),
    ] {
        let (status, text) = refused(&change);
        assert!(status != QKV_OK && text.starts_with(argument), "{status:?} {text}");
    }
    // Tables of 3 positions have the third token, those of 2 have not.
    for (positions, status) in [(2, QKV_ERROR_VALUE), (3, QKV_OK)] {
        let mut config: qkv_rotary_config = zeroed();
        (config.head_dim, config.max_length) = (DIM as i64, positions);
        let mut rotary = std::ptr::null_mut();
        // SAFETY: the structs are there.
        ok(unsafe { qkv_rotary_create(&config, &mut rotary) });
        let change = |options: &mut qkv_attention_options, _: &mut _, _: &mut [f32]| options.rotary = rotary;
        if status == QKV_OK {
            ok(step(cache, &list, &change));
        } else {
            assert_eq!(refused(&change), (status, "position: 2, expected below max_length, 2".to_owned()));
        }
        ok(qkv_rotary_destroy(rotary));
    }
    assert_eq!(qkv_paged_cache_free_pages(cache), 4);
    ok(qkv_paged_cache_destroy(cache));
}

#[test]
fn a_step_needs_a_copy_for_all_but_the_last_of_a_page() {
    let (cache, list) = shared_page(4, QKV_DTYPE_F32);
    let other = qkv_paged_cache_sequence(cache);
    append(cache, other, 2);
    let plain = |_: &mut qkv_attention_options, _: &mut qkv_attention_outputs, _: &mut [f32]| {};
    assert_eq!(step(cache, &list, &plain), QKV_ERROR_FULL);
    assert_eq!(message(), "key: the new tokens need 3 pages, expected at most the 2 that are free");
    assert_eq!(qkv_paged_cache_free_pages(cache), 2);
    // With three of four the page stays as it is, and all three need one.
    assert_eq!(step(cache, &list[..3], &plain), QKV_ERROR_FULL);
    assert_eq!(qkv_paged_cache_free_pages(cache), 2);
    ok(qkv_paged_cache_free(cache, other));
    ok(step(cache, &list, &plain));
    assert_eq!(qkv_paged_cache_free_pages(cache), 0);
    // Nobody shares any more, and each has room for one.
    ok(step(cache, &list, &plain));
    assert_eq!(step(cache, &list[..1], &plain), QKV_ERROR_FULL);
    assert!(list.iter().all(|&sequence| qkv_paged_cache_length(cache, sequence) == 4));
    ok(qkv_paged_cache_destroy(cache));
}

/// Scalings come through with all their numbers.
#[test]
fn rotary_scalings() {
    let row: Vec<f32> = (0..DIM).map(|d| d as f32).collect();
    let check = |change: &dyn Fn(&mut qkv_rotary_config), scaling: Scaling, base: f64| {
        let mut config: qkv_rotary_config = zeroed();
        config.head_dim = DIM as i64;
        change(&mut config);
        let mut rotary = std::ptr::null_mut();
        // SAFETY: the structs are there.
        ok(unsafe { qkv_rotary_create(&config, &mut rotary) });
        let mut got = row.clone();
        let to = output(&mut got, [1, 1, 1, DIM]).output;
        // SAFETY: everything described is there.
        ok(unsafe { qkv_rotary_apply(rotary, &to, integers(&[1000])) });
        let mut want = row.clone();
        let config = RotaryConfig::new(DIM).with_scaling(scaling).with_base(base).with_sequence_length(9000);
        Rotary::new(&config).and_then(|table| table.rotate(&mut want, 1000)).expect("a usual one");
        assert_eq!(got, want);
        ok(qkv_rotary_destroy(rotary));
    };
    check(&|_| {}, Scaling::None, 1e4);
    check(&|config| config.base = 5e5, Scaling::None, 5e5);
    let scaled = |scaling: qkv_rotary_scaling| {
        move |config: &mut qkv_rotary_config| {
            (config.scaling, config.factor) = (scaling, 4.0);
            config.original_length = if scaling == QKV_ROTARY_LINEAR { 0 } else { 2048 };
            if scaling == QKV_ROTARY_DYNAMIC {
                config.sequence_length = 9000;
            }
            if scaling == QKV_ROTARY_LLAMA3 {
                (config.low_freq_factor, config.high_freq_factor) = (1.0, 4.0);
            }
        }
    };
    check(&scaled(QKV_ROTARY_LINEAR), Scaling::Linear { factor: 4.0 }, 1e4);
    check(&scaled(QKV_ROTARY_DYNAMIC), Scaling::DynamicNtk { factor: 4.0, original_length: 2048 }, 1e4);
    check(&scaled(QKV_ROTARY_YARN), Scaling::yarn(4.0, 2048), 1e4);
    let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
    let llama3 = Scaling::Llama3 { factor: 4.0, low_freq_factor, high_freq_factor, original_length: 2048 };
    check(&scaled(QKV_ROTARY_LLAMA3), llama3, 1e4);

    let refused = |change: &dyn Fn(&mut qkv_rotary_config)| {
        let mut config: qkv_rotary_config = zeroed();
        config.head_dim = DIM as i64;
        change(&mut config);
        let mut rotary = std::ptr::null_mut();
        // SAFETY: the structs are there.
        (unsafe { qkv_rotary_create(&config, &mut rotary) }, message())
    };
    let text = |status, text: &str| (status, text.to_owned());
    assert_eq!(
        refused(&|config| config.factor = 2.0),
        text(QKV_ERROR_VALUE, "factor: given, expected 0 with this scaling")
    );
    assert_eq!(refused(&|config| config.base = f64::NAN).0, QKV_ERROR_VALUE);
    assert_eq!(refused(&|config| config.rotary_dim = 3).0, QKV_ERROR_VALUE);
    assert_eq!(refused(&|config| config.head_dim = 0).0, QKV_ERROR_VALUE);
    assert_eq!(refused(&|config| config.head_dim = i64::MAX - 1).0, QKV_ERROR_MEMORY);
    assert_eq!(refused(&|config| config.max_length = i64::MAX).0, QKV_ERROR_MEMORY);
    assert_eq!(refused(&|config| config.scaling = 5).0, QKV_ERROR_VALUE);
    assert_eq!(refused(&|config| config.interleaved = 2).0, QKV_ERROR_VALUE);
}

#[test]
fn rotary_positions_in_decoding_are_those_of_rotated_rows() {
    let random = &mut Random::new(6);
    let mut config: qkv_rotary_config = zeroed();
    (config.head_dim, config.max_length, config.interleaved) = (DIM as i64, 64, 1);
    let mut rotary = std::ptr::null_mut();
    // SAFETY: the structs are there.
    ok(unsafe { qkv_rotary_create(&config, &mut rotary) });
    let table = Rotary::new(&RotaryConfig::new(DIM).with_pairing(Pairing::Interleaved).with_max_length(64))
        .expect("a usual one");
    let rotated = |made: &Made, first: usize| {
        let mut values = made.values.clone();
        let length = made.shape[2];
        for (row, values) in values.chunks_exact_mut(DIM).enumerate() {
            table.rotate(values, first + row % length).expect("in the table");
        }
        values
    };

    // In place.
    let rows = Made::f32(random, [2, 3, 4, DIM]);
    let mut values = rows.values.clone();
    let to = output(&mut values, rows.shape).output;
    // SAFETY: everything described is there.
    ok(unsafe { qkv_rotary_apply(rotary, &to, integers(&[10, 11, 12, 13])) });
    assert_eq!(values, rotated(&rows, 10));

    // Both caches, decoded with the embedding, against plain attention over rotated rows.
    let (cache, pages) = (contiguous(1, 64, 0), paged(20, 4));
    let sequence = qkv_paged_cache_sequence(pages);
    let kv = [0; 2].map(|_| Made::f32(random, [1, 2, 20, DIM]));
    let [k, v] = [kv[0].tensor(), kv[1].tensor()];
    // SAFETY: everything described is there.
    unsafe {
        ok(qkv_cache_append(cache, &k, &v, rotary));
        ok(qkv_paged_cache_append(pages, sequence, &k, &v, rotary));
    }
    let new = [0; 2].map(|_| Made::f32(random, [1, 2, 1, DIM]));
    let q = Made::f32(random, [1, 4, 1, DIM]);
    let mut options: qkv_attention_options = zeroed();
    options.rotary = rotary;
    let [mut a, mut b] = [0; 2].map(|_| vec![f32::NAN; 4 * DIM]);
    let (to_a, to_b) = (output(&mut a, [1, 4, 1, DIM]), output(&mut b, [1, 4, 1, DIM]));
    let [k, v] = [new[0].tensor(), new[1].tensor()];
    // SAFETY: everything described is there.
    unsafe {
        ok(qkv_decode(cache, &q.tensor(), &k, &v, &options, &to_a));
        ok(qkv_paged_decode(pages, &sequence, &q.tensor(), &k, &v, &options, &to_b));
    }
    let mut keys = History::default();
    let mut held = History::default();
    keys.take(&Made::of(rotated(&kv[0], 0), kv[0].shape), 0);
    keys.take(&Made::of(rotated(&new[0], 20), new[0].shape), 0);
    held.take(&kv[1], 0);
    held.take(&new[1], 0);
    let q = Made::of(rotated(&q, 20), q.shape);
    let (want, _) = expected(&q, 0, &keys, &held, &AttentionSpec::new());
    assert!(difference(&a, &want) < 1e-5 && difference(&b, &want) < 1e-5);

    // Positions beyond the table are refused, and nothing is appended.
    let long = Made::f32(random, [1, 2, 44, DIM]);
    let long = long.tensor();
    // SAFETY: everything described is there.
    assert_eq!(unsafe { qkv_cache_append(cache, &long, &long, rotary) }, QKV_ERROR_VALUE);
    assert_eq!(
        (qkv_cache_length(cache, 0), message().as_str()),
        (21, "position: 64, expected below max_length, 64")
    );
    ok(qkv_rotary_destroy(rotary));
    // SAFETY: everything described is there; the handle is gone.
    assert_eq!(unsafe { qkv_decode(cache, &q.tensor(), &k, &v, &options, &to_a) }, QKV_ERROR_HANDLE);
    ok(qkv_cache_destroy(cache));
    ok(qkv_paged_cache_destroy(pages));
}

/// Threads read, change and destroy the same handles: every call ends, with what it may end with.
#[test]
fn threads_share_handles() {
    for round in 0..20 {
        let cache = contiguous(1, 64, 8).addr();
        let threads: Vec<_> = (0..6u64)
            .map(|number| {
                std::thread::spawn(move || {
                    let cache = std::ptr::without_provenance_mut::<qkv_cache>(cache);
                    let random = &mut Random::new(round * 6 + number);
                    let q = Made::f32(random, [1, 4, 1, DIM]);
                    let kv = Made::f32(random, [1, 2, 1, DIM]);
                    let mut out = vec![f32::NAN; 4 * DIM];
                    let to = output(&mut out, [1, 4, 1, DIM]);
                    let mut done = 0;
                    for step in 0..60 {
                        let (q, kv) = (q.tensor(), kv.tensor());
                        // SAFETY: everything described is there; a handle that is gone is refused.
                        let status = unsafe {
                            match (number + step) % 3 {
                                0 => qkv_cache_append(cache, &kv, &kv, null()),
                                1 => qkv_decode(cache, &q, &kv, &kv, null(), &to),
                                _ => qkv_cache_attention(cache, &q, null(), &to),
                            }
                        };
                        assert!(matches!(status, QKV_OK | QKV_ERROR_HANDLE), "{status:?} {}", message());
                        assert!(status == QKV_OK || message().starts_with("cache: handle "));
                        done += u32::from(status == QKV_OK);
                        if number == 0 && step == 40 {
                            ok(qkv_cache_destroy(cache));
                        }
                    }
                    done
                })
            })
            .collect();
        let done: u32 = threads.into_iter().map(|thread| thread.join().unwrap_or_default()).sum();
        assert!(done >= 40, "{done}");
    }
}
