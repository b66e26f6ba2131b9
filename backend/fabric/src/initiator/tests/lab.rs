//! Our host and our target with a fault proxy on each path between them, and a device that a test can make hang.

use super::client::{Ask, Client};
use super::*;
use crate::MemDevice;
use crate::target::{NamespaceConfig, SubsystemConfig, Target};
use faults::{Act, Proxy, Way, opcode};
use hawser_block::BlockSize;
use hawser_block::held::HeldDevice;

const HOUR: Duration = Duration::from_secs(3600);

pub(super) fn data(seed: u8, blocks: u32) -> Vec<u8> {
    (0..blocks as usize * 512).map(|at| seed ^ at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect()
}

/// A target with two addresses, a proxy before each, and a host with a path through each.
pub(super) struct Lab {
    // The host goes first, the reactors last.
    pub(super) client: Client,
    pub(super) device: Arc<NvmeDevice>,
    pub(super) proxies: Vec<Proxy>,
    pub(super) target: Target,
    pub(super) disk: Arc<HeldDevice>,
    pub(super) reactors: [ReactorThread; 2],
}

pub(super) fn lab(paths: usize, change: impl FnOnce(&mut NvmeConfig)) -> Lab {
    let (host, of_target) = (reactor("host"), reactor("target"));
    let mem = MemDevice::new("m0", 16 << 20, BlockSize::B512).unwrap();
    let disk = Arc::new(HeldDevice::new(Arc::new(mem)));
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let subsystem = SubsystemConfig {
        nqn: NQN.into(),
        listen: vec![any; paths],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: "test".into(),
        namespaces: vec![NamespaceConfig { nsid: 1, device: disk.clone(), uuid: None }],
    };
    let target = Target::start(vec![subsystem], &[of_target.handle().clone()]).unwrap();
    let proxies: Vec<Proxy> =
        target.addresses()[0].1.iter().map(|address| Proxy::start(*address).unwrap()).collect();
    let mut config = config(proxies[0].address());
    for proxy in &proxies[1..] {
        config.paths.push(super::config(proxy.address()).paths[0].clone());
    }
    // What is only waited for would take longer than the test has patience.
    config.timers.keep_alive_tmo = HOUR;
    config.timers.quiesce_tmo = HOUR;
    change(&mut config);
    let device = NvmeDevice::open(config, &[host.handle().clone()]).unwrap();
    wait_ready(&device);
    wait_until("all paths are live", || device.paths().iter().all(|path| path.state == "live"));
    let client = Client::open(&device, host.handle());
    Lab { client, device, proxies, target, disk, reactors: [host, of_target] }
}

impl Lab {
    /// The proxy that I/O goes through now.
    pub(super) fn path_in_use(&mut self) -> usize {
        let rules: Vec<_> = self
            .proxies
            .iter()
            .map(|proxy| {
                proxy.rule(|pdu| pdu.is(Way::ToTarget, opcode::READ).then_some(Act::Hold(usize::MAX)))
            })
            .collect();
        assert_eq!(self.client.run(Ask::read(8192, 1, 512)).outcome, Ok(()));
        rules.iter().position(|rule| rule.caught() > 0).expect("one of them")
    }

    pub(super) fn content(&mut self, blocks: u32) -> Vec<u8> {
        let told = self.client.run(Ask::read(0, blocks, 512));
        assert_eq!(told.outcome, Ok(()));
        told.data
    }
}
