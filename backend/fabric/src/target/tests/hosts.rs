//! Hosts that may connect, and that may not any more.

use super::discovery::{persistent, read_log};
use super::*;
use crate::nvme::log::AsyncEvent;

#[test]
fn a_host_is_let_in_and_thrown_out_while_the_target_runs() {
    let other = "nqn.2014-08.org.nvmexpress:uuid:other";
    let device: Arc<dyn Device> = Arc::new(MemDevice::new("m", 1 << 20, BlockSize::B512).unwrap());
    let rig = Rig::with(vec![device], Some(vec![other.to_owned()]));
    let target = rig.target.as_ref().unwrap();
    let refused = |queue_id, cntlid| {
        let mut peer = Peer::open(rig.address, Digests::NONE);
        peer.connect(NQN, queue_id, cntlid, true).status
    };
    let status = refused(0, CNTLID_DYNAMIC);
    assert_eq!((status.code, status.do_not_retry), (StatusCode::CONNECT_INVALID_HOST, true));
    assert_eq!(target.stats().hosts_refused, 1);

    // One that stays connected to discovery is told when there is more for it to see, and less.
    let mut discovery = persistent(rig.address);
    assert_eq!(read_log(&mut discovery).1.len(), 0);
    discovery.send(Sqe::async_event_request(), &[], &[]);
    assert!(target.allow_host(NQN, HOST) && !target.allow_host(NQN, HOST));
    assert_eq!(discovery.end().dword0(), AsyncEvent::DISCOVERY_CHANGED.to_dword());
    assert_eq!(read_log(&mut discovery).1.len(), 1);
    let (mut admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut io = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    assert_eq!(io.call(read(0, 512), &[], &[]).0.status.code, StatusCode::SUCCESS);
    // Another one, whom that does not concern.
    let mut bystander = Peer::open(rig.address, Digests::NONE);
    let connect = Connect { record_format: 0, queue_id: 0, queue_size: 31, attributes: 0, keep_alive_ms: 0 };
    assert!(bystander.connect_with(&connect, NQN, CNTLID_DYNAMIC, other).status.is_success());

    discovery.send(Sqe::async_event_request(), &[], &[]);
    assert!(target.forbid_host(NQN, HOST) && !target.forbid_host(NQN, HOST));
    assert!(matches!(admin.hear(), Heard::End) && matches!(io.hear(), Heard::End));
    assert_eq!(discovery.end().dword0(), AsyncEvent::DISCOVERY_CHANGED.to_dword());
    assert_eq!(read_log(&mut discovery).1.len(), 0);
    assert_eq!(refused(0, CNTLID_DYNAMIC).code, StatusCode::CONNECT_INVALID_HOST);
    assert_eq!(refused(1, cntlid).code, StatusCode::CONNECT_INVALID_HOST);
    assert_eq!(target.allowed_hosts(NQN), Some(vec![other.to_owned()]));
    assert_eq!(target.hosts(NQN), [other]);
    bystander.enable();
}

#[test]
fn who_lets_any_host_in_cannot_name_one() {
    let rig = Rig::mem();
    let target = rig.target.as_ref().unwrap();
    assert!(!target.allow_host(NQN, HOST) && !target.forbid_host(NQN, HOST));
    assert_eq!(target.allowed_hosts(NQN), None);
    assert!(!target.allow_host("nqn.other", HOST));
}
