//! `bro_user::fuzzing::activated`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::activated(input));
