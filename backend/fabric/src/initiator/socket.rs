//! From an address to a connected queue: resolve, connect, over TCP ICReq and ICResp, Fabrics Connect. Straight-line code.
//!
//! Nothing here blocks a reactor: names are resolved on a thread of their own, everything else is awaited.

use super::config::HostIdentity;
use super::queue::{Limits, SqFlow};
use super::rdma::{self, RdmaPair};
use super::signal::{Mailbox, within};
use crate::nvme::bytes::get_array;
use crate::nvme::fabrics::{self, CATTR_NO_FLOW_CONTROL, Connect, ConnectData, NO_SQ_HEAD};
use crate::nvme::{Cqe, Sgl, StatusCode};
use crate::rdma::KeyPolicy;
use crate::tcp::{
    CommonHeader, Digests, InitRequest, InitResponse, PduError, PduKind, Receiver, TermRequest, pdu,
};
use crate::uri::{TcpAddress, Transport};
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Completed, Fd, Op, Runtime};
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How long a TCP connection, and the ICResp on it, may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long Connect may take: a target may first wait for the commands of our last association. As Linux's admin timeout.
const FABRICS_CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// In-capsule data that every controller takes for admin and Fabrics commands (TCP 3.6.2.6).
pub(crate) const ADMIN_IN_CAPSULE: u32 = 8192;

/// Why a queue is not connected.
#[derive(Debug)]
pub(crate) struct ConnectError {
    pub(crate) why: String,
    /// Nobody listens, or the target says that asking again is no use.
    pub(crate) refused: bool,
}

impl From<String> for ConnectError {
    fn from(why: String) -> ConnectError {
        ConnectError { why, refused: false }
    }
}

impl From<&str> for ConnectError {
    fn from(why: &str) -> ConnectError {
        why.to_owned().into()
    }
}

/// A TCP socket, closed when the last operation or connection that uses it is gone.
pub(crate) struct Socket {
    runtime: Runtime,
    fd: Fd,
}

impl Socket {
    pub(crate) fn fd(&self) -> Fd {
        self.fd
    }

    /// Closing throws away what is still in the send buffer, with a reset, instead of letting it reach the target later:
    /// commands of a lost association must not be executed after it. Set from the start, because a process that is killed
    /// closes its sockets too.
    fn discard_on_close(&self) {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let len = libc::socklen_t::try_from(size_of_val(&linger)).unwrap_or(0);
        // SAFETY: `linger` is a readable value of the length given; on failure the socket closes as usual.
        unsafe {
            libc::setsockopt(self.fd.0, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len)
        };
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.runtime.close(self.fd);
    }
}

/// An error of the system, for people: what it says, without the number, in the middle of a sentence.
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

fn result(completed: Completed) -> Result<u32, String> {
    completed.into_result().map_err(|error| plain(&error))
}

/// All addresses of a host, off the reactor's thread if that takes a resolver.
pub(crate) async fn resolve(address: &TcpAddress) -> Result<Vec<SocketAddr>, String> {
    if let Ok(ip) = address.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, address.port)]);
    }
    let answer = Arc::new(Mailbox::default());
    let post = Arc::clone(&answer);
    let (host, port) = (address.host.clone(), address.port);
    let resolver = std::thread::Builder::new().name("resolve".into()).spawn(move || {
        let found = (host.as_str(), port).to_socket_addrs();
        post.post(found.map(Iterator::collect::<Vec<_>>));
    });
    resolver.map_err(|error| plain(&error))?;
    match answer.next().await {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err("the name has no address".to_owned()),
        Err(error) => {
            let text = plain(&error);
            Err(text.strip_prefix("failed to lookup address information: ").unwrap_or(&text).to_owned())
        }
    }
}

/// A socket address as the kernel takes it.
enum RawAddress {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl RawAddress {
    fn new(address: &SocketAddr) -> RawAddress {
        match address {
            SocketAddr::V4(v4) => RawAddress::V4(libc::sockaddr_in {
                sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => RawAddress::V6(libc::sockaddr_in6 {
                sin6_family: libc::sa_family_t::try_from(libc::AF_INET6).unwrap_or_default(),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }

    fn raw(&self) -> (*const libc::sockaddr, u32) {
        let len = |len: usize| u32::try_from(len).unwrap_or(0);
        match self {
            RawAddress::V4(v4) => ((&raw const *v4).cast(), len(size_of_val(v4))),
            RawAddress::V6(v6) => ((&raw const *v6).cast(), len(size_of_val(v6))),
        }
    }
}

/// Opens a TCP connection.
async fn connect(runtime: &Runtime, address: &SocketAddr) -> Result<Rc<Socket>, ConnectError> {
    let fd = runtime.tcp_socket(address.is_ipv6()).map_err(|error| plain(&error))?;
    let socket = Rc::new(Socket { runtime: runtime.clone(), fd });
    socket.discard_on_close();
    let raw = Box::new(RawAddress::new(address));
    let (pointer, len) = raw.raw();
    // The address and the socket live until the operation is terminal, also if we give up before.
    let owned = Box::new((raw, Rc::clone(&socket)));
    let op = Op::Connect { fd, address: pointer, len };
    // SAFETY: `owned` has the address, on the heap.
    let connecting = unsafe { runtime.operate(&op, Some(owned)) };
    let connected = within(runtime, CONNECT_TIMEOUT, connecting).await;
    match connected.ok_or("no answer in time")?.into_result() {
        Ok(_) => Ok(socket),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let why = format!("{}, want an address at which a target listens", plain(&error));
            Err(ConnectError { why, refused: true })
        }
        Err(error) => Err(plain(&error).into()),
    }
}

async fn send(runtime: &Runtime, socket: &Rc<Socket>, bytes: Vec<u8>) -> Result<(), String> {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let op = Op::Send { fd: socket.fd(), buffer: bytes.as_ptr(), len };
    // SAFETY: the operation owns the bytes, which are on the heap.
    let sent = unsafe { runtime.operate(&op, Some(Box::new((bytes, Rc::clone(socket))))) }.await;
    if result(sent)? == len { Ok(()) } else { Err("the connection was closed".to_owned()) }
}

/// Receives exactly `N` bytes.
async fn receive<const N: usize>(runtime: &Runtime, socket: &Rc<Socket>) -> Result<[u8; N], String> {
    let mut all = [0; N];
    let mut have = 0;
    while have < N {
        let piece = Rc::new(AlignedBuffer::new(N - have));
        let len = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        let op = Op::Recv { fd: socket.fd(), buffer: piece.as_ptr(), len };
        let owned = Box::new((Rc::clone(&piece), Rc::clone(socket)));
        // SAFETY: the operation owns its buffer, also if we are dropped before it ends.
        let got = unsafe { runtime.operate(&op, Some(owned)) }.await;
        let got = result(got)? as usize;
        if got == 0 {
            return Err("the connection was closed".to_owned());
        }
        // SAFETY: the one operation that wrote to the buffer has ended.
        all[have..have + got].copy_from_slice(unsafe { piece.slice(0, got) });
        have += got;
    }
    Ok(all)
}

/// What a queue is connected with.
#[derive(Clone, Debug)]
pub(crate) struct QueueRequest {
    pub(crate) host: HostIdentity,
    pub(crate) subsystem_nqn: String,
    /// 0 for the admin queue.
    pub(crate) queue_id: u16,
    /// Entries, not counted from 0.
    pub(crate) entries: u16,
    pub(crate) cntlid: u16,
    pub(crate) keep_alive_ms: u32,
    /// Over TCP: what to ask for.
    pub(crate) digests: Digests,
    pub(crate) transport: Transport,
    /// Over RDMA.
    pub(crate) rdma_keys: KeyPolicy,
    /// In-capsule data of an I/O queue; the admin queue has its own.
    pub(crate) in_capsule_max: u32,
}

/// A queue that takes commands.
pub(crate) struct ConnectedQueue {
    pub(crate) wire: Wire,
    pub(crate) cntlid: u16,
}

/// What it is connected by.
pub(crate) enum Wire {
    Tcp(TcpQueue),
    Rdma(RdmaPair),
}

/// A queue over TCP.
pub(crate) struct TcpQueue {
    pub(crate) socket: Rc<Socket>,
    pub(crate) limits: Limits,
}

/// Connects a queue: the transport's connection, then Connect.
pub(crate) async fn connect_queue(
    runtime: &Runtime,
    address: &SocketAddr,
    request: &QueueRequest,
) -> Result<ConnectedQueue, ConnectError> {
    // SQ flow control is given up where the target lets us: fewer bytes to mind, and reads may end with their data.
    match try_connect_queue(runtime, address, request, CATTR_NO_FLOW_CONTROL).await? {
        Ok(queue) => Ok(queue),
        Err(cqe) if refuses_attributes(&cqe) => {
            try_connect_queue(runtime, address, request, 0).await?.map_err(|cqe| refusal(&cqe, request))
        }
        Err(cqe) => Err(refusal(&cqe, request)),
    }
}

async fn try_connect_queue(
    runtime: &Runtime,
    address: &SocketAddr,
    request: &QueueRequest,
    attributes: u8,
) -> Result<Result<ConnectedQueue, Cqe>, ConnectError> {
    match request.transport {
        Transport::Tcp => try_connect_tcp(runtime, address, request, attributes).await,
        Transport::Rdma => {
            let connected = rdma::connect_queue(runtime, address, request, attributes).await?;
            Ok(connected.map(|(pair, cntlid)| ConnectedQueue { wire: Wire::Rdma(pair), cntlid }))
        }
    }
}

/// Connect, with SQSIZE `queue_size`, and its data.
pub(crate) fn connect_command(
    request: &QueueRequest,
    queue_size: u16,
    attributes: u8,
) -> (Connect, ConnectData) {
    let command = Connect {
        record_format: 0,
        queue_id: request.queue_id,
        queue_size,
        attributes,
        keep_alive_ms: request.keep_alive_ms,
    };
    let data = ConnectData {
        host_id: request.host.id,
        cntlid: request.cntlid,
        subsystem_nqn: request.subsystem_nqn.clone(),
        host_nqn: request.host.nqn.clone(),
    };
    (command, data)
}

/// CNTLID, from the answer to a Connect that succeeded.
pub(crate) fn connect_answer(cqe: &Cqe) -> Result<u16, ConnectError> {
    match fabrics::connect_answer(cqe) {
        (cntlid, 0) => Ok(cntlid),
        _ => Err("the target wants authentication, which is not supported".into()),
    }
}

/// Why the target does not want us, and what would be right.
fn refusal(cqe: &Cqe, request: &QueueRequest) -> ConnectError {
    let reason = fabrics::connect_refusal(cqe);
    let want = match cqe.status.code {
        StatusCode::CONNECT_INVALID_HOST => {
            format!(", want {} among the hosts that it allows", request.host.nqn)
        }
        StatusCode::CONNECT_INVALID_PARAMETERS if reason.ends_with(": SUBNQN") => {
            format!(", want a subsystem that it has and not {}", request.subsystem_nqn)
        }
        _ => String::new(),
    };
    ConnectError { why: format!("the target refused: {reason}{want}"), refused: cqe.status.do_not_retry }
}

/// Connect Invalid Parameters, at CATTR (byte 46 of the command).
fn refuses_attributes(cqe: &Cqe) -> bool {
    cqe.status.code == StatusCode::CONNECT_INVALID_PARAMETERS && cqe.dword0() & 0x1_FFFF == 46
}

async fn try_connect_tcp(
    runtime: &Runtime,
    address: &SocketAddr,
    request: &QueueRequest,
    attributes: u8,
) -> Result<Result<ConnectedQueue, Cqe>, ConnectError> {
    let socket = connect(runtime, address).await?;
    let digests = request.digests;
    let init = InitRequest { data_alignment: 0, digests, r2t_max: 0 };
    let response = within(runtime, CONNECT_TIMEOUT, async {
        send(runtime, &socket, init.to_bytes().to_vec()).await?;
        receive::<128>(runtime, &socket).await
    })
    .await
    .ok_or("no ICResp in time")??;
    let response = check_init_response(&response, digests)?;

    let mut limits = Limits {
        in_capsule_max: if request.queue_id == 0 { ADMIN_IN_CAPSULE } else { request.in_capsule_max },
        // A multiple of 4 keeps the next DATAO one.
        host_data_max: response.host_data_max & !3,
        alignment: pdu::alignment(response.data_alignment),
        digests,
        flow: None,
    };
    let (command, data) = connect_command(request, request.entries - 1, attributes);
    let data = data.to_bytes();
    let data_len = u32::try_from(data.len()).unwrap_or(0);
    let sqe = command.to_sqe(Sgl::in_capsule(data_len));
    let header = pdu::command_to_bytes(&sqe, data_len, digests, limits.alignment);
    let mut bytes = header.to_vec();
    if digests.header {
        bytes.extend_from_slice(&pdu::digest(&header));
    }
    bytes.resize(usize::from(header[3]), 0);
    bytes.extend_from_slice(&data);
    if digests.data {
        bytes.extend_from_slice(&pdu::digest(&data));
    }
    let (header, answer) = within(runtime, FABRICS_CONNECT_TIMEOUT, async {
        send(runtime, &socket, bytes).await?;
        let answer = receive::<24>(runtime, &socket).await?;
        let header = CommonHeader::decode(&get_array(&answer, 0), Receiver::Host, digests)
            .map_err(|error| error.to_string())?;
        if header.header_len() > answer.len() && receive::<4>(runtime, &socket).await? != pdu::digest(&answer)
        {
            return Err("the answer to Connect was corrupted on the way".to_owned());
        }
        Ok((header, answer))
    })
    .await
    .ok_or("no answer to Connect in time")??;
    match header.kind {
        PduKind::Response => {}
        PduKind::ControllerTerm => {
            let status = TermRequest::decode(&answer).status;
            return Err(format!("the target ended the connection: {status}").into());
        }
        other => return Err(format!("the target answered Connect with {}", other.name()).into()),
    }
    let cqe = pdu::response_from_bytes(&answer);
    if !cqe.status.is_success() {
        return Ok(Err(cqe));
    }
    let cntlid = connect_answer(&cqe)?;
    // SQHD FFFFh: flow control is off, as we have asked (base 6.3). Who does not say so counts.
    let switched_off = attributes & CATTR_NO_FLOW_CONTROL != 0 && cqe.sq_head == NO_SQ_HEAD;
    limits.flow = (!switched_off).then(|| SqFlow::new(request.entries, cqe.sq_head));
    Ok(Ok(ConnectedQueue { wire: Wire::Tcp(TcpQueue { socket, limits }), cntlid }))
}

fn check_init_response(bytes: &[u8; 128], asked: Digests) -> Result<InitResponse, String> {
    let plain = |error: PduError| error.to_string();
    let header = CommonHeader::decode(&get_array(bytes, 0), Receiver::Host, Digests::NONE).map_err(plain)?;
    let wrong = |field, offset, value, expected| PduError {
        status: crate::tcp::FatalStatus::INVALID_HEADER_FIELD,
        offset,
        pdu: "ICResp",
        field,
        value,
        expected,
    };
    if header.kind != PduKind::InitResponse {
        return Err(plain(wrong("PDU-Type", 0, header.kind as u64, "1")));
    }
    let response = InitResponse::decode(bytes).map_err(plain)?;
    let Digests { header, data } = response.digests;
    // It may leave out what was asked for, and add nothing (TCP 3.6.2.3).
    if header && !asked.header || data && !asked.data {
        return Err(plain(wrong("DGST", 11, u64::from(bytes[11]), "what was asked for")));
    }
    for (name, asked, granted) in
        [("header digest, hdr_digest", asked.header, header), ("data digest, data_digest", asked.data, data)]
    {
        if asked && !granted {
            return Err(format!("the target does no {name}=1 asks for it"));
        }
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_system_reads_well() {
        let error = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        assert_eq!(plain(&error), "connection refused");
    }

    #[test]
    fn an_init_response_that_we_cannot_use_is_named() {
        let good = InitResponse { data_alignment: 0, digests: Digests::NONE, host_data_max: 4096 };
        let check = |bytes: &[u8; 128], asked| check_init_response(bytes, asked);
        assert_eq!(check(&good.to_bytes(), Digests::NONE), Ok(good));
        let header = Digests { header: true, data: false };
        let digests = InitResponse { digests: header, ..good };
        assert_eq!(check(&digests.to_bytes(), header), Ok(digests));
        assert!(check(&digests.to_bytes(), Digests::NONE).unwrap_err().contains("DGST is 0x1"));
        assert_eq!(
            check(&good.to_bytes(), header).unwrap_err(),
            "the target does no header digest, hdr_digest=1 asks for it"
        );
        let mut other = [0; 128];
        other[..24].copy_from_slice(&pdu::response_to_bytes(&Cqe::success(0), Digests::NONE));
        assert!(check(&other, Digests::NONE).unwrap_err().contains("PDU-Type"));
    }
}
