//! Caches under random operations, against models that hold plain rows.
//!
//! The model of the paged cache counts pages by itself, by names that it gives them: it says in advance which
//! appends exhaust the pool, and the cache's tables must be its own with other names.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use qkv_attention::cache::{
    CacheError, KvCache, KvCacheConfig, PagedCache, PagedCacheConfig, SequenceId, Storage,
};
use qkv_attention::{Data, Tensor};

const HEADS: usize = 2;
const KEY_DIM: usize = 4;
const VALUE_DIM: usize = 6;

/// A token: what its rows are made of. Tokens that lie near each other differ.
type Token = u32;

/// The row of a token, of small integers that come back exactly from every type: 8-bit rows have scale 1.
///
/// Without zero points each pair of values has 127 in it, with them each row a least value and one that is 255
/// above; the zero points of neighbours differ.
fn row(token: Token, head: usize, dim: usize, ranged: bool) -> Vec<f32> {
    let parts = [token % 127, token / 127 % 127, head as u32].map(|part| part as f32);
    let low = -10.0 * (token % 3) as f32;
    let value = |d: usize| match (ranged, d % 4) {
        (false, 0 | 2) => 127.0,
        (false, _) => -parts[d / 2],
        (true, 0) => low,
        (true, 2) => low + 255.0,
        (true, _) => parts[d / 2],
    };
    (0..dim).map(value).collect()
}

/// The rows of a token once stored.
fn stored(token: Token, head: usize, position: usize, ranged: bool) -> (Vec<f32>, Vec<f32>) {
    let mut key = row(token, head, KEY_DIM, ranged);
    prepare(position, &mut key);
    (key, row(token, head, VALUE_DIM, ranged))
}

/// Makes the position a value of the key, which keeps its scale.
fn prepare(position: usize, row: &mut [f32]) {
    row[1] = (position % 127) as f32;
}

fn tensors(batches: &[Vec<Token>], ranged: bool) -> (Tensor<f32>, Tensor<f32>) {
    let length = batches.first().map_or(0, Vec::len);
    let make = |dim| {
        let shape = [batches.len(), HEADS, length, dim];
        Tensor::from_fn(shape, |[b, h, p, d]| row(batches[b][p], h, dim, ranged)[d]).unwrap()
    };
    (make(KEY_DIM), make(VALUE_DIM))
}

fn read(data: &Data<'_>, b: usize, h: usize, p: usize) -> Vec<f32> {
    match data {
        Data::F32(x) => x.row(b, h, p).to_vec(),
        Data::F16(x) => x.row(b, h, p).iter().map(|x| x.to_f32()).collect(),
        Data::Bf16(x) => x.row(b, h, p).iter().map(|x| x.to_f32()).collect(),
        Data::Int8(x) => {
            let (values, scales) = (x.values().row(b, h, p), x.scales().row(b, h, p));
            let group = values.len() / scales.len();
            let zeros = x.zeros().map(|zeros| zeros.row(b, h, p));
            let value = |(d, &q): (usize, &i8)| {
                scales[d / group] * (f32::from(q) - zeros.map_or(0.0, |zeros| zeros[d / group]))
            };
            values.iter().enumerate().map(value).collect()
        }
        _ => panic!("a type without a reader"),
    }
}

fn storages() -> impl Strategy<Value = Storage> {
    prop_oneof![
        Just(Storage::F32),
        Just(Storage::F16),
        Just(Storage::Bf16),
        Just(Storage::Int8 { group: None, zero_point: false }),
        Just(Storage::Int8 { group: Some(2), zero_point: false }),
        Just(Storage::Int8 { group: None, zero_point: true }),
    ]
}

fn is_int8(storage: Storage) -> bool {
    matches!(storage, Storage::Int8 { .. })
}

fn is_ranged(storage: Storage) -> bool {
    matches!(storage, Storage::Int8 { zero_point: true, .. })
}

#[derive(Clone, Debug)]
enum Step {
    Create,
    Append(usize, usize),
    /// An append of which a value is not finite: refused by 8-bit storage, an ordinary one otherwise.
    Broken(usize, usize),
    Fork(usize),
    Truncate(usize, usize),
    Free(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let new = || prop_oneof![4 => 0usize..4, 1 => 4usize..12];
    let step = prop_oneof![
        2 => Just(Step::Create),
        10 => (0usize..100, new()).prop_map(|(s, n)| Step::Append(s, n)),
        2 => (0usize..100, 1usize..9).prop_map(|(s, n)| Step::Broken(s, n)),
        4 => (0usize..100).prop_map(Step::Fork),
        3 => (0usize..100, 0usize..100).prop_map(|(s, n)| Step::Truncate(s, n)),
        2 => (0usize..100).prop_map(Step::Free),
    ];
    prop::collection::vec(step, 1..60)
}

/// What happened, so that the test can say that it tested something.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    steps: usize,
    exhausted: usize,
    copied: usize,
    broken: usize,
    stale: usize,
}

#[derive(Clone, Debug)]
struct Sequence {
    id: SequenceId,
    tokens: Vec<Token>,
    /// The model's names of its pages.
    pages: Vec<u32>,
}

struct Model {
    storage: Storage,
    cache: PagedCache,
    live: Vec<Sequence>,
    freed: Vec<SequenceId>,
    tokens: Token,
    named: u32,
    seen: Seen,
}

impl Model {
    fn sharers(&self, page: u32) -> usize {
        self.live.iter().filter(|s| s.pages.contains(&page)).count()
    }

    fn free(&self) -> usize {
        let used: BTreeSet<u32> = self.live.iter().flat_map(|s| s.pages.iter().copied()).collect();
        self.cache.pages() - used.len()
    }

    fn append(&mut self, which: usize, new: usize, broken: bool) {
        let size = self.cache.page_size();
        let tokens: Vec<Token> = (0..new as Token).map(|i| self.tokens + i).collect();
        let (mut k, mut v) = tensors(std::slice::from_ref(&tokens), is_ranged(self.storage));
        if broken {
            // The last row of the keys, or of the values: all others come before it.
            let data = if new.is_multiple_of(2) { k.data_mut() } else { v.data_mut() };
            *data.last_mut().unwrap() = f32::NAN;
        }
        let sequence = &self.live[which];
        let length = sequence.tokens.len();
        let copies =
            !length.is_multiple_of(size) && new > 0 && self.sharers(*sequence.pages.last().unwrap()) > 1;
        let kept = sequence.pages.len() - usize::from(copies);
        let needed = (length + new).div_ceil(size) - kept;
        let result = self.cache.append_with(sequence.id, k.view(), v.view(), prepare);
        if needed > self.free() {
            assert_eq!(result, Err(CacheError::PoolFull { needed, free: self.free() }));
            self.seen.exhausted += 1;
        } else if broken && is_int8(self.storage) {
            assert!(matches!(result, Err(CacheError::NotFinite { .. })), "{result:?}");
            self.seen.broken += 1;
        } else {
            assert_eq!(result, Ok(()));
            let sequence = &mut self.live[which];
            sequence.pages.truncate(kept);
            for _ in 0..needed {
                sequence.pages.push(self.named);
                self.named += 1;
            }
            sequence.tokens.extend(tokens);
            self.tokens += new as Token;
            self.seen.copied += usize::from(copies);
            if broken {
                // What other types make of NaN is not asked here.
                sequence.tokens.truncate(length);
                sequence.pages.truncate(length.div_ceil(size));
                let id = sequence.id;
                assert_eq!(self.cache.truncate(id, length), Ok(()));
            }
        }
    }

    fn step(&mut self, step: &Step) {
        self.seen.steps += 1;
        let pick = |of: usize| (!self.live.is_empty()).then(|| of % self.live.len());
        match *step {
            Step::Create => {
                let id = self.cache.create();
                self.live.push(Sequence { id, tokens: Vec::new(), pages: Vec::new() });
            }
            Step::Append(of, new) => {
                if let Some(which) = pick(of) {
                    self.append(which, new, false);
                }
            }
            Step::Broken(of, new) => {
                if let Some(which) = pick(of) {
                    self.append(which, new, true);
                }
            }
            Step::Fork(of) => {
                if let Some(which) = pick(of) {
                    let sequence = self.live[which].clone();
                    let id = self.cache.fork(sequence.id).unwrap();
                    self.live.push(Sequence { id, ..sequence });
                }
            }
            Step::Truncate(of, to) => {
                if let Some(which) = pick(of) {
                    let size = self.cache.page_size();
                    let sequence = &mut self.live[which];
                    let length = sequence.tokens.len();
                    let beyond = self.cache.truncate(sequence.id, length + 1);
                    assert_eq!(beyond, Err(CacheError::Beyond { given: length + 1, length }));
                    let to = to % (length + 1);
                    self.cache.truncate(sequence.id, to).unwrap();
                    sequence.tokens.truncate(to);
                    sequence.pages.truncate(to.div_ceil(size));
                }
            }
            Step::Free(of) => {
                if let Some(which) = pick(of) {
                    let sequence = self.live.swap_remove(which);
                    self.cache.free(sequence.id).unwrap();
                    self.freed.push(sequence.id);
                }
            }
        }
    }

    fn check(&mut self) {
        let ids: Vec<SequenceId> = self.live.iter().map(|s| s.id).collect();
        let view = self.cache.view(&ids).unwrap();
        let view = view.as_ref();
        let size = self.cache.page_size();
        let mut names = BTreeMap::new();
        for (i, sequence) in self.live.iter().enumerate() {
            assert_eq!(self.cache.len(sequence.id), Ok(sequence.tokens.len()));
            assert_eq!(view.lengths[i], sequence.tokens.len());
            let table = self.cache.pages_of(sequence.id).unwrap();
            assert_eq!(view.tables[i], table);
            assert_eq!(table.len(), sequence.tokens.len().div_ceil(size));
            assert_eq!(table.len(), sequence.pages.len());
            for (&page, &name) in table.iter().zip(&sequence.pages) {
                // One name for one page, both ways.
                assert_eq!(*names.entry(name).or_insert(page), page);
                assert_eq!(self.cache.sharers(page), self.sharers(name));
            }
            for (position, &token) in sequence.tokens.iter().enumerate() {
                let page = table[position / size] as usize;
                for head in 0..HEADS {
                    let (key, value) = stored(token, head, position, is_ranged(self.storage));
                    assert_eq!(read(&view.keys, page, head, position % size), key, "key at {position}");
                    assert_eq!(read(&view.values, page, head, position % size), value, "value at {position}");
                }
            }
        }
        let used: BTreeSet<u32> = names.values().copied().collect();
        assert_eq!(used.len(), names.len(), "two names for one page");
        assert_eq!(self.cache.free_pages(), self.cache.pages() - used.len());
        assert_eq!(self.cache.free_pages(), self.free());
        for page in 0..self.cache.pages() as u32 {
            assert_eq!(self.cache.sharers(page) == 0, !used.contains(&page));
        }
        for &given in &self.freed {
            let stale = CacheError::Stale { given };
            assert_eq!(self.cache.len(given), Err(stale.clone()));
            assert_eq!(self.cache.view(&[given]).err(), Some(stale.clone()));
            assert_eq!(self.cache.fork(given), Err(stale.clone()));
            assert_eq!(self.cache.truncate(given, 0), Err(stale.clone()));
            assert_eq!(self.cache.free(given), Err(stale));
            self.seen.stale += 1;
        }
    }
}

#[test]
fn paged_caches_do_what_their_model_does() {
    let total = std::cell::Cell::new(Seen::default());
    let mut runner = TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    let pools = prop_oneof![Just((7, 4)), (0usize..12, 1usize..6)];
    let problems = (storages(), pools, steps());
    let outcome = runner.run(&problems, |(storage, (pages, size), steps)| {
        let config = PagedCacheConfig::new(pages, size, HEADS, KEY_DIM, VALUE_DIM).with_storage(storage);
        let cache = PagedCache::new(config).unwrap();
        let (live, freed, seen) = (Vec::new(), Vec::new(), Seen::default());
        let mut model = Model { storage, cache, live, freed, tokens: 0, named: 0, seen };
        for step in &steps {
            model.step(step);
            model.check();
        }
        while let Some(sequence) = model.live.pop() {
            model.cache.free(sequence.id).unwrap();
            model.check();
        }
        assert_eq!(model.cache.free_pages(), pages, "pages leak");
        let (a, b) = (total.get(), model.seen);
        total.set(Seen {
            steps: a.steps + b.steps,
            exhausted: a.exhausted + b.exhausted,
            copied: a.copied + b.copied,
            broken: a.broken + b.broken,
            stale: a.stale + b.stale,
        });
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let seen = total.get();
    println!("{seen:?}");
    assert!(seen.steps > 5000 && seen.exhausted > 200 && seen.copied > 200, "{seen:?}");
    assert!(seen.broken > 50 && seen.stale > 1000, "{seen:?}");
}

#[derive(Clone, Debug)]
enum Change {
    Append(usize),
    AppendTo(usize, usize),
    /// An append to all of which the last value is not finite.
    Broken(usize),
    Truncate(usize, usize),
    Clear(usize),
    Reset,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        6 => (0usize..7).prop_map(Change::Append),
        8 => (0usize..4, 0usize..7).prop_map(|(b, n)| Change::AppendTo(b, n)),
        1 => (1usize..4).prop_map(Change::Broken),
        2 => (0usize..3, 0usize..100).prop_map(|(b, n)| Change::Truncate(b, n)),
        1 => (0usize..3).prop_map(Change::Clear),
        1 => Just(Change::Reset),
    ];
    prop::collection::vec(change, 1..60)
}

/// One batch: every token since it was cleared, and how many are dropped.
#[derive(Clone, Debug, Default)]
struct Batch {
    tokens: Vec<Token>,
    dropped: usize,
}

const BATCHES: usize = 3;

struct Rolling {
    storage: Storage,
    cache: KvCache,
    window: Option<usize>,
    batches: Vec<Batch>,
    tokens: Token,
    seen: [usize; 4],
}

impl Rolling {
    fn append(&mut self, which: std::ops::Range<usize>, one: bool, new: usize, broken: bool) {
        let tokens: Vec<Vec<Token>> =
            which.clone().map(|b| (0..new).map(|i| self.tokens + (b * new + i) as Token).collect()).collect();
        self.tokens += (BATCHES * new) as Token;
        let (k, mut v) = tensors(&tokens, is_ranged(self.storage));
        if broken {
            *v.data_mut().last_mut().unwrap() = f32::INFINITY;
        }
        let result = if one {
            self.cache.append_to_with(which.start, k.view(), v.view(), prepare)
        } else {
            self.cache.append_with(k.view(), v.view(), prepare)
        };
        let capacity = self.cache.capacity();
        let held = |batch: &Batch| batch.tokens.len() - batch.dropped;
        let full = self.batches[which.clone()].iter().position(|b| held(b) + new > capacity);
        match (self.window, full) {
            (None, Some(at)) => {
                let (batch, length) = (which.start + at, held(&self.batches[which.start + at]));
                assert_eq!(result, Err(CacheError::Full { batch, length, given: new, capacity }));
                self.seen[0] += 1;
            }
            (Some(window), _) if new > capacity - window => {
                assert_eq!(result, Err(CacheError::TooMany { given: new, limit: capacity - window }));
                self.seen[1] += 1;
            }
            _ if broken && is_int8(self.storage) => {
                assert!(matches!(result, Err(CacheError::NotFinite { .. })), "{result:?}");
                self.seen[2] += 1;
            }
            _ => {
                assert_eq!(result, Ok(()));
                for (batch, tokens) in self.batches[which.clone()].iter_mut().zip(tokens) {
                    if held(batch) + new > capacity {
                        batch.dropped = batch.tokens.len() - self.window.unwrap();
                        self.seen[3] += 1;
                    }
                    batch.tokens.extend(tokens);
                }
                if broken {
                    for b in which {
                        let batch = &mut self.batches[b];
                        let keep = (batch.tokens.len() - new).max(batch.dropped);
                        batch.tokens.truncate(keep);
                        self.cache.truncate(b, keep - batch.dropped).unwrap();
                    }
                }
            }
        }
    }

    fn change(&mut self, change: &Change) {
        match *change {
            Change::Append(new) => self.append(0..BATCHES, false, new, false),
            Change::Broken(new) => self.append(0..BATCHES, false, new, true),
            Change::AppendTo(batch, new) if batch < BATCHES => {
                self.append(batch..batch + 1, true, new, false)
            }
            Change::AppendTo(given, _) => {
                let (k, v) = tensors(&[vec![1, 2]], false);
                let result = self.cache.append_to(given, k.view(), v.view());
                assert_eq!(result, Err(CacheError::Batch { given, batches: BATCHES }));
            }
            Change::Truncate(b, to) => {
                let batch = &mut self.batches[b];
                let length = batch.tokens.len() - batch.dropped;
                let beyond = self.cache.truncate(b, length + 1);
                assert_eq!(beyond, Err(CacheError::Beyond { given: length + 1, length }));
                let to = to % (length + 1);
                self.cache.truncate(b, to).unwrap();
                batch.tokens.truncate(batch.dropped + to);
            }
            Change::Clear(batch) => {
                self.cache.clear(batch).unwrap();
                self.batches[batch] = Batch::default();
            }
            Change::Reset => {
                self.cache.reset();
                self.batches.fill(Batch::default());
            }
        }
    }

    fn check(&self) {
        let longest = *self.cache.lengths().iter().max().unwrap();
        let (keys, values) = (self.cache.keys(), self.cache.values());
        assert_eq!(keys.shape(), [BATCHES, HEADS, longest, KEY_DIM]);
        assert_eq!(values.shape(), [BATCHES, HEADS, longest, VALUE_DIM]);
        for (b, batch) in self.batches.iter().enumerate() {
            assert_eq!(self.cache.dropped(b), Ok(batch.dropped));
            assert_eq!(self.cache.lengths()[b], batch.tokens.len() - batch.dropped);
            for (position, &token) in batch.tokens.iter().enumerate().skip(batch.dropped) {
                for head in 0..HEADS {
                    let (key, value) = stored(token, head, position, is_ranged(self.storage));
                    assert_eq!(read(&keys, b, head, position - batch.dropped), key);
                    assert_eq!(read(&values, b, head, position - batch.dropped), value);
                }
            }
        }
    }
}

#[test]
fn contiguous_caches_do_what_their_model_does() {
    let total = std::cell::Cell::new([0; 4]);
    let mut runner = TestRunner::new(Config { cases: 1500, failure_persistence: None, ..Config::default() });
    let windows = prop_oneof![Just(None), (1usize..5).prop_map(Some)];
    let problems = (storages(), windows, 0usize..6, changes());
    let outcome = runner.run(&problems, |(storage, window, more, changes)| {
        let capacity = window.unwrap_or(2) * 2 + more;
        let config = KvCacheConfig::new(BATCHES, HEADS, capacity, KEY_DIM, VALUE_DIM);
        let cache = KvCache::new(config.with_storage(storage).with_window(window)).unwrap();
        let batches = vec![Batch::default(); BATCHES];
        let mut model = Rolling { storage, cache, window, batches, tokens: 0, seen: [0; 4] };
        for change in &changes {
            model.change(change);
            model.check();
        }
        let seen = total.get();
        total.set(std::array::from_fn(|i| seen[i] + model.seen[i]));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let [full, too_many, broken, rolled] = total.get();
    println!("full {full}, too many {too_many}, broken {broken}, rolled {rolled}");
    assert!(full > 200 && too_many > 200 && broken > 20 && rolled > 200);
}

/// The rows that the models use are exact in every type; otherwise the models would ask too much.
#[test]
fn the_models_rows_are_exact() {
    for token in 0..127 * 127 {
        for x in row(token, 1, VALUE_DIM, false) {
            assert_eq!((f16::from_f32(x).to_f32(), bf16::from_f32(x).to_f32()), (x, x));
        }
    }
}
