//! The data of a run as examples in token ids, and the part of them that is kept apart to validate with.

use anyhow::{anyhow, bail};
use qwenkit_engine::ModelText;
use qwenkit_train::data::{Division, Labelled, Loading, Objective, Sample, Samples, divide, load};
use qwenkit_train::{ClassifierRecord, Example, Goal, Reading, check};

use super::data_args::text_side;
use super::{Task, TuneArgs};
use crate::terminal;

/// What a run learns from.
pub(super) struct Material {
    pub(super) task: Task,
    /// Of preferences the better answer and the worse, one after the other.
    pub(super) train: Vec<Example>,
    pub(super) valid: Vec<Example>,
    /// How texts became tokens.
    pub(super) reading: Reading,
    /// Labels in order of their numbers; of a classifier.
    pub(super) labels: Vec<String>,
    /// Name and SHA-256 of each file.
    pub(super) files: Vec<(String, String)>,
}

impl Material {
    /// Examples of one sample.
    pub(super) fn each(&self) -> usize {
        if self.task == Task::Dpo { 2 } else { 1 }
    }
}

/// Samples kept apart of so many, unless somebody says otherwise.
fn usual_validation(samples: usize) -> usize {
    if samples < 100 { 0 } else { (samples / 20).clamp(10, 300) }
}

/// Reads the data as the model would.
///
/// # Errors
/// When they cannot be learnt from, or hold something else than what is asked for.
pub(super) fn read(args: &TuneArgs, text: &ModelText, context_tokens: usize) -> anyhow::Result<Material> {
    let mut loading = args.how.loading(args.data.clone(), context_tokens);
    // A classifier that goes on keeps its labels, in their order.
    let before = args.adapter_init.as_deref().and_then(|folder| ClassifierRecord::read(folder).ok());
    loading.known_labels = before.map(|record| record.labels);
    let data = load(&loading, text_side(text), |_, _, _| {}).map_err(|error| anyhow!("{error}"))?;
    for remark in check::remarks(&data) {
        terminal::note(&format!("note: {remark}"));
    }
    let found = data.sources.first().map_or_else(String::new, |s| format!("{} holds {}", s.file, s.form.name()));
    let task = match (data.samples.objective(), args.task) {
        (Objective::Preference, None | Some(Task::Dpo)) => Task::Dpo,
        (Objective::Preference, Some(_)) => {
            bail!("{found}, which the task dpo learns\nhint: --task dpo")
        }
        (_, Some(Task::Dpo)) => bail!("the task is dpo, and {found}: no preferences (`chosen`, `rejected`)"),
        (Objective::Sft, None | Some(Task::Sft)) => Task::Sft,
        (Objective::Label, None | Some(Task::Classify)) => Task::Classify,
        (Objective::Sft, Some(Task::Classify)) => bail!("the task is classify, and {found}: no labels"),
        (Objective::Label, Some(Task::Sft)) => bail!("the task is sft, and {found}"),
    };
    let of =
        |samples: &Samples, places: &[usize]| places.iter().flat_map(|&at| examples(samples, at)).collect::<Vec<_>>();
    let mut sources = data.sources;
    let (train, valid) = if args.validation_data.is_empty() {
        let division = division(args, &data.samples);
        (of(&data.samples, &division.train), of(&data.samples, &division.validation))
    } else {
        let known_labels = (task == Task::Classify).then(|| data.labels.clone());
        let loading = Loading { files: args.validation_data.clone(), known_labels, ..loading.clone() };
        let apart = load(&loading, text_side(text), |_, _, _| {}).map_err(|error| anyhow!("{error}"))?;
        if let (Some(learnt), Some(apart)) = (sources.first(), apart.sources.first())
            && learnt.form.objective() != apart.form.objective()
        {
            let ((a, b), (c, d)) = ((&learnt.file, learnt.form.name()), (&apart.file, apart.form.name()));
            bail!("{a} holds {b}, and {c}, to validate with, {d}\nhint: validate with data of the same kind");
        }
        sources.extend(apart.sources);
        let all = |samples: &Samples| of(samples, &(0..samples.len()).collect::<Vec<_>>());
        (all(&data.samples), all(&apart.samples))
    };
    let files = sources.into_iter().map(|s| (s.file, s.sha256)).collect();
    Ok(Material { task, train, valid, reading: Reading::of(&loading.encoding), labels: data.labels, files })
}

/// Which samples are learnt from, and which are kept apart.
fn division(args: &TuneArgs, samples: &Samples) -> Division {
    let count = samples.len();
    let wanted = args.course.validation.map_or_else(|| usual_validation(count), |n| n as usize);
    divide(samples, wanted as f64 / count.max(1) as f64, args.course.seed)
}

/// A sample as what is learnt from it; of a preference the better answer and the worse.
fn examples(samples: &Samples, at: usize) -> Vec<Example> {
    let of_tokens =
        |sample: &Sample| Example { ids: sample.tokens.clone(), goal: Goal::Tokens(sample.trained.clone()) };
    match samples {
        Samples::Sft(samples) => samples.get(at).map(of_tokens).into_iter().collect(),
        Samples::Label(samples) => {
            let of_label = |sample: &Labelled| {
                let label = u32::try_from(sample.label).ok()?;
                Some(Example { ids: sample.tokens.clone(), goal: Goal::Label(label) })
            };
            samples.get(at).and_then(of_label).into_iter().collect()
        }
        Samples::Preference(pairs) => {
            pairs.get(at).map_or_else(Vec::new, |pair| vec![of_tokens(&pair.chosen), of_tokens(&pair.rejected)])
        }
    }
}
