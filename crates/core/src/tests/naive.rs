//! The obviously correct version: one symbol, one bit, one element at a time.
//!
//! Written from the specification's formulas and not from the code it judges;
//! it shares nothing with it but the frequencies. Lists of numbers instead of
//! bytes, 64-bit arithmetic, divisions wherever the formula has one.

use crate::dtype::Dtype;
use crate::model::FreqTable;

const LANES: usize = 32;
const LOWER_BOUND: u64 = 65_536;

/// Rows and columns of a tile's elements in fragment order: 16x16 blocks, row
/// by row of blocks; register `i` of lane `l` is element `32 i + l` of its
/// block, at the place that the PTX manual gives for `mma.m16n8k16`.
pub fn fragment_order(rows: usize, cols: usize) -> Vec<(usize, usize)> {
    let mut order = Vec::new();
    for block_row in 0..rows / 16 {
        for block_col in 0..cols / 16 {
            for i in 0..8 {
                for lane in 0..LANES {
                    let (group, thread) = (lane / 4, lane % 4);
                    let row = if [0, 1, 4, 5].contains(&i) { group } else { group + 8 };
                    let col = 2 * thread + i % 2 + if i < 4 { 0 } else { 8 };
                    order.push((16 * block_row + row, 16 * block_col + col));
                }
            }
        }
    }
    order
}

/// The planes of elements that are already in tile order.
pub fn split(dtype: Dtype, elements: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let planes_of = |element: &Vec<u8>| match (dtype, element.as_slice()) {
        // s eeeeeeee mmmmmmm, little endian: the exponent; then mmmmmmm s.
        (Dtype::Bf16, &[low, high]) => {
            let exponent = (high & 0x7F) * 2 + low / 128;
            vec![exponent, (low & 0x7F) * 2 + high / 128]
        }
        (Dtype::F16, &[low, high]) => vec![high, low],
        (_, bytes) => bytes.to_vec(),
    };
    let split: Vec<Vec<u8>> = elements.iter().map(planes_of).collect();
    (0..dtype.elem_bytes()).map(|p| split.iter().map(|planes| planes[p]).collect()).collect()
}

/// Order-0 entropy of a plane in bits, all symbols together.
pub fn entropy_bits(plane: &[u8]) -> f64 {
    let n = plane.len() as f64;
    (0..=255)
        .map(|symbol| plane.iter().filter(|&&s| s == symbol).count() as f64)
        .filter(|&count| count > 0.0)
        .map(|count| -count * (count / n).log2())
        .sum()
}

/// First slot of every symbol: symbols by descending frequency, then by value.
fn starts(freqs: &FreqTable) -> Vec<u64> {
    let freqs = freqs.freqs().map(u64::from);
    let mut order: Vec<usize> = (0..256).collect();
    // A stable sort keeps symbols of one frequency in ascending order.
    order.sort_by(|&a, &b| freqs[b].cmp(&freqs[a]));
    let mut starts = vec![0; 256];
    for (place, &symbol) in order.iter().enumerate() {
        starts[symbol] = order[..place].iter().map(|&before| freqs[before]).sum();
    }
    starts
}

/// Plane and position of every coded symbol, in the order of decoding, with
/// its lane; then those that travel in the final states.
struct Schedule {
    coded: Vec<(usize, usize, usize)>,
    /// Of each of the 64 bytes: plane and position, if it is used.
    tail: Vec<Option<(usize, usize)>>,
}

fn schedule(n_elems: usize, n_planes: usize) -> Schedule {
    let share = 64 / n_planes;
    let n_tail = n_elems.min(share);
    let n_coded = n_elems - n_tail;
    let mut coded = Vec::new();
    for step in 0..n_coded.div_ceil(LANES) {
        for plane in 0..n_planes {
            for lane in 0..LANES {
                if LANES * step + lane < n_coded {
                    coded.push((plane, LANES * step + lane, lane));
                }
            }
        }
    }
    let mut tail = Vec::new();
    for plane in 0..n_planes {
        for i in 0..share {
            tail.push((i < n_tail).then_some((plane, n_coded + i)));
        }
    }
    Schedule { coded, tail }
}

/// The stream of a tile.
pub fn encode(planes: &[Vec<u8>], freqs: &[FreqTable]) -> Vec<u8> {
    let schedule = schedule(planes[0].len(), planes.len());
    let starts: Vec<Vec<u64>> = freqs.iter().map(starts).collect();
    let tail: Vec<u64> = (schedule.tail.iter())
        .map(|place| place.map_or(0, |(plane, at)| planes[plane][at].into()))
        .collect();
    let mut states: Vec<u64> =
        (0..LANES).map(|lane| LOWER_BOUND + tail[2 * lane] + 256 * tail[2 * lane + 1]).collect();
    let mut words: Vec<u64> = Vec::new();
    for &(plane, at, lane) in schedule.coded.iter().rev() {
        let symbol = usize::from(planes[plane][at]);
        let (freq, total) =
            (u64::from(freqs[plane].freqs()[symbol]), 1 << freqs[plane].prob_bits());
        let push = |x: u64| (x / freq) * total + starts[plane][symbol] + x % freq;
        // A word leaves exactly when the state would not fit 32 bits otherwise.
        if push(states[lane]) >= 1 << 32 {
            words.push(states[lane] % 65_536);
            states[lane] /= 65_536;
        }
        states[lane] = push(states[lane]);
    }
    words.reverse();
    let mut stream = write_states(&states);
    stream.extend(words.iter().flat_map(|word| [(word % 256) as u8, (word / 256) as u8]));
    stream
}

/// Lengths beyond 17 bits, four bits each; then the states without their
/// leading ones, lowest bit first.
fn write_states(states: &[u64]) -> Vec<u8> {
    let mut bits: Vec<bool> = Vec::new();
    let mut put = |value: u64, n: u64| bits.extend((0..n).map(|i| value / (1 << i) % 2 == 1));
    let length = |state: u64| (0..64).filter(|i| state >= 1 << i).count() as u64;
    states.iter().for_each(|&state| put(length(state) - 17, 4));
    states.iter().for_each(|&state| put(state, length(state) - 1));
    bits.chunks(8)
        .map(|byte| byte.iter().enumerate().map(|(i, &bit)| u8::from(bit) << i).sum())
        .collect()
}

/// The planes of a valid stream.
pub fn decode(stream: &[u8], n_elems: usize, freqs: &[FreqTable]) -> Vec<Vec<u8>> {
    let bits: Vec<u64> =
        stream.iter().flat_map(|byte| (0..8).map(move |i| u64::from(byte >> i & 1))).collect();
    let mut position = 0;
    let mut take = |n: u64| {
        let value: u64 = (0..n).map(|i| bits[position + i as usize] << i).sum();
        position += n as usize;
        value
    };
    let lengths: Vec<u64> = (0..LANES).map(|_| take(4) + 16).collect();
    let mut states: Vec<u64> = lengths.iter().map(|&n| take(n) + (1 << n)).collect();
    let mut words = stream[position.div_ceil(8)..].chunks(2);
    let schedule = schedule(n_elems, freqs.len());
    let starts: Vec<Vec<u64>> = freqs.iter().map(starts).collect();
    let mut planes = vec![vec![0; n_elems]; freqs.len()];
    for &(plane, at, lane) in &schedule.coded {
        let total = 1 << freqs[plane].prob_bits();
        let slot = states[lane] % total;
        let freq = |symbol: usize| u64::from(freqs[plane].freqs()[symbol]);
        let start = &starts[plane];
        let holds = |&symbol: &usize| start[symbol] <= slot && slot < start[symbol] + freq(symbol);
        let symbol = (0..256).find(holds).expect("every slot belongs to a symbol");
        planes[plane][at] = symbol as u8;
        states[lane] = freq(symbol) * (states[lane] / total) + slot - start[symbol];
        if states[lane] < LOWER_BOUND {
            let word = words.next().expect("a word");
            states[lane] = states[lane] * 65_536 + u64::from(word[0]) + 256 * u64::from(word[1]);
        }
    }
    assert_eq!(words.next(), None);
    for (i, place) in schedule.tail.iter().enumerate() {
        let state = states[i / 2];
        assert_eq!(state / 65_536, 1);
        let byte = if i % 2 == 0 { state % 256 } else { state / 256 % 256 };
        match *place {
            Some((plane, at)) => planes[plane][at] = byte as u8,
            None => assert_eq!(byte, 0),
        }
    }
    planes
}
