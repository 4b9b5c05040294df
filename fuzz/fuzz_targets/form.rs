//! See `envd::fuzzing::form`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::form(input));
