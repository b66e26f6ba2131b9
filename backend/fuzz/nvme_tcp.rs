//! NVMe/TCP from any bytes: PDUs and structures are parsed or refused; an initiator's queue pair and a target's connection
//! take what a peer sends or end the association.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else { return };
    match which % 4 {
        0 => hawser_fabric::tcp::pdu::fuzz(data),
        1 => hawser_fabric::nvme::fuzz(data),
        2 => hawser_fabric::initiator::fuzz::fuzz(data),
        _ => hawser_fabric::target::fuzz::fuzz(data),
    }
});
