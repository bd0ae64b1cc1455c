//! `bro_user::fuzzing::environment`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::environment(input));
