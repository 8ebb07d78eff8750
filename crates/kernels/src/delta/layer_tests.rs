//! The op against the ops one by one.

use super::*;
use crate::{ConvShape, DeltaInput, HeadOrder};

const SHAPE: DeltaShape =
    DeltaShape { key_heads: 2, value_heads: 4, key_dim: 6, value_dim: 20, order: HeadOrder::Grouped };
const LARGE: DeltaShape =
    DeltaShape { key_heads: 2, value_heads: 6, key_dim: 140, value_dim: 90, order: HeadOrder::Tiled };
const WIDTH: usize = 4;
const EPS: f32 = 1e-6;

fn wave(n: usize, f: f32) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * f).sin()).collect()
}

/// Numbers of a layer and of `tokens` tokens of two sequences, the first of which has `first` of them.
struct Case {
    shape: DeltaShape,
    tokens: usize,
    x: Vec<f32>,
    conv: Vec<f32>,
    write: Vec<f32>,
    fade: Vec<f32>,
    fade_bias: Vec<f32>,
    rate: Vec<f32>,
    norm: Vec<f32>,
    z: Vec<f32>,
}

/// Rows from `from` on, so many of one sequence and of another.
type Piece = [usize; 2];

struct States(ConvState, DeltaState);

impl Case {
    fn new(shape: DeltaShape, tokens: usize) -> Case {
        let heads = shape.value_heads;
        Case {
            shape,
            tokens,
            x: wave(tokens * shape.channels(), 0.71),
            conv: wave(WIDTH * shape.channels(), 1.3),
            write: wave(tokens * heads, 1.9),
            fade: wave(tokens * heads, 2.3),
            fade_bias: wave(heads, 0.4),
            rate: wave(heads, 0.9).into_iter().map(|x| -x.abs() - 0.01).collect(),
            norm: wave(shape.value_dim, 0.3),
            z: wave(tokens * shape.value_width(), 0.53),
        }
    }

    fn states(&self) -> States {
        let conv = ConvState::new(ConvShape { width: WIDTH, step: 1, channels: self.shape.channels() }, 3).unwrap();
        let mut states = States(conv, DeltaState::new(self.shape, 3).unwrap());
        states.1.data.as_mut_slice::<f32>().fill(f32::NAN);
        states.1.keys.as_mut_slice::<f32>().fill(f32::NAN);
        states
    }

    fn gates(&self, rows: Range<usize>) -> DeltaGates<'_> {
        let own = rows.start * self.shape.value_heads..rows.end * self.shape.value_heads;
        DeltaGates {
            write: &self.write[own.clone()],
            fade: &self.fade[own],
            fade_bias: &self.fade_bias,
            rate: &self.rate,
        }
    }

    /// The op on one piece after another.
    fn at_once(
        &self,
        compute: &Compute,
        pieces: &[Piece],
        gate: DeltaGate,
        wanted: Option<&[usize]>,
    ) -> (Vec<f32>, States) {
        let (mut states, mut out) = (self.states(), Vec::new());
        self.each(pieces, |rows, seqs| {
            let own: Vec<usize> = match wanted {
                Some(wanted) => wanted.iter().filter(|row| rows.contains(row)).map(|row| row - rows.start).collect(),
                None => (0..rows.len()).collect(),
            };
            let width = self.shape.value_width();
            let mut z: Vec<f32> =
                own.iter().flat_map(|row| &self.z[(rows.start + row) * width..][..width]).copied().collect();
            let layer = DeltaLayer {
                x: &self.x[rows.start * self.shape.channels()..rows.end * self.shape.channels()],
                conv: &self.conv,
                gates: self.gates(rows.clone()),
                norm: &self.norm,
                eps: EPS,
                gate,
                wanted: wanted.map(|_| &own[..]),
            };
            compute.delta_layer(&mut states.0, &mut states.1, seqs, &layer, &mut z);
            out.extend(z);
        });
        (out, states)
    }

    /// The ops one by one.
    fn one_by_one(&self, compute: &Compute, pieces: &[Piece], gate: DeltaGate) -> (Vec<f32>, States) {
        let (mut states, mut out) = (self.states(), Vec::new());
        self.each(pieces, |rows, seqs| {
            let (channels, width) = (self.shape.channels(), self.shape.value_width());
            let mut qkv = vec![0.0; rows.len() * channels];
            let x = &self.x[rows.start * channels..rows.end * channels];
            compute.causal_conv_silu(&mut states.0, seqs, &self.conv, x, &mut qkv);
            compute.unit_heads(self.shape, &mut qkv);
            let mut results = vec![0.0; rows.len() * width];
            let input = DeltaInput { qkv: &qkv, gates: self.gates(rows.clone()) };
            compute.delta_rule(&mut states.1, seqs, &input, &mut results);
            compute.rms_norm_in_place(&mut results, &self.norm, EPS);
            let mut z = self.z[rows.start * width..rows.end * width].to_vec();
            match gate {
                DeltaGate::Silu => compute.silu_mul(&mut z, &results, width),
                DeltaGate::Sigmoid => {
                    compute.sigmoid_mul(&mut results, &z, width);
                    z = results;
                }
            }
            out.extend(z);
        });
        (out, states)
    }

    fn each(&self, pieces: &[Piece], mut f: impl FnMut(Range<usize>, &[RecurrentSeq])) {
        let (mut start, mut done) = (0, [0, 0]);
        for piece in pieces {
            let middle = piece[0];
            let seqs = [
                RecurrentSeq { rows: 0..middle, first: done[0], slot: 2 },
                RecurrentSeq { rows: middle..middle + piece[1], first: done[1], slot: 0 },
            ];
            let end = start + piece[0] + piece[1];
            f(start..end, &seqs);
            done = [done[0] + piece[0], done[1] + piece[1]];
            start = end;
        }
        assert_eq!(start, self.tokens);
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn at_once_is_one_by_one_bit_by_bit() {
    let cuts: [&[Piece]; 4] =
        [&[[17, 20]], &[[5, 8], [11, 1], [1, 11]], &[[1, 1], [1, 1], [3, 17], [13, 0]], &[[16, 3], [9, 9]]];
    for (isa, shape) in Isa::available().into_iter().flat_map(|isa| [(isa, SHAPE), (isa, LARGE)]) {
        let case = Case::new(shape, 37);
        for (pieces, gate) in cuts.into_iter().zip([DeltaGate::Silu, DeltaGate::Sigmoid].into_iter().cycle()) {
            let (expected, states) = case.one_by_one(&Compute::new(2, isa), pieces, gate);
            assert!(expected.iter().all(|x| x.is_finite()));
            for threads in [1, 3] {
                let compute = Compute::new(threads, isa);
                let (found, same) = case.at_once(&compute, pieces, gate, None);
                assert_eq!(bits(&found), bits(&expected), "{isa} {shape:?} {pieces:?}");
                for slot in [0, 2] {
                    assert_eq!(same.0.slot_as_bytes(slot), states.0.slot_as_bytes(slot), "columns");
                    let (found, expected) = (same.1.slot_as_bytes(slot), states.1.slot_as_bytes(slot));
                    assert_eq!(found[0], expected[0], "memory of {isa} {shape:?} {pieces:?}");
                }
                let wanted = [0, 3, 12, 35, 36];
                let (few, _) = case.at_once(&compute, pieces, gate, Some(&wanted));
                let width = shape.value_width();
                let of_wanted: Vec<f32> =
                    wanted.iter().flat_map(|row| &expected[row * width..][..width]).copied().collect();
                assert_eq!(bits(&few), bits(&of_wanted), "the wanted rows");
            }
        }
    }
}
