//! `qkv walkthrough`: each step of attention on a short sentence, with numbers small enough to check by hand.
//!
//! A trained model would look words up in a table and multiply by learned matrices. Here both come from rules, so that
//! everyone sees the same numbers and can recompute them:
//!
//! ```text
//! embedding    x[i][j] = sin((j + 1) c / 10) + cos((j + 1) i) / 4     c: sum of the word's letters (code points)
//!                                                                     i: position of the word, from 0
//! projections  W[r][c] = 2 sin(s + (r + 1)(2 c + 1)) / sqrt(dim)       s: 1 for Wq, 2 for Wk, 3 for Wv
//! ```
//!
//! The first part of the embedding is the word's own, so a word that comes twice is like itself; the second tells
//! positions apart. From Q, K and V on, the three steps of the textbook follow, in f64. In the end the library computes
//! the same in f32 in one fused pass, and both are laid side by side.

use qkv::reference::oracle;
use qkv::{Tensor, attention};
use serde::Serialize;

use crate::args::WalkthroughArgs;
use crate::bench::spec;
use crate::output::{Grid, Tone, WIDTH, error_text, heading, paragraph};
use crate::{Context, Failure, Report};

/// More words do not fit the width.
const MOST_WORDS: usize = 12;

/// What the steps below and the library may differ by: a few roundings of numbers near 1.
const TOLERANCE: f64 = 1e-5;

/// Rows of numbers.
type Matrix = Vec<Vec<f64>>;

/// Every step. What `--json` prints; a masked score is null there.
#[derive(Debug, Serialize)]
struct Steps {
    tokens: Vec<String>,
    causal: bool,
    scale: f64,
    embeddings: Matrix,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    scores: Matrix,
    scaled: Matrix,
    masked: Matrix,
    weights: Matrix,
    row_sums: Vec<f64>,
    output: Matrix,
    /// The same by `qkv::attention`.
    qkv_output: Matrix,
    /// The largest difference between the two.
    max_difference: f64,
    /// The largest difference between the steps and `qkv::reference::oracle`.
    max_difference_to_reference: f64,
    passed: bool,
}

pub(crate) fn run(args: &WalkthroughArgs, context: &Context) -> Result<Report, Failure> {
    let steps = walk(&args.sentence, args.dim, args.causal)?;
    let report = Report::new(context, &steps, || text(&steps))?;
    let complaint = format!(
        "qkv and the three steps differ by {}, tolerated are {}",
        error_text(steps.max_difference.max(steps.max_difference_to_reference)),
        error_text(TOLERANCE)
    );
    Ok(Report { complaints: if steps.passed { Vec::new() } else { vec![complaint] }, ..report })
}

fn walk(sentence: &str, dim: usize, causal: bool) -> Result<Steps, Failure> {
    let tokens = tokens(sentence)?;
    let words = tokens.len();
    let embeddings: Matrix = tokens.iter().enumerate().map(|(i, word)| embedding(word, i, dim)).collect();
    let [q, k, v] = [1.0, 2.0, 3.0].map(|seed| project(&embeddings, seed));

    // 1. Every query with every key.
    let scores: Matrix = q.iter().map(|q| k.iter().map(|k| dot(q, k)).collect()).collect();
    let scale = 1.0 / (dim as f64).sqrt();
    let scaled = map(&scores, |_, _, score| score * scale);
    let masked =
        map(&scaled, |query, key, score| if causal && key > query { f64::NEG_INFINITY } else { score });

    // 2. Softmax, each row less its maximum.
    let weights: Matrix = masked.iter().map(|row| softmax(row)).collect();
    let row_sums = weights.iter().map(|row| row.iter().sum()).collect();

    // 3. The weighted sum of the values.
    let output: Matrix = weights
        .iter()
        .map(|weights| (0..dim).map(|d| weights.iter().zip(&v).map(|(w, v)| w * v[d]).sum()).collect())
        .collect();

    // The same by the library: one head of one batch.
    let tensor = |matrix: &Matrix| {
        Tensor::from_fn([1, 1, words, dim], |[_, _, i, d]| matrix[i][d] as f32)
            .map_err(|error| Failure::new(error.to_string()))
    };
    let (tq, tk, tv) = (tensor(&q)?, tensor(&k)?, tensor(&v)?);
    let spec = spec(causal);
    let fused = attention(tq.view(), tk.view(), tv.view(), &spec)?;
    let reference = oracle(tq.view(), tk.view(), tv.view(), &spec).output;
    let flat: Vec<f64> = output.iter().flatten().copied().collect();
    let furthest = |other: &mut dyn Iterator<Item = f64>| {
        other.zip(&flat).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    };
    let max_difference = furthest(&mut fused.data().iter().map(|&x| f64::from(x)));
    let max_difference_to_reference = furthest(&mut reference.data().iter().copied());
    Ok(Steps {
        tokens,
        causal,
        scale,
        embeddings,
        q,
        k,
        v,
        scores,
        scaled,
        masked,
        weights,
        row_sums,
        output,
        qkv_output: fused.data().chunks(dim).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect(),
        max_difference,
        max_difference_to_reference,
        passed: max_difference <= TOLERANCE && max_difference_to_reference <= TOLERANCE,
    })
}

/// The words of a sentence.
fn tokens(sentence: &str) -> Result<Vec<String>, Failure> {
    let visible = |word: &str| word.chars().filter(|c| !c.is_control()).collect::<String>();
    let words: Vec<String> = sentence.split_whitespace().map(visible).filter(|w| !w.is_empty()).collect();
    if (1..=MOST_WORDS).contains(&words.len()) {
        Ok(words)
    } else {
        Err(Failure::new(format!("--sentence: {} words, expected 1 to {MOST_WORDS}", words.len())))
    }
}

/// The rule of the module's text.
fn embedding(word: &str, position: usize, dim: usize) -> Vec<f64> {
    let letters = word.chars().map(|c| f64::from(u32::from(c))).sum::<f64>();
    (1..=dim).map(|j| (j as f64 * letters / 10.0).sin() + (j as f64 * position as f64).cos() / 4.0).collect()
}

/// Embeddings times a matrix of the rule in the module's text, rounded to f32: what a model would hand to attention.
fn project(x: &Matrix, seed: f64) -> Matrix {
    let dim = x[0].len();
    let weight =
        |r: usize, c: usize| 2.0 * (seed + ((r + 1) * (2 * c + 1)) as f64).sin() / (dim as f64).sqrt();
    x.iter()
        .map(|x| {
            (0..dim)
                .map(|c| x.iter().enumerate().map(|(r, x)| x * weight(r, c)).sum::<f64>())
                .map(|sum| f64::from(sum as f32))
                .collect()
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn map(matrix: &Matrix, f: impl Fn(usize, usize, f64) -> f64) -> Matrix {
    matrix
        .iter()
        .enumerate()
        .map(|(i, row)| row.iter().enumerate().map(|(j, &x)| f(i, j, x)).collect())
        .collect()
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    exponentials.into_iter().map(|e| e / sum).collect()
}

fn text(steps: &Steps) -> String {
    let Steps { tokens, causal, scale, .. } = steps;
    let dim = steps.q[0].len();
    let features: Vec<String> = (0..dim).map(|d| format!("[{d}]")).collect();
    let mut text = String::new();
    let mut section = |title: &str, explanation: &str, grids: &[&Grid]| {
        text.push_str(&heading(title));
        text.push_str(&paragraph(explanation));
        for grid in grids {
            text.push('\n');
            text.push_str(&grid.text());
        }
        text.push('\n');
    };

    section("The sentence", &format!("{} words, one token each: {}", tokens.len(), tokens.join(" | ")), &[]);
    section(
        "Embeddings",
        &format!(
            "Each word becomes {dim} numbers. Here a rule makes them: feature j of the word at position i is \
             sin((j+1)c/10) + cos((j+1)i)/4, where c is the sum of the codes of the word's letters."
        ),
        &[&matrix("x", tokens, &features, &steps.embeddings, &[])],
    );
    section(
        "Queries, keys, values",
        "Three matrices turn each embedding into what the word asks (q), what it answers to (k), and what it says (v). \
         A model learns them; here element (r, c) is 2 sin(s + (r+1)(2c+1)) / sqrt(dim) with s = 1, 2, 3.",
        &[
            &matrix("q", tokens, &features, &steps.q, &[]),
            &matrix("k", tokens, &features, &steps.k, &[]),
            &matrix("v", tokens, &features, &steps.v, &[]),
        ],
    );
    section(
        "Step 1: scores",
        "Row i, column j: the dot product of query i with key j. High where word i asks for what word j answers to.",
        &[&matrix("q . k", tokens, tokens, &steps.scores, &[])],
    );
    section(
        "Scaled",
        &format!(
            "Times 1 / sqrt({dim}) = {scale:.3}, so that the size of the scores does not grow with the head dim.{}",
            if *causal {
                " The causal mask hides the words after the query's own: their scores are -inf."
            } else {
                ""
            }
        ),
        &[&matrix("score", tokens, tokens, &steps.masked, &[])],
    );
    section(
        "Step 2: softmax",
        "exp(score - largest score of the row), divided by the sum over the row: weights that add up to 1.",
        &[&matrix("weight", tokens, tokens, &steps.weights, &[("sum", &steps.row_sums)])],
    );
    section(
        "Step 3: output",
        "Each word gets the sum of all values, each with its weight.",
        &[&matrix("out", tokens, &features, &steps.output, &[])],
    );
    section(
        "The same in one pass",
        "qkv::attention computes this without writing the scores down: it takes the keys block by block and keeps, for \
         each query, the largest score so far, the sum of the exponentials and the weighted sum of the values.",
        &[&matrix("qkv", tokens, &features, &steps.qkv_output, &[])],
    );
    text.push_str(&paragraph(&format!(
        "Largest difference: {} between qkv (f32) and the three steps above (f64), {} between these and the \
         library's own reference. {}",
        error_text(steps.max_difference),
        error_text(steps.max_difference_to_reference),
        if steps.passed { "The numbers are the same." } else { "That is too much." }
    )));
    text
}

/// A table of a matrix: a label for each row and column, two decimals, and further columns at the right.
fn matrix(
    corner: &str,
    rows: &[String],
    columns: &[String],
    values: &Matrix,
    further: &[(&str, &[f64])],
) -> Grid {
    // What the row labels (8 columns and 2 of space) leave, less the space beside each cell.
    let width = (usize::from(WIDTH) - 10) / (columns.len() + further.len()) - 2;
    let header = std::iter::once(corner.to_owned())
        .chain(columns.iter().map(|label| shortened(label, width.min(8))))
        .chain(further.iter().map(|&(label, _)| label.to_owned()));
    let mut grid = Grid::new(1, header);
    for (i, (label, row)) in rows.iter().zip(values).enumerate() {
        let numbers = row.iter().map(|&x| match x {
            f64::NEG_INFINITY => ("-inf".to_owned(), Tone::Quiet),
            // No minus before a zero.
            x if x.abs() < 0.005 => ("0.00".to_owned(), Tone::Plain),
            x => (format!("{x:.2}"), Tone::Plain),
        });
        let sums = further.iter().map(|(_, values)| (format!("{:.2}", values[i]), Tone::Good));
        grid.row_with(std::iter::once((shortened(label, 8), Tone::Plain)).chain(numbers).chain(sums));
    }
    grid
}

/// A label of at most `most` characters.
fn shortened(label: &str, most: usize) -> String {
    if label.chars().count() <= most {
        label.to_owned()
    } else {
        label.chars().take(most - 1).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up_and_the_library_agrees() {
        for causal in [false, true] {
            for dim in 4..=8 {
                let steps = walk("to be or not to be that is the question", dim, causal).unwrap();
                assert!(steps.passed, "{} {}", steps.max_difference, steps.max_difference_to_reference);
                assert!(steps.row_sums.iter().all(|sum| (sum - 1.0).abs() < 1e-12));
                assert_eq!(steps.weights[0][1] == 0.0, causal);
            }
        }
    }

    #[test]
    fn the_first_word_sees_itself_alone_under_the_causal_mask() {
        let steps = walk("one two three", 4, true).unwrap();
        assert_eq!(steps.weights[0], [1.0, 0.0, 0.0]);
        assert_eq!(steps.output[0], steps.v[0]);
    }

    #[test]
    fn sentences_without_words_and_long_ones_are_refused() {
        for (bad, words) in [("", 0), (" \t\n", 0), ("a b c d e f g h i j k l m", 13)] {
            let error = walk(bad, 4, false).unwrap_err().to_string();
            assert_eq!(error, format!("--sentence: {words} words, expected 1 to 12"));
        }
    }

    #[test]
    fn the_widest_sentence_keeps_the_width() {
        let steps = walk(&"incomprehensibilities ".repeat(12), 8, true).unwrap();
        assert!(text(&steps).lines().all(|line| line.chars().count() <= usize::from(WIDTH)));
    }
}
