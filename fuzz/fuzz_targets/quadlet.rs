//! `bro_user::fuzzing::quadlet`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &str| bro_user::fuzzing::quadlet(input));
