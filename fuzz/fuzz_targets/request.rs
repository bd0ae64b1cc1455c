//! `bro_user::fuzzing::request`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bro_user::fuzzing::request(input));
