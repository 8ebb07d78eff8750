//! Runs: cut off at any step they go on with the same numbers; a learning rate that diverges is said; the best adapter by
//! validation is kept; a label can be learnt.

use std::path::{Path, PathBuf};

use qwenkit_formats::ModelFiles;
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Model, Tape};
use qwenkit_tensor::TokenId;
use qwenkit_train::{
    AdamW, AdapterShape, Curve, Error, Example, Goal, Happening, Learner, Lessons, Packed, Pair, Place, Precision,
    RunSettings, Schedule, StepSettings, USUAL_TARGETS, references, run, validate,
};

fn model(compute: &Compute) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/parity/qwen2");
    Model::load(&ModelFiles::open(&path).unwrap(), compute, &mut |_| {}).unwrap()
}

fn shape(labels: Option<usize>) -> AdapterShape {
    let targets = USUAL_TARGETS.map(str::to_owned).to_vec();
    AdapterShape { rank: 4, alpha: 8.0, rslora: false, dora: false, targets, from_layer: 0, labels }
}

fn settings(rate: f64, steps: usize) -> RunSettings {
    RunSettings {
        schedule: Schedule { rate, curve: Curve::Cosine, warmup_steps: 2, steps },
        batch: 3,
        seed: 5,
        step: StepSettings { optimiser: AdamW::default(), clip: Some(1.0), piece_tokens: 25 },
        validate_every: 4,
        patience: None,
        checkpoint_every: 3,
    }
}

/// Sequences that count on, each from another number by another step, with the second half learnt.
fn counting(count: usize) -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..12 + i % 5).map(|t| TokenId(((20 + 7 * i + t * (1 + i % 3)) % 300) as u32)).collect(),
        goal: Goal::Tokens((0..12 + i % 5).map(|t| t >= 6).collect()),
    };
    (0..count).map(example).collect()
}

/// Texts of which the third token says the label.
fn labelled(count: usize) -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..5 + i % 4)
            .map(|t| TokenId(if t == 2 { 40 + (i % 3) as u32 } else { (100 + i * 13 + t * 5) as u32 % 300 }))
            .collect(),
        goal: Goal::Label((i % 3) as u32),
    };
    (0..count).map(example).collect()
}

fn place(folder: &Path) -> Place {
    Place { checkpoint: PathBuf::from(folder).join("checkpoint.safetensors"), identity: "this run".to_owned() }
}

#[test]
fn a_run_that_was_cut_off_goes_on_with_the_same_numbers() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), counting(16));
    let examples = all.split_at(13);
    let learner = || Learner::new(&model, &compute, shape(None).start(model.plan(), 1).unwrap(), false);
    let losses = |learner: &mut Learner<'_>, folder: &Path, resume: bool, stop: usize| {
        let mut losses = Vec::new();
        let outcome = run(
            learner,
            (examples.0.into(), examples.1.into()),
            &settings(1e-2, 14),
            Some(&place(folder)),
            resume,
            &mut |happening| {
                if let Happening::Step { step, report, .. } = happening {
                    losses.push((step, report.loss.to_bits()));
                    return step < stop;
                }
                true
            },
        );
        assert_eq!(outcome.is_err(), stop < 20, "{outcome:?}");
        losses
    };
    let whole_folder = tempfile::tempdir().unwrap();
    let mut whole = learner();
    let expected = losses(&mut whole, whole_folder.path(), false, 20);
    assert_eq!(expected.len(), 14);
    for stop in [1, 4, 5, 13] {
        let folder = tempfile::tempdir().unwrap();
        let mut found = losses(&mut learner(), folder.path(), false, stop);
        let mut second = learner();
        found.extend(losses(&mut second, folder.path(), true, 20));
        assert_eq!(found, expected, "stopped after step {stop}");
        assert!(second.values() == whole.values(), "stopped after step {stop}");
    }
}

/// AdamW with moments in 8 bits learns as with f32, and goes on exactly from its checkpoint.
#[test]
fn moments_in_8_bits_learn_alike_and_go_on_exactly() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), counting(16));
    let examples = all.split_at(13);
    let trained = |precision: Precision, stops: &[usize]| {
        let folder = tempfile::tempdir().unwrap();
        for (i, stop) in stops.iter().enumerate() {
            let mut learner = Learner::new(&model, &compute, shape(None).start(model.plan(), 1).unwrap(), false);
            learner.keep_moments_in(precision);
            let (mut last, lessons) = (0.0, (examples.0.into(), [][..].into()));
            let place = place(folder.path());
            let outcome = run(&mut learner, lessons, &settings(1e-2, 40), Some(&place), i > 0, &mut |happening| {
                let Happening::Step { step, report, .. } = happening else { return true };
                last = report.loss;
                step < *stop
            });
            if outcome.is_ok() {
                return (last, learner.values().to_vec());
            }
        }
        panic!("the last call goes to the end");
    };
    let start = shape(None).start(model.plan(), 1).unwrap();
    let (exact_loss, exact) = trained(Precision::F32, &[99]);
    let (loss, values) = trained(Precision::Bits8, &[99]);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = values.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
    let way: f64 = exact.iter().zip(start.values()).map(|(a, b)| square(a - b)).sum();
    let apart = (off / way).sqrt();
    assert!(apart > 0.0 && apart < 0.2, "{apart} of the way apart");
    assert!((loss - exact_loss).abs() < 0.1 * exact_loss, "{loss} and {exact_loss}");
    assert!(trained(Precision::Bits8, &[2, 17, 99]) == (loss, values));
}

#[test]
fn the_best_by_validation_is_kept_and_a_run_without_progress_ends() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), counting(16));
    let mut learner = Learner::new(&model, &compute, shape(None).start(model.plan(), 1).unwrap(), false);
    let mut settings = RunSettings { validate_every: 1, patience: Some(2), ..settings(0.1, 60) };
    settings.step.clip = None;
    let (mut seen, mut early) = (Vec::new(), None);
    let outcome = run(&mut learner, (all[..13].into(), all[13..].into()), &settings, None, false, &mut |happening| {
        match happening {
            Happening::Validation { outcome, .. } => seen.push(outcome.loss),
            Happening::EarlyStop { step } => early = Some(step),
            _ => {}
        }
        true
    })
    .unwrap();
    let best = seen.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(outcome.loss, best, "{seen:?}");
    assert_eq!(early, Some(seen.len()), "a rate so high overshoots: {seen:?}");
    assert_eq!(validate(&mut learner, &all[13..], 1000).unwrap().loss, best);
}

#[test]
fn a_rate_that_diverges_is_said() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), counting(12));
    let mut learner = Learner::new(&model, &compute, shape(None).start(model.plan(), 1).unwrap(), false);
    let error = run(&mut learner, (all[..].into(), [][..].into()), &settings(1e30, 40), None, false, &mut |_| true)
        .unwrap_err();
    let message = error.to_string();
    // A fifth of the highest rate, not of the step's.
    assert!(
        matches!(error, Error::Diverged { hint, .. } if hint == 1e30 / 5.0) && message.contains("--lr"),
        "{message}"
    );
}

/// What is measured before a run of preferences is kept as far as it has come, of this run alone.
#[test]
fn measuring_that_was_stopped_goes_on_where_it_was() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), counting(16));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("references.safetensors");
    let mut learner = Learner::new(&model, &compute, shape(None).start(model.plan(), 1).unwrap(), false);
    let mut measured = |identity: &str, stop: usize| {
        let mut told = Vec::new();
        let leads = references(&mut learner, &all, 40, (&path, identity), &mut |done| {
            told.push(done);
            done < stop
        });
        (leads, told)
    };
    let (stopped, told) = measured("this run", 3);
    assert!(matches!(stopped, Err(Error::StoppedBefore { done: 3, pairs: 8 })), "{stopped:?}");
    assert_eq!(told, [0, 1, 2, 3]);
    let (rest, told) = measured("this run", 99);
    assert_eq!(told, [3, 4, 5, 6, 7, 8]);
    let (again, told) = measured("this run", 99);
    assert!(told.is_empty(), "all was there");
    let (anew, told) = measured("another run", 99);
    assert_eq!(told.first(), Some(&0), "another run's is not taken");
    let bits = |leads: Result<Vec<f64>, Error>| -> Vec<u64> { leads.unwrap().iter().map(|x| x.to_bits()).collect() };
    let (rest, again, anew) = (bits(rest), bits(again), bits(anew));
    assert!(rest == anew && again == anew && rest.len() == 8);
}

#[test]
fn preferences_that_diverge_are_said_and_what_is_no_number_ends() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), counting(12));
    let mut learner = Learner::new(&model, &compute, shape(None).start(model.plan(), 1).unwrap(), false);
    let pair =
        |[chosen, rejected]: &[Example; 2]| Pair { chosen: chosen.clone(), rejected: rejected.clone(), reference: 0.0 };
    let pairs: Vec<Pair> = all.as_chunks().0.iter().map(pair).collect();
    let lessons = Lessons::Pairs { pairs: &pairs, beta: 0.1 };
    let mut settings = settings(1e30, 40);
    settings.step.clip = None;
    let error = run(&mut learner, (lessons, [][..].into()), &settings, None, false, &mut |_| true).unwrap_err();
    assert!(matches!(error, Error::Diverged { .. }), "{error}");
    // A gradient is not asked for where the loss is no number, and says so itself where the scale is none.
    learner.change(|values| values.fill(f32::NAN));
    let report = learner.preference_gradients(&pairs.iter().collect::<Vec<_>>(), 0.1, 100).unwrap();
    assert!(report.loss.is_nan() && report.grad_norm.is_nan(), "{report:?}");
    let (mut tape, mut losses) = (Tape::new(&model, false), Vec::new());
    let adapter = shape(None).start(model.plan(), 1).unwrap();
    let mut grads = vec![0.0; adapter.values().len()];
    let packed = Packed::new(&all[..3], f32::NAN);
    model.learn(&compute, &adapter, &packed.lesson(), &mut tape, &mut losses, Some(&mut grads)).unwrap();
    assert!(losses.iter().all(|loss| loss.is_finite()) && grads.iter().any(|grad| grad.is_nan()));
}

#[test]
fn labels_are_learnt() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let (model, all) = (model(&compute), labelled(30));
    let mut learner = Learner::new(&model, &compute, shape(Some(3)).start(model.plan(), 1).unwrap(), true);
    let before = validate(&mut learner, &all, 64).unwrap();
    assert!((before.loss - 3f64.ln()).abs() < 1e-6, "{before:?}");
    run(&mut learner, (all[..].into(), [][..].into()), &settings(1e-2, 120), None, false, &mut |_| true).unwrap();
    let after = validate(&mut learner, &all, 64).unwrap();
    assert!(after.right.is_some_and(|right| right > 0.9) && after.loss < 0.3, "{after:?}");
}
