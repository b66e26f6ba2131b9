//! A target on real sockets, with a host that is written out byte by byte.

mod ana;
mod associations;
mod discovery;
mod hosts;
mod limits;
mod reservations;
mod resets;

use super::peer::{HOST, Heard, Peer};
use super::*;
use crate::mem::MemDevice;
use crate::null::NullDevice;
use crate::nvme::command::DsmRange;
use crate::nvme::fabrics::{CNTLID_DYNAMIC, Connect, Property};
use crate::nvme::identify::{
    IdentifyController, IdentifyNamespace, NamespaceIds, NamespaceList, VENDOR_MARK, cns,
};
use crate::nvme::properties::{CC_SHUTDOWN_NORMAL, CC_START, CSTS_READY, CSTS_SHUTDOWN_COMPLETE, offset};
use crate::nvme::vendor::Vendor;
use crate::nvme::{Sgl, Sqe, StatusCode, features, log};
use crate::tcp::pdu::DataPdu;
use crate::tcp::{Digests, FatalStatus};
use hawser_block::fake::FakeDevice;
use hawser_block::{BlockSize, Geometry, Status};
use hawser_runtime::{ReactorConfig, ReactorThread};

const NQN: &str = "nqn.2026-11.io.hawser:test";

/// A target over some devices, with its reactors.
struct Rig {
    target: Option<Target>,
    address: SocketAddr,
    _reactors: Vec<ReactorThread>,
}

impl Rig {
    fn new(devices: Vec<Arc<dyn Device>>) -> Rig {
        Rig::with(devices, None)
    }

    fn with(devices: Vec<Arc<dyn Device>>, allowed_hosts: Option<Vec<String>>) -> Rig {
        Rig::listening(devices, allowed_hosts, 1)
    }

    /// At so many addresses.
    fn listening(devices: Vec<Arc<dyn Device>>, allowed_hosts: Option<Vec<String>>, addresses: usize) -> Rig {
        Rig::start(devices, allowed_hosts, addresses, None, &AnaConfig::default()).unwrap()
    }

    /// With reservations that are kept in `folder`.
    fn keeping(devices: Vec<Arc<dyn Device>>, folder: &Path) -> Result<Rig, String> {
        Rig::start(devices, None, 1, Some(folder), &AnaConfig::default())
    }

    fn start(
        devices: Vec<Arc<dyn Device>>,
        allowed_hosts: Option<Vec<String>>,
        addresses: usize,
        folder: Option<&Path>,
        ana: &AnaConfig,
    ) -> Result<Rig, String> {
        let reactors: Vec<_> = (0..2)
            .map(|_| ReactorThread::spawn("target", ReactorConfig { cpu: None, poll_us: 0 }).unwrap())
            .collect();
        let handles: Vec<_> = reactors.iter().map(|reactor| reactor.handle().clone()).collect();
        let namespaces =
            (1..).zip(devices).map(|(nsid, device)| NamespaceConfig { nsid, device, uuid: None }).collect();
        let config = SubsystemConfig {
            nqn: NQN.to_owned(),
            listen: vec!["127.0.0.1:0".parse().unwrap(); addresses],
            transports: Vec::new(),
            allowed_hosts,
            serial: "S-1".to_owned(),
            namespaces,
        };
        let target = match folder {
            Some(folder) => Target::start_keeping(vec![config], &handles, folder, &Lineage::default(), ana)?,
            None => Target::start_with(vec![config], &handles, None, None, ana, bind)?,
        };
        let address = target.addresses()[0].1[0];
        Ok(Rig { target: Some(target), address, _reactors: reactors })
    }

    fn mem() -> Rig {
        Rig::new(vec![Arc::new(MemDevice::new("m", 64 << 20, BlockSize::B512).unwrap())])
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(target) = self.target.take() {
            assert!(target.stop(Duration::from_secs(20)) || std::thread::panicking(), "the target stops");
        }
    }
}

fn fake() -> Arc<FakeDevice> {
    let mut geometry = Geometry::new(BlockSize::B512, 4096);
    geometry.volatile_cache = true;
    Arc::new(FakeDevice::new(geometry))
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from((index * 7 + seed) % 253).unwrap()).collect()
}

fn write(lba: u64, bytes: usize, sgl: fn(u32) -> Sgl) -> Sqe {
    Sqe::write(1, lba, u32::try_from(bytes / 512).unwrap(), false, sgl(u32::try_from(bytes).unwrap()))
}

fn read(lba: u64, bytes: usize) -> Sqe {
    let len = u32::try_from(bytes).unwrap();
    Sqe::read(1, lba, len / 512, Sgl::transport(len))
}

#[test]
fn blocks_written_in_every_way_read_back_with_every_digest() {
    let rig = Rig::mem();
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut queue_id = 0;
    for header in [false, true] {
        for data in [false, true] {
            for flow_control in [false, true] {
                queue_id += 1;
                let digests = Digests { header, data };
                let mut peer = Peer::io(rig.address, NQN, cntlid, queue_id, digests, flow_control);
                for (round, len) in [512, 4096, 16384, 65536, 1 << 20].into_iter().enumerate() {
                    let bytes = pattern(len, round + usize::from(queue_id));
                    let lba = round as u64 * 4096;
                    let cqe = if len <= 16384 && round % 2 == 0 {
                        peer.call(write(lba, len, Sgl::in_capsule), &bytes, &[]).0
                    } else {
                        peer.call(write(lba, len, Sgl::transport), &[], &bytes).0
                    };
                    assert_eq!(cqe.status.code, StatusCode::SUCCESS);
                    let (cqe, back) = peer.call(read(lba, len), &[], &[]);
                    assert_eq!(cqe.status.code, StatusCode::SUCCESS);
                    assert!(back == bytes, "{digests:?} {len}");
                }
            }
        }
    }
}

/// `null:` leaves the buffer as it is, and the buffer went to the host with whatever it had held before.
#[test]
fn a_device_that_fills_nothing_is_read_as_zeroes() {
    let device = NullDevice::new("n", 1 << 20, BlockSize::B512).unwrap();
    let rig = Rig::new(vec![Arc::new(device)]);
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let bytes = pattern(64 << 10, 7);
    assert_eq!(
        peer.call(write(0, bytes.len(), Sgl::transport), &[], &bytes).0.status.code,
        StatusCode::SUCCESS
    );
    let (cqe, back) = peer.call(read(0, bytes.len()), &[], &[]);
    assert_eq!(cqe.status.code, StatusCode::SUCCESS);
    assert!(back == vec![0; bytes.len()]);
}

/// Answers to a host that sends without reading grew until memory was gone.
#[test]
fn a_host_that_does_not_read_is_not_listened_to() {
    let rig = Rig::mem();
    let (mut deaf, cntlid) = Peer::admin(rig.address, NQN);
    let mut sqe = Sqe::keep_alive();
    sqe.cid = 5;
    let many = deaf.capsule(&sqe, &[]).repeat(1000);
    deaf.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // 72 bytes of command for 24 of answer: what the sockets hold is full soon, if nobody takes it.
    let limit = 512 << 20;
    let mut sent = 0u64;
    while sent < limit {
        match std::io::Write::write(&mut deaf.stream, &many) {
            Ok(count) => sent += count as u64,
            Err(_) => break,
        }
    }
    assert!(sent < limit, "it is still listened to");
    // Nobody else suffers, and it is heard again when it reads.
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    assert_eq!(peer.call(read(0, 512), &[], &[]).0.status.code, StatusCode::SUCCESS);
    for _ in 0..sent / 72 {
        assert_eq!(deaf.end().cid, 5);
    }
}

#[test]
fn connections_that_come_and_go_leave_nothing() {
    let rig = Rig::mem();
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    for round in 0..240u16 {
        let mut peer = Peer::dial(rig.address);
        match round % 6 {
            0 => continue,
            1 => peer.write(&[0, 0, 128, 0, 128]),
            2 => drop(Peer::open(rig.address, Digests::NONE)),
            3 => drop(Peer::admin_as(rig.address, NQN, [3; 16])),
            _ => {
                let mut peer = Peer::open(rig.address, Digests::NONE);
                // The queue may be in use still.
                if peer.connect(NQN, 1 + round % 8, cntlid, true).status.is_success() {
                    peer.send(read(0, 64 << 10), &[], &[]);
                    peer.send(write(0, 64 << 10, Sgl::transport), &[], &[]);
                    peer.send(write(0, 4096, Sgl::in_capsule), &[7; 4096], &[]);
                    peer.write(&[4, 0, 72]);
                }
            }
        }
    }
    while rig.target.as_ref().unwrap().shared.connections().len() > 1 {
        std::thread::yield_now();
    }
    assert_eq!(rig.target.as_ref().unwrap().hosts(NQN), [HOST]);
}

/// Taking turns put the admin queues of such hosts on one reactor and all that work on the other.
#[test]
fn hosts_with_one_io_queue_each_are_spread_over_the_reactors() {
    let rig = Rig::mem();
    let hosts: Vec<_> = (0..6)
        .map(|_| {
            let (admin, cntlid) = Peer::admin(rig.address, NQN);
            (admin, Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true))
        })
        .collect();
    let places = &rig.target.as_ref().unwrap().shared.places;
    let count = |at: usize| places[at].io_queues.load(Ordering::Relaxed);
    assert_eq!((count(0), count(1)), (3, 3));
    drop(hosts);
    while (count(0), count(1)) != (0, 0) {
        std::thread::yield_now();
    }
}

#[test]
fn compare_tells_equal_from_different() {
    let device = fake();
    let rig = Rig::new(vec![device.clone()]);
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let bytes = pattern(64 << 10, 5);
    device.state().content[512..512 + bytes.len()].copy_from_slice(&bytes);
    let compare = |len: usize, sgl: fn(u32) -> Sgl| Sqe { opcode: 0x05, ..write(1, len, sgl) };
    let mut other = bytes.clone();
    other[4095] ^= 1;
    for (data, code) in [(&bytes, StatusCode::SUCCESS), (&other, StatusCode::COMPARE_FAILURE)] {
        assert_eq!(peer.call(compare(4096, Sgl::in_capsule), &data[..4096], &[]).0.status.code, code);
        assert_eq!(peer.call(compare(64 << 10, Sgl::transport), &[], data).0.status.code, code);
    }
    device.state().outcomes.push_back(Err(Status::Media));
    let cqe = peer.call(compare(4096, Sgl::in_capsule), &bytes[..4096], &[]).0;
    assert_eq!(cqe.status.code, StatusCode::UNRECOVERED_READ_ERROR);
    assert!(device.state().log.iter().all(|(operation, ..)| !operation.is_write()));
}

#[test]
fn many_commands_at_once_all_end() {
    let rig = Rig::mem();
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, false);
    let mut wanted = std::collections::HashMap::new();
    for index in 0..30usize {
        let bytes = pattern(256 << 10, index);
        let cid = peer.send(write(index as u64 * 512, bytes.len(), Sgl::transport), &[], &bytes);
        wanted.insert(cid, bytes);
    }
    for _ in 0..30 {
        assert_eq!(peer.end().status.code, StatusCode::SUCCESS);
    }
    let mut reads = std::collections::HashMap::new();
    for (cid, bytes) in &wanted {
        reads.insert(peer.send(read(u64::from(*cid - 1) * 512, bytes.len()), &[], &[]), *cid);
    }
    for _ in 0..30 {
        let cqe = peer.end();
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        assert!(peer.data.remove(&cqe.cid).unwrap() == wanted[&reads[&cqe.cid]]);
    }
}

#[test]
fn zeroes_and_deallocation_go_in_pieces() {
    // Pieces of mem: are at most 32 MiB; 65536 blocks of 4096 are 256 MiB.
    let device = Arc::new(MemDevice::new("m", 512 << 20, BlockSize::B4096).unwrap());
    let rig = Rig::new(vec![device]);
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, false);
    let bytes = pattern(4096, 3);
    let at = |lba| Sqe::write(1, lba, 1, true, Sgl::in_capsule(4096));
    for lba in [0, 9, 70_000, 131_071] {
        assert_eq!(peer.call(at(lba), &bytes, &[]).0.status.code, StatusCode::SUCCESS);
    }
    let content = |peer: &mut Peer, lba| {
        let (cqe, data) = peer.call(Sqe::read(1, lba, 1, Sgl::transport(4096)), &[], &[]);
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        data
    };
    assert_eq!(peer.status(Sqe::write_zeroes(1, 1, 65536, true, true)), StatusCode::SUCCESS);
    assert_eq!(content(&mut peer, 0), bytes);
    assert_eq!(content(&mut peer, 9), [0; 4096]);
    let ranges = [
        DsmRange { attributes: 0, blocks: 0, lba: 5 },
        DsmRange { attributes: 0, blocks: 1, lba: 0 },
        DsmRange { attributes: 0, blocks: 61_071, lba: 70_000 },
    ];
    // Linux sends room for 256 ranges, whatever it counts; less than it counts is refused.
    let mut data: Vec<u8> = ranges.iter().flat_map(DsmRange::to_bytes).collect();
    assert_eq!(content(&mut peer, 70_000), bytes);
    let dsm = Sqe::deallocate(1, 4, Sgl::in_capsule(48));
    assert_eq!(peer.call(dsm, &data, &[]).0.status.code, StatusCode::INVALID_SGL_LENGTH);
    data.resize(4096, 0xff);
    let dsm = Sqe::deallocate(1, 3, Sgl::in_capsule(4096));
    assert_eq!(peer.call(dsm, &data, &[]).0.status.code, StatusCode::SUCCESS);
    assert_eq!(content(&mut peer, 0), [0; 4096]);
    assert_eq!(content(&mut peer, 70_000), [0; 4096]);
    // Past the end nothing is done: the first pieces were, once.
    assert_eq!(peer.call(at(80_000), &bytes, &[]).0.status.code, StatusCode::SUCCESS);
    let past = Sqe::write_zeroes(1, 80_000, 60_000, false, false);
    assert_eq!(peer.status(past), StatusCode::LBA_OUT_OF_RANGE);
    assert_eq!(content(&mut peer, 80_000), bytes);
    let beyond = DsmRange { attributes: 0, blocks: 2, lba: 131_071 }.to_bytes();
    let dsm = Sqe::deallocate(1, 1, Sgl::transport(16));
    assert_eq!(peer.call(dsm, &[], &beyond).0.status.code, StatusCode::LBA_OUT_OF_RANGE);
    assert_eq!(content(&mut peer, 131_071), bytes);
    assert_eq!(peer.status(Sqe::flush(1)), StatusCode::SUCCESS);
}

#[test]
fn identify_features_and_logs_say_what_there_is() {
    let device = fake();
    let rig = Rig::new(vec![device.clone(), Arc::new(MemDevice::new("m", 8192, BlockSize::B4096).unwrap())]);
    let (mut admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut identify = |cns, nsid| {
        let (cqe, data) = admin.call(Sqe::identify(cns, nsid, Sgl::transport(4096)), &[], &[]);
        (cqe.status.code, <[u8; 4096]>::try_from(data).unwrap_or([0; 4096]))
    };
    let (code, bytes) = identify(cns::CONTROLLER, 0);
    assert_eq!(code, StatusCode::SUCCESS);
    let controller = IdentifyController::from_bytes(&bytes);
    assert_eq!(controller.vendor[..8], VENDOR_MARK);
    assert_eq!((controller.model.as_str(), controller.serial.as_str()), ("hawser", "S-1"));
    assert_eq!((controller.cntlid, controller.controller_type, controller.namespaces), (cntlid, 1, 2));
    assert_eq!((controller.transfer_size_max, controller.in_capsule_data_max()), (8, 16384));
    assert_eq!((controller.volatile_write_cache & 1, controller.subsystem_nqn.as_str()), (1, NQN));
    let namespace = IdentifyNamespace::from_bytes(&identify(cns::NAMESPACE, 1).1);
    assert_eq!((namespace.size, namespace.format().unwrap().block_shift), (4096, 9));
    let namespace = IdentifyNamespace::from_bytes(&identify(cns::NAMESPACE, 2).1);
    assert_eq!((namespace.size, namespace.deallocate_features), (2, 9));
    assert_eq!(identify(cns::NAMESPACE, 0).0, StatusCode::INVALID_NAMESPACE);
    assert_eq!(identify(cns::NAMESPACE, 3).0, StatusCode::INVALID_NAMESPACE);
    assert_eq!(NamespaceList::from_bytes(&identify(cns::ACTIVE_NAMESPACES, 0).1).ids, [1, 2]);
    assert_eq!(NamespaceList::from_bytes(&identify(cns::ACTIVE_NAMESPACES, 1).1).ids, [2]);
    let ids = NamespaceIds::from_bytes(&identify(cns::NAMESPACE_IDS, 1).1);
    assert_eq!(ids.uuid, uuid::of_namespace(NQN, 1));
    // A device that says who it is when it has been reached does not change what hosts see.
    let ids = NamespaceIds::from_bytes(&identify(cns::NAMESPACE_IDS, 2).1);
    assert_eq!(ids.uuid, uuid::of_namespace(NQN, 2));
    assert_eq!(identify(0x7f, 0).0, StatusCode::INVALID_FIELD);

    let get = |feature: u8| {
        let mut sqe = Sqe::set_features(feature, 0);
        sqe.opcode = crate::nvme::admin_opcode::GET_FEATURES;
        sqe
    };
    let (cqe, _) = admin.call(get(features::id::NUMBER_OF_QUEUES), &[], &[]);
    assert_eq!(features::queues_from_value(cqe.dword0()), 8);
    let many = Sqe::set_features(features::id::NUMBER_OF_QUEUES, features::queues_to_value(1000));
    assert_eq!(features::queues_from_value(admin.call(many, &[], &[]).0.dword0()), 64);
    assert_eq!(admin.status(Sqe::set_features(0x7e, 0)), StatusCode::INVALID_FIELD);
    assert_eq!(admin.status(Sqe::keep_alive()), StatusCode::SUCCESS);
    for (log, len) in
        [(log::id::SMART, 512), (log::id::ERROR_INFORMATION, 64), (log::id::FIRMWARE_SLOTS, 512)]
    {
        let sqe = Sqe::get_log_page(log, 0xffff_ffff, 0, len, false, Sgl::transport(len));
        let (cqe, data) = admin.call(sqe, &[], &[]);
        assert_eq!((cqe.status.code, data.len()), (StatusCode::SUCCESS, len as usize));
    }
    let unknown = Sqe::get_log_page(0x7d, 0, 0, 512, false, Sgl::transport(512));
    assert_eq!(admin.status(unknown), StatusCode::INVALID_LOG_PAGE);
    let mut odd = Sqe::keep_alive();
    odd.opcode = 0x3e;
    assert_eq!(admin.status(odd), StatusCode::INVALID_OPCODE);
    odd.opcode = crate::nvme::admin_opcode::ABORT;
    assert_eq!(admin.call(odd, &[], &[]).0.dword0(), 1);

    // The cache switched off: writes are durable one by one.
    assert_eq!(admin.status(Sqe::set_features(features::id::VOLATILE_WRITE_CACHE, 0)), StatusCode::SUCCESS);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    assert_eq!(peer.call(write(0, 512, Sgl::in_capsule), &[1; 512], &[]).0.status.code, StatusCode::SUCCESS);
    let logged = device.state().log.clone();
    assert_eq!(logged, [(hawser_block::Operation::Write { fua: true }, 0, 1)]);
    let shutdown = Property::set(offset::CC, false, u64::from(CC_START | CC_SHUTDOWN_NORMAL));
    assert_eq!(admin.status(shutdown), StatusCode::SUCCESS);
    let (cqe, _) = admin.call(Property::get(offset::CSTS, false), &[], &[]);
    assert_eq!(cqe.dword0(), CSTS_READY | CSTS_SHUTDOWN_COMPLETE);
}

/// A host tries again at once, five times, where it is not told how long to wait.
#[test]
fn a_host_that_waits_as_it_is_told_is_told_how_long() {
    let device = fake();
    let rig = Rig::new(vec![device.clone()]);
    let (mut admin, cntlid) = Peer::admin(rig.address, NQN);
    let (_, bytes) = admin.call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
    let controller = IdentifyController::from_bytes(&bytes.try_into().unwrap());
    assert_eq!(controller.retry_delays, [10, 0, 0]);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let mut interrupted = || {
        device.state().outcomes.push_back(Err(hawser_block::Status::Timeout));
        let status = peer.call(read(0, 512), &[], &[]).0.status;
        assert_eq!((status.code, status.do_not_retry), (StatusCode::COMMAND_INTERRUPTED, false));
        status.retry_delay
    };
    assert_eq!(interrupted(), 0);
    let behavior = |sgl: fn(u32) -> Sgl| {
        let mut sqe = Sqe::set_features(features::id::HOST_BEHAVIOR, 0);
        sqe.sgl = sgl(512);
        sqe
    };
    let mut data = [0; features::HOST_BEHAVIOR_LEN];
    data[0] = 1;
    assert_eq!(admin.call(behavior(Sgl::in_capsule), &data, &[]).0.status.code, StatusCode::SUCCESS);
    assert_eq!(interrupted(), 1);
    let mut get = behavior(Sgl::transport);
    get.opcode = crate::nvme::admin_opcode::GET_FEATURES;
    assert_eq!(admin.call(get, &[], &[]).1, data);
    // Not in the capsule, but asked for.
    data[0] = 0;
    assert_eq!(admin.call(behavior(Sgl::transport), &[], &data).0.status.code, StatusCode::SUCCESS);
    assert_eq!(interrupted(), 0);
    data[0] = 2;
    let wrong = admin.call(behavior(Sgl::in_capsule), &data, &[]).0.status.code;
    assert_eq!(wrong, StatusCode::INVALID_FIELD);
    assert_eq!(admin.status(behavior(Sgl::in_capsule)), StatusCode::INVALID_SGL_LENGTH);
}

/// A target that lost its cache between a write and the FLUSH passed for healthy.
#[test]
fn the_cache_identity_tells_a_restart_that_lost_writes_from_one_that_did_not() {
    let identity = |devices| {
        let rig = Rig::new(devices);
        let (mut admin, _) = Peer::admin(rig.address, NQN);
        let (_, bytes) = admin.call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
        Vendor::of(&IdentifyController::from_bytes(&bytes.try_into().unwrap())).unwrap().cache_identity
    };
    let mem = || Arc::new(MemDevice::new("m", 8192, BlockSize::B512).unwrap()) as Arc<dyn Device>;
    let path = std::path::Path::new("/dev/shm").join(format!("hawser-cache-{}", std::process::id()));
    std::fs::write(&path, vec![0; 8192]).unwrap();
    let file = || {
        let options = crate::FileOptions { block_size: BlockSize::B512, read_only: true };
        Arc::new(crate::FileDevice::open("f", &path, options).unwrap()) as Arc<dyn Device>
    };
    let (first, second) = (mem(), mem());
    let alone = identity(vec![Arc::clone(&first)]);
    let files = [identity(vec![file()]), identity(vec![file()])];
    let mixed = [identity(vec![file(), Arc::clone(&first)]), identity(vec![file(), second])];
    std::fs::remove_file(&path).unwrap();
    assert!(alone.is_some() && alone == identity(vec![first]));
    assert!(files[0].is_some() && files[0] == files[1], "the same boot");
    assert_ne!(mixed[0], mixed[1], "one memory is another");
    assert_eq!(identity(vec![mem(), fake()]), None, "one of them does not say");
}

#[test]
fn wrong_commands_get_their_status_and_the_queue_goes_on() {
    let device = fake();
    let rig = Rig::new(vec![device.clone()]);
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let mut other = read(0, 512);
    other.nsid = 2;
    let mut wide = read(0, 512);
    wide.cdw[2] = 0xffff;
    let mut keyed = read(0, 512);
    keyed.sgl.identifier = 0x40;
    let mut far = write(0, 512, Sgl::in_capsule);
    far.sgl.address = 16;
    let mut odd = read(0, 512);
    odd.opcode = 0x7e;
    let mut short = read(0, 1024);
    short.sgl.len = 512;
    let mut fabrics = read(0, 512);
    fabrics.opcode = 0x7f;
    // Half of an operation that is to be atomic was executed on its own.
    let mut fused = read(0, 512);
    fused.flags |= 1;
    let cases = [
        (other, &[][..], StatusCode::INVALID_NAMESPACE),
        (wide, &[], StatusCode::INVALID_FIELD),
        (keyed, &[], StatusCode::INVALID_SGL_TYPE),
        (far, &[0; 512], StatusCode::INVALID_SGL_OFFSET),
        (odd, &[], StatusCode::INVALID_OPCODE),
        (short, &[], StatusCode::INVALID_SGL_LENGTH),
        (write(0, 512, Sgl::in_capsule), &[0; 1024], StatusCode::INVALID_SGL_LENGTH),
        (write(0, 512, Sgl::transport), &[0; 512], StatusCode::INVALID_SGL_LENGTH),
        (fabrics, &[], StatusCode::COMMAND_SEQUENCE_ERROR),
        (fused, &[], StatusCode::INVALID_FIELD),
        (read(4096, 512), &[], StatusCode::LBA_OUT_OF_RANGE),
        (read(u64::MAX, 512), &[], StatusCode::LBA_OUT_OF_RANGE),
        (Sqe::write_zeroes(1, 0, 1, false, false), &[], StatusCode::INVALID_OPCODE),
        // This device cannot discard: a hint, which is not taken.
        (Sqe::deallocate(1, 1, Sgl::in_capsule(16)), &[0; 16], StatusCode::SUCCESS),
    ];
    for (sqe, data, code) in cases {
        assert_eq!(peer.call(sqe, data, &[]).0.status.code, code, "{sqe:?}");
    }
    for (outcome, code) in [
        (Status::Media, StatusCode::WRITE_FAULT),
        (Status::NoSpace, StatusCode::CAPACITY_EXCEEDED),
        (Status::ReadOnly, StatusCode::NAMESPACE_WRITE_PROTECTED),
        (Status::Path, StatusCode::INTERNAL_PATH_ERROR),
    ] {
        device.state().outcomes.push_back(Err(outcome));
        let cqe = peer.call(write(0, 512, Sgl::in_capsule), &[0; 512], &[]).0;
        assert_eq!(cqe.status.code, code);
    }
    assert_eq!(peer.call(read(0, 512), &[], &[]).0.status.code, StatusCode::SUCCESS);
}

#[test]
fn a_connect_with_a_wrong_parameter_names_it() {
    let rig = Rig::with(vec![fake()], Some(vec![HOST.to_owned()]));
    let good = Connect { record_format: 0, queue_id: 0, queue_size: 31, attributes: 0, keep_alive_ms: 0 };
    let refusal = |connect: Connect, nqn: &str, cntlid: u16, host: &str| {
        let mut peer = Peer::open(rig.address, Digests::NONE);
        crate::nvme::fabrics::connect_refusal(&peer.connect_with(&connect, nqn, cntlid, host))
    };
    let parameter = |field: &str| format!("Connect Invalid Parameters: {field}");
    assert_eq!(refusal(good, "nqn.other", CNTLID_DYNAMIC, HOST), parameter("SUBNQN"));
    assert_eq!(refusal(good, NQN, CNTLID_DYNAMIC, "host"), parameter("HOSTNQN"));
    assert_eq!(refusal(good, NQN, 5, HOST), parameter("CNTLID"));
    assert_eq!(refusal(good, NQN, CNTLID_DYNAMIC, "nqn.x"), "Connect Invalid Host (do not retry)");
    let with = |change: fn(&mut Connect)| {
        let mut connect = good;
        change(&mut connect);
        connect
    };
    assert_eq!(refusal(with(|c| c.queue_size = 0), NQN, CNTLID_DYNAMIC, HOST), parameter("SQSIZE"));
    assert_eq!(refusal(with(|c| c.queue_size = 128), NQN, CNTLID_DYNAMIC, HOST), parameter("SQSIZE"));
    assert_eq!(refusal(with(|c| c.queue_id = 1), NQN, 77, HOST), parameter("CNTLID"));
    let incompatible = refusal(with(|c| c.record_format = 1), NQN, CNTLID_DYNAMIC, HOST);
    assert_eq!(incompatible, "Connect Incompatible Format (do not retry)");

    let (mut admin, cntlid) = Peer::admin(rig.address, NQN);
    assert_eq!(refusal(with(|c| c.queue_id = 9), NQN, cntlid, HOST), parameter("QID"));
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let again = refusal(with(|c| c.queue_id = 1), NQN, cntlid, HOST);
    assert_eq!(again, "Command Sequence Error (do not retry)");
    // Another host cannot join this host's association.
    let mut stranger = Peer::open(rig.address, Digests::NONE);
    stranger.host_id = [8; 16];
    let cqe = stranger.connect(NQN, 2, cntlid, true);
    assert_eq!(crate::nvme::fabrics::connect_refusal(&cqe), parameter("CNTLID"));
    // Nothing but Connect comes first, and it comes once.
    let mut early = Peer::open(rig.address, Digests::NONE);
    assert_eq!(early.status(read(0, 512)), StatusCode::COMMAND_SEQUENCE_ERROR);
    assert_eq!(admin.connect(NQN, 0, CNTLID_DYNAMIC, true).status.code, StatusCode::COMMAND_SEQUENCE_ERROR);
    // A reset ends the I/O queues; then it is not ready.
    assert_eq!(admin.status(Property::set(offset::CC, false, 0)), StatusCode::SUCCESS);
    assert!(matches!(peer.hear(), Heard::End));
    while admin.call(Property::get(offset::CSTS, false), &[], &[]).0.dword0() & CSTS_READY != 0 {}
    let not_ready = refusal(with(|c| c.queue_id = 1), NQN, cntlid, HOST);
    assert_eq!(not_ready, "Command Sequence Error (do not retry)");
}

#[test]
fn a_broken_pdu_ends_its_connection_with_the_field_and_nobody_elses() {
    let rig = Rig::mem();
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut good = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let term = |bytes: &[u8]| {
        let mut peer = Peer::open(rig.address, Digests::NONE);
        peer.write(bytes);
        match peer.hear() {
            Heard::Term(term) => {
                assert!(matches!(peer.hear(), Heard::End));
                (term.status, term.information)
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(term(&[9; 8]), (FatalStatus::INVALID_HEADER_FIELD, 0));
    assert_eq!(term(&[0x55; 300]), (FatalStatus::INVALID_HEADER_FIELD, 0));
    assert_eq!(term(&[4, 0, 71, 0, 72, 0, 0, 0]), (FatalStatus::INVALID_HEADER_FIELD, 2));
    assert_eq!(term(&[4, 1, 72, 0, 76, 0, 0, 0]), (FatalStatus::INVALID_HEADER_FIELD, 1));
    assert_eq!(term(&[4, 0, 72, 72, 0, 0, 1, 0]), (FatalStatus::LIMIT_EXCEEDED, 4));
    assert_eq!(term(&[6, 0, 24, 24, 0, 0, 0, 1]), (FatalStatus::LIMIT_EXCEEDED, 4));
    assert_eq!(term(&[0, 0, 128, 0, 128, 0, 0, 0]), (FatalStatus::SEQUENCE_ERROR, 0));
    let data = DataPdu { cid: 0, tag: 3, offset: 0, len: 4, last: true, success: false };
    let mut bytes = data.to_bytes(crate::tcp::Receiver::Controller, Digests::NONE, 4).to_vec();
    bytes.extend_from_slice(&[0; 4]);
    assert_eq!(term(&bytes), (FatalStatus::INVALID_HEADER_FIELD, 10));

    // Before ICReq.
    let mut peer = Peer::dial(rig.address);
    peer.write(&[4, 0, 72, 0, 72, 0, 0, 0]);
    let Heard::Term(told) = peer.hear() else { panic!("no C2HTermReq") };
    assert_eq!(told.status, FatalStatus::SEQUENCE_ERROR);
    // A header digest that is wrong.
    let mut peer = Peer::open(rig.address, Digests { header: true, data: true });
    let mut bytes = peer.capsule(&Sqe::keep_alive(), &[]);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    peer.write(&bytes);
    let Heard::Term(told) = peer.hear() else { panic!("no C2HTermReq") };
    assert_eq!(told.status, FatalStatus::HEADER_DIGEST_ERROR);

    // Data that does not follow its R2T.
    for (wrong, offset) in [(1, 8), (2, 12), (3, 16), (4, 1)] {
        let mut peer = Peer::io(rig.address, NQN, cntlid, 1 + wrong, Digests::NONE, true);
        let cid = peer.send(write(0, 32 << 10, Sgl::transport), &[], &[]);
        let Heard::Ready(ready) = peer.hear() else { panic!("no R2T") };
        assert_eq!((ready.cid, ready.offset, ready.len), (cid, 0, 32 << 10));
        let good = DataPdu { cid, tag: ready.tag, offset: 0, len: 4096, last: false, success: false };
        let bad = match wrong {
            1 => DataPdu { cid: cid ^ 1, ..good },
            2 => DataPdu { offset: 4096, ..good },
            3 => DataPdu { len: 64 << 10, last: true, ..good },
            _ => DataPdu { last: true, ..good },
        };
        peer.host_data(bad, &vec![0; bad.len as usize]);
        let Heard::Term(told) = peer.hear() else { panic!("no C2HTermReq for {bad:?}") };
        assert_eq!(told.information, offset);
        assert!(matches!(peer.hear(), Heard::End));
    }
    // Data for a command that has ended.
    let mut peer = Peer::io(rig.address, NQN, cntlid, 7, Digests::NONE, true);
    let cid = peer.send(write(0, 32 << 10, Sgl::transport), &[], &[]);
    let Heard::Ready(ready) = peer.hear() else { panic!("no R2T") };
    let len = ready.len;
    let data = DataPdu { cid, tag: ready.tag, offset: 0, len, last: true, success: false };
    peer.host_data(data, &vec![1; len as usize]);
    assert!(peer.end().status.is_success());
    peer.host_data(data, &vec![2; len as usize]);
    let Heard::Term(told) = peer.hear() else { panic!("no C2HTermReq for data that comes twice") };
    assert_eq!((told.status, told.information), (FatalStatus::INVALID_HEADER_FIELD, 10));
    let (cqe, data) = good.call(read(0, 512), &[], &[]);
    assert_eq!((cqe.status.code, data), (StatusCode::SUCCESS, vec![1; 512]));
    // The last end is counted when its connection's reactor has seen it through.
    let stats = || rig.target.as_ref().unwrap().stats();
    while stats().protocol_errors < 15 {
        std::thread::yield_now();
    }
    assert_eq!((stats().protocol_errors, stats().digest_errors), (15, 0));
}

#[test]
fn a_data_digest_that_is_wrong_fails_the_command_alone() {
    let rig = Rig::mem();
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let digests = Digests { header: false, data: true };
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, digests, true);
    let mut sqe = write(0, 512, Sgl::in_capsule);
    sqe.cid = 700;
    let mut bytes = peer.capsule(&sqe, &[5; 512]);
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    peer.write(&bytes);
    let cqe = peer.end();
    assert_eq!((cqe.cid, cqe.status.code), (700, StatusCode::TRANSIENT_TRANSPORT_ERROR));
    let (cqe, data) = peer.call(read(0, 512), &[], &[]);
    assert_eq!((cqe.status.code, data), (StatusCode::SUCCESS, vec![0; 512]));
    let stats = rig.target.as_ref().unwrap().stats();
    assert_eq!((stats.protocol_errors, stats.digest_errors), (0, 1));
}

#[test]
fn growth_is_told_once_until_its_log_is_read() {
    let path = std::path::Path::new("/dev/shm").join(format!("hawser-grow-{}", std::process::id()));
    std::fs::write(&path, vec![0; 8192]).unwrap();
    let options = crate::FileOptions { block_size: BlockSize::B512, read_only: false };
    let device = Arc::new(crate::FileDevice::open("f", &path, options).unwrap());
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let rig = Rig::new(vec![device.clone()]);
    let (mut admin, _) = Peer::admin(rig.address, NQN);
    let configuration =
        Sqe::set_features(features::id::ASYNC_EVENT_CONFIGURATION, features::EVENT_NAMESPACE_ATTRIBUTE);
    assert_eq!(admin.status(configuration), StatusCode::SUCCESS);
    let event = admin.send(Sqe::async_event_request(), &[], &[]);
    for size in [16384, 32768] {
        file.set_len(size).unwrap();
        device.refresh();
        if size == 16384 {
            let cqe = admin.end();
            assert_eq!(cqe.cid, event);
            assert_eq!(cqe.dword0(), log::AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED.to_dword());
            admin.send(Sqe::async_event_request(), &[], &[]);
        }
    }
    // The second change is not told: the first's log was not read. Now it is, and there is nothing more to tell.
    let sqe =
        Sqe::get_log_page(log::id::CHANGED_NAMESPACES, 0xffff_ffff, 0, 4096, false, Sgl::transport(4096));
    loop {
        let (cqe, page) = admin.call(sqe, &[], &[]);
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        if NamespaceList::from_bytes(&page.try_into().unwrap()).ids == [1] {
            break;
        }
    }
    let (_, bytes) = admin.call(Sqe::identify(cns::NAMESPACE, 1, Sgl::transport(4096)), &[], &[]);
    assert_eq!(IdentifyNamespace::from_bytes(&bytes.try_into().unwrap()).size, 64);
    // Four requests are held, and one more is refused.
    for _ in 0..3 {
        admin.send(Sqe::async_event_request(), &[], &[]);
    }
    assert_eq!(admin.status(Sqe::async_event_request()), StatusCode::AER_LIMIT_EXCEEDED);
}

#[test]
fn a_wrong_configuration_is_one_line() {
    let reactor = ReactorThread::spawn("target", ReactorConfig::default()).unwrap();
    let handles = [reactor.handle().clone()];
    let config = |nqn: &str, serial: &str, nsids: &[u32]| SubsystemConfig {
        nqn: nqn.to_owned(),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: serial.to_owned(),
        namespaces: nsids
            .iter()
            .map(|nsid| NamespaceConfig { nsid: *nsid, device: fake(), uuid: None })
            .collect(),
    };
    let refused = |configs| Target::start(configs, &handles).err().unwrap();
    assert!(refused(vec![config("iqn.x", "s", &[1])]).contains("\"iqn.x\" is not an NQN"));
    assert!(refused(vec![config(NQN, "s", &[0])]).contains("nsid 0 is not between 1"));
    assert!(refused(vec![config(NQN, "s", &[1, 1])]).contains("nsid 1 is there twice"));
    assert!(refused(vec![config(NQN, &"s".repeat(21), &[1])]).contains("at most 20 ASCII"));
    assert!(refused(vec![config(NQN, "s", &[1]), config(NQN, "s", &[1])]).contains("another subsystem"));
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut taken = config(NQN, "s", &[1]);
    taken.listen = vec![busy.local_addr().unwrap()];
    assert!(refused(vec![taken]).contains("Address already in use"));
}
