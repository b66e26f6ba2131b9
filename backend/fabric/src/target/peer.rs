//! A host for tests: blocking, simple, and able to do everything wrong.

use crate::nvme::bytes::get_array;
use crate::nvme::fabrics::{CATTR_NO_FLOW_CONTROL, CNTLID_DYNAMIC, Connect, ConnectData, Property};
use crate::nvme::properties::{CC_START, CSTS_READY, offset};
use crate::nvme::{Cqe, Sgl, Sqe, StatusCode, features};
use crate::tcp::pdu::{self, command_to_bytes, response_from_bytes};
use crate::tcp::{
    CommonHeader, DataPdu, Digests, InitRequest, InitResponse, PduKind, ReadyToTransfer, Receiver,
    TermRequest,
};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub(super) const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:host";

/// What comes from the target.
#[derive(Debug)]
pub(super) enum Heard {
    Response(Cqe),
    Data(DataPdu, Vec<u8>),
    Ready(ReadyToTransfer),
    Term(TermRequest),
    End,
}

/// One connection to a target.
pub(super) struct Peer {
    pub(super) stream: TcpStream,
    pub(super) digests: Digests,
    pub(super) host_data_max: u32,
    pub(super) host_id: [u8; 16],
    next_cid: u16,
    /// Data that R2Ts may ask for, by CID.
    offered: HashMap<u16, Vec<u8>>,
    /// Data that came, by CID.
    pub(super) data: HashMap<u16, Vec<u8>>,
}

impl Peer {
    /// Connects the socket only.
    pub(super) fn dial(address: SocketAddr) -> Peer {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Peer {
            stream,
            digests: Digests::NONE,
            host_data_max: 0,
            host_id: [7; 16],
            next_cid: 0,
            offered: HashMap::new(),
            data: HashMap::new(),
        }
    }

    /// Connects, and agrees on digests.
    pub(super) fn open(address: SocketAddr, digests: Digests) -> Peer {
        let mut peer = Peer::dial(address);
        peer.write(&InitRequest { data_alignment: 0, digests, r2t_max: 0 }.to_bytes());
        let bytes: [u8; 128] = peer.read().expect("an ICResp");
        let header = CommonHeader::decode(&get_array(&bytes, 0), Receiver::Host, Digests::NONE).unwrap();
        assert_eq!(header.kind, PduKind::InitResponse);
        let response = InitResponse::decode(&bytes).unwrap();
        assert_eq!(response.digests, digests);
        peer.digests = digests;
        peer.host_data_max = response.host_data_max;
        peer
    }

    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// A command's PDU.
    pub(super) fn capsule(&self, sqe: &Sqe, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).unwrap();
        let header = command_to_bytes(sqe, len, self.digests, 4);
        let mut bytes = header.to_vec();
        if self.digests.header {
            bytes.extend_from_slice(&pdu::digest(&header));
        }
        if !data.is_empty() {
            bytes.extend_from_slice(data);
            if self.digests.data {
                bytes.extend_from_slice(&pdu::digest(data));
            }
        }
        bytes
    }

    /// Sends a command under a new CID. Data that is not in the capsule is sent when it is asked for.
    pub(super) fn send(&mut self, mut sqe: Sqe, in_capsule: &[u8], offered: &[u8]) -> u16 {
        sqe.cid = self.next_cid;
        self.next_cid = self.next_cid.wrapping_add(1);
        if !offered.is_empty() {
            self.offered.insert(sqe.cid, offered.to_vec());
        }
        let bytes = self.capsule(&sqe, in_capsule);
        self.write(&bytes);
        sqe.cid
    }

    /// The next PDU, whole.
    pub(super) fn hear(&mut self) -> Heard {
        let Some(first) = self.read::<8>() else { return Heard::End };
        let header = CommonHeader::decode(&first, Receiver::Host, self.digests).unwrap();
        let mut rest = vec![0; header.len as usize - 8];
        self.stream.read_exact(&mut rest).unwrap();
        let all: Vec<u8> = first.into_iter().chain(rest).collect();
        let bare = usize::from(header.kind.header_len());
        if header.header_len() > bare {
            assert_eq!(pdu::digest(&all[..bare]), all[bare..bare + 4]);
        }
        let short: [u8; 24] = get_array(&all, 0);
        match header.kind {
            PduKind::Response => Heard::Response(response_from_bytes(&short)),
            PduKind::ControllerData => {
                let from = usize::from(header.data_offset);
                let data = all[from..from + header.data_len as usize].to_vec();
                if self.digests.data {
                    assert_eq!(pdu::digest(&data), all[all.len() - 4..]);
                }
                Heard::Data(DataPdu::decode(&header, &short).unwrap(), data)
            }
            PduKind::ReadyToTransfer => Heard::Ready(ReadyToTransfer::decode(&short).unwrap()),
            PduKind::ControllerTerm => Heard::Term(TermRequest::decode(&short)),
            kind => panic!("a target does not send {}", kind.name()),
        }
    }

    /// A piece of data for an R2T.
    pub(super) fn host_data(&mut self, pdu: DataPdu, data: &[u8]) {
        let header = pdu.to_bytes(Receiver::Controller, self.digests, 4);
        let mut bytes = header.to_vec();
        if self.digests.header {
            bytes.extend_from_slice(&pdu::digest(&header));
        }
        bytes.extend_from_slice(data);
        if self.digests.data {
            bytes.extend_from_slice(&pdu::digest(data));
        }
        self.write(&bytes);
    }

    /// Hears until a command ends: a completion, or data that says it succeeded.
    pub(super) fn end(&mut self) -> Cqe {
        loop {
            match self.hear() {
                Heard::Response(cqe) => return cqe,
                Heard::Data(pdu, bytes) => {
                    let data = self.data.entry(pdu.cid).or_default();
                    assert_eq!(data.len(), pdu.offset as usize, "data in order");
                    data.extend_from_slice(&bytes);
                    if pdu.success {
                        return Cqe::success(pdu.cid);
                    }
                }
                Heard::Ready(ready) => self.supply(&ready),
                other => panic!("{other:?} instead of an end"),
            }
        }
    }

    /// Sends what an R2T asks for, in pieces of odd sizes.
    fn supply(&mut self, ready: &ReadyToTransfer) {
        let all = self.offered.get(&ready.cid).expect("an R2T for what was offered").clone();
        let mut at = ready.offset as usize;
        let end = at + ready.len as usize;
        let most = (self.host_data_max as usize).min(48 << 10);
        while at < end {
            let len = most.min(end - at);
            let pdu = DataPdu {
                cid: ready.cid,
                tag: ready.tag,
                offset: u32::try_from(at).unwrap(),
                len: u32::try_from(len).unwrap(),
                last: at + len == end,
                success: false,
            };
            self.host_data(pdu, &all[at..at + len]);
            at += len;
        }
    }

    /// Sends a command and waits for its end; the data that came along.
    pub(super) fn call(&mut self, sqe: Sqe, in_capsule: &[u8], offered: &[u8]) -> (Cqe, Vec<u8>) {
        let cid = self.send(sqe, in_capsule, offered);
        let cqe = self.end();
        assert_eq!(cqe.cid, cid);
        (cqe, self.data.remove(&cid).unwrap_or_default())
    }

    /// The status of a command without data.
    pub(super) fn status(&mut self, sqe: Sqe) -> StatusCode {
        self.call(sqe, &[], &[]).0.status.code
    }

    pub(super) fn connect(&mut self, nqn: &str, queue_id: u16, cntlid: u16, flow_control: bool) -> Cqe {
        let connect = Connect {
            record_format: 0,
            queue_id,
            queue_size: 31,
            attributes: if flow_control { 0 } else { CATTR_NO_FLOW_CONTROL },
            keep_alive_ms: 0,
        };
        self.connect_with(&connect, nqn, cntlid, HOST)
    }

    pub(super) fn connect_with(&mut self, connect: &Connect, nqn: &str, cntlid: u16, host: &str) -> Cqe {
        let data = ConnectData {
            host_id: self.host_id,
            cntlid,
            subsystem_nqn: nqn.to_owned(),
            host_nqn: host.to_owned(),
        };
        self.call(connect.to_sqe(Sgl::in_capsule(1024)), &data.to_bytes(), &[]).0
    }

    /// An admin queue that is ready: CNTLID comes along.
    pub(super) fn admin(address: SocketAddr, nqn: &str) -> (Peer, u16) {
        Peer::admin_as(address, nqn, [7; 16])
    }

    pub(super) fn admin_as(address: SocketAddr, nqn: &str, host_id: [u8; 16]) -> (Peer, u16) {
        let mut peer = Peer::open(address, Digests::NONE);
        peer.host_id = host_id;
        let cqe = peer.connect(nqn, 0, CNTLID_DYNAMIC, true);
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        let cntlid = u16::try_from(cqe.dword0()).unwrap();
        peer.enable();
        (peer, cntlid)
    }

    pub(super) fn enable(&mut self) {
        assert_eq!(self.status(Property::set(offset::CC, false, u64::from(CC_START))), StatusCode::SUCCESS);
        let (cqe, _) = self.call(Property::get(offset::CSTS, false), &[], &[]);
        assert_eq!(cqe.dword0() & CSTS_READY, CSTS_READY);
        let queues = Sqe::set_features(features::id::NUMBER_OF_QUEUES, features::queues_to_value(8));
        assert_eq!(self.status(queues), StatusCode::SUCCESS);
    }

    /// An I/O queue of an association.
    pub(super) fn io(
        address: SocketAddr,
        nqn: &str,
        cntlid: u16,
        queue_id: u16,
        digests: Digests,
        flow_control: bool,
    ) -> Peer {
        let mut peer = Peer::open(address, digests);
        let cqe = peer.connect(nqn, queue_id, cntlid, flow_control);
        assert_eq!(cqe.status.code, StatusCode::SUCCESS);
        peer
    }
}
