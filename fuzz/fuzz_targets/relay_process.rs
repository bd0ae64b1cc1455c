//! `bro_user::fuzzing::relay_process`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bro_user::fuzzing::relay_process(input));
