//! See `envd::fuzzing::paths`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::paths(input));
