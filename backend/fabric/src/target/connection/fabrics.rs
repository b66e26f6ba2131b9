//! Fabrics commands: Connect, and the controller's properties.

use super::super::registry::{Controller, Host, JoinError, Subsystem};
use super::slots::{Phase, Place, place_of};
use super::{Action, Connection, OWN_BYTES, Queue};
use crate::nvme::bytes::{get_array, low32};
use crate::nvme::fabrics::{
    CATTR_NO_FLOW_CONTROL, CNTLID_DYNAMIC, Connect, ConnectData, NO_SQ_HEAD, Property, command_type,
    connect_invalid, fctype,
};
use crate::nvme::properties::{Capabilities, offset};
use crate::nvme::{DISCOVERY_NQN, NvmeStatus, StatusCode, admin_opcode, nqn_is_valid};
use crate::target::{QUEUE_ENTRIES_MAX, VERSION};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How long a host may have to wait for CSTS.RDY, in 500 ms.
const READY_TIMEOUT: u8 = 30;

/// Why a Connect is refused.
enum Refusal {
    /// A parameter: in the data or the command, at this byte.
    Parameter {
        in_data: bool,
        offset: u16,
    },
    Status(NvmeStatus),
}

impl From<StatusCode> for Refusal {
    fn from(code: StatusCode) -> Refusal {
        Refusal::Status(NvmeStatus::fatal(code))
    }
}

impl Connection {
    /// A Fabrics command, or a command before Connect.
    pub(super) fn begin_fabrics(&mut self, index: usize) {
        let sqe = self.slots.at(index).sqe;
        if sqe.opcode != admin_opcode::FABRICS {
            self.fail(index, NvmeStatus::fatal(StatusCode::COMMAND_SEQUENCE_ERROR));
            return;
        }
        match (command_type(&sqe), self.queue) {
            // Over RDMA its data is fetched first.
            (fctype::CONNECT, Queue::None) if self.is_to_be_fetched(index) => {
                let len = u32::try_from(ConnectData::LEN).unwrap_or(0);
                if let Err(status) = self.take_host_data(index, len) {
                    self.fail(index, status);
                }
            }
            (fctype::CONNECT, Queue::None) => match self.connect(index) {
                Ok(()) => {}
                Err(Refusal::Status(status)) => self.fail(index, status),
                Err(Refusal::Parameter { in_data, offset }) => {
                    let cqe = connect_invalid(sqe.cid, in_data, offset);
                    self.answer(index, cqe.status, cqe.result);
                }
            },
            (fctype::PROPERTY_GET, Queue::Admin) => match self.property_get(index) {
                Ok(value) => self.answer(index, NvmeStatus::SUCCESS, value),
                Err(status) => self.fail(index, status),
            },
            (fctype::PROPERTY_SET, Queue::Admin) => match self.property_set(index) {
                Ok(()) => self.answer(index, NvmeStatus::SUCCESS, 0),
                Err(status) => self.fail(index, status),
            },
            (fctype::CONNECT | fctype::PROPERTY_GET | fctype::PROPERTY_SET, _) => {
                self.fail(index, NvmeStatus::fatal(StatusCode::COMMAND_SEQUENCE_ERROR));
            }
            _ => self.fail(index, NvmeStatus::fatal(StatusCode::INVALID_OPCODE)),
        }
    }

    fn is_to_be_fetched(&mut self, index: usize) -> bool {
        let slot = self.slots.at(index);
        slot.keyed && slot.buffer.is_none()
    }

    fn connect(&mut self, index: usize) -> Result<(), Refusal> {
        let slot = self.slots.at(index);
        let connect = Connect::from_sqe(&slot.sqe);
        if connect.record_format != 0 {
            return Err(StatusCode::CONNECT_INCOMPATIBLE_FORMAT.into());
        }
        let len = u32::try_from(ConnectData::LEN).unwrap_or(0);
        let place = place_of(slot, len).map_err(Refusal::Status)?;
        let Some(buffer) = slot.buffer.as_ref().filter(|_| place == Place::Capsule || slot.keyed) else {
            return Err(StatusCode::INVALID_SGL_TYPE.into());
        };
        // SAFETY: the data is there, as long as was checked, and nobody writes to it.
        let bytes = get_array(unsafe { buffer.slice(0, ConnectData::LEN) }, 0);
        let parameter = |in_data, offset| Refusal::Parameter { in_data, offset };
        let data = ConnectData::from_bytes(&bytes)
            .map_err(|error| parameter(true, if error.field == "SUBNQN" { 256 } else { 512 }))?;
        if connect.queue_size == 0 || connect.queue_size >= QUEUE_ENTRIES_MAX {
            return Err(parameter(false, 44));
        }
        if !nqn_is_valid(&data.host_nqn) {
            return Err(parameter(true, 512));
        }
        let discovery = data.subsystem_nqn == DISCOVERY_NQN;
        let subsystem = self.shared.subsystem(&data.subsystem_nqn, self.listener).cloned();
        if !discovery && subsystem.is_none() {
            return Err(parameter(true, 256));
        }
        if let Some(subsystem) = subsystem.as_ref().filter(|subsystem| !subsystem.allows(&data.host_nqn)) {
            if let Some(count) = self.shared.forbidden.add() {
                let (nqn, host) = (&subsystem.nqn, &data.host_nqn);
                log::warn!(
                    "{nqn}: {host} was refused: it is not among allowed_hosts; {count} such connections so far"
                );
            }
            return Err(StatusCode::CONNECT_INVALID_HOST.into());
        }
        self.entries = connect.queue_size + 1;
        self.flow_control = connect.attributes & CATTR_NO_FLOW_CONTROL == 0;
        let host = Host { nqn: data.host_nqn, id: data.host_id };
        match (connect.queue_id, subsystem) {
            (0, subsystem) => {
                if data.cntlid != CNTLID_DYNAMIC {
                    return Err(parameter(true, 16));
                }
                self.connect_admin(index, host, subsystem.as_ref(), connect.keep_alive_ms)
            }
            (queue_id, Some(subsystem)) => self.connect_io(index, &host, &subsystem, data.cntlid, queue_id),
            // A discovery controller has no I/O queues.
            (_, None) => Err(parameter(false, 42)),
        }
    }

    fn connect_admin(
        &mut self,
        index: usize,
        host: Host,
        subsystem: Option<&Arc<Subsystem>>,
        keep_alive_ms: u32,
    ) -> Result<(), Refusal> {
        let me = self.me.clone();
        let Some(subsystem) = subsystem else {
            let cntlid = self.shared.next_discovery_cntlid();
            self.belong(Controller::discovery(cntlid, host, me, keep_alive_ms, self.now));
            self.queue = Queue::Connecting(index);
            self.connected();
            return Ok(());
        };
        let (controller, earlier) =
            subsystem.create(host, me, self.listener, keep_alive_ms, self.now).map_err(Refusal::from)?;
        self.belong(controller);
        self.queue = Queue::Connecting(index);
        self.slots.at(index).phase = Phase::Awaiting;
        if earlier.is_empty() {
            self.connected();
        } else {
            self.actions.push(Action::AwaitQuiet(earlier));
        }
        Ok(())
    }

    fn connect_io(
        &mut self,
        index: usize,
        host: &Host,
        subsystem: &Arc<Subsystem>,
        cntlid: u16,
        queue_id: u16,
    ) -> Result<(), Refusal> {
        let joined = subsystem.join(cntlid, host, queue_id, self.me.clone());
        let controller = joined.map_err(|error| match error {
            JoinError::Unknown => Refusal::Parameter { in_data: true, offset: 16 },
            JoinError::QueueBeyond => Refusal::Parameter { in_data: false, offset: 42 },
            JoinError::NotReady | JoinError::QueueInUse => StatusCode::COMMAND_SEQUENCE_ERROR.into(),
        })?;
        controller.heard(self.now);
        self.belong(controller);
        self.queue_id = queue_id;
        self.queue = Queue::Connecting(index);
        self.make_lanes();
        self.connected();
        Ok(())
    }

    /// The Connect is good: from now on the connection is its host's.
    fn belong(&mut self, controller: Arc<Controller>) {
        assert!(self.controller.is_none(), "a connection has one Connect");
        self.shared.memory.charge(OWN_BYTES);
        self.shared.strangers().remove(&self.me.id);
        self.controller = Some(controller);
    }

    /// Nothing stands in the way of the Connect that waits.
    pub(in super::super) fn connected(&mut self) {
        let Queue::Connecting(index) = self.queue else { return };
        self.queue = if self.queue_id == 0 { Queue::Admin } else { Queue::Io };
        if self.is_over() {
            return;
        }
        let Some(controller) = &self.controller else { return };
        let cntlid = controller.cntlid;
        if let (Queue::Admin, Some(subsystem)) = (self.queue, &controller.subsystem) {
            log::info!("{}: {} is connected, controller {cntlid}", subsystem.nqn, controller.host.nqn);
        }
        // FFFFh says that flow control is off, as the host asked (base 6.3).
        self.sq_head = if self.flow_control { 0 } else { NO_SQ_HEAD };
        self.answer(index, NvmeStatus::SUCCESS, u64::from(cntlid));
        if !self.flow_control {
            self.sq_head = 0;
        }
    }

    fn property_get(&mut self, index: usize) -> Result<u64, NvmeStatus> {
        let invalid = NvmeStatus::fatal(StatusCode::INVALID_FIELD);
        let property = Property::from_sqe(&self.slots.at(index).sqe).map_err(|_| invalid)?;
        let controller = self.controller.as_ref().ok_or(invalid)?;
        match (property.offset, property.wide) {
            (offset::CAP, true) => {
                let capabilities = Capabilities {
                    queue_entries_max: QUEUE_ENTRIES_MAX - 1,
                    timeout: READY_TIMEOUT,
                    command_sets: 1,
                    page_size_min: 0,
                    page_size_max: 0,
                };
                Ok(capabilities.to_u64())
            }
            (offset::VS, false) => Ok(u64::from(VERSION)),
            (offset::CC, false) => Ok(u64::from(controller.configuration.load(Ordering::Relaxed))),
            (offset::CSTS, false) => Ok(u64::from(controller.status())),
            _ => Err(invalid),
        }
    }

    fn property_set(&mut self, index: usize) -> Result<(), NvmeStatus> {
        let invalid = NvmeStatus::fatal(StatusCode::INVALID_FIELD);
        let property = Property::from_sqe(&self.slots.at(index).sqe).map_err(|_| invalid)?;
        let controller = self.controller.as_ref().ok_or(invalid)?;
        if (property.offset, property.wide) != (offset::CC, false) {
            return Err(invalid);
        }
        if controller.configure(low32(property.value)) {
            let connections = controller.io_connections();
            self.actions.push(Action::Close(connections));
        }
        Ok(())
    }
}
