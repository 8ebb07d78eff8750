//! Models trained whole: every tensor's gradient is the slope of the loss, steps have the same bits on any number of threads, runs go
//! on exactly, and the folder that is written answers as the model that was trained.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use qwenkit_formats::{ModelFiles, write_safetensors};
use qwenkit_kernels::{Compute, Isa, quantize_row};
use qwenkit_models::{LessonSize, Model, Tape, Whole};
use qwenkit_tensor::{DType, TokenId};
use qwenkit_train::{
    AdamW, Curve, Error, Example, Goal, Happening, Learner, Packed, Place, Precision, RunSettings, Schedule,
    StepSettings, run, validate, write_model,
};

/// With biases; with one table as embedding and head; with norms of queries and keys.
const CASES: [&str; 3] = ["qwen2", "qwen2-tied", "qwen3"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity").join(name)
}

fn learner<'a>(path: &Path, compute: &'a Compute, sparing: bool) -> Learner<'a> {
    let mut model = Model::load_plain(&ModelFiles::open(path).unwrap(), compute, &mut |_| {}).unwrap();
    let whole = Whole::of(&mut model).unwrap();
    Learner::whole(model, whole, compute, sparing)
}

/// The fixture with its weights in BF16.
fn in_bf16(name: &str, to: &Path) {
    let files = ModelFiles::open(&fixture(name)).unwrap();
    let mut tensors = Vec::new();
    for info in files.tensors() {
        let mut data = vec![0; info.len_bytes];
        files.read(info, 0, &mut data).unwrap();
        let values: Vec<f32> = data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let mut bytes = vec![0; 2 * values.len()];
        quantize_row(DType::BF16, &values, None, &mut bytes);
        tensors.push((info.name.clone(), info.shape.clone(), bytes));
    }
    let list: Vec<_> = tensors.iter().map(|(name, shape, b)| (&name[..], DType::BF16, &shape[..], &b[..])).collect();
    write_safetensors(&to.join("model.safetensors"), &list, &BTreeMap::new()).unwrap();
    fs::copy(fixture(name).join("config.json"), to.join("config.json")).unwrap();
}

fn examples(count: usize) -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..14 + i % 5).map(|t| TokenId(((20 + 7 * i + t * (1 + i % 3)) % 300) as u32)).collect(),
        goal: Goal::Tokens((0..14 + i % 5).map(|t| t >= 5).collect()),
    };
    (0..count).map(example).collect()
}

fn settings(steps: usize) -> RunSettings {
    RunSettings {
        schedule: Schedule { rate: 3e-3, curve: Curve::Cosine, warmup_steps: 1, steps },
        batch: 3,
        seed: 5,
        step: StepSettings { optimiser: AdamW::default(), clip: Some(1.0), piece_tokens: 40 },
        validate_every: 4,
        patience: None,
        checkpoint_every: 2,
    }
}

#[test]
fn losses_change_as_the_gradients_of_every_tensor_say() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let all = examples(3);
    let batch: Vec<&Example> = all.iter().collect();
    for name in CASES {
        for sparing in [false, true] {
            let mut learner = learner(&fixture(name), &compute, sparing);
            learner.gradients(&batch, 40).unwrap();
            let (grads, start) = (learner.grads.clone(), learner.values().to_vec());
            let tensors = learner.layout().unwrap().tensors().to_vec();
            let count: usize = tensors.iter().map(|tensor| tensor.range.len()).sum();
            assert_eq!((count, start.len()), (grads.len(), grads.len()), "{name}");
            for tensor in &tensors {
                let own = &grads[tensor.range.clone()];
                let length = own.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let mut loss = |by: f64| {
                    learner.change(|values| {
                        values.copy_from_slice(&start);
                        let values = &mut values[tensor.range.clone()];
                        values.iter_mut().zip(own).for_each(|(x, d)| *x += (by * f64::from(*d) / length) as f32);
                    });
                    let mut sum = 0.0;
                    learner
                        .evaluate(&batch, usize::MAX, &mut |_, losses, _| {
                            sum += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
                        })
                        .unwrap();
                    sum / all.iter().map(Example::wanted).sum::<usize>() as f64
                };
                // So far that the loss changes well above its rounding, and is still near a line.
                let by = 1e-2 / length.max(1.0);
                let slope = (loss(by) - loss(-by)) / (2.0 * by);
                let what = format!("{name}, {}, sparing: {sparing}: slope {slope}, gradient {length}", tensor.name);
                // A bias of keys moves all scores of a query alike, and so nothing but what rotation tells apart.
                assert!(length > 0.0 && (slope - length).abs() <= 0.02 * length + 3e-4, "{what}");
            }
        }
    }
}

#[test]
fn steps_have_the_same_bits_on_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    in_bf16("qwen3", folder.path());
    let all = examples(4);
    let batch: Vec<&Example> = all.iter().collect();
    for isa in Isa::available() {
        for path in [fixture("qwen3"), folder.path().to_owned()] {
            let trained = |threads: usize| {
                let compute = Compute::new(threads, isa);
                let mut learner = learner(&path, &compute, false);
                for _ in 0..2 {
                    learner.step(&batch, 1e-3, &settings(1).step).unwrap();
                }
                learner.values().iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            assert!(trained(1) == trained(3), "{isa}, {path:?}");
        }
    }
}

#[test]
fn a_run_goes_on_exactly_and_its_folder_answers_as_it_did() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let base = tempfile::tempdir().unwrap();
    in_bf16("qwen2-tied", base.path());
    let all = examples(14);
    let trained = |precision: Precision, stops: &[usize], out: Option<&Path>| {
        let folder = tempfile::tempdir().unwrap();
        let place = Place { checkpoint: folder.path().join("c.safetensors"), identity: "this run".to_owned() };
        for (i, stop) in stops.iter().enumerate() {
            let mut learner = learner(base.path(), &compute, false);
            learner.keep_moments_in(precision);
            let before = validate(&mut learner, &all[11..], 1000).unwrap().loss;
            let lessons = (all[..11].into(), all[11..].into());
            let outcome = run(
                &mut learner,
                lessons,
                &settings(12),
                Some(&place),
                i > 0,
                &mut |happening| !matches!(happening, Happening::Step { step, .. } if step == *stop),
            );
            match outcome {
                Err(Error::Stopped { .. }) => continue,
                other => {
                    let loss = other.unwrap().loss;
                    assert!(loss < before - 0.2, "{before} to {loss}");
                }
            }
            if let Some(out) = out {
                fs::copy(base.path().join("config.json"), out.join("config.json")).unwrap();
                write_model(learner.layout().unwrap(), learner.values(), out).unwrap();
            }
            return (validate(&mut learner, &all, 1000).unwrap(), learner.values().to_vec());
        }
        panic!("the last call goes to the end");
    };
    for precision in [Precision::F32, Precision::Bits8] {
        let out = tempfile::tempdir().unwrap();
        let whole = trained(precision, &[99], Some(out.path()));
        assert!(trained(precision, &[1, 7, 99], None) == whole, "{precision:?}");
        // The folder's model has the very losses.
        let files = ModelFiles::open(out.path()).unwrap();
        assert!(files.tensors().iter().all(|info| info.dtype == DType::BF16));
        assert_eq!(validate(&mut learner(out.path(), &compute, false), &all, 1000).unwrap(), whole.0);
    }
}

#[test]
fn tapes_hold_no_more_than_was_reckoned_and_others_are_refused() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for name in CASES {
        let mut model = Model::load_plain(&ModelFiles::open(&fixture(name)).unwrap(), &compute, &mut |_| {}).unwrap();
        let whole = Whole::of(&mut model).unwrap();
        for (lens, sparing) in [(vec![400], false), (vec![400], true), (vec![10; 30], false)] {
            let example = |len: &usize| Example {
                ids: (0..*len).map(|i| TokenId((i * 31 % 300) as u32)).collect(),
                goal: Goal::Tokens(vec![true; *len]),
            };
            let examples: Vec<Example> = lens.iter().map(example).collect();
            let (packed, tokens): (_, usize) = (Packed::new(&examples, 1.0), lens.iter().sum());
            let mut tape = Tape::new(&model, sparing);
            let (mut grads, mut losses) = (vec![0.0; whole.len()], Vec::new());
            model.learn_whole(&compute, &whole, &packed.lesson(), &mut tape, &mut losses, Some(&mut grads)).unwrap();
            let size = LessonSize { tokens, seqs: lens.len(), wanted: tokens - lens.len(), threads: 2 };
            let (reckoned, held) = (Tape::whole_bytes(&model, &whole, sparing, size), tape.held_bytes());
            assert!(held <= reckoned, "{name}, {lens:?}, sparing: {sparing}: {held} of {reckoned}");
        }
    }
    for name in ["qwen3-moe", "qwen3.5", "qwen2-vl"] {
        let mut model = Model::load(&ModelFiles::open(&fixture(name)).unwrap(), &compute, &mut |_| {}).unwrap();
        let message = Whole::of(&mut model).err().unwrap().to_string();
        assert!(message.contains("--method lora"), "{name}: {message}");
    }
}
