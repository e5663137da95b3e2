//! One suite, run for every instruction set; properties; and the naive coder
//! they are judged by.

mod data;
mod naive;
mod prop;
mod suite;

use crate::Isa;

/// Runs one test of the suite, or says why not.
fn run(isa: Isa, test: fn(Isa)) {
    if isa.is_available() {
        test(isa);
    } else {
        println!("SKIPPED: this machine has no {}", isa.name());
    }
}

/// The suite as a module for each instruction set.
macro_rules! suite {
    ($($module:ident: $isa:expr),+ ; $tests:tt) => {
        $(suite!(@module $module, $isa, $tests);)+

        #[test]
        fn every_instruction_set_has_its_suite() {
            assert_eq!([$($isa),+], Isa::ALL);
        }
    };
    (@module $module:ident, $isa:expr, { $($test:ident),+ $(,)? }) => {
        mod $module {
            use crate::Isa;

            $(#[test]
            fn $test() {
                super::run($isa, super::suite::$test);
            })+
        }
    };
}

suite! {
    scalar: Isa::Scalar, avx2: Isa::Avx2, avx512: Isa::Avx512;
    {
        streams_are_those_of_the_naive_coder,
        every_prob_bits_works,
        a_single_symbol_takes_no_words,
        truncated_streams_are_errors,
        streams_of_other_lengths_are_errors,
        unknown_symbols_are_errors,
        several_streams_decode_as_one_does,
        a_tile_can_be_decoded_in_pieces,
        planes_are_those_of_the_naive_split,
        every_bit_pattern_of_16_bits_round_trips,
        every_byte_round_trips,
        every_short_length_round_trips,
        lengths_around_a_tile_round_trip,
        sides_around_a_tile_round_trip,
        shapes_of_every_kind_round_trip,
        one_distinct_symbol_costs_next_to_nothing,
        equally_likely_symbols_are_stored_raw,
        a_tile_that_does_not_shrink_is_raw,
        half_precision_that_was_bfloat16_has_two_coded_planes,
        truncated_records_are_errors,
        every_flipped_bit_is_an_error,
        slices_are_parts_of_the_whole,
    }
}
