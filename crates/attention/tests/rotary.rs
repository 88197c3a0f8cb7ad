//! Rotary embedding against transformers' tables and rotated rows (testdata/rotary.txt, which
//! scripts/make_rotary_testdata.py makes), and by its own properties.

mod common;

use common::random;
use qkv_attention::rotary::{Pairing, Rotary, RotaryConfig, RotaryError, Scaling};
use qkv_attention::{Tensor, TensorMut};

const TABLES: &str = include_str!("../../../testdata/rotary.txt");

/// One configuration of the fixture, and what transformers made of it.
struct Fixture {
    name: String,
    fields: Vec<(String, Vec<f64>)>,
    scaling: String,
    positions: Vec<At>,
}

#[derive(Default)]
struct At {
    position: usize,
    cos: Vec<f64>,
    sin: Vec<f64>,
    halves: Vec<f64>,
    interleaved: Vec<f64>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for line in TABLES.lines().filter(|line| !line.starts_with('#')) {
            let (key, rest) = line.split_once(' ').expect("a key");
            if key == "case" {
                let (name, scaling) = (rest.to_owned(), String::new());
                all.push(Self { name, fields: Vec::new(), scaling, positions: Vec::new() });
                continue;
            }
            let case = all.last_mut().expect("a case");
            if key == "scaling" {
                rest.clone_into(&mut case.scaling);
                continue;
            }
            let numbers: Vec<f64> = rest.split(' ').map(|x| x.parse().expect("a number")).collect();
            if key == "position" {
                case.positions.push(At { position: numbers[0] as usize, ..At::default() });
                continue;
            }
            match (key, case.positions.last_mut()) {
                ("cos", Some(at)) => at.cos = numbers,
                ("sin", Some(at)) => at.sin = numbers,
                ("halves", Some(at)) => at.halves = numbers,
                ("interleaved", Some(at)) => at.interleaved = numbers,
                _ => case.fields.push((key.to_owned(), numbers)),
            }
        }
        assert_eq!(all.len(), 16, "cases of the fixture");
        all
    }

    fn field(&self, key: &str) -> Option<&[f64]> {
        self.fields.iter().find(|(name, _)| name == key).map(|(_, numbers)| numbers.as_slice())
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.field(key).map(|numbers| numbers[0])
    }

    fn config(&self) -> RotaryConfig {
        let need = |key| self.number(key).unwrap_or_else(|| panic!("{}: no {key}", self.name));
        let size = |key| need(key) as usize;
        let scaling = match self.scaling.as_str() {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: need("factor") },
            "dynamic" => Scaling::DynamicNtk {
                factor: need("factor"),
                original_length: size("max_position_embeddings"),
            },
            "yarn" => Scaling::Yarn {
                factor: need("factor"),
                original_length: size("original_max_position_embeddings"),
                beta_fast: self.number("beta_fast").unwrap_or(32.0),
                beta_slow: self.number("beta_slow").unwrap_or(1.0),
                attention_factor: self.number("attention_factor").map(|a| a as f32),
                truncate: self.number("truncate") != Some(0.0),
                mscale: self.number("mscale"),
                mscale_all_dim: self.number("mscale_all_dim"),
            },
            "llama3" => Scaling::Llama3 {
                factor: need("factor"),
                low_freq_factor: need("low_freq_factor"),
                high_freq_factor: need("high_freq_factor"),
                original_length: size("original_max_position_embeddings"),
            },
            other => panic!("{other}"),
        };
        let length = self.positions.last().expect("positions").position + 1;
        RotaryConfig::new(size("head_dim"))
            .with_rotary_dim(size("rotary_dim"))
            .with_base(need("base"))
            .with_scaling(scaling)
            .with_sequence_length(length)
            .with_max_length(length)
    }

    /// How far a cosine or sine may be from transformers': its angle is rounded to f32 (2^-24 of it) and its
    /// inverse frequency has errors of f32 arithmetic; beyond that a few last bits of the value.
    fn tolerance(position: usize, frequency: f32, attention_factor: f32) -> f64 {
        let angle = position as f64 * f64::from(frequency);
        f64::from(attention_factor) * (1.5e-7 + angle * (1.0 / (1 << 24) as f64 + FREQUENCY_ERROR))
    }
}

/// Relative difference of our inverse frequencies, correctly rounded, and transformers', computed in f32.
const FREQUENCY_ERROR: f64 = 3e-7;

fn close(given: &[f32], expected: &[f64], tolerance: impl Fn(usize) -> f64, what: &str) -> f64 {
    assert_eq!(given.len(), expected.len(), "{what}");
    let mut worst = 0.0f64;
    for (i, (&given, &expected)) in given.iter().zip(expected).enumerate() {
        let off = (f64::from(given) - expected).abs() / tolerance(i);
        assert!(off <= 1.0, "{what}[{i}]: {given}, expected {expected}: {off} of the tolerance");
        worst = worst.max(off);
    }
    worst
}

#[test]
fn inverse_frequencies_are_those_of_transformers() {
    let mut worst = 0.0f64;
    for case in Fixture::all() {
        let rotary = Rotary::new(&case.config()).expect("a valid configuration");
        let expected = case.field("inverse_frequencies").expect("frequencies");
        let given = rotary.inverse_frequencies();
        worst = worst.max(close(given, expected, |i| expected[i] * FREQUENCY_ERROR, &case.name));
    }
    println!("worst, of the tolerance: {worst}");
}

#[test]
fn tables_are_those_of_transformers() {
    let mut worst = 0.0f64;
    for case in Fixture::all() {
        let rotary = Rotary::new(&case.config()).expect("a valid configuration");
        let pairs = rotary.rotary_dim() / 2;
        for at in &case.positions {
            let what = format!("{} at {}", case.name, at.position);
            let row = at.position * pairs..(at.position + 1) * pairs;
            let tolerance = |i: usize| {
                Fixture::tolerance(at.position, rotary.inverse_frequencies()[i], rotary.attention_factor())
            };
            worst = worst.max(close(&rotary.cos()[row.clone()], &at.cos, tolerance, &format!("{what}: cos")));
            worst = worst.max(close(&rotary.sin()[row], &at.sin, tolerance, &format!("{what}: sin")));
        }
    }
    println!("worst, of the tolerance: {worst}");
}

#[test]
fn rotated_rows_are_those_of_transformers() {
    for case in Fixture::all() {
        let query: Vec<f32> = case.field("query").expect("a query").iter().map(|&x| x as f32).collect();
        for pairing in [Pairing::Halves, Pairing::Interleaved] {
            let rotary = Rotary::new(&case.config().with_pairing(pairing)).expect("a valid configuration");
            let rotary_dim = rotary.rotary_dim();
            for at in &case.positions {
                let mut row = query.clone();
                rotary.rotate(&mut row, at.position).expect("a position of the table");
                let expected = if pairing == Pairing::Halves { &at.halves } else { &at.interleaved };
                // |query| < 1: two products, off by twice a table's error and their roundings at most.
                let tolerance = |d: usize| {
                    let pair = if pairing == Pairing::Halves { d % (rotary_dim / 2) } else { d / 2 };
                    let frequency = rotary.inverse_frequencies()[pair];
                    2.0 * Fixture::tolerance(at.position, frequency, rotary.attention_factor())
                };
                let what = format!("{} at {}, {pairing:?}", case.name, at.position);
                close(&row[..rotary_dim], &expected[..rotary_dim], tolerance, &what);
                assert_eq!(row[rotary_dim..], query[rotary_dim..], "{what}: the dims that stay");
            }
        }
    }
}

#[test]
fn every_even_size_turns_pair_by_pair() {
    // The sizes around those of vectors, against the equation in f64 from the tables.
    for head_dim in 2..=40 {
        for rotary_dim in (2..=head_dim).step_by(2) {
            for pairing in [Pairing::Halves, Pairing::Interleaved] {
                let config = RotaryConfig::new(head_dim)
                    .with_rotary_dim(rotary_dim)
                    .with_pairing(pairing)
                    .with_max_length(4);
                let rotary = Rotary::new(&config).expect("a valid configuration");
                let x = random([1, 1, 1, head_dim], 3);
                let mut row = x.data().to_vec();
                rotary.rotate(&mut row, 3).expect("a position of the table");
                let mut expected: Vec<f64> = x.data().iter().map(|&x| f64::from(x)).collect();
                for pair in 0..rotary_dim / 2 {
                    let (i, j) = match pairing {
                        Pairing::Halves => (pair, pair + rotary_dim / 2),
                        _ => (2 * pair, 2 * pair + 1),
                    };
                    let (sin, cos) = (3.0 * 10_000f64.powf(-2.0 * pair as f64 / rotary_dim as f64)).sin_cos();
                    let (a, b) = (expected[i], expected[j]);
                    (expected[i], expected[j]) = (a * cos - b * sin, a * sin + b * cos);
                }
                close(&row, &expected, |_| 5e-7, &format!("{pairing:?}, {rotary_dim} of {head_dim}"));
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[test]
fn norms_stay_and_scores_depend_on_distance_alone() {
    let (q, k) = (random([1, 1, 1, 64], 1), random([1, 1, 1, 64], 2));
    for pairing in [Pairing::Halves, Pairing::Interleaved] {
        for rotary_dim in [64, 32, 2] {
            let config = RotaryConfig::new(64).with_rotary_dim(rotary_dim).with_pairing(pairing);
            let rotary = Rotary::new(&config).expect("a valid configuration");
            let at = |x: &Tensor, position| {
                let mut row = x.data().to_vec();
                rotary.rotate(&mut row, position).expect("a position of the table");
                row
            };
            assert_eq!(at(&q, 0), q.data(), "position 0 turns nothing");
            for position in [1, 100, 2047] {
                let row = at(&q, position);
                assert!((dot(&row, &row) - dot(q.data(), q.data())).abs() < 1e-5);
                assert_ne!(row, q.data());
            }
            for distance in [0, 1, 17, 900] {
                let scores: Vec<f64> =
                    [0, 1, 500, 1147].map(|n| dot(&at(&q, n + distance), &at(&k, n))).to_vec();
                for score in &scores {
                    assert!((score - scores[0]).abs() < 1e-5, "{pairing:?}, distance {distance}: {scores:?}");
                }
            }
            let (near, far) = (dot(&at(&q, 1), &at(&k, 0)), dot(&at(&q, 9), &at(&k, 0)));
            assert!((near - far).abs() > 1e-3, "another distance, another score: {near}, {far}");
        }
    }
}

#[test]
fn a_tensor_is_turned_row_by_row() {
    let shape @ [batch, heads, length, dim] = [2, 3, 5, 12];
    let rotary = Rotary::new(&RotaryConfig::new(dim).with_rotary_dim(8)).expect("a valid configuration");
    let x = random(shape, 4);
    let shared = [7, 0, 2047, 7, 30];
    let own: Vec<usize> = (0..batch * length).map(|i| 101 * i).collect();
    for positions in [&shared[..], &own] {
        // As it lies in memory when projections are not transposed: (batch, length, heads, dim), with a gap
        // between heads.
        let stride = dim + 3;
        let strides = [(length * heads * stride) as isize, stride as isize, (heads * stride) as isize, 1];
        let at = |[b, h, s, d]: [usize; 4]| ((b * length + s) * heads + h) * stride + d;
        let mut buffer = vec![f32::NAN; batch * length * heads * stride];
        let mut rows = x.clone();
        for b in 0..batch {
            for h in 0..heads {
                for s in 0..length {
                    let row = x.view().row(b, h, s);
                    buffer[at([b, h, s, 0])..][..dim].copy_from_slice(row);
                    let mut row = row.to_vec();
                    let position = positions[(b * length + s) % positions.len()];
                    rotary.rotate(&mut row, position).expect("a position of the table");
                    let index = ((b * heads + h) * length + s) * dim;
                    rows.data_mut()[index..][..dim].copy_from_slice(&row);
                }
            }
        }
        let mut view = TensorMut::from_slice_strided(&mut buffer, 0, shape, strides).expect("a view");
        rotary.rotate_rows(&mut view, positions).expect("positions of the table");
        let mut values = 0;
        for b in 0..batch {
            for h in 0..heads {
                for s in 0..length {
                    assert_eq!(view.as_ref().row(b, h, s), rows.view().row(b, h, s), "{b} {h} {s}");
                    values += dim;
                }
            }
        }
        assert_eq!(buffer.iter().filter(|x| !x.is_nan()).count(), values, "the gaps are untouched");
    }
}

#[test]
fn tensors_without_rows() {
    let rotary = Rotary::new(&RotaryConfig::new(8)).expect("a valid configuration");
    for (shape, positions) in [([0, 2, 3, 8], 3), ([0, 2, 3, 8], 0), ([2, 0, 3, 8], 6), ([2, 2, 0, 8], 0)] {
        let mut view = TensorMut::from_slice(&mut [], shape).expect("an empty view");
        rotary.rotate_rows(&mut view, &vec![1; positions]).expect("nothing to do");
    }
    // A huge batch of no heads is not counted through, nor does batch x length overflow.
    let mut view = TensorMut::from_slice(&mut [], [usize::MAX, 0, 3, 8]).expect("an empty view");
    rotary.rotate_rows(&mut view, &[1, 2, 3]).expect("nothing to do");
}

#[test]
fn own_tables_are_used_as_they_are() {
    let made = Rotary::new(&RotaryConfig::new(16).with_rotary_dim(12).with_max_length(9)).expect("valid");
    let given = Rotary::from_tables(made.cos().to_vec(), made.sin().to_vec(), 12, 16, Pairing::Interleaved)
        .expect("tables that fit");
    assert_eq!((given.head_dim(), given.rotary_dim(), given.max_length()), (16, 12, 9));
    assert_eq!((given.pairing(), given.attention_factor()), (Pairing::Interleaved, 1.0));
    assert!(given.inverse_frequencies().is_empty());
    let config =
        RotaryConfig::new(16).with_rotary_dim(12).with_max_length(9).with_pairing(Pairing::Interleaved);
    let same = Rotary::new(&config).expect("valid");
    let x = random([1, 1, 1, 16], 5);
    let (mut a, mut b) = (x.data().to_vec(), x.data().to_vec());
    given.rotate(&mut a, 8).expect("in the table");
    same.rotate(&mut b, 8).expect("in the table");
    assert_eq!(a, b);

    let empty = Rotary::from_tables(vec![], vec![], 2, 2, Pairing::Halves).expect("tables of no positions");
    assert_eq!(empty.max_length(), 0);
    let tables = |cos: usize, sin: usize, rotary_dim| {
        Rotary::from_tables(vec![0.0; cos], vec![0.0; sin], rotary_dim, 8, Pairing::Halves)
            .expect_err("must be refused")
            .to_string()
    };
    assert_eq!(tables(7, 7, 4), "cos: 7 values, expected a multiple of rotary_dim / 2 = 2");
    assert_eq!(tables(8, 6, 4), "sin: 6 values, expected 8");
    assert_eq!(tables(9, 9, 0), "rotary_dim: 0, expected an even number from 2 to the head dim, 8");
}

#[test]
fn dynamic_base_grows_from_the_original_length_on() {
    let config =
        RotaryConfig::new(16).with_scaling(Scaling::DynamicNtk { factor: 2.0, original_length: 1024 });
    let frequencies = |config: &RotaryConfig| {
        Rotary::new(config).expect("a valid configuration").inverse_frequencies().to_vec()
    };
    let plain = frequencies(&RotaryConfig::new(16));
    assert_eq!(frequencies(&config), plain);
    assert_eq!(frequencies(&config.clone().with_sequence_length(7)), plain);
    assert_eq!(frequencies(&config.clone().with_sequence_length(1024)), plain);
    let grown = frequencies(&config.with_sequence_length(1025));
    assert!(grown[0] == plain[0] && grown[1..].iter().zip(&plain[1..]).all(|(a, b)| a < b));
}

#[test]
fn configurations_that_are_refused() {
    let head = RotaryConfig::new(64);
    let scaled = |scaling| RotaryConfig::new(64).with_scaling(scaling);
    let yarn = |beta_fast, beta_slow, attention_factor, mscale| {
        let (factor, original_length, mscale_all_dim) = (4.0, 4096, Some(0.0));
        RotaryConfig::new(64).with_scaling(Scaling::Yarn {
            factor,
            original_length,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate: true,
            mscale,
            mscale_all_dim,
        })
    };
    let llama = |factor, low_freq_factor, high_freq_factor, original_length| {
        let scaling = Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_length };
        RotaryConfig::new(64).with_scaling(scaling)
    };
    let dynamic = Scaling::DynamicNtk { factor: 2.0, original_length: 1024 };
    let even = "expected an even number from 2 to the head dim, 64";
    let positive = "expected a positive finite number";
    for (config, text) in [
        (head.clone().with_rotary_dim(7), format!("rotary_dim: 7, {even}")),
        (head.clone().with_rotary_dim(66), format!("rotary_dim: 66, {even}")),
        (head.clone().with_rotary_dim(0), format!("rotary_dim: 0, {even}")),
        (
            head.clone().with_rotary_dim(2).with_scaling(dynamic),
            "rotary_dim: 2, expected an even number from 4 to the head dim, 64".into(),
        ),
        (head.clone().with_base(1.0), "base: 1, expected a finite number above 1".into()),
        (head.clone().with_base(f64::NAN), "base: NaN, expected a finite number above 1".into()),
        (scaled(Scaling::Linear { factor: 0.0 }), format!("factor: 0, {positive}")),
        (
            scaled(Scaling::DynamicNtk { factor: f64::INFINITY, original_length: 1 }),
            format!("factor: inf, {positive}"),
        ),
        (
            scaled(Scaling::DynamicNtk { factor: 1.0, original_length: 0 }),
            "original_length: 0, expected at least 1".into(),
        ),
        (scaled(Scaling::yarn(-1.0, 4096)), format!("factor: -1, {positive}")),
        (scaled(Scaling::yarn(4.0, 0)), "original_length: 0, expected at least 1".into()),
        (yarn(0.0, 1.0, None, None), format!("beta_fast: 0, {positive}")),
        (yarn(32.0, f64::NAN, None, None), format!("beta_slow: NaN, {positive}")),
        (yarn(32.0, 1.0, Some(0.0), None), format!("attention_factor: 0, {positive}")),
        (yarn(32.0, 1.0, None, Some(-2.0)), "mscale: -2, expected 0 or a positive finite number".into()),
        (llama(0.0, 1.0, 4.0, 8192), format!("factor: 0, {positive}")),
        (llama(8.0, 0.0, 4.0, 8192), format!("low_freq_factor: 0, {positive}")),
        (
            llama(8.0, 4.0, 4.0, 8192),
            "high_freq_factor: 4, expected a finite number above low_freq_factor".into(),
        ),
        (llama(8.0, 1.0, 4.0, 0), "original_length: 0, expected at least 1".into()),
        (
            head.clone().with_max_length(usize::MAX),
            format!("max_length: {}, expected tables of rotary_dim 64 that fit the memory", usize::MAX),
        ),
        (
            RotaryConfig::new(2).with_max_length(usize::MAX),
            format!("max_length: {}, expected tables of rotary_dim 2 that fit the memory", usize::MAX),
        ),
    ] {
        assert_eq!(Rotary::new(&config).expect_err("must be refused").to_string(), text);
    }
}

#[test]
fn rotations_that_are_refused_write_nothing() {
    let rotary = Rotary::new(&RotaryConfig::new(4).with_max_length(10)).expect("a valid configuration");
    let mut row = [1.0, 2.0, 3.0, 4.0];
    let error = rotary.rotate(&mut row, 10).expect_err("beyond the table");
    assert_eq!(error, RotaryError::Position { index: None, given: 10, max_length: 10 });
    assert_eq!(error.to_string(), "position: 10, expected below max_length, 10");
    let error = rotary.rotate(&mut row[..3], 1).expect_err("a short row");
    assert_eq!(error, RotaryError::Length { argument: "row", given: 3, expected: 4 });
    assert_eq!(row, [1.0, 2.0, 3.0, 4.0]);

    let x = random([2, 1, 3, 4], 6);
    let refused = |positions: &[usize]| {
        let mut y = x.clone();
        let error = rotary.rotate_rows(&mut y.view_mut(), positions).expect_err("must be refused");
        assert_eq!(x, y);
        error
    };
    let error = refused(&[1; 2]);
    assert_eq!(error, RotaryError::PositionCount { given: 2, batch: 2, length: 3 });
    assert_eq!(error.to_string(), "positions: 2 entries, expected the length, 3, or batch x length, 2 x 3");
    refused(&[1; 5]);
    refused(&[]);
    let error = refused(&[1, 2, 3, 4, 5, 10]);
    assert_eq!(error, RotaryError::Position { index: Some(5), given: 10, max_length: 10 });
    assert_eq!(error.to_string(), "positions[5]: 10, expected below max_length, 10");

    let mut y = random([1, 1, 3, 6], 6);
    let error = rotary.rotate_rows(&mut y.view_mut(), &[1; 3]).expect_err("another head dim");
    assert_eq!(error.to_string(), "rows: 6 values, expected 4");
}
