//! What our target does with time: here an hour costs nothing.

use hawser_block::{
    BlockCount, BlockSize, Buffers, Channel, Completion, Device, DeviceState, Geometry, Lba, Operation,
    Request, StatsSet, Status, Token,
};
use hawser_fabric::initiator::{HostIdentity, NvmeConfig, NvmeDevice};
use hawser_fabric::target::{NamespaceConfig, SubsystemConfig, Target};
use hawser_runtime::{Event, Instant, Op, ReactorHandle, Runtime, Source, SourceId};
use hawser_sim::{World, WorldConfig};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const NQN: &str = "nqn.2026-11.io.hawser:sim";

/// What became of the requests of a device that ends none before it is told to give up.
#[derive(Default)]
struct Stuck {
    held: AtomicUsize,
    aborted: AtomicUsize,
}

struct StuckDevice(Arc<Stuck>);

struct StuckChannel {
    state: Arc<Stuck>,
    reactor: ReactorHandle,
    user: SourceId,
    requests: Vec<Request>,
    aborted: bool,
}

impl Channel for StuckChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.state.held.fetch_add(batch.len(), Ordering::Relaxed);
        self.requests.append(batch);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        if self.aborted {
            let all = self.requests.drain(..);
            ended.extend(
                all.map(|request| Completion { token: request.token, outcome: Err(Status::Aborted) }),
            );
        }
    }

    fn abort(&mut self) {
        self.aborted = true;
        self.state.aborted.fetch_add(self.requests.len(), Ordering::Relaxed);
        let user = self.user;
        self.reactor.run(move |runtime| runtime.wake(user));
    }
}

impl Device for StuckDevice {
    fn name(&self) -> &'static str {
        "stuck"
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(Geometry::new(BlockSize::B512, 64))
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        let (state, reactor) = (Arc::clone(&self.0), runtime.handle());
        Box::new(StuckChannel { state, reactor, user, requests: Vec::new(), aborted: false })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::default()
    }
}

/// Someone who asks for one flush.
struct Asker {
    channel: Option<Box<dyn Channel>>,
    ended: Vec<Completion>,
}

impl Source for Asker {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        if let Some(channel) = &mut self.channel {
            channel.reap(&mut self.ended);
        }
    }
}

/// Requests of a host that is gone are left alone, but not for ever: its next Connect waits for them.
#[test]
fn commands_of_a_lost_association_are_aborted_after_half_a_minute() {
    let address: SocketAddr = "10.0.0.1:4420".parse().unwrap();
    let world = World::new(WorldConfig::new(1));
    let mut reactors = [world.reactor(), world.reactor()];
    let handles: Vec<_> = reactors.iter().map(|reactor| reactor.runtime().handle()).collect();
    let state = Arc::<Stuck>::default();
    let target = Target::start_simulated(
        vec![SubsystemConfig {
            nqn: NQN.to_owned(),
            listen: vec![address],
            transports: Vec::new(),
            allowed_hosts: None,
            serial: "sim".to_owned(),
            namespaces: vec![NamespaceConfig {
                nsid: 1,
                device: Arc::new(StuckDevice(Arc::clone(&state))),
                uuid: None,
            }],
        }],
        &handles[..1],
        |address| world.listen(address),
    )
    .unwrap();
    let uri = format!("nvme+tcp://{address}/{NQN}?nsid=1").parse().unwrap();
    let host = HostIdentity { nqn: "nqn.2026-11.io.hawser:host".to_owned(), id: [9; 16] };
    let device = NvmeDevice::open(NvmeConfig::new("n0", vec![uri], host), &handles[1..]).unwrap();
    world.run(&mut reactors, Duration::from_secs(60), || device.state() == DeviceState::Ready).unwrap();

    let asker = Rc::new(RefCell::new(Asker { channel: None, ended: Vec::new() }));
    let runtime = reactors[1].runtime().clone();
    let id = runtime.add_source(Rc::clone(&asker) as Rc<RefCell<dyn Source>>);
    let mut channel = runtime.enter(|| device.channel(&runtime, id));
    let zeroed = Box::leak(Box::new([0u8; 512]));
    let iovec = Box::leak(Box::new(libc::iovec { iov_base: zeroed.as_mut_ptr().cast(), iov_len: 512 }));
    // SAFETY: the iovec and its memory are leaked: they stay.
    let buffers = unsafe { Buffers::new(&raw const *iovec, 1, 512) };
    let (lba, blocks) = (Lba(0), BlockCount(1));
    let mut batch = vec![Request { operation: Operation::Read, lba, blocks, buffers, token: Token(1) }];
    runtime.enter(|| channel.submit(&mut batch));
    asker.borrow_mut().channel = Some(channel);
    world.run(&mut reactors, Duration::from_secs(1), || state.held.load(Ordering::Relaxed) == 1).unwrap();
    world.reset_connections(address);
    world.set_down(address, true);
    let lost = world.now();
    world.run(&mut reactors, Duration::from_secs(60), || state.aborted.load(Ordering::Relaxed) == 1).unwrap();
    assert!(world.now() >= lost + Duration::from_secs(30), "too early");
    world.run(&mut reactors, Duration::from_secs(1), || target.hosts(NQN).is_empty()).unwrap();
    // What the asker still waits for ends with its device.
    runtime.enter(|| asker.borrow_mut().channel.as_mut().unwrap().abort());
    world.run(&mut reactors, Duration::from_secs(60), || !asker.borrow().ended.is_empty()).unwrap();
    asker.borrow_mut().channel = None;
    drop((device, target));
}

/// Sends a good ICReq a byte a second until that fails; says when.
async fn drip(runtime: Runtime, address: std::net::SocketAddrV4, ended: Rc<RefCell<Option<Instant>>>) {
    let fd = runtime.tcp_socket(false).unwrap();
    let to = libc::sockaddr_in {
        sin_family: 2,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    };
    let len = u32::try_from(size_of::<libc::sockaddr_in>()).unwrap();
    let op = Op::Connect { fd, address: (&raw const to).cast(), len };
    // SAFETY: the address is this future's, which is not dropped before its world ends.
    assert_eq!(unsafe { runtime.operate(&op, None) }.await.result, 0);
    // Its kind, its header's length, no data, its whole length; what follows is zero.
    let mut request = [0u8; 128];
    (request[2], request[4]) = (128, 128);
    for byte in &request {
        let op = Op::Send { fd, buffer: &raw const *byte, len: 1 };
        // SAFETY: as above.
        if unsafe { runtime.operate(&op, None) }.await.result != 1 {
            break;
        }
        runtime.sleep(Duration::from_secs(1)).await;
    }
    *ended.borrow_mut() = Some(runtime.refresh_now());
    runtime.close(fd);
}

/// That bytes keep coming makes nobody a host.
#[test]
fn a_peer_that_sends_a_byte_a_second_has_half_a_minute_to_connect() {
    let address: SocketAddr = "10.0.0.1:4420".parse().unwrap();
    let SocketAddr::V4(v4) = address else { unreachable!("it is one") };
    let world = World::new(WorldConfig::new(1));
    let mut reactors = [world.reactor(), world.reactor()];
    let handle = reactors[0].runtime().handle();
    let device = Arc::new(StuckDevice(Arc::default()));
    let subsystem = SubsystemConfig {
        nqn: NQN.to_owned(),
        listen: vec![address],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: "sim".to_owned(),
        namespaces: vec![NamespaceConfig { nsid: 1, device, uuid: None }],
    };
    let listen = |address| world.listen(address);
    let target = Target::start_simulated(vec![subsystem], &[handle], listen).unwrap();
    let (runtime, began) = (reactors[1].runtime().clone(), world.now());
    let ended = Rc::new(RefCell::new(None));
    reactors[1].runtime().spawn(drip(runtime, v4, Rc::clone(&ended)));
    world.run(&mut reactors, Duration::from_secs(10), || target.stats().connections == 1).unwrap();
    world.run(&mut reactors, Duration::from_secs(300), || ended.borrow().is_some()).unwrap();
    let lasted = ended.borrow().unwrap() - began;
    assert!(lasted >= Duration::from_secs(30) && lasted < Duration::from_secs(34), "{lasted:?}");
    world.run(&mut reactors, Duration::from_secs(1), || target.stats().connections == 0).unwrap();
}
