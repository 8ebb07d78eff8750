//! Softmax attention over whole sequences, both ways.

use qwenkit_kernels::{AttentionInput, AttentionShape, BackProduct, Join, Kept, KeptType, Product};

use super::{
    lora::Outputs,
    tape::{LayerTape, Room, SequenceState, Way, sized},
};
use crate::{adapter::Module, blocks::Attention, error::Error, whole::Own};

/// out: (T, D) = attention of x: (T, D), what its backward needs being kept.
pub(super) fn forward(
    block: &Attention,
    way: &Way<'_>,
    state: &mut SequenceState,
    tape: &mut LayerTape,
    (room, x, out): (&mut Room, &[f32], &mut [f32]),
) -> Result<(), Error> {
    let (plan, compute) = (&block.plan, way.compute);
    let tokens = x.len() / block.q_proj.cols();
    let q = sized(&mut room.a, tokens * block.q_proj.rows());
    let k = sized(&mut room.b, tokens * block.k_proj.rows());
    let v = sized(&mut room.c, tokens * block.v_proj.rows());
    let gate = sized(&mut room.d, block.gate_proj.as_ref().map_or(0, |_| q.len()));
    let mut products = vec![
        Product { weight: &block.q_proj, out: &mut *q },
        Product { weight: &block.k_proj, out: &mut *k },
        Product { weight: &block.v_proj, out: &mut *v },
    ];
    products.extend(block.gate_proj.as_ref().map(|weight| Product { weight, out: &mut *gate }));
    way.low(&INPUTS, x, &mut tape.lows);
    let (queries, keys) = (block.q_proj.rows(), block.k_proj.rows());
    let added = [
        way.added(Module::QProj, (0, queries), &tape.lows),
        way.added(Module::KProj, (0, keys), &tape.lows),
        way.added(Module::VProj, (0, keys), &tape.lows),
        block.gate_proj.as_ref().and_then(|_| way.added(Module::QProj, (queries, queries), &tape.lows)),
    ];
    compute.matmul_forward(&mut room.matmul, x, &mut products, &added);
    let parts = [
        (Outputs::all(Module::QProj, queries), &mut tape.q, &mut *q, &block.q_bias),
        (Outputs::all(Module::KProj, keys), &mut tape.k, &mut *k, &block.k_bias),
        (Outputs::all(Module::VProj, keys), &mut tape.v, &mut *v, &block.v_bias),
    ];
    for (of, kept, x, bias) in parts {
        way.scale(of, x);
        // A bias has no part in the gradients of magnitudes.
        let apart = way.has_magnitudes(of.module);
        if apart {
            way.keep(kept, x);
        }
        if let Some(bias) = bias {
            compute.add_bias(x, bias);
        }
        if !apart {
            way.keep(kept, x);
        }
    }
    if block.gate_proj.is_some() {
        way.scale(of_gate(block), gate);
    }
    way.keep(&mut tape.gate, gate);
    turned(block, way, q, k);
    let (cache, seqs) = state.attention(plan, way.seqs)?;
    let kv_width = plan.kv_heads * plan.head_dim;
    for seq in &seqs {
        let rows = seq.rows.start * kv_width..seq.rows.end * kv_width;
        cache.write(compute, seq.pages, 0, &k[rows.clone()], &v[rows]);
    }
    let heads = sized(&mut room.e, q.len());
    compute.attention(cache, &seqs, plan.window, scale(block), (q, heads));
    way.keep(&mut tape.heads, heads);
    if block.gate_proj.is_some() {
        compute.sigmoid_mul(heads, gate, block.q_proj.rows());
    }
    way.low(&[Module::OProj], heads, &mut tape.lows);
    let added = [way.added(Module::OProj, (0, block.o_proj.rows()), &tape.lows)];
    compute.matmul_forward(&mut room.matmul, heads, &mut [Product { weight: &block.o_proj, out: &mut *out }], &added);
    way.scale(of_out(block), out);
    if way.has_magnitudes(Module::OProj) {
        way.keep(&mut tape.mixed, out);
    }
    Ok(())
}

/// Outputs of the module of the queries that are the gate.
fn of_gate(block: &Attention) -> Outputs {
    let width = block.q_proj.rows();
    Outputs { module: Module::QProj, first: width, width }
}

fn of_out(block: &Attention) -> Outputs {
    Outputs::all(Module::OProj, block.o_proj.rows())
}

/// x = what was kept of a module's outputs, and their bias where it was kept apart.
fn recall(way: &Way<'_>, module: Module, kept: &Kept, bias: &Option<Vec<f32>>, x: &mut [f32]) {
    way.compute.recall(kept, x);
    if let Some(bias) = bias.as_ref().filter(|_| way.has_magnitudes(module)) {
        way.compute.add_bias(x, bias);
    }
}

/// Modules of the block's input.
const INPUTS: [Module; 3] = [Module::QProj, Module::KProj, Module::VProj];

fn scale(block: &Attention) -> f32 {
    1.0 / (block.plan.head_dim as f32).sqrt()
}

/// Norms and rotations of queries and keys, in place.
fn turned(block: &Attention, way: &Way<'_>, q: &mut [f32], k: &mut [f32]) {
    for (x, norm) in [(q, &block.q_norm), (k, &block.k_norm)] {
        if let Some(norm) = norm {
            way.compute.rms_norm_in_place(x, norm, way.eps);
        }
        way.compute.rope(x, block.plan.head_dim, way.cos, way.sin, way.pairs);
    }
}

/// From d_out: (T, D), the gradient towards what `forward` gave for x: (T, D), adds the adapter's gradients to `grads`; `dx`:
/// (T, D) becomes the gradient towards x, where it is wanted.
pub(super) fn backward(
    block: &Attention,
    way: &Way<'_>,
    tape: &LayerTape,
    room: &mut Room,
    (x, d_out): (&[f32], &[f32]),
    grads: &mut [f32],
    dx: Option<&mut [f32]>,
) {
    let (plan, compute) = (&block.plan, way.compute);
    let tokens = x.len() / block.q_proj.cols();
    let (q_len, kv_len) = (tokens * block.q_proj.rows(), tokens * block.k_proj.rows());
    let has_gate = block.gate_proj.is_some();
    let Room { a, b, c, d, e, f, g, h, d_lows, part, magnitudes, .. } = room;
    // Heads before the gate, the gate, and what went into the output projection.
    let (heads, gate) = (sized(a, q_len), sized(b, if has_gate { q_len } else { 0 }));
    compute.recall(&tape.heads, heads);
    compute.recall(&tape.gate, gate);
    let gated = match has_gate {
        true => {
            let gated = sized(d, q_len);
            gated.copy_from_slice(heads);
            compute.sigmoid_mul(gated, gate, block.q_proj.rows());
            &*gated
        }
        false => &*heads,
    };
    let d_out = way.scale_backward_apart(of_out(block), &tape.mixed, d_out, magnitudes, grads);
    way.low_backward(Module::OProj, (gated, &tape.lows), &[d_out], (&mut *d_lows, &mut *part), grads);
    let d_heads = sized(c, q_len);
    let added = way.through(&[Module::OProj], d_lows);
    compute.matmul_backward_added(&[BackProduct { weight: &block.o_proj, dy: d_out }], &added, Join::OVER, d_heads);
    if has_gate {
        // `gate` becomes its own gradient.
        compute.sigmoid_mul_backward(heads, gate, d_heads, block.q_proj.rows());
        way.scale_backward_kept(of_gate(block), &tape.gate, gate, magnitudes, grads);
    }
    // Queries, keys and values as the softmax saw them.
    let q = sized(a, q_len);
    let (k, v) = sized(d, 2 * kv_len).split_at_mut(kv_len);
    recall(way, Module::QProj, &tape.q, &block.q_bias, q);
    recall(way, Module::KProj, &tape.k, &block.k_bias, k);
    recall(way, Module::VProj, &tape.v, &block.v_bias, v);
    turned(block, way, q, k);
    let (dq, dk, dv) = (sized(e, q_len), sized(f, kv_len), sized(g, kv_len));
    let shape = AttentionShape {
        heads: plan.heads,
        kv_heads: plan.kv_heads,
        head_dim: plan.head_dim,
        window: plan.window,
        scale: scale(block),
    };
    let (input, towards) = (AttentionInput { q, k, v }, [&mut *dq, &mut *dk, &mut *dv]);
    match way.form {
        KeptType::F32 => compute.attention_backward(shape, way.seqs, input, d_heads, towards),
        KeptType::Bf16 => compute.attention_backward_rounded(shape, way.seqs, input, d_heads, towards),
    }
    let parts = [
        (Module::QProj, &mut *dq, (&block.q_norm, Own::QNorm), (&tape.q, &block.q_bias), q),
        (Module::KProj, &mut *dk, (&block.k_norm, Own::KNorm), (&tape.k, &block.k_bias), k),
    ];
    for (module, d, (norm, own), (kept, bias), raw) in parts {
        compute.rope_backward(d, plan.head_dim, way.cos, way.sin, way.pairs);
        if let Some(norm) = norm {
            recall(way, module, kept, bias, raw);
            way.norm_backward(own, raw, d, grads);
            let through = sized(h, d.len());
            through.fill(0.0);
            compute.rms_norm_backward(raw, norm, way.eps, d, through);
            d.copy_from_slice(through);
        }
    }
    for (own, d) in [(Own::QBias, &*dq), (Own::KBias, &*dk), (Own::VBias, &*dv)] {
        way.bias_backward(own, d, grads);
    }
    for (module, kept, d) in
        [(Module::QProj, &tape.q, &mut *dq), (Module::KProj, &tape.k, &mut *dk), (Module::VProj, &tape.v, &mut *dv)]
    {
        let width = d.len() / tokens;
        way.scale_backward_kept(Outputs::all(module, width), kept, d, magnitudes, grads);
    }
    let of_q = [&*dq, &*gate];
    let of_q = if has_gate { &of_q[..] } else { &of_q[..1] };
    for (module, dys) in INPUTS.into_iter().zip([of_q, &[&*dk], &[&*dv]]) {
        way.low_backward(module, (x, &tape.lows), dys, (&mut *d_lows, &mut *part), grads);
    }
    if let Some(dx) = dx {
        let mut products = vec![
            BackProduct { weight: &block.q_proj, dy: dq },
            BackProduct { weight: &block.k_proj, dy: dk },
            BackProduct { weight: &block.v_proj, dy: dv },
        ];
        products.extend(block.gate_proj.as_ref().map(|weight| BackProduct { weight, dy: gate }));
        compute.matmul_backward_added(&products, &way.through(&INPUTS, d_lows), Join::OVER, dx);
    }
}
