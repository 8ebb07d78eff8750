//! From the last residual to the losses and back: the final norm and the output head, or a classifier's head.
//!
//! Only rows that something is learnt from go through, so many at a time: all logits of a long text at once would take more
//! memory than the model.

use qwenkit_kernels::{HeadLoss, Join, Mat};

use super::{
    Aim,
    tape::{HEAD_ROWS, Room, Way, sized},
    whole::head_rows,
};
use crate::{adapter::Adapter, load::Model};

/// Losses of the aim's rows into `losses`, from x: (rows, D). With `back`, also the gradient towards x, which is written, and a
/// classifier's, which is added to the adapter's.
pub(super) fn losses(
    model: &Model,
    way: &Way<'_>,
    norm: &[f32],
    aim: &Aim<'_>,
    (room, x): (&mut Room, &[f32]),
    (losses, scores): (&mut Vec<f32>, &mut Vec<f32>),
    mut back: Option<(&mut [f32], &mut [f32])>,
) {
    let width = norm.len();
    let Room { matmul, normed, d_normed, .. } = room;
    let (targets, scales): (&[u32], &[f32]) = match aim {
        Aim::NextTokens { targets, scales, .. } => (targets, scales),
        Aim::Labels { labels, scales, .. } => (labels, scales),
    };
    let rows = x.len() / width;
    losses.clear();
    losses.resize(rows, 0.0);
    scores.clear();
    let learns_head = way.whole.is_some() && back.is_some();
    let most = if learns_head { head_rows(model.plan().vocab) } else { HEAD_ROWS };
    // Rows of one scale together, by its bits: what is no number equals nothing, itself included.
    let mut first = 0;
    while first < rows {
        let scale = scales[first].to_bits();
        let same = scales[first..].iter().take(most).take_while(|s| s.to_bits() == scale).count();
        let tile = first..first + same;
        first = tile.end;
        let of_rows = &x[tile.start * width..tile.end * width];
        let normed = sized(normed, same * width);
        way.compute.rms_norm(of_rows, norm, way.eps, normed);
        let d_normed = sized(d_normed, same * width);
        let outcome = (&targets[tile.clone()], scales[tile.start], &mut losses[tile.clone()]);
        match aim {
            Aim::NextTokens { .. } if learns_head => {
                let (targets, scale, losses) = outcome;
                if let Some((grads, _)) = &mut back {
                    way.head_backward(model, matmul, (&*normed, targets, scale), (losses, &mut *d_normed), grads);
                }
            }
            Aim::NextTokens { .. } => {
                let (targets, scale, losses) = outcome;
                let head = HeadLoss { head: model.head.as_ref().unwrap_or(&model.embedding), targets, scale };
                let towards = back.is_some().then_some(&mut *d_normed);
                way.compute.head_loss(matmul, &head, normed, losses, towards);
            }
            Aim::Labels { smoothing, .. } => {
                let grads = back.as_mut().map(|(grads, _)| &mut **grads);
                labels(way, (normed, d_normed), (outcome, *smoothing), scores, grads);
            }
        }
        if let Some((grads, dx)) = &mut back {
            way.last_norm_backward(of_rows, d_normed, grads);
            let through = &mut dx[tile.start * width..tile.end * width];
            through.fill(0.0);
            way.compute.rms_norm_backward(of_rows, norm, way.eps, d_normed, through);
        }
    }
}

/// A classifier's head for some sequences: scores, losses, and with `grads` the gradients of its weights and of its input.
fn labels(
    way: &Way<'_>,
    (normed, d_normed): (&[f32], &mut [f32]),
    ((targets, scale, losses), smoothing): ((&[u32], f32, &mut [f32]), f32),
    scores: &mut Vec<f32>,
    grads: Option<&mut [f32]>,
) {
    let adapter: &Adapter = way.adapter;
    let score = adapter.score().expect("a lesson of labels is for an adapter with a head");
    let weights = Mat::new(&adapter.values()[score.weights()], score.labels, score.width);
    let rows = targets.len();
    let first = scores.len();
    scores.resize(first + rows * score.labels, 0.0);
    let x = Mat::new(normed, rows, score.width);
    way.compute.product(x, weights.t(), Join::OVER, &mut scores[first..]);
    let mut d_scores = scores[first..].to_vec();
    way.compute.cross_entropy(&mut d_scores, targets, scale, losses);
    if let Some(grads) = grads {
        if smoothing > 0.0 {
            let part = scale * smoothing;
            for (d, target) in d_scores.chunks_exact_mut(score.labels).zip(targets) {
                d.iter_mut().for_each(|d| *d -= part / score.labels as f32);
                d[*target as usize] += part;
            }
        }
        let d_scores = Mat::new(&d_scores, rows, score.labels);
        way.compute.product(d_scores.t(), x, Join::ADD, &mut grads[score.weights()]);
        way.compute.product(d_scores, weights, Join::OVER, d_normed);
    }
}
