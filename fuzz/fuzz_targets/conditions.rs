//! See `envd::fuzzing::conditions`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::conditions(input));
