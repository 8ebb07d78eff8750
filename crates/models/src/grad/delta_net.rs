//! Gated DeltaNet over whole sequences, both ways. Of its inner values nothing is kept but its input: they are many, and the
//! backward computes them again.

use qwenkit_kernels::{BackProduct, DeltaGate, DeltaGrads, DeltaInput, Join, Product};

use super::{
    lora::Outputs,
    tape::{LayerTape, Room, SequenceState, Way, sized},
};
use crate::{adapter::Module, blocks::DeltaNet, error::Error};

/// Modules of the block's input.
const INPUTS: [Module; 4] = [Module::InProjQkv, Module::InProjZ, Module::InProjB, Module::InProjA];

/// Lengths of the inner values of T tokens.
struct Sizes {
    /// (T, C)
    channels: usize,
    /// (T, value heads, V)
    values: usize,
    /// (T, value heads)
    gates: usize,
}

fn sizes(block: &DeltaNet, x: &[f32]) -> Sizes {
    let (tokens, shape) = (x.len() / block.in_qkv.cols(), block.plan.shape);
    let (channels, values) = (tokens * shape.channels(), tokens * shape.value_width());
    Sizes { channels, values, gates: tokens * shape.value_heads }
}

/// Up to the rule's results: in the room's `a` q, k and v before the convolution, in `b` z, in `c` write and fade, in `d` q, k
/// and v behind the convolution, in `e` with unit heads, in `f` the results.
fn results(
    block: &DeltaNet,
    way: &Way<'_>,
    state: &mut SequenceState,
    tape: &mut LayerTape,
    room: &mut Room,
    x: &[f32],
) -> Result<(), Error> {
    let (shape, compute, sizes) = (block.plan.shape, way.compute, sizes(block, x));
    let (raw, z) = (sized(&mut room.a, sizes.channels), sized(&mut room.b, sizes.values));
    let (write, fade) = sized(&mut room.c, 2 * sizes.gates).split_at_mut(sizes.gates);
    let mut products = [
        Product { weight: &block.in_qkv, out: &mut *raw },
        Product { weight: &block.in_z, out: &mut *z },
        Product { weight: &block.in_b, out: &mut *write },
        Product { weight: &block.in_a, out: &mut *fade },
    ];
    way.low(&INPUTS, x, &mut tape.lows);
    let widths = [shape.channels(), shape.value_width(), shape.value_heads, shape.value_heads];
    let added: Vec<_> =
        INPUTS.into_iter().zip(widths).map(|(module, width)| way.added(module, (0, width), &tape.lows)).collect();
    compute.matmul_forward(&mut room.matmul, x, &mut products, &added);
    for ((module, width), y) in INPUTS.into_iter().zip(widths).zip([&mut *raw, &mut *z, &mut *write, &mut *fade]) {
        way.scale(Outputs::all(module, width), y);
    }
    let (conv, delta, seqs) = state.recurrent(&block.plan, way.seqs)?;
    let (qkv, unit) = (sized(&mut room.d, sizes.channels), sized(&mut room.e, sizes.channels));
    compute.causal_conv_silu(conv, &seqs, &block.conv, raw, qkv);
    unit.copy_from_slice(qkv);
    compute.unit_heads(shape, unit);
    let input = DeltaInput { qkv: unit, gates: block.gates(write, fade) };
    compute.delta_rule(delta, &seqs, &input, sized(&mut room.f, sizes.values));
    Ok(())
}

/// out: (T, D) = DeltaNet of x: (T, D).
pub(super) fn forward(
    block: &DeltaNet,
    way: &Way<'_>,
    state: &mut SequenceState,
    tape: &mut LayerTape,
    (room, x, out): (&mut Room, &[f32], &mut [f32]),
) -> Result<(), Error> {
    results(block, way, state, tape, room, x)?;
    let (compute, len, width) = (way.compute, sizes(block, x).values, block.plan.shape.value_width());
    let (z, results) = (sized(&mut room.b, len), sized(&mut room.f, len));
    compute.rms_norm_in_place(results, &block.norm, way.eps);
    let gated = match block.plan.gate {
        DeltaGate::Silu => {
            compute.silu_mul(z, results, width);
            z
        }
        DeltaGate::Sigmoid => {
            compute.sigmoid_mul(results, z, width);
            results
        }
    };
    way.low(&[Module::OutProj], gated, &mut tape.lows);
    let added = [way.added(Module::OutProj, (0, block.out_proj.rows()), &tape.lows)];
    compute.matmul_forward(&mut room.matmul, gated, &mut [Product { weight: &block.out_proj, out: &mut *out }], &added);
    way.scale(Outputs::all(Module::OutProj, block.out_proj.rows()), out);
    if way.has_magnitudes(Module::OutProj) {
        way.keep(&mut tape.mixed, out);
    }
    Ok(())
}

/// As `attention::backward`.
pub(super) fn backward(
    block: &DeltaNet,
    way: &Way<'_>,
    (state, tape): (&mut SequenceState, &mut LayerTape),
    room: &mut Room,
    (x, d_out): (&[f32], &[f32]),
    grads: &mut [f32],
    dx: Option<&mut [f32]>,
) -> Result<(), Error> {
    results(block, way, state, tape, room, x)?;
    let (shape, compute, sizes) = (block.plan.shape, way.compute, sizes(block, x));
    let width = shape.value_width();
    let Room { a, b, c, d, e, f, g, h, i, j, k, d_lows, part, magnitudes, .. } = room;
    let (z, results, normed) = (sized(b, sizes.values), sized(f, sizes.values), sized(g, sizes.values));
    normed.copy_from_slice(results);
    compute.rms_norm_in_place(normed, &block.norm, way.eps);
    let of_out = Outputs::all(Module::OutProj, block.out_proj.rows());
    let d_out = way.scale_backward_apart(of_out, &tape.mixed, d_out, magnitudes, grads);
    if way.adapter.lora(way.layer, Module::OutProj).is_some() {
        let gated = sized(i, sizes.values);
        gated.copy_from_slice(if block.plan.gate == DeltaGate::Silu { &*z } else { &*normed });
        match block.plan.gate {
            DeltaGate::Silu => compute.silu_mul(gated, normed, width),
            DeltaGate::Sigmoid => compute.sigmoid_mul(gated, z, width),
        }
        way.low_backward(Module::OutProj, (gated, &tape.lows), &[d_out], (&mut *d_lows, &mut *part), grads);
    }
    let d_gated = sized(h, sizes.values);
    let out_proj = [BackProduct { weight: &block.out_proj, dy: d_out }];
    compute.matmul_backward_added(&out_proj, &way.through(&[Module::OutProj], d_lows), Join::OVER, d_gated);
    let z_before = sized(&mut magnitudes.y, if way.has_magnitudes(Module::InProjZ) { z.len() } else { 0 });
    z_before.copy_from_slice(&z[..z_before.len()]);
    // z and `d_normed` become gradients.
    let d_normed = match block.plan.gate {
        DeltaGate::Silu => {
            compute.silu_mul_backward(z, normed, d_gated, width);
            normed
        }
        DeltaGate::Sigmoid => {
            compute.sigmoid_mul_backward(normed, z, d_gated, width);
            d_gated
        }
    };
    way.scale_backward(Outputs::all(Module::InProjZ, width), z_before, z, &mut magnitudes.sums, grads);
    let d_results = sized(i, sizes.values);
    d_results.fill(0.0);
    compute.rms_norm_backward(results, &block.norm, way.eps, d_normed, d_results);
    let (raw, qkv, unit) = (sized(a, sizes.channels), sized(d, sizes.channels), sized(e, sizes.channels));
    let (write, fade) = sized(c, 2 * sizes.gates).split_at(sizes.gates);
    let input = DeltaInput { qkv: unit, gates: block.gates(write, fade) };
    let d_qkv = sized(j, sizes.channels);
    let (d_write, d_fade) = sized(k, 2 * sizes.gates).split_at_mut(sizes.gates);
    let of_rule = DeltaGrads { qkv: &mut *d_qkv, write: &mut *d_write, fade: &mut *d_fade };
    compute.delta_rule_backward(shape, way.seqs, &input, d_results, of_rule);
    compute.unit_heads_backward(shape, qkv, d_qkv);
    let d_raw = sized(f, sizes.channels);
    compute.causal_conv_silu_backward(block.plan.conv(), way.seqs, &block.conv, (raw, &*d_qkv), h, d_raw);
    for (module, width, y, dy) in [
        (Module::InProjQkv, shape.channels(), &*raw, &mut *d_raw),
        (Module::InProjB, shape.value_heads, write, &mut *d_write),
        (Module::InProjA, shape.value_heads, fade, &mut *d_fade),
    ] {
        way.scale_backward(Outputs::all(module, width), y, dy, &mut magnitudes.sums, grads);
    }
    for (module, dy) in INPUTS.into_iter().zip([&*d_raw, &*z, &*d_write, &*d_fade]) {
        way.low_backward(module, (x, &tape.lows), &[dy], (&mut *d_lows, &mut *part), grads);
    }
    if let Some(dx) = dx {
        let products = [
            BackProduct { weight: &block.in_qkv, dy: d_raw },
            BackProduct { weight: &block.in_z, dy: z },
            BackProduct { weight: &block.in_b, dy: d_write },
            BackProduct { weight: &block.in_a, dy: d_fade },
        ];
        compute.matmul_backward_added(&products, &way.through(&INPUTS, d_lows), Join::OVER, dx);
    }
    Ok(())
}
