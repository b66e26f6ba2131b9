//! Reservations between hosts, over a restart, and while commands are under way.

use super::associations::{Stuck, StuckDevice};
use super::*;
use crate::nvme::reservation::{
    self, AcquireAction, RegisterAction, ReleaseAction, ReservationCommand, ReservationStatus,
    ReservationType,
};

const A: [u8; 16] = [1; 16];
const B: [u8; 16] = [2; 16];

/// A host with an I/O queue.
fn host(address: SocketAddr, id: [u8; 16]) -> (Peer, Peer) {
    let (admin, cntlid) = Peer::admin_as(address, NQN, id);
    let mut peer = Peer::open(address, Digests::NONE);
    peer.host_id = id;
    assert!(peer.connect(NQN, 1, cntlid, true).status.is_success());
    (admin, peer)
}

fn ask(peer: &mut Peer, command: ReservationCommand) -> StatusCode {
    let (sqe, data) = reservation::to_sqe(&command, 1);
    peer.call(sqe, &data, &[]).0.status.code
}

fn register(new: u64, persist: Option<bool>) -> ReservationCommand {
    let action = RegisterAction::Register;
    ReservationCommand::Register { action, current: 0, new, ignore_key: false, persist }
}

fn acquire(action: AcquireAction, current: u64, preempted: u64, kind: ReservationType) -> ReservationCommand {
    ReservationCommand::Acquire { action, current, preempted, kind }
}

fn report(peer: &mut Peer) -> ReservationStatus {
    let (cqe, data) = peer.call(reservation::report(1, 256), &[], &[]);
    assert_eq!(cqe.status.code, StatusCode::SUCCESS);
    reservation::status_from_bytes(&data)
}

fn read_and_write(peer: &mut Peer) -> (StatusCode, StatusCode) {
    let read = peer.call(read(0, 512), &[], &[]).0.status.code;
    (read, peer.call(write(0, 512, Sgl::in_capsule), &[7; 512], &[]).0.status.code)
}

#[test]
fn a_host_without_the_reservation_gets_a_conflict_for_every_command_that_it_forbids() {
    let rig = Rig::mem();
    let (_admin_a, mut a) = host(rig.address, A);
    let (_admin_b, mut b) = host(rig.address, B);
    let (ok, conflict) = (StatusCode::SUCCESS, StatusCode::RESERVATION_CONFLICT);
    let kind = ReservationType::WriteExclusive;
    assert_eq!(ask(&mut a, acquire(AcquireAction::Acquire, 1, 0, kind)), conflict, "not registered");
    assert_eq!(ask(&mut a, register(1, None)), ok);
    assert_eq!(ask(&mut a, acquire(AcquireAction::Acquire, 1, 0, kind)), ok);
    assert_eq!(read_and_write(&mut a), (ok, ok));
    assert_eq!(read_and_write(&mut b), (ok, conflict));
    // A large write is refused before its data is asked for.
    assert_eq!(b.call(write(0, 64 << 10, Sgl::transport), &[], &[]).0.status.code, conflict);
    for sqe in [Sqe::flush(1), Sqe::write_zeroes(1, 0, 8, false, false)] {
        assert_eq!(b.status(sqe), conflict);
    }
    let dsm = Sqe::deallocate(1, 1, Sgl::in_capsule(16));
    assert_eq!(
        b.call(dsm, &DsmRange { attributes: 0, blocks: 1, lba: 0 }.to_bytes(), &[]).0.status.code,
        conflict
    );
    let status = report(&mut b);
    assert_eq!((status.kind, status.registrants.len()), (Some(kind), 1));
    assert_eq!((status.registrants[0].host, status.registrants[0].holds), (A, true));
    let mut narrow = reservation::report(1, 256);
    narrow.cdw[1] = 0;
    assert_eq!(b.status(narrow), StatusCode::HOST_ID_INCONSISTENT);
    // The other takes it over; what the first may do changes with its next command.
    assert_eq!(ask(&mut b, register(2, None)), ok);
    let exclusive = ReservationType::ExclusiveAccess;
    assert_eq!(ask(&mut b, acquire(AcquireAction::Preempt, 2, 1, exclusive)), ok);
    assert_eq!(read_and_write(&mut a), (conflict, conflict));
    assert_eq!(read_and_write(&mut b), (ok, ok));
    let release =
        ReservationCommand::Release { action: ReleaseAction::Release, current: 2, kind: Some(exclusive) };
    assert_eq!(ask(&mut b, release), ok);
    assert_eq!(read_and_write(&mut a), (ok, ok));
}

#[test]
fn preempt_and_abort_is_answered_when_the_others_commands_have_ended() {
    let state = Arc::<Stuck>::default();
    let rig = Rig::new(vec![Arc::new(StuckDevice::new(&state))]);
    let (_admin_a, mut a) = host(rig.address, A);
    let (_admin_b, mut b) = host(rig.address, B);
    let kind = ReservationType::WriteExclusive;
    assert_eq!(ask(&mut a, register(1, None)), StatusCode::SUCCESS);
    assert_eq!(ask(&mut a, acquire(AcquireAction::Acquire, 1, 0, kind)), StatusCode::SUCCESS);
    assert_eq!(ask(&mut b, register(2, None)), StatusCode::SUCCESS);
    a.send(write(0, 512, Sgl::in_capsule), &[0xaa; 512], &[]);
    // This one's data is on its way when the reservation is lost.
    a.send(write(8, 64 << 10, Sgl::transport), &[], &[]);
    let Heard::Ready(ready) = a.hear() else { panic!("no R2T") };
    while state.held.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    let (sqe, data) = reservation::to_sqe(&acquire(AcquireAction::PreemptAndAbort, 2, 1, kind), 1);
    let preempting = Arc::clone(&state);
    let preemptor = std::thread::spawn(move || {
        let code = b.call(sqe, &data, &[]).0.status.code;
        (code, preempting.landed.load(Ordering::SeqCst), b)
    });
    // In force at once, whoever waits: the data that comes now comes too late.
    while report(&mut a).registrants.len() > 1 {
        std::thread::yield_now();
    }
    let pdu =
        DataPdu { cid: ready.cid, tag: ready.tag, offset: 0, len: ready.len, last: true, success: false };
    a.host_data(pdu, &vec![0xbb; ready.len as usize]);
    let cqe = a.end();
    assert_eq!((cqe.cid, cqe.status.code), (ready.cid, StatusCode::RESERVATION_CONFLICT));
    assert!(!preemptor.is_finished() && state.landed.load(Ordering::SeqCst) == 0);
    state.release();
    let (code, landed, _b) = preemptor.join().unwrap();
    assert_eq!((code, landed), (StatusCode::SUCCESS, 1));
}

/// With a write of the other that its device did not end, and the other still connected, preempt and abort waited without limit;
/// nor did the host learn more by asking again over a new association.
#[test]
fn preempt_and_abort_aborts_what_lasts_and_can_be_asked_for_again() {
    let state = Arc::<Stuck>::default();
    // So slow after an abort that it comes after a second.
    let rig = Rig::new(vec![Arc::new(StuckDevice::quiescing(&state, Duration::from_secs(90)))]);
    let (_admin_a, mut a) = host(rig.address, A);
    let (admin_b, mut b) = host(rig.address, B);
    let kind = ReservationType::WriteExclusive;
    assert_eq!(ask(&mut a, register(1, None)), StatusCode::SUCCESS);
    assert_eq!(ask(&mut a, acquire(AcquireAction::Acquire, 1, 0, kind)), StatusCode::SUCCESS);
    assert_eq!(ask(&mut b, register(2, None)), StatusCode::SUCCESS);
    a.send(write(0, 512, Sgl::in_capsule), &[0xaa; 512], &[]);
    while state.held.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    let preempt = acquire(AcquireAction::PreemptAndAbort, 2, 1, kind);
    let (sqe, data) = reservation::to_sqe(&preempt, 1);
    b.send(sqe, &data, &[]);
    while report(&mut a).registrants.len() > 1 {
        std::thread::yield_now();
    }
    // The host gives up waiting, and comes again.
    drop((admin_b, b));
    let (_admin_b, mut b) = host(rig.address, B);
    b.send(sqe, &data, &[]);
    while state.aborts.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    assert_eq!(state.landed.load(Ordering::SeqCst), 0);
    state.release();
    assert_eq!(b.end().status.code, StatusCode::SUCCESS);
    assert_eq!(state.landed.load(Ordering::SeqCst), 1);
    assert_eq!(a.end().status.code, StatusCode::SUCCESS);
    // Once it is answered it is as any other.
    assert_eq!(ask(&mut b, preempt), StatusCode::RESERVATION_CONFLICT);
}

/// What could not be kept was in force, and the same command again was answered without a word on whether it is on disk now.
#[test]
fn what_could_not_be_kept_is_kept_when_it_is_asked_for_again() {
    let folder = std::path::Path::new("/dev/shm").join(format!("hawser-unkept-{}", std::process::id()));
    let rig = Rig::keeping(vec![fake()], &folder).unwrap();
    // No folder can be made in its place.
    std::fs::write(&folder, "").unwrap();
    let (_admin, mut a) = host(rig.address, A);
    let (first, again) = (ask(&mut a, register(1, None)), ask(&mut a, register(1, None)));
    std::fs::remove_file(&folder).unwrap();
    let kept = ask(&mut a, register(1, None));
    let files = || std::fs::read_dir(&folder).map_or(0, Iterator::count);
    let written = files();
    // Now that it is there, the same once more is no reason to write.
    let _ = std::fs::remove_dir_all(&folder);
    let same = ask(&mut a, register(1, None));
    let rewritten = files();
    let _ = std::fs::remove_dir_all(&folder);
    let (error, ok) = (StatusCode::INTERNAL_ERROR, StatusCode::SUCCESS);
    assert_eq!((first, again, kept, same, written, rewritten), (error, error, ok, ok, 1, 0));
}

#[test]
fn reservations_outlive_the_target() {
    let folder = std::path::Path::new("/dev/shm").join(format!("hawser-reserve-{}", std::process::id()));
    let kind = ReservationType::ExclusiveAccessRegistrantsOnly;
    let device = fake();
    {
        let rig = Rig::keeping(vec![device.clone()], &folder).unwrap();
        let (_admin, mut a) = host(rig.address, A);
        assert_eq!(ask(&mut a, register(1, Some(true))), StatusCode::SUCCESS);
        assert_eq!(ask(&mut a, acquire(AcquireAction::Acquire, 1, 0, kind)), StatusCode::SUCCESS);
    }
    {
        let rig = Rig::keeping(vec![device.clone()], &folder).unwrap();
        let (_admin_a, mut a) = host(rig.address, A);
        let (_admin_b, mut b) = host(rig.address, B);
        let status = report(&mut a);
        assert_eq!((status.kind, status.persists, status.registrants[0].key), (Some(kind), true, 1));
        let (ok, conflict) = (StatusCode::SUCCESS, StatusCode::RESERVATION_CONFLICT);
        assert_eq!((read_and_write(&mut a), read_and_write(&mut b)), ((ok, ok), (conflict, conflict)));
    }
    // What another version wrote is not overwritten.
    let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&file, "hawser reservations 9\n").unwrap();
    let refused = Rig::keeping(vec![device], &folder).err().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(refused.contains("another version has written it"), "{refused}");
}

/// A host that was preempted learnt it from its next command.
#[test]
fn registrants_are_told_by_event_and_log() {
    let rig = Rig::mem();
    let (mut admin_a, mut a) = host(rig.address, A);
    let (mut admin_b, mut b) = host(rig.address, B);
    let (ok, kind) = (StatusCode::SUCCESS, ReservationType::WriteExclusiveRegistrantsOnly);
    let read_log = |admin: &mut Peer, retain| {
        let id = log::id::RESERVATION_NOTIFICATION;
        let (cqe, data) = admin.call(Sqe::get_log_page(id, 0, 0, 64, retain, Sgl::transport(64)), &[], &[]);
        assert_eq!(cqe.status.code, ok);
        reservation::NoticeLog::from_bytes(&data.try_into().unwrap())
    };
    let page = |admin: &mut Peer| read_log(admin, false);
    let look = |admin: &mut Peer| read_log(admin, true);
    let take = |peer: &mut Peer, own, other| {
        assert_eq!(ask(peer, register(own, None)), ok);
        let action = if other == 0 { AcquireAction::Acquire } else { AcquireAction::Preempt };
        assert_eq!(ask(peer, acquire(action, own, other, kind)), ok);
    };
    assert_eq!(page(&mut admin_a).notice, None);
    take(&mut a, 1, 0);
    admin_a.send(Sqe::async_event_request(), &[], &[]);
    take(&mut b, 2, 1);
    let event = crate::nvme::log::AsyncEvent::RESERVATION_NOTICE;
    assert_eq!((admin_a.end().dword0(), event.to_dword()), (event.to_dword(), 0x0080_0006));
    // It comes back; then the other releases, and clears. No event more, until the log is read.
    assert_eq!(ask(&mut a, register(1, None)), ok);
    let release = |action, kind| ReservationCommand::Release { action, current: 2, kind };
    assert_eq!(ask(&mut b, release(ReleaseAction::Release, Some(kind))), ok);
    assert_eq!(ask(&mut b, release(ReleaseAction::Clear, None)), ok);
    use reservation::ReservationNotice::{Preempted, RegistrationPreempted, Released};
    // Notices come from the other connection's reactor.
    while look(&mut admin_a).more < 2 {
        std::thread::yield_now();
    }
    for (count, notice, more) in [(1, RegistrationPreempted, 2), (2, Released, 1), (3, Preempted, 0)] {
        let log = page(&mut admin_a);
        assert_eq!(log, reservation::NoticeLog { count, notice: Some((notice, 1)), more });
        if count == 1 {
            // There is more in it.
            admin_a.send(Sqe::async_event_request(), &[], &[]);
            assert_eq!(admin_a.end().dword0(), event.to_dword());
        }
    }
    assert_eq!(page(&mut admin_a).notice, None);

    // What is masked is not told.
    let feature = |id, value| {
        let mut sqe = Sqe::set_features(id, value);
        sqe.nsid = 1;
        sqe
    };
    let get = |admin: &mut Peer, id| {
        let mut sqe = feature(id, 0);
        sqe.opcode = crate::nvme::admin_opcode::GET_FEATURES;
        admin.call(sqe, &[], &[]).0.dword0()
    };
    let (mask, persistence) =
        (features::id::RESERVATION_NOTIFICATION_MASK, features::id::RESERVATION_PERSISTENCE);
    assert_eq!(admin_b.status(feature(mask, 1)), StatusCode::INVALID_FIELD);
    assert_eq!(admin_b.status(feature(mask, 0b10)), ok);
    assert_eq!(get(&mut admin_a, mask), 0b10);
    take(&mut a, 1, 0);
    take(&mut b, 2, 1);
    assert_eq!(ask(&mut a, register(1, None)), ok);
    assert_eq!(ask(&mut b, release(ReleaseAction::Clear, None)), ok);
    while look(&mut admin_a).notice.is_none() {
        std::thread::yield_now();
    }
    assert_eq!(page(&mut admin_a).notice, Some((Preempted, 1)));

    // PTPL is what CPTPL sets.
    assert_eq!((get(&mut admin_a, persistence), admin_b.status(feature(persistence, 1))), (0, ok));
    assert_eq!(get(&mut admin_a, persistence), 1);
    assert!(report(&mut a).persists);
    let mut all = feature(persistence, 0);
    all.nsid = 0xffff_ffff;
    assert_eq!(admin_b.status(all), StatusCode::INVALID_NAMESPACE);
}
