//! See `envd::fuzzing::access`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::access(input));
