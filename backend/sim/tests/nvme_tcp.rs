//! Our initiator against our target over a network that loses connections, goes silent and refuses, under one seed.
//!
//! Every block has one request at a time, and its newest acknowledged content is known: a write that is lost, or one that
//! is executed again after a newer one (a ghost), is seen by a later read or at the end.

use hawser_block::{
    BlockCount, BlockSize, Buffers, Channel, Completion, Device, DeviceState, Geometry, Lba, Operation,
    Request, Token,
};
use hawser_fabric::initiator::{HostIdentity, IoPolicy, NvmeConfig, NvmeDevice};
use hawser_fabric::target::{NamespaceConfig, SubsystemConfig, Target};
use hawser_runtime::{Event, Instant, Runtime, Source};
use hawser_sim::{Random, SimDisk, World, WorldConfig};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const BLOCKS: u64 = 64;
const BLOCK: usize = 512;
const SLOTS: usize = 8;
const NQN: &str = "nqn.2026-11.io.hawser:sim";

struct Slot {
    memory: Box<[u8]>,
    iovec: Box<libc::iovec>,
    busy: Option<Request>,
}

/// One user of the device, on one reactor: random requests over its own half of the blocks.
struct Client {
    channel: Option<Box<dyn Channel>>,
    random: Random,
    first_block: u64,
    model: Vec<u8>,
    locked: Vec<bool>,
    slots: Vec<Slot>,
    to_do: usize,
    ended: Vec<Completion>,
}

impl Client {
    fn new(seed: u64, first_block: u64, requests: usize) -> Client {
        let slot = || {
            let mut memory = vec![0u8; 16 * BLOCK].into_boxed_slice();
            let iovec = Box::new(libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 0 });
            Slot { memory, iovec, busy: None }
        };
        let half = usize::try_from(BLOCKS / 2).unwrap();
        Client {
            channel: None,
            random: Random::new(seed),
            first_block,
            model: vec![0; half * BLOCK],
            locked: vec![false; half],
            slots: (0..SLOTS).map(|_| slot()).collect(),
            to_do: requests,
            ended: Vec::new(),
        }
    }

    fn finished(&self) -> bool {
        self.channel.is_some() && self.to_do == 0 && self.slots.iter().all(|slot| slot.busy.is_none())
    }

    fn range(&self, request: &Request) -> (usize, usize) {
        let from = usize::try_from(request.lba.0 - self.first_block).unwrap();
        (from, from + request.blocks.0 as usize)
    }

    fn end(&mut self, completion: Completion) {
        let index = usize::try_from(completion.token.0).unwrap();
        let request = self.slots[index].busy.take().expect("a request ends once");
        assert_eq!(completion.outcome, Ok(()), "the guest sees a pause, never an error");
        let (from, to) = self.range(&request);
        self.locked[from..to].fill(false);
        let payload = &self.slots[index].memory[..(to - from) * BLOCK];
        let model = &mut self.model[from * BLOCK..to * BLOCK];
        match request.operation {
            Operation::Read => {
                assert!(payload == model, "blocks {from}..{to} do not read back as acknowledged")
            }
            Operation::Write { .. } => model.copy_from_slice(payload),
            _ => {}
        }
    }

    fn begin(&mut self, index: usize) -> Option<Request> {
        let half = self.locked.len();
        let from = self.random.index(half);
        let count = (1 + self.random.index(16)).min(half - from);
        if self.locked[from..from + count].contains(&true) {
            return None;
        }
        let operation = match self.random.below(8) {
            0 => Operation::Flush,
            1..4 => Operation::Read,
            _ => Operation::Write { fua: self.random.chance(200) },
        };
        let (blocks, lba) =
            if operation == Operation::Flush { (0, 0) } else { (count, self.first_block + from as u64) };
        let slot = &mut self.slots[index];
        let buffers = if operation.has_payload() {
            slot.iovec.iov_len = count * BLOCK;
            // SAFETY: memory and iovec are boxed and not moved or freed while the slot is busy.
            unsafe { Buffers::new(&raw const *slot.iovec, 1, u32::try_from(count * BLOCK).unwrap()) }
        } else {
            Buffers::EMPTY
        };
        if operation.is_write() {
            for chunk in slot.memory.chunks_exact_mut(8) {
                chunk.copy_from_slice(&self.random.next_u64().to_le_bytes());
            }
        }
        let token = Token(index as u64);
        let request = Request {
            operation,
            lba: Lba(lba),
            blocks: BlockCount(u32::try_from(blocks).unwrap()),
            buffers,
            token,
        };
        // A flush locks nothing: its range is empty at the client's first block.
        let request_range = if operation == Operation::Flush {
            Request { lba: Lba(self.first_block), ..request }
        } else {
            request
        };
        self.locked[from..from + blocks].fill(true);
        slot.busy = Some(request_range);
        Some(request)
    }
}

impl Source for Client {
    fn poll(&mut self, _: &Runtime, _: &mut Vec<Event>) {
        let Some(mut channel) = self.channel.take() else { return };
        let mut ended = std::mem::take(&mut self.ended);
        channel.reap(&mut ended);
        for completion in ended.drain(..) {
            self.end(completion);
        }
        self.ended = ended;
        let mut batch = Vec::new();
        for index in 0..SLOTS {
            if self.to_do > 0
                && self.slots[index].busy.is_none()
                && let Some(request) = self.begin(index)
            {
                self.to_do -= 1;
                batch.push(request);
            }
        }
        if !batch.is_empty() {
            channel.submit(&mut batch);
        } else if self.to_do > 0 && self.slots.iter().all(|slot| slot.busy.is_none()) {
            // Every draw met a locked range, which cannot be when nothing is busy.
            unreachable!("nothing is locked and nothing could begin");
        }
        self.channel = Some(channel);
    }
}

/// What the network does to them.
#[derive(Clone, Copy)]
struct Faults {
    /// In 100,000 steps.
    resets: u64,
    silences: u64,
    downs: u64,
    /// The first path is silent from the start on.
    one_is_silent: bool,
    /// Changed bits, in 100,000 steps; with digests on.
    corruptions: u64,
    slow_disk: bool,
    /// `Some`: there is a second path to the same subsystem. Each fault hits one of them.
    two_paths: Option<IoPolicy>,
}

fn history(seed: u64, requests: usize, faults: Faults) -> u64 {
    let all: [SocketAddr; 2] = ["10.0.0.1:4420".parse().unwrap(), "10.0.1.1:4420".parse().unwrap()];
    let addresses = if faults.two_paths.is_some() { &all[..] } else { &all[..1] };
    let world = World::new(WorldConfig::new(seed));
    let mut reactors = [world.reactor(), world.reactor(), world.reactor(), world.reactor()];
    let handles: Vec<_> = reactors.iter().map(|reactor| reactor.runtime().handle()).collect();

    let geometry =
        Geometry { transfer_blocks_max: 256, volatile_cache: true, ..Geometry::new(BlockSize::B512, BLOCKS) };
    let disk = Arc::new(SimDisk::new("d", geometry, [7; 16]));
    if faults.slow_disk {
        // Longer than a reconnect takes: commands of a lost association are still at the disk when the next one comes.
        disk.state().latency_ns_max = 400_000_000;
    }
    let target = Target::start_simulated(
        vec![SubsystemConfig {
            nqn: NQN.to_owned(),
            listen: addresses.to_vec(),
            transports: Vec::new(),
            allowed_hosts: None,
            serial: "sim".to_owned(),
            namespaces: vec![NamespaceConfig {
                nsid: 1,
                device: Arc::clone(&disk) as Arc<dyn Device>,
                uuid: None,
            }],
        }],
        &handles[..2],
        |address| world.listen(address),
    )
    .unwrap();

    let digests = if faults.corruptions > 0 { "&hdr_digest=1&data_digest=1" } else { "" };
    let uri = |address| format!("nvme+tcp://{address}/{NQN}?nsid=1{digests}").parse().unwrap();
    let paths = addresses.iter().map(uri).collect();
    let host = HostIdentity { nqn: "nqn.2026-11.io.hawser:host".to_owned(), id: [9; 16] };
    let mut config = NvmeConfig::new("n0", paths, host);
    config.policy = faults.two_paths.unwrap_or_default();
    let device = NvmeDevice::open(config, &handles[2..]).unwrap();
    let all_live = || device.paths().iter().all(|path| path.state == "live");
    world
        .run(&mut reactors, Duration::from_secs(60), || device.state() == DeviceState::Ready && all_live())
        .unwrap_or_else(|why| panic!("seed {seed}: {why}: {}", device.trouble()));

    let clients: Vec<_> = [(2usize, 0), (3, BLOCKS / 2)]
        .into_iter()
        .map(|(reactor, first_block)| {
            let client = Rc::new(RefCell::new(Client::new(seed ^ first_block, first_block, requests)));
            let runtime = reactors[reactor].runtime();
            let id = runtime.add_source(Rc::clone(&client) as Rc<RefCell<dyn Source>>);
            client.borrow_mut().channel = Some(runtime.enter(|| device.channel(runtime, id)));
            runtime.wake(id);
            client
        })
        .collect();

    if faults.one_is_silent {
        world.silence(addresses[0], Duration::from_secs(3600));
    }
    let mut weather = Random::new(seed ^ 0x57_4561);
    let mut up_at: Option<(Instant, SocketAddr)> = None;
    let storm = world.clone();
    world
        .run(&mut reactors, Duration::from_secs(4000), || {
            let now = storm.now();
            if let Some((_, address)) = up_at.filter(|(at, _)| *at <= now) {
                storm.set_down(address, false);
                up_at = None;
            }
            let address = addresses[weather.index(addresses.len())];
            if weather.below(100_000) < faults.corruptions {
                storm.corrupt(address);
            }
            match weather.below(100_000) {
                draw if draw < faults.resets => storm.reset_connections(address),
                draw if draw < faults.resets + faults.silences => {
                    storm.silence(address, Duration::from_millis(1 + weather.below(9_000)));
                }
                draw if draw < faults.resets + faults.silences + faults.downs && up_at.is_none() => {
                    storm.reset_connections(address);
                    storm.set_down(address, true);
                    up_at = Some((now + Duration::from_millis(1 + weather.below(3_000)), address));
                }
                _ => {}
            }
            clients.iter().all(|client| client.borrow().finished())
        })
        .unwrap_or_else(|why| panic!("seed {seed}: {why}: {}", device.trouble()));

    for client in &clients {
        let client = client.borrow();
        let from = usize::try_from(client.first_block).unwrap() * BLOCK;
        assert!(
            *disk.state().content.get(from..from + client.model.len()) == client.model[..],
            "seed {seed}: the disk's content"
        );
        drop(client);
    }
    for client in &clients {
        client.borrow_mut().channel = None;
    }
    drop(device);
    drop(target);
    world.now().0
}

fn seeds() -> u64 {
    std::env::var("HAWSER_SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(20)
}

const CALM: Faults = Faults {
    resets: 0,
    silences: 0,
    downs: 0,
    one_is_silent: false,
    corruptions: 0,
    slow_disk: false,
    two_paths: None,
};

#[test]
fn a_calm_network_ends_every_request_and_replays_exactly() {
    for seed in 0..seeds().min(20) {
        assert_eq!(history(seed, 200, CALM), history(seed, 200, CALM), "seed {seed}");
    }
}

#[test]
fn lost_connections_lose_and_repeat_no_write() {
    for seed in 0..seeds() {
        history(seed, 300, Faults { resets: 60, downs: 15, ..CALM });
    }
}

#[test]
fn lost_connections_with_commands_at_a_slow_disk_lose_and_repeat_no_write() {
    for seed in 0..seeds() {
        history(seed, 200, Faults { resets: 60, downs: 10, slow_disk: true, ..CALM });
    }
}

#[test]
fn silences_longer_than_the_keep_alive_lose_and_repeat_no_write() {
    for seed in 0..seeds() {
        history(seed, 200, Faults { resets: 10, silences: 20, ..CALM });
    }
}

#[test]
fn changed_bits_are_found_where_there_are_digests() {
    for seed in 0..seeds() {
        history(seed, 200, Faults { corruptions: 150, resets: 10, ..CALM });
    }
}

const POLICIES: [IoPolicy; 3] = [IoPolicy::Numa, IoPolicy::RoundRobin, IoPolicy::QueueDepth];

#[test]
fn two_paths_lose_and_repeat_no_write() {
    for seed in 0..seeds() {
        let two_paths = Some(POLICIES[usize::try_from(seed % 3).unwrap()]);
        history(seed, 200, Faults { resets: 40, silences: 10, downs: 20, two_paths, ..CALM });
    }
}

#[test]
fn two_paths_to_a_slow_disk_lose_and_repeat_no_write() {
    for seed in 0..seeds() {
        let two_paths = Some(POLICIES[usize::try_from(seed % 3).unwrap()]);
        let faults = Faults { resets: 40, silences: 10, downs: 10, slow_disk: true, two_paths, ..CALM };
        history(seed, 150, faults);
    }
}

/// The target's CQT is half a minute: whoever waits for that instead of asking through the other path is seen.
#[test]
fn writes_move_within_a_second_once_a_path_is_known_to_be_dead() {
    for seed in 0..seeds() {
        let faults = Faults { one_is_silent: true, two_paths: Some(IoPolicy::RoundRobin), ..CALM };
        let ended_ns = history(seed, 100, faults);
        // It begins at 1 s. A keep-alive is due in half of 5 s, and is waited for for 5 s.
        assert!(ended_ns < 9_500_000_000, "seed {seed}: {ended_ns}");
    }
}
