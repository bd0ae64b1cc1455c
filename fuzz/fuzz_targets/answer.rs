//! `bro_user::fuzzing::answer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::answer(input));
