//! The pool under loom, which tries every order in which its threads' steps can follow each other and watches who reads what
//! another writes. Built only with `--cfg loom`:
//! `RUSTFLAGS="--cfg loom" cargo test -p qwenkit-kernels --release --test pool_loom`.
#![cfg(loom)]

use loom::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use qwenkit_kernels::Pool;

/// Two threads and two forks: every way in which a worker can spin, fall asleep, be woken, end and be told to stop, with at most
/// four interruptions of a thread that could go on; without that bound it takes three quarters of a minute in place of one second.
#[test]
fn each_thread_runs_each_fork_once_and_the_pool_ends() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(4);
    model.check(|| {
        let hits = Arc::new(AtomicUsize::new(0));
        let pool = Pool::new(2);
        for fork in 1..=2 {
            pool.run(|i| {
                hits.fetch_add(1 + 10 * i, Ordering::Relaxed);
            });
            // `run` returns when both have ended, and what they did is seen.
            assert_eq!(hits.load(Ordering::Relaxed), 12 * fork);
        }
        drop(pool);
    });
}
