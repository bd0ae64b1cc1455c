//! `bro_user::fuzzing::unit_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::unit_file(input));
