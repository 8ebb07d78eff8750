//! The thread pool of the hot path: one fork per op, threads that spin briefly for the next and then sleep.
//!
//! A token takes a few hundred forks of some tens of microseconds each; waking threads through the operating system at
//! each would cost as much as the work. Work is divided by thread index, or dealt out in pieces to whoever is free
//! (`Deal`), and no result depends on which thread computed it. Not for coarse jobs, nor for two forks at once.
//!
//! Built with `--cfg loom` the pool runs on loom's threads and atomics, and `tests/pool_loom.rs` goes through every order in
//! which its threads can meet.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::PoisonError,
};

#[cfg(loom)]
use loom::{
    hint,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    },
    thread::{self, JoinHandle, Thread},
};
#[cfg(not(loom))]
use std::{
    hint,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering, fence},
    },
    thread::{self, JoinHandle, Thread},
};

/// Rounds of spinning before a waiting worker sleeps: some 50 microseconds, longer than the gaps between a token's ops
/// and shorter than anybody notices on the electricity bill.
const SPIN_ROUNDS: usize = if cfg!(loom) { 1 } else { 4_000 };

type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Threads that run one closure together, the caller among them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One fork at a time.
    fork: Mutex<()>,
}

struct Shared {
    /// Raised by one at each fork; workers wait for it to change.
    epoch: AtomicUsize,
    /// Workers that have not finished the fork of this epoch.
    pending: AtomicUsize,
    /// The closure of this epoch, valid while `pending > 0`.
    task: TaskCell,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

/// The place of the closure, whose accesses loom watches.
#[cfg(loom)]
struct TaskCell(loom::cell::UnsafeCell<Option<*const Task<'static>>>);
/// The place of the closure.
#[cfg(not(loom))]
struct TaskCell(std::cell::UnsafeCell<Option<*const Task<'static>>>);

impl TaskCell {
    /// # Safety
    /// Nobody writes meanwhile.
    unsafe fn get(&self) -> Option<*const Task<'static>> {
        #[cfg(loom)]
        // SAFETY: the caller's promise.
        return self.0.with(|task| unsafe { *task });
        #[cfg(not(loom))]
        // SAFETY: the caller's promise.
        return unsafe { *self.0.get() };
    }

    /// # Safety
    /// Nobody reads or writes meanwhile.
    unsafe fn set(&self, new: *const Task<'static>) {
        #[cfg(loom)]
        // SAFETY: the caller's promise.
        self.0.with_mut(|task| unsafe { *task = Some(new) });
        #[cfg(not(loom))]
        // SAFETY: the caller's promise.
        unsafe {
            *self.0.get() = Some(new)
        };
    }
}

// SAFETY: `task` is written only by the forking thread while no worker reads it (`pending == 0`, under the fork lock), and
// read by workers only after they have seen the epoch that the write precedes.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer inside is only followed under the protocol above, from any thread.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `threads` threads, the caller's included; at least one.
    pub fn new(threads: usize) -> Pool {
        let extra = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            #[cfg(loom)]
            task: TaskCell(loom::cell::UnsafeCell::new(None)),
            #[cfg(not(loom))]
            task: TaskCell(std::cell::UnsafeCell::new(None)),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleeping: (0..extra).map(|_| AtomicBool::new(false)).collect(),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(format!("qwenkit-{}", i + 1)).spawn(move || shared.work(i))
        };
        // Where the system refuses more threads, the pool is as large as it can be.
        let workers: Vec<_> = (0..extra).map_while(|i| spawn(i).ok()).collect();
        Pool { shared, workers, fork: Mutex::new(()) }
    }

    /// Threads that take part in a fork.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(i)` once for each thread index `i` in `0..threads()`, all at the same time, and returns when all have
    /// ended.
    ///
    /// # Panics
    /// If the task panicked on any thread.
    pub fn run(&self, task: impl Fn(usize) + Sync) {
        if self.workers.is_empty() {
            return task(0);
        }
        let _one_at_a_time = self.fork.lock().unwrap_or_else(PoisonError::into_inner);
        let task: &Task<'_> = &task;
        let pointer: *const Task<'_> = task;
        // SAFETY: only the lifetime changes. The pointer is followed only by workers that `pending` counts, and this
        // function does not return, nor unwind, before that count is back at zero.
        let pointer = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(pointer) };
        // SAFETY: `pending` is zero, so no worker reads the cell.
        unsafe { self.shared.task.set(pointer) };
        self.shared.pending.store(self.workers.len(), Ordering::Relaxed);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        fence(Ordering::SeqCst);
        for (sleeping, worker) in self.shared.sleeping.iter().zip(&self.workers) {
            if sleeping.load(Ordering::Relaxed) {
                Thread::unpark(worker.thread());
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| task(0)));
        let mut rounds = 0;
        while self.shared.pending.load(Ordering::Acquire) > 0 {
            wait_a_little(&mut rounds);
        }
        let worker_panicked = self.shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!worker_panicked, "a pool thread panicked; its message stands above");
    }

    /// Runs `task` on contiguous parts of `0..items`, one part per thread; parts begin at multiples of `granule`.
    pub fn run_split(&self, items: usize, granule: usize, task: impl Fn(Range<usize>) + Sync) {
        let threads = self.threads();
        self.run(|i| {
            let part = part(items, granule, i, threads);
            if !part.is_empty() {
                task(part);
            }
        });
    }
}

/// Items dealt to threads: most of its part each thread has for itself, and meets the same ones each time; the rest, in pieces,
/// goes to whoever is ready first, so that nobody waits long for a thread that the machine holds up.
pub(crate) struct Deal {
    items: usize,
    /// For each thread, how many items of its rest are taken.
    taken: Vec<AtomicUsize>,
}

/// One in so many of a thread's items is in its rest.
const REST: usize = 8;
/// Pieces of a rest.
const PIECES: usize = 6;

impl Deal {
    pub(crate) fn new(items: usize, threads: usize) -> Deal {
        Deal { items, taken: (0..threads).map(|_| AtomicUsize::new(0)).collect() }
    }

    /// Calls `f` with what thread `i` gets; all threads together get each item once.
    pub(crate) fn each(&self, i: usize, mut f: impl FnMut(Range<usize>)) {
        let threads = self.taken.len();
        let rest = |own: &Range<usize>| if threads > 1 { own.len() / REST } else { 0 };
        let own = part(self.items, 1, i, threads);
        f(own.start..own.end - rest(&own));
        for other in (i..threads).chain(0..i) {
            let own = part(self.items, 1, other, threads);
            let rest = own.end - rest(&own)..own.end;
            let piece = rest.len().div_ceil(PIECES);
            while !rest.is_empty() {
                let start = rest.start + self.taken[other].fetch_add(piece, Ordering::Relaxed);
                if start >= rest.end {
                    break;
                }
                f(start..(start + piece).min(rest.end));
            }
        }
    }
}

/// The `i`-th of `parts` contiguous parts of `0..items`, cut at multiples of `granule`.
pub(crate) fn part(items: usize, granule: usize, i: usize, parts: usize) -> Range<usize> {
    let granules = items.div_ceil(granule);
    let cut = |i: usize| (granules * i / parts * granule).min(items);
    cut(i)..cut(i + 1)
}

/// Spins, and after a while lets other threads run: on a busy machine the one waited for may need this very core.
fn wait_a_little(rounds: &mut usize) {
    *rounds += 1;
    if *rounds < SPIN_ROUNDS {
        hint::spin_loop();
    } else {
        thread::yield_now();
    }
}

impl Shared {
    /// A worker's life: wait for an epoch, run its task, say so.
    fn work(&self, worker: usize) {
        let mut seen = 0;
        loop {
            seen = self.next_epoch(worker, seen);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            // SAFETY: the cell was written before the epoch that was just seen, and is not written again before this
            // worker has lowered `pending`.
            let task = unsafe { self.task.get() };
            if let Some(task) = task {
                // SAFETY: `run` keeps the closure alive until `pending` is zero.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| task(worker + 1))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits until the epoch is no longer `seen`, and returns it.
    fn next_epoch(&self, worker: usize, seen: usize) -> usize {
        for _ in 0..SPIN_ROUNDS {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            hint::spin_loop();
        }
        // The flag goes up before the last look at the epoch, and `run` raises the epoch before it looks at the flag: with a
        // fence between the two on both sides, one of them sees the other.
        self.sleeping[worker].store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch != seen {
                self.sleeping[worker].store(false, Ordering::Relaxed);
                return epoch;
            }
            thread::park();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker that panicked outside a task has nothing left to clean up.
            let _ = worker.join();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_part_once_for_any_thread_count() {
        for threads in 1..5 {
            let pool = Pool::new(threads);
            for items in [0, 1, 15, 16, 17, 100] {
                let hits: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.run_split(items, 16, |range| {
                    assert_eq!(range.start % 16, 0);
                    range.for_each(|i| {
                        hits[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1), "{threads} threads, {items} items");
            }
        }
    }

    #[test]
    fn dealt_items_come_once_however_late_a_thread_is() {
        for threads in 1..5 {
            for items in [0, 1, 7, 16, 100, 999] {
                let deal = Deal::new(items, threads);
                let mut hits = vec![0; items];
                // One after the other: the first takes everybody's rest.
                for i in 0..threads {
                    deal.each(i, |range| range.for_each(|n| hits[n] += 1));
                }
                assert!(hits.iter().all(|hit| *hit == 1), "{threads} threads, {items} items");
            }
        }
    }

    #[test]
    fn many_forks_and_sleep_between() {
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for round in 0..2_000 {
            pool.run(|i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            if round % 500 == 0 {
                // Long enough that the workers go to sleep and must be woken.
                (0..SPIN_ROUNDS * 50).for_each(|_| std::hint::spin_loop());
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 2_000 * (1 + 2));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for bad in 0..2 {
            let panics = catch_unwind(AssertUnwindSafe(|| pool.run(|i| assert_ne!(i, bad, "planned"))));
            assert!(panics.is_err());
        }
        let hits = AtomicUsize::new(0);
        pool.run(|_| {
            hits.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(hits.load(Ordering::Relaxed), 2);
    }
}
