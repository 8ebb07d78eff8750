//! A mixture of experts, both ways. The way back goes through the router too: the weights of the chosen experts have gradients,
//! the choice has none. Inner values are computed again.

use qwenkit_kernels::{BackProduct, GroupedProduct, Join, Product, Route};

use super::{
    dense,
    tape::{LayerTape, Room, Way, sized},
};
use crate::blocks::{Moe, SHARED};

/// The experts of x: (T, D): in the room's `c` the router's logits, in `d` the rows of each route, in `a` and `b` gate and up of
/// each route before the activation, in `e` the activation, in `f` each route's result. The routing is the room's.
fn results(block: &Moe, way: &Way<'_>, room: &mut Room, x: &[f32]) {
    let (width, compute, inner) = (block.router.cols(), way.compute, block.plan.width);
    let Room { matmul, routing, a, b, c, d, e, f, .. } = room;
    let logits = sized(c, x.len() / width * block.router.rows());
    compute.matmul(matmul, x, &mut [Product { weight: &block.router, out: &mut *logits }]);
    routing.choose(compute.isa(), block.plan.router, logits);
    let count = routing.routes().len();
    let own = sized(d, count * width);
    compute.gather_rows(routing.routes(), x, width, own);
    let (gate, up) = (sized(a, count * inner), sized(b, count * inner));
    let mut products = Vec::with_capacity(2 * count);
    let (mut gates, mut ups, mut first) = (&mut *gate, &mut *up, 0);
    for routes in routing.by_expert() {
        let (expert, rows) = (&block.experts[routes[0].expert], first..first + routes.len());
        for (weight, outs) in [(&expert.gate, &mut gates), (&expert.up, &mut ups)] {
            let (out, others) = std::mem::take(outs).split_at_mut(routes.len() * inner);
            *outs = others;
            products.push(GroupedProduct { weight, rows: rows.clone(), out });
        }
        first = rows.end;
    }
    compute.matmul_grouped(matmul, own, &mut products);
    let hidden = sized(e, gate.len());
    hidden.copy_from_slice(gate);
    compute.silu_mul(hidden, up, inner);
    let mut products = Vec::with_capacity(count);
    let (mut outs, mut first) = (sized(f, count * width), 0);
    for routes in routing.by_expert() {
        let (out, others) = outs.split_at_mut(routes.len() * width);
        outs = others;
        let weight = &block.experts[routes[0].expert].down;
        products.push(GroupedProduct { weight, rows: first..first + routes.len(), out });
        first += routes.len();
    }
    compute.matmul_grouped(matmul, hidden, &mut products);
}

/// out: (T, D) = the mixture's result of x: (T, D).
pub(super) fn forward(
    block: &Moe,
    way: &Way<'_>,
    tape: &mut LayerTape,
    (room, x, out): (&mut Room, &[f32], &mut [f32]),
) {
    let (width, compute) = (block.router.cols(), way.compute);
    results(block, way, room, x);
    let count = room.routing.routes().len();
    compute.add_routes(&room.routing, &room.f[..count * width], width, out);
    if let Some(shared) = &block.shared {
        let (mut factors, mut result) = (std::mem::take(&mut room.k), std::mem::take(&mut room.g));
        let (of_router, of_shared) = (sized(&mut factors, x.len() / width), sized(&mut result, x.len()));
        compute.matmul(&mut room.matmul, x, &mut [Product { weight: &shared.router, out: &mut *of_router }]);
        dense::forward(&shared.ffn, SHARED, way, &mut tape.ffn, (room, x, of_shared));
        compute.add_gated(out, of_shared, of_router, width);
        // The backward needs it again.
        way.keep(&mut tape.shared, of_shared);
        (room.k, room.g) = (factors, result);
    }
}

/// As `dense::backward`.
pub(super) fn backward(
    block: &Moe,
    way: &Way<'_>,
    tape: &LayerTape,
    room: &mut Room,
    (x, d_out): (&[f32], &[f32]),
    grads: &mut [f32],
    dx: &mut [f32],
) {
    let (width, compute, inner) = (block.router.cols(), way.compute, block.plan.width);
    results(block, way, room, x);
    let Room { routing, a, b, c, d, e, f, .. } = &mut *room;
    let routes = routing.routes();
    let (gate, up, hidden) =
        (sized(a, routes.len() * inner), sized(b, routes.len() * inner), sized(e, routes.len() * inner));
    let (own, results) = (sized(d, routes.len() * width), sized(f, routes.len() * width));
    // Towards each route's weight; its result becomes the gradient towards itself.
    let mut d_weights = Vec::with_capacity(routes.len());
    for (route, result) in routes.iter().zip(results.chunks_exact_mut(width)) {
        let d_out = &d_out[route.token * width..][..width];
        d_weights.push(result.iter().zip(d_out).map(|(y, d)| y * d).sum::<f32>());
        result.iter_mut().zip(d_out).for_each(|(y, d)| *y = route.weight * d);
    }
    let mut first = 0;
    for of_expert in routing.by_expert() {
        let expert = &block.experts[of_expert[0].expert];
        let (rows, inner_rows) =
            (first * width..(first + of_expert.len()) * width, first * inner..(first + of_expert.len()) * inner);
        first += of_expert.len();
        let d_hidden = &mut hidden[inner_rows.clone()];
        compute.matmul_backward(
            &[BackProduct { weight: &expert.down, dy: &results[rows.clone()] }],
            Join::OVER,
            d_hidden,
        );
        let (gate, up) = (&mut gate[inner_rows.clone()], &mut up[inner_rows]);
        compute.silu_mul_backward(gate, up, d_hidden, inner);
        let products = [BackProduct { weight: &expert.gate, dy: gate }, BackProduct { weight: &expert.up, dy: up }];
        compute.matmul_backward(&products, Join::OVER, &mut own[rows]);
    }
    dx.fill(0.0);
    for (route, d) in routes.iter().zip(own.chunks_exact(width)) {
        dx[route.token * width..][..width].iter_mut().zip(d).for_each(|(dx, d)| *dx += d);
    }
    let logits = sized(c, x.len() / width * block.router.rows());
    router_backward(block, routes, &d_weights, logits);
    compute.matmul_backward(&[BackProduct { weight: &block.router, dy: logits }], Join::ADD, dx);
    if let Some(shared) = &block.shared {
        let mut buffers = [&mut room.i, &mut room.j, &mut room.k].map(std::mem::take);
        let [i, j, k] = &mut buffers;
        let (result, d_result, factors) = (sized(i, x.len()), sized(j, x.len()), sized(k, x.len() / width));
        compute.matmul(&mut room.matmul, x, &mut [Product { weight: &shared.router, out: &mut *factors }]);
        d_result.copy_from_slice(d_out);
        compute.recall(&tape.shared, result);
        for ((factor, y), d) in factors.iter_mut().zip(result.chunks_exact(width)).zip(d_result.chunks_exact_mut(width))
        {
            let sigmoid = 1.0 / (1.0 + (-*factor).exp());
            *factor = y.iter().zip(&*d).map(|(y, d)| y * d).sum::<f32>() * sigmoid * (1.0 - sigmoid);
            d.iter_mut().for_each(|d| *d *= sigmoid);
        }
        dense::backward(&shared.ffn, SHARED, way, &tape.ffn, room, (x, &*d_result), grads, result);
        compute.add(dx, result, width);
        compute.matmul_backward(&[BackProduct { weight: &shared.router, dy: factors }], Join::ADD, dx);
        [room.i, room.j, room.k] = buffers;
    }
}

/// The router's logits: (T, E) become the gradient towards them, from those towards the routes' weights.
fn router_backward(block: &Moe, routes: &[Route], d_weights: &[f32], logits: &mut [f32]) {
    let experts = block.router.rows();
    let mut of_token: Vec<Vec<(usize, f32, f32)>> = vec![Vec::new(); logits.len() / experts];
    for (route, d) in routes.iter().zip(d_weights) {
        of_token[route.token].push((route.expert, route.weight, *d));
    }
    for (logits, chosen) in logits.chunks_exact_mut(experts).zip(of_token) {
        // Mean gradient under the weights: the chosen are a softmax among themselves, or parts of that over all.
        let mean: f32 = chosen.iter().map(|(_, weight, d)| weight * d).sum();
        match block.plan.router.norm_topk {
            true => logits.fill(0.0),
            false => {
                let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                logits.iter_mut().for_each(|x| *x = (*x - largest).exp());
                let total: f32 = logits.iter().sum();
                logits.iter_mut().for_each(|x| *x *= -mean / total);
            }
        }
        for (expert, weight, d) in chosen {
            logits[expert] += match block.plan.router.norm_topk {
                true => weight * (d - mean),
                false => weight * d,
            };
        }
    }
}
