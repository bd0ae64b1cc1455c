//! `bro_user::fuzzing::socket_table`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bro_user::fuzzing::socket_table(input));
