//! See [`transom_fuzz::safetensors_header`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| transom_fuzz::safetensors_header::check(data));
