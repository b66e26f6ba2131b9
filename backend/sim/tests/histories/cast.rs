//! The processes of a history: targets, hosts with a guest each, and what kills and starts them.

use crate::guest::{Client, Guest};
use crate::model::{BLOCK, Model};
use crate::plan::Plan;
use hawser_block::{BlockSize, Device, Geometry, WriteZeroesLimits};
use hawser_fabric::initiator::{CacheDoubt, HostIdentity, NvmeConfig, NvmeDevice};
use hawser_fabric::rdma::driver;
use hawser_fabric::simulated;
use hawser_fabric::target::{NamespaceConfig, SubsystemConfig, Target};
use hawser_fabric::uri::Transport;
use hawser_runtime::{Instant, Reactor, Runtime};
use hawser_sim::{Random, SimDisk, World, WorldConfig};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

pub(crate) const NQN: &str = "nqn.2026-11.io.hawser:sim";
/// Blocks of each host.
pub(crate) const REGION: u64 = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Host(usize),
    Target(usize),
}

pub(crate) struct TargetProcess {
    pub(crate) addresses: Vec<SocketAddr>,
    /// `None`: it is dead.
    pub(crate) process: Option<Target>,
    /// When it is started again.
    pub(crate) starts_at: Instant,
}

pub(crate) struct HostProcess {
    pub(crate) device: Option<Arc<NvmeDevice>>,
    pub(crate) clients: Vec<Rc<RefCell<Client>>>,
    pub(crate) guests: Vec<Rc<RefCell<Guest>>>,
    pub(crate) model: Rc<RefCell<Model>>,
    pub(crate) starts_at: Instant,
    had_predecessor: bool,
    /// Where its associations are kept; `None`: nowhere.
    record: Option<PathBuf>,
}

/// Everybody.
pub(crate) struct Cast {
    pub(crate) plan: Plan,
    pub(crate) world: World,
    pub(crate) disk: Arc<SimDisk>,
    pub(crate) reactors: Vec<Reactor>,
    owners: Vec<Owner>,
    pub(crate) targets: Vec<TargetProcess>,
    pub(crate) hosts: Vec<HostProcess>,
    pub(crate) troubles: Rc<RefCell<Vec<String>>>,
    pub(crate) random: Random,
}

impl Drop for Cast {
    fn drop(&mut self) {
        for reactor in self.reactors.drain(..) {
            self.world.kill(reactor);
        }
        for record in self.hosts.iter().filter_map(|host| host.record.as_ref()) {
            let _ = std::fs::remove_file(record);
        }
    }
}

impl Cast {
    pub(crate) fn new(mut plan: Plan) -> Cast {
        let world = World::new(WorldConfig::new(plan.seed));
        plan.foreign &= simulated::set_foreign(plan.foreign);
        if plan.rdma.is_some() {
            driver::install(&hawser_sim::verbs::TABLE);
            world.with_verbs();
        }
        let blocks = REGION * plan.hosts as u64;
        let geometry = Geometry {
            transfer_blocks_max: 256,
            volatile_cache: true,
            write_zeroes: Some(WriteZeroesLimits { blocks_max: 64, may_unmap: false }),
            ..Geometry::new(BlockSize::B512, blocks)
        };
        let disk = Arc::new(SimDisk::new("d", geometry, [7; 16]));
        disk.seed(plan.seed ^ 0xd15c);
        disk.state().cache_identity = plan.has_cache_identity.then_some([5; 16]);
        let random = Random::new(plan.seed ^ 0x57_4561);
        let addresses =
            (0..plan.links).map(|link| SocketAddr::from(([10, 0, u8::try_from(link).unwrap(), 1], 4420)));
        let addresses: Vec<_> = addresses.collect();
        let targets = (0..plan.targets)
            .map(|target| TargetProcess {
                addresses: addresses.iter().copied().skip(target).step_by(plan.targets).collect(),
                process: None,
                starts_at: Instant::default(),
            })
            .collect();
        let troubles = Rc::<RefCell<Vec<String>>>::default();
        let hosts = (0..plan.hosts)
            .map(|host| {
                let region = (host as u64 * REGION, (host as u64 + 1) * REGION);
                let mut model = Model::new(region.0, region.1);
                let is_doubtful = !plan.has_cache_identity || plan.foreign;
                model.trusts = plan.doubt == CacheDoubt::Trust && is_doubtful;
                if plan.doubt == CacheDoubt::FailFlush && is_doubtful {
                    // After every new association.
                    model.failures_allowed = u64::MAX / 2;
                }
                model.write_through = plan.doubt == CacheDoubt::WriteThrough;
                let model = Rc::new(RefCell::new(model));
                let guest = |lane: usize| {
                    let seed = plan.seed ^ ((host as u64) << 8 | lane as u64) << 40;
                    let random = Random::new(seed);
                    let shared = (Rc::clone(&model), Rc::clone(&troubles));
                    let disk = Arc::clone(&disk);
                    Rc::new(RefCell::new(Guest::new(
                        shared,
                        disk,
                        world.clone(),
                        random,
                        region,
                        (plan.requests, plan.rdma.map_or(0, |rdma| rdma.announced_permille)),
                    )))
                };
                let name = format!("hawser-sim-{}-{:x}-{host}", std::process::id(), plan.seed);
                HostProcess {
                    device: None,
                    clients: Vec::new(),
                    guests: (0..plan.lanes).map(guest).collect(),
                    model: Rc::clone(&model),
                    starts_at: Instant::default(),
                    had_predecessor: false,
                    record: Some(std::env::temp_dir().join(name)),
                }
            })
            .collect();
        let mut cast = Cast {
            plan,
            world,
            disk,
            reactors: Vec::new(),
            owners: Vec::new(),
            targets,
            hosts,
            troubles,
            random,
        };
        cast.start_due();
        cast
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.targets.iter().flat_map(|target| target.addresses.iter().copied()).collect()
    }

    /// Guests' queues that are in use, with the runtimes of their reactors.
    pub(crate) fn clients(&self) -> Vec<(Runtime, Rc<RefCell<Client>>)> {
        let mut clients = Vec::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let here =
                self.reactors.iter().zip(&self.owners).filter(|(_, owner)| **owner == Owner::Host(index));
            let both = here.zip(&host.clients);
            clients.extend(both.map(|((reactor, _), client)| (reactor.runtime().clone(), Rc::clone(client))));
        }
        clients
    }

    fn reactors_for(&mut self, owner: Owner, count: usize) -> Vec<hawser_runtime::ReactorHandle> {
        (0..count)
            .map(|_| {
                let reactor = self.world.reactor();
                let handle = reactor.runtime().handle();
                self.reactors.push(reactor);
                self.owners.push(owner);
                handle
            })
            .collect()
    }

    /// Starts the processes whose time has come, and guests' queues at devices that were reached.
    pub(crate) fn start_due(&mut self) {
        let now = self.world.now();
        for index in 0..self.targets.len() {
            if self.targets[index].process.is_none() && self.targets[index].starts_at <= now {
                self.start_target(index);
            }
        }
        for index in 0..self.hosts.len() {
            if self.hosts[index].device.is_none() && self.hosts[index].starts_at <= now {
                self.start_host(index);
            }
            let host = &self.hosts[index];
            let Some(device) = host.device.clone() else { continue };
            if !host.clients.is_empty() || device.geometry().is_none() {
                continue;
            }
            let here =
                self.reactors.iter().zip(&self.owners).filter(|(_, owner)| **owner == Owner::Host(index));
            let clients = here.zip(&host.guests).map(|((reactor, _), guest)| {
                let runtime = reactor.runtime();
                runtime
                    .enter(|| Client::start(runtime, Rc::clone(guest), |user| device.channel(runtime, user)))
            });
            let clients = clients.collect();
            self.hosts[index].clients = clients;
        }
    }

    /// Somebody's start is due.
    pub(crate) fn next_start(&self) -> Option<Instant> {
        let targets = self.targets.iter().filter(|target| target.process.is_none());
        let hosts = self.hosts.iter().filter(|host| host.device.is_none());
        targets.map(|target| target.starts_at).chain(hosts.map(|host| host.starts_at)).min()
    }

    fn start_target(&mut self, index: usize) {
        let count = 1 + self.random.index(2);
        let handles = self.reactors_for(Owner::Target(index), count);
        let subsystem = SubsystemConfig {
            nqn: NQN.to_owned(),
            listen: self.targets[index].addresses.clone(),
            transports: self
                .plan
                .rdma
                .map_or_else(Vec::new, |_| vec![Transport::Rdma; self.targets[index].addresses.len()]),
            allowed_hosts: None,
            serial: "sim".to_owned(),
            namespaces: vec![NamespaceConfig {
                nsid: 1,
                device: Arc::clone(&self.disk) as Arc<dyn Device>,
                uuid: None,
            }],
        };
        let world = &self.world;
        let target = Target::start_simulated(vec![subsystem], &handles, |address| world.listen(address));
        self.targets[index].process = Some(target.expect("a good configuration"));
    }

    fn start_host(&mut self, index: usize) {
        let handles = self.reactors_for(Owner::Host(index), self.plan.lanes);
        let digests = if self.plan.digests { "&hdr_digest=1&data_digest=1" } else { "" };
        let transport = if self.plan.rdma.is_some() { "rdma" } else { "tcp" };
        let uri = |address| format!("nvme+{transport}://{address}/{NQN}?nsid=1{digests}").parse().unwrap();
        let host = HostIdentity {
            nqn: format!("nqn.2026-11.io.hawser:host{index}"),
            id: [u8::try_from(index).unwrap() + 1; 16],
        };
        let mut config =
            NvmeConfig::new(format!("n{index}"), self.addresses().into_iter().map(uri).collect(), host);
        config.policy = self.plan.policy;
        config.rdma_keys = self.plan.rdma.map_or(config.rdma_keys, |rdma| rdma.keys);
        config.on_cache_doubt = self.plan.doubt;
        config.timers.keep_alive_tmo = self.plan.keep_alive;
        config.timers.io_timeout = self.plan.io_timeout;
        config.timers.reconnect_delay = self.plan.reconnect_delay;
        config.had_predecessor = self.hosts[index].had_predecessor;
        config.record = self.hosts[index].record.clone();
        let device = NvmeDevice::open(config, &handles).expect("a good configuration");
        self.hosts[index].device = Some(device);
    }

    fn kill(&mut self, owner: Owner) {
        for at in (0..self.owners.len()).rev() {
            if self.owners[at] == owner {
                self.owners.remove(at);
                let reactor = self.reactors.remove(at);
                self.world.kill(reactor);
            }
        }
    }

    /// Ends a target's process; it is started again at `starts_at`.
    pub(crate) fn kill_target(&mut self, index: usize, starts_at: Instant) {
        if self.targets[index].process.is_none() {
            return;
        }
        for address in &self.targets[index].addresses {
            self.world.set_down(*address, true);
        }
        self.kill(Owner::Target(index));
        self.targets[index].process = None;
        self.targets[index].starts_at = starts_at;
    }

    /// All targets die, and what the disk's cache holds is lost.
    pub(crate) fn lose_power(&mut self, starts_at: Instant) {
        for index in 0..self.targets.len() {
            self.kill_target(index, starts_at);
        }
        self.disk.state().lose_cache();
        for host in &self.hosts {
            let mut model = host.model.borrow_mut();
            // All that came before the first of them was told.
            model.failures_allowed += 40;
            if let Err(why) = model.cache_lost(&self.disk.state().content) {
                self.troubles.borrow_mut().push(why);
            }
        }
    }

    /// Ends a host's process; the next one, at `starts_at`, has what it kept of its associations, or not.
    pub(crate) fn kill_host(&mut self, index: usize, kept: bool, starts_at: Instant) {
        if self.hosts[index].device.is_none() {
            return;
        }
        self.hosts[index].clients.clear();
        self.kill(Owner::Host(index));
        let host = &mut self.hosts[index];
        host.device = None;
        host.had_predecessor = true;
        host.starts_at = starts_at;
        for guest in &host.guests {
            guest.borrow_mut().process_died();
        }
        if let Some(record) = host.record.as_ref().filter(|_| !kept) {
            let _ = std::fs::remove_file(record);
            // Who knows nothing of caches trusts them, or is told not to.
            host.model.borrow_mut().trusts |= self.plan.doubt == CacheDoubt::Trust;
        }
        if self.plan.doubt == CacheDoubt::FailFlush {
            host.model.borrow_mut().failures_allowed += 40;
        }
    }

    /// What hosts wait for, for people.
    pub(crate) fn state(&self) -> String {
        let mut text = String::new();
        for (index, host) in self.hosts.iter().enumerate() {
            let trouble = host.device.as_ref().map(|device| device.trouble()).unwrap_or_default();
            text += &format!("host {index}: {trouble:?}");
            for guest in &host.guests {
                text += &format!(" [{}+{} to do]", guest.borrow().waits_for(), guest.borrow().to_do);
            }
        }
        text
    }

    /// What the disk holds, in each host's eyes.
    pub(crate) fn check_disk(&self) -> Result<(), String> {
        let state = self.disk.state();
        assert!(state.content.len() >= BLOCK);
        self.hosts.iter().try_for_each(|host| host.model.borrow().check_all(&state.content))
    }
}
