//! What the daemon and its verbs driver say to each other: plain structs and a table of functions.
//!
//! The driver (`libhawser_verbs.so`) is the only thing that is linked with rdma-core. The daemon opens it at run time, and only
//! when RDMA is asked for, so that it starts on hosts that have no rdma-core. Tests have a table of their own, without devices.
//!
//! Owns: layouts and constants. Must not know: NVMe, reactors. Invariants:
//! - [`BUILD`] is first compared ([`Entry`]): a table of another build is never looked at.
//! - Functions return 0, or a count, or a negative errno. None blocks for longer than a system call of its device's, and those that
//!   are marked *slow* (memory is pinned, hardware is set up) do not belong on a reactor's thread.
//! - A handle is used by one thread at a time, but for [`Device`], [`Domain`] and [`Region`], which all may use.
#![no_std]

use core::ffi::c_void;

/// Which build this is. A driver of another build is refused.
pub const BUILD: &str = env!("HAWSER_VERBS_BUILD");

/// The one symbol that a driver exports: an [`Entry`].
pub const ENTRY: &core::ffi::CStr = c"hawser_verbs_entry";

/// The driver's file.
pub const FILE: &str = "libhawser_verbs.so";

/// Gives the driver's table to a daemon whose build it is told (16 bytes of [`BUILD`]); null when it is another, which is then
/// written to `own`.
pub type Entry = unsafe extern "C" fn(build: *const [u8; 16], own: *mut [u8; 16]) -> *const Table;

macro_rules! handle {
    ($(#[$doc:meta] $name:ident)*) => {$(
        #[$doc]
        #[repr(C)]
        pub struct $name {
            _private: [u8; 0],
        }
    )*};
}

handle! {
    /// Where the events of connections come up.
    EventChannel
    /// One end of a connection, or a listener.
    Id
    /// An RDMA device that is open.
    Device
    /// What keys and queues of a device belong to.
    Domain
    /// Memory that the device may be told to use.
    Region
    /// A memory window of type 2.
    Window
    /// A queue pair with its completion queue.
    Queue
}

/// What happened to an [`Id`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CmEvent {
    /// One of [`event`].
    pub kind: u32,
    /// Of [`event::REJECTED`] the reason, of others a negative errno, or 0.
    pub status: i32,
    /// Whom it happened to; of [`event::CONNECT_REQUEST`] the new end, which whoever takes the event owns.
    pub id: *mut Id,
    /// How many RDMA reads the other end lets us have under way, and how many it wants to have.
    pub responder_resources: u8,
    /// As above.
    pub initiator_depth: u8,
    /// How much of `private` is there: at least what the other end has sent, and then zeroes.
    pub private_len: u8,
    /// What the other end sent along.
    pub private: [u8; 255],
}

impl CmEvent {
    /// Room for one.
    pub const NONE: CmEvent = CmEvent {
        kind: u32::MAX,
        status: 0,
        id: core::ptr::null_mut(),
        responder_resources: 0,
        initiator_depth: 0,
        private_len: 0,
        private: [0; 255],
    };
}

/// Kinds of events, as `enum rdma_cm_event_type`.
#[expect(missing_docs, reason = "the names are those of rdma_get_cm_event(3)")]
pub mod event {
    pub const ADDRESS_RESOLVED: u32 = 0;
    pub const ADDRESS_ERROR: u32 = 1;
    pub const ROUTE_RESOLVED: u32 = 2;
    pub const ROUTE_ERROR: u32 = 3;
    pub const CONNECT_REQUEST: u32 = 4;
    pub const CONNECT_RESPONSE: u32 = 5;
    pub const CONNECT_ERROR: u32 = 6;
    pub const UNREACHABLE: u32 = 7;
    pub const REJECTED: u32 = 8;
    pub const ESTABLISHED: u32 = 9;
    pub const DISCONNECTED: u32 = 10;
    pub const DEVICE_REMOVAL: u32 = 11;
    pub const MULTICAST_JOIN: u32 = 12;
    pub const MULTICAST_ERROR: u32 = 13;
    pub const ADDRESS_CHANGE: u32 = 14;
    pub const TIMEWAIT_EXIT: u32 = 15;
}

/// How two ends are connected.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ConnectParameters {
    /// What the other end gets along.
    pub private: *const u8,
    /// How much.
    pub private_len: u8,
    /// How many RDMA reads of the other end we answer at a time.
    pub responder_resources: u8,
    /// How many we have under way.
    pub initiator_depth: u8,
}

/// What a device is and can do.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceAttributes {
    /// Its name, and a zero.
    pub name: [u8; 64],
    /// Queue pairs that it has.
    pub queues_max: u32,
    /// Work requests of a queue.
    pub requests_max: u32,
    /// Segments of a work request.
    pub segments_max: u32,
    /// Entries of a completion queue.
    pub completions_max: u32,
    /// Memory windows that it has.
    pub windows_max: u32,
    /// RDMA reads that it answers, on one queue.
    pub reads_answered_max: u32,
    /// RDMA reads that it has under way, on one queue.
    pub reads_max: u32,
    /// It has memory windows of type 2B.
    pub windows_2b: bool,
    /// It has a port that is up.
    pub is_up: bool,
}

impl DeviceAttributes {
    /// Room for one.
    pub const NONE: DeviceAttributes = DeviceAttributes {
        name: [0; 64],
        queues_max: 0,
        requests_max: 0,
        segments_max: 0,
        completions_max: 0,
        windows_max: 0,
        reads_answered_max: 0,
        reads_max: 0,
        windows_2b: false,
        is_up: false,
    };
}

/// A region's keys.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// For our own work requests.
    pub local: u32,
    /// For the other end's.
    pub remote: u32,
}

/// What may be done with memory, as `enum ibv_access_flags`.
pub mod access {
    /// The device writes to it.
    pub const LOCAL_WRITE: u32 = 1;
    /// Peers write to it.
    pub const REMOTE_WRITE: u32 = 1 << 1;
    /// Peers read from it.
    pub const REMOTE_READ: u32 = 1 << 2;
    /// Windows may be bound to it.
    pub const WINDOW_BIND: u32 = 1 << 4;
}

/// How large a queue pair is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct QueueSize {
    /// Send work requests.
    pub sends: u32,
    /// Receive work requests.
    pub receives: u32,
    /// Segments of a send.
    pub segments: u32,
}

/// A run of registered memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte.
    pub address: u64,
    /// Its length.
    pub len: u32,
    /// Its region's local key.
    pub key: u32,
}

/// What a send work request does.
#[expect(missing_docs, reason = "the names say it")]
pub mod operation {
    pub const SEND: u32 = 0;
    /// And the other end's window or region `key` is invalid then.
    pub const SEND_INVALIDATE: u32 = 1;
    /// Of `segments` to the other end's `address` and `key`.
    pub const WRITE: u32 = 2;
    /// Of the other end's `address` and `key` to `segments`.
    pub const READ: u32 = 3;
    /// `window` stands for `len` bytes from `address` of `region`, with `access`, by the name `key`.
    pub const BIND: u32 = 4;
    /// `key` is invalid then.
    pub const INVALIDATE: u32 = 5;
}

/// A send work request.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SendRequest {
    /// Comes back with its completion.
    pub user: u64,
    /// One of [`operation`].
    pub operation: u32,
    /// Whether it has a completion when it went well; when not, it always has.
    pub signalled: bool,
    /// Whether it waits for our RDMA reads that came before it.
    pub fenced: bool,
    /// Its memory; stays in place until it is posted, and what it names until it is over.
    pub segments: *const Segment,
    /// How many.
    pub segments_len: u32,
    /// See [`operation`].
    pub key: u32,
    /// See [`operation`].
    pub address: u64,
    /// See [`operation`].
    pub len: u64,
    /// See [`operation`].
    pub window: *mut Window,
    /// See [`operation`].
    pub region: *mut Region,
    /// Of [`operation::BIND`]: [`access`].
    pub access: u32,
}

impl SendRequest {
    /// One that does nothing yet.
    pub const NONE: SendRequest = SendRequest {
        user: 0,
        operation: operation::SEND,
        signalled: true,
        fenced: false,
        segments: core::ptr::null(),
        segments_len: 0,
        key: 0,
        address: 0,
        len: 0,
        window: core::ptr::null_mut(),
        region: core::ptr::null_mut(),
        access: 0,
    };
}

/// A receive work request, of one run of memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ReceiveRequest {
    /// Comes back with its completion.
    pub user: u64,
    /// Where what is received goes.
    pub segment: Segment,
}

/// The end of a work request.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkCompletion {
    /// What the request was posted with.
    pub user: u64,
    /// 0, or as `enum ibv_wc_status`.
    pub status: u32,
    /// Of a receive: how much came.
    pub len: u32,
    /// Of a receive: the key that it has made invalid, if `has_invalidated`.
    pub invalidated: u32,
    /// As above.
    pub has_invalidated: bool,
    /// What the device's maker knows about `status`.
    pub vendor: u32,
}

impl WorkCompletion {
    /// Room for one.
    pub const NONE: WorkCompletion =
        WorkCompletion { user: 0, status: 0, len: 0, invalidated: 0, has_invalidated: false, vendor: 0 };
}

/// [`WorkCompletion::status`] of what was still to be done when its queue ended.
pub const STATUS_FLUSHED: u32 = 5;

/// The driver. What is passed by pointer is read or written before the function returns.
#[repr(C)]
pub struct Table {
    /// Fills `out` with this host's devices, at most `len`; returns how many there are. Slow.
    pub devices: unsafe extern "C" fn(out: *mut DeviceAttributes, len: u32) -> i32,

    /// A new event channel, and a descriptor that is readable while it has events.
    pub channel_open: unsafe extern "C" fn(out: *mut *mut EventChannel, fd: *mut i32) -> i32,
    /// Closes one that no id uses any more.
    pub channel_close: unsafe extern "C" fn(channel: *mut EventChannel),
    /// Takes the next event: 1, or 0 when there is none now.
    pub channel_event: unsafe extern "C" fn(channel: *mut EventChannel, out: *mut CmEvent) -> i32,

    /// A new end that has no address yet.
    pub id_open: unsafe extern "C" fn(channel: *mut EventChannel, out: *mut *mut Id) -> i32,
    /// Ends it, without waiting for the other end. Its queue was closed before. Slow.
    pub id_close: unsafe extern "C" fn(id: *mut Id),
    /// Moves it, with the events that it still has, to another channel.
    pub id_migrate: unsafe extern "C" fn(id: *mut Id, channel: *mut EventChannel) -> i32,
    /// Looks for the device that leads to `address`, a socket address: an event tells.
    pub resolve_address: unsafe extern "C" fn(id: *mut Id, address: *const c_void, timeout_ms: i32) -> i32,
    /// Looks for the way there: an event tells.
    pub resolve_route: unsafe extern "C" fn(id: *mut Id, timeout_ms: i32) -> i32,
    /// Takes a local socket address.
    pub bind: unsafe extern "C" fn(id: *mut Id, address: *const c_void) -> i32,
    /// Waits for requests to connect, which are events.
    pub listen: unsafe extern "C" fn(id: *mut Id, backlog: i32) -> i32,
    /// The local port.
    pub port: unsafe extern "C" fn(id: *mut Id) -> u16,
    /// Asks the other end: an event tells.
    pub connect: unsafe extern "C" fn(id: *mut Id, parameters: *const ConnectParameters) -> i32,
    /// Lets the other end in: an event tells.
    pub accept: unsafe extern "C" fn(id: *mut Id, parameters: *const ConnectParameters) -> i32,
    /// Does not let it in.
    pub reject: unsafe extern "C" fn(id: *mut Id, private: *const u8, len: u8) -> i32,
    /// Tells the other end that it is over, and waits for nothing.
    pub disconnect: unsafe extern "C" fn(id: *mut Id) -> i32,
    /// The device that it is on; null before it has an address that is a device's.
    pub device: unsafe extern "C" fn(id: *mut Id) -> *mut Device,

    /// What it is and can do.
    pub device_attributes: unsafe extern "C" fn(device: *mut Device, out: *mut DeviceAttributes) -> i32,
    /// A new domain. It lives as long as the process.
    pub domain_open: unsafe extern "C" fn(device: *mut Device, out: *mut *mut Domain) -> i32,
    /// Pins memory, and lets the device use it as `access` says. Slow.
    pub register: unsafe extern "C" fn(
        domain: *mut Domain,
        start: *mut c_void,
        len: usize,
        access: u32,
        out: *mut *mut Region,
        keys: *mut Keys,
    ) -> i32,
    /// The end of that. Slow.
    pub deregister: unsafe extern "C" fn(region: *mut Region) -> i32,
    /// A window that stands for nothing yet, and its name. Slow.
    pub window_open: unsafe extern "C" fn(domain: *mut Domain, out: *mut *mut Window, key: *mut u32) -> i32,
    /// The end of it. Slow.
    pub window_close: unsafe extern "C" fn(window: *mut Window) -> i32,

    /// Gives an end its queue, and a descriptor that becomes readable when it was armed and something completed. Slow.
    pub queue_open: unsafe extern "C" fn(
        id: *mut Id,
        domain: *mut Domain,
        size: *const QueueSize,
        out: *mut *mut Queue,
        fd: *mut i32,
    ) -> i32,
    /// Ends all that is under way: it completes as flushed, and peers reach nothing through this queue any more.
    pub queue_error: unsafe extern "C" fn(queue: *mut Queue) -> i32,
    /// The queue is not there any more, and nothing of it uses memory. Slow.
    pub queue_close: unsafe extern "C" fn(queue: *mut Queue),
    /// Posts requests with one doorbell; `posted` says how many were taken.
    pub post_send: unsafe extern "C" fn(
        queue: *mut Queue,
        requests: *const SendRequest,
        len: u32,
        posted: *mut u32,
    ) -> i32,
    /// The same.
    pub post_receive: unsafe extern "C" fn(
        queue: *mut Queue,
        requests: *const ReceiveRequest,
        len: u32,
        posted: *mut u32,
    ) -> i32,
    /// Takes completions, at most `len`; returns how many.
    pub poll: unsafe extern "C" fn(queue: *mut Queue, out: *mut WorkCompletion, len: u32) -> i32,
    /// The next completion makes the descriptor readable, which it is not now. Whoever arms polls once more.
    pub arm: unsafe extern "C" fn(queue: *mut Queue) -> i32,
}

// SAFETY: the table is never written to, and its pointers are null or to functions.
unsafe impl Sync for Table {}
// SAFETY: as above.
unsafe impl Send for Table {}
