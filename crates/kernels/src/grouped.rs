//! Several matrix products at once, each over rows of its own: what experts are.
//!
//! All products share one fork. Their groups of weight rows are dealt to threads by cost, each thread's in one run, so that
//! a few large products do not wait for each other. A result has the bits of `matmul`'s.

use std::ops::Range;

use crate::{
    activations::Activations,
    matmul::{Compute, MatmulScratch, Rows, Task},
    shared_out::SharedOut,
    weight::{Operand, Weight},
};

/// Rows below which a product waits for memory: its cost is that of so many.
const ROWS_OF_MEMORY: usize = 3;

/// One product of several: `out`: (rows, N) = x[rows] W^T.
pub struct GroupedProduct<'a> {
    /// (N, K)
    pub weight: &'a Weight,
    /// Rows of x. Two products have the same rows or none in common.
    pub rows: Range<usize>,
    /// (rows, N), overwritten
    pub out: &'a mut [f32],
}

/// A product with its place in the order of all.
struct Job<'a> {
    weight: &'a Weight,
    x: Rows<'a>,
    out: SharedOut<'a, f32>,
    /// Cost of all products before it.
    start: usize,
    /// Cost of one of its groups.
    each: usize,
}

impl Job<'_> {
    /// Its groups of which the cost lies below `cost`.
    fn groups_below(&self, cost: usize) -> usize {
        (cost.saturating_sub(self.start) / self.each).min(self.weight.groups())
    }
}

impl Compute {
    /// Computes every product over its rows of `x`: (T, K). One fork for all of them.
    ///
    /// # Panics
    /// If a product's shapes do not fit `x`, or rows of two overlap without being the same.
    pub fn matmul_grouped(&self, scratch: &mut MatmulScratch, x: &[f32], products: &mut [GroupedProduct<'_>]) {
        let Some(cols) = products.first().map(|p| p.weight.cols()) else { return };
        let mut segments: Vec<Range<usize>> = products.iter().map(|p| p.rows.clone()).collect();
        segments.sort_unstable_by_key(|rows| (rows.start, rows.end));
        segments.dedup();
        assert!(segments.is_sorted_by(|a, b| a.end <= b.start), "rows of grouped products overlap: {segments:?}");
        for p in products.iter() {
            let (n, k) = (p.weight.rows(), p.weight.cols());
            let fits = k == cols && p.rows.end * cols <= x.len() && p.out.len() == p.rows.len() * n;
            assert!(fits, "grouped product of rows {:?} of {cols} by ({n}, {k})", p.rows);
        }
        let needed: Vec<Operand> = products.iter().map(|p| p.weight.operand()).collect();
        scratch.activations.prepare_segments(self.isa, &self.pool, x, cols, &needed, &segments);
        let mut jobs: Vec<Job<'_>> = Vec::with_capacity(products.len());
        let mut total = 0;
        for p in products.iter_mut() {
            let each = p.rows.len().max(ROWS_OF_MEMORY) * cols;
            let x = rows_of(&scratch.activations, x, &p.rows);
            jobs.push(Job { weight: p.weight, x, out: SharedOut::new(&mut *p.out), start: total, each });
            total += p.weight.groups() * each;
        }
        let threads = self.pool.threads();
        self.pool.run(|i| {
            let cost = total * i / threads..total * (i + 1) / threads;
            let groups = |job: &Job<'_>| job.groups_below(cost.start)..job.groups_below(cost.end);
            let mut own = jobs.iter().map(|job| (job, groups(job))).filter(|(_, groups)| !groups.is_empty()).peekable();
            while let Some((job, groups)) = own.next() {
                #[cfg(target_arch = "x86_64")]
                if let Some((next, groups)) = own.peek() {
                    crate::prefetch::start_of(next.weight, groups.start, next.x.rows);
                }
                #[cfg(not(target_arch = "x86_64"))]
                let _ = own.peek();
                let (out_step, joined) = (job.weight.rows(), None);
                let (weight, x, out) = (job.weight, job.x, &job.out);
                self.kernel(&Task { weight, groups, joined, x, out, out_step, out_group: 0 });
            }
        });
    }
}

/// Rows `rows` of x, a segment that was prepared.
fn rows_of<'a>(prepared: &'a Activations, x: &'a [f32], rows: &Range<usize>) -> Rows<'a> {
    let cols = prepared.cols;
    Rows {
        rows: rows.len(),
        cols,
        widest: prepared.widest,
        values: &x[rows.start * cols..rows.end * cols],
        quants: prepared.quants.get(rows.start * cols..).unwrap_or_default(),
        facts: prepared.facts.get(rows.start * (cols / crate::layout::UNIT)..).unwrap_or_default(),
        bf16: prepared.bf16.get(rows.start * cols.next_multiple_of(2)..).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use qwenkit_tensor::DType;

    use super::*;
    use crate::{Isa, matmul::Product};

    /// A weight of random bits whose scales are small numbers.
    fn weight(compute: &Compute, dtype: DType, rows: usize, cols: usize, seed: usize) -> Weight {
        let blocks = rows * cols / dtype.block_len();
        let block = |b: usize| {
            let value = ((b * 31 + seed * 17) % 13) as f32 / 50.0 - 0.1;
            match dtype {
                DType::F32 => value.to_le_bytes().to_vec(),
                DType::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
                _ => {
                    let quants = (0..dtype.block_bytes() - 2).map(|i| (i * 37 + b * 11 + seed) as u8);
                    half::f16::from_f32(0.01).to_le_bytes().into_iter().chain(quants).collect()
                }
            }
        };
        let bytes: Vec<u8> = (0..blocks).flat_map(block).collect();
        Weight::from_bytes(compute.pool(), dtype, rows, cols, &bytes).unwrap()
    }

    #[test]
    fn grouped_products_have_the_bits_of_products_alone() {
        let (cols, total) = (96, 30);
        let x: Vec<f32> = (0..total * cols).map(|i| (i as f32 * 0.37).sin()).collect();
        for (isa, threads) in Isa::available().into_iter().flat_map(|isa| [(isa, 1), (isa, 2), (isa, 5)]) {
            let compute = Compute::new(threads, isa);
            for dtype in [DType::F32, DType::BF16, DType::Q8_0] {
                // Two products over the same rows, single rows, rows that nobody wants, none at all.
                let parts =
                    [(0..1, 40), (1..12, 33), (1..12, 16), (12..13, 1), (15..24, 70), (24..24, 20), (24..30, 48)];
                let weights: Vec<Weight> =
                    parts.iter().enumerate().map(|(i, (_, n))| weight(&compute, dtype, *n, cols, i)).collect();
                let mut outs: Vec<Vec<f32>> = parts.iter().map(|(rows, n)| vec![f32::NAN; rows.len() * n]).collect();
                let mut products: Vec<GroupedProduct<'_>> = parts
                    .iter()
                    .zip(&weights)
                    .zip(&mut outs)
                    .map(|(((rows, _), weight), out)| GroupedProduct { weight, rows: rows.clone(), out })
                    .collect();
                let mut scratch = MatmulScratch::default();
                compute.matmul_grouped(&mut scratch, &x, &mut products);
                for (((rows, n), weight), out) in parts.iter().zip(&weights).zip(&outs) {
                    let mut alone = vec![f32::NAN; out.len()];
                    let own = &x[rows.start * cols..rows.end * cols];
                    compute.matmul(&mut scratch, own, &mut [Product { weight, out: &mut alone }]);
                    let same = alone.iter().zip(out).all(|(a, b)| a.to_bits() == b.to_bits() && !a.is_nan());
                    assert!(same, "{isa}, {threads} threads, {dtype}, {n} outputs of rows {rows:?}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn rows_in_part_the_same_are_refused() {
        let compute = Compute::new(1, Isa::Portable);
        let w = weight(&compute, DType::F32, 2, 4, 0);
        let (mut a, mut b) = ([0.0; 4], [0.0; 4]);
        let of = |rows, out| GroupedProduct { weight: &w, rows, out };
        let mut products = [of(0..2, &mut a[..]), of(1..3, &mut b[..])];
        compute.matmul_grouped(&mut MatmulScratch::default(), &[0.0; 12], &mut products);
    }
}
