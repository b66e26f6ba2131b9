//! `kill -9` with writes on their way: a guest's front end keeps the in-flight log, the next process carries its writes out again,
//! and nothing that the dead one had sent lands on what is written later.

use crate::common::{PATIENCE, Place, Serving, until};
use crate::frontend::{DATA, Guest, T_IN, T_OUT, Wish};
use faults::{Pdu, Proxy, kind};
use hawser_block::held::HeldDevice;
use hawser_block::{BlockSize, Device, IoKind};
use hawser_fabric::MemDevice;
use hawser_fabric::target::{NamespaceConfig, SubsystemConfig, Target};
use hawser_runtime::{ReactorConfig, ReactorThread};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A guest on a daemon's disk, whose device is a file behind another daemon and a fault proxy.
struct Rig {
    // The order is that in which they are dropped.
    guest: Guest,
    daemon: Serving,
    host: Place,
    proxy: Proxy,
    target: Serving,
    storage: Place,
}

fn wish() -> Wish {
    Wish { inflight: true, ..Wish::default() }
}

fn address_of(target: &Serving) -> SocketAddr {
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    listen.trim_start_matches("tcp://").parse().unwrap()
}

fn serve(host: &Place) -> Serving {
    let daemon = host.serve();
    until("the disk listens", || daemon.disk("d").0 == "listening");
    daemon
}

/// A disk on a target. Who waited for time to prove that an association is quiet would wait for two hours.
fn initiator(address: SocketAddr) -> String {
    format!(
        "[[device]]\nname = \"r\"\nuri = \"nvme+tcp://{address}/nqn.2026-11.io.hawser:t\"\n\
         keep_alive_tmo = 3600\nreconnect_delay = 1\n\
         [[disk]]\nname = \"d\"\ndevice = \"r\"\nsocket = \"@/d.sock\"\n"
    )
}

fn rig() -> Rig {
    let storage = Place::new();
    std::fs::File::create(storage.path("store")).unwrap().set_len(16 << 20).unwrap();
    storage.configure(
        "[[device]]\nname = \"f\"\nuri = \"file://@/store\"\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"f\"\n",
    );
    let target = storage.serve();
    let proxy = Proxy::start(address_of(&target)).unwrap();
    let host = Place::new();
    host.configure(&initiator(proxy.address()));
    let daemon = serve(&host);
    let guest = Guest::connect(&host.path("d.sock"), &wish());
    Rig { guest, daemon, host, proxy, target, storage }
}

/// What carries the data of the next write to block 0.
fn carries_the_data(bytes: usize) -> impl FnMut(&Pdu<'_>) -> bool + Send {
    let kind = if bytes == 4096 { kind::CAPSULE_CMD } else { kind::H2C_DATA };
    move |pdu| pdu.writes(0) && pdu.kind() == kind
}

/// The next process carries out what the guest had asked of the one before; then the guest writes anew.
fn replayed_and_overwritten(guest: &mut Guest, fill: u8, bytes: usize, log: impl Fn() -> String) {
    let since = Instant::now();
    while guest.rings[0].used_idx(&guest.ram) == guest.rings[0].last_used {
        assert!(since.elapsed() < PATIENCE, "{}", log());
        std::thread::sleep(Duration::from_millis(10));
    }
    guest.rings[0].wait_used(&guest.ram);
    assert_eq!(guest.ram.read(DATA + 16, 1), [0], "the guest sees no error");
    assert_eq!(guest.request(T_OUT, 0, &vec![fill; bytes], 0).0, 0);
}

impl Rig {
    fn begin_write(&mut self, fill: u8, bytes: usize) {
        let parts = self.guest.plain(T_OUT, 0, &vec![fill; bytes], 0, DATA);
        self.guest.submit(0, &parts);
    }

    fn replayed_and_overwritten(&mut self, fill: u8, bytes: usize) {
        let log = || format!("{}\n{}", self.host.log(), self.storage.log());
        replayed_and_overwritten(&mut self.guest, fill, bytes, log);
    }

    fn content(&mut self, bytes: usize) -> Vec<u8> {
        let (status, content) = self.guest.request(T_IN, 0, &[], u32::try_from(bytes).unwrap());
        assert_eq!(status, 0);
        content
    }
}

#[test]
fn what_a_killed_daemon_had_sent_never_lands_on_what_its_successor_writes() {
    for bytes in [4096, 512 << 10] {
        let mut rig = rig();
        let held = rig.proxy.hold_one(carries_the_data(bytes));
        rig.begin_write(1, bytes);
        assert!(held.wait_caught(1, PATIENCE));
        let links = rig.proxy.links();
        // Nor does the target hear that the other connections have ended.
        rig.proxy.hold_ends(true);
        rig.daemon.kill();
        rig.daemon = serve(&rig.host);
        rig.guest = rig.guest.reconnect(&rig.host.path("d.sock"), &wish());
        rig.replayed_and_overwritten(2, bytes);
        held.release();
        rig.proxy.hold_ends(false);
        let proxy = &rig.proxy;
        until("the dead one's connections have ended", || proxy.links() == links);
        assert!(rig.content(bytes) == vec![2; bytes], "{bytes} bytes: an older write came last");
        let store = std::fs::read(rig.storage.path("store")).unwrap();
        assert!(store[..bytes] == vec![2; bytes]);
        assert_eq!(rig.daemon.end(), Some(0));
        assert_eq!(rig.target.end(), Some(0));
    }
}

/// The target was killed at the same time, and its successor knew no controller of before: the guest waited for twice the
/// keep-alive time-out and more.
#[test]
fn a_target_that_is_killed_with_its_host_keeps_nobody_waiting() {
    let mut rig = rig();
    let held = rig.proxy.hold_one(carries_the_data(4096));
    rig.begin_write(1, 4096);
    assert!(held.wait_caught(1, PATIENCE));
    rig.daemon.kill();
    rig.target.kill();
    rig.target = rig.storage.serve();
    rig.proxy.set_target(address_of(&rig.target));
    rig.daemon = serve(&rig.host);
    rig.guest = rig.guest.reconnect(&rig.host.path("d.sock"), &wish());
    rig.replayed_and_overwritten(2, 4096);
    held.release();
    assert!(rig.content(4096) == [2; 4096]);
    // The same for a target that alone dies, without a word to its host.
    let held = rig.proxy.hold_one(carries_the_data(4096));
    rig.begin_write(3, 4096);
    assert!(held.wait_caught(1, PATIENCE));
    rig.proxy.cut(faults::Cut::ResetHost);
    rig.target.kill();
    rig.target = rig.storage.serve();
    rig.proxy.set_target(address_of(&rig.target));
    rig.replayed_and_overwritten(4, 4096);
    drop(held);
    assert!(rig.content(4096) == [4; 4096]);
    assert_eq!(rig.daemon.end(), Some(0));
    assert_eq!(rig.target.end(), Some(0));
}

/// A target whose device hangs, with a write in it, while the daemon is killed: the next one gets no association before that has
/// ended, and the guest's disk waits.
#[test]
fn what_a_killed_daemon_had_at_its_targets_device_is_waited_for() {
    let reactor = ReactorThread::spawn("target", ReactorConfig::default()).unwrap();
    let mem = MemDevice::new("m", 1 << 20, BlockSize::B512).unwrap();
    let disk = Arc::new(HeldDevice::new(Arc::new(mem)));
    let subsystem = SubsystemConfig {
        nqn: "nqn.2026-11.io.hawser:t".into(),
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: "test".into(),
        namespaces: vec![NamespaceConfig { nsid: 1, device: disk.clone(), uuid: None }],
    };
    let target = Target::start(vec![subsystem], &[reactor.handle().clone()]).unwrap();
    let host = Place::new();
    host.configure(&initiator(target.addresses()[0].1[0]));
    let daemon = serve(&host);
    let mut guest = Guest::connect(&host.path("d.sock"), &wish());
    disk.hold_one(|request| request.operation.is_write());
    let parts = guest.plain(T_OUT, 0, &[1; 4096], 0, DATA);
    guest.submit(0, &parts);
    until("it is at the device", || disk.held() == 1);
    daemon.kill();
    let daemon = host.serve();
    // Longer than the target takes to answer a reset that is not done.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.disk("d").0, "waiting");
    disk.release();
    until("the disk listens", || daemon.disk("d").0 == "listening");
    let mut guest = guest.reconnect(&host.path("d.sock"), &wish());
    replayed_and_overwritten(&mut guest, 2, 4096, || host.log());
    assert_eq!(guest.request(T_IN, 0, &[], 4096), (0, vec![2; 4096]));
    assert_eq!(disk.stats().kind(IoKind::Write).requests, 3);
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    assert!(target.stop(PATIENCE));
}
