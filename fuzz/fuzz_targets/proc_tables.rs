//! `bro_user::fuzzing::proc_tables`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bro_user::fuzzing::proc_tables(input));
