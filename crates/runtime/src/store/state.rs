//! Which matrix is where, and who waits for which.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use transom::Isa;
use transom::layout::Matrix;

use super::plan::Plan;
use super::source::Source;
use super::{Eviction, Poison, StoreOptions};
use crate::error::RuntimeError;
use crate::sampler::SplitMix64;

/// Where a matrix is.
pub(super) enum Place {
    /// In memory, to stay.
    Resident(Arc<Matrix>),
    /// In the file.
    File,
    /// On its way into a buffer; nobody else sees it.
    Loading,
    /// In a buffer.
    Ready(Arc<Matrix>),
    /// It could not be read. Told to the next who asks.
    Failed(RuntimeError),
}

impl Place {
    /// The matrix, if it can be read now.
    fn matrix(&self) -> Option<&Arc<Matrix>> {
        match self {
            Self::Resident(matrix) | Self::Ready(matrix) => Some(matrix),
            _ => None,
        }
    }
}

/// What all threads see, under one lock.
pub(super) struct State {
    places: Vec<Place>,
    /// Matrices that somebody waits for.
    wanted: Vec<usize>,
    /// Buffers that hold nothing.
    spare: Vec<Vec<u8>>,
    /// Buffers there are, and there may be.
    n_buffers: usize,
    max_buffers: usize,
    buffer_bytes: usize,
    /// Matrices of a pass, and the one used last.
    cycle: usize,
    position: usize,
    prefetch: usize,
    poison: Poison,
    /// For [`Eviction::Random`].
    random: Option<SplitMix64>,
    stopped: bool,
}

impl State {
    pub(super) fn new(
        places: Vec<Place>,
        cycle: usize,
        plan: &Plan,
        options: StoreOptions,
    ) -> Self {
        Self {
            places,
            wanted: Vec::new(),
            spare: Vec::new(),
            n_buffers: 0,
            max_buffers: plan.n_buffers,
            buffer_bytes: plan.buffer_bytes,
            cycle,
            position: cycle - 1,
            prefetch: options.prefetch,
            poison: options.poison,
            random: match options.eviction {
                Eviction::Scheduled => None,
                Eviction::Random(seed) => Some(SplitMix64(seed)),
            },
            stopped: false,
        }
    }

    /// How many uses come before the next use of a matrix.
    fn distance(&self, index: usize) -> usize {
        (index + self.cycle - self.position - 1) % self.cycle
    }

    /// What to read now, and into which memory.
    pub(super) fn next_job(&mut self) -> Option<(usize, Vec<u8>)> {
        let in_file = |&index: &usize| matches!(self.places[index], Place::File);
        if let Some(index) = self.wanted.iter().copied().find(in_file) {
            return self.take_buffer(index, true).map(|buffer| (index, buffer));
        }
        let ahead = (1..self.cycle).map(|step| (self.position + step) % self.cycle);
        let streamed = ahead.filter(|&index| !matches!(self.places[index], Place::Resident(_)));
        let index = streamed.take(self.prefetch).find(in_file)?;
        self.take_buffer(index, false).map(|buffer| (index, buffer))
    }

    /// Memory for a matrix: unused, or that of one which gives way. Something
    /// that is only read ahead takes the place of nothing that is used sooner.
    fn take_buffer(&mut self, index: usize, is_wanted: bool) -> Option<Vec<u8>> {
        if let Some(buffer) = self.spare.pop() {
            self.places[index] = Place::Loading;
            return Some(buffer);
        }
        if self.n_buffers < self.max_buffers {
            self.n_buffers += 1;
            self.places[index] = Place::Loading;
            return Some(Vec::with_capacity(self.buffer_bytes));
        }
        let candidates: Vec<usize> = (0..self.cycle)
            .filter(|victim| matches!(self.places[*victim], Place::Ready(_)))
            .filter(|&victim| self.may_give_way(victim))
            .filter(|&victim| is_wanted || self.distance(victim) > self.distance(index))
            .collect();
        let victim = match &mut self.random {
            Some(random) if !candidates.is_empty() => candidates[random.below(candidates.len())],
            _ => candidates.into_iter().max_by_key(|&victim| self.distance(victim))?,
        };
        let buffer = self.evict(victim)?;
        self.places[index] = Place::Loading;
        Some(buffer)
    }

    /// Whether nobody reads the matrix or waits for it.
    fn may_give_way(&self, index: usize) -> bool {
        let unread = |matrix: &Arc<Matrix>| Arc::strong_count(matrix) == 1;
        self.places[index].matrix().is_some_and(unread) && !self.wanted.contains(&index)
    }

    /// Takes the memory of a matrix back. `None` if somebody reads it: the
    /// matrix is then shared, and only its sole owner can take it apart.
    fn evict(&mut self, index: usize) -> Option<Vec<u8>> {
        let place = std::mem::replace(&mut self.places[index], Place::File);
        let (Place::Ready(shared) | Place::Resident(shared)) = place else {
            self.places[index] = place;
            return None;
        };
        match Arc::try_unwrap(shared) {
            Ok(mut matrix) => {
                if self.poison == Poison::On {
                    matrix.poison();
                }
                Some(matrix.into_buffer())
            }
            Err(shared) => {
                self.places[index] = Place::Ready(shared);
                None
            }
        }
    }

    /// For [`Eviction::Random`]: every other time some matrix goes.
    fn evict_at_random(&mut self) {
        let Some(random) = &mut self.random else { return };
        if random.below(2) == 0 {
            return;
        }
        let victim = random.below(self.cycle);
        if !self.may_give_way(victim) {
            return;
        }
        let was_resident = matches!(self.places[victim], Place::Resident(_));
        if let Some(buffer) = self.evict(victim)
            && !was_resident
        {
            self.spare.push(buffer);
        }
    }
}

/// The state, and what never changes.
pub(super) struct Shared {
    pub(super) sources: Vec<Source>,
    pub(super) isa: Isa,
    state: Mutex<State>,
    /// Something in the state is not as it was.
    news: Condvar,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("n_matrices", &self.sources.len()).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(sources: Vec<Source>, state: State, options: StoreOptions) -> Self {
        Self { sources, isa: options.isa, state: Mutex::new(state), news: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete when a panic can happen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody who waits.
    pub(super) fn changed(&self, state: MutexGuard<'_, State>) {
        drop(state);
        self.news.notify_all();
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.news.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// The matrix, once it is in memory.
    pub(super) fn get(&self, index: usize) -> Result<Arc<Matrix>, RuntimeError> {
        let mut state = self.lock();
        state.evict_at_random();
        if index < state.cycle {
            state.position = index;
        }
        self.news.notify_all();
        loop {
            if let Some(matrix) = state.places[index].matrix().cloned() {
                state.wanted.retain(|&wanted| wanted != index);
                return Ok(matrix);
            }
            if matches!(state.places[index], Place::Failed(_))
                && let Place::Failed(error) =
                    std::mem::replace(&mut state.places[index], Place::File)
            {
                state.wanted.retain(|&wanted| wanted != index);
                return Err(error);
            }
            if state.stopped {
                return Err(self.sources[index].failed(&"a thread that reads weights has ended"));
            }
            if !state.wanted.contains(&index) {
                state.wanted.push(index);
                self.news.notify_all();
            }
            state = self.wait(state);
        }
    }

    /// The matrix, if it is in memory.
    pub(super) fn if_in_memory(&self, index: usize) -> Option<Arc<Matrix>> {
        self.lock().places[index].matrix().cloned()
    }

    /// Ends the threads that read.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        self.changed(state);
    }

    /// Waits for something to read; `None` when the store ends.
    pub(super) fn next_job(&self) -> Option<(usize, Vec<u8>)> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(job) = state.next_job() {
                return Some(job);
            }
            state = self.wait(state);
        }
    }

    /// Makes a matrix visible that is complete and checked, or tells why not.
    pub(super) fn publish(&self, index: usize, result: Result<Matrix, RuntimeError>) {
        let mut state = self.lock();
        state.places[index] = match result {
            Ok(matrix) => Place::Ready(Arc::new(matrix)),
            Err(error) => {
                // Its buffer is lost.
                state.n_buffers -= 1;
                Place::Failed(error)
            }
        };
        self.changed(state);
    }
}
