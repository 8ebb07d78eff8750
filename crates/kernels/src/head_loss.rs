//! The output head and its loss in one op: logits piece by piece, never all of them, and the gradient towards the head's input.
//!
//! With a quantised or bf16 head, shares below 2^-15 are not multiplied with their own rows of the head but, all of a row of x
//! together, with the mean of the head's rows; how near that is, tests/rounded_gradients.rs holds. With a head in f32 or f16 every
//! share counts as it is. Source of leaving small shares out: Wijmans et al. 2024 (Cut Cross-Entropy).

use std::{ops::Range, sync::PoisonError};

use qwenkit_tensor::DType;

#[cfg(target_arch = "x86_64")]
use crate::amx::both_ways::TilePieces;
use crate::{
    Isa,
    lanes::{self, for_each_isa},
    layout::{GROUP_ROWS, UNIT},
    matmul::{Compute, MatmulScratch, Product, Rows, Task},
    matmul_back::{BackProduct, BackRoom},
    product::{Join, Right},
    shared_out::SharedOut,
    turned::Columns,
    weight::{Operand, Weight},
};

/// Groups of the head whose logits are held at once: with 512 rows 256 KiB, a quarter of a second-level cache.
const PIECE_GROUPS: usize = 8;
/// Logits of a row in a piece.
const PIECE: usize = PIECE_GROUPS * GROUP_ROWS;
/// Rows that go through the head together; it is read twice for each such lot.
const LOT_ROWS: usize = 512;
/// Of a head in f32 or f16, the logits that may be held at once.
const FULL_LOGITS: usize = 8 << 20;
/// 15 ln 2: how far below the logarithm of the whole sum a logit's share is small.
const DEPTH: f32 = 10.397_208;
/// What a sum so far may be off by when it decides that a logit need not be kept.
const SLACK: f32 = 1e-3;
/// Logits that a thread keeps before it looks for some that need not be kept any more.
const KEPT_MIN: usize = 1 << 16;

/// A head with its loss.
pub struct HeadLoss<'a> {
    /// (V, D)
    pub head: &'a Weight,
    /// What each row should have said, (T).
    pub targets: &'a [u32],
    /// What the gradient is multiplied with.
    pub scale: f32,
}

/// Logits of a row that there is room for as ones whose shares count; a model's text has some hundreds. Rows that have more go
/// through the head in smaller lots.
const USUAL_TERMS: usize = 4096;
/// Buffers whose size depends on neither rows nor vocabulary, of a thread.
const FIXED_BYTES: usize = 128 << 10;

impl HeadLoss<'_> {
    /// Bytes that losses and gradients of so many rows take, beside the rows' own and what a product's scratch holds; no fewer
    /// than they will be, whatever the logits are.
    pub fn bytes(head: &Weight, rows: usize, threads: usize) -> usize {
        let (vocab, lot) = (head.rows(), rows.min(LOT_ROWS));
        match head.dtype() {
            DType::F32 | DType::F16 => 4 * vocab * rows.min((FULL_LOGITS / vocab).max(1)) + threads * FIXED_BYTES,
            _ => {
                let pieces = vocab.div_ceil(PIECE);
                let of_piece = lot * (4 * PIECE + 4 * UNIT + size_of::<Bound>()) + 4 * UNIT * PIECE;
                let each = of_piece + terms_max(vocab, lot, threads) * size_of::<Term>() + 8 * pieces + FIXED_BYTES;
                // Sums of pieces and of rows; for the gradient of each row its target, its place and its small shares.
                pieces * lot * size_of::<PieceSum>() + threads * each + 64 * lot
            }
        }
    }
}

/// Computes a piece: the thread, the groups, and where results go.
type PieceProduct<'a> = dyn Fn(usize, Range<usize>, &SharedOut<'_, f32>) + Sync + 'a;

/// How many terms a thread keeps behind a piece.
fn terms_limit(vocab: usize, rows: usize, threads: usize) -> usize {
    KEPT_MIN.max((rows * vocab.min(USUAL_TERMS)).div_ceil(threads))
}

/// How many a thread may have: those that it keeps, and one more piece's.
fn terms_max(vocab: usize, rows: usize, threads: usize) -> usize {
    // No more than there are logits in its pieces.
    let all = rows * PIECE * vocab.div_ceil(PIECE).div_ceil(threads);
    all.min(terms_limit(vocab, rows, threads) + rows * PIECE)
}

impl Compute {
    /// For each row of `x`: (T, D) the loss `-log softmax(head x)[target]` into `losses`: (T), and into `dx`, if it is wanted, the
    /// gradient of `scale` times the loss towards the row.
    ///
    /// # Panics
    /// If the shapes do not fit or a target is not below V.
    pub fn head_loss(
        &self,
        scratch: &mut MatmulScratch,
        loss: &HeadLoss<'_>,
        x: &[f32],
        losses: &mut [f32],
        mut dx: Option<&mut [f32]>,
    ) {
        let (width, rows) = (loss.head.cols(), loss.targets.len());
        assert!(
            x.len() == rows * width && losses.len() == rows && dx.as_ref().is_none_or(|dx| dx.len() == x.len()),
            "head_loss of {rows} rows of {width}"
        );
        assert!(loss.targets.iter().all(|&t| (t as usize) < loss.head.rows()), "a target beyond the vocabulary");
        let in_full = matches!(loss.head.dtype(), DType::F32 | DType::F16);
        let lot = if in_full { (FULL_LOGITS / loss.head.rows()).max(1) } else { LOT_ROWS };
        let mut first = 0;
        let mut most = lot;
        while first < rows {
            let lot = first..(first + most).min(rows);
            let own = lot.start * width..lot.end * width;
            let part = HeadLoss { targets: &loss.targets[lot.clone()], ..*loss };
            let (losses, dx) = (&mut losses[lot.clone()], dx.as_mut().map(|dx| &mut dx[own.clone()]));
            if in_full {
                self.head_loss_in_full(scratch, &part, &x[own], losses, dx);
            } else if !self.head_loss_cut(scratch, &part, &x[own], losses, dx) {
                // A row's results do not depend on the rows beside it.
                most = lot.len() / 2;
                continue;
            }
            first = lot.end;
        }
    }

    fn head_loss_in_full(
        &self,
        scratch: &mut MatmulScratch,
        loss: &HeadLoss<'_>,
        x: &[f32],
        losses: &mut [f32],
        dx: Option<&mut [f32]>,
    ) {
        let mut logits = vec![0.0; losses.len() * loss.head.rows()];
        self.matmul(scratch, x, &mut [Product { weight: loss.head, out: &mut logits }]);
        self.cross_entropy(&mut logits, loss.targets, loss.scale, losses);
        if let Some(dx) = dx {
            self.matmul_backward(&[BackProduct { weight: loss.head, dy: &logits }], Join::OVER, dx);
        }
    }

    /// Whether it was done: not where so many shares of several rows count that there is no room for them.
    fn head_loss_cut(
        &self,
        scratch: &mut MatmulScratch,
        loss: &HeadLoss<'_>,
        x: &[f32],
        losses: &mut [f32],
        dx: Option<&mut [f32]>,
    ) -> bool {
        let (head, rows) = (loss.head, losses.len());
        let (pieces, threads) = (head.groups().div_ceil(PIECE_GROUPS), self.pool.threads());
        let mut sums = vec![PieceSum::default(); pieces * rows];
        let mut at_target = vec![0.0; rows];
        let limits = match dx {
            Some(_) => (terms_limit(head.rows(), rows, threads), terms_max(head.rows(), rows, threads)),
            None => (0, 0),
        };
        let mut kept: Vec<Kept> = (0..threads).map(|_| Kept::new(rows, pieces.div_ceil(threads), limits)).collect();
        {
            let mut room = self.back.lock().unwrap_or_else(PoisonError::into_inner);
            let logits_of = self.pieces_of(&mut room, scratch, head, x);
            let (sums, at_target) = (SharedOut::new(&mut sums), SharedOut::new(&mut at_target));
            let kept = SharedOut::new(&mut kept);
            self.pool.run(|i| {
                // SAFETY: each thread has one of its own.
                let kept = unsafe { &mut kept.slice(i, 1)[0] };
                let mut logits = vec![0.0; rows * PIECE];
                // In turn, so that every thread sees common tokens early, and with them how large a sum is about to be.
                for piece in (i..pieces).step_by(threads) {
                    let ids = ids_of(head, piece);
                    let groups = ids.start / GROUP_ROWS..ids.end.div_ceil(GROUP_ROWS);
                    logits_of(i, groups, &SharedOut::new(&mut logits));
                    // SAFETY: each piece is handed out once.
                    let sums = unsafe { sums.slice(piece * rows, rows) };
                    for (row, (logits, sum)) in logits.chunks_exact(PIECE).zip(sums).enumerate() {
                        let logits = &logits[..ids.len()];
                        *sum = PieceSum::of(self.isa, logits);
                        let target = loss.targets[row] as usize;
                        if ids.contains(&target) {
                            // SAFETY: each row's target is in one piece.
                            unsafe { at_target.slice(row, 1)[0] = logits[target - ids.start] };
                        }
                        if dx.is_some() {
                            kept.take(row, *sum, logits);
                        }
                    }
                    kept.end_piece();
                }
            });
        }
        if kept.iter().any(|kept| kept.is_full) {
            return false;
        }
        let wholes: Vec<f64> = (0..rows).map(|row| whole(sums[row..].iter().step_by(rows))).collect();
        for ((loss, whole), at_target) in losses.iter_mut().zip(&wholes).zip(at_target) {
            *loss = (whole - f64::from(at_target)) as f32;
        }
        if let Some(dx) = dx {
            self.head_gradient(loss, &wholes, &mut kept, dx);
        }
        true
    }

    /// What computes logits of all rows of x for some groups of the head, on the thread that is named, as rows of `PIECE`.
    fn pieces_of<'a>(
        &'a self,
        room: &'a mut BackRoom,
        scratch: &'a mut MatmulScratch,
        head: &'a Weight,
        x: &'a [f32],
    ) -> Box<PieceProduct<'a>> {
        #[cfg(target_arch = "x86_64")]
        if self.isa == Isa::Amx && head.operand() == Operand::Quantized {
            // SAFETY: `Compute::new` has checked that the machine has this instruction set.
            let tiles = unsafe { TilePieces::new(&self.pool, &mut room.tiles, head, x) };
            // SAFETY: as above; the caller names its own thread.
            return Box::new(move |i, groups, out| unsafe { tiles.piece(i, groups, out, PIECE) });
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = room;
        scratch.activations.prepare(self.isa, &self.pool, x, head.cols(), &[head.operand()]);
        let x = Rows::of(&scratch.activations, x);
        Box::new(move |_, groups, out| {
            let out_group = groups.start;
            self.kernel(&Task { weight: head, groups, joined: None, x, out, out_step: PIECE, out_group });
        })
    }

    /// dx: (T, D) = `scale` times the head's rows by their shares, less the target's row.
    fn head_gradient(&self, loss: &HeadLoss<'_>, wholes: &[f64], kept: &mut [Kept], dx: &mut [f32]) {
        let (head, rows, width, threads) = (loss.head, wholes.len(), loss.head.cols(), kept.len());
        {
            let kept = SharedOut::new(kept);
            // SAFETY: each thread has one of its own.
            self.pool.run(|i| unsafe { kept.slice(i, 1)[0].weigh(wholes) });
        }
        let kept = &*kept;
        let pieces = head.groups().div_ceil(PIECE_GROUPS);
        // A piece's terms are one thread's.
        let terms_of = |piece: usize| kept[piece % threads].piece(piece / threads);
        // A row whose sum is no number keeps no terms, and its whole gradient is none.
        let mut small: Vec<f64> = wholes.iter().map(|whole| if whole.is_finite() { 1.0 } else { f64::NAN }).collect();
        for term in (0..pieces).flat_map(terms_of) {
            small[term.row as usize] -= f64::from(term.value);
        }
        let mut targets: Vec<(usize, usize)> = loss.targets.iter().map(|t| *t as usize).zip(0..).collect();
        targets.sort_unstable();
        let out = SharedOut::new(dx);
        self.pool.run_split(width.div_ceil(UNIT), 1, |units| {
            let mut columns = Columns::default();
            // (ids of a piece, 32), (T, 32)
            let mut table = vec![[0.0f32; UNIT]; PIECE];
            let mut sums = vec![[0.0f32; UNIT]; rows];
            for unit in units {
                let mut mean = [0.0f32; UNIT];
                sums.fill([0.0; UNIT]);
                let mut next = 0;
                for piece in 0..pieces {
                    let ids = ids_of(head, piece);
                    let table = &mut table[..ids.len()];
                    head_columns(self.isa, head, ids.clone(), unit, &mut columns, table);
                    add_rows(self.isa, table, &mut mean);
                    add_terms(self.isa, table, terms_of(piece), &mut sums);
                    while let Some((_, row)) = targets.get(next).filter(|(id, _)| *id < ids.end) {
                        let target = Term { row: *row as u32, id: (targets[next].0 - ids.start) as u32, value: -1.0 };
                        add_terms(self.isa, table, &[target], &mut sums);
                        next += 1;
                    }
                }
                let first = unit * UNIT;
                let count = UNIT.min(width - first);
                for (row, (sum, small)) in sums.iter().zip(&small).enumerate() {
                    // SAFETY: columns are one thread's.
                    let out = unsafe { out.slice(row * width + first, count) };
                    let of_mean = *small as f32 / head.rows() as f32;
                    for ((out, sum), mean) in out.iter_mut().zip(sum).zip(&mean) {
                        *out = loss.scale * (sum + of_mean * mean);
                    }
                }
            }
        });
    }
}

/// Columns `32 unit..` of the head's rows `ids`, which begin with a group.
fn head_columns(
    isa: Isa,
    head: &Weight,
    ids: Range<usize>,
    unit: usize,
    columns: &mut Columns,
    table: &mut [[f32; UNIT]],
) {
    match head.operand() {
        Operand::Quantized => {
            for (i, table) in table.chunks_mut(GROUP_ROWS).enumerate() {
                columns.rows(isa, head, ids.start / GROUP_ROWS + i, unit, table);
            }
        }
        _ => head.copy(ids, unit * UNIT, table.as_flattened_mut()),
    }
}

/// The head's rows of a piece.
fn ids_of(head: &Weight, piece: usize) -> Range<usize> {
    piece * PIECE..((piece + 1) * PIECE).min(head.rows())
}

/// The sum of e^logit over a piece of a row: e^largest times `total`.
#[derive(Clone, Copy, Default)]
struct PieceSum {
    largest: f32,
    total: f32,
}

impl PieceSum {
    fn of(isa: Isa, logits: &[f32]) -> PieceSum {
        let (largest, total) = piece_sum(isa, logits);
        PieceSum { largest, total }
    }
}

/// The logarithm of the whole sum of a row's pieces, in their order.
fn whole<'a>(pieces: impl Iterator<Item = &'a PieceSum> + Clone) -> f64 {
    let largest = pieces.clone().fold(f32::NEG_INFINITY, |m, piece| m.max(piece.largest));
    let total: f64 = pieces.map(|p| f64::from(p.total * lanes::exp(p.largest - largest))).sum();
    f64::from(largest) + total.ln()
}

/// A logit whose share may count, and later that share.
#[derive(Clone, Copy)]
pub(crate) struct Term {
    row: u32,
    /// In its piece
    id: u32,
    value: f32,
}

/// What one thread keeps.
struct Kept {
    terms: Vec<Term>,
    /// Where each of its pieces ends in `terms`.
    ends: Vec<usize>,
    bounds: Vec<Bound>,
    /// How many terms there may be before they are looked through.
    room: usize,
    /// How many there may be afterwards.
    limit: usize,
    /// Whether there were more, of several rows; it keeps none then.
    is_full: bool,
}

/// What one thread knows of a row's sum: a logit below `least` has a small share, whatever comes.
#[derive(Clone, Copy)]
struct Bound {
    least: f32,
    largest: f32,
    sum: f64,
}

impl Kept {
    fn new(rows: usize, pieces: usize, (limit, terms_max): (usize, usize)) -> Kept {
        let bound = Bound { least: f32::NEG_INFINITY, largest: f32::NEG_INFINITY, sum: 0.0 };
        let (terms, ends) = (Vec::with_capacity(terms_max), Vec::with_capacity(pieces));
        Kept { terms, ends, bounds: vec![bound; rows], room: KEPT_MIN.min(limit), limit, is_full: false }
    }

    /// Keeps what may count of a row's piece.
    fn take(&mut self, row: usize, sum: PieceSum, logits: &[f32]) {
        if self.is_full {
            return;
        }
        let bound = &mut self.bounds[row];
        if sum.largest < bound.least {
            return;
        }
        bound.add(sum);
        let least = bound.least;
        for (i, some) in logits.chunks(lanes::LANES).enumerate() {
            if some.iter().fold(f32::NEG_INFINITY, |m, x| f32::max(m, *x)) < least {
                continue;
            }
            for (id, logit) in (i * lanes::LANES..).zip(some).filter(|(_, logit)| **logit >= least) {
                self.terms.push(Term { row: row as u32, id: id as u32, value: *logit });
            }
        }
    }

    fn end_piece(&mut self) {
        self.ends.push(self.terms.len());
        if self.terms.len() > self.room {
            self.keep(|term, bounds| (term.value >= bounds[term.row as usize].least).then_some(term.value));
            // Of one row no more can count than there is room for.
            self.is_full = self.terms.len() > self.limit && self.bounds.len() > 1;
            if self.is_full {
                self.terms.clear();
                self.ends.clear();
            }
            self.room = KEPT_MIN.max(2 * self.terms.len()).min(self.limit);
        }
    }

    /// Logits become shares; small ones go.
    fn weigh(&mut self, wholes: &[f64]) {
        let least = (-f64::from(DEPTH)).exp() as f32;
        self.keep(|term, _| {
            let share = (f64::from(term.value) - wholes[term.row as usize]).exp() as f32;
            (share >= least).then_some(share)
        });
    }

    /// Keeps the terms that `f` gives a value.
    fn keep(&mut self, f: impl Fn(&Term, &[Bound]) -> Option<f32>) {
        let (mut from, mut to) = (0, 0);
        for end in &mut self.ends {
            for i in from..*end {
                let term = self.terms[i];
                if let Some(value) = f(&term, &self.bounds) {
                    self.terms[to] = Term { value, ..term };
                    to += 1;
                }
            }
            (from, *end) = (*end, to);
        }
        self.terms.truncate(to);
    }

    /// Terms of its piece `i`.
    fn piece(&self, i: usize) -> &[Term] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.terms[start..self.ends[i]]
    }
}

impl Bound {
    /// The bound with one more piece.
    fn add(&mut self, piece: PieceSum) {
        let largest = self.largest.max(piece.largest);
        let shrunk = |from: f32| f64::from(lanes::exp(from - largest));
        self.sum = if self.sum > 0.0 { self.sum * shrunk(self.largest) } else { 0.0 };
        self.sum += f64::from(piece.total) * shrunk(piece.largest);
        self.largest = largest;
        self.least = largest + self.sum.ln() as f32 - DEPTH - SLACK;
    }
}

for_each_isa! {
    /// Adds the table's rows by their shares to the rows' sums.
    pub(crate) fn add_terms(table: &[[f32; UNIT]], terms: &[Term], sums: &mut [[f32; UNIT]]) {
        for term in terms {
            let (values, sum) = (&table[term.id as usize], &mut sums[term.row as usize]);
            sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += term.value * x);
        }
    }
}

for_each_isa! {
    pub(crate) fn add_rows(table: &[[f32; UNIT]], sum: &mut [f32; UNIT]) {
        for values in table {
            sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
        }
    }
}

for_each_isa! {
    /// The largest of some logits, and the sum of e^(logit - largest).
    pub(crate) fn piece_sum(logits: &[f32]) -> (f32, f32) {
        let mut largest = [f32::NEG_INFINITY; lanes::LANES];
        let (whole, rest) = logits.as_chunks::<{ lanes::LANES }>();
        for x in whole {
            largest.iter_mut().zip(x).for_each(|(m, &x)| *m = f32::max(*m, x));
        }
        let largest = rest.iter().copied().fold(lanes::max(largest), f32::max);
        (largest, lanes::sum_by(logits, |x| lanes::exp(x - largest)))
    }
}
