//! Cross-Controller Reset: what a host may take for quiet.

use super::associations::{StuckDevice, drain, fill_with_unread_writes};
use super::*;
use crate::nvme::cross_reset::{ControllerInstance, IMMEDIATE_SUCCESS, ResetLog, ResetState};
use crate::nvme::log::AsyncEvent;
use crate::target::Lineage;
use crate::target::registry::{Host, Impacted, Subsystem};

fn instance_of(admin: &mut Peer) -> ControllerInstance {
    let (_, bytes) = admin.call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
    let controller = IdentifyController::from_bytes(&bytes.try_into().unwrap());
    assert_eq!((controller.cross_resets_max, controller.quiesce_time_ms), (4, 31_000));
    ControllerInstance::of(&controller).expect("our controllers can be reset")
}

#[test]
fn a_reset_ends_the_other_association_and_says_that_it_is_quiet() {
    let rig = Rig::mem();
    let (mut lost, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let instance = instance_of(&mut lost);
    let (mut admin, next_cntlid) = Peer::admin(rig.address, NQN);
    fill_with_unread_writes(&mut peer, 0xee);
    assert_ne!(instance_of(&mut admin), instance);
    let cqe = admin.call(instance.reset(), &[], &[]).0;
    assert_eq!((cqe.status.code, cqe.dword0()), (StatusCode::SUCCESS, IMMEDIATE_SUCCESS));
    // What was sent there and not read yet is never executed.
    let mut next = Peer::io(rig.address, NQN, next_cntlid, 1, Digests::NONE, true);
    assert!(next.call(write(0, 512, Sgl::in_capsule), &[0x11; 512], &[]).0.status.is_success());
    drain(&mut peer);
    assert!(next.call(read(0, 512), &[], &[]).1 == [0x11; 512], "a write of the past has come after");
    assert!(matches!(lost.hear(), Heard::End));
    // Again: it is gone, which is what was asked for.
    let cqe = admin.call(instance.reset(), &[], &[]).0;
    assert_eq!((cqe.status.code, cqe.dword0()), (StatusCode::SUCCESS, IMMEDIATE_SUCCESS));
    assert_eq!(rig.target.as_ref().unwrap().hosts(NQN), [HOST]);
}

/// A target that had been killed and started again knew nothing of its controllers of before, and hosts waited for 41 s and more.
#[test]
fn controllers_of_a_process_that_has_ended_are_quiet_and_those_of_a_stranger_are_not_known() {
    let mut subsystem = Subsystem::new(NQN, "S-1", Vec::new(), None, Vec::new());
    subsystem.known_as(&Lineage { own: 7, ended: vec![5, 6] });
    let host = Host { nqn: HOST.to_owned(), id: [1; 16] };
    let found = |process: u64, uniquifier| {
        let instance = ControllerInstance { cntlid: 1, uniquifier, random: process << 32 | 9 };
        subsystem.impacted(&instance, &host)
    };
    assert!(matches!(found(5, 1), Impacted::Gone) && matches!(found(6, 1), Impacted::Gone));
    // Our own that we never made, a stranger's, and what is no instance at all.
    for (process, uniquifier) in [(7, 1), (8, 1), (0, 1), (5, 0)] {
        assert!(matches!(found(process, uniquifier), Impacted::Unknown), "{process} {uniquifier}");
    }
}

/// CQT was 31 s whatever the devices were. One behind NVMe/TCP keeps a write of unknown outcome until its own association is
/// quiet, which comes on top: hosts that had waited for CQT sent their writes again while the first were still on their way.
#[test]
fn the_quiesce_time_covers_what_devices_need_after_an_abort() {
    let config = crate::initiator::NvmeConfig::new(
        "n0",
        vec!["nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:far?nsid=1".parse().unwrap()],
        crate::initiator::HostIdentity { nqn: HOST.to_owned(), id: [1; 16] },
    );
    let reactor = ReactorThread::spawn("far", ReactorConfig { cpu: None, poll_us: 0 }).unwrap();
    let far = crate::initiator::NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    // Twice the keep-alive time-out, and `quiesce_tmo`.
    assert_eq!(far.quiesce_time(), Duration::from_secs(15));
    let telling = |seconds| -> Arc<dyn Device> {
        Arc::new(StuckDevice::quiescing(&Arc::default(), Duration::from_secs(seconds)))
    };
    for (device, cqt, abort_after_ms) in [
        (telling(0), 31_000, 30_000),
        (Arc::clone(&far) as Arc<dyn Device>, 46_000, 30_000),
        // With half a minute more than CQT can say: they are aborted sooner.
        (telling(41), 65_535, 23_535),
        (telling(90), 65_535, 1000),
    ] {
        let rig = Rig::new(vec![fake(), device]);
        let (mut admin, _) = Peer::admin(rig.address, NQN);
        let (_, bytes) = admin.call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
        assert_eq!(IdentifyController::from_bytes(&bytes.try_into().unwrap()).quiesce_time_ms, cqt);
        let subsystem = &rig.target.as_ref().unwrap().shared.subsystems[0];
        assert_eq!(subsystem.quiescing().abort_after, Duration::from_millis(abort_after_ms));
    }
}

#[test]
fn a_reset_of_what_is_not_the_hosts_own_is_refused() {
    let rig = Rig::mem();
    let (mut other, _) = Peer::admin_as(rig.address, NQN, [9; 16]);
    let others = instance_of(&mut other);
    let (mut admin, _) = Peer::admin(rig.address, NQN);
    let own = instance_of(&mut admin);
    let refused = [
        own,
        others,
        // Of another process we do not know whether it is quiet.
        ControllerInstance { random: others.random ^ 1 << 40, ..others },
        // Not made yet.
        ControllerInstance { random: others.random + 1000, ..others },
        ControllerInstance { uniquifier: 0, ..others },
    ];
    for instance in refused {
        assert_eq!(admin.status(instance.reset()), StatusCode::INVALID_FIELD, "{instance:?}");
    }
    assert_eq!(other.status(Sqe::keep_alive()), StatusCode::SUCCESS);
}

/// Two paths of one host, of which one has commands at a device that does not end them.
#[test]
fn a_reset_that_lasts_is_answered_and_its_end_is_told_later() {
    let state = Arc::<super::associations::Stuck>::default();
    let rig = Rig::new(vec![Arc::new(StuckDevice::new(&state))]);
    let (mut lost, cntlid) = Peer::admin(rig.address, NQN);
    let (mut admin, _) = Peer::admin(rig.address, NQN);
    let instance = instance_of(&mut lost);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    peer.send(write(0, 512, Sgl::in_capsule), &[0xaa; 512], &[]);
    while state.held.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    let events = features::EVENT_CROSS_CONTROLLER_RESET;
    let configuration = Sqe::set_features(features::id::ASYNC_EVENT_CONFIGURATION, events);
    assert_eq!(admin.status(configuration), StatusCode::SUCCESS);
    let cqe = admin.call(instance.reset(), &[], &[]).0;
    assert_eq!((cqe.status.code, cqe.dword0()), (StatusCode::SUCCESS, 0), "not quiet yet");
    let read_log = |admin: &mut Peer, remove| {
        let sqe = Sqe::get_log_page(log::id::CROSS_CONTROLLER_RESET, 0, 0, 64, false, Sgl::transport(64));
        let (cqe, page) = admin.call(sqe.with_log_specific(remove), &[], &[]);
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        ResetLog::from_bytes(&page).entries
    };
    let entries = read_log(&mut admin, 0);
    assert_eq!(entries.len(), 1);
    assert_eq!((entries[0].cntlid, entries[0].state), (instance.cntlid, ResetState::InProgress));
    assert_eq!(admin.status(instance.reset()), StatusCode::CONTROLLER_RESET_IN_PROGRESS);
    let event = admin.send(Sqe::async_event_request(), &[], &[]);
    assert_eq!(state.landed.load(Ordering::SeqCst), 0);
    state.release();
    let cqe = admin.end();
    assert_eq!((cqe.cid, cqe.dword0()), (event, AsyncEvent::CROSS_CONTROLLER_RESET.to_dword()));
    assert_eq!(state.landed.load(Ordering::SeqCst), 1);
    let entries = read_log(&mut admin, ResetLog::REMOVE_COMPLETED);
    assert_eq!(entries[0].state, ResetState::Succeeded);
    assert_eq!(read_log(&mut admin, 0), []);
}
