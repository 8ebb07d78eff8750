//! Softmax attention over whole sequences, both ways.

use qwenkit_kernels::{AttentionInput, AttentionShape, BackProduct, Join, KvType, Product};

use super::tape::{LayerTape, Room, SequenceState, Way, sized};
use crate::{adapter::Module, blocks::Attention, error::Error};

/// out: (T, D) = attention of x: (T, D), what its backward needs being kept.
pub(super) fn forward(
    block: &Attention,
    way: &Way<'_>,
    kv_type: KvType,
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
    compute.matmul(&mut room.matmul, x, &mut products);
    way.adapt(Module::QProj, x, &mut tape.lows, &mut [&mut *q, &mut *gate]);
    way.adapt(Module::KProj, x, &mut tape.lows, &mut [&mut *k]);
    way.adapt(Module::VProj, x, &mut tape.lows, &mut [&mut *v]);
    for (x, bias) in [(&mut *q, &block.q_bias), (&mut *k, &block.k_bias), (&mut *v, &block.v_bias)] {
        if let Some(bias) = bias {
            compute.add_bias(x, bias);
        }
    }
    for (kept, x) in [(&mut tape.q, &*q), (&mut tape.k, &*k), (&mut tape.v, &*v), (&mut tape.gate, &*gate)] {
        compute.keep(kept, way.form, x);
    }
    turned(block, way, q, k);
    let (cache, seqs) = state.attention(kv_type, plan, way.seqs)?;
    let kv_width = plan.kv_heads * plan.head_dim;
    for seq in &seqs {
        let rows = seq.rows.start * kv_width..seq.rows.end * kv_width;
        cache.write(compute, seq.pages, 0, &k[rows.clone()], &v[rows]);
    }
    let heads = sized(&mut room.e, q.len());
    compute.attention(cache, &seqs, plan.window, scale(block), (q, heads));
    compute.keep(&mut tape.heads, way.form, heads);
    if block.gate_proj.is_some() {
        compute.sigmoid_mul(heads, gate, block.q_proj.rows());
    }
    compute.matmul(&mut room.matmul, heads, &mut [Product { weight: &block.o_proj, out: &mut *out }]);
    way.adapt(Module::OProj, heads, &mut tape.lows, &mut [out]);
    Ok(())
}

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
    mut dx: Option<&mut [f32]>,
) {
    let (plan, compute) = (&block.plan, way.compute);
    let tokens = x.len() / block.q_proj.cols();
    let (q_len, kv_len) = (tokens * block.q_proj.rows(), tokens * block.k_proj.rows());
    let has_gate = block.gate_proj.is_some();
    let Room { a, b, c, d, e, f, g, h, low, part, .. } = room;
    // Heads before the gate, the gate, and what went into the output projection.
    let (heads, gate) = (sized(a, q_len), sized(b, if has_gate { q_len } else { 0 }));
    compute.recall(&tape.heads, heads);
    compute.recall(&tape.gate, gate);
    let d_heads = sized(c, q_len);
    compute.matmul_backward(&[BackProduct { weight: &block.o_proj, dy: d_out }], Join::OVER, d_heads);
    let gated = match has_gate {
        true => {
            let gated = sized(d, q_len);
            gated.copy_from_slice(heads);
            compute.sigmoid_mul(gated, gate, block.q_proj.rows());
            &*gated
        }
        false => &*heads,
    };
    let scratch = (&mut *low, &mut *part);
    way.adapt_backward(Module::OProj, (gated, &tape.lows), &[d_out], scratch, grads, Some(&mut *d_heads));
    if has_gate {
        // `gate` becomes its own gradient.
        compute.sigmoid_mul_backward(heads, gate, d_heads, block.q_proj.rows());
    }
    // Queries, keys and values as the softmax saw them.
    let q = sized(a, q_len);
    let (k, v) = sized(d, 2 * kv_len).split_at_mut(kv_len);
    compute.recall(&tape.q, q);
    compute.recall(&tape.k, k);
    compute.recall(&tape.v, v);
    turned(block, way, q, k);
    let (dq, dk, dv) = (sized(e, q_len), sized(f, kv_len), sized(g, kv_len));
    let shape = AttentionShape {
        heads: plan.heads,
        kv_heads: plan.kv_heads,
        head_dim: plan.head_dim,
        window: plan.window,
        scale: scale(block),
    };
    compute.attention_backward(shape, way.seqs, AttentionInput { q, k, v }, d_heads, [dq, dk, dv]);
    for (d, norm, kept, raw) in [(&mut *dq, &block.q_norm, &tape.q, q), (&mut *dk, &block.k_norm, &tape.k, k)] {
        compute.rope_backward(d, plan.head_dim, way.cos, way.sin, way.pairs);
        if let Some(norm) = norm {
            compute.recall(kept, raw);
            let through = sized(h, d.len());
            through.fill(0.0);
            compute.rms_norm_backward(raw, norm, way.eps, d, through);
            d.copy_from_slice(through);
        }
    }
    if let Some(dx) = &mut dx {
        let mut products = vec![
            BackProduct { weight: &block.q_proj, dy: dq },
            BackProduct { weight: &block.k_proj, dy: dk },
            BackProduct { weight: &block.v_proj, dy: dv },
        ];
        products.extend(block.gate_proj.as_ref().map(|weight| BackProduct { weight, dy: gate }));
        compute.matmul_backward(&products, Join::OVER, dx);
    }
    for (module, dys) in
        [(Module::QProj, &[&*dq, &*gate][..]), (Module::KProj, &[&*dk][..]), (Module::VProj, &[&*dv][..])]
    {
        way.adapt_backward(module, (x, &tape.lows), dys, (&mut *low, &mut *part), grads, dx.as_deref_mut());
    }
}
