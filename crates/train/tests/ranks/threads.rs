//! Ranks that are threads of one process, for tests: they meet at a barrier, and one that is gone is noticed at once.

use std::sync::{Arc, Condvar, Mutex};

use qwenkit_train::{Error, Ranks};

/// One of them.
pub(crate) struct Thread {
    rank: usize,
    group: Arc<Group>,
}

struct Group {
    count: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What each has brought to the meeting under way.
    brought: Vec<Option<Vec<u8>>>,
    /// The last meeting's messages, which not all may have read.
    found: Vec<Vec<u8>>,
    meetings: usize,
    gone: Vec<usize>,
}

impl Thread {
    /// So many of them.
    pub(crate) fn group(count: usize) -> Vec<Thread> {
        let state = Mutex::new(State { brought: vec![None; count], ..State::default() });
        let group = Arc::new(Group { count, state, changed: Condvar::new() });
        (0..count).map(|rank| Thread { rank, group: group.clone() }).collect()
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Ok(mut state) = self.group.state.lock() {
            state.gone.push(self.rank);
        }
        self.group.changed.notify_all();
    }
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.group.count
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
        let mut state = self.group.state.lock().unwrap();
        let meeting = state.meetings;
        state.brought[self.rank] = Some(own.to_vec());
        if state.brought.iter().all(Option::is_some) {
            state.found = state.brought.iter_mut().filter_map(Option::take).collect();
            state.meetings += 1;
            self.group.changed.notify_all();
        }
        while state.meetings == meeting {
            if !state.gone.is_empty() {
                return Err(Error::Lost { what: format!("rank {} is gone", state.gone[0]) });
            }
            state = self.group.changed.wait(state).unwrap();
        }
        // Nobody begins another meeting's end before this one has brought something to it.
        Ok(state.found.clone())
    }

    fn sum(&self, numbers: &mut [f32]) -> Result<(), Error> {
        let own: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        for (rank, found) in self.gather(&own)?.iter().enumerate() {
            let (found, _) = found.as_chunks();
            assert_eq!(found.len(), numbers.len());
            for (sum, bytes) in numbers.iter_mut().zip(found) {
                let number = f32::from_le_bytes(*bytes);
                *sum = if rank == 0 { number } else { *sum + number };
            }
        }
        Ok(())
    }
}
