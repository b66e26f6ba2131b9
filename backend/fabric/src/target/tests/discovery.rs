//! The discovery service: what it lists, and whom it tells of changes.

use super::*;
use crate::nvme::discovery::{Entry, Header, SUBTYPE_REFERRAL, TREQ_NO_FLOW_CONTROL};
use crate::nvme::log::AsyncEvent;

#[test]
fn discovery_lists_the_subsystems_that_the_host_may_use() {
    let rig = Rig::with(vec![fake()], Some(vec![HOST.to_owned()]));
    for (host, records) in [(HOST, 1), ("nqn.stranger", 0)] {
        let mut peer = Peer::open(rig.address, Digests::NONE);
        let connect =
            Connect { record_format: 0, queue_id: 0, queue_size: 31, attributes: 0, keep_alive_ms: 0 };
        let cqe = peer.connect_with(&connect, DISCOVERY_NQN, CNTLID_DYNAMIC, host);
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        assert_eq!(peer.status(Property::set(offset::CC, false, u64::from(CC_START))), StatusCode::SUCCESS);
        let (_, bytes) = peer.call(Sqe::identify(cns::CONTROLLER, 0, Sgl::transport(4096)), &[], &[]);
        let controller = IdentifyController::from_bytes(&bytes.try_into().unwrap());
        assert_eq!((controller.controller_type, controller.subsystem_nqn.as_str()), (2, DISCOVERY_NQN));
        let sqe = Sqe::get_log_page(log::id::DISCOVERY, 0, 0, 2048, false, Sgl::transport(2048));
        let (_, page) = peer.call(sqe, &[], &[]);
        let header = Header::from_bytes(&page[..1024].try_into().unwrap()).unwrap();
        assert_eq!(header.records, records);
        if records > 0 {
            let entry = Entry::from_bytes(&page[1024..].try_into().unwrap()).unwrap();
            assert_eq!((entry.subsystem_nqn.as_str(), entry.address.as_str()), (NQN, "127.0.0.1"));
            assert_eq!(entry.service, rig.address.port().to_string());
            // TREQ said once that a secure channel is "not required": `nvme connect-all` of Debian 12 on a kernel that knows TLS
            // then asked for TLS, and connected to nothing.
            assert_eq!(entry.requirements, TREQ_NO_FLOW_CONTROL);
        }
    }
}

/// A host that stays connected: GENCTR and the entries.
pub(super) fn read_log(peer: &mut Peer) -> (u64, Vec<Entry>) {
    let sqe = Sqe::get_log_page(log::id::DISCOVERY, 0, 0, 4096, false, Sgl::transport(4096));
    let (cqe, page) = peer.call(sqe, &[], &[]);
    assert_eq!(cqe.status.code, StatusCode::SUCCESS);
    let header = Header::from_bytes(&page[..1024].try_into().unwrap()).unwrap();
    let entries = page[1024..].chunks(1024).take(usize::try_from(header.records).unwrap());
    (header.generation, entries.map(|entry| Entry::from_bytes(entry.try_into().unwrap()).unwrap()).collect())
}

/// A host that stays connected to the discovery service and wants to be told.
pub(super) fn persistent(address: SocketAddr) -> Peer {
    let mut peer = Peer::open(address, Digests::NONE);
    let connect =
        Connect { record_format: 0, queue_id: 0, queue_size: 31, attributes: 0, keep_alive_ms: 30_000 };
    assert!(peer.connect_with(&connect, DISCOVERY_NQN, CNTLID_DYNAMIC, HOST).status.is_success());
    assert_eq!(peer.status(Property::set(offset::CC, false, u64::from(CC_START))), StatusCode::SUCCESS);
    let events = features::EVENT_DISCOVERY_CHANGE;
    let configuration = Sqe::set_features(features::id::ASYNC_EVENT_CONFIGURATION, events);
    assert_eq!(peer.status(configuration), StatusCode::SUCCESS);
    peer
}

#[test]
fn a_persistent_discovery_controller_is_told_of_referrals() {
    let rig = Rig::mem();
    let target = rig.target.as_ref().unwrap();
    let mut peer = persistent(rig.address);
    let (before, entries) = read_log(&mut peer);
    assert_eq!(entries.len(), 1);
    // An I/O controller is not concerned.
    let (mut admin, _) = Peer::admin(rig.address, NQN);
    admin.send(Sqe::async_event_request(), &[], &[]);
    let event = peer.send(Sqe::async_event_request(), &[], &[]);
    target.set_referrals(vec!["192.0.2.1:8009".parse().unwrap()]);
    let cqe = peer.end();
    assert_eq!((cqe.cid, cqe.dword0()), (event, AsyncEvent::DISCOVERY_CHANGED.to_dword()));
    let (after, entries) = read_log(&mut peer);
    assert_ne!(before, after);
    let referral = &entries[1];
    assert_eq!((referral.subtype, referral.subsystem_nqn.as_str()), (SUBTYPE_REFERRAL, DISCOVERY_NQN));
    assert_eq!((referral.address.as_str(), referral.service.as_str()), ("192.0.2.1", "8009"));
    assert_eq!(admin.status(Sqe::keep_alive()), StatusCode::SUCCESS);
    // Back again: what it says is what it said.
    target.set_referrals(Vec::new());
    assert_eq!(read_log(&mut peer).0, before);
}
