//! `bro_user::fuzzing::kernel_types`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bro_user::fuzzing::kernel_types(input));
