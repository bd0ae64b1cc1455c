//! `bro_user::fuzzing::time_span`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::time_span(input));
