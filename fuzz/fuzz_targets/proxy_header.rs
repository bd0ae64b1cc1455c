//! `bro_user::fuzzing::proxy_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bro_user::fuzzing::proxy_header(input));
