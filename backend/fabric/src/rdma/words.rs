//! What errors of verbs and of rdma_cm mean, for people: what is wrong and what would be right.
#![forbid(unsafe_code)]

use super::driver;
use super::private::Reject;
use hawser_verbs_abi::{CmEvent, Table, event};
use std::io;

/// An errno that a function of the table returned, without its number.
pub(crate) fn errno(code: i32) -> String {
    crate::initiator::plain_error(&io::Error::from_raw_os_error(-code))
}

/// Why no device leads to an address: looks at this host's devices. Slow: never on a reactor's thread.
pub(crate) fn no_device(table: &Table, why: &str) -> String {
    let devices = driver::devices(table);
    if devices.is_empty() {
        return "this host has no RDMA device, want one (`rdma link` shows them; a network interface gets one by `rdma link add \
            rxe0 type rxe netdev IFACE`)"
            .to_owned();
    }
    // Of one that cannot be opened nothing is known but its name.
    let closed: Vec<String> =
        devices.iter().filter(|device| device.queues_max == 0).map(driver::name).collect();
    if closed.len() == devices.len() {
        return format!(
            "RDMA device {} cannot be opened, want /dev/infiniband readable and writable for the daemon, and there when it starts",
            closed.join(", ")
        );
    }
    let down: Vec<String> = devices.iter().filter(|device| !device.is_up).map(driver::name).collect();
    if down.len() == devices.len() {
        return format!("RDMA device {} is down, want its link up", down.join(", "));
    }
    let names: Vec<String> = devices.iter().map(driver::name).collect();
    format!("no RDMA device leads there ({why}), want an address on the network of {}", names.join(" or "))
}

/// What an event means that is not the one that was awaited.
pub(crate) fn event(event: &CmEvent) -> String {
    let status = event.status;
    match event.kind {
        event::ADDRESS_ERROR => {
            format!("the address cannot be resolved: {}", errno(status.abs().saturating_neg()))
        }
        event::ROUTE_ERROR => format!("there is no route: {}", errno(status.abs().saturating_neg())),
        event::CONNECT_ERROR => format!("the connection failed: {}", errno(status.abs().saturating_neg())),
        event::UNREACHABLE => {
            format!(
                "no answer, want an address at which an NVMe/RDMA target listens ({})",
                errno(status.abs().saturating_neg())
            )
        }
        event::REJECTED => rejected(event),
        event::DISCONNECTED => "the target closed the connection".to_owned(),
        event::DEVICE_REMOVAL => "the RDMA device was removed".to_owned(),
        event::ADDRESS_CHANGE => "the network interface of the RDMA device has another address".to_owned(),
        event::TIMEWAIT_EXIT => "the connection has ended".to_owned(),
        other => format!("rdma_cm reports event {other}"),
    }
}

/// Reasons of IBTA's REJ message (12.6.7.2), and iWARP's errno.
const CONSUMER_DEFINED: i32 = 28;

fn rejected(event: &CmEvent) -> String {
    let reason = match event.status {
        CONSUMER_DEFINED => {
            let private = &event.private[..usize::from(event.private_len)];
            let said = Reject::from_bytes(private).map(|reject| reject.to_string());
            let said = said.unwrap_or_else(|| "it does not say why; does it speak NVMe/RDMA?".to_owned());
            return format!("the target refused the connection: {said}");
        }
        1 => "it has no queue pair left",
        3 => "it has no resources left",
        4 => "no answer in time",
        5 => "it does not support this request",
        6 | 7 => "the identifier of the connection is not valid there",
        8 => return "nobody listens there, want an address at which an NVMe/RDMA target listens".to_owned(),
        10 => "the connection is stale there: it comes up again once the old one has ended",
        13 | 14 | 24 | 25 => "the target is to be reached at another address",
        15 | 26 => "it takes no path of this size",
        27 => "it takes no RDMA reads of this number",
        other if other < 0 => {
            return format!("the target refused the connection: {}", errno(other));
        }
        111 => {
            return "nobody listens there, want an address at which an NVMe/RDMA target listens".to_owned();
        }
        other => return format!("the target refused the connection: reason {other}"),
    };
    format!("the target refused the connection: {reason}")
}

/// Whether a refusal is one that asking again does not change soon.
pub(crate) fn is_refusal(event: &CmEvent) -> bool {
    event.kind == event::REJECTED && [CONSUMER_DEFINED, 8, 111, -111].contains(&event.status)
}

/// `enum ibv_wc_status`.
pub(crate) fn completion(status: u32) -> &'static str {
    match status {
        1 => "a message of the target was longer than it may be",
        2 => "the device could not carry out a request (local queue pair operation error)",
        4 => "memory of a request is not registered as the request needs it (local protection error)",
        5 => "the connection ended under it",
        6 => "a memory window could not be bound",
        9 => "the target refused a request as not valid",
        10 => "the target was refused access to memory: it used a key that is not valid (any more)",
        11 => "the target could not carry out a request (remote operation error)",
        12 => "the target does not answer any more (retries exceeded)",
        13 => "the target has no room for commands that it said that it has (RNR retries exceeded)",
        21 => "the device has failed (fatal error)",
        _ => "the device reports an error",
    }
}

/// The same at a target, for its log: nothing where the host has gone.
pub(crate) fn host_completion(status: u32) -> String {
    match status {
        5 => String::new(),
        10 => "its key does not lead to memory of its own (any more)".to_owned(),
        12 => "it does not answer any more (retries exceeded)".to_owned(),
        13 => "it has no room for answers (RNR retries exceeded)".to_owned(),
        1 => "it sent more than a capsule has room for".to_owned(),
        other => format!("the RDMA device reports completion status {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected_with(status: i32, private: &[u8]) -> CmEvent {
        let mut event = CmEvent { kind: event::REJECTED, status, ..CmEvent::NONE };
        event.private[..private.len()].copy_from_slice(private);
        event.private_len = u8::try_from(private.len()).unwrap();
        event
    }

    #[test]
    fn a_refusal_is_told_in_the_target_s_words() {
        for (status, private, want) in [
            (28, &Reject::Resources.to_bytes()[..], "no resources left for another queue"),
            (28, &[0; 148][..], "does it speak NVMe/RDMA?"),
            (8, &[][..], "nobody listens there"),
            (-111, &[][..], "connection refused"),
            (99, &[][..], "reason 99"),
        ] {
            let text = event(&rejected_with(status, private));
            assert!(text.contains(want), "{text}");
        }
        let unreachable = CmEvent { kind: event::UNREACHABLE, status: -110, ..CmEvent::NONE };
        assert!(event(&unreachable).contains("timed out"), "{}", event(&unreachable));
    }
}
