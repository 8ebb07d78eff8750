//! Measures how long values take to become blocks, on one thread, and how near they come: nanoseconds for each value, and the
//! relative squared error, on normal values in rows of 1,024.
//!
//!     cargo run --release -p qwenkit-kernels --example encode

use std::time::Instant;

use qwenkit_kernels::{dequantize_row, quantize_row};
use qwenkit_tensor::DType;

const COLS: usize = 1024;
const ROWS: usize = 256;

fn main() {
    let mut state = 1_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 24) as f32
    };
    let values: Vec<f32> = (0..COLS * ROWS).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect();
    for dtype in DType::ALL.into_iter().filter(|t| t.is_quantized()) {
        let row_bytes = dtype.row_bytes(COLS).unwrap_or(0);
        let mut bytes = vec![0; row_bytes * ROWS];
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            for (values, bytes) in values.chunks_exact(COLS).zip(bytes.chunks_exact_mut(row_bytes)) {
                quantize_row(dtype, values, None, bytes);
            }
            best = best.min(start.elapsed().as_secs_f64());
        }
        let (mut back, mut off, mut all) = (vec![0.0; COLS], 0.0_f64, 0.0_f64);
        for (values, bytes) in values.chunks_exact(COLS).zip(bytes.chunks_exact(row_bytes)) {
            dequantize_row(dtype, bytes, &mut back);
            for (x, y) in values.iter().zip(&back) {
                off += f64::from(x - y).powi(2);
                all += f64::from(*x).powi(2);
            }
        }
        println!("{dtype}\t{:.2} ns\t{:.3e}", best * 1e9 / values.len() as f64, off / all);
    }
}
