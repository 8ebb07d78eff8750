//! How much memory there is, and how much of it a model and its context may take.

use qwenkit_kernels::{KvType, PAGE_TOKENS};
use qwenkit_models::{ModelState, Plan};

use crate::{error::Error, runner::Slots};

/// Beside weights and context: buffers of a batch, tokenizer, program.
const SCRATCH_BYTES: u64 = 256 << 20;

/// Sequences of a model with recurrent layers that run at the same time; others wait. Each has a state of fixed size,
/// up to some hundred megabytes in the largest models.
///
/// Twice as many states are kept to go on from: where a prompt's last page ends, and at the latest page of its answer.
const RECURRENT_SLOTS: Slots = Slots { sequences: 8, checkpoints: 16 };

/// Slots for the state of recurrent layers; none for models without such layers.
pub(crate) fn slots(plan: &Plan) -> Option<Slots> {
    plan.has_recurrent_state().then_some(RECURRENT_SLOTS)
}

/// Bytes that this process can still take: what the system has available, or less where a control group says so. `None`
/// where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    });
    let version_2 = group_memory_bytes("/sys/fs/cgroup", ["memory.max", "memory.current", "inactive_file"]);
    let version_1 = group_memory_bytes(
        "/sys/fs/cgroup/memory",
        ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"],
    );
    [system, version_2, version_1].into_iter().flatten().min()
}

/// What a control group still grants: its limit less its use. Cached file pages that nobody uses - a model just fetched,
/// say - count as used there, and are given up as soon as memory is wanted, so they are taken off.
fn group_memory_bytes(folder: &str, [limit, used, reclaimable]: [&str; 3]) -> Option<u64> {
    let text = |file: &str| std::fs::read_to_string(format!("{folder}/{file}")).ok();
    let number = |file: &str| text(file)?.trim().parse::<u64>().ok();
    let cached = text("memory.stat").and_then(|stat| {
        let line = stat.lines().find_map(|line| line.strip_prefix(reclaimable))?;
        line.trim().parse::<u64>().ok()
    });
    Some(number(limit)?.saturating_sub(number(used)?.saturating_sub(cached.unwrap_or(0))))
}

/// Refuses weights that the machine cannot hold, before they are read.
pub(crate) fn check_weights(weight_bytes: u64, available_bytes: Option<u64>) -> Result<(), Error> {
    match available_bytes {
        Some(available_bytes) if weight_bytes + SCRATCH_BYTES > available_bytes => Err(Error::Memory {
            what: "the model",
            needed_bytes: weight_bytes + SCRATCH_BYTES,
            available_bytes,
            hint: String::new(),
        }),
        _ => Ok(()),
    }
}

/// The context to run with: `wanted`, which must fit, or else the model's own, cut to the memory that is left after its
/// weights.
pub(crate) fn context_tokens(
    plan: &Plan,
    kv_type: KvType,
    wanted: Option<usize>,
    available_bytes: Option<u64>,
) -> Result<usize, Error> {
    let page_bytes = ModelState::page_bytes(plan, kv_type) as u64;
    let fixed_bytes = SCRATCH_BYTES + (ModelState::slot_bytes(plan) * slots(plan).map_or(0, Slots::total)) as u64;
    let left = available_bytes.map(|bytes| bytes.saturating_sub(fixed_bytes));
    let fitting = left.map_or(usize::MAX, |bytes| (bytes / page_bytes.max(1)) as usize * PAGE_TOKENS);
    let too_large = |tokens: usize| Error::Memory {
        what: "the context",
        needed_bytes: (tokens.div_ceil(PAGE_TOKENS) as u64).saturating_mul(page_bytes).saturating_add(fixed_bytes),
        available_bytes: available_bytes.unwrap_or(0),
        hint: format!(", or a context (--ctx) of up to {fitting} tokens"),
    };
    match wanted {
        Some(tokens) if tokens > fitting => Err(too_large(tokens)),
        Some(tokens) => Ok(tokens),
        None if fitting < PAGE_TOKENS => Err(too_large(PAGE_TOKENS)),
        None => Ok(plan.context_tokens.min(fitting)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_groups_cached_files_are_not_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| std::fs::write(folder.path().join(file), text).unwrap();
        let left = || group_memory_bytes(folder.path().to_str().unwrap(), ["max", "current", "inactive_file"]);
        assert_eq!(left(), None);
        write("max", "1000\n");
        write("current", "900\n");
        assert_eq!(left(), Some(100));
        write("memory.stat", "anon 200\ninactive_file 600\nactive_file 50\n");
        assert_eq!(left(), Some(700));
        write("max", "max\n");
        assert_eq!(left(), None, "no limit");
    }
}
