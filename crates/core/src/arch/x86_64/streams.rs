//! How the vector decoders take words: a whole vector at a time, and never
//! beyond the end of the stream.

use crate::coder::rans::{LANES, Stream, WORD_BYTES};

/// Most bytes that one symbol of all lanes takes, and that a kernel reads for it.
const STEP_BYTES: usize = LANES * WORD_BYTES;

/// Lane states, words and output of `N` streams with `P` coded planes each.
pub(super) struct Kernel<const N: usize, const P: usize> {
    pub(super) states: [[u32; LANES]; N],
    pub(super) words: [*const u8; N],
    pub(super) outs: [[*mut u8; P]; N],
}

/// Runs `kernel` over as many whole steps as all streams can take; returns the
/// number of symbols of each plane.
///
/// `kernel(k, n)` decodes `n` steps of all streams: it may read 64 bytes of
/// words for each symbol of a step, moves `k.words` by what it took, and
/// writes `32 n` symbols of each plane, moving `k.outs`.
///
/// While 64 bytes a symbol are there, it reads the words where they are. The
/// last few are copied in front of zeros; a step that takes any of the zeros
/// is undone, and the caller finds the same error symbol by symbol.
///
/// # Safety
///
/// `streams` has `N` entries with `P` slices, all of one length, and `kernel`
/// is safe to call under the conditions above.
pub(super) unsafe fn run<const N: usize, const P: usize>(
    streams: &mut [Stream<'_, '_, '_>],
    mut kernel: impl FnMut(&mut Kernel<N, P>, usize),
) -> usize {
    debug_assert!(streams.len() == N && streams.iter().all(|s| s.outs.len() == P));
    let n_steps = streams[0].outs[0].len() / LANES;
    let mut done = 0;
    let mut state = Kernel {
        states: std::array::from_fn(|i| streams[i].cursor.states),
        words: [std::ptr::null(); N],
        outs: std::array::from_fn(|i| std::array::from_fn(|p| streams[i].outs[p].as_mut_ptr())),
    };
    while done < n_steps {
        let least = streams.iter().map(|s| s.cursor.words.len()).min().expect("N > 0");
        let safe = (least / (STEP_BYTES * P)).min(n_steps - done);
        let mut padded = [[0u8; 2 * STEP_BYTES * 2]; N];
        let steps = safe.max(1);
        for i in 0..N {
            let words = streams[i].cursor.words;
            state.words[i] = words.as_ptr();
            if words.len() < STEP_BYTES * P {
                padded[i][..words.len()].copy_from_slice(words);
                state.words[i] = padded[i].as_ptr();
            }
        }
        let (before_states, before_words, before_outs) = (state.states, state.words, state.outs);
        kernel(&mut state, steps);
        let taken: [usize; N] =
            std::array::from_fn(|i| state.words[i] as usize - before_words[i] as usize);
        if (0..N).any(|i| taken[i] > streams[i].cursor.words.len()) {
            state.states = before_states;
            state.outs = before_outs;
            break;
        }
        for i in 0..N {
            streams[i].cursor.words = &streams[i].cursor.words[taken[i]..];
        }
        done += steps;
    }
    for i in 0..N {
        streams[i].cursor.states = state.states[i];
    }
    done * LANES
}
