//! Training held against PyTorch and PEFT: first loss, every gradient, the losses of eight steps and the trained adapter of
//! recorded cases, however much of the forward pass is kept; and the same bits on any number of threads and for any cut.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use qwenkit_formats::{Adapter as AdapterFile, AdapterSettings, ModelFiles, SafetensorsFile, read_safetensors_file};
use qwenkit_kernels::{Compute, Isa};
use qwenkit_models::{Adapter, LessonSize, LoraShape, Model, Module, Tape};
use qwenkit_tensor::TokenId;
use qwenkit_train::{AdamW, Example, Goal, Learner, Packed, Pair, StepSettings};

/// Those with magnitudes (DoRA) are of layers 0 and 3 of the same checkpoints.
const CASES: [&str; 7] = ["qwen2", "qwen2-tied", "qwen3", "qwen3-moe", "qwen3.5", "qwen2-dora", "qwen3.5-dora"];
const RATE: f64 = 1e-2;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(path)
}

struct Case {
    model: Model,
    file: AdapterFile,
    record: SafetensorsFile,
    examples: Vec<Example>,
}

impl Case {
    fn open(name: &str, compute: &Compute) -> Case {
        let model = name.strip_suffix("-dora").unwrap_or(name);
        let files = ModelFiles::open(&fixture(&format!("parity/{model}"))).unwrap();
        let record = read_safetensors_file(&fixture(&format!("parity-train/{name}/train.safetensors"))).unwrap();
        let numbers = |tensor: &str| -> Vec<i64> {
            bytes(&record, tensor).as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
        };
        let len = record.tensor("input_ids").unwrap().shape[1];
        let (ids, labels) = (numbers("input_ids"), numbers("labels"));
        let example = |(ids, labels): (&[i64], &[i64])| Example {
            ids: ids.iter().map(|id| TokenId(*id as u32)).collect(),
            goal: Goal::Tokens(labels.iter().map(|label| *label >= 0).collect()),
        };
        Case {
            model: Model::load(&files, compute, &mut |_| {}).unwrap(),
            file: AdapterFile::open(&fixture(&format!("parity-train/{name}/adapter_init"))).unwrap(),
            examples: ids.chunks(len).zip(labels.chunks(len)).map(example).collect(),
            record,
        }
    }

    fn learner<'a>(&'a self, compute: &'a Compute, sparing: bool) -> Learner<'a> {
        let adapter = Adapter::of_file(self.model.plan(), &self.file).unwrap();
        Learner::new(&self.model, compute, adapter, sparing)
    }

    /// The largest `‖a-b‖/‖b‖` of the recorded tensors whose names begin with `kind`, and how many there are.
    fn apart(&self, learner: &Learner<'_>, kind: &str, values: &[f32]) -> (f64, usize) {
        let file = learner.adapter().to_file(self.model.plan(), values, AdapterSettings::default());
        let (mut worst, mut count) = (0.0f64, 0);
        for m in &file.modules {
            let magnitude = m.magnitude.iter().map(|magnitude| ("lora_magnitude_vector", magnitude));
            for (part, found) in [("lora_A", &m.a), ("lora_B", &m.b)].into_iter().chain(magnitude) {
                let name = format!("{kind}.base_model.model.{}.{part}.weight", m.name);
                if self.record.tensor(&name).is_none() {
                    continue;
                }
                let expected = f32s(&self.record, &name);
                assert_eq!(expected.len(), found.len(), "{name}");
                let square = |x: f32| f64::from(x) * f64::from(x);
                let difference: f64 = found.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
                let length: f64 = expected.iter().map(|x| square(*x)).sum();
                worst = worst.max((difference / length).sqrt());
                count += 1;
            }
        }
        (worst, count)
    }
}

fn bytes(file: &SafetensorsFile, name: &str) -> Vec<u8> {
    let info = file.tensor(name).unwrap_or_else(|| panic!("no `{name}`"));
    let mut bytes = vec![0; info.len_bytes];
    file.read(info, 0, &mut bytes).unwrap();
    bytes
}

fn f32s(file: &SafetensorsFile, name: &str) -> Vec<f32> {
    bytes(file, name).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn settings(piece_tokens: usize) -> StepSettings {
    StepSettings { optimiser: AdamW { weight_decay: 0.01, ..AdamW::default() }, clip: None, piece_tokens }
}

#[test]
fn losses_gradients_and_trained_adapters_are_those_of_pytorch() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for name in CASES {
        let case = Case::open(name, &compute);
        let batch: Vec<&Example> = case.examples.iter().collect();
        for sparing in [false, true] {
            let mut learner = case.learner(&compute, sparing);
            let first = learner.gradients(&batch, usize::MAX).unwrap();
            let expected = f64::from(f32s(&case.record, "losses")[0]);
            assert!((first.loss - expected).abs() < 1e-5, "{name}: first loss {}, expected {expected}", first.loss);
            let (apart, count) = case.apart(&learner, "grad", &learner.grads);
            let parts = if name.ends_with("-dora") { 3 } else { 2 };
            let all = parts * learner.adapter().loras().len();
            assert!(apart < 1e-4 && count == all, "{name}: {count} gradients {apart:e}");
            // One sequence at a time gives the same up to the order of sums.
            for (step, expected) in f32s(&case.record, "losses").into_iter().enumerate() {
                let report = learner.step(&batch, RATE, &settings(if sparing { 40 } else { usize::MAX })).unwrap();
                let difference = (report.loss - f64::from(expected)).abs();
                assert!(difference < 1e-3, "{name}: loss {} at step {step}, expected {expected}", report.loss);
            }
            let (apart, count) = case.apart(&learner, "final", learner.values());
            assert!(apart < 1e-2 && count > 4, "{name}: {count} trained tensors {apart:e}");
        }
    }
}

#[test]
fn a_step_has_the_same_bits_on_any_number_of_threads_and_whatever_is_kept() {
    for isa in Isa::available() {
        let mut found: BTreeMap<&str, (Vec<u32>, String)> = BTreeMap::new();
        for (threads, sparing, name) in [
            (1, false, "qwen3"),
            (3, false, "qwen3"),
            (2, true, "qwen3"),
            (1, false, "qwen2-dora"),
            (3, true, "qwen2-dora"),
        ] {
            let compute = Compute::new(threads, isa);
            let case = Case::open(name, &compute);
            let batch: Vec<&Example> = case.examples.iter().collect();
            let mut learner = case.learner(&compute, sparing);
            for _ in 0..2 {
                learner.step(&batch, RATE, &settings(usize::MAX)).unwrap();
            }
            let bits: Vec<u32> = learner.values().iter().map(|x| x.to_bits()).collect();
            let what = format!("{name}, {isa}, {threads} threads, sparing: {sparing}");
            let (first, of) = found.entry(name).or_insert_with(|| (bits.clone(), what.clone()));
            assert!(bits == *first, "{what} differs from {of}");
        }
    }
}

/// A mixture's shared expert is recorded nowhere: along each module's gradient the loss has to change as the gradient says. With
/// magnitudes that is true while the lengths stay what they are, as gradients take them for constants.
#[test]
fn losses_of_mixtures_with_a_shared_expert_change_as_their_gradients_say() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for (name, magnitudes) in [("qwen2-moe", false), ("qwen3.5-moe", false), ("qwen3.5-moe", true)] {
        let files = ModelFiles::open(&fixture(&format!("parity/{name}"))).unwrap();
        let model = Model::load(&files, &compute, &mut |_| {}).unwrap();
        let shape = |(layer, module): (usize, Module)| LoraShape { layer, module, rank: 2, scale: 1.0, magnitudes };
        let places = (0..model.plan().layers.len()).flat_map(|layer| Module::ALL.map(|module| (layer, module)));
        let shapes: Vec<LoraShape> =
            places.filter(|(layer, module)| module.shape(model.plan(), *layer).is_some()).map(shape).collect();
        assert!(shapes.iter().any(|shape| shape.module == Module::SharedDownProj), "{name}");
        let made = || {
            let mut adapter = Adapter::zeroed(model.plan(), &shapes, None).unwrap();
            for (i, x) in adapter.values_mut().iter_mut().enumerate() {
                *x = 0.1 * (i as f32 * 0.73 + 0.4).sin();
            }
            model.set_magnitudes(&compute, &mut adapter);
            for range in adapter.loras().to_vec().iter().filter_map(|lora| lora.magnitudes()) {
                let magnitudes = adapter.values_mut()[range].iter_mut().enumerate();
                magnitudes.for_each(|(i, x)| *x *= 1.0 + 0.3 * (i as f32 * 1.9).sin());
            }
            adapter
        };
        // With lengths in the place of magnitudes.
        let measured = |values: &[f32]| {
            let mut adapter = Adapter::zeroed(model.plan(), &shapes, None).unwrap();
            adapter.values_mut().copy_from_slice(values);
            model.set_magnitudes(&compute, &mut adapter);
            adapter.values().to_vec()
        };
        let adapter = made();
        let example = |seed: usize| Example {
            ids: (0..24).map(|i| TokenId(((i * 31 + seed * 97) % 300) as u32)).collect(),
            goal: Goal::Tokens(vec![true; 24]),
        };
        let examples = [example(1), example(2)];
        let batch: Vec<&Example> = examples.iter().collect();
        for sparing in if magnitudes { &[true][..] } else { &[false, true] } {
            let mut learner = Learner::new(&model, &compute, made(), *sparing);
            learner.gradients(&batch, usize::MAX).unwrap();
            let grads = learner.grads.clone();
            for lora in adapter.loras() {
                let own = lora.values();
                let length = own.clone().map(|i| f64::from(grads[i]).powi(2)).sum::<f64>().sqrt();
                let what = format!("{name}, {magnitudes}, layer {}, {:?}, sparing: {sparing}", lora.layer, lora.module);
                assert!(length > 0.0, "{what}");
                let before = measured(adapter.values());
                let mut loss = |by: f64| {
                    let mut values = adapter.values().to_vec();
                    own.clone().for_each(|i| values[i] += (by * f64::from(grads[i]) / length) as f32);
                    let after = measured(&values);
                    for i in lora.magnitudes().into_iter().flatten() {
                        values[i] *= after[i] / before[i];
                    }
                    learner.change(|own| own.copy_from_slice(&values));
                    learner.gradients(&batch, usize::MAX).unwrap().loss
                };
                // The nearest of the slopes of the middle and both sides: on one side a token may go to another expert, where
                // the loss has a step.
                let by = 5e-4;
                let (here, above, below) = (loss(0.0), loss(by), loss(-by));
                let slopes = [(above - below) / (2.0 * by), (above - here) / by, (here - below) / by];
                let off = slopes.map(|slope| (slope - length).abs()).into_iter().fold(f64::INFINITY, f64::min);
                assert!(off <= 0.02 * length + 4e-3, "{what}: slopes {slopes:?}, gradient {length}");
            }
        }
    }
}

/// What is reckoned beforehand is no less than what a step then holds, and no more than a few times that.
#[test]
fn tapes_hold_no_more_than_was_reckoned() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for name in ["qwen2", "qwen3-moe", "qwen3.5", "qwen2-moe", "qwen3.5-moe"] {
        let files = ModelFiles::open(&fixture(&format!("parity/{name}"))).unwrap();
        let model = Model::load(&files, &compute, &mut |_| {}).unwrap();
        let layers = 0..model.plan().layers.len();
        let places = layers.flat_map(|layer| Module::ALL.map(|module| (layer, module)));
        let shapes: Vec<LoraShape> = places
            .filter(|(layer, module)| module.shape(model.plan(), *layer).is_some())
            .map(|(layer, module)| LoraShape { layer, module, rank: 8, scale: 1.0, magnitudes: name.contains("3.5") })
            .collect();
        let mut adapter = Adapter::zeroed(model.plan(), &shapes, None).unwrap();
        model.set_magnitudes(&compute, &mut adapter);
        for (lens, sparing) in
            [(vec![700], false), (vec![700], true), (vec![10; 60], false), (vec![300, 1, 200], false)]
        {
            let example = |len: usize| Example {
                ids: (0..len).map(|i| TokenId((i * 31 % 300) as u32)).collect(),
                goal: Goal::Tokens(vec![true; len]),
            };
            let examples: Vec<Example> = lens.iter().map(|len| example(*len)).collect();
            let packed = Packed::new(&examples, 1.0);
            let mut tape = Tape::new(&model, sparing);
            let mut grads = vec![0.0; adapter.values().len()];
            model.learn(&compute, &adapter, &packed.lesson(), &mut tape, &mut Vec::new(), Some(&mut grads)).unwrap();
            let tokens = lens.iter().sum();
            let size = LessonSize { tokens, seqs: lens.len(), wanted: tokens - lens.len(), threads: 2 };
            let (reckoned, held) = (Tape::bytes(&model, &adapter, sparing, size), tape.held_bytes());
            assert!(held <= reckoned, "{name}, {lens:?}, sparing: {sparing}: {held} of {reckoned}");
            assert!(reckoned <= 6 * held, "{name}, {lens:?}, sparing: {sparing}: {held} of {reckoned}");
        }
    }
}

/// DPO's loss along its gradient, module by module, and what a few steps do to it.
#[test]
fn preferences_are_learnt_along_their_gradients() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let case = Case::open("qwen2", &compute);
    let answer = |seed: usize, len: usize| Example {
        ids: (0..9 + len).map(|i| TokenId(if i < 9 { i * 17 } else { (i * 31 + seed * 97) % 300 } as u32)).collect(),
        goal: Goal::Tokens((0..9 + len).map(|i| i >= 9).collect()),
    };
    let answers = [answer(1, 7), answer(2, 12), answer(3, 5), answer(4, 5)];
    let beta = 0.3;
    for sparing in [false, true] {
        let mut learner = case.learner(&compute, sparing);
        let start = learner.values().to_vec();
        // Measured under an adapter beside, so that margins are not zero.
        learner.change(|values| {
            values.iter_mut().enumerate().for_each(|(i, x)| *x += 0.02 * (i as f32 * 0.7).sin());
        });
        let references = learner.leads(&answers.iter().collect::<Vec<_>>(), 20).unwrap();
        learner.change(|values| values.copy_from_slice(&start));
        let pairs: Vec<Pair> = answers
            .as_chunks()
            .0
            .iter()
            .zip(references)
            .map(|([chosen, rejected], reference)| Pair {
                chosen: chosen.clone(),
                rejected: rejected.clone(),
                reference,
            })
            .collect();
        let batch: Vec<&Pair> = pairs.iter().collect();
        let first = learner.preference_gradients(&batch, beta, 20).unwrap();
        let grads = learner.grads.clone();
        for lora in case.learner(&compute, sparing).adapter().loras() {
            let own: Vec<usize> = lora.a().chain(lora.b()).collect();
            let length = own.iter().map(|&i| f64::from(grads[i]).powi(2)).sum::<f64>().sqrt();
            let mut loss = |by: f64| {
                learner.change(|values| {
                    values.copy_from_slice(&start);
                    own.iter().for_each(|&i| values[i] += (by * f64::from(grads[i]) / length) as f32);
                });
                learner.preference_gradients(&batch, beta, usize::MAX).unwrap().loss
            };
            let by = 1e-2;
            let slope = (loss(by) - loss(-by)) / (2.0 * by);
            let what = format!("layer {}, {:?}: slope {slope}, gradient {length}", lora.layer, lora.module);
            assert!(length > 0.0 && (slope - length).abs() <= 0.02 * length + 1e-4, "{what}");
        }
        learner.change(|values| values.copy_from_slice(&start));
        for _ in 0..12 {
            learner.preference_step(&batch, beta, 1e-2, &settings(usize::MAX)).unwrap();
        }
        let found = learner.preferred(&batch, beta, usize::MAX).unwrap();
        let last = found.iter().map(|pair| pair.loss).sum::<f64>() / found.len() as f64;
        assert!(last < 0.5 * first.loss && found.iter().all(|pair| pair.margin > 0.0), "{} to {last}", first.loss);
    }
}
