//! See `envd::fuzzing::sockets`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| envd::fuzzing::sockets(input));
