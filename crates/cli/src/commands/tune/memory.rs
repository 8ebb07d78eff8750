//! What a run takes of memory, reckoned and said before it begins, and refused where it is not there.

use anyhow::ensure;
use qwenkit_engine::available_memory_bytes;
use qwenkit_models::LessonSize;
use qwenkit_train::{Example, Moments};

use super::data::Material;
use super::training::Course;
use super::{Method, Optimiser, Task, TuneArgs};
use crate::terminal;

/// Beside what is planned: tokenizer, program, what an allocator keeps.
const SPARE_BYTES: usize = 128 << 20;

/// What may be remembered of samples that come again.
const REMEMBERED_BYTES: usize = 512 << 20;

/// How a run uses memory.
pub(super) struct MemoryPlan {
    /// Whether layers are computed twice.
    pub(super) sparing: bool,
    /// Bytes for what the layers below the first adapted one give.
    pub(super) remembered: usize,
}

/// What a run takes, beside spare.
pub(super) struct Needs<'a> {
    /// Bytes of the model, which is there already.
    pub(super) weights: usize,
    /// Numbers that are trained, and what to call all that goes with them.
    pub(super) numbers: usize,
    pub(super) what: &'static str,
    /// Bytes of activations, if layers are computed twice or not.
    pub(super) tape: &'a dyn Fn(bool, LessonSize) -> usize,
    /// Bytes that it would take to remember what layers below the first adapted one make of all samples.
    pub(super) remembered: usize,
}

/// Says what the run takes, and decides whether the forward pass is kept or computed twice; `was_sparing` says it of a run that
/// goes on.
///
/// # Errors
/// When there is not so much memory.
pub(super) fn memory_plan(
    args: &TuneArgs,
    course: &Course<'_>,
    needs: &Needs<'_>,
    was_sparing: Option<bool>,
) -> anyhow::Result<MemoryPlan> {
    let (material, settings, team) = (&course.material, &course.settings, course.team);
    let size = largest(material, settings.step.piece_tokens, settings.batch, course.threads(args));
    let (tokens, numbers) = (size.tokens, needs.numbers);
    let longest = material.train.iter().chain(&material.valid).map(|e| e.ids.len()).max().unwrap_or(1);
    // Values, gradients, with validation the best so far, with several shares in one process those before, and the optimiser's two
    // moments.
    let holds_shares = team.count() == 1 && team.shares() > 1;
    let copies = 2 + usize::from(!material.valid.is_empty()) + usize::from(holds_shares);
    let trained = copies * 4 * numbers + Moments::bytes(numbers, args.course.optimiser.precision());
    // Every rank has loaded its model before one of them looks at what is left to divide.
    team.all(true)?;
    let available = available_memory_bytes().map(|bytes| bytes / course.sharing.memory as u64);
    let of_tape = |sparing: bool| (needs.tape)(sparing, size);
    let of_all = |sparing: bool| of_tape(sparing) + trained + SPARE_BYTES;
    let fits = |sparing: bool| available.is_none_or(|available| of_all(sparing) as u64 <= available);
    // What the one rounds the other does not, so a run goes on as it began.
    let fits_all = team.all(fits(false))?;
    let sparing = was_sparing.unwrap_or(!fits_all) || args.course.sparing;
    // What lies below the first adapted layer is remembered of all samples if they fit as well.
    let room = available.map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let remembered = needs.remembered.min(REMEMBERED_BYTES).min(room.saturating_sub(of_all(sparing)));
    let mb = |bytes: usize| format!("{:.0} MB", bytes as f64 / 1e6);
    terminal::note(&format!(
        "memory: {} weights + {} {} + {} activations of {tokens} tokens ({}){}",
        mb(needs.weights),
        mb(trained),
        needs.what,
        mb(of_tape(sparing)),
        if sparing { "layers are computed twice" } else { "all layers kept" },
        if remembered > 0 { format!(" + {} of what the layers below give", mb(remembered)) } else { String::new() }
    ));
    let smaller = match (args.method, args.course.optimiser) {
        (Method::Lora, _) => "a smaller --rank",
        (Method::Full, Optimiser::Adamw) => "--optimiser adamw-8bit, an adapter (--method lora)",
        (Method::Full, Optimiser::Adamw8bit) => "--validation 0, an adapter (--method lora)",
    };
    let hint = match was_sparing {
        Some(false) if fits(true) => {
            "the run began with all layers kept and goes on so; give it memory, or begin anew in another folder"
                .to_owned()
        }
        _ => format!("a smaller --piece-tokens (the longest sample has {longest}), {smaller}, or shorter samples"),
    };
    ensure!(
        fits(sparing),
        "the training needs {} beside the model and {} are available\nhint: {hint}",
        mb(of_all(sparing)),
        available.map_or("unknown".to_owned(), |bytes| mb(bytes as usize))
    );
    Ok(MemoryPlan { sparing, remembered })
}

/// The largest that is computed at once: a piece, or a sample that is longer than that, unless there is less.
fn largest(material: &Material, piece_tokens: usize, batch: usize, threads: usize) -> LessonSize {
    let lens_of = |examples: &[Example]| examples.iter().map(|e| e.ids.len()).collect::<Vec<_>>();
    let (mut of_train, of_valid) = (lens_of(&material.train), lens_of(&material.valid));
    of_train.sort_unstable_by(|a, b| b.cmp(a));
    // A step's longest samples, or all that are validated with; preferences are all measured before the first step.
    let of_step = if material.task == Task::Dpo { of_train.len() } else { batch };
    let at_once = of_train.iter().take(of_step).sum::<usize>().max(of_valid.iter().sum());
    let mut lens = [of_train, of_valid].concat();
    lens.sort_unstable();
    let tokens = piece_tokens.min(at_once).max(lens.last().copied().unwrap_or(1));
    // As many of the shortest as go into one piece.
    let mut fitting = 0;
    let fits_too = |len: &&usize| {
        fitting += **len;
        fitting <= tokens
    };
    let seqs = lens.iter().take_while(fits_too).count().max(1);
    let wanted = if material.task == Task::Classify { 0 } else { tokens };
    LessonSize { tokens, seqs, wanted, threads }
}

#[cfg(test)]
mod tests {
    use qwenkit_tensor::TokenId;
    use qwenkit_train::{Goal, Reading};

    use super::*;

    #[test]
    fn preferences_are_measured_in_whole_pieces_whatever_a_step_takes() {
        let example = |len: usize| Example { ids: vec![TokenId(1); len], goal: Goal::Tokens(vec![true; len]) };
        let material = |task: Task| Material {
            task,
            train: vec![example(10); 40],
            valid: Vec::new(),
            reading: Reading { context_tokens: 100, cuts: false, parses_control_tokens: false },
            labels: Vec::new(),
            files: Vec::new(),
        };
        let size = |task: Task, piece: usize| largest(&material(task), piece, 4, 2);
        assert_eq!((size(Task::Sft, 1000).tokens, size(Task::Sft, 1000).seqs), (40, 4));
        assert_eq!((size(Task::Dpo, 1000).tokens, size(Task::Dpo, 1000).seqs), (400, 40));
        assert_eq!((size(Task::Dpo, 100).tokens, size(Task::Dpo, 100).seqs), (100, 10));
        assert_eq!(size(Task::Dpo, 5).tokens, 10);
    }
}
