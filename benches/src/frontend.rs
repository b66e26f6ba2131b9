//! A small vhost-user-blk front end on the crate `vhost`: what QEMU is to a back end, without the VM.
//!
//! libblkio never negotiates the in-flight log, never connects again and always uses the same layout; this one does
//! what it is told. [`Session::connect`] makes the handshake with the features of [`Config`]; requests go through
//! [`Session::submit`] and [`Session::complete`] (many at a time) or [`Session::request`] (one, waiting);
//! [`Session::reconnect`] takes the same memory, rings and in-flight area to a new server, and
//! [`Session::restart_queues`] stops the rings and starts them with another size, as firmware and then an operating
//! system do. For garbage, [`Session::ring`] and [`Session::memory`] give the raw parts.
//!
//! Owns: the connection and the layout of guest memory. Must not know: anything about the server but the protocol.
//! Invariants: slot `i` of a queue is the chain that begins at descriptor `3 i`; nothing is allocated per request;
//! a server that does not answer a message in time has its socket shut down, so that no call here blocks for ever.
//!
//! ```text
//! memory: | ring 0 | slots 0: header, status … | data 0 … | ring 1 | …
//! slot's chain: 3i header (16 bytes) → 3i+1 data → 3i+2 status (1 byte)
//! ```

mod memory;
mod ring;

use std::fmt;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Protocol};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};

pub use self::memory::{GUEST_BASE, Memory};
pub use self::ring::{Descriptor, INDIRECT, NEXT, Places, Ring, Used, WRITE, Wake};
use crate::to_u64;

/// `VIRTIO_BLK_F_RO`
pub const F_RO: u64 = 1 << 5;
/// `VIRTIO_BLK_F_FLUSH`
pub const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_CONFIG_WCE`
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// `VIRTIO_BLK_F_MQ`
pub const F_MQ: u64 = 1 << 12;
/// `VIRTIO_BLK_F_DISCARD`
pub const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// `VIRTIO_F_INDIRECT_DESC`
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_VERSION_1`
pub const F_VERSION_1: u64 = 1 << 32;

/// `VIRTIO_BLK_S_OK`
pub const STATUS_OK: u8 = 0;
/// `VIRTIO_BLK_S_IOERR`
pub const STATUS_IOERR: u8 = 1;
/// `VIRTIO_BLK_S_UNSUPP`
pub const STATUS_UNSUPP: u8 = 2;
/// What a status byte holds before the device writes it.
pub const STATUS_UNWRITTEN: u8 = 0xff;

const HEADER_BYTES: usize = 16;
/// Header and status of a slot, padded to a cache line so that two slots never share one.
const SLOT_BYTES: usize = 64;
const STATUS_OFFSET: usize = 32;
/// Bytes of `struct virtio_blk_config` up to the end of the write-zeroes fields.
const BLK_CONFIG_BYTES: u32 = 60;

/// What to negotiate, and how much memory to have.
#[derive(Clone, Debug)]
pub struct Config {
    /// The server's socket.
    pub socket: PathBuf,
    /// Queues to enable.
    pub queues: u16,
    /// Entries per ring.
    pub queue_size: u16,
    /// The largest `queue_size` that [`Session::restart_queues`] will be asked for.
    pub queue_size_max: u16,
    /// Slots per queue; fewer are used while the ring has fewer than three entries per slot.
    pub depth: u16,
    /// Largest request, in bytes.
    pub request_bytes_max: usize,
    /// Virtio features to accept if offered.
    pub features: u64,
    /// Whether to use the in-flight log.
    pub inflight: bool,
    /// Memory by `ADD_MEM_REG` instead of `SET_MEM_TABLE`.
    pub memory_slots: bool,
    /// How long the server may take for a handshake.
    pub limit: Duration,
}

impl Config {
    /// One queue of 128 with 32 slots of up to 128 KiB, all features, the in-flight log.
    pub fn new(socket: &Path) -> Self {
        Config {
            socket: socket.to_owned(),
            queues: 1,
            queue_size: 128,
            queue_size_max: 1024,
            depth: 32,
            request_bytes_max: 128 << 10,
            features: u64::MAX,
            inflight: true,
            memory_slots: false,
            limit: Duration::from_secs(10),
        }
    }
}

/// What went wrong, and in which step.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Names the step in front of an error.
fn step<E: fmt::Display>(name: &str) -> impl FnOnce(E) -> Error + '_ {
    move |e| Error(format!("{name}: {e}"))
}

/// A request's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `VIRTIO_BLK_T_IN`
    Read,
    /// `VIRTIO_BLK_T_OUT`
    Write,
    /// `VIRTIO_BLK_T_FLUSH`
    Flush,
    /// `VIRTIO_BLK_T_GET_ID`, into 20 bytes of data
    GetId,
    /// `VIRTIO_BLK_T_DISCARD`, of a segment in the data
    Discard,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`, of a segment in the data
    WriteZeroes,
    /// Any other number
    Other(u32),
}

impl Op {
    fn number(self) -> u32 {
        match self {
            Op::Read => 0,
            Op::Write => 1,
            Op::Flush => 4,
            Op::GetId => 8,
            Op::Discard => 11,
            Op::WriteZeroes => 13,
            Op::Other(number) => number,
        }
    }

    fn device_writes(self) -> bool {
        matches!(self, Op::Read | Op::GetId)
    }
}

/// A discard or write-zeroes segment as data.
pub fn segment(sector: u64, sectors: u32, unmap: bool) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12] = u8::from(unmap);
    bytes
}

/// One finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Its slot.
    pub slot: u16,
    /// Its status byte.
    pub status: u8,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// What the device says about itself.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// 512-byte sectors.
    pub sectors: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Most segments in a request.
    pub segments_max: u32,
    /// Queues that it has.
    pub queues: u16,
}

/// A connection with its memory and rings.
pub struct Session {
    config: Config,
    vhost: Frontend,
    stream: UnixStream,
    features: u64,
    protocol: Protocol,
    device: Device,
    memory: Arc<Memory>,
    rings: Vec<Ring>,
    /// Slots per queue that the rings have descriptors for; `config.depth` is what memory was laid out for.
    depth: u16,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Session {
    /// Connects, negotiates and enables all queues.
    pub fn connect(config: Config) -> Result<Self, Error> {
        let per_queue = queue_bytes(&config);
        let memory = Memory::new(per_queue * usize::from(config.queues)).map_err(step("guest memory"))?;
        let memory = Arc::new(memory);
        let stream = UnixStream::connect(&config.socket).map_err(step("connect"))?;
        let limit = config.limit;
        let shutdown = stream.try_clone().map_err(step("connect"))?;
        let mut session = Session {
            vhost: new_frontend(&stream, config.queues)?,
            stream,
            features: 0,
            protocol: Protocol::empty(),
            device: Device { sectors: 0, block_bytes: 512, segments_max: 1, queues: 1 },
            memory,
            rings: Vec::new(),
            depth: 0,
            inflight: None,
            config,
        };
        within(limit, &shutdown, || {
            session.negotiate()?;
            session.offer_memory()?;
            session.make_rings()?;
            session.start()
        })?;
        Ok(session)
    }

    /// Connects to the socket again, with the same memory, rings and in-flight area, as QEMU does after the server
    /// has gone: each ring goes on at its used index, and the in-flight area tells the server what else is unfinished.
    pub fn reconnect(&mut self) -> Result<(), Error> {
        // First, so that a server that serves one front end at a time sees the old one leave.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.stream = UnixStream::connect(&self.config.socket).map_err(step("connect"))?;
        self.vhost = new_frontend(&self.stream, self.config.queues)?;
        let shutdown = self.stream.try_clone().map_err(step("connect"))?;
        within(self.config.limit, &shutdown, || {
            self.negotiate()?;
            self.offer_memory()?;
            for ring in &mut self.rings {
                ring.renew_events().map_err(step("eventfd"))?;
            }
            self.start()
        })?;
        // What was published while nobody listened needs a kick, whatever the old server had asked for.
        self.rings.iter().try_for_each(|ring| ring.kick_fd().write(1)).map_err(step("kick"))
    }

    /// Stops all rings and starts new ones of `queue_size` entries with indices at 0.
    pub fn restart_queues(&mut self, queue_size: u16) -> Result<(), Error> {
        assert!(queue_size <= self.config.queue_size_max, "memory was laid out for less");
        self.stop()?;
        self.config.queue_size = queue_size;
        let shutdown = self.stream.try_clone().map_err(step("connection"))?;
        within(self.config.limit, &shutdown, || {
            self.inflight = None;
            self.make_rings()?;
            self.start()
        })
    }

    /// `GET_VRING_BASE` for every ring: the server finishes what it has taken, and answers with the next index.
    pub fn stop(&mut self) -> Result<Vec<u16>, Error> {
        let shutdown = self.stream.try_clone().map_err(step("connection"))?;
        within(self.config.limit, &shutdown, || {
            (0..self.rings.len())
                .map(|index| {
                    let base = self.vhost.get_vring_base(index).map_err(step("GET_VRING_BASE"))?;
                    u16::try_from(base).map_err(step("GET_VRING_BASE"))
                })
                .collect()
        })
    }

    fn negotiate(&mut self) -> Result<(), Error> {
        let vhost = &mut self.vhost;
        vhost.set_owner().map_err(step("SET_OWNER"))?;
        let offered = vhost.get_features().map_err(step("GET_FEATURES"))?;
        let needed = F_VERSION_1 | F_PROTOCOL_FEATURES;
        if offered & needed != needed {
            return Err(Error(format!("GET_FEATURES: {offered:#x} lacks VERSION_1 or PROTOCOL_FEATURES")));
        }
        let offered_protocol = vhost.get_protocol_features().map_err(step("GET_PROTOCOL_FEATURES"))?;
        let mut wanted = Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::RESET_DEVICE;
        wanted.set(Protocol::INFLIGHT_SHMFD, self.config.inflight);
        wanted.set(Protocol::CONFIGURE_MEM_SLOTS, self.config.memory_slots);
        let accepted = offered_protocol & wanted;
        if self.config.inflight && !accepted.contains(Protocol::INFLIGHT_SHMFD) {
            return Err(Error("GET_PROTOCOL_FEATURES: the server has no INFLIGHT_SHMFD".into()));
        }
        vhost.set_protocol_features(accepted).map_err(step("SET_PROTOCOL_FEATURES"))?;
        if accepted.contains(Protocol::REPLY_ACK) {
            vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if accepted.contains(Protocol::MQ) {
            let queues = vhost.get_queue_num().map_err(step("GET_QUEUE_NUM"))?;
            if queues < u64::from(self.config.queues) {
                return Err(Error(format!("GET_QUEUE_NUM: {queues} queues, {} wanted", self.config.queues)));
            }
        }
        self.protocol = accepted;
        if accepted.contains(Protocol::CONFIG) {
            self.device = self.read_device()?;
        }
        self.features = offered & (self.config.features | needed);
        self.vhost.set_features(self.features).map_err(step("SET_FEATURES"))
    }

    /// Reads the configuration space.
    pub fn read_device(&mut self) -> Result<Device, Error> {
        let empty = [0; BLK_CONFIG_BYTES as usize];
        let flags = VhostUserConfigFlags::empty();
        let reply = self.vhost.get_config(0, BLK_CONFIG_BYTES, flags, &empty);
        let (_, bytes) = reply.map_err(step("GET_CONFIG"))?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Ok(Device {
            sectors: u64::from(word(0)) | u64::from(word(4)) << 32,
            segments_max: word(12),
            block_bytes: word(20),
            queues: u16::from_le_bytes([bytes[34], bytes[35]]),
        })
    }

    fn make_rings(&mut self) -> Result<(), Error> {
        // A request takes three descriptors.
        self.depth = self.config.depth.min(self.config.queue_size / 3);
        assert!(self.depth > 0, "a ring of {} entries holds no request", self.config.queue_size);
        let event_idx = self.features & F_EVENT_IDX != 0;
        self.rings.clear();
        for index in 0..usize::from(self.config.queues) {
            let places = Places::new(index * queue_bytes(&self.config), self.config.queue_size);
            let memory = Arc::clone(&self.memory);
            let ring = Ring::new(memory, places, self.config.queue_size, event_idx).map_err(step("ring"))?;
            self.rings.push(ring);
        }
        Ok(())
    }

    fn offer_memory(&mut self) -> Result<(), Error> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: self.memory.guest_address(0),
            memory_size: to_u64(self.memory.len()),
            userspace_addr: self.memory.user_address(0),
            mmap_offset: 0,
            mmap_handle: self.memory.fd(),
        };
        if self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            self.vhost.add_mem_region(&region).map(drop).map_err(step("ADD_MEM_REG"))
        } else {
            self.vhost.set_mem_table(&[region]).map(drop).map_err(step("SET_MEM_TABLE"))
        }
    }

    fn start(&mut self) -> Result<(), Error> {
        if self.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            if self.inflight.is_none() {
                let ask = VhostUserInflight::new(0, 0, self.config.queues, self.config.queue_size);
                self.inflight = Some(self.vhost.get_inflight_fd(&ask).map_err(step("GET_INFLIGHT_FD"))?);
            }
            if let Some((area, file)) = &self.inflight {
                self.vhost.set_inflight_fd(area, file.as_raw_fd()).map_err(step("SET_INFLIGHT_FD"))?;
            }
        }
        for (index, ring) in self.rings.iter().enumerate() {
            let places = ring.places();
            let data = VringConfigData {
                queue_max_size: ring.size(),
                queue_size: ring.size(),
                flags: 0,
                desc_table_addr: self.memory.user_address(places.descriptors),
                used_ring_addr: self.memory.user_address(places.used),
                avail_ring_addr: self.memory.user_address(places.available),
                log_addr: None,
            };
            let vhost = &self.vhost;
            vhost.set_vring_num(index, ring.size()).map_err(step("SET_VRING_NUM"))?;
            vhost.set_vring_base(index, ring.used_index()).map_err(step("SET_VRING_BASE"))?;
            vhost.set_vring_addr(index, &data).map_err(step("SET_VRING_ADDR"))?;
            vhost.set_vring_kick(index, ring.kick_fd()).map_err(step("SET_VRING_KICK"))?;
            vhost.set_vring_call(index, ring.call_fd()).map_err(step("SET_VRING_CALL"))?;
        }
        for index in 0..self.rings.len() {
            self.vhost.set_vring_enable(index, true).map_err(step("SET_VRING_ENABLE"))?;
        }
        Ok(())
    }

    /// What the device said about itself.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Requests that a queue can have in flight: `Config::depth`, or less where the ring is small.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// The virtio features in force.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features in force.
    pub fn protocol_features(&self) -> Protocol {
        self.protocol
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// One queue's ring.
    pub fn ring(&mut self, queue: u16) -> &mut Ring {
        &mut self.rings[usize::from(queue)]
    }

    /// The connection itself, for messages that this type does not send.
    pub fn vhost(&mut self) -> &mut Frontend {
        &mut self.vhost
    }

    /// The in-flight area that the server made, if there is one.
    pub fn inflight_area(&self) -> Option<(VhostUserInflight, &File)> {
        self.inflight.as_ref().map(|(area, file)| (*area, file))
    }

    /// The socket, to wait for its end.
    pub fn socket(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Where a slot's data lies in [`Session::memory`].
    pub fn data_offset(&self, queue: u16, slot: u16) -> usize {
        let behind_slots = self.slot_offset(queue, self.config.depth).next_multiple_of(4096);
        behind_slots + usize::from(slot) * self.config.request_bytes_max
    }

    fn slot_offset(&self, queue: u16, slot: u16) -> usize {
        let places = Places::new(usize::from(queue) * queue_bytes(&self.config), self.config.queue_size_max);
        places.end + usize::from(slot) * SLOT_BYTES
    }

    /// Makes the request of `slot` available; the device sees it after [`Session::publish`]. Data of what the device
    /// reads must be in place at [`Session::data_offset`].
    pub fn submit(&mut self, queue: u16, slot: u16, op: Op, sector: u64, data_bytes: u32) {
        assert!(slot < self.depth, "there is no slot {slot}");
        let header_at = self.slot_offset(queue, slot);
        let data_at = self.data_offset(queue, slot);
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&op.number().to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write(header_at, &header);
        self.memory.write(header_at + STATUS_OFFSET, &[STATUS_UNWRITTEN]);
        let address = |offset| self.memory.guest_address(offset);
        let head = slot * 3;
        let data = if op.device_writes() { WRITE | NEXT } else { NEXT };
        let ring = &mut self.rings[usize::from(queue)];
        let after_header = if data_bytes > 0 { head + 1 } else { head + 2 };
        let chain = [
            Descriptor { address: address(header_at), len: 16, flags: NEXT, next: after_header },
            Descriptor { address: address(data_at), len: data_bytes, flags: data, next: head + 2 },
            Descriptor { address: address(header_at + STATUS_OFFSET), len: 1, flags: WRITE, next: 0 },
        ];
        for (index, descriptor) in (head..).zip(chain) {
            ring.set_descriptor(index, descriptor);
        }
        ring.push(head);
    }

    /// Shows what was submitted to the device, and kicks it if it wants to be.
    pub fn publish(&mut self, queue: u16) -> Result<(), Error> {
        let ring = &mut self.rings[usize::from(queue)];
        ring.publish();
        ring.kick().map_err(step("kick"))
    }

    /// Takes the next finished request of a queue.
    pub fn complete(&mut self, queue: u16) -> Result<Option<Completion>, Error> {
        let Some(used) = self.rings[usize::from(queue)].take_used() else { return Ok(None) };
        let slot = u16::try_from(used.head / 3).unwrap_or(u16::MAX);
        if used.head % 3 != 0 || slot >= self.depth {
            return Err(Error(format!("used ring: {} is not the head of a chain of ours", used.head)));
        }
        let [status] = self.memory.get(self.slot_offset(queue, slot) + STATUS_OFFSET);
        Ok(Some(Completion { slot, status, written: used.len }))
    }

    /// Waits until a queue has a finished request; an error if the server goes or takes longer than `limit`.
    pub fn wait(&mut self, queue: u16, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        let socket = self.socket();
        let ring = &mut self.rings[usize::from(queue)];
        while !ring.arm() {
            let left = deadline.saturating_duration_since(Instant::now());
            match ring.wait(socket, left).map_err(step("poll"))? {
                Wake::Signalled => {}
                Wake::Disconnected => return Err(Error("the server has closed the connection".into())),
                Wake::TimedOut => return Err(Error(format!("no completion within {limit:?}"))),
            }
        }
        Ok(())
    }

    /// Makes one request in slot 0 of an idle queue and waits for it. `data` goes out, or is filled by the device.
    pub fn request(&mut self, queue: u16, op: Op, sector: u64, data: &mut [u8]) -> Result<Completion, Error> {
        assert!(data.len() <= self.config.request_bytes_max, "larger than the slot");
        let at = self.data_offset(queue, 0);
        self.memory.write(at, data);
        let len = u32::try_from(data.len()).map_err(step("data"))?;
        self.submit(queue, 0, op, sector, len);
        self.publish(queue)?;
        self.wait(queue, self.config.limit)?;
        let completion = self.complete(queue)?.ok_or_else(|| Error("woken without a completion".into()))?;
        if op.device_writes() {
            self.memory.read(at, data);
        }
        Ok(completion)
    }
}

/// Bytes of guest memory that a queue takes, whatever the size of its ring is now.
fn queue_bytes(config: &Config) -> usize {
    let slots = Places::new(0, config.queue_size_max.max(config.queue_size)).end;
    let data = (slots + usize::from(config.depth) * SLOT_BYTES).next_multiple_of(4096);
    (data + usize::from(config.depth) * config.request_bytes_max).next_multiple_of(4096)
}

fn new_frontend(stream: &UnixStream, queues: u16) -> Result<Frontend, Error> {
    let stream = stream.try_clone().map_err(step("connect"))?;
    Ok(Frontend::from_stream(stream, u64::from(queues)))
}

/// Runs `work`, which waits for answers on the connection, and shuts the connection down if it takes too long: the
/// crate retries a socket's own time-out for ever.
fn within<T>(
    limit: Duration,
    stream: &UnixStream,
    work: impl FnOnce() -> Result<T, Error>,
) -> Result<T, Error> {
    std::thread::scope(|scope| {
        let (done, waiting) = channel::<()>();
        let watchdog = scope.spawn(move || {
            let late = waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            late
        });
        let result = work();
        drop(done);
        match (result, watchdog.join()) {
            (Err(e), Ok(true)) => Err(Error(format!("{e} (no answer within {limit:?})"))),
            (result, _) => result,
        }
    })
}
