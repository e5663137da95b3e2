//! See [`transom_fuzz::isa_agree`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transom_fuzz::isa_agree::check(data));
