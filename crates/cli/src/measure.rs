//! The timing loop of all benchmarks.

use std::time::Instant;

/// Rounds; in each, every job has its turn.
pub(crate) const N_ROUNDS: usize = 5;

/// Seconds that runs of one job took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Adds a run.
    pub(crate) fn push(&mut self, seconds: f64) {
        self.0.push(seconds);
    }

    /// The middle one; the mean of the two middle ones if their number is even.
    ///
    /// # Panics
    ///
    /// If there are none.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() % 2 {
            0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
            _ => sorted[middle],
        }
    }

    /// The fastest one.
    pub(crate) fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The slowest one.
    pub(crate) fn max(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    /// How many.
    pub(crate) fn n_runs(&self) -> usize {
        self.0.len()
    }
}

/// Something to be timed.
pub(crate) type Job<'a> = Box<dyn FnMut() -> anyhow::Result<()> + 'a>;

/// Times jobs in turns, so that a machine that slows down or speeds up does so
/// for all of them: five rounds, in each of which every job runs until
/// `min_seconds / 5` have passed, but at least once. The first run of each is
/// warm-up and is not counted.
///
/// # Errors
///
/// The first that a job returns.
pub(crate) fn interleaved(
    jobs: &mut [Job<'_>],
    min_seconds: f64,
    mut after_turn: impl FnMut(),
) -> anyhow::Result<Vec<Samples>> {
    let mut samples = vec![Samples::default(); jobs.len()];
    for job in jobs.iter_mut() {
        job()?;
    }
    for _ in 0..N_ROUNDS {
        for (job, samples) in jobs.iter_mut().zip(&mut samples) {
            let turn = Instant::now();
            loop {
                let run = Instant::now();
                job()?;
                samples.0.push(run.elapsed().as_secs_f64());
                if turn.elapsed().as_secs_f64() >= min_seconds / N_ROUNDS as f64 {
                    break;
                }
            }
            after_turn();
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_and_the_range_holds_it() {
        let odd = Samples(vec![3.0, 1.0, 2.0]);
        assert_eq!((odd.min(), odd.median(), odd.max()), (1.0, 2.0, 3.0));
        assert_eq!(Samples(vec![4.0, 1.0, 2.0, 3.0]).median(), 2.5);
    }

    #[test]
    fn every_job_runs_in_every_round_and_the_warm_up_is_not_counted() {
        let mut n_runs = [0, 0];
        let [a, b] = &mut n_runs;
        let count = |n: &mut i32| {
            *n += 1;
            Ok(())
        };
        let mut jobs: Vec<Job<'_>> = vec![Box::new(move || count(a)), Box::new(move || count(b))];
        let samples = interleaved(&mut jobs, 0.0, || ()).unwrap();
        drop(jobs);
        assert_eq!(n_runs, [6, 6]);
        assert!(samples.iter().all(|s| s.n_runs() == 5));
    }

    #[test]
    fn a_failing_job_ends_it() {
        let mut jobs: Vec<Job<'_>> = vec![Box::new(|| anyhow::bail!("no"))];
        assert!(interleaved(&mut jobs, 0.0, || ()).is_err());
    }
}
