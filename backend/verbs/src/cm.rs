//! rdma_cm: event channels, ids, and what is asked of them. An [`Id`] is an `rdma_cm_id`, an [`EventChannel`] an `rdma_event_channel`.

use crate::{checked, last_errno, non_blocking};
use hawser_verbs_abi::{CmEvent, ConnectParameters, Device, EventChannel, Id, event};
use rdma_sys as rdma;
use std::ffi::c_void;

pub(crate) unsafe extern "C" fn channel_open(out: *mut *mut EventChannel, fd: *mut i32) -> i32 {
    // SAFETY: no condition.
    let channel = unsafe { rdma::rdma_create_event_channel() };
    if channel.is_null() {
        return last_errno();
    }
    // SAFETY: the channel was just made.
    let descriptor = unsafe { (*channel).fd };
    let result = non_blocking(descriptor);
    if result < 0 {
        // SAFETY: it was just made, and nobody has it.
        unsafe { rdma::rdma_destroy_event_channel(channel) };
        return result;
    }
    // SAFETY: the caller gives room for both.
    unsafe {
        *out = channel.cast();
        *fd = descriptor;
    }
    0
}

pub(crate) unsafe extern "C" fn channel_close(channel: *mut EventChannel) {
    // SAFETY: from `channel_open`; the caller has no id on it any more.
    unsafe { rdma::rdma_destroy_event_channel(channel.cast()) };
}

pub(crate) unsafe extern "C" fn channel_event(channel: *mut EventChannel, out: *mut CmEvent) -> i32 {
    let mut raw: *mut rdma::rdma_cm_event = std::ptr::null_mut();
    // SAFETY: from `channel_open`; its descriptor does not block.
    if unsafe { rdma::rdma_get_cm_event(channel.cast(), &raw mut raw) } != 0 {
        let error = last_errno();
        return if error == -libc::EAGAIN || error == -libc::EINTR { 0 } else { error };
    }
    // SAFETY: an event was given; it is ours until it is acknowledged. A union's fields are plain data.
    let copy = unsafe {
        let raw = &*raw;
        let mut copy = CmEvent { kind: raw.event, status: raw.status, id: raw.id.cast(), ..CmEvent::NONE };
        let has_data = [event::CONNECT_REQUEST, event::CONNECT_RESPONSE, event::REJECTED, event::ESTABLISHED];
        if has_data.contains(&raw.event) {
            let parameters = raw.param.conn;
            copy.responder_resources = parameters.responder_resources;
            copy.initiator_depth = parameters.initiator_depth;
            if !parameters.private_data.is_null() {
                let len = usize::from(parameters.private_data_len);
                let from = parameters.private_data.cast::<u8>();
                std::ptr::copy_nonoverlapping(from, copy.private.as_mut_ptr(), len);
                copy.private_len = parameters.private_data_len;
            }
        }
        copy
    };
    // SAFETY: acknowledged once, after the last use of it; closing its id waits for this. The caller gives room.
    unsafe {
        rdma::rdma_ack_cm_event(raw);
        *out = copy;
    }
    1
}

pub(crate) unsafe extern "C" fn id_open(channel: *mut EventChannel, out: *mut *mut Id) -> i32 {
    let mut id: *mut rdma::rdma_cm_id = std::ptr::null_mut();
    let space = rdma::rdma_port_space::RDMA_PS_TCP;
    // SAFETY: the channel is from `channel_open`, and the caller gives room.
    unsafe {
        let result = rdma::rdma_create_id(channel.cast(), &raw mut id, std::ptr::null_mut(), space);
        *out = id.cast();
        checked(result)
    }
}

pub(crate) unsafe extern "C" fn id_close(id: *mut Id) {
    // SAFETY: an id of ours, which has no queue any more, and of which every event was acknowledged as it was taken.
    unsafe { rdma::rdma_destroy_id(id.cast()) };
}

pub(crate) unsafe extern "C" fn id_migrate(id: *mut Id, channel: *mut EventChannel) -> i32 {
    // SAFETY: both are of ours.
    checked(unsafe { rdma::rdma_migrate_id(id.cast(), channel.cast()) })
}

pub(crate) unsafe extern "C" fn resolve_address(id: *mut Id, address: *const c_void, timeout_ms: i32) -> i32 {
    // SAFETY: an id of ours; the caller gives a socket address of its family's length, which is only read.
    checked(unsafe {
        rdma::rdma_resolve_addr(id.cast(), std::ptr::null_mut(), address.cast_mut().cast(), timeout_ms)
    })
}

pub(crate) unsafe extern "C" fn resolve_route(id: *mut Id, timeout_ms: i32) -> i32 {
    // SAFETY: an id of ours.
    checked(unsafe { rdma::rdma_resolve_route(id.cast(), timeout_ms) })
}

pub(crate) unsafe extern "C" fn bind(id: *mut Id, address: *const c_void) -> i32 {
    // SAFETY: as in `resolve_address`.
    checked(unsafe { rdma::rdma_bind_addr(id.cast(), address.cast_mut().cast()) })
}

pub(crate) unsafe extern "C" fn listen(id: *mut Id, backlog: i32) -> i32 {
    // SAFETY: an id of ours.
    checked(unsafe { rdma::rdma_listen(id.cast(), backlog) })
}

pub(crate) unsafe extern "C" fn port(id: *mut Id) -> u16 {
    // SAFETY: an id of ours.
    u16::from_be(unsafe { rdma::rdma_get_src_port(id.cast()) })
}

/// A message that gets no answer is sent again so often, at most: 7 is the most that the field holds.
const RETRIES: u8 = 7;
/// 7 is without end: a receiver that has posted no memory yet is waited for.
const RNR_RETRIES: u8 = 7;

unsafe fn parameters(parameters: *const ConnectParameters) -> rdma::rdma_conn_param {
    // SAFETY: the caller's promise.
    let ours = unsafe { &*parameters };
    rdma::rdma_conn_param {
        private_data: ours.private.cast(),
        private_data_len: ours.private_len,
        responder_resources: ours.responder_resources,
        initiator_depth: ours.initiator_depth,
        flow_control: 1,
        retry_count: RETRIES,
        rnr_retry_count: RNR_RETRIES,
        srq: 0,
        qp_num: 0,
    }
}

pub(crate) unsafe extern "C" fn connect(id: *mut Id, wanted: *const ConnectParameters) -> i32 {
    // SAFETY: an id of ours; the caller gives parameters.
    unsafe {
        let mut raw = parameters(wanted);
        checked(rdma::rdma_connect(id.cast(), &raw mut raw))
    }
}

pub(crate) unsafe extern "C" fn accept(id: *mut Id, wanted: *const ConnectParameters) -> i32 {
    // SAFETY: an id of ours; the caller gives parameters.
    unsafe {
        let mut raw = parameters(wanted);
        checked(rdma::rdma_accept(id.cast(), &raw mut raw))
    }
}

pub(crate) unsafe extern "C" fn reject(id: *mut Id, private: *const u8, len: u8) -> i32 {
    // SAFETY: an id of ours; the caller gives `len` bytes.
    checked(unsafe { rdma::rdma_reject(id.cast(), private.cast(), len) })
}

pub(crate) unsafe extern "C" fn disconnect(id: *mut Id) -> i32 {
    // SAFETY: an id of ours. On an asynchronous id this sends a message and returns.
    checked(unsafe { rdma::rdma_disconnect(id.cast()) })
}

pub(crate) unsafe extern "C" fn device(id: *mut Id) -> *mut Device {
    // SAFETY: an id of ours.
    unsafe { (*id.cast::<rdma::rdma_cm_id>()).verbs.cast() }
}
