//! Ranks over MPI, as `mpirun` and `srun` start them.
//!
//! Contract: ranks wait for each other asleep and not for ever; one that is lost ends all. MPI is spoken from the thread that began it
//! alone, and its own failures end the process, as is MPI's way. Not here: what is said.

use std::{
    cell::Cell,
    thread,
    time::{Duration, Instant},
};

use mpi::{
    Threading,
    environment::Universe,
    topology::SimpleCommunicator,
    traits::{Communicator, CommunicatorCollectives},
};

use crate::{error::Error, ranks::Ranks};

/// Bytes of a message that travel at once, of each rank.
const BLOCK_BYTES: usize = 1 << 20;
/// Numbers that a rank sums at once: they stay in its caches, and all ranks' together in memory that counts for nothing.
const SUMMED: usize = 1 << 18;
/// The longest sleep of a rank that waits; a step takes hundreds of times as long.
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// All ranks that were started together.
pub struct Mpi {
    world: SimpleCommunicator,
    patience: Duration,
    /// Whether others were waited for in vain: nothing can be said to them any more.
    is_lost: Cell<bool>,
    /// Ends MPI behind everything else.
    _universe: Universe,
}

impl Mpi {
    /// Begins MPI, once in a process; ranks wait for each other as long as `patience` says.
    ///
    /// # Errors
    /// When it has begun before, or this MPI lets no program have threads.
    pub fn begin(patience: Duration) -> Result<Mpi, Error> {
        let begun = mpi::initialize_with_threading(Threading::Funneled);
        let (universe, threading) = begun.ok_or_else(|| Error::lost("MPI has begun before in this process"))?;
        if threading < Threading::Funneled {
            return Err(Error::lost("this MPI takes no programs with threads (MPI_THREAD_FUNNELED)"));
        }
        Ok(Mpi { world: universe.world(), patience, is_lost: Cell::new(false), _universe: universe })
    }

    /// Ends all ranks at once.
    pub fn abort(&self, code: u8) -> ! {
        self.world.abort(code.into())
    }

    /// Returns when all ranks have come here. What MPI itself has to wait turns in a loop that takes a whole core, and never ends when a
    /// rank has gone where no launcher sees it.
    fn meet(&self) -> Result<(), Error> {
        let (started, mut sleep) = (Instant::now(), Duration::from_micros(20));
        let mut request = self.world.immediate_barrier();
        while let Err(open) = request.test() {
            request = open;
            if started.elapsed() > self.patience {
                self.is_lost.set(true);
                // One that is dropped open panics.
                std::mem::forget(request);
                let seconds = self.patience.as_secs();
                return Err(Error::lost(format!("the other ranks have not come within {seconds} s")));
            }
            thread::sleep(sleep);
            sleep = (sleep * 2).min(LONGEST_SLEEP);
        }
        Ok(())
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // MPI's own end waits for all ranks, which would wait for this one.
        if self.is_lost.get() || thread::panicking() {
            self.abort(1);
        }
    }
}

impl Ranks for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn count(&self) -> usize {
        self.world.size() as usize
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        self.meet()?;
        let count = self.count();
        let mut lens = vec![0u64; count];
        self.world.all_gather_into(&(own.len() as u64), &mut lens[..]);
        let most = lens.iter().copied().max().unwrap_or(0) as usize;
        let mut all: Vec<Vec<u8>> = lens.iter().map(|&len| Vec::with_capacity(len as usize)).collect();
        let (mut block, mut blocks) = (Vec::new(), Vec::new());
        for start in (0..most).step_by(BLOCK_BYTES) {
            // All send blocks of one size, whatever is left to each.
            let size = BLOCK_BYTES.min(most - start);
            block.clear();
            block.extend(own.iter().skip(start).take(size));
            block.resize(size, 0u8);
            blocks.resize(size * count, 0u8);
            self.world.all_gather_into(&block[..], &mut blocks[..]);
            for ((found, block), len) in all.iter_mut().zip(blocks.chunks_exact(size)).zip(&lens) {
                let left = *len as usize - found.len();
                found.extend_from_slice(&block[..left.min(size)]);
            }
        }
        Ok(all)
    }

    /// Each rank sums its own part of the numbers and tells the others: what travels does not grow with the number of ranks.
    fn sum(&self, numbers: &mut [f32]) -> Result<(), Error> {
        self.meet()?;
        let count = self.count();
        let (mut parts, mut found) = (Vec::new(), Vec::new());
        for numbers in numbers.chunks_mut(SUMMED * count) {
            let each = numbers.len().div_ceil(count);
            parts.clear();
            parts.extend_from_slice(numbers);
            parts.resize(each * count, 0.0f32);
            found.resize(each * count, 0.0f32);
            self.world.all_to_all_into(&parts[..], &mut found[..]);
            let (sums, others) = found.split_at_mut(each);
            for other in others.chunks_exact(each) {
                sums.iter_mut().zip(other).for_each(|(sum, number)| *sum += number);
            }
            self.world.all_gather_into(&*sums, &mut parts[..]);
            numbers.copy_from_slice(&parts[..numbers.len()]);
        }
        Ok(())
    }
}
