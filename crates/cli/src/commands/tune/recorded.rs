//! `tune --ids`: steps over recorded ids and labels, to be held against another trainer's.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::ensure;
use qwenkit_formats::{Adapter as AdapterFile, AdapterSettings, write_safetensors};
use qwenkit_kernels::Compute;
use qwenkit_models::{Adapter, Model};
use qwenkit_tensor::{DType, TokenId};
use qwenkit_train::{AdamW, Example, Goal, Learner, Schedule, StepSettings};

use super::TuneArgs;
use crate::failure::usage;
use crate::tensors::Recorded;
use crate::{locate, opening, terminal};

/// The label of a token that nothing is learnt from.
const LEFT_OUT: i64 = -100;
/// What PEFT puts in front of the base model's paths.
const PREFIX: &str = "base_model.model.";

pub(super) fn run(args: &TuneArgs, ids: &Path, offline: bool) -> anyhow::Result<()> {
    let needs = |what: &str| usage(format!("--ids needs {what}"));
    let name = args.model.as_deref().ok_or_else(|| needs("--model"))?;
    let init = args.adapter_init.as_deref().ok_or_else(|| needs("--adapter-init"))?;
    let steps = args.course.steps.ok_or_else(|| needs("--steps"))? as usize;
    let rate = args.course.lr.ok_or_else(|| needs("--lr"))?;
    let file = AdapterFile::open(init)?;
    let recorded = Recorded::open(ids)?;
    let located = locate::locate(Some(name), offline)?;
    let compute = Compute::new(args.compute.threads(), opening::isa()?);
    let mut bar = opening::loading_bar();
    let model = Model::load(&located.files, &compute, &mut |e| bar.update(e.done_bytes, e.total_bytes))?;
    bar.clear();
    let plan = model.plan();
    let adapter = Adapter::of_file(plan, &file)?;
    let examples = examples(&recorded, plan.vocab)?;
    let batch: Vec<&Example> = examples.iter().collect();
    let settings = StepSettings {
        optimiser: AdamW { weight_decay: args.course.weight_decay as f32, ..AdamW::default() },
        clip: (!args.course.no_clip).then_some(args.course.clip),
        piece_tokens: usize::MAX,
    };
    let warmup_steps = args.course.warmup.unwrap_or(0) as usize;
    let schedule = Schedule { rate, curve: args.course.schedule, warmup_steps, steps };
    let mut learner = Learner::new(&model, &compute, adapter, args.course.sparing);
    learner.keep_moments_in(args.course.optimiser.precision());
    let (mut losses, mut first) = (Vec::new(), Vec::new());
    for step in 0..steps {
        if step == 0 {
            learner.gradients(&batch, settings.piece_tokens)?;
            first = learner.grads.clone();
        }
        let report = learner.step(&batch, schedule.at(step), &settings)?;
        ensure!(report.loss.is_finite(), "the loss of step {} is {}", step + 1, report.loss);
        terminal::note(&format!("step {} of {steps}: loss {:.6}", step + 1, report.loss));
        losses.push(report.loss as f32);
    }
    let Some(dump) = &args.dump else { return Ok(()) };
    let gradients = learner.adapter().to_file(plan, &first, AdapterSettings::default());
    let trained = learner.adapter().to_file(plan, learner.values(), AdapterSettings::default());
    let mut tensors: Vec<(String, Vec<usize>, &[f32])> =
        vec![("loss0".into(), vec![1], &losses[..1]), ("losses".into(), vec![losses.len()], &losses)];
    for (kind, file) in [("grad", &gradients), ("final", &trained)] {
        for m in &file.modules {
            let name = |part: &str| format!("{kind}.{PREFIX}{}.{part}.weight", m.name);
            tensors.push((name("lora_A"), vec![m.rank, m.inputs], &m.a));
            tensors.push((name("lora_B"), vec![m.outputs, m.rank], &m.b));
            if let Some(magnitude) = &m.magnitude {
                tensors.push((name("lora_magnitude_vector"), vec![m.outputs], magnitude));
            }
        }
    }
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let list: Vec<_> =
        tensors.iter().zip(&bytes).map(|((name, shape, _), b)| (&name[..], DType::F32, &shape[..], &b[..])).collect();
    write_safetensors(dump, &list, &BTreeMap::new())?;
    terminal::note(&format!("wrote {} tensors to {}", list.len(), dump.display()));
    Ok(())
}

/// The sequences of a file, with the tokens whose labels count.
fn examples(recorded: &Recorded, vocab: usize) -> anyhow::Result<Vec<Example>> {
    let path = recorded.path().display();
    let (shape, ids) = recorded.i64s("input_ids", 2)?;
    let (labels_shape, labels) = recorded.i64s("labels", 2)?;
    ensure!(
        shape == labels_shape && shape.iter().all(|&n| n > 0),
        "`{path}`: `input_ids` is {shape:?} and `labels` {labels_shape:?}; expected the same shape, not empty"
    );
    let mut examples = Vec::new();
    for (seq, (ids, labels)) in ids.chunks_exact(shape[1]).zip(labels.chunks_exact(shape[1])).enumerate() {
        let mut tokens = Vec::with_capacity(ids.len());
        for (i, (id, label)) in ids.iter().zip(labels).enumerate() {
            let known = u32::try_from(*id).ok().filter(|id| (*id as usize) < vocab);
            let id = known.ok_or_else(|| {
                anyhow::anyhow!("`{path}`: token {i} of sequence {seq} is {id}, expected an id below {vocab}")
            })?;
            ensure!(
                *label == LEFT_OUT || *label == i64::from(id),
                "`{path}`: label {i} of sequence {seq} is {label}, expected the token itself ({id}) or {LEFT_OUT}"
            );
            tokens.push(TokenId(id));
        }
        let marks = labels.iter().map(|label| *label != LEFT_OUT).collect();
        examples.push(Example { ids: tokens, goal: Goal::Tokens(marks) });
    }
    ensure!(examples.iter().any(|e| e.wanted() > 0), "`{path}`: every label is {LEFT_OUT}; there is nothing to learn");
    Ok(examples)
}
