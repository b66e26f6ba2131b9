//! Reservations as a host: on every path, and when the path to them is lost.

use super::client::{Ask, Client};
use super::scripted::Scripted;
use super::*;
use crate::MemDevice;
use crate::initiator::IoPolicy;
use crate::nvme::command::io_opcode;
use crate::nvme::reservation::{
    AcquireAction, RegisterAction, ReleaseAction, ReservationCommand, ReservationType,
};
use crate::target::{NamespaceConfig, SubsystemConfig, Target};
use hawser_block::reservation::ReserveError;
use hawser_block::{BlockSize, Status};

const CONFLICT: Result<(), ReserveError> = Err(ReserveError::Conflict);

fn register(new: u64) -> ReservationCommand {
    let action = RegisterAction::Register;
    ReservationCommand::Register { action, current: 0, new, ignore_key: false, persist: None }
}

fn acquire(action: AcquireAction, current: u64, preempted: u64, kind: ReservationType) -> ReservationCommand {
    ReservationCommand::Acquire { action, current, preempted, kind }
}

/// A target with one namespace at two addresses.
fn target(reactor: &ReactorThread) -> (Target, Vec<SocketAddr>) {
    let device = Arc::new(MemDevice::new("m0", 1 << 20, BlockSize::B512).unwrap());
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let uuid = Some(device.uuid());
    let subsystem = SubsystemConfig {
        nqn: NQN.into(),
        listen: vec![any, any],
        transports: Vec::new(),
        allowed_hosts: None,
        serial: "test".into(),
        namespaces: vec![NamespaceConfig { nsid: 1, device, uuid }],
    };
    let target = Target::start(vec![subsystem], &[reactor.handle().clone()]).unwrap();
    let addresses = target.addresses()[0].1.clone();
    (target, addresses)
}

/// A host whose commands take one path after the other.
fn host(addresses: &[SocketAddr], id: u8, reactor: &ReactorThread) -> (Arc<NvmeDevice>, Client) {
    let mut config = config(addresses[0]);
    config.paths.extend(addresses[1..].iter().map(|address| super::config(*address).paths[0].clone()));
    config.host.id = [id; 16];
    config.policy = IoPolicy::RoundRobin;
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    wait_until("all paths are live", || device.paths().iter().all(|path| path.state == "live"));
    let client = Client::open(&device, reactor.handle());
    (device, client)
}

/// How reads and writes end, the same on each of two paths.
fn read_and_write(client: &mut Client) -> (Result<(), Status>, Result<(), Status>) {
    let [first, second] = [0, 1].map(|_| {
        // An even number of commands would meet the same path each.
        (client.run(Ask::read(0, 1, 512)).outcome, client.run(Ask::write(0, 1, vec![1; 512])).outcome)
    });
    let third = client.run(Ask::read(0, 1, 512)).outcome;
    let write = client.run(Ask::write(0, 1, vec![1; 512])).outcome;
    assert_eq!((first, second, third, write), (second, first, first.0, first.1));
    let _ = client.run(Ask::read(0, 1, 512));
    first
}

#[test]
fn a_reservation_holds_on_every_path_and_for_every_type() {
    let (host_reactor, target_reactor) = (reactor("host"), reactor("target"));
    let (target, addresses) = target(&target_reactor);
    let (a, mut client_a) = host(&addresses, 1, &host_reactor);
    let (b, mut client_b) = host(&addresses, 2, &host_reactor);
    let conflict = Err(Status::Conflict);
    for kind in ReservationType::ALL {
        assert_eq!(a.reserve(acquire(AcquireAction::Acquire, 1, 0, kind)), CONFLICT, "not registered");
        assert_eq!(a.reserve(register(1)), Ok(()));
        assert_eq!(a.reserve(acquire(AcquireAction::Acquire, 1, 0, kind)), Ok(()));
        assert_eq!(read_and_write(&mut client_a), (Ok(()), Ok(())));
        let reads = if kind.excludes_readers() { conflict } else { Ok(()) };
        assert_eq!(read_and_write(&mut client_b), (reads, conflict), "{kind:?}");
        let status = b.reservations().unwrap();
        assert_eq!((status.kind, status.registrants.len()), (Some(kind), 1));
        assert_eq!((status.registrants[0].host, status.registrants[0].key), ([1; 16], 1));
        // As a registrant.
        assert_eq!(b.reserve(register(2)), Ok(()));
        let registrant = if kind.includes_registrants() { Ok(()) } else { conflict };
        assert_eq!(read_and_write(&mut client_b).1, registrant, "{kind:?}");
        // It takes it over, and the other is out.
        let key = if kind.is_held_by_all() { 0 } else { 1 };
        assert_eq!(b.reserve(acquire(AcquireAction::PreemptAndAbort, 2, key, kind)), Ok(()));
        assert_eq!(read_and_write(&mut client_a), (reads, conflict), "{kind:?}");
        let release =
            ReservationCommand::Release { action: ReleaseAction::Release, current: 2, kind: Some(kind) };
        assert_eq!(b.reserve(release), Ok(()));
        assert_eq!(read_and_write(&mut client_a), (Ok(()), Ok(())));
        let clear = ReservationCommand::Release { action: ReleaseAction::Clear, current: 2, kind: None };
        assert_eq!(b.reserve(clear), Ok(()));
        assert!(b.reservations().unwrap().registrants.is_empty());
    }
    assert!(b.stats().failures(Status::Conflict) > 0, "they are counted");
    // One path is enough for them, whichever.
    use crate::nvme::ana::AnaState;
    for path in [0, 1] {
        assert!(target.set_ana_state(NQN, path, AnaState::Inaccessible));
        assert_eq!(a.reserve(register(1)), Ok(()), "with path {path} down");
        assert!(target.set_ana_state(NQN, path, AnaState::Optimized));
        wait_until("it is known", || a.paths()[path].ana == Some("optimized"));
    }
    drop((client_a, client_b, a, b));
    assert!(target.stop(PATIENCE));
}

/// A preemption that is carried out late takes away what somebody else has meanwhile.
#[test]
fn a_change_whose_answer_was_lost_is_not_sent_again_and_a_report_is() {
    let reactor = reactor("host");
    let target = Scripted::start(NQN);
    let (device, client) = host(&[target.address], 1, &reactor);
    for (report, outcome) in [(false, "not known"), (true, "")] {
        target.state().hold_io = true;
        target.state().log.clear();
        let asked = std::thread::scope(|scope| {
            let asking = scope.spawn(|| match report {
                false => device.reserve(register(1)),
                true => device.reservations().map(drop),
            });
            wait_until("it has arrived", || target.state().log.len() == 1);
            target.state().hold_io = false;
            target.cut();
            asking.join().unwrap()
        });
        assert_eq!(asked.is_ok(), report, "{asked:?}");
        let text = asked.map_err(|error| error.to_string()).err().unwrap_or_default();
        assert!(text.contains(outcome), "{text}");
        wait_until("it is reached again", || target.state().associations == 2 + usize::from(report));
        wait_ready(&device);
        let opcodes: Vec<u8> = target.state().log.iter().map(|(_, sqe)| sqe.opcode).collect();
        match report {
            false => assert_eq!(opcodes, [io_opcode::RESERVATION_REGISTER]),
            true => assert_eq!(opcodes, [io_opcode::RESERVATION_REPORT; 2]),
        }
    }
    // Nothing waits for a path to come back.
    drop(target);
    wait_until("it is gone", || device.state() != DeviceState::Ready);
    let told = device.reserve(register(1));
    assert!(matches!(told, Err(ReserveError::NotSent(_))), "{told:?}");
    drop((client, device));
}
