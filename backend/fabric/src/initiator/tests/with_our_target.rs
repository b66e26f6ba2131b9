//! Against the target of this crate.

use super::client::{Ask, Client};
use super::middle_box::MiddleBox;
use super::*;
use crate::MemDevice;
use crate::initiator::discover;
use crate::target::{NamespaceConfig, SubsystemConfig, Target};
use crate::testing::Numbers;
use crate::uri::TcpAddress;
use hawser_block::{BlockSize, IoKind, Operation, Status};
use std::collections::HashMap;
use std::os::fd::OwnedFd;

fn start_target(
    device: Arc<dyn Device>,
    listen: SocketAddr,
    reactor: &ReactorThread,
) -> (Target, SocketAddr) {
    let uuid = Some(device.uuid()).filter(|uuid| *uuid != [0; 16]);
    let subsystem = SubsystemConfig {
        nqn: NQN.into(),
        listen: vec![listen],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: "test".into(),
        namespaces: vec![NamespaceConfig { nsid: 1, device, uuid }],
    };
    let target = Target::start(vec![subsystem], &[reactor.handle().clone()]).unwrap();
    let address = target.addresses()[0].1[0];
    (target, address)
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn mem(bytes: u64) -> Arc<MemDevice> {
    Arc::new(MemDevice::new("m0", bytes, BlockSize::B512).unwrap())
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(7) ^ (at >> 9).wrapping_mul(31) ^ seed).to_le_bytes()[0]).collect()
}

#[test]
fn every_operation_reaches_the_disk_and_comes_back() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let mem = mem(64 << 20);
    let (target, address) = start_target(mem.clone(), any(), &target_reactor);
    let device = NvmeDevice::open(config(address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let geometry = device.geometry().unwrap();
    assert_eq!(geometry.size_bytes(), 64 << 20);
    assert_eq!(device.uuid(), mem.uuid());
    assert_eq!(device.trouble(), "");
    assert!(geometry.write_zeroes.is_some() && geometry.discard.is_some());

    let mut client = Client::open(&device, host_reactor.handle());
    // Small: in the capsule, copied from staging. Large: by R2T, received in place. In one piece and in many.
    for (lba, blocks, segments) in [
        (0u64, 1u32, 1usize),
        (1, 8, 3),
        (100, 32, 7),
        (200, 33, 1),
        (1000, 256, 2),
        (2000, 2048, 126),
        (8000, 2048, 1),
    ] {
        let data = pattern(segments, blocks as usize * 512);
        let mut ask = Ask::write(lba, blocks, data.clone());
        ask.segments = segments;
        assert_eq!(client.run(ask).outcome, Ok(()), "write {blocks}");
        let mut ask = Ask::read(lba, blocks, 512);
        ask.segments = segments;
        let told = client.run(ask);
        assert_eq!(told.outcome, Ok(()), "read {blocks}");
        assert!(told.data == data, "{blocks} blocks in {segments} segments");
    }
    assert_eq!(client.run(Ask::plain(Operation::Flush, 0, 0)).outcome, Ok(()));
    for operation in [
        Operation::WriteZeroes { unmap: false, fua: false },
        Operation::WriteZeroes { unmap: true, fua: true },
        Operation::Discard,
    ] {
        let data = pattern(9, 64 * 512);
        assert_eq!(client.run(Ask::write(4096, 64, data.clone())).outcome, Ok(()));
        assert_eq!(client.run(Ask::plain(operation, 4096 + 16, 32)).outcome, Ok(()));
        let told = client.run(Ask::read(4096, 64, 512));
        let mut expected = data;
        expected[16 * 512..48 * 512].fill(0);
        assert!(told.data == expected, "{operation:?}");
    }
    let last = geometry.blocks - 1;
    assert_eq!(client.run(Ask::read(last, 1, 512)).outcome, Ok(()));
    assert_eq!(client.run(Ask::read(last, 2, 512)).outcome, Err(Status::Invalid));
    let stats = device.stats();
    assert_eq!(stats.kind(IoKind::Flush).requests, 1);
    assert_eq!(stats.kind(IoKind::Read).requests, 11);
    assert_eq!(stats.failures(Status::Invalid), 1);
    drop((client, device));
    wait_until("the host has left", || target.hosts(NQN).is_empty());
    assert!(target.stop(PATIENCE));
}

#[test]
fn host_and_target_on_one_reactor_do_not_wait_for_each_other() {
    let one = reactor("one");
    let (target, address) = start_target(mem(16 << 20), any(), &one);
    let device = NvmeDevice::open(config(address), &[one.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, one.handle());
    let writes =
        (0..100u64).map(|at| Ask::write(at * 8, 8, pattern(usize::try_from(at).unwrap(), 4096))).collect();
    client.submit(writes);
    for _ in 0..100 {
        assert_eq!(client.next().outcome, Ok(()));
    }
    let first = client.submit((0..100u64).map(|at| Ask::read(at * 8, 8, 512)).collect());
    for _ in 0..100 {
        let told = client.next();
        assert_eq!(told.outcome, Ok(()));
        assert!(told.data == pattern(usize::try_from(told.token - first).unwrap(), 4096));
    }
    drop((client, device));
    assert!(target.stop(PATIENCE));
}

#[test]
fn several_reactors_have_a_queue_each() {
    let reactors = [reactor("h0"), reactor("h1"), reactor("h2")];
    let target_reactor = reactor("target");
    let (target, address) = start_target(mem(16 << 20), any(), &target_reactor);
    let handles: Vec<_> = reactors.iter().map(|reactor| reactor.handle().clone()).collect();
    let device = NvmeDevice::open(config(address), &handles).unwrap();
    wait_ready(&device);
    for (index, handle) in handles.iter().enumerate() {
        let mut client = Client::open(&device, handle);
        assert_eq!(client.run(Ask::write(index as u64, 1, pattern(index, 512))).outcome, Ok(()));
        assert!(client.run(Ask::read(index as u64, 1, 512)).data == pattern(index, 512));
    }
    drop(device);
    assert!(target.stop(PATIENCE));
}

/// Random reads and writes, one at a time per region of blocks, compared with a model, while `disturb` is called.
fn load_with_verify(client: &mut Client, rounds: usize, seed: u64, mut disturb: impl FnMut(usize)) {
    const REGIONS: usize = 24;
    const REGION_BLOCKS: u64 = 512;
    let mut random = Numbers::new(seed);
    let mut model: Vec<Vec<u8>> = vec![vec![0; 512 * 512]; REGIONS];
    /// Region, first block in it, number of blocks, and what a write wrote.
    type Asked = (usize, u64, u32, Option<Vec<u8>>);
    let mut under_way: HashMap<u64, Asked> = HashMap::new();
    let mut idle: Vec<usize> = (0..REGIONS).collect();
    let mut done = 0;
    let mut begun = 0;
    while done < rounds {
        while begun < rounds && !idle.is_empty() {
            let region = idle.swap_remove(random.below(idle.len()));
            let blocks = [1, 8, 8, 40, 512][random.below(5)];
            let offset = random.below(512 - blocks + 1);
            let lba = region as u64 * REGION_BLOCKS + offset as u64;
            let blocks = u32::try_from(blocks).unwrap();
            let mut ask = if random.below(2) == 0 {
                Ask::write(lba, blocks, pattern(begun, blocks as usize * 512))
            } else {
                Ask::read(lba, blocks, 512)
            };
            ask.segments = 1 + random.below(3);
            let content = ask.operation.is_write().then(|| ask.data.clone());
            let token = client.submit(vec![ask]);
            under_way.insert(token, (region, offset as u64, blocks, content));
            begun += 1;
            disturb(begun);
        }
        let told = client.next();
        let (region, offset, blocks, content) = under_way.remove(&told.token).unwrap();
        assert_eq!(told.outcome, Ok(()), "a guest would see an error");
        let from = usize::try_from(offset).unwrap() * 512;
        let range = from..from + blocks as usize * 512;
        match content {
            Some(content) => model[region][range].copy_from_slice(&content),
            None => assert!(told.data == model[region][range], "a read saw what was not written"),
        }
        idle.push(region);
        done += 1;
    }
}

#[test]
fn a_target_that_goes_away_and_returns_under_load_is_a_pause() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let mem = mem(16 << 20);
    let (first, address) = start_target(mem.clone(), any(), &target_reactor);
    let middle_box = MiddleBox::start(address);
    let device = NvmeDevice::open(config(middle_box.address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, host_reactor.handle());
    let mut target = Some(first);
    load_with_verify(&mut client, 3000, 1, |begun| {
        if begun % 700 == 0 {
            drop(target.take());
            let (again, address) = start_target(mem.clone(), any(), &target_reactor);
            middle_box.set_target(address);
            target = Some(again);
        }
    });
    drop((client, device));
    assert!(target.unwrap().stop(PATIENCE));
}

#[test]
fn connections_cut_anywhere_under_load_lose_and_change_nothing() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (target, address) = start_target(mem(16 << 20), any(), &target_reactor);
    let middle_box = MiddleBox::start(address);
    let device = NvmeDevice::open(config(middle_box.address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, host_reactor.handle());
    load_with_verify(&mut client, 6000, 2, |begun| {
        if begun % 400 == 0 {
            middle_box.cut();
        }
    });
    // The last cut may have come after the last answer.
    wait_ready(&device);
    drop((client, device));
    assert!(target.stop(PATIENCE));
}

#[test]
fn requests_wait_while_the_target_is_away_and_the_reason_is_told() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (target, address) = start_target(mem(16 << 20), any(), &target_reactor);
    let middle_box = MiddleBox::start(address);
    let device = NvmeDevice::open(config(middle_box.address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let changes = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&changes);
    device.subscribe(Box::new(move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }));
    let mut client = Client::open(&device, host_reactor.handle());
    middle_box.set_closed(true);
    middle_box.cut();
    wait_until("the loss is noticed", || device.state() == DeviceState::Reconnecting);
    wait_until("the reason is told", || {
        let trouble = device.trouble();
        trouble.starts_with("n0: connect 127.0.0.1:") && trouble.contains("; retrying in ")
    });
    client.submit(vec![Ask::write(0, 8, pattern(1, 4096)), Ask::read(8, 8, 512)]);
    assert!(client.try_next().is_none());
    middle_box.set_closed(false);
    assert_eq!((client.next().outcome, client.next().outcome), (Ok(()), Ok(())));
    assert_eq!(device.trouble(), "");
    assert!(changes.load(std::sync::atomic::Ordering::Relaxed) >= 2);
    drop((client, device));
    assert!(target.stop(PATIENCE));
}

/// A port of the loopback that is ours as long as the descriptor is open, and that nobody listens at.
fn reserve_port() -> (OwnedFd, SocketAddr) {
    use std::os::fd::{AsRawFd, FromRawFd};
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_in>()).unwrap();
    // SAFETY: plain system calls; all pointers name values of the lengths given, an all-zero address is port 0, and the new
    // descriptor has no other owner.
    unsafe {
        let socket =
            OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0));
        let mut address: libc::sockaddr_in = std::mem::zeroed();
        address.sin_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap();
        address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
        let mut len = len;
        assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len), 0);
        assert_eq!(libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut len), 0);
        (socket, SocketAddr::from(([127, 0, 0, 1], u16::from_be(address.sin_port))))
    }
}

#[test]
fn nobody_listening_is_said_in_one_line_and_tried_again() {
    let host_reactor = reactor("host");
    // Bound and not listening: nobody else gets the port, and connecting is refused.
    let (reserved, address) = reserve_port();
    let device = NvmeDevice::open(config(address), &[host_reactor.handle().clone()]).unwrap();
    wait_until("the refusal is told", || device.trouble().contains("refused"));
    let expected = format!(
        "n0: connect {address}: connection refused, want an address at which a target listens; retrying in 0."
    );
    assert!(device.trouble().starts_with(&expected), "{}", device.trouble());
    assert_eq!((device.state(), device.geometry()), (DeviceState::Connecting, None));
    // It comes after all.
    drop(reserved);
    let target_reactor = reactor("target");
    let (target, _) = start_target(mem(1 << 20), address, &target_reactor);
    wait_ready(&device);
    drop(device);
    assert!(target.stop(PATIENCE));
}

#[test]
fn after_ctrl_loss_tmo_requests_fail_and_reconnecting_goes_on() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (target, address) = start_target(mem(1 << 20), any(), &target_reactor);
    let middle_box = MiddleBox::start(address);
    let mut config = config(middle_box.address);
    config.timers.ctrl_loss_tmo = Some(Duration::from_millis(100));
    let device = NvmeDevice::open(config, &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, host_reactor.handle());
    middle_box.set_closed(true);
    middle_box.cut();
    client.submit(vec![Ask::read(0, 8, 512)]);
    assert_eq!(client.next().outcome, Err(Status::Path));
    wait_until("the device has failed", || device.state() == DeviceState::Failed);
    assert_eq!(client.run(Ask::read(0, 8, 512)).outcome, Err(Status::Path));
    middle_box.set_closed(false);
    wait_ready(&device);
    assert_eq!(client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    drop((client, device));
    assert!(target.stop(PATIENCE));
}

#[test]
fn another_device_in_the_same_place_is_refused_by_name() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (first, address) = start_target(mem(4 << 20), any(), &target_reactor);
    let middle_box = MiddleBox::start(address);
    let device = NvmeDevice::open(config(middle_box.address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    drop(first);
    let (second, address) = start_target(mem(4 << 20), any(), &target_reactor);
    middle_box.set_target(address);
    middle_box.cut();
    wait_until("the device has failed", || device.state() == DeviceState::Failed);
    wait_until("the reason is told", || device.trouble().contains("the namespace is another: its UUID was"));
    drop(device);
    assert!(second.stop(PATIENCE));
}

#[test]
fn aborted_requests_end_and_later_ones_work() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (target, address) = start_target(mem(4 << 20), any(), &target_reactor);
    let middle_box = MiddleBox::start(address);
    let device = NvmeDevice::open(config(middle_box.address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, host_reactor.handle());
    middle_box.set_closed(true);
    middle_box.cut();
    wait_until("the loss is noticed", || device.state() == DeviceState::Reconnecting);
    client.submit(vec![Ask::write(0, 8, pattern(1, 4096)), Ask::read(8, 8, 512)]);
    client.abort();
    assert_eq!(client.next().outcome, Err(Status::Aborted));
    assert_eq!(client.next().outcome, Err(Status::Aborted));
    middle_box.set_closed(false);
    assert_eq!(client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    drop((client, device));
    assert!(target.stop(PATIENCE));
}

#[test]
fn a_request_whose_memory_is_gone_ends_and_the_others_do_not_notice() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (target, address) = start_target(mem(4 << 20), any(), &target_reactor);
    let device = NvmeDevice::open(config(address), &[host_reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let (mut bad, mut good) =
        (Client::open(&device, host_reactor.handle()), Client::open(&device, host_reactor.handle()));
    // In the capsule, and after an R2T. (What a read copies there is a fault of our own, which the daemon handles.)
    let small = Ask { gone: true, ..Ask::write(0, 8, pattern(1, 4096)) };
    let large = Ask { gone: true, ..Ask::write(0, 1024, pattern(1, 512 << 10)) };
    for (round, ask) in [small, large].into_iter().enumerate() {
        good.submit((0..20).map(|at| Ask::write(2000 + at * 8, 8, pattern(round, 4096))).collect());
        bad.submit(vec![ask]);
        good.submit((0..20).map(|at| Ask::write(3000 + at * 8, 8, pattern(round, 4096))).collect());
        assert_eq!(bad.next().outcome, Err(Status::Aborted));
        for _ in 0..40 {
            assert_eq!(good.next().outcome, Ok(()));
        }
        assert!(good.run(Ask::read(3000, 8, 512)).data == pattern(round, 4096));
    }
    drop((bad, good, device));
    assert!(target.stop(PATIENCE));
}

#[test]
fn what_a_target_offers_is_discovered() {
    let target_reactor = reactor("target");
    let (target, address) = start_target(mem(4 << 20), any(), &target_reactor);
    let service = TcpAddress::parse_discovery(&format!("tcp://{address}")).unwrap();
    let entries = discover(&service, &host()).unwrap();
    let found: Vec<_> = entries.iter().filter(|entry| entry.subsystem_nqn == NQN).collect();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].address.as_str(), found[0].service.parse()), ("127.0.0.1", Ok(address.port())));
    assert!(target.stop(PATIENCE));
    let error = discover(&service, &host()).unwrap_err();
    assert!(error.starts_with(&format!("{address}: ")), "{error}");
}
