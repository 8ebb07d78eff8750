//! What this machine is: cores, memory, processor, and how fast it reads memory.
//!
//! Contract: what a system does not tell is `None`, never a guess. Not here: which instruction sets the kernels know
//! (`qwenkit-kernels`), what a model needs.

use std::fs;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use qwenkit_tensor::HugeBuf;

/// Cores that this process may use; affinity and CPU quotas count.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The processor's name.
pub(crate) fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Memory of the whole machine.
pub(crate) fn memory_bytes() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// The largest amount of memory this process has held at once.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// The value of a line such as `VmHWM:   1234 kB`, in bytes.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The memory limit that control groups set for this process, the tightest of its own group and those above.
pub(crate) fn memory_limit_bytes() -> Option<u64> {
    let number = |path: String| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let with_parents = own.match_indices('/').map(|(end, _)| &own[..end]).chain([own.trim_end_matches('/')]);
    let version_2 = with_parents.filter_map(|group| number(format!("/sys/fs/cgroup{group}/memory.max")));
    let version_1 = number("/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned());
    // A group of version 1 without a limit states one beyond any machine.
    let limit = version_2.chain(version_1).min()?;
    (memory_bytes().is_none_or(|total| limit < total)).then_some(limit)
}

/// Bytes of buffers that are larger than most caches.
pub(crate) const BUFFER_BYTES: u64 = 512 << 20;

/// Bytes a second that `threads` threads together read of `bytes` of memory: the best of several passes, in the way in which
/// products read weights. Some of it comes from caches where these are as large; what a model reads for a token does too. `None`
/// when there is no memory for the buffers.
pub(crate) fn read_bandwidth(threads: usize, bytes: u64) -> Option<f64> {
    const PASSES: usize = 12;
    const MOST_BYTES: u64 = 2 << 30;
    let bytes = bytes.min(MOST_BYTES);
    let room = qwenkit_engine::available_memory_bytes().map_or(bytes, |available| available / 4);
    let share = usize::try_from(bytes.min(room)).ok()? / threads.max(1);
    let mut buffers = (0..threads).map(|_| HugeBuf::zeroed(share).ok()).collect::<Option<Vec<_>>>()?;
    let start = Barrier::new(threads);
    let times = std::thread::scope(|scope| {
        let handles: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| {
                let start = &start;
                scope.spawn(move || {
                    // Pages of zeroes that were never written may all be one page.
                    buffer.as_mut_slice::<u64>().fill(1);
                    let mut passes = Vec::new();
                    for _ in 0..PASSES {
                        start.wait();
                        let pass = Instant::now();
                        black_box(qwenkit_kernels::read_through(buffer.as_slice()));
                        passes.push(pass.elapsed());
                    }
                    passes
                })
            })
            .collect();
        handles.into_iter().filter_map(|handle| handle.join().ok()).collect::<Vec<_>>()
    });
    // A pass lasts as long as its slowest thread.
    let slowest = |pass: usize| times.iter().filter_map(|passes| passes.get(pass)).max();
    let best = (0..PASSES).filter_map(slowest).min()?.as_secs_f64();
    (best > 0.0).then(|| (share * threads) as f64 / best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_key() {
        let text = "VmPeak:\t  10 kB\nVmHWM:\t    2048 kB\n";
        assert_eq!(kilobytes(text, "VmHWM:"), Some(2048 * 1024));
        assert_eq!(kilobytes(text, "VmRSS:"), None);
        assert_eq!(kilobytes("VmHWM: many kB", "VmHWM:"), None);
    }
}
