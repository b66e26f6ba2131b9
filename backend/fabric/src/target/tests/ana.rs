//! Asymmetric Namespace Access: what hosts see of an address's state, and what becomes of their commands.

use super::*;
use crate::nvme::ana::{AnaLog, AnaState, GROUPS_ONLY};
use crate::nvme::log::AsyncEvent;

/// A target with one subsystem at two addresses.
fn two_ports() -> (Rig, [SocketAddr; 2]) {
    let device = Arc::new(MemDevice::new("m", 1 << 20, BlockSize::B512).unwrap());
    let rig = Rig::listening(vec![device], None, 2);
    let addresses = &rig.target.as_ref().unwrap().addresses()[0].1;
    let addresses = [addresses[0], addresses[1]];
    (rig, addresses)
}

fn read_log(admin: &mut Peer, parameter: u8) -> AnaLog {
    let sqe = Sqe::get_log_page(log::id::ANA, 0, 0, 64, false, Sgl::transport(64));
    let (cqe, page) = admin.call(sqe.with_log_specific(parameter), &[], &[]);
    assert_eq!(cqe.status.code, StatusCode::SUCCESS);
    AnaLog::from_bytes(&page).unwrap()
}

#[test]
fn each_address_has_a_state_of_its_own_that_its_hosts_are_told_of() {
    let (rig, addresses) = two_ports();
    let target = rig.target.as_ref().unwrap();
    let mut admins: Vec<Peer> = Vec::new();
    let mut queues: Vec<Peer> = Vec::new();
    for address in addresses {
        let (mut admin, cntlid) = Peer::admin(address, NQN);
        let configuration =
            Sqe::set_features(features::id::ASYNC_EVENT_CONFIGURATION, features::EVENT_ANA_CHANGE);
        assert_eq!(admin.status(configuration), StatusCode::SUCCESS);
        queues.push(Peer::io(address, NQN, cntlid, 1, Digests::NONE, true));
        admins.push(admin);
    }
    let (_, bytes) = admins[0].call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
    let controller = IdentifyController::from_bytes(&bytes.try_into().unwrap());
    assert_eq!((controller.multipath, controller.ana_capabilities), (0xa, 0x5f));
    assert_eq!((controller.ana_group_max, controller.ana_groups, controller.namespaces_max), (1, 1, 1));
    let (_, bytes) = admins[0].call(Sqe::identify(cns::NAMESPACE, 1, Sgl::transport(4096)), &[], &[]);
    assert_eq!(IdentifyNamespace::from_bytes(&bytes.try_into().unwrap()).ana_group, ANA_GROUP);
    let before = read_log(&mut admins[0], 0);
    assert_eq!((before.groups.len(), &before.groups[0].namespaces[..]), (1, &[1][..]));
    assert_eq!(before.state_of(ANA_GROUP), Some(AnaState::Optimized));

    let event = admins[0].send(Sqe::async_event_request(), &[], &[]);
    admins[1].send(Sqe::async_event_request(), &[], &[]);
    assert!(target.set_ana_state(NQN, 0, AnaState::Inaccessible));
    let cqe = admins[0].end();
    assert_eq!((cqe.cid, cqe.dword0()), (event, AsyncEvent::ANA_CHANGE.to_dword()));
    let after = read_log(&mut admins[0], GROUPS_ONLY);
    assert!(after.changes > before.changes && after.groups[0].namespaces.is_empty());
    assert_eq!(after.state_of(ANA_GROUP), Some(AnaState::Inaccessible));
    // The other address goes on, and its host was told nothing.
    assert_eq!(read_log(&mut admins[1], 0), before);
    assert_eq!(target.ana_groups(NQN), [[(1, AnaState::Inaccessible)], [(1, AnaState::Optimized)]]);
    let cases = [
        (AnaState::Inaccessible, StatusCode::ANA_INACCESSIBLE),
        (AnaState::Change, StatusCode::ANA_TRANSITION),
        (AnaState::PersistentLoss, StatusCode::ANA_PERSISTENT_LOSS),
        (AnaState::NonOptimized, StatusCode::SUCCESS),
        (AnaState::Optimized, StatusCode::SUCCESS),
    ];
    for (state, code) in cases {
        assert!(target.set_ana_state(NQN, 0, state));
        for sqe in [read(0, 512), Sqe::flush(1)] {
            let status = queues[0].call(sqe, &[], &[]).0.status;
            assert_eq!((status.code, status.do_not_retry), (code, false), "{state}");
        }
        assert_eq!(queues[1].call(read(0, 512), &[], &[]).0.status.code, StatusCode::SUCCESS);
    }
    assert!(!target.set_ana_state(NQN, 2, AnaState::Change));
    assert!(!target.set_ana_state("nqn.other", 0, AnaState::Change));
}

#[test]
fn each_group_at_each_address_has_a_state_of_its_own_from_the_start() {
    let devices: Vec<Arc<dyn Device>> = (0..3).map(|_| fake() as Arc<dyn Device>).collect();
    let groups = [(1, 7), (3, 2)].map(|(nsid, group)| (NQN.to_owned(), nsid, group)).to_vec();
    let state = AnaState::Inaccessible;
    let states = vec![AnaSetting { nqn: NQN.to_owned(), port: 1, group: 7, state }];
    let rig = Rig::start(devices, None, 2, None, &AnaConfig { groups, states }).unwrap();
    let target = rig.target.as_ref().unwrap();
    let addresses = target.addresses()[0].1.clone();
    let (mut admin, cntlid) = Peer::admin(addresses[1], NQN);
    let (_, bytes) = admin.call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
    let controller = IdentifyController::from_bytes(&bytes.try_into().unwrap());
    assert_eq!((controller.ana_group_max, controller.ana_groups), (7, 3));
    for (nsid, group) in [(1, 7), (2, ANA_GROUP), (3, 2)] {
        let (_, bytes) = admin.call(Sqe::identify(cns::NAMESPACE, nsid, Sgl::transport(4096)), &[], &[]);
        assert_eq!(IdentifyNamespace::from_bytes(&bytes.try_into().unwrap()).ana_group, group);
    }
    let len = 16 + 3 * (32 + 4) + 4;
    let sqe = Sqe::get_log_page(log::id::ANA, 0, 0, len, false, Sgl::transport(len));
    let before = AnaLog::from_bytes(&admin.call(sqe, &[], &[]).1).unwrap();
    let seen: Vec<_> = before.groups.iter().map(|it| (it.id, it.state, it.namespaces.clone())).collect();
    let optimized = AnaState::Optimized;
    assert_eq!(seen, [(1, optimized, vec![2]), (2, optimized, vec![3]), (7, state, vec![1])]);

    let mut io = Peer::io(addresses[1], NQN, cntlid, 1, Digests::NONE, true);
    let mut codes = || [1, 2, 3].map(|nsid| io.status(Sqe::flush(nsid)));
    let (ok, inaccessible) = (StatusCode::SUCCESS, StatusCode::ANA_INACCESSIBLE);
    assert_eq!(codes(), [inaccessible, ok, ok]);
    assert!(target.set_ana_group_state(NQN, 1, 2, state) && target.set_ana_group_state(NQN, 1, 7, optimized));
    assert_eq!(codes(), [ok, ok, inaccessible]);
    let after = AnaLog::from_bytes(&admin.call(sqe, &[], &[]).1).unwrap();
    let changed: Vec<_> =
        before.groups.iter().zip(&after.groups).map(|(a, b)| a.changes < b.changes).collect();
    assert_eq!((changed, before.changes < after.changes), (vec![false, true, true], true));
    let at_first = vec![(1, optimized), (2, optimized), (7, optimized)];
    assert_eq!(target.ana_groups(NQN), [at_first, vec![(1, optimized), (2, state), (7, optimized)]]);
    assert!(!target.set_ana_group_state(NQN, 1, 3, optimized), "there is no such group");
}
