//! A small target in plain blocking code, that does on demand what ours does not: hold, refuse, lie, change.

use crate::nvme::ana::{AnaGroup, AnaLog, AnaState};
use crate::nvme::command::io_opcode;
use crate::nvme::cross_reset::{ControllerInstance, IMMEDIATE_SUCCESS, ResetEntry, ResetLog, ResetState};
use crate::nvme::fabrics::{self, Connect, Property, fctype};
use crate::nvme::identify::{IdentifyController, IdentifyNamespace, NamespaceIds, cns};
use crate::nvme::log::{AsyncEvent, id};
use crate::nvme::properties::{CC_ENABLE, CSTS_READY, Capabilities, offset};
use crate::nvme::{Cqe, NvmeStatus, Sqe, StatusCode, admin_opcode, features};
use crate::tcp::{CommonHeader, DataPdu, Digests, InitResponse, PduKind, Receiver, pdu};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What the target is, what it shall do, and what it has seen.
pub(super) struct State {
    pub(super) controller: IdentifyController,
    pub(super) namespace: IdentifyNamespace,
    pub(super) ids: NamespaceIds,
    pub(super) queues: u16,
    pub(super) disk: Vec<u8>,
    /// Refuses SQ flow control off, as some targets do.
    pub(super) refuse_attributes: bool,
    /// I/O commands are logged and neither executed nor answered.
    pub(super) hold_io: bool,
    /// Keep-alives and resets are not answered.
    pub(super) deaf: bool,
    /// Connects to I/O queues are not answered as long as this is set.
    pub(super) hold_connects: bool,
    /// Those that have come.
    pub(super) io_connects: usize,
    /// Keep-alives that have come.
    pub(super) keep_alives: usize,
    /// How the next I/O commands end; when it is empty they succeed.
    pub(super) statuses: VecDeque<NvmeStatus>,
    /// Sent once instead of the answer to the next I/O command.
    pub(super) garbage: Option<Vec<u8>>,
    /// Answers come a byte every 200 ms.
    pub(super) drips: bool,
    /// What the host has said that it can do (feature 16h).
    pub(super) host_behavior: Option<Vec<u8>>,
    /// I/O commands with the time of their arrival.
    pub(super) log: Vec<(Instant, Sqe)>,
    /// Connections that the host ended with a reset.
    pub(super) resets: usize,
    /// Controllers that were reset.
    pub(super) disables: usize,
    /// What the ANA log page says of the one group.
    pub(super) ana: AnaState,
    /// The other controllers that it was asked to reset.
    pub(super) resets_of_others: Vec<ControllerInstance>,
    /// What its log says of them; `None`: they are reset at once.
    pub(super) reset_state: Option<ResetState>,
    /// Its log of them.
    pub(super) reset_log: Vec<ControllerInstance>,
    /// It knows no other controllers.
    pub(super) knows_none: bool,
    /// Of its own controllers.
    pub(super) cntlid: u16,
    /// Admin connections so far.
    pub(super) associations: usize,
    event: Option<(TcpStream, u16)>,
    streams: Vec<TcpStream>,
    ended: bool,
}

pub(super) struct Scripted {
    pub(super) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn read_reset_log(&mut self, sqe: &Sqe) -> Vec<u8> {
        let state = self.reset_state.unwrap_or(ResetState::Succeeded);
        let entry = |instance: &ControllerInstance| ResetEntry {
            cntlid: instance.cntlid,
            uniquifier: instance.uniquifier,
            state,
        };
        let log = ResetLog { entries: self.reset_log.iter().map(entry).collect() };
        if sqe.log_specific() & ResetLog::REMOVE_COMPLETED != 0 && state != ResetState::InProgress {
            self.reset_log.clear();
        }
        log.to_bytes()
    }
}

impl Scripted {
    /// A namespace of 1 MiB in blocks of 512 bytes.
    pub(super) fn start(nqn: &str) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let controller = IdentifyController {
            command_capsule_size: (64 + 8192) / 16,
            async_events: 1 << 8,
            subsystem_nqn: nqn.into(),
            ..IdentifyController::default()
        };
        let state = Arc::new(Mutex::new(State {
            controller,
            namespace: IdentifyNamespace::plain(2048, 9),
            ids: NamespaceIds { uuid: [9; 16], ..NamespaceIds::default() },
            queues: 8,
            disk: vec![0; 2 << 20],
            refuse_attributes: false,
            hold_io: false,
            deaf: false,
            hold_connects: false,
            io_connects: 0,
            keep_alives: 0,
            statuses: VecDeque::new(),
            garbage: None,
            drips: false,
            host_behavior: None,
            log: Vec::new(),
            resets: 0,
            disables: 0,
            ana: AnaState::Optimized,
            resets_of_others: Vec::new(),
            reset_state: None,
            reset_log: Vec::new(),
            knows_none: false,
            cntlid: 5,
            associations: 0,
            event: None,
            streams: Vec::new(),
            ended: false,
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = stream.set_nodelay(true);
                let mut state = lock(&shared);
                if state.ended {
                    return;
                }
                state.streams.push(stream.try_clone().unwrap());
                let own = Arc::clone(&shared);
                // A connection ends with an error when the test cuts it.
                thread::spawn(move || serve(stream, &own));
            }
        });
        Scripted { address, state }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Ends all connections.
    pub(super) fn cut(&self) {
        let streams = std::mem::take(&mut self.state().streams);
        for stream in streams {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends the connection that was made first.
    pub(super) fn cut_first(&self) {
        let stream = self.state().streams.remove(0);
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Tells that a namespace changed.
    pub(super) fn tell_change(&self) {
        self.tell(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED);
    }

    /// Changes the namespace's asymmetric access and tells of it.
    pub(super) fn change_ana(&self, state: AnaState) {
        self.state().ana = state;
        self.tell(AsyncEvent::ANA_CHANGE);
    }

    fn tell(&self, event: AsyncEvent) {
        let (mut stream, cid) = self.state().event.take().expect("an event was asked for");
        let dword = event.to_dword();
        let cqe = Cqe { result: u64::from(dword), ..Cqe::success(cid) };
        stream.write_all(&pdu::response_to_bytes(&cqe, Digests::NONE)).unwrap();
    }

    pub(super) fn has_event_request(&self) -> bool {
        self.state().event.is_some()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.cut();
        self.state().ended = true;
        let _ = TcpStream::connect(self.address);
    }
}

struct Connection<'a> {
    stream: TcpStream,
    state: &'a Mutex<State>,
    admin: bool,
    enabled: bool,
}

fn serve(stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut connection = Connection { stream, state, admin: false, enabled: false };
    let mut init = [0; 128];
    connection.stream.read_exact(&mut init).ok()?;
    let response = InitResponse { data_alignment: 3, digests: Digests::NONE, host_data_max: 4096 };
    connection.stream.write_all(&response.to_bytes()).ok()?;
    loop {
        let (sqe, data) = connection
            .command()
            .inspect_err(|error| {
                lock(state).resets += usize::from(error.kind() == io::ErrorKind::ConnectionReset);
            })
            .ok()?;
        connection.answer(&sqe, &data).ok()?;
    }
}

impl Connection<'_> {
    fn command(&mut self) -> io::Result<(Sqe, Vec<u8>)> {
        let mut header = [0; 72];
        self.stream.read_exact(&mut header)?;
        let first = header[..8].try_into().expect("8 bytes");
        let common = CommonHeader::decode(&first, Receiver::Controller, Digests::NONE)
            .map_err(|error| io::Error::other(error.to_string()))?;
        assert_eq!(common.kind, PduKind::Command, "this target asks for no data");
        let mut rest = vec![0; common.len as usize - 72];
        self.stream.read_exact(&mut rest)?;
        // CPDA 3: data is aligned to 16 bytes, and the header ends at 72.
        let data = if common.data_len > 0 {
            assert_eq!(common.data_offset, 80);
            rest.split_off(8)
        } else {
            Vec::new()
        };
        Ok((pdu::command_from_bytes(&header), data))
    }

    fn end(&mut self, cqe: &Cqe) -> io::Result<()> {
        let response = pdu::response_to_bytes(cqe, Digests::NONE);
        if !lock(self.state).drips {
            return self.stream.write_all(&response);
        }
        for byte in response {
            self.stream.write_all(&[byte])?;
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn success(&mut self, sqe: &Sqe, result: u64) -> io::Result<()> {
        self.end(&Cqe { result, ..Cqe::success(sqe.cid) })
    }

    fn fail(&mut self, sqe: &Sqe, status: NvmeStatus) -> io::Result<()> {
        self.end(&Cqe { status, ..Cqe::success(sqe.cid) })
    }

    fn data(&mut self, sqe: &Sqe, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).expect("small");
        let header = DataPdu { cid: sqe.cid, tag: 0, offset: 0, len, last: true, success: false };
        // A controller may pad, though nobody asked: 24 bytes of header, data at 32.
        let mut bytes = header.to_bytes(Receiver::Host, Digests::NONE, 32).to_vec();
        bytes.resize(32, 0xee);
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)?;
        self.success(sqe, 0)
    }

    fn answer(&mut self, sqe: &Sqe, data: &[u8]) -> io::Result<()> {
        if sqe.opcode == admin_opcode::FABRICS {
            return self.fabrics(sqe);
        }
        if self.admin { self.admin_command(sqe, data) } else { self.io_command(sqe, data) }
    }

    fn fabrics(&mut self, sqe: &Sqe) -> io::Result<()> {
        match fabrics::command_type(sqe) {
            fctype::CONNECT => {
                let connect = Connect::from_sqe(sqe);
                if connect.attributes != 0 && lock(self.state).refuse_attributes {
                    return self.end(&fabrics::connect_invalid(sqe.cid, false, 46));
                }
                self.admin = connect.queue_id == 0;
                lock(self.state).associations += usize::from(self.admin);
                lock(self.state).io_connects += usize::from(!self.admin);
                while !self.admin && lock(self.state).hold_connects {
                    thread::sleep(Duration::from_millis(5));
                }
                let cntlid = lock(self.state).cntlid;
                let sq_head = if connect.attributes == 0 { 0 } else { fabrics::NO_SQ_HEAD };
                self.end(&Cqe { result: u64::from(cntlid), sq_head, ..Cqe::success(sqe.cid) })
            }
            fctype::PROPERTY_SET => {
                let property = Property::from_sqe(sqe).expect("a size");
                if property.value & u64::from(CC_ENABLE) == 0 {
                    lock(self.state).disables += 1;
                    if lock(self.state).deaf {
                        return Ok(());
                    }
                }
                self.enabled = property.value & u64::from(CC_ENABLE) != 0;
                self.success(sqe, 0)
            }
            _ => {
                let capabilities = Capabilities {
                    queue_entries_max: 31,
                    timeout: 4,
                    command_sets: 1,
                    page_size_min: 0,
                    page_size_max: 0,
                };
                let value = match Property::from_sqe(sqe).expect("a size").offset {
                    offset::CAP => capabilities.to_u64(),
                    offset::CSTS if self.enabled => u64::from(CSTS_READY),
                    _ => 0,
                };
                self.success(sqe, value)
            }
        }
    }

    fn admin_command(&mut self, sqe: &Sqe, data: &[u8]) -> io::Result<()> {
        match sqe.opcode {
            admin_opcode::IDENTIFY => {
                let state = lock(self.state);
                let data = match sqe.identify_cns() {
                    cns::CONTROLLER => state.controller.to_bytes(),
                    cns::NAMESPACE => state.namespace.to_bytes(),
                    cns::NAMESPACE_IDS => state.ids.to_bytes(),
                    _ => {
                        drop(state);
                        return self.fail(sqe, NvmeStatus::fatal(StatusCode::INVALID_FIELD));
                    }
                };
                drop(state);
                self.data(sqe, &data)
            }
            admin_opcode::SET_FEATURES if sqe.feature_id() == features::id::NUMBER_OF_QUEUES => {
                let value = features::queues_to_value(lock(self.state).queues);
                self.success(sqe, u64::from(value))
            }
            admin_opcode::SET_FEATURES if sqe.feature_id() == features::id::HOST_BEHAVIOR => {
                lock(self.state).host_behavior = Some(data.to_vec());
                self.success(sqe, 0)
            }
            admin_opcode::ASYNC_EVENT_REQUEST => {
                lock(self.state).event = Some((self.stream.try_clone()?, sqe.cid));
                Ok(())
            }
            admin_opcode::KEEP_ALIVE => {
                lock(self.state).keep_alives += 1;
                if lock(self.state).deaf { Ok(()) } else { self.success(sqe, 0) }
            }
            admin_opcode::CROSS_CONTROLLER_RESET => {
                let instance = ControllerInstance::from_sqe(sqe);
                let mut state = lock(self.state);
                state.resets_of_others.push(instance);
                if state.knows_none {
                    drop(state);
                    return self.fail(sqe, NvmeStatus::fatal(StatusCode::INVALID_FIELD));
                }
                let immediate = if state.reset_state.is_none() { IMMEDIATE_SUCCESS } else { 0 };
                if immediate == 0 {
                    state.reset_log.push(instance);
                }
                drop(state);
                self.success(sqe, u64::from(immediate))
            }
            admin_opcode::GET_LOG_PAGE => {
                let len = sqe.log_len().expect("a length") as usize;
                let mut log = vec![0; len];
                if sqe.log_id() == id::ANA {
                    let group = {
                        let state = lock(self.state);
                        AnaGroup {
                            id: state.namespace.ana_group,
                            changes: 1,
                            state: state.ana,
                            namespaces: Vec::new(),
                        }
                    };
                    let bytes = AnaLog { changes: 1, groups: vec![group] }.to_bytes();
                    log[..bytes.len()].copy_from_slice(&bytes);
                }
                if sqe.log_id() == id::CROSS_CONTROLLER_RESET {
                    let bytes = lock(self.state).read_reset_log(sqe);
                    log[..bytes.len()].copy_from_slice(&bytes);
                }
                self.data(sqe, &log)
            }
            _ => self.success(sqe, 0),
        }
    }

    fn io_command(&mut self, sqe: &Sqe, data: &[u8]) -> io::Result<()> {
        let mut state = lock(self.state);
        state.log.push((Instant::now(), *sqe));
        if state.hold_io {
            return Ok(());
        }
        if let Some(garbage) = state.garbage.take() {
            drop(state);
            return self.stream.write_all(&garbage);
        }
        if let Some(code) = state.ana.refusal() {
            drop(state);
            return self.fail(sqe, NvmeStatus::retryable(code));
        }
        if let Some(status) = state.statuses.pop_front().filter(|status| !status.is_success()) {
            drop(state);
            return self.fail(sqe, status);
        }
        let from = usize::try_from(sqe.lba()).expect("small") * 512;
        match sqe.opcode {
            io_opcode::READ => {
                let content = state.disk[from..from + sqe.block_count() as usize * 512].to_vec();
                drop(state);
                self.data(sqe, &content)
            }
            io_opcode::WRITE => {
                state.disk[from..from + data.len()].copy_from_slice(data);
                drop(state);
                self.success(sqe, 0)
            }
            io_opcode::RESERVATION_REPORT => {
                drop(state);
                self.data(sqe, &vec![0; (sqe.cdw[0] as usize + 1) * 4])
            }
            _ => {
                drop(state);
                self.success(sqe, 0)
            }
        }
    }
}
