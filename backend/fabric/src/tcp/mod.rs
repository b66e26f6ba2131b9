//! NVMe/TCP as bytes: the PDUs that carry commands, data and answers. Shared by initiator and target.
//!
//! Owns: the layouts of NVM Express TCP Transport Specification 1.0 ("TCP"), and the checks that a header can be given
//! without knowing what went before it. Must not know: sockets, queues, what is outstanding.
#![forbid(unsafe_code)]

pub mod pdu;

pub use pdu::{
    CommonHeader, DataPdu, Digests, FatalStatus, InitRequest, InitResponse, PduError, PduKind,
    ReadyToTransfer, Receiver, TermRequest,
};
