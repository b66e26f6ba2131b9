//! Shows on a real RDMA device what `rdma_keys = "window"` rests on: a peer reaches memory by a window's key while that is bound, and is
//! refused by the device when it is not any more, or when it does what the window is not for.
//!
//! `rdma_keys ADDRESS:PORT`: an address of an RDMA device's interface on this host. Exits with 1 when a key did what it should not.

use hawser_fabric::rdma::driver;
use hawser_runtime::buffers::AlignedBuffer;
use hawser_verbs_abi::{
    CmEvent, ConnectParameters, Domain, EventChannel, Id, Keys, Queue, QueueSize, Region, Segment,
    SendRequest, Table, Window, WorkCompletion, access, event, operation,
};
use std::net::SocketAddrV4;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);
const LEN: usize = 4096;
/// The same, as a segment has it.
const SEGMENT_LEN: u32 = 4096;
/// `IBV_WC_REM_ACCESS_ERR`.
const REFUSED: u32 = 10;

type Result<T> = std::result::Result<T, String>;

fn checked(what: &str, code: i32) -> Result<()> {
    if code < 0 { Err(format!("{what}: {}", std::io::Error::from_raw_os_error(-code))) } else { Ok(()) }
}

/// Calls `look` until it gives something.
fn wait<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if let Some(found) = look()? {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(format!("{what}: not in {} s", PATIENCE.as_secs()))
}

/// One side: everything lives to the end of the process.
struct Side {
    table: &'static Table,
    channel: *mut EventChannel,
    id: *mut Id,
    domain: *mut Domain,
    queue: *mut Queue,
    memory: AlignedBuffer,
    region: *mut Region,
    keys: Keys,
}

impl Side {
    fn new(table: &'static Table) -> Result<Side> {
        let (mut channel, mut id, mut fd) = (null_mut(), null_mut(), -1);
        // SAFETY: room for the results; handles of the table's.
        unsafe {
            checked("event channel", (table.channel_open)(&raw mut channel, &raw mut fd))?;
            checked("id", (table.id_open)(channel, &raw mut id))?;
        }
        let memory = AlignedBuffer::new(LEN);
        let (domain, queue, region) = (null_mut(), null_mut(), null_mut());
        Ok(Side { table, channel, id, domain, queue, memory, region, keys: Keys::default() })
    }

    /// The next event, which must be of this kind; whom it happened to.
    fn expect(&self, kind: u32) -> Result<*mut Id> {
        let event = wait("rdma_cm's next event", || {
            let mut event = CmEvent::NONE;
            // SAFETY: a handle of the table's, and room for an event.
            let count = unsafe { (self.table.channel_event)(self.channel, &raw mut event) };
            checked("rdma_cm", count)?;
            Ok((count > 0).then_some(event))
        })?;
        if event.kind == kind {
            Ok(event.id)
        } else {
            Err(format!("event {} for {kind}, status {}", event.kind, event.status))
        }
    }

    /// A queue on `id`, and registered memory.
    fn furnish(&mut self, id: *mut Id, more: u32) -> Result<()> {
        self.id = id;
        let size = QueueSize { sends: 8, receives: 8, segments: 1 };
        let mut fd = -1;
        // SAFETY: handles of the table's, room for the results; the memory lives as long as the region.
        unsafe {
            let device = (self.table.device)(id);
            checked("domain", (self.table.domain_open)(device, &raw mut self.domain))?;
            let start = self.memory.as_ptr().cast();
            let access = access::LOCAL_WRITE | more;
            let (region, keys) = (&raw mut self.region, &raw mut self.keys);
            checked("memory", (self.table.register)(self.domain, start, LEN, access, region, keys))?;
            let queue = &raw mut self.queue;
            checked("queue", (self.table.queue_open)(id, self.domain, &raw const size, queue, &raw mut fd))
        }
    }

    /// Carries one request out; its status.
    fn run(&self, what: &str, request: SendRequest) -> Result<u32> {
        let mut posted = 0;
        // SAFETY: a handle of the table's; what the request names lives to the end of the process.
        checked(what, unsafe { (self.table.post_send)(self.queue, &raw const request, 1, &raw mut posted) })?;
        wait(what, || {
            let mut completion = WorkCompletion::NONE;
            // SAFETY: a handle of the table's, and room for one.
            let count = unsafe { (self.table.poll)(self.queue, &raw mut completion, 1) };
            checked(what, count)?;
            Ok((count > 0).then_some(completion.status))
        })
    }

    fn expect_status(&self, what: &str, request: SendRequest, want: u32) -> Result<()> {
        match self.run(what, request)? {
            status if status == want => {
                println!("{what}: status {status}, as it should be");
                Ok(())
            }
            status => Err(format!("{what}: completion status {status}, want {want}")),
        }
    }
}

fn raw(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
        sin_zero: [0; 8],
    }
}

/// Two sides that are connected: who has the memory, and who wants to reach it.
fn connected(table: &'static Table, address: SocketAddrV4) -> Result<(Side, Side)> {
    let (mut owner, mut peer) = (Side::new(table)?, Side::new(table)?);
    let raw = raw(address);
    let parameters = ConnectParameters {
        private: std::ptr::dangling(),
        private_len: 0,
        responder_resources: 4,
        initiator_depth: 4,
    };
    // SAFETY: handles of the table's; the address is of its family's length, and the parameters name no bytes.
    unsafe {
        checked("bind", (table.bind)(peer.id, (&raw const raw).cast()))?;
        checked("listen", (table.listen)(peer.id, 4))?;
        checked("address", (table.resolve_address)(owner.id, (&raw const raw).cast(), 5000))?;
        owner.expect(event::ADDRESS_RESOLVED)?;
        checked("route", (table.resolve_route)(owner.id, 5000))?;
        owner.expect(event::ROUTE_RESOLVED)?;
        owner.furnish(owner.id, access::WINDOW_BIND)?;
        checked("connect", (table.connect)(owner.id, &raw const parameters))?;
        let asking = peer.expect(event::CONNECT_REQUEST)?;
        peer.furnish(asking, 0)?;
        checked("accept", (table.accept)(asking, &raw const parameters))?;
    }
    owner.expect(event::ESTABLISHED)?;
    peer.expect(event::ESTABLISHED)?;
    Ok((owner, peer))
}

fn bind(owner: &Side, window: *mut Window, key: u32) -> SendRequest {
    SendRequest {
        operation: operation::BIND,
        window,
        region: owner.region,
        key,
        address: owner.memory.as_ptr() as u64,
        len: LEN as u64,
        access: access::REMOTE_WRITE,
        ..SendRequest::NONE
    }
}

/// `operation` by `peer` on the owner's memory, by this key.
fn reach(owner: &Side, peer: &Side, segment: &Segment, operation: u32, key: u32) -> SendRequest {
    assert_eq!(segment.key, peer.keys.local);
    SendRequest {
        operation,
        segments: segment,
        segments_len: 1,
        key,
        address: owner.memory.as_ptr() as u64,
        ..SendRequest::NONE
    }
}

fn try_all(table: &'static Table, address: SocketAddrV4) -> Result<()> {
    // A key that is not valid any more, and one that is valid for something else. Each refusal ends its connection.
    for (turn, is_stale) in [(0, true), (1, false)] {
        let here = SocketAddrV4::new(*address.ip(), address.port() + turn);
        let (owner, peer) = connected(table, here)?;
        let (mut window, mut name) = (null_mut(), 0);
        // SAFETY: a handle of the table's, and room for the results.
        checked("window", unsafe { (table.window_open)(owner.domain, &raw mut window, &raw mut name) })?;
        let key = name & !0xff | name.wrapping_add(1) & 0xff;
        let segment =
            Segment { address: peer.memory.as_ptr() as u64, len: SEGMENT_LEN, key: peer.keys.local };
        // SAFETY: the peer's memory, which nobody uses yet.
        unsafe { peer.memory.as_ptr().write_bytes(0x5a, LEN) };
        owner.expect_status("bind", bind(&owner, window, key), 0)?;
        let write = reach(&owner, &peer, &segment, operation::WRITE, key);
        peer.expect_status("write by a key that is bound", write, 0)?;
        // SAFETY: the write has completed, and nobody else writes there.
        if unsafe { owner.memory.slice(0, LEN) }.iter().any(|byte| *byte != 0x5a) {
            return Err("the write did not arrive".to_owned());
        }
        if is_stale {
            let end = SendRequest { operation: operation::INVALIDATE, key, ..SendRequest::NONE };
            owner.expect_status("invalidate", end, 0)?;
            peer.expect_status("write by the same key", write, REFUSED)?;
        } else {
            let read = reach(&owner, &peer, &segment, operation::READ, key);
            peer.expect_status("read by a key for writing", read, REFUSED)?;
        }
        // SAFETY: a handle of the table's, once.
        unsafe { (table.window_close)(window) };
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    let address = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let Some(address) = address else {
        eprintln!("rdma_keys: want the IPv4 address and a port of an RDMA device's interface");
        return std::process::ExitCode::from(2);
    };
    match driver::table().and_then(|table| try_all(table, address)) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("rdma_keys: {why}");
            std::process::ExitCode::FAILURE
        }
    }
}
