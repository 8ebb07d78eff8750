//! Short causal convolution, each channel for itself, with the last columns of a sequence kept between batches.
//!
//! A token's result is a function of its own input and the few before it, added oldest first: any cut of the prompt
//! gives the same bits. Some more columns are kept than the next token needs, so that a sequence can go on from a little
//! earlier than it has come.

use std::ops::Range;

use qwenkit_tensor::{AllocError, HugeBuf};

use crate::{
    delta::TAKEN_BACK,
    elementwise::silu_row,
    lanes::{LANES, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

/// The widest convolution; Qwen's are 4 wide.
pub const CONV_WIDTH_MAX: usize = 16;
/// Channels of which a thread takes all its tokens at once: their weights, and inputs that several tokens see, stay in the
/// first-level cache.
const BLOCK: usize = 512;

/// The new tokens of one sequence, for layers that keep a state of fixed size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecurrentSeq {
    /// Rows of the batch that are this sequence's.
    pub rows: Range<usize>,
    /// Position of the first of them. At 0 the state is empty, whatever the slot held before.
    pub first: usize,
    /// Where the state is kept; no two sequences of a batch have the same.
    pub slot: usize,
}

/// The shape of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Tokens that it sees, 1 to `CONV_WIDTH_MAX`.
    pub width: usize,
    /// From each of these to the next; 1 where they are neighbours.
    pub step: usize,
    /// C
    pub channels: usize,
}

/// The columns before the next token, of every slot of one layer.
pub struct ConvState {
    shape: ConvShape,
    slots: usize,
    /// (slots, columns held, C): that of position p is number p modulo the columns held
    data: HugeBuf,
}

impl ConvShape {
    /// Columns before a token that its result depends on.
    fn before(&self) -> usize {
        self.width.saturating_sub(1).saturating_mul(self.step)
    }

    /// Columns held of a sequence.
    fn held(&self) -> usize {
        self.before().saturating_add(TAKEN_BACK)
    }
}

impl ConvState {
    /// Room for `slots` sequences.
    ///
    /// # Errors
    /// When the system refuses the address range.
    ///
    /// # Panics
    /// If the width is 0 or above `CONV_WIDTH_MAX`, or the step is 0.
    pub fn new(shape: ConvShape, slots: usize) -> Result<ConvState, AllocError> {
        assert!((1..=CONV_WIDTH_MAX).contains(&shape.width) && shape.step > 0, "convolution {shape:?}");
        let too_large = AllocError { wanted_bytes: usize::MAX };
        let bytes = ConvState::slot_bytes(shape).checked_mul(slots).ok_or(too_large)?;
        Ok(ConvState { shape, slots, data: HugeBuf::zeroed(bytes)? })
    }

    /// Bytes of one slot.
    pub fn slot_bytes(shape: ConvShape) -> usize {
        shape.held().saturating_mul(shape.channels).saturating_mul(4)
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Copies what a slot remembers over another's.
    pub fn copy_slot(&mut self, from: usize, to: usize) {
        let len = self.shape.held() * self.shape.channels;
        self.data.as_mut_slice::<f32>().copy_within(from * len..(from + 1) * len, to * len);
    }

    /// The bytes of what a slot holds, to be kept elsewhere.
    pub fn slot_as_bytes(&self, slot: usize) -> &[u8] {
        let len = ConvState::slot_bytes(self.shape);
        &self.data.as_slice::<u8>()[slot * len..][..len]
    }

    /// The same, to be put back.
    pub fn slot_as_bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        let len = ConvState::slot_bytes(self.shape);
        &mut self.data.as_mut_slice::<u8>()[slot * len..][..len]
    }

    fn slot(&self, slot: usize) -> &[f32] {
        let len = self.shape.held() * self.shape.channels;
        &self.data.as_slice::<f32>()[slot * len..][..len]
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [f32] {
        let len = self.shape.held() * self.shape.channels;
        &mut self.data.as_mut_slice::<f32>()[slot * len..][..len]
    }

    /// Columns before a token that its result depends on, itself among them: `width`, oldest first, those of row `row` of x: (T, C),
    /// which is `seq`'s.
    #[inline(always)]
    pub(crate) fn inputs<'a>(&'a self, seq: &RecurrentSeq, x: &'a [f32], row: usize) -> [&'a [f32]; CONV_WIDTH_MAX] {
        let ConvShape { width, step, channels } = self.shape;
        let (needed, held, before) = (self.shape.before(), self.shape.held(), self.slot(seq.slot));
        let mut inputs: [&[f32]; CONV_WIDTH_MAX] = [&[]; CONV_WIDTH_MAX];
        for (j, input) in inputs[..width].iter_mut().enumerate() {
            // Counted from the oldest column that the sequence's first row needs.
            let column = row - seq.rows.start + j * step;
            *input = match column.checked_sub(needed) {
                Some(new) => &x[(seq.rows.start + new) * channels..][..channels],
                // Columns before position 0 are the last that are written, and 0 until nobody needs them.
                None => &before[(seq.first + column + held - needed) % held * channels..][..channels],
            };
        }
        inputs
    }

    /// Forgets what the slots of sequences that begin have held.
    pub(crate) fn begin(&mut self, seqs: &[RecurrentSeq]) {
        for seq in seqs.iter().filter(|seq| seq.first == 0) {
            self.slot_mut(seq.slot).fill(0.0);
        }
    }

    /// The shape.
    pub(crate) fn shape(&self) -> ConvShape {
        self.shape
    }

    /// Keeps the last columns of x: (T, C) of `seq`.
    pub(crate) fn keep(&mut self, seq: &RecurrentSeq, x: &[f32]) {
        let (held, channels) = (self.shape.held(), self.shape.channels);
        let new = seq.rows.len().min(held);
        let end = seq.first + seq.rows.len();
        let slot = self.slot_mut(seq.slot);
        let columns = x[(seq.rows.end - new) * channels..seq.rows.end * channels].chunks_exact(channels);
        for (position, column) in (end - new..end).zip(columns) {
            slot[position % held * channels..][..channels].copy_from_slice(column);
        }
    }
}

impl Compute {
    /// `out = silu(sum over j of weight[j] * x[t - (width - 1 - j) step])`; x, out: (T, C), weight: (width, C).
    ///
    /// # Panics
    /// If shapes do not fit, the sequences do not cover the rows in order, or a slot does not exist.
    pub fn causal_conv_silu(
        &self,
        state: &mut ConvState,
        seqs: &[RecurrentSeq],
        weight: &[f32],
        x: &[f32],
        out: &mut [f32],
    ) {
        let ConvShape { width, channels, .. } = state.shape;
        check_seqs(seqs, state.slots, x.len() / channels);
        assert!(x.len() == out.len() && weight.len() == width * channels, "convolution of {channels} channels");
        state.begin(seqs);
        let kept = &*state;
        let to = SharedOut::new(out);
        self.split_rows(x.len() / channels, |rows| {
            for first in (0..channels).step_by(BLOCK) {
                let own = first..channels.min(first + BLOCK);
                let mut weights: [&[f32]; CONV_WIDTH_MAX] = [&[]; CONV_WIDTH_MAX];
                for (own_weight, weight) in weights.iter_mut().zip(weight.chunks_exact(channels)) {
                    *own_weight = &weight[own.clone()];
                }
                for row in rows.clone() {
                    let seq = &seqs[seqs.partition_point(|seq| seq.rows.end <= row)];
                    let mut inputs = kept.inputs(seq, x, row);
                    inputs[..width].iter_mut().for_each(|input| *input = &input[own.clone()]);
                    // SAFETY: each row is in one range, and its channels are taken once.
                    let out = unsafe { to.slice(row * channels + first, own.len()) };
                    conv_row(self.isa, &inputs[..width], &weights[..width], out);
                    silu_row(self.isa, out);
                }
            }
        });
        for seq in seqs {
            state.keep(seq, x);
        }
    }
}

/// # Panics
/// If the sequences do not cover `rows` rows in order, or share or lack a slot.
pub(crate) fn check_seqs(seqs: &[RecurrentSeq], slots: usize, rows: usize) {
    let mut end = 0;
    for seq in seqs {
        assert!(seq.rows.start == end && seq.rows.end >= end, "rows {:?} after row {end}", seq.rows);
        assert!(seq.slot < slots, "state slot {} of {slots}", seq.slot);
        end = seq.rows.end;
    }
    assert_eq!(end, rows, "the sequences' rows cover the batch");
    let mut taken: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
    taken.sort_unstable();
    assert!(taken.is_sorted_by(|a, b| a < b), "two sequences of a batch share a state slot: {taken:?}");
}

/// Adds a row times its weights.
#[inline(always)]
pub(crate) fn add_product(x: &[f32], weight: &[f32], out: &mut [f32]) {
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out += x * w;
    }
}

for_each_isa! {
    /// The sum of each channel's inputs, oldest first, in registers.
    pub(crate) fn conv_row(inputs: &[&[f32]], weights: &[&[f32]], out: &mut [f32]) {
        let whole = out.len() / LANES * LANES;
        let (blocks, rest) = out.as_chunks_mut::<LANES>();
        for (block, out) in blocks.iter_mut().enumerate() {
            let mut sum = [0.0; LANES];
            for (x, weight) in inputs.iter().zip(weights) {
                add_product(&x[block * LANES..][..LANES], &weight[block * LANES..][..LANES], &mut sum);
            }
            *out = sum;
        }
        rest.fill(0.0);
        for (x, weight) in inputs.iter().zip(weights) {
            add_product(&x[whole..], &weight[whole..], rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    const CHANNELS: usize = 517;
    const WIDTH: usize = 4;

    fn shape(step: usize) -> ConvShape {
        ConvShape { width: WIDTH, step, channels: CHANNELS }
    }

    fn input(tokens: usize) -> Vec<f32> {
        (0..tokens * CHANNELS).map(|i| (i as f32 * 0.7).sin()).collect()
    }

    fn weight() -> Vec<f32> {
        (0..WIDTH * CHANNELS).map(|i| (i as f32 * 1.3).cos()).collect()
    }

    /// Feeds `x` in pieces of the given lengths to slot 1 of two.
    fn fed(isa: Isa, step: usize, x: &[f32], pieces: &[usize]) -> Vec<f32> {
        let compute = Compute::new(2, isa);
        let mut state = ConvState::new(shape(step), 2).unwrap();
        state.slot_mut(1).fill(f32::NAN); // what a sequence before left
        let (mut out, mut first) = (vec![0.0; x.len()], 0);
        for &piece in pieces {
            let seq = RecurrentSeq { rows: 0..piece, first, slot: 1 };
            let at = first * CHANNELS..(first + piece) * CHANNELS;
            compute.causal_conv_silu(&mut state, &[seq], &weight(), &x[at.clone()], &mut out[at]);
            first += piece;
        }
        assert!(state.slot(0).iter().all(|&x| x == 0.0), "another sequence's state was touched");
        out
    }

    #[test]
    fn equals_the_sum_in_f64() {
        let (x, weight) = (input(9), weight());
        for step in [1, 2, 3] {
            let out = fed(Isa::detect().unwrap(), step, &x, &[9]);
            for (t, c) in (0usize..9).flat_map(|t| (0..CHANNELS).map(move |c| (t, c))) {
                let before = |j: usize| (WIDTH - 1 - j) * step;
                let tap = |j: usize| t.checked_sub(before(j)).map_or(0.0, |s| f64::from(x[s * CHANNELS + c]));
                let sum: f64 = (0..WIDTH).map(|j| f64::from(weight[j * CHANNELS + c]) * tap(j)).sum();
                let exact = sum / (1.0 + (-sum).exp());
                assert!((f64::from(out[t * CHANNELS + c]) - exact).abs() < 1e-5, "step {step} token {t} channel {c}");
            }
        }
    }

    #[test]
    fn any_cut_gives_the_same_bits() {
        let x = input(9);
        for (isa, step) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
            let whole = fed(isa, step, &x, &[9]);
            for cut in 1..9 {
                assert_eq!(fed(isa, step, &x, &[cut, 9 - cut]), whole, "step {step} cut at {cut}");
            }
            assert_eq!(fed(isa, step, &x, &[1; 9]), whole);
        }
    }

    #[test]
    fn a_sequence_goes_back_and_on_otherwise() {
        let x = input(40);
        for (isa, step) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 3)]) {
            let whole = fed(isa, step, &x, &[40]);
            let compute = Compute::new(2, isa);
            for (first, back) in (0..30).flat_map(|first| [(first, 0), (first, 1), (first, TAKEN_BACK)]) {
                let mut state = ConvState::new(shape(step), 1).unwrap();
                let mut feed = |first: usize, x: &[f32]| {
                    let (seq, mut out) =
                        (RecurrentSeq { rows: 0..x.len() / CHANNELS, first, slot: 0 }, vec![0.0; x.len()]);
                    compute.causal_conv_silu(&mut state, &[seq], &weight(), x, &mut out);
                    out
                };
                feed(0, &x[..first * CHANNELS]);
                // One row that stays, and others that are taken back.
                let mut wrong = x[first * CHANNELS..(first + 1 + back) * CHANNELS].to_vec();
                wrong[CHANNELS..].fill(7.0);
                feed(first, &wrong);
                let from = (first + 1) * CHANNELS;
                assert_eq!(feed(first + 1, &x[from..]), whole[from..], "step {step}, {back} back to {}", first + 1);
            }
        }
    }

    #[test]
    #[should_panic(expected = "share a state slot")]
    fn a_shared_slot_is_refused() {
        let seq = |rows| RecurrentSeq { rows, first: 0, slot: 0 };
        check_seqs(&[seq(0..1), seq(1..2)], 2, 2);
    }
}
