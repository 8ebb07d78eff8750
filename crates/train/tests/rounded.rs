//! Learning over bases that are stored in BF16 or quantised, whose activations and gradients are rounded on the way: near the
//! gradients over the same values in F32, the same bits on any number of threads and behind an interruption, and no more memory than
//! was reckoned.

use std::path::Path;

use qwenkit_formats::{
    ModelFiles,
    gguf::{Metadata, TensorSpec, Value, Writer},
};
use qwenkit_kernels::{Compute, Isa, dequantize_row, quantize_row};
use qwenkit_models::{Adapter, LessonSize, Model, Tape};
use qwenkit_tensor::{DType, TokenId};
use qwenkit_train::{
    AdamW, AdapterShape, Curve, Example, Goal, Happening, Learner, Packed, Place, RunSettings, Schedule, StepSettings,
    USUAL_TARGETS, run,
};

const STORED: [DType; 3] = [DType::BF16, DType::Q8_0, DType::Q4_K];
/// Rows of whole blocks of 256, heads of 64 as the rounded attention has them.
const WIDTH: usize = 256;
const INNER: usize = 512;
const HEAD: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const VOCAB: usize = 300;
const LAYERS: usize = 3;

/// A Qwen2 whose matrices hold values of `dtype`, stored so or as F32.
fn write_base(path: &Path, dtype: DType, as_f32: bool) {
    let number = |key: &str, value: usize| (format!("qwen2.{key}"), Value::U32(value as u32));
    let mut metadata = Metadata::new(path);
    let facts = [
        ("general.architecture".to_owned(), "qwen2".into()),
        number("block_count", LAYERS),
        number("context_length", 512),
        number("embedding_length", WIDTH),
        number("feed_forward_length", INNER),
        number("attention.head_count", HEADS),
        number("attention.head_count_kv", KV_HEADS),
        number("attention.key_length", HEAD),
        number("attention.value_length", HEAD),
        ("qwen2.rope.freq_base".to_owned(), Value::F32(10_000.0)),
        ("qwen2.attention.layer_norm_rms_epsilon".to_owned(), Value::F32(1e-6)),
    ];
    facts.into_iter().for_each(|(key, value)| metadata.set(&key, value));
    let (q, kv) = (HEADS * HEAD, KV_HEADS * HEAD);
    let mut shapes = vec![("token_embd.weight".to_owned(), vec![VOCAB, WIDTH])];
    for i in 0..LAYERS {
        shapes.extend(
            [
                ("attn_norm.weight", &[WIDTH][..]),
                ("attn_q.weight", &[q, WIDTH]),
                ("attn_k.weight", &[kv, WIDTH]),
                ("attn_v.weight", &[kv, WIDTH]),
                ("attn_output.weight", &[WIDTH, q]),
                ("attn_q.bias", &[q]),
                ("attn_k.bias", &[kv]),
                ("attn_v.bias", &[kv]),
                ("ffn_norm.weight", &[WIDTH]),
                ("ffn_gate.weight", &[INNER, WIDTH]),
                ("ffn_up.weight", &[INNER, WIDTH]),
                ("ffn_down.weight", &[WIDTH, INNER]),
            ]
            .map(|(name, shape)| (format!("blk.{i}.{name}"), shape.to_vec())),
        );
    }
    shapes.extend([("output_norm.weight".to_owned(), vec![WIDTH]), ("output.weight".to_owned(), vec![VOCAB, WIDTH])]);
    let spec = |(name, shape): &(String, Vec<usize>)| {
        let dtype = if shape.len() == 1 || as_f32 { DType::F32 } else { dtype };
        TensorSpec { name: name.clone(), dtype, shape: shape.clone() }
    };
    let specs: Vec<_> = shapes.iter().map(spec).collect();
    let mut writer = Writer::create(path, &metadata, &specs).unwrap();
    for (i, (name, shape)) in shapes.iter().enumerate() {
        let (count, size) = (shape.iter().product(), if shape.len() == 1 { 0.2 } else { 0.09 });
        let wave = |j: usize| size * ((j as f32 * 0.737 + i as f32).sin() + (j as f32 * 1.931 - i as f32).cos());
        let mut values: Vec<f32> = (0..count).map(wave).collect();
        let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let stored = match &shape[..] {
            [_, cols] => {
                let row_bytes = dtype.row_bytes(*cols).unwrap();
                let mut stored = vec![0; count / cols * row_bytes];
                for (values, row) in values.chunks_exact_mut(*cols).zip(stored.chunks_exact_mut(row_bytes)) {
                    quantize_row(dtype, values, None, row);
                    dequantize_row(dtype, row, values);
                }
                if as_f32 { bytes(&values) } else { stored }
            }
            _ if name.contains("norm") => bytes(&values.iter().map(|x| 1.0 + x).collect::<Vec<_>>()),
            _ => bytes(&values),
        };
        writer.write(name, &stored).unwrap();
    }
    writer.finish().unwrap();
}

fn model(dtype: DType, as_f32: bool, compute: &Compute) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    write_base(&path, dtype, as_f32);
    Model::load(&ModelFiles::open(&path).unwrap(), compute, &mut |_| {}).unwrap()
}

/// An adapter of all modules whose numbers are all there, B too.
fn adapter(model: &Model, from_layer: usize) -> Adapter {
    let targets = USUAL_TARGETS.map(str::to_owned).to_vec();
    let shape = AdapterShape { rank: 4, alpha: 8.0, rslora: false, dora: false, targets, from_layer, labels: None };
    let mut adapter = shape.start(model.plan(), 1).unwrap();
    adapter.values_mut().iter_mut().enumerate().for_each(|(i, x)| *x += 0.02 * (i as f32 * 0.73).sin());
    adapter
}

fn examples(count: usize) -> Vec<Example> {
    let example = |i: usize| Example {
        ids: (0..30 + 7 * i % 11).map(|t| TokenId(((20 + 7 * i + t * (1 + i % 3)) % VOCAB) as u32)).collect(),
        goal: Goal::Tokens((0..30 + 7 * i % 11).map(|t| t >= 9).collect()),
    };
    (0..count).map(example).collect()
}

fn settings(steps: usize) -> RunSettings {
    RunSettings {
        schedule: Schedule { rate: 1e-2, curve: Curve::Constant, warmup_steps: 0, steps },
        batch: 3,
        seed: 5,
        step: StepSettings { optimiser: AdamW::default(), clip: Some(1.0), piece_tokens: 70 },
        validate_every: 3,
        patience: None,
        checkpoint_every: 1,
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn gradients_are_near_those_over_the_same_values_in_f32() {
    for isa in Isa::available() {
        let compute = Compute::new(2, isa);
        let all = examples(4);
        let batch: Vec<&Example> = all.iter().collect();
        for dtype in STORED {
            let of = |as_f32: bool| {
                let model = model(dtype, as_f32, &compute);
                let mut learner = Learner::new(&model, &compute, adapter(&model, 0), false);
                let report = learner.gradients(&batch, 70).unwrap();
                (report.loss, learner.grads)
            };
            let ((loss, grads), (exact_loss, exact)) = (of(false), of(true));
            let square = |x: f32| f64::from(x) * f64::from(x);
            let off: f64 = grads.iter().zip(&exact).map(|(a, b)| square(a - b)).sum();
            let apart = (off / exact.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
            let what = format!("{isa}, {dtype}: gradients {apart:.4} apart, losses {loss} and {exact_loss}");
            assert!(apart < 0.05 && (loss - exact_loss).abs() < 0.02 * exact_loss, "{what}");
            assert!(apart > 0.0, "{what}: nothing was rounded");
        }
    }
}

#[test]
fn steps_have_the_same_bits_on_one_thread_and_on_two() {
    let (all, isa) = (examples(6), Isa::detect().unwrap());
    for dtype in STORED {
        let trained = |threads: usize, sparing: bool| {
            let compute = Compute::new(threads, isa);
            let model = model(dtype, false, &compute);
            let mut learner = Learner::new(&model, &compute, adapter(&model, 1), sparing);
            for batch in [&all[..3], &all[3..]] {
                learner.step(&batch.iter().collect::<Vec<_>>(), 1e-2, &settings(2).step).unwrap();
            }
            bits(learner.values())
        };
        for sparing in [false, true] {
            assert!(trained(1, sparing) == trained(2, sparing), "{dtype}, sparing: {sparing}");
        }
    }
}

#[test]
fn a_run_goes_on_with_the_same_bits() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    let all = examples(11);
    for dtype in STORED {
        let model = model(dtype, false, &compute);
        let trained = |stops: &[usize]| {
            let folder = tempfile::tempdir().unwrap();
            let place = Place { checkpoint: folder.path().join("c.safetensors"), identity: "this run".to_owned() };
            for (i, stop) in stops.iter().enumerate() {
                // Anew each time, as another process would: nothing is remembered.
                let mut learner = Learner::new(&model, &compute, adapter(&model, 1), false);
                learner.remember(1 << 20);
                let (lessons, goes_on) = ((all[..8].into(), all[8..].into()), *stop);
                let outcome = run(
                    &mut learner,
                    lessons,
                    &settings(6),
                    Some(&place),
                    i > 0,
                    &mut |happening| !matches!(happening, Happening::Step { step, .. } if step == goes_on),
                );
                if outcome.is_ok() {
                    return bits(learner.values());
                }
            }
            panic!("the last call goes to the end");
        };
        let whole = trained(&[99]);
        assert!(trained(&[1, 4, 99]) == whole, "{dtype}");
    }
}

#[test]
fn tapes_hold_no_more_than_was_reckoned() {
    let compute = Compute::new(2, Isa::detect().unwrap());
    for dtype in STORED {
        let model = model(dtype, false, &compute);
        for (from_layer, lens) in [(0, vec![600]), (0, vec![20; 12]), (2, vec![200, 1, 90])] {
            let adapter = adapter(&model, from_layer);
            let example = |len: &usize| Example {
                ids: (0..*len).map(|i| TokenId((i * 31 % VOCAB) as u32)).collect(),
                goal: Goal::Tokens(vec![true; *len]),
            };
            let examples: Vec<Example> = lens.iter().map(example).collect();
            let (packed, tokens) = (Packed::new(&examples, 1.0), lens.iter().sum());
            for sparing in [false, true] {
                let mut tape = Tape::new(&model, sparing);
                let mut grads = vec![0.0; adapter.values().len()];
                let (losses, lesson) = (&mut Vec::new(), packed.lesson());
                model.learn(&compute, &adapter, &lesson, &mut tape, losses, Some(&mut grads)).unwrap();
                let size = LessonSize { tokens, seqs: lens.len(), wanted: tokens - lens.len(), threads: 2 };
                let (reckoned, held) = (Tape::bytes(&model, &adapter, sparing, size), tape.held_bytes());
                assert!(held <= reckoned, "{dtype}, {lens:?}, sparing: {sparing}: {held} of {reckoned}");
            }
        }
    }
}
