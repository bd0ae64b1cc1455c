//! `bro_user::fuzzing::target`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::target(input));
