//! Backward of quantised matrix products in plain Rust. The order of operations here is the order of every instruction set:
//! integer sums per 32 rows, times their scales of dy added up per block (`part = fma(sum, dy_scale, part)`), then
//! `acc = fma(part, w_scale, acc)` in ascending blocks, then `alpha * acc`.

use crate::{
    matmul_back::{BackTask, GradFacts},
    turned::{BLOCK, HALF, STEPS, SUB, Step, scale_of_bits},
};

/// Computes the task's 32 columns for all rows.
pub(crate) fn run(task: &BackTask<'_>) {
    let turned = task.turned;
    for half in 0..2 {
        let blocks = half * turned.blocks..(half + 1) * turned.blocks;
        let (steps, scales) = (&turned.quants[blocks.start * STEPS..blocks.end * STEPS], &turned.scales[blocks]);
        for t in 0..task.grads.rows {
            let mut acc = [0.0f32; HALF];
            for (b, (steps, scales)) in steps.as_chunks::<STEPS>().0.iter().zip(scales).enumerate() {
                let (x, facts) = task.grads.block(t, b);
                let mut part = [0.0f32; HALF];
                for (sub, (steps, x)) in steps.chunks_exact(SUB / 4).zip(x.chunks_exact(SUB)).enumerate() {
                    let sums = dot(steps, x, facts.start[sub]);
                    part.iter_mut()
                        .zip(sums)
                        .for_each(|(part, sum)| *part = (sum as f32).mul_add(facts.scale[sub], *part));
                }
                acc.iter_mut().zip(part).zip(scales).for_each(|((acc, part), scale)| *acc = part.mul_add(*scale, *acc));
            }
            // SAFETY: this thread alone computes these columns.
            let out = unsafe { task.out.slice(t * task.width + task.first + half * HALF, HALF) };
            for (out, acc) in out.iter_mut().zip(acc) {
                let x = acc * task.into.alpha;
                *out = if task.into.add { *out + x } else { x };
            }
        }
    }
}

fn dot(steps: &[Step], x: &[i8], start: i32) -> [i32; HALF] {
    let mut sums = [start; HALF];
    for (Step(step), x) in steps.iter().zip(x.as_chunks::<4>().0) {
        for (sum, q) in sums.iter_mut().zip(step.as_chunks::<4>().0) {
            *sum += q.iter().zip(x).map(|(&q, &x)| i32::from(q) * i32::from(x)).sum::<i32>();
        }
    }
    sums
}

/// Quantises a block.
#[inline(always)]
pub(crate) fn quantize(x: &[f32; BLOCK], quants: &mut [i8; BLOCK]) -> GradFacts {
    let mut facts = GradFacts::default();
    for (sub, (x, quants)) in x.chunks_exact(SUB).zip(quants.chunks_exact_mut(SUB)).enumerate() {
        let largest = x.iter().fold(0, |m, x| u32::max(m, x.to_bits() & 0x7fff_ffff));
        let (scale, inverse) = scale_of_bits(largest);
        let mut sum = 0;
        for (q, x) in quants.iter_mut().zip(x) {
            *q = ((x * inverse).round_ties_even() as i32).clamp(-128, 127) as i8;
            sum += i32::from(*q);
        }
        facts.set(sub, scale, sum);
    }
    facts
}
