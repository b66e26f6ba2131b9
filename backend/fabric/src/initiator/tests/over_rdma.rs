//! Host and target over simulated verbs ([`hawser_sim::verbs`]): the same state machines as with devices, in real time; under the seeded
//! simulator they are in `backend/sim/tests/histories`.

use super::client::{Ask, Client};
use super::*;
use crate::MemDevice;
use crate::initiator::discover;
use crate::nvme::discovery::TransportType;
use crate::rdma::{domain, driver};
use crate::target::{NamespaceConfig, SubsystemConfig, Target};
use crate::uri::{TcpAddress, Transport};
use hawser_block::BlockSize;
use hawser_block::regions::{Announced, Regions, Span};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_sim::verbs;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One at a time: there is one world of simulated verbs.
static ONE: Mutex<()> = Mutex::new(());

/// Field order is drop order.
pub(super) struct Lab {
    pub(super) client: Client,
    device: Arc<NvmeDevice>,
    target: Target,
    reactors: [ReactorThread; 2],
    _one: MutexGuard<'static, ()>,
}

pub(super) fn lab(change: impl FnOnce(&mut NvmeConfig)) -> Lab {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    driver::install(&super::costs_over_rdma::TABLE);
    verbs::disturb(verbs::Disturbance::default(), 1);
    let (host, of_target) = (reactor("host"), reactor("target"));
    let disk = Arc::new(MemDevice::new("m0", 16 << 20, BlockSize::B512).unwrap());
    let subsystem = SubsystemConfig {
        nqn: NQN.into(),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        transports: vec![Transport::Rdma],
        allowed_hosts: None,
        serial: "test".into(),
        namespaces: vec![NamespaceConfig { nsid: 1, device: disk, uuid: None }],
    };
    let target = Target::start(vec![subsystem], &[of_target.handle().clone()]).unwrap();
    let address = target.addresses()[0].1[0];
    let uri: NvmeUri = format!("nvme+rdma://{address}/{NQN}?nsid=1").parse().unwrap();
    let mut config = NvmeConfig::new("n0", vec![uri], host_identity());
    config.timers.reconnect_delay = Duration::from_millis(20);
    change(&mut config);
    let device = NvmeDevice::open(config, &[host.handle().clone()]).unwrap();
    wait_ready(&device);
    let client = Client::open(&device, host.handle());
    Lab { client, device, target, reactors: [host, of_target], _one: one }
}

pub(super) fn host_identity() -> HostIdentity {
    super::host()
}

impl Lab {
    pub(super) fn address(&self) -> std::net::SocketAddr {
        self.target.addresses()[0].1[0]
    }

    pub(super) fn device(&self) -> &Arc<NvmeDevice> {
        &self.device
    }

    /// The host's, and the target's.
    pub(super) fn reactors(&self) -> &[ReactorThread; 2] {
        &self.reactors
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.device.copied_bytes().into_iter().chain(self.device.counters());
        all.into_iter().find(|(other, _)| *other == name).map(|(_, value)| value).unwrap()
    }

    /// Ends the host, then the target. Nothing of either stays at the device.
    pub(super) fn end(self) {
        let Lab { client, device, target, .. } = self;
        drop((client, device));
        wait_until("the host has left", || target.hosts(NQN).is_empty());
        assert!(target.stop(PATIENCE));
        wait_until("no window is bound", || verbs::bound_windows() == 0);
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(7) ^ (at >> 9).wrapping_mul(31) ^ seed).to_le_bytes()[0]).collect()
}

#[test]
fn requests_of_every_shape_reach_the_disk_by_way_of_memory_of_the_connection() {
    let mut lab = lab(|_| {});
    for (lba, blocks, segments) in
        [(0u64, 1u32, 1usize), (1, 8, 3), (100, 32, 7), (1000, 256, 2), (2000, 2048, 126), (8000, 2048, 1)]
    {
        let data = pattern(segments, blocks as usize * 512);
        let mut ask = Ask::write(lba, blocks, data.clone());
        ask.segments = segments;
        assert_eq!(lab.client.run(ask).outcome, Ok(()), "write {blocks}");
        let mut ask = Ask::read(lba, blocks, 512);
        ask.segments = segments;
        let told = lab.client.run(ask);
        assert!(told.outcome == Ok(()) && told.data == data, "{blocks} blocks in {segments} segments");
    }
    for operation in [
        hawser_block::Operation::WriteZeroes { unmap: true, fua: true },
        hawser_block::Operation::Discard,
        hawser_block::Operation::Flush,
    ] {
        assert_eq!(lab.client.run(Ask::plain(operation, 4096, 32)).outcome, Ok(()), "{operation:?}");
    }
    assert!(lab.counter("rdma_unregistered") > 0, "nobody has announced this memory");
    // Two writes of up to a page, and the range of a discard.
    assert_eq!(lab.target.stats().capsule_bytes, 512 + 4096 + 16);
    lab.end();
}

#[test]
fn what_a_target_offers_is_discovered() {
    let lab = lab(|_| {});
    let address = lab.address();
    let service = TcpAddress::parse_discovery(&format!("rdma://{address}")).unwrap();
    let entries = discover(&service, &host_identity()).unwrap();
    let found: Vec<_> = entries.iter().filter(|entry| entry.subsystem_nqn == NQN).collect();
    assert_eq!((found.len(), found[0].transport), (1, TransportType::RDMA));
    assert_eq!((found[0].address.as_str(), found[0].service.parse()), ("127.0.0.1", Ok(address.port())));
    let nobody = (service.0, TcpAddress { port: 1, ..service.1 });
    let error = discover(&nobody, &host_identity()).unwrap_err();
    assert!(error.contains("nobody listens there"), "{error}");
    lab.end();
}

/// Memory that is announced, as a front end's is.
pub(super) struct Announcement {
    _announced: Announced,
    memory: AlignedBuffer,
}

impl Announcement {
    pub(super) fn new(len: usize) -> Announcement {
        let memory = AlignedBuffer::new(len);
        let span = Span { start: memory.as_ptr() as usize, len };
        Announcement { _announced: Regions::of_process().announce(span), memory }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.memory.as_ptr()
    }
}

#[test]
fn announced_memory_is_used_in_place_by_keys_that_die_with_each_command() {
    let mut lab = lab(|_| {});
    let announced = Announcement::new(4 << 20);
    let span = (announced.memory.as_ptr(), 1 << 20);
    let data = pattern(3, span.1);
    // SAFETY: a megabyte of the announced memory, which no request names yet.
    unsafe { span.0.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    lab.client.submit_at(hawser_block::Operation::Write { fua: false }, 64, span);
    assert_eq!(lab.client.next().outcome, Ok(()));
    // SAFETY: another one, likewise.
    let other = (unsafe { span.0.add(2 << 20) }, span.1);
    lab.client.submit_at(hawser_block::Operation::Read, 64, other);
    assert_eq!(lab.client.next().outcome, Ok(()));
    // SAFETY: the read has ended, and nobody else writes there.
    assert!(unsafe { announced.memory.slice(2 << 20, 1 << 20) } == data);
    assert_eq!((lab.counter("rdma_unregistered"), lab.counter("rdma_scattered")), (0, 0));
    assert_eq!(lab.counter("received_in_place_bytes"), 1 << 20);
    // Every key that ever was is dead now.
    assert_eq!(verbs::bound_windows(), 0);
    assert!(!verbs::window_names().into_iter().any(verbs::is_reachable));
    lab.end();
}

/// A balloon takes a page away: the device would go on with the one that it was given.
#[test]
fn memory_that_was_taken_away_is_not_named_any_more() {
    let mut lab = lab(|_| {});
    let announced = Announcement::new(1 << 20);
    // SAFETY: the memory is ours, and no request names it.
    unsafe { announced.memory.as_ptr().write_bytes(7, 1 << 20) };
    domain::look_at_all();
    let write = |lab: &mut Lab| {
        let before = lab.counter("rdma_unregistered");
        lab.client.submit_at(
            hawser_block::Operation::Write { fua: false },
            0,
            (announced.memory.as_ptr(), 64 << 10),
        );
        assert_eq!(lab.client.next().outcome, Ok(()));
        lab.counter("rdma_unregistered") - before
    };
    assert_eq!(write(&mut lab), 0);
    // SAFETY: as above; the page is zeroes then.
    let gone =
        unsafe { libc::madvise(announced.memory.as_ptr().add(512 << 10).cast(), 4096, libc::MADV_DONTNEED) };
    assert_eq!(gone, 0);
    domain::look_at_all();
    assert_eq!(write(&mut lab), 64 << 10);
    drop(announced);
    lab.end();
}

/// What was known of a device that was removed was taken for that of the one that came in its place.
#[test]
fn a_device_that_is_removed_and_comes_back_is_another() {
    let mut lab = lab(|_| {});
    let announced = Announcement::new(1 << 20);
    let write = |lab: &mut Lab| {
        let place = (announced.memory.as_ptr(), 64 << 10);
        lab.client.submit_at(hawser_block::Operation::Write { fua: false }, 0, place);
        assert_eq!(lab.client.next().outcome, Ok(()));
    };
    write(&mut lab);
    let before = verbs::domains();
    verbs::replace_device();
    // Sent again when the target listens at the new one, and both have registered what they need with it.
    write(&mut lab);
    wait_ready(&lab.device);
    assert_eq!((lab.counter("rdma_unregistered"), verbs::domains() - before), (0, 2));
    // Memory comes and goes, of which the old one has some.
    drop(announced);
    drop(Announcement::new(1 << 20));
    lab.end();
}

/// A target need not invalidate keys, and may do so for some: then we do, before the command ends.
#[test]
fn keys_that_the_target_leaves_alive_are_dead_when_their_command_ends() {
    let mut lab = lab(|_| {});
    let announced = Announcement::new(1 << 20);
    for keeps_keys in [1, 2] {
        verbs::disturb(verbs::Disturbance { keeps_keys, ..verbs::Disturbance::default() }, 7);
        for round in 0..64 {
            let operation = match round % 2 {
                0 => hawser_block::Operation::Write { fua: false },
                _ => hawser_block::Operation::Read,
            };
            lab.client.submit_at(operation, round * 16, (announced.memory.as_ptr(), 32 << 10));
            assert_eq!(lab.client.next().outcome, Ok(()));
            assert_eq!(verbs::bound_windows(), 0, "round {round}: a command has ended, and its key is alive");
        }
    }
    lab.end();
}

#[test]
fn a_target_that_is_not_there_is_waited_for_and_its_absence_explained() {
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    driver::install(&super::costs_over_rdma::TABLE);
    let host = reactor("host");
    let uri: NvmeUri = format!("nvme+rdma://127.0.0.1:1/{NQN}?nsid=1").parse().unwrap();
    let device =
        NvmeDevice::open(NvmeConfig::new("n0", vec![uri], host_identity()), &[host.handle().clone()])
            .unwrap();
    wait_until("it says why", || device.trouble().contains("nobody listens there"));
    drop((device, host, one));
}

/// Random reads and writes against a model, while completions come late and connections break under requests.
fn verified_under(disturbance: verbs::Disturbance, seed: u64) {
    const BLOCKS: u64 = 256;
    let mut lab = lab(|config| {
        config.timers.keep_alive_tmo = Duration::from_secs(1);
        config.timers.quiesce_tmo = Duration::from_millis(100);
    });
    let announced = Announcement::new(1 << 20);
    let mut model = vec![0u8; 512 * usize::try_from(BLOCKS).unwrap()];
    let mut random = seed | 1;
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    verbs::disturb(disturbance, seed);
    for round in 0..40 {
        // Several at a time, each on blocks of its own: half from announced memory, half not.
        let mut asks = Vec::new();
        for part in 0..8u64 {
            let blocks = 1 + next(16);
            let lba = part * 32 + next(16);
            let at = usize::try_from(lba * 512).unwrap();
            let len = usize::try_from(blocks * 512).unwrap();
            let is_write = next(2) == 0;
            let data = pattern(usize::try_from(next(1 << 20)).unwrap(), len);
            if is_write {
                model[at..at + len].copy_from_slice(&data);
            }
            asks.push((lba, u32::try_from(blocks).unwrap(), is_write, data, at, len));
        }
        let mut expected = std::collections::HashMap::new();
        for (index, (lba, blocks, is_write, data, at, len)) in asks.into_iter().enumerate() {
            if index % 2 == 0 {
                let mut ask =
                    if is_write { Ask::write(lba, blocks, data) } else { Ask::read(lba, blocks, 512) };
                ask.segments = 1 + index;
                let token = lab.client.submit(vec![ask]);
                expected.insert(token, (is_write, at, len, None));
            } else {
                let offset = index * (64 << 10);
                // SAFETY: within the announced memory, in a part that no request names now.
                let place = unsafe { announced.memory.as_ptr().add(offset) };
                // SAFETY: as above; `data` is elsewhere.
                unsafe { place.copy_from_nonoverlapping(data.as_ptr(), len) };
                let operation = match is_write {
                    true => hawser_block::Operation::Write { fua: false },
                    false => hawser_block::Operation::Read,
                };
                let token = lab.client.submit_at(operation, lba, (place, len));
                expected.insert(token, (is_write, at, len, Some(offset)));
            }
        }
        while !expected.is_empty() {
            let told = lab.client.next();
            assert_eq!(told.outcome, Ok(()), "seed {seed}, round {round}");
            let (is_write, at, len, offset) = expected.remove(&told.token).unwrap();
            if is_write {
                continue;
            }
            let want = &model[at..at + len];
            let found = match offset {
                None => told.data == want,
                // SAFETY: the read has ended, and nobody else writes there.
                Some(offset) => unsafe { announced.memory.slice(offset, len) == want },
            };
            assert!(found, "seed {seed}, round {round}: a read differs from the model");
        }
    }
    verbs::disturb(verbs::Disturbance::default(), 1);
    lab.end();
}

#[test]
fn late_completions_change_nothing() {
    for seed in 1..6 {
        verified_under(verbs::Disturbance { late: 2, ..verbs::Disturbance::default() }, seed);
    }
}

#[test]
fn nothing_is_lost_or_mixed_up_when_connections_break() {
    let before = verbs::counts().breaks;
    for seed in 1..4 {
        verified_under(verbs::Disturbance { late: 3, breaks: 150, keeps_keys: 3 }, seed);
    }
    assert!(verbs::counts().breaks > before, "no connection was broken");
}
