//! A queue pair of a connection, with one completion queue for both directions and the channel that wakes its reactor.

use crate::{last_errno, negated, non_blocking};
use hawser_verbs_abi::{
    Domain, Id, Queue, QueueSize, ReceiveRequest, Segment, SendRequest, WorkCompletion, operation,
};
use rdma_sys as rdma;

/// Completions that are translated at once.
const POLLED: usize = 32;

// What is passed on as it is.
const _: () = assert!(size_of::<Segment>() == size_of::<rdma::ibv_sge>());

/// What a [`Queue`] is.
struct Pair {
    id: *mut rdma::rdma_cm_id,
    channel: *mut rdma::ibv_comp_channel,
    completions: *mut rdma::ibv_cq,
    /// A completion will make the channel's descriptor readable, or has.
    armed: bool,
    /// By which flags a completion says that a key was made invalid.
    invalidated: u32,
    /// Room to translate requests in, for as many as the queue has: a chain of them is one doorbell.
    send_chain: Box<[rdma::ibv_send_wr]>,
    receive_chain: Box<[rdma::ibv_recv_wr]>,
}

/// Room for a chain of `len` requests.
///
/// # Safety
/// A `T` may be all zeroes.
unsafe fn chain<T>(len: u32) -> Box<[T]> {
    // SAFETY: the caller's promise.
    (0..len.max(1)).map(|_| unsafe { std::mem::zeroed() }).collect()
}

/// Soft-RoCE's vendor id (`RXE_VENDOR_ID` in Linux).
const SOFT_ROCE: u32 = 0xff_ffff;
/// `IB_WC_WITH_INVALIDATE`, by which Linux says it in the kernel. Soft-RoCE writes completions from there to user space as they are (seen
/// with 6.1), where this flag is another's, and one that connected queue pairs never have: IBV_WC_IP_CSUM_OK.
const KERNEL_WITH_INVALIDATE: u32 = 1 << 2;

unsafe fn invalidated_flags(context: *mut rdma::ibv_context) -> u32 {
    // SAFETY: plain data, filled by the call, of a context that is open.
    unsafe {
        let mut attributes: rdma::ibv_device_attr = std::mem::zeroed();
        let known = rdma::ibv_query_device(context, &raw mut attributes) == 0;
        let more = if known && attributes.vendor_id == SOFT_ROCE { KERNEL_WITH_INVALIDATE } else { 0 };
        rdma::ibv_wc_flags::IBV_WC_WITH_INV.0 | more
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: what there is was made by `open`, and goes in the reverse order. All events of the completion queue were
        // acknowledged as they were taken.
        unsafe {
            if !(*self.id).qp.is_null() {
                rdma::rdma_destroy_qp(self.id);
            }
            if !self.completions.is_null() {
                rdma::ibv_destroy_cq(self.completions);
            }
            if !self.channel.is_null() {
                rdma::ibv_destroy_comp_channel(self.channel);
            }
        }
    }
}

pub(crate) unsafe extern "C" fn open(
    id: *mut Id,
    domain: *mut Domain,
    size: *const QueueSize,
    out: *mut *mut Queue,
    fd: *mut i32,
) -> i32 {
    // SAFETY: the caller's promise.
    let QueueSize { sends, receives, segments } = unsafe { *size };
    let id = id.cast::<rdma::rdma_cm_id>();
    let null: *mut std::ffi::c_void = std::ptr::null_mut();
    let mut pair = Box::new(Pair {
        id,
        channel: null.cast(),
        completions: null.cast(),
        armed: false,
        invalidated: 0,
        // SAFETY: plain data, of which null pointers are a part.
        send_chain: unsafe { chain(sends) },
        // SAFETY: as above.
        receive_chain: unsafe { chain(receives) },
    });
    // SAFETY: the id has a device, as its caller has looked; everything that is made here is undone by `Pair`'s drop.
    unsafe {
        let context = (*id).verbs;
        pair.invalidated = invalidated_flags(context);
        pair.channel = rdma::ibv_create_comp_channel(context);
        if pair.channel.is_null() {
            return last_errno();
        }
        let result = non_blocking((*pair.channel).fd);
        if result < 0 {
            return result;
        }
        let entries = i32::try_from(sends + receives).unwrap_or(i32::MAX);
        pair.completions = rdma::ibv_create_cq(context, entries, null, pair.channel, 0);
        if pair.completions.is_null() {
            return last_errno();
        }
        let mut wanted: rdma::ibv_qp_init_attr = std::mem::zeroed();
        wanted.send_cq = pair.completions;
        wanted.recv_cq = pair.completions;
        wanted.cap.max_send_wr = sends;
        wanted.cap.max_recv_wr = receives;
        wanted.cap.max_send_sge = segments;
        wanted.cap.max_recv_sge = 1;
        wanted.qp_type = rdma::ibv_qp_type::IBV_QPT_RC;
        if rdma::rdma_create_qp(id, domain.cast(), &raw mut wanted) != 0 {
            return last_errno();
        }
        *fd = (*pair.channel).fd;
        *out = Box::into_raw(pair).cast();
    }
    0
}

pub(crate) unsafe extern "C" fn error(queue: *mut Queue) -> i32 {
    // SAFETY: from `open`.
    unsafe {
        let pair = &*queue.cast::<Pair>();
        let mut attributes: rdma::ibv_qp_attr = std::mem::zeroed();
        attributes.qp_state = rdma::ibv_qp_state::IBV_QPS_ERR;
        let what = rdma::ibv_qp_attr_mask::IBV_QP_STATE.0;
        negated(rdma::ibv_modify_qp((*pair.id).qp, &raw mut attributes, i32::try_from(what).unwrap_or(0)))
    }
}

pub(crate) unsafe extern "C" fn close(queue: *mut Queue) {
    // SAFETY: from `open`, once.
    drop(unsafe { Box::from_raw(queue.cast::<Pair>()) });
}

fn opcode(ours: u32) -> rdma::ibv_wr_opcode::Type {
    match ours {
        operation::SEND_INVALIDATE => rdma::ibv_wr_opcode::IBV_WR_SEND_WITH_INV,
        operation::WRITE => rdma::ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        operation::READ => rdma::ibv_wr_opcode::IBV_WR_RDMA_READ,
        operation::BIND => rdma::ibv_wr_opcode::IBV_WR_BIND_MW,
        operation::INVALIDATE => rdma::ibv_wr_opcode::IBV_WR_LOCAL_INV,
        _ => rdma::ibv_wr_opcode::IBV_WR_SEND,
    }
}

fn translate(ours: &SendRequest, raw: &mut rdma::ibv_send_wr) {
    raw.wr_id = ours.user;
    raw.next = std::ptr::null_mut();
    raw.sg_list = ours.segments.cast_mut().cast();
    raw.num_sge = i32::try_from(ours.segments_len).unwrap_or(0);
    raw.opcode = opcode(ours.operation);
    let mut flags = 0;
    if ours.signalled {
        flags |= rdma::ibv_send_flags::IBV_SEND_SIGNALED.0;
    }
    if ours.fenced {
        flags |= rdma::ibv_send_flags::IBV_SEND_FENCE.0;
    }
    raw.send_flags = flags;
    match ours.operation {
        operation::READ | operation::WRITE => {
            raw.wr.rdma = rdma::rdma_t { remote_addr: ours.address, rkey: ours.key };
        }
        operation::SEND_INVALIDATE | operation::INVALIDATE => {
            raw.imm_data_invalidated_rkey_union.invalidated_rkey = ours.key;
        }
        operation::BIND => {
            raw.bind_mw_tso_union.bind_mw = rdma::bind_mw_t {
                mw: ours.window.cast(),
                rkey: ours.key,
                bind_info: rdma::ibv_mw_bind_info {
                    mr: ours.region.cast(),
                    addr: ours.address,
                    length: ours.len,
                    mw_access_flags: ours.access,
                },
            };
        }
        _ => {}
    }
}

/// How many requests of a chain of `len` in `chain` were taken, of which `bad` is the first that was not.
fn taken<T>(result: i32, bad: *const T, chain: &[T], len: usize) -> u32 {
    let index = (bad.addr().saturating_sub(chain.as_ptr().addr())) / size_of::<T>();
    u32::try_from(if result == 0 { len } else { index.min(len) }).unwrap_or(0)
}

pub(crate) unsafe extern "C" fn post_send(
    queue: *mut Queue,
    requests: *const SendRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    // SAFETY: from `open`; the caller gives `len` requests, whose segments stay in place until this returns, and room for a count.
    // The queue is used by one thread at a time. The chain leads through those of its entries that were filled.
    unsafe {
        let pair = &mut *queue.cast::<Pair>();
        let requests = std::slice::from_raw_parts(requests, len as usize);
        *posted = 0;
        let raw = &mut pair.send_chain;
        // More than the queue has room for is refused by the device.
        for piece in requests.chunks(raw.len()) {
            for (index, request) in piece.iter().enumerate() {
                translate(request, &mut raw[index]);
                if index > 0 {
                    let this = &raw mut raw[index];
                    raw[index - 1].next = this;
                }
            }
            let mut bad: *mut rdma::ibv_send_wr = std::ptr::null_mut();
            let result = rdma::ibv_post_send((*pair.id).qp, raw.as_mut_ptr(), &raw mut bad);
            *posted += taken(result, bad, raw, piece.len());
            if result != 0 {
                return negated(result);
            }
            // Providers that look it up there (Soft-RoCE's) find a window by the name that it was bound by last.
            for bound in piece.iter().filter(|request| request.operation == operation::BIND) {
                (*bound.window.cast::<rdma::ibv_mw>()).rkey = bound.key;
            }
        }
    }
    0
}

pub(crate) unsafe extern "C" fn post_receive(
    queue: *mut Queue,
    requests: *const ReceiveRequest,
    len: u32,
    posted: *mut u32,
) -> i32 {
    // SAFETY: as in `post_send`.
    unsafe {
        let pair = &mut *queue.cast::<Pair>();
        let requests = std::slice::from_raw_parts(requests, len as usize);
        *posted = 0;
        let raw = &mut pair.receive_chain;
        for piece in requests.chunks(raw.len()) {
            for (index, request) in piece.iter().enumerate() {
                raw[index] = rdma::ibv_recv_wr {
                    wr_id: request.user,
                    next: std::ptr::null_mut(),
                    sg_list: (&raw const request.segment).cast_mut().cast(),
                    num_sge: 1,
                };
                if index > 0 {
                    let this = &raw mut raw[index];
                    raw[index - 1].next = this;
                }
            }
            let mut bad: *mut rdma::ibv_recv_wr = std::ptr::null_mut();
            let result = rdma::ibv_post_recv((*pair.id).qp, raw.as_mut_ptr(), &raw mut bad);
            *posted += taken(result, bad, raw, piece.len());
            if result != 0 {
                return negated(result);
            }
        }
    }
    0
}

pub(crate) unsafe extern "C" fn poll(queue: *mut Queue, out: *mut WorkCompletion, len: u32) -> i32 {
    // SAFETY: from `open`; the caller gives room for `len`. The array is plain data, of which as much is read as was filled.
    unsafe {
        let pair = &*queue.cast::<Pair>();
        let mut raw: [rdma::ibv_wc; POLLED] = std::mem::zeroed();
        let want = (len as usize).min(POLLED);
        let count = rdma::ibv_poll_cq(pair.completions, i32::try_from(want).unwrap_or(0), raw.as_mut_ptr());
        let Ok(count) = usize::try_from(count) else { return -libc::EIO };
        for (index, completion) in raw[..count].iter().enumerate() {
            let has_invalidated = completion.wc_flags & pair.invalidated != 0;
            *out.add(index) = WorkCompletion {
                user: completion.wr_id,
                status: completion.status,
                len: completion.byte_len,
                invalidated: completion.imm_data_invalidated_rkey_union.invalidated_rkey,
                has_invalidated,
                vendor: completion.vendor_err,
            };
        }
        i32::try_from(count).unwrap_or(0)
    }
}

pub(crate) unsafe extern "C" fn arm(queue: *mut Queue) -> i32 {
    // SAFETY: from `open`, used by one thread at a time. The channel's descriptor does not block; every event that is taken is
    // acknowledged at once.
    unsafe {
        let pair = &mut *queue.cast::<Pair>();
        if pair.armed {
            loop {
                let (mut completions, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
                if rdma::ibv_get_cq_event(pair.channel, &raw mut completions, &raw mut context) != 0 {
                    break;
                }
                rdma::ibv_ack_cq_events(completions, 1);
                pair.armed = false;
            }
        }
        if pair.armed {
            // Its event is still to come.
            return 0;
        }
        let result = rdma::ibv_req_notify_cq(pair.completions, 0);
        pair.armed = result == 0;
        negated(result)
    }
}
