//! Devices, domains, registered memory, windows. A [`Device`] is an `ibv_context` (rdma_cm opens one for each device and keeps it), a
//! [`Domain`] an `ibv_pd`, a [`Region`] an `ibv_mr`, a [`Window`] an `ibv_mw`.

use crate::{last_errno, negated, unsigned};
use hawser_verbs_abi::{Device, DeviceAttributes, Domain, Keys, Region, Window};
use rdma_sys as rdma;
use std::ffi::c_void;

pub(crate) unsafe extern "C" fn devices(out: *mut DeviceAttributes, len: u32) -> i32 {
    let mut count = 0;
    // SAFETY: room for the number; the list is freed below.
    let list = unsafe { rdma::ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        let error = last_errno();
        // There are no RDMA modules at all.
        return if error == -libc::ENOSYS { 0 } else { error };
    }
    for index in 0..unsigned(count).min(len) as usize {
        // SAFETY: within the list; a device is opened and closed here, and `out` has room for `len`.
        unsafe {
            let mut found = DeviceAttributes::NONE;
            let device = *list.add(index);
            found.name = name_of(device);
            let context = rdma::ibv_open_device(device);
            if !context.is_null() {
                attributes(context.cast(), &raw mut found);
                rdma::ibv_close_device(context);
            }
            *out.add(index) = found;
        }
    }
    // SAFETY: from `ibv_get_device_list`.
    unsafe { rdma::ibv_free_device_list(list) };
    count
}

unsafe fn name_of(device: *mut rdma::ibv_device) -> [u8; 64] {
    let mut name = [0; 64];
    // SAFETY: a device of verbs', whose name ends with a zero.
    let from = unsafe { std::ffi::CStr::from_ptr(rdma::ibv_get_device_name(device)) }.to_bytes();
    let len = from.len().min(63);
    name[..len].copy_from_slice(&from[..len]);
    name
}

pub(crate) unsafe extern "C" fn attributes(device: *mut Device, out: *mut DeviceAttributes) -> i32 {
    let context = device.cast::<rdma::ibv_context>();
    // SAFETY: plain data, filled below.
    let mut raw: rdma::ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: a context that is open, and room for its attributes.
    let result = unsafe { rdma::ibv_query_device(context, &raw mut raw) };
    if result != 0 {
        return negated(result);
    }
    let windows_2b = raw.device_cap_flags & rdma::ibv_device_cap_flags::IBV_DEVICE_MEM_WINDOW_TYPE_2B.0 != 0;
    let is_up = (1..=raw.phys_port_cnt).any(|port| {
        // SAFETY: a context that is open and one of its ports. The symbol fills the part of the struct that rdma-core had when it
        // was first released; the rest stays zero.
        unsafe {
            let mut attributes: rdma::ibv_port_attr = std::mem::zeroed();
            rdma::ibv_query_port(context, port, (&raw mut attributes).cast()) == 0
                && attributes.state == rdma::ibv_port_state::IBV_PORT_ACTIVE
        }
    });
    let found = DeviceAttributes {
        // SAFETY: a context that is open has a device.
        name: unsafe { name_of((*context).device) },
        queues_max: unsigned(raw.max_qp),
        requests_max: unsigned(raw.max_qp_wr),
        segments_max: unsigned(raw.max_sge),
        completions_max: unsigned(raw.max_cqe),
        windows_max: unsigned(raw.max_mw),
        reads_answered_max: unsigned(raw.max_qp_rd_atom),
        reads_max: unsigned(raw.max_qp_init_rd_atom),
        windows_2b,
        is_up,
    };
    // SAFETY: the caller gives room.
    unsafe { *out = found };
    0
}

pub(crate) unsafe extern "C" fn domain_open(device: *mut Device, out: *mut *mut Domain) -> i32 {
    // rdma_cm closes the context of a device that was removed when no id is on it any more; a domain, and what is registered in it, are
    // of that context and live as long as the process. Asking for all devices holds on to their contexts until the list is freed, which
    // it never is.
    // SAFETY: no condition; the number is not asked for. The devices were opened by it before, or are now.
    unsafe { rdma::rdma_get_devices(std::ptr::null_mut()) };
    // SAFETY: a context that is open, and room for the result.
    unsafe {
        let domain = rdma::ibv_alloc_pd(device.cast());
        *out = domain.cast();
        if domain.is_null() { last_errno() } else { 0 }
    }
}

pub(crate) unsafe extern "C" fn register(
    domain: *mut Domain,
    start: *mut c_void,
    len: usize,
    access: u32,
    out: *mut *mut Region,
    keys: *mut Keys,
) -> i32 {
    let access = i32::try_from(access).unwrap_or(0);
    // SAFETY: a domain of ours, and room for the results. Memory that is not there is an error of the call.
    unsafe {
        let region = rdma::ibv_reg_mr(domain.cast(), start, len, access);
        *out = region.cast();
        if region.is_null() {
            return last_errno();
        }
        *keys = Keys { local: (*region).lkey, remote: (*region).rkey };
    }
    0
}

pub(crate) unsafe extern "C" fn deregister(region: *mut Region) -> i32 {
    // SAFETY: from `register`, once.
    negated(unsafe { rdma::ibv_dereg_mr(region.cast()) })
}

pub(crate) unsafe extern "C" fn window_open(
    domain: *mut Domain,
    out: *mut *mut Window,
    key: *mut u32,
) -> i32 {
    // SAFETY: a domain of ours, and room for the results.
    unsafe {
        let Some(window) = rdma::ibv_alloc_mw(domain.cast(), rdma::ibv_mw_type::IBV_MW_TYPE_2) else {
            return -libc::EOPNOTSUPP;
        };
        if window.is_null() {
            return last_errno();
        }
        *out = window.cast();
        *key = (*window).rkey;
    }
    0
}

pub(crate) unsafe extern "C" fn window_close(window: *mut Window) -> i32 {
    // SAFETY: from `window_open`, once.
    negated(unsafe { rdma::ibv_dealloc_mw(window.cast()) })
}
