//! See `envd::fuzzing::hello`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::hello(input));
