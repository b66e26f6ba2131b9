//! A front end for tests: the `vhost` crate speaks the protocol, rings and guest memory are written here by hand, so that
//! every mistake can be made.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_FLUSH: u64 = 1 << 9;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

/// A piece of guest memory: a memfd, mapped here too.
pub struct Ram {
    pub file: File,
    pub start: *mut u8,
    pub len: usize,
    pub guest: u64,
}

// SAFETY: plain shared memory; the tests touch it from one thread at a time.
unsafe impl Send for Ram {}

/// Where a piece of guest memory with this guest address is in the front end's user addresses.
const USER: u64 = 0x5500_0000_0000;

impl Ram {
    pub fn new(guest: u64, len: usize) -> Ram {
        // SAFETY: a literal C string, plain system calls, a fresh mapping.
        unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            let file = File::from_raw_fd(fd);
            file.set_len(len as u64).unwrap();
            Ram::of(file, guest, len)
        }
    }

    /// Maps what is in this file.
    pub fn of(file: File, guest: u64, len: usize) -> Ram {
        // SAFETY: a fresh mapping.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        Ram { file, start: start.cast(), len, guest }
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.guest,
            memory_size: self.len as u64,
            userspace_addr: self.guest.wrapping_add(USER),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn at(&self, address: u64, len: usize) -> *mut u8 {
        let offset = usize::try_from(address.checked_sub(self.guest).unwrap()).unwrap();
        assert!(offset + len <= self.len);
        self.start.wrapping_add(offset)
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        // SAFETY: within the mapping (`at`).
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(address, bytes.len()), bytes.len()) };
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: within the mapping (`at`).
        unsafe { std::ptr::copy_nonoverlapping(self.at(address, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    pub fn u16(&self, address: u64) -> &AtomicU16 {
        // SAFETY: within the mapping (`at`); rings are aligned to 2 bytes.
        unsafe { AtomicU16::from_ptr(self.at(address, 2).cast()) }
    }

    pub fn zero(&self, address: u64, len: usize) {
        self.write(address, &vec![0; len]);
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// One descriptor as a test wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub address: u64,
    pub len: u32,
    pub write: bool,
}

pub fn readable(address: u64, len: u32) -> Part {
    Part { address, len, write: false }
}

pub fn writable(address: u64, len: u32) -> Part {
    Part { address, len, write: true }
}

/// A ring, as its driver sees it.
pub struct Ring {
    pub index: usize,
    pub size: u16,
    pub start: u64,
    pub next_available: u16,
    pub last_used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub event_idx: bool,
    next_descriptor: u16,
}

/// Bytes that a ring of the largest size takes: descriptors, available, used.
pub const RING_BYTES: u64 = 0x9000;
const AVAILABLE: u64 = 0x4000;
/// `used.idx` is in a page apart from the elements.
const USED: u64 = 0x5ffc;

impl Ring {
    pub fn descriptor_at(&self, index: u16) -> u64 {
        self.start + 16 * u64::from(index)
    }

    pub fn available_at(&self) -> u64 {
        self.start + AVAILABLE
    }

    pub fn used_at(&self) -> u64 {
        self.start + USED
    }

    pub fn put_descriptor(&self, ram: &Ram, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        ram.write(at, &bytes);
    }

    /// Puts a chain into the table: descriptors one after the other, from the next free place on.
    pub fn put_chain(&mut self, ram: &Ram, parts: &[Part]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (step, part) in parts.iter().enumerate() {
            let here = self.next_descriptor % self.size;
            let next = (here + 1) % self.size;
            let last = step + 1 == parts.len();
            let flags = u16::from(!last) | if part.write { 2 } else { 0 };
            self.put_descriptor(ram, self.descriptor_at(here), part.address, part.len, flags, next);
            self.next_descriptor = next;
        }
        head
    }

    /// Puts the last parts into an indirect table at `table`, the first `direct` into the ring.
    pub fn put_indirect_chain(&mut self, ram: &Ram, parts: &[Part], direct: usize, table: u64) -> u16 {
        let rest = &parts[direct..];
        for (step, part) in rest.iter().enumerate() {
            let last = step + 1 == rest.len();
            let flags = u16::from(!last) | if part.write { 2 } else { 0 };
            let next = u16::try_from(step + 1).unwrap();
            self.put_descriptor(ram, table + 16 * step as u64, part.address, part.len, flags, next);
        }
        let mut all = parts[..direct].to_vec();
        all.push(readable(table, u32::try_from(16 * rest.len()).unwrap()));
        let head = self.put_chain(ram, &all);
        let last = (usize::from(head) + direct) % usize::from(self.size);
        let at = self.descriptor_at(u16::try_from(last).unwrap());
        // Its write flag means nothing to the device.
        ram.write(at + 12, &(4u16 | if direct % 2 == 1 { 2 } else { 0 }).to_le_bytes());
        head
    }

    /// Makes a head available.
    pub fn offer(&mut self, ram: &Ram, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        ram.u16(self.available_at() + 4 + 2 * slot).store(head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        ram.u16(self.available_at() + 2).store(self.next_available, Ordering::Release);
    }

    /// Kicks, if the device wants that for what is new since `old`.
    pub fn kick_if_wanted(&self, ram: &Ram, old: u16) -> bool {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = ram.u16(self.used_at() + 4 + 8 * u64::from(self.size)).load(Ordering::Acquire);
            let new = self.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            ram.u16(self.used_at()).load(Ordering::Acquire) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
        wanted
    }

    pub fn used_idx(&self, ram: &Ram) -> u16 {
        ram.u16(self.used_at() + 2).load(Ordering::Acquire)
    }

    /// The next used element, if there is one.
    pub fn take_used(&mut self, ram: &Ram) -> Option<(u16, u32)> {
        if self.used_idx(ram) == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.size);
        let bytes = ram.read(self.used_at() + 4 + 8 * slot, 8);
        self.last_used = self.last_used.wrapping_add(1);
        let head = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        Some((u16::try_from(head).unwrap(), u32::from_le_bytes(bytes[4..].try_into().unwrap())))
    }

    /// Waits for the next used element, by interrupt.
    pub fn wait_used(&mut self, ram: &Ram) -> (u16, u32) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(used) = self.take_used(ram) {
                return used;
            }
            // Ask for an interrupt, and look again.
            ram.u16(self.available_at() + 4 + 2 * u64::from(self.size))
                .store(self.last_used, Ordering::Release);
            fence(Ordering::SeqCst);
            if self.used_idx(ram) != self.last_used {
                continue;
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no interrupt and no used element");
            let mut poll = libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid entry.
            unsafe { libc::poll(&raw mut poll, 1, i32::try_from(left.as_millis()).unwrap()) };
            let _ = self.call.read();
        }
    }
}

/// A front end with one piece of memory and some rings.
pub struct Guest {
    pub frontend: Frontend,
    pub stream: UnixStream,
    pub ram: Ram,
    pub rings: Vec<Ring>,
    pub features: u64,
    /// The in-flight log's file and description, if negotiated.
    pub inflight: Option<(VhostUserInflight, File)>,
}

/// What a front end asks for.
#[derive(Clone)]
pub struct Wish {
    pub rings: usize,
    pub size: u16,
    pub features: u64,
    pub inflight: bool,
    /// The queue size that GET_INFLIGHT_FD names, if not that of the rings.
    pub log_size: Option<u16>,
    /// ADD_MEM_REG instead of SET_MEM_TABLE.
    pub slots: bool,
}

impl Default for Wish {
    fn default() -> Wish {
        Wish {
            rings: 1,
            size: 128,
            features: F_EVENT_IDX | F_INDIRECT | F_PROTOCOL | F_VERSION_1 | F_FLUSH,
            inflight: false,
            log_size: None,
            slots: false,
        }
    }
}

pub const RAM_BYTES: usize = 32 << 20;
/// Guest memory from here on is the tests' own.
pub const DATA: u64 = RAM_GUEST + 0x20_0000;
pub const RAM_GUEST: u64 = 1 << 40;

impl Guest {
    pub fn connect(socket: &Path, wish: &Wish) -> Guest {
        let ram = Ram::new(RAM_GUEST, RAM_BYTES);
        let rings = (0..wish.rings).map(|index| new_ring(index, wish)).collect();
        Guest::with(socket, wish, ram, rings, None)
    }

    /// A front end that has lost its connection.
    pub fn unconnected(ram: Ram, rings: Vec<Ring>, inflight: Option<(VhostUserInflight, File)>) -> Guest {
        let (stream, _) = UnixStream::pair().unwrap();
        let frontend = Frontend::from_stream(stream.try_clone().unwrap(), 64);
        Guest { frontend, stream, ram, rings, features: 0, inflight }
    }

    /// As after a crash of the back end: the same memory, rings and log, a new connection.
    pub fn reconnect(self, socket: &Path, wish: &Wish) -> Guest {
        // The old connection ends before the new one begins: the disk serves one at a time.
        let Guest { ram, rings, inflight, frontend, stream, .. } = self;
        drop((frontend, stream));
        Guest::with(socket, wish, ram, rings, inflight)
    }

    /// A new driver in the same memory: everything begins at 0 again.
    pub fn renew(self, socket: &Path, wish: &Wish) -> Guest {
        let Guest { ram, frontend, stream, .. } = self;
        drop((frontend, stream));
        ram.zero(RAM_GUEST, usize::try_from(DATA - RAM_GUEST).unwrap());
        let rings = (0..wish.rings).map(|index| new_ring(index, wish)).collect();
        Guest::with(socket, wish, ram, rings, None)
    }

    pub fn with(
        socket: &Path,
        wish: &Wish,
        ram: Ram,
        rings: Vec<Ring>,
        inflight: Option<(VhostUserInflight, File)>,
    ) -> Guest {
        let stream = UnixStream::connect(socket).unwrap();
        let frontend = Frontend::from_stream(stream.try_clone().unwrap(), 64);
        let mut guest = Guest { frontend, stream, ram, rings, features: wish.features, inflight };
        guest.negotiate(wish);
        if wish.slots {
            guest.frontend.add_mem_region(&guest.ram.region()).unwrap();
        } else {
            guest.frontend.set_mem_table(&[guest.ram.region()]).unwrap();
        }
        for index in 0..guest.rings.len() {
            guest.start_ring(index);
        }
        guest
    }

    pub fn negotiate(&mut self, wish: &Wish) {
        let frontend = &mut self.frontend;
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(wish.features & !offered, 0, "offered {offered:#x}");
        frontend.set_features(wish.features).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        let mut wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if wish.inflight {
            wanted |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        assert!(protocol.contains(wanted));
        frontend.set_protocol_features(wanted).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        if wish.inflight {
            if self.inflight.is_none() {
                let queues = u16::try_from(self.rings.len()).unwrap();
                let wanted = VhostUserInflight::new(0, 0, queues, wish.log_size.unwrap_or(wish.size));
                self.inflight = Some(frontend.get_inflight_fd(&wanted).unwrap());
            }
            let (description, file) = self.inflight.as_ref().unwrap();
            frontend.set_inflight_fd(description, file.as_raw_fd()).unwrap();
        }
    }

    pub fn vring_config(ring: &Ring) -> VringConfigData {
        VringConfigData {
            queue_max_size: 1024,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: ring.start + USER,
            used_ring_addr: ring.used_at() + USER,
            avail_ring_addr: ring.available_at() + USER,
            log_addr: None,
        }
    }

    pub fn start_ring(&mut self, index: usize) {
        let ring = &self.rings[index];
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, ring.size).unwrap();
        frontend.set_vring_base(index, ring.last_used).unwrap();
        frontend.set_vring_addr(index, &Guest::vring_config(ring)).unwrap();
        frontend.set_vring_call(index, &ring.call).unwrap();
        frontend.set_vring_kick(index, &ring.kick).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }

    /// Offers a chain and kicks if the device wants that.
    pub fn submit(&mut self, ring: usize, parts: &[Part]) -> u16 {
        let ring = &mut self.rings[ring];
        let head = ring.put_chain(&self.ram, parts);
        let old = ring.next_available;
        ring.offer(&self.ram, head);
        ring.kick_if_wanted(&self.ram, old);
        head
    }

    /// A request in the plain layout at `at`: header, data, status. Returns the parts; the data is at `at + 64`.
    pub fn plain(&self, kind: u32, sector: u64, data: &[u8], read_bytes: u32, at: u64) -> Vec<Part> {
        let mut parts = vec![readable(at, 16)];
        self.ram.write(at, &header(kind, sector));
        self.ram.write(at + 16, &[0xff]);
        if !data.is_empty() {
            self.ram.write(at + 64, data);
            parts.push(readable(at + 64, u32::try_from(data.len()).unwrap()));
        }
        if read_bytes > 0 {
            parts.push(writable(at + 64, read_bytes));
        }
        parts.push(writable(at + 16, 1));
        parts
    }

    /// Carries one plain request out and returns its status and the bytes it read.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[u8], read_bytes: u32) -> (u8, Vec<u8>) {
        let parts = self.plain(kind, sector, data, read_bytes, DATA);
        let head = self.submit(0, &parts);
        let (used, len) = self.rings[0].wait_used(&self.ram);
        assert_eq!(used, head);
        let status = self.ram.read(DATA + 16, 1)[0];
        if status == 0 && kind != T_GET_ID {
            assert_eq!(len, read_bytes + 1);
        }
        (status, self.ram.read(DATA + 64, read_bytes as usize))
    }

    pub fn config(&mut self) -> Vec<u8> {
        let (_, data) = self.frontend.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap();
        data
    }

    /// Whether the back end has closed the connection; waits for that.
    pub fn is_ended(&self) -> bool {
        self.is_ended_within(20_000)
    }

    pub fn is_ended_now(&self) -> bool {
        self.is_ended_within(0)
    }

    fn is_ended_within(&self, timeout_ms: i32) -> bool {
        let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid entry.
        let ready = unsafe { libc::poll(&raw mut poll, 1, timeout_ms) };
        let mut byte = [0u8; 1];
        // SAFETY: one writable byte.
        let got = unsafe { libc::recv(self.stream.as_raw_fd(), byte.as_mut_ptr().cast(), 1, libc::MSG_PEEK) };
        ready == 1 && got <= 0
    }
}

pub fn new_ring(index: usize, wish: &Wish) -> Ring {
    Ring {
        index,
        size: wish.size,
        start: RAM_GUEST + RING_BYTES * index as u64,
        next_available: 0,
        last_used: 0,
        kick: EventFd::new(EFD_NONBLOCK).unwrap(),
        call: EventFd::new(EFD_NONBLOCK).unwrap(),
        event_idx: wish.features & F_EVENT_IDX != 0,
        next_descriptor: 0,
    }
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    (u128::from(kind) | u128::from(sector) << 64).to_le_bytes()
}

pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
}

/// Writes and reads back.
pub fn works(guest: &mut Guest) {
    assert_eq!(guest.request(T_OUT, 5, &[0x5a; 512], 0).0, 0);
    assert_eq!(guest.request(T_IN, 5, &[], 512), (0, vec![0x5a; 512]));
}

/// A message, byte by byte.
pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    let mut bytes = [request.to_ne_bytes(), flags.to_ne_bytes(), size.to_ne_bytes()].concat();
    bytes.extend_from_slice(payload);
    bytes
}
