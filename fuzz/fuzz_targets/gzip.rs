//! See `envd::fuzzing::gzip`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::gzip(input));
