//! Times a vision tower alone: how long an image of a given size takes from patches to vectors.
//!
//! The image is noise, as what a tower computes does not depend on what it sees. Threads and instruction set are those of
//! `qwenkit run` unless `QWENKIT_ISA` or the last argument say otherwise.

use std::{
    env,
    error::Error,
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Grid, Pixels, Tower, TowerBuffers, arch};

const USAGE: &str = "\
usage: cargo run --release -p qwenkit-models --example tower-speed -- MODEL MMPROJ SIDE [THREADS]

MODEL   the text model's file, whose metadata are read
MMPROJ  the tower
SIDE    pixels of the image's side";

/// Images that are timed, behind one that warms up.
const IMAGES: usize = 5;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (model, mmproj, side, threads) = match &arguments[..] {
        [model, mmproj, side] => (model, mmproj, side.parse(), thread::available_parallelism().map_or(1, usize::from)),
        [model, mmproj, side, threads] => (model, mmproj, side.parse(), threads.parse().unwrap_or(1)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Ok(side) = side else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match measure(Path::new(model), Path::new(mmproj), side, threads) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(model: &Path, mmproj: &Path, side: usize, threads: usize) -> Result<String, Box<dyn Error>> {
    let compute = Compute::new(threads, Isa::detect()?);
    let text = ModelFiles::open(model)?;
    let plan = arch::plan(&text)?;
    let tower = Tower::load(&text, Some(&ModelFiles::open(mmproj)?), &plan, &compute, &mut |_| {})?;
    let patch = tower.plan().patch;
    let unit = patch.side * patch.merge;
    if side == 0 || !side.is_multiple_of(unit) {
        return Err(format!("an image of {side} x {side} pixels; expected a multiple of {unit}").into());
    }
    let grid = Grid { steps: 1, rows: side / patch.side, cols: side / patch.side };
    let count = grid.rows * grid.cols * patch.values();
    let values = (0..count).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect();
    let pixels = Pixels { values, grid };
    let mut buffers = TowerBuffers::default();
    let mut times = Vec::with_capacity(IMAGES);
    for image in 0..=IMAGES {
        let began = Instant::now();
        let vectors = tower.encode(&compute, &mut buffers, &pixels)?;
        if vectors.iter().any(|x| !x.is_finite()) {
            return Err("the tower gave values that are no numbers".into());
        }
        // The first one warms up.
        if image > 0 {
            times.push(began.elapsed());
        }
    }
    times.sort_unstable();
    let seconds = |time: Duration| time.as_secs_f64();
    Ok(format!(
        "{side} x {side} pixels, {} patches, {} vectors, {} blocks, {threads} threads, {}: {:.3} s (fastest {:.3}, slowest {:.3})",
        grid.rows * grid.cols,
        pixels.tokens(&patch),
        tower.plan().layers,
        compute.isa(),
        seconds(times[IMAGES / 2]),
        seconds(times[0]),
        seconds(times[IMAGES - 1]),
    ))
}
