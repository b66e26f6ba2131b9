//! How associations end, and what the next one of the same host waits for.

use super::*;
use std::io::Write;

/// A device whose requests end when the test says so, and not when they are aborted.
pub(super) struct StuckDevice {
    stats: Arc<hawser_block::StatsSet>,
    state: Arc<Stuck>,
    quiesce_time: Duration,
}

#[derive(Default)]
pub(super) struct Stuck {
    released: AtomicBool,
    /// Requests that it has, of any channel.
    pub(super) held: AtomicUsize,
    pub(super) landed: AtomicUsize,
    /// How often a channel was told to give up.
    pub(super) aborts: AtomicUsize,
    users: Mutex<Vec<(ReactorHandle, hawser_runtime::SourceId)>>,
}

struct StuckChannel {
    state: Arc<Stuck>,
    requests: Vec<hawser_block::Request>,
}

impl hawser_block::Channel for StuckChannel {
    fn submit(&mut self, batch: &mut Vec<hawser_block::Request>) {
        self.state.held.fetch_add(batch.len(), Ordering::SeqCst);
        self.requests.append(batch);
    }

    fn reap(&mut self, ended: &mut Vec<hawser_block::Completion>) {
        if self.state.released.load(Ordering::SeqCst) {
            self.state.landed.fetch_add(self.requests.len(), Ordering::SeqCst);
            ended.extend(
                self.requests
                    .drain(..)
                    .map(|request| hawser_block::Completion { token: request.token, outcome: Ok(()) }),
            );
        }
    }

    fn abort(&mut self) {
        self.state.aborts.fetch_add(1, Ordering::SeqCst);
    }
}

impl Device for StuckDevice {
    fn name(&self) -> &'static str {
        "stuck"
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(Geometry::new(BlockSize::B512, 4096))
    }

    fn state(&self) -> hawser_block::DeviceState {
        hawser_block::DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    fn quiesce_time(&self) -> Duration {
        self.quiesce_time
    }

    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, runtime: &Runtime, user: hawser_runtime::SourceId) -> Box<dyn hawser_block::Channel> {
        self.state.users.lock().unwrap().push((runtime.handle(), user));
        Box::new(StuckChannel { state: Arc::clone(&self.state), requests: Vec::new() })
    }

    fn stats(&self) -> Arc<hawser_block::StatsSet> {
        Arc::clone(&self.stats)
    }
}

impl StuckDevice {
    pub(super) fn new(state: &Arc<Stuck>) -> StuckDevice {
        StuckDevice { stats: Arc::default(), state: Arc::clone(state), quiesce_time: Duration::ZERO }
    }

    /// One that says how long its requests go on after an abort.
    pub(super) fn quiescing(state: &Arc<Stuck>, quiesce_time: Duration) -> StuckDevice {
        StuckDevice { quiesce_time, ..StuckDevice::new(state) }
    }

    /// A target over such a device, whose host has sent three writes that are at the device.
    fn rig() -> (Rig, Arc<Stuck>, Peer, Peer) {
        let state = Arc::<Stuck>::default();
        let rig = Rig::new(vec![Arc::new(StuckDevice::new(&state))]);
        let (admin, cntlid) = Peer::admin(rig.address, NQN);
        let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
        for lba in 0..3 {
            peer.send(write(lba, 512, Sgl::in_capsule), &[0xaa; 512], &[]);
        }
        while state.held.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        (rig, state, admin, peer)
    }
}

impl Stuck {
    pub(super) fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
        for (reactor, user) in self.users.lock().unwrap().iter().cloned() {
            reactor.run(move |runtime| runtime.wake(user));
        }
    }
}

#[test]
fn a_connect_waits_for_the_commands_of_the_hosts_earlier_associations() {
    for closed in [true, false] {
        let (rig, state, admin, peer) = StuckDevice::rig();
        let kept = if closed { None } else { Some((admin, peer)) };

        // Another host is not held up.
        let (mut other, _) = Peer::admin_as(rig.address, NQN, [9; 16]);
        let address = rig.address;
        let landed = Arc::clone(&state);
        let successor = std::thread::spawn(move || {
            let mut peer = Peer::open(address, Digests::NONE);
            let cqe = peer.connect(NQN, 0, CNTLID_DYNAMIC, true);
            (cqe.status.code, landed.landed.load(Ordering::SeqCst))
        });
        // Time for a target that does not wait to answer too early.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(other.status(Sqe::keep_alive()), StatusCode::SUCCESS);
        assert!(!successor.is_finished());
        state.release();
        assert_eq!(successor.join().unwrap(), (StatusCode::SUCCESS, 3));
        drop(kept);
    }
}

#[test]
fn keep_alive_expires_and_ends_the_association() {
    let rig = Rig::mem();
    let mut admin = Peer::open(rig.address, Digests::NONE);
    let connect =
        Connect { record_format: 0, queue_id: 0, queue_size: 31, attributes: 0, keep_alive_ms: 100 };
    let cqe = admin.connect_with(&connect, NQN, CNTLID_DYNAMIC, HOST);
    assert!(cqe.status.is_success());
    admin.enable();
    let cntlid = u16::try_from(cqe.dword0()).unwrap();
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    assert_eq!(rig.target.as_ref().unwrap().hosts(NQN), [HOST]);
    // We say nothing more; both end.
    assert!(matches!(peer.hear(), Heard::End));
    assert!(matches!(admin.hear(), Heard::End));
    while !rig.target.as_ref().unwrap().hosts(NQN).is_empty() {
        std::thread::yield_now();
    }
}

/// A host that went away had its requests aborted at once. On a device that is itself behind NVMe/TCP that ends the
/// association which all hosts share: one reboot disturbed everybody.
#[test]
fn commands_of_a_host_that_went_away_end_by_themselves() {
    let (rig, state, admin, peer) = StuckDevice::rig();
    drop((admin, peer));
    while rig.target.as_ref().unwrap().hosts(NQN).is_empty() {
        std::thread::yield_now();
    }
    // Another host has been there and gone in the meantime: the end of the first has long been noticed.
    let (other, _) = Peer::admin_as(rig.address, NQN, [9; 16]);
    drop(other);
    while rig.target.as_ref().unwrap().hosts(NQN).len() > 1 {
        std::thread::yield_now();
    }
    assert_eq!(state.aborts.load(Ordering::SeqCst), 0);
    state.release();
    while !rig.target.as_ref().unwrap().hosts(NQN).is_empty() {
        std::thread::yield_now();
    }
    assert_eq!((state.landed.load(Ordering::SeqCst), state.aborts.load(Ordering::SeqCst)), (3, 0));
}

#[test]
fn a_target_that_stops_does_not_wait_for_commands_but_aborts_them() {
    let (mut rig, state, _admin, _peer) = StuckDevice::rig();
    let target = rig.target.take().unwrap();
    let waiter = Arc::clone(&state);
    let releaser = std::thread::spawn(move || {
        while waiter.aborts.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        waiter.release();
    });
    assert!(target.stop(Duration::from_secs(20)));
    releaser.join().unwrap();
}

/// Sends writes of `fill` to the first block until the target reads no more, because it is rid of none of its answers. What is
/// left in the socket are whole writes that it has not seen.
pub(super) fn fill_with_unread_writes(peer: &mut Peer, fill: u8) {
    let mut sqe = write(0, 512, Sgl::in_capsule);
    sqe.cid = 5;
    let many = peer.capsule(&sqe, &[fill; 512]).repeat(100);
    peer.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let limit = 2u64 << 30;
    let mut sent = 0;
    while sent < limit {
        match peer.stream.write(&many) {
            Ok(count) => sent += count as u64,
            Err(_) => return,
        }
    }
    panic!("it is still listened to");
}

/// Hears all that is left for a host; then writes that it had sent, and were taken in, have ended.
pub(super) fn drain(peer: &mut Peer) {
    let mut rest = [0; 1 << 16];
    // Reset or closed: both are the end. A connection that goes on is silent at last.
    peer.stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    while std::io::Read::read(&mut peer.stream, &mut rest).is_ok_and(|count| count > 0) {}
}

/// An admin queue ended, and the word to its I/O queues was still on its way when the host's next Connect looked at them: what
/// lay unread in their sockets became commands after that Connect was answered.
#[test]
fn a_connect_ends_what_is_left_of_an_association_that_is_over() {
    let rig = Rig::mem();
    let (_admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    fill_with_unread_writes(&mut peer, 0xee);
    // The association is over, and nobody has told its I/O queue.
    for controller in rig.target.as_ref().unwrap().shared.subsystems[0].controllers() {
        controller.close();
    }
    let (_next, cntlid) = Peer::admin(rig.address, NQN);
    let mut next = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    assert!(next.call(write(0, 512, Sgl::in_capsule), &[0x11; 512], &[]).0.status.is_success());
    // As long as nobody reads its answers it could not go on; now it could.
    drain(&mut peer);
    assert!(next.call(read(0, 512), &[], &[]).1 == [0x11; 512], "a write of the past has come after");
}
