//! The dense feed-forward block, both ways.

use qwenkit_kernels::{BackProduct, Join, Product};

use super::{
    lora::Outputs,
    tape::{FFN_ROWS, FfnTape, Room, Way, sized},
};
use crate::{adapter::Module, blocks::DenseFfn};

/// out: (T, D) = the block's result of x: (T, D), what its backward needs being kept. The modules are what adapters call gate,
/// up and down.
pub(super) fn forward(
    block: &DenseFfn,
    modules: [Module; 3],
    way: &Way<'_>,
    tapes: &mut Vec<FfnTape>,
    (room, x, out): (&mut Room, &[f32], &mut [f32]),
) {
    let rows = FFN_ROWS * block.gate.cols();
    if tapes.len() * rows < x.len() {
        tapes.resize_with(x.len().div_ceil(rows), FfnTape::default);
    }
    for ((x, out), tape) in x.chunks(rows).zip(out.chunks_mut(rows)).zip(tapes) {
        forward_rows(block, modules, way, tape, (room, x, out));
    }
}

fn forward_rows(
    block: &DenseFfn,
    [of_gate, of_up, of_down]: [Module; 3],
    way: &Way<'_>,
    tape: &mut FfnTape,
    (room, x, out): (&mut Room, &[f32], &mut [f32]),
) {
    let (compute, width) = (way.compute, block.gate.rows());
    let len = x.len() / block.gate.cols() * width;
    let (gate, up) = (sized(&mut room.a, len), sized(&mut room.b, len));
    let mut products = [Product { weight: &block.gate, out: &mut *gate }, Product { weight: &block.up, out: &mut *up }];
    way.low(&[of_gate, of_up], x, &mut tape.lows);
    let added = [of_gate, of_up].map(|module| way.added(module, (0, width), &tape.lows));
    compute.matmul_forward(&mut room.matmul, x, &mut products, &added);
    way.scale(Outputs::all(of_gate, width), gate);
    way.scale(Outputs::all(of_up, width), up);
    way.keep(&mut tape.gate, gate);
    way.keep(&mut tape.up, up);
    compute.silu_mul(gate, up, width);
    way.low(&[of_down], gate, &mut tape.lows);
    let added = [way.added(of_down, (0, block.down.rows()), &tape.lows)];
    compute.matmul_forward(&mut room.matmul, gate, &mut [Product { weight: &block.down, out: &mut *out }], &added);
    way.scale(Outputs::all(of_down, block.down.rows()), out);
    if way.has_magnitudes(of_down) {
        way.keep(&mut tape.down, out);
    }
}

/// From d_out: (T, D), the gradient towards what `forward` gave for x: (T, D), adds the adapter's gradients to `grads`; `dx`:
/// (T, D) becomes the gradient towards x.
#[allow(clippy::too_many_arguments)] // the block, what is adapted, both ways' values
pub(super) fn backward(
    block: &DenseFfn,
    modules: [Module; 3],
    way: &Way<'_>,
    tapes: &[FfnTape],
    room: &mut Room,
    (x, d_out): (&[f32], &[f32]),
    grads: &mut [f32],
    dx: &mut [f32],
) {
    let rows = FFN_ROWS * block.gate.cols();
    for (((x, d_out), dx), tape) in x.chunks(rows).zip(d_out.chunks(rows)).zip(dx.chunks_mut(rows)).zip(tapes) {
        backward_rows(block, modules, (way, tape, &mut *room), (x, d_out), grads, dx);
    }
}

fn backward_rows(
    block: &DenseFfn,
    [of_gate, of_up, of_down]: [Module; 3],
    (way, tape, room): (&Way<'_>, &FfnTape, &mut Room),
    (x, d_out): (&[f32], &[f32]),
    grads: &mut [f32],
    dx: &mut [f32],
) {
    let (compute, width) = (way.compute, block.gate.rows());
    let len = x.len() / block.gate.cols() * width;
    let Room { a, b, c, d, d_lows, part, magnitudes, .. } = room;
    let (gate, up, d_hidden) = (sized(a, len), sized(b, len), sized(c, len));
    compute.recall(&tape.gate, gate);
    compute.recall(&tape.up, up);
    let d_out =
        way.scale_backward_apart(Outputs::all(of_down, block.down.rows()), &tape.down, d_out, magnitudes, grads);
    if way.learns(of_down) {
        let hidden = sized(d, len);
        hidden.copy_from_slice(gate);
        compute.silu_mul(hidden, up, width);
        way.low_backward(of_down, (hidden, &tape.lows), &[d_out], (&mut *d_lows, &mut *part), grads);
    }
    let down = [BackProduct { weight: &block.down, dy: d_out }];
    compute.matmul_backward_added(&down, &way.through(&[of_down], d_lows), Join::OVER, d_hidden);
    compute.silu_mul_backward(gate, up, d_hidden, width);
    way.scale_backward_kept(Outputs::all(of_gate, width), &tape.gate, gate, magnitudes, grads);
    way.scale_backward_kept(Outputs::all(of_up, width), &tape.up, up, magnitudes, grads);
    for (module, dy) in [(of_gate, &*gate), (of_up, &*up)] {
        way.low_backward(module, (x, &tape.lows), &[dy], (&mut *d_lows, &mut *part), grads);
    }
    let products = [BackProduct { weight: &block.gate, dy: gate }, BackProduct { weight: &block.up, dy: up }];
    compute.matmul_backward_added(&products, &way.through(&[of_gate, of_up], d_lows), Join::OVER, dx);
}
