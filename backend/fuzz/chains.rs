//! Descriptor chains from any bytes, parsed and executed over a fake device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hawser_virtio::harness::fuzz_chain(data));
