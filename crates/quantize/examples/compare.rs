//! Measures how far the answers of models are from those of another: mean divergence, agreement, worst token.
//!
//!     cargo run --release -p qwenkit-quantize --example compare -- TEXT POSITIONS BEFORE AFTER...

use std::path::Path;

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_quantize::Prover;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [text, positions, before, after @ ..] = args.as_slice() else {
        return Err("usage: compare TEXT POSITIONS BEFORE AFTER...".into());
    };
    let text = std::fs::read_to_string(text)?;
    let threads = std::thread::available_parallelism()?.get();
    let compute = Compute::new(threads, Isa::detect()?);
    let prover = Prover { compute: &compute, text: Some(&text), limit: None, positions: positions.parse()? };
    let answers = prover.before(&ModelFiles::open(Path::new(before))?)?;
    for path in after {
        let proof = prover.compare(&answers, &ModelFiles::open(Path::new(path))?, f64::INFINITY)?;
        println!(
            "{path}\t{} tokens\tKL mean {:.6e}\tworst {:.3e} at {:?}\tsame best {:.4}",
            proof.tokens, proof.kl_mean, proof.kl_worst, proof.worst.text, proof.top1
        );
    }
    Ok(())
}
