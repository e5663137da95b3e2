//! What stays in memory, and what is read again and again.

use std::cmp::Reverse;

use transom::layout::Layout;

use super::source::Source;
use super::{Ids, StoreOptions};
use crate::error::RuntimeError;

/// What a store will do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Whether each matrix stays in memory.
    pub(crate) resident: Vec<bool>,
    /// Buffers for the others.
    pub(crate) n_buffers: usize,
    /// Bytes of each: the largest matrix that is read into one.
    pub(crate) buffer_bytes: usize,
}

/// Bytes of a matrix.
#[derive(Debug, Clone, Copy)]
struct Size {
    /// In the layout of those that stay.
    resident: usize,
    /// In a buffer.
    stored: usize,
    /// Beside the buffer.
    kept: usize,
}

impl Plan {
    /// Fits matrices into the budget of `options`, of which `taken` bytes are taken.
    pub(crate) fn new(
        sources: &[Source],
        ids: Ids,
        options: &StoreOptions,
        taken: usize,
    ) -> Result<Self, RuntimeError> {
        let sizes: Vec<Size> = sources
            .iter()
            .map(|source| Size {
                resident: source.expected_bytes(options.layout),
                stored: source.buffer_bytes(),
                kept: source.kept_bytes(),
            })
            .collect();
        Self::of_sizes(&sizes, ids.cycle(), options, taken)
    }

    /// `cycle` matrices are multiplied with; of the rest, rows are read.
    fn of_sizes(
        sizes: &[Size],
        cycle: usize,
        options: &StoreOptions,
        taken: usize,
    ) -> Result<Self, RuntimeError> {
        let all: usize = sizes.iter().map(|size| size.resident).sum::<usize>() + taken;
        let Some(budget) = options.memory.filter(|&budget| budget < all as u64) else {
            let n_buffers = match options.eviction {
                super::Eviction::Scheduled => 0,
                // Whatever is evicted has to come back somewhere.
                super::Eviction::Random(_) => 1,
            };
            let buffer_bytes = largest(sizes.iter()) * n_buffers;
            return Ok(Self { resident: vec![true; sizes.len()], n_buffers, buffer_bytes });
        };
        let budget = usize::try_from(budget).unwrap_or(usize::MAX);
        // Large ones first: the buffers need not be larger than what is left.
        let mut order: Vec<usize> = (0..cycle).collect();
        order.sort_by_key(|&index| Reverse(sizes[index].stored));
        let needed = |n_resident: usize, n_buffers: usize| {
            let (resident, streamed) = order.split_at(n_resident);
            let rows_only = sizes[cycle..].iter().map(|size| size.kept);
            let kept = streamed.iter().map(|&index| sizes[index].kept).chain(rows_only);
            let resident: usize = resident.iter().map(|&index| sizes[index].resident).sum();
            let buffer = largest(streamed.iter().map(|&index| &sizes[index]));
            taken + kept.sum::<usize>() + resident + n_buffers * buffer
        };
        for n_buffers in (1..=options.prefetch + 1).rev() {
            let fits = (0..order.len()).rev().find(|&n| needed(n, n_buffers) <= budget);
            if let Some(n_resident) = fits {
                let mut resident = vec![false; sizes.len()];
                order[..n_resident].iter().for_each(|&index| resident[index] = true);
                let streamed = order[n_resident..].iter().map(|&index| &sizes[index]);
                return Ok(Self { resident, n_buffers, buffer_bytes: largest(streamed) });
            }
        }
        let expected = (0..order.len()).map(|n| needed(n, 1)).min().unwrap_or(taken) as u64;
        Err(RuntimeError::Memory { found: budget as u64, expected })
    }
}

fn largest<'a>(sizes: impl Iterator<Item = &'a Size>) -> usize {
    sizes.map(|size| size.stored).max().unwrap_or(0)
}

/// Bytes that matrices take if all stay in memory.
pub(crate) fn expected_bytes(sources: &[Source], layout: Layout) -> usize {
    sources.iter().map(|source| source.expected_bytes(layout)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Six matrices of a pass, the last one large, and an embedding.
    fn sizes() -> Vec<Size> {
        [100, 50, 100, 50, 100, 400, 400]
            .map(|stored| Size { resident: stored + stored / 10, stored, kept: 1 })
            .to_vec()
    }

    fn plan(memory: Option<u64>, prefetch: usize) -> Result<Plan, RuntimeError> {
        let options = StoreOptions { memory, prefetch, ..StoreOptions::new(Layout::Fixed) };
        Plan::of_sizes(&sizes(), 6, &options, 10)
    }

    /// Bytes a plan takes.
    fn taken(plan: &Plan) -> usize {
        let sizes = sizes();
        let each = sizes.iter().zip(&plan.resident);
        let bytes = each.map(|(size, &resident)| if resident { size.resident } else { size.kept });
        10 + bytes.sum::<usize>() + plan.n_buffers * plan.buffer_bytes
    }

    #[test]
    fn without_a_bound_or_with_a_wide_one_everything_stays() {
        for memory in [None, Some(1330), Some(u64::MAX)] {
            let plan = plan(memory, 2).unwrap();
            assert_eq!(plan.resident, [true; 7]);
            assert_eq!((plan.n_buffers, plan.buffer_bytes), (0, 0));
        }
    }

    #[test]
    fn every_plan_keeps_within_its_budget() {
        for prefetch in 0..4 {
            for memory in 0..1330 {
                match plan(Some(memory), prefetch) {
                    Ok(plan) => {
                        assert!(taken(&plan) as u64 <= memory, "{memory}: {plan:?}");
                        assert!((1..=prefetch + 1).contains(&plan.n_buffers));
                        assert!(!plan.resident[6], "nobody multiplies with it");
                    }
                    Err(RuntimeError::Memory { found, expected }) => {
                        assert_eq!(found, memory);
                        assert!(
                            plan_fits(expected, prefetch) && !plan_fits(expected - 1, prefetch)
                        );
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    fn plan_fits(memory: u64, prefetch: usize) -> bool {
        plan(Some(memory), prefetch).is_ok()
    }

    #[test]
    fn more_memory_keeps_at_least_as_many_and_the_head_comes_first() {
        let kept = |memory| plan(Some(memory), 1).ok().map(|plan| plan.resident);
        let with_head = kept(700).unwrap();
        assert!(with_head[5]);
        assert_eq!(plan(Some(700), 1).unwrap().buffer_bytes, 100);
    }
}
