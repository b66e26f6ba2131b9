//! Fuzz entry: whatever a peer sends, at whatever time, in whatever pieces, a connection answers or ends.
//!
//! The connections are real, the devices fake: requests end in order with what the test decides, and the payload that they
//! name is written to and read from, so that a sanitizer sees what a device would have touched.

use super::Shared;
use super::connection::{Action, Connection};
use super::namespace::Namespace;
use super::port::Port;
use super::registry::{ConnectionRef, Subsystem};
use super::{ANA_GROUP, NamespaceConfig, TRANSFER_BYTES_MAX};
use crate::nvme::ana::AnaState;
use crate::nvme::fabrics::{CNTLID_DYNAMIC, Connect, ConnectData, Property};
use crate::nvme::properties::{CC_START, offset};
use crate::nvme::{Sgl, Sqe, features};
use crate::pool::Budget;
use crate::tcp::pdu::command_to_bytes;
use crate::tcp::{Digests, InitRequest};
use crate::uri::Transport;
use hawser_block::fake::FakeDevice;
use hawser_block::{BlockSize, Completion, Geometry, Operation, Outcome, Request, Status};
use hawser_runtime::{Instant, Reactor, ReactorConfig, ReactorHandle};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

const NQN: &str = "nqn.2026-11.io.hawser:fuzz";
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:fuzz";

/// One subsystem with one namespace, without sockets.
pub(super) fn shared(geometry: Geometry) -> Arc<Shared> {
    let device = Arc::new(FakeDevice::new(geometry));
    let config = NamespaceConfig { nsid: 1, device, uuid: None };
    let namespaces = vec![Namespace::new(config, NQN, ANA_GROUP)];
    let port =
        Port::new(0, (Transport::Tcp, ([127, 0, 0, 1], 4420).into()), &[(ANA_GROUP, AnaState::Optimized)]);
    let subsystem = Subsystem::new(NQN, "fuzz", vec![port], None, namespaces);
    Arc::new(Shared {
        subsystems: vec![Arc::new(subsystem)],
        listeners: vec![vec![0]],
        places: Vec::new(),
        next_connection: AtomicU64::new(1),
        next_discovery_cntlid: AtomicU16::new(0),
        stopping: AtomicBool::new(false),
        connections: Mutex::default(),
        strangers: Mutex::default(),
        gone: Condvar::new(),
        memory: Arc::new(Budget::new(super::MEMORY_BYTES_MAX)),
        refusals: super::Seldom::default(),
        forbidden: super::Seldom::default(),
        broken: super::Seldom::default(),
        corrupted: super::Seldom::default(),
        capsule_bytes: std::sync::atomic::AtomicU64::new(0),
        strays: super::Seldom::default(),
        referrals: Mutex::default(),
        keeper: None,
    })
}

/// A reactor's handle that nobody runs: connections only hand it on.
pub(super) fn handle() -> ReactorHandle {
    static HANDLE: OnceLock<ReactorHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let reactor = Reactor::new(ReactorConfig::default()).expect("io_uring is needed");
            reactor.runtime().handle()
        })
        .clone()
}

/// A connection without a socket.
pub(super) fn connection(shared: &Arc<Shared>, id: u64) -> Connection {
    Connection::new(Arc::clone(shared), ConnectionRef { reactor: handle(), id }, 0, None)
}

/// What devices do: takes a request, says how it ends.
pub(super) type Execute<'a> = &'a mut dyn FnMut(&Request) -> Outcome;

/// Lets a connection receive `bytes`, and carries its requests out.
pub(super) fn feed(connection: &mut Connection, mut bytes: &[u8], execute: Execute<'_>) {
    while !bytes.is_empty() {
        let taken = receive(connection, bytes);
        if taken == 0 {
            return;
        }
        bytes = &bytes[taken..];
        run(connection, execute);
    }
}

/// Lets a connection receive as much of `bytes` as it has room for; how much that was.
pub(super) fn receive(connection: &mut Connection, bytes: &[u8]) -> usize {
    let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let mut places = [empty; 2];
    let count = connection.receive_space(&mut places);
    let mut taken = 0;
    for place in &places[..count] {
        let len = place.iov_len.min(bytes.len() - taken);
        // SAFETY: the connection gave the place for receiving; it has `iov_len` bytes, apart from ours.
        unsafe { place.iov_base.cast::<u8>().copy_from_nonoverlapping(bytes[taken..].as_ptr(), len) };
        taken += len;
    }
    if taken > 0 {
        connection.handle_received(taken, Instant(1));
    }
    taken
}

/// Carries out what a connection asks of devices and of its driver.
pub(super) fn run(connection: &mut Connection, execute: Execute<'_>) {
    while connection.take_submitting() {
        let requests: Vec<Request> =
            connection.lanes().iter_mut().flat_map(|lane| lane.batch.drain(..)).collect();
        for request in requests {
            let outcome = execute(&request);
            connection.handle_completion(Completion { token: request.token, outcome });
        }
    }
    for action in connection.take_actions() {
        if let Action::AwaitQuiet(_) = action {
            connection.connected();
        }
    }
}

/// A command as a host sends it.
pub(super) fn capsule(sqe: &Sqe, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap_or(0);
    let mut bytes = command_to_bytes(sqe, len, Digests::NONE, 4).to_vec();
    bytes.extend_from_slice(data);
    bytes
}

/// What opens a connection, up to its queue.
pub(super) fn opening(queue_id: u16, cntlid: u16, attributes: u8) -> Vec<u8> {
    let mut bytes = InitRequest { data_alignment: 0, digests: Digests::NONE, r2t_max: 0 }.to_bytes().to_vec();
    let connect = Connect { record_format: 0, queue_id, queue_size: 31, attributes, keep_alive_ms: 0 };
    let data =
        ConnectData { host_id: [1; 16], cntlid, subsystem_nqn: NQN.to_owned(), host_nqn: HOST.to_owned() };
    bytes.extend(capsule(&connect.to_sqe(Sgl::in_capsule(1024)), &data.to_bytes()));
    bytes
}

/// What makes a controller ready.
pub(super) fn enabling() -> Vec<u8> {
    let mut bytes = capsule(&Property::set(offset::CC, false, u64::from(CC_START)), &[]);
    let queues = Sqe::set_features(features::id::NUMBER_OF_QUEUES, features::queues_to_value(4));
    bytes.extend(capsule(&queues, &[]));
    bytes
}

/// Feeds `data` to a connection: the first byte says how far it is already, the second in what pieces, the rest is what
/// the peer sends.
pub fn fuzz(data: &[u8]) {
    let [stage, pieces, rest @ ..] = data else { return };
    let shared = shared(Geometry {
        discard: Some(hawser_block::DiscardLimits {
            blocks_max: 1000,
            granularity_blocks: 1,
            reads_zeroes: true,
        }),
        write_zeroes: Some(hawser_block::WriteZeroesLimits { blocks_max: 1000, may_unmap: true }),
        ..Geometry::new(BlockSize::B512, 4096)
    });
    let mut execute = |request: &Request| -> Outcome {
        let mut copy = vec![0u8; request.buffers.len()];
        assert!(copy.len() <= TRANSFER_BYTES_MAX as usize, "no request is larger than what was announced");
        // SAFETY: the request lives; the copy is as long as its payload.
        unsafe {
            match request.operation {
                Operation::Read => request.buffers.copy_from(copy.as_ptr()),
                Operation::Write { .. } => request.buffers.copy_to(copy.as_mut_ptr()),
                _ => {}
            }
        }
        if request.lba.0 < 4000 { Ok(()) } else { Err(Status::Invalid) }
    };
    let mut admin = connection(&shared, 1);
    if stage & 3 > 1 {
        feed(&mut admin, &opening(0, CNTLID_DYNAMIC, 0), &mut execute);
        feed(&mut admin, &enabling(), &mut execute);
        assert!(admin.is_connected());
    }
    let cntlid = admin.controller().map_or(0, |controller| controller.cntlid);
    let mut other = connection(&shared, 2);
    match stage & 3 {
        1 => feed(&mut other, &opening(0, CNTLID_DYNAMIC, 0)[..128], &mut execute),
        3 => feed(&mut other, &opening(1, cntlid, stage & 4), &mut execute),
        _ => {}
    }
    let peer = if stage & 3 == 2 { &mut admin } else { &mut other };
    let piece = usize::from(*pieces) * 7 + 1;
    for (index, piece) in rest.chunks(piece).enumerate() {
        feed(peer, piece, &mut execute);
        if (index + usize::from(*stage)).is_multiple_of(3) && peer.poll_transmit().is_some() {
            peer.transmitted();
        }
    }
    while peer.poll_transmit().is_some() {
        peer.transmitted();
    }
    peer.close();
    assert!(peer.is_quiet());
    for (id, connection) in [(2, &other), (1, &admin)] {
        if let Some(controller) = connection.controller() {
            controller.close();
            controller.leave(id);
        }
    }
    assert!(shared.subsystems[0].hosts().is_empty(), "an association that is over is forgotten");
}
