//! `bro_user::fuzzing::command_line`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::command_line(input));
