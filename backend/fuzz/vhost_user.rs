//! vhost-user messages from any bytes, with descriptors, to a whole session.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hawser_virtio::harness::fuzz_messages(data));
