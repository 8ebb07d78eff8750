//! What the head's loss takes is never more than was reckoned, be a row's shares few or all alike; and rows for which there is no
//! room together have the same results one by one. A test binary of its own: nothing else may allocate while it measures.

use peak_alloc::PeakAlloc;
use qwenkit_kernels::{Compute, HeadLoss, Isa, MatmulScratch, Weight, quantize_row};
use qwenkit_tensor::DType;

#[global_allocator]
static PEAK: PeakAlloc = PeakAlloc;

const WIDTH: usize = 32;

fn wave(n: usize, size: f32) -> Vec<f32> {
    (0..n).map(|i| size * ((i as f32 * 0.77 + 0.3).sin() + 0.3 * (i as f32 * 0.01).cos())).collect()
}

fn head(compute: &Compute, dtype: DType, vocab: usize) -> Weight {
    let row_bytes = dtype.row_bytes(WIDTH).unwrap();
    let mut bytes = vec![0; vocab * row_bytes];
    for (values, bytes) in wave(vocab * WIDTH, 0.3).chunks_exact(WIDTH).zip(bytes.chunks_exact_mut(row_bytes)) {
        quantize_row(dtype, values, None, bytes);
    }
    Weight::from_bytes(compute.pool(), dtype, vocab, WIDTH, &bytes).unwrap()
}

#[test]
fn no_more_is_taken_than_was_reckoned() {
    // Of 30,000 shares that are alike every one counts.
    let (vocab, rows) = (30_000, 40);
    let targets: Vec<u32> = (0..rows as u32).map(|i| i * 700).collect();
    for threads in [1, 3] {
        let compute = Compute::new(threads, Isa::detect().unwrap());
        for dtype in [DType::F32, DType::BF16, DType::Q8_0] {
            let head = head(&compute, dtype, vocab);
            for size in [1e-3, 4.0, 40.0] {
                let x = wave(rows * WIDTH, size);
                let run = |rows: std::ops::Range<usize>| {
                    let loss = HeadLoss { head: &head, targets: &targets[rows.clone()], scale: 1.0 };
                    let (mut losses, mut dx) = (vec![0.0; rows.len()], vec![0.0; rows.len() * WIDTH]);
                    let x = &x[rows.start * WIDTH..rows.end * WIDTH];
                    let mut scratch = MatmulScratch::default();
                    PEAK.reset_peak_usage();
                    let before = PEAK.current_usage();
                    compute.head_loss(&mut scratch, &loss, x, &mut losses, Some(&mut dx));
                    let taken = (PEAK.peak_usage() - before).saturating_sub(scratch.held_bytes());
                    let reckoned = HeadLoss::bytes(&head, rows.len(), threads);
                    assert!(taken <= reckoned, "{dtype}, {size}, {rows:?}: {taken} bytes, {reckoned} reckoned");
                    (losses, dx)
                };
                let (losses, dx) = run(0..rows);
                let (first, second) = (run(0..7), run(7..rows));
                assert!(
                    losses == [first.0, second.0].concat() && dx == [first.1, second.1].concat(),
                    "{dtype}, {size}"
                );
            }
        }
    }
}
