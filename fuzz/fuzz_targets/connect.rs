//! See `envd::fuzzing::connect`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::connect(input));
