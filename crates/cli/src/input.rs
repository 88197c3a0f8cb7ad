//! Where queries, keys and values come from: the real ones inside the program, a user's file, or a generator.
//!
//! The real ones are `testdata/minilm.safetensors`, which is compiled into the program so that it runs anywhere. They
//! are the queries, keys and values of layers 0 and 5 of all-MiniLM-L6-v2 (12 heads of dim 32, 212 tokens of text),
//! with the output that transformers computed from them. [`tiled`] makes long inputs of them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use qkv::{Tensor, TensorError};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::Failure;
use crate::args::ShapeArg;
use crate::memory::{call_bytes, require};

/// Real inputs, see `testdata/README.md`.
static MINILM: &[u8] = include_bytes!("../../../testdata/minilm.safetensors");

/// One input of a comparison.
#[derive(Debug)]
pub(crate) struct Input {
    /// What it is, in a word or two.
    pub(crate) name: String,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    /// The output that another program computed from them without a mask.
    pub(crate) stored: Option<Tensor>,
}

/// The real inputs; with `long` also those that are made of them.
pub(crate) fn built_in(long: bool) -> Result<Vec<Input>, Failure> {
    let mut inputs = read(MINILM, "the built-in input", None)?;
    for input in &mut inputs {
        input.name = input.name.replace("layer", "layer ");
    }
    if let (true, Some(last)) = (long, inputs.last()) {
        let tiled_1024 = tiled(last, 1024, 1)?;
        let tiled_2048 = tiled(last, 2048, 2)?;
        inputs.extend([tiled_1024, tiled_2048]);
    }
    Ok(inputs)
}

/// A long input made of a short one: the text is repeated up to `length`, and `join` neighbouring heads become one.
///
/// Copy r of the text has its queries and keys turned as rotary positions turn them, with the copy's number as the
/// position: of a head's dim D, features i and i + D/2 turn by the angle r * 10000^(-i / (D/2)). Within a copy the
/// scores therefore are those of the text, and between copies they fade with the distance, as they would in a long
/// text. Values are scaled by 1 + r/16, so that copies do not share them either. The turns are rounded to f32 and are
/// part of the input: what is computed from it is compared with an exact computation from the same numbers.
pub(crate) fn tiled(input: &Input, length: usize, join: usize) -> Result<Input, Failure> {
    let [batch, heads, text, dim] = input.q.shape();
    let shape = [batch, heads / join, length, dim * join];
    let pairs = dim / 2;
    let turned = |tensor: &Tensor| {
        Tensor::from_fn(shape, |[b, h, s, d]| {
            let (copy, row) = (s / text, tensor.view().row(b, h * join + d / dim, s % text));
            let (i, second) = ((d % dim) % pairs, d % dim >= pairs);
            let angle = copy as f64 * 10000f64.powf(-(i as f64) / pairs as f64);
            let (sin, cos) = angle.sin_cos();
            let (x, y) = (f64::from(row[i]), f64::from(row[i + pairs]));
            (if second { y * cos + x * sin } else { x * cos - y * sin }) as f32
        })
    };
    let scaled = Tensor::from_fn(shape, |[b, h, s, d]| {
        let row = input.v.view().row(b, h * join + d / dim, s % text);
        row[d % dim] * (1.0 + (s / text) as f32 / 16.0)
    });
    let too_large = |error: TensorError| Failure::new(format!("{}: {error}", input.name));
    Ok(Input {
        name: format!("tiled to {length}"),
        q: turned(&input.q).map_err(too_large)?,
        k: turned(&input.k).map_err(too_large)?,
        v: scaled.map_err(too_large)?,
        stored: None,
    })
}

/// The inputs of a user's file.
pub(crate) fn from_file(path: &Path, prefix: Option<&str>) -> Result<Vec<Input>, Failure> {
    let name = path.display().to_string();
    let unreadable = |error: std::io::Error| Failure::new(format!("cannot read {name}: {error}"));
    let mut file = File::open(path).map_err(unreadable)?;
    let about = file.metadata().map_err(unreadable)?;
    if !about.is_file() {
        // A device may never end.
        return Err(Failure::new(format!("cannot read {name}: expected a regular file")));
    }
    // Its bytes and the tensors made of them.
    require(&name, 2.0 * about.len() as f64)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(unreadable)?;
    read(&bytes, &name, prefix)
}

/// All complete sets of q, k and v in a safetensors file, by name; `file` is what messages call it.
fn read(bytes: &[u8], file: &str, prefix: Option<&str>) -> Result<Vec<Input>, Failure> {
    let broken = |error| Failure::new(format!("{file} is not a complete safetensors file: {error}"));
    let tensors = SafeTensors::deserialize(bytes).map_err(broken)?;

    // "layer0.q" belongs to the set "layer0", a bare "q" to the set "".
    let mut sets: BTreeMap<&str, [Option<&str>; 4]> = BTreeMap::new();
    for full in tensors.names() {
        let (set, role) = full.rsplit_once('.').unwrap_or(("", full));
        if let Some(index) = ["q", "k", "v", "out"].iter().position(|&known| known == role) {
            sets.entry(set).or_default()[index] = Some(full);
        }
    }
    if let Some(prefix) = prefix {
        sets.retain(|&set, _| set == prefix);
    }
    let mut inputs = Vec::new();
    let mut incomplete = None;
    for (set, roles) in sets {
        let [Some(q), Some(k), Some(v), out] = roles else {
            // An "out" alone means nothing; a query without its key probably does.
            if roles[..3].iter().any(Option::is_some) {
                incomplete = Some((set, roles));
            }
            continue;
        };
        let load = |name: &str| tensor(file, name, tensors.tensor(name).map_err(broken)?);
        let (q, k, v) = (load(q)?, load(k)?, load(v)?);
        let stored = match out {
            None => None,
            Some(out) => Some((out, load(out)?)),
        };
        let [batch, heads, length, _] = q.shape();
        let expected = [batch, heads, length, v.shape()[3]];
        let stored = match stored {
            Some((name, stored)) if stored.shape() != expected => {
                let given = stored.shape();
                return Err(Failure::new(format!(
                    "{file}: tensor {name} has shape {given:?}, expected {expected:?}, that of the output"
                )));
            }
            other => other.map(|(_, stored)| stored),
        };
        let name = if set.is_empty() { "q, k, v".to_owned() } else { set.escape_debug().to_string() };
        inputs.push(Input { name, q, k, v, stored });
    }
    match incomplete {
        // With a complete set beside it, it may be anything.
        Some((set, roles)) if inputs.is_empty() => {
            let missing: Vec<String> = ["q", "k", "v"]
                .into_iter()
                .zip(roles)
                .filter(|(_, found)| found.is_none())
                .map(|(role, _)| if set.is_empty() { role.to_owned() } else { format!("{set}.{role}") })
                .collect();
            Err(Failure::new(format!("{file}: tensor {} is missing", missing.join(" and "))))
        }
        _ if inputs.is_empty() => {
            let expected = match prefix {
                Some(prefix) => format!("{prefix}.q, {prefix}.k and {prefix}.v"),
                None => "q, k and v, or NAME.q, NAME.k and NAME.v".to_owned(),
            };
            let names = tensors.names();
            Err(Failure::new(format!("{file}: found {}, expected {expected}", listed(&names))))
        }
        _ => Ok(inputs),
    }
}

/// Names for a message: in order, and not too many.
fn listed(names: &[&str]) -> String {
    const MOST: usize = 12;
    let mut names: Vec<String> = names.iter().map(|name| name.escape_debug().to_string()).collect();
    names.sort_unstable();
    match names.len() {
        0 => "no tensors".to_owned(),
        n if n > MOST => format!("{} and {} more tensors", names[..MOST].join(", "), n - MOST),
        _ => format!("tensors {}", names.join(", ")),
    }
}

/// One tensor out of a file.
fn tensor(file: &str, name: &str, view: TensorView<'_>) -> Result<Tensor, Failure> {
    let refuse = |what: String| Failure::new(format!("{file}: tensor {} {what}", name.escape_debug()));
    if view.dtype() != Dtype::F32 {
        return Err(refuse(format!("has dtype {}, expected F32", view.dtype())));
    }
    let shape = match *view.shape() {
        [batch, heads, length, dim] => [batch, heads, length, dim],
        [heads, length, dim] => [1, heads, length, dim],
        ref other => {
            return Err(refuse(format!(
                "has rank {} (shape {other:?}), expected 4 (batch, heads, length, head dim) or 3 (heads, length, \
                 head dim)",
                other.len()
            )));
        }
    };
    if shape.contains(&0) {
        return Err(refuse(format!("has shape {:?}, expected sizes of at least 1", view.shape())));
    }
    let values =
        view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
    Tensor::from_vec(values.collect(), shape).map_err(|error| refuse(error.to_string()))
}

/// A random input. Sizes of 0, with which there is nothing to measure, and those that the machine cannot hold are refused
/// before anything is allocated.
pub(crate) fn random(shape: ShapeArg, kv_heads: Option<usize>) -> Result<Input, Failure> {
    let kv_heads = kv_heads.unwrap_or(shape.heads);
    let ShapeArg { batch, heads, length, dim } = shape;
    for (axis, size) in
        [("batch", batch), ("heads", heads), ("length", length), ("head dim", dim), ("--kv-heads", kv_heads)]
    {
        if size == 0 {
            return Err(Failure::new(format!("--shape {shape}: {axis} is 0, expected at least 1")));
        }
    }
    require(&format!("--shape {shape}"), call_bytes(shape, kv_heads))?;
    let make = |seed, heads| {
        let mut random = Uniform::new(seed);
        Tensor::from_fn([batch, heads, length, dim], |_| random.next())
            .map_err(|error| Failure::new(format!("--shape {shape}: {error}")))
    };
    Ok(Input {
        name: format!("random {length}x{dim}"),
        q: make(1, heads)?,
        k: make(2, kv_heads)?,
        v: make(3, kv_heads)?,
        stored: None,
    })
}

/// Random numbers with mean 0 and variance 1, uniform between plus and minus the root of 3: the generator SplitMix64
/// (Steele, Lea and Flood 2014), of which the upper 24 bits are used. The same on every machine.
#[derive(Debug)]
pub(crate) struct Uniform(u64);

impl Uniform {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let bits = ((z ^ (z >> 31)) >> 40) as f32;
        (bits / (1 << 23) as f32 - 1.0) * 3f32.sqrt()
    }
}

impl fmt::Display for ShapeArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{},{}", self.batch, self.heads, self.length, self.dim)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_built_in_inputs_are_the_two_layers_and_two_long_ones() {
        let inputs = built_in(true).unwrap();
        let found: Vec<_> =
            inputs.iter().map(|i| (i.name.as_str(), i.q.shape(), i.stored.is_some())).collect();
        assert_eq!(
            found,
            [
                ("layer 0", [1, 12, 212, 32], true),
                ("layer 5", [1, 12, 212, 32], true),
                ("tiled to 1024", [1, 12, 1024, 32], false),
                ("tiled to 2048", [1, 6, 2048, 64], false),
            ]
        );
        assert_eq!(built_in(false).unwrap().len(), 2);
    }

    #[test]
    fn the_first_copy_is_the_text_and_no_copy_is_another() {
        let inputs = built_in(false).unwrap();
        let layer = &inputs[1];
        let long = tiled(layer, 500, 2).unwrap();
        assert_eq!(long.q.view().row(0, 1, 7)[32..], *layer.q.view().row(0, 3, 7));
        assert_eq!(long.v.view().row(0, 1, 7)[..32], *layer.v.view().row(0, 2, 7));
        for tensor in [&long.q, &long.k, &long.v] {
            assert_ne!(tensor.view().row(0, 0, 3), tensor.view().row(0, 0, 212 + 3));
            assert_ne!(tensor.view().row(0, 0, 212 + 3), tensor.view().row(0, 0, 424 + 3));
        }
        // A turn changes no length, and both ends of a score turn alike within a copy.
        let dot = |s: usize| -> f32 {
            long.q.view().row(0, 0, s).iter().zip(long.k.view().row(0, 0, s + 1)).map(|(a, b)| a * b).sum()
        };
        assert!((dot(3) - dot(212 + 3)).abs() < 1e-4 * (1.0 + dot(3).abs()));
    }

    #[test]
    fn random_numbers_are_spread_as_said() {
        let mut random = Uniform::new(1);
        let values: Vec<f64> = (0..100_000).map(|_| f64::from(random.next())).collect();
        let mean = values.iter().sum::<f64>() / 1e5;
        let variance = values.iter().map(|x| x * x).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        assert!(values.iter().all(|x| x.abs() <= 3f64.sqrt() + 1e-6));
    }

    /// A file with these f32 tensors, all zeros.
    fn file(tensors: &[(&str, &[usize])]) -> Vec<u8> {
        let zeros = vec![0u8; 4096];
        let views: HashMap<&str, TensorView<'_>> = tensors
            .iter()
            .map(|&(name, shape)| {
                let bytes = 4 * shape.iter().product::<usize>();
                (name, TensorView::new(Dtype::F32, shape.to_vec(), &zeros[..bytes]).unwrap())
            })
            .collect();
        safetensors::serialize(views, None).unwrap()
    }

    #[test]
    fn sets_are_found_by_their_names() {
        let shape: &[usize] = &[2, 3, 4];
        let bytes = file(&[
            ("q", shape),
            ("k", shape),
            ("v", shape),
            ("a.b.q", &[1, 2, 3, 4]),
            ("a.b.k", shape),
            ("a.b.v", shape),
            ("a.b.out", shape),
            ("c.q", shape),
            ("other", shape),
        ]);
        let inputs = read(&bytes, "file", None).unwrap();
        let found: Vec<_> = inputs.iter().map(|i| (i.name.as_str(), i.stored.is_some())).collect();
        assert_eq!(found, [("q, k, v", false), ("a.b", true)]);
        assert_eq!(inputs[1].q.shape(), [1, 2, 3, 4]);
        assert_eq!(read(&bytes, "file", Some("a.b")).unwrap().len(), 1);
        let error = read(&bytes, "file", Some("c")).unwrap_err().to_string();
        assert_eq!(error, "file: tensor c.k and c.v is missing");
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let shape: &[usize] = &[2, 3, 4];
        for (tensors, expected) in [
            (&[("x", shape)][..], "file: found tensors x, expected q, k and v, or NAME.q, NAME.k and NAME.v"),
            (&[], "file: found no tensors, expected q, k and v, or NAME.q, NAME.k and NAME.v"),
            (&[("q", shape), ("v", shape)], "file: tensor k is missing"),
            (
                &[("q", &[2, 3]), ("k", shape), ("v", shape)],
                "file: tensor q has rank 2 (shape [2, 3]), expected",
            ),
            (
                &[("q", shape), ("k", shape), ("v", shape), ("out", &[3, 3, 4])],
                "file: tensor out has shape [1, 3, 3, 4], expected [1, 2, 3, 4]",
            ),
            (
                &[("q", shape), ("k", &[2, 0, 4]), ("v", &[2, 0, 4])],
                "file: tensor k has shape [2, 0, 4], expected sizes of at least 1",
            ),
        ] {
            let error = read(&file(tensors), "file", None).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let whole = file(&[("q", shape), ("k", shape), ("v", shape)]);
        for length in [0, 4, 20, whole.len() - 1] {
            let error = read(&whole[..length], "file", None).unwrap_err().to_string();
            assert!(error.starts_with("file is not a complete safetensors file: "), "{error}");
        }
    }
}
