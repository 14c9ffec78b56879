//! Manifests that nobody wrote; what must hold of them is said in `overspill_swap::attack`, which the tests share.
#![no_main]

libfuzzer_sys::fuzz_target!(|program: &[u8]| overspill_swap::attack::manifest(program));
