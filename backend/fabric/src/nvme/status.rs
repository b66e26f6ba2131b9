//! How a command ended (base 3.3.3.2.1, Status Field): a code, and what it says about trying again.

use hawser_block::Status;
use std::fmt;

/// Status code type and status code as one number: `SCT << 8 | SC`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatusCode(pub u16);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl StatusCode {
            $(#[doc = $text] pub const $name: StatusCode = StatusCode($value);)*

            /// The specification's name, where we know it.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    SUCCESS = 0x000, "Successful Completion";
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    CID_CONFLICT = 0x003, "Command ID Conflict";
    DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
    ABORTED_POWER_LOSS = 0x005, "Commands Aborted due to Power Loss Notification";
    INTERNAL_ERROR = 0x006, "Internal Error";
    ABORT_REQUESTED = 0x007, "Command Abort Requested";
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    ABORTED_FAILED_FUSED = 0x009, "Command Aborted due to Failed Fused Command";
    ABORTED_MISSING_FUSED = 0x00A, "Command Aborted due to Missing Fused Command";
    INVALID_NAMESPACE = 0x00B, "Invalid Namespace or Format";
    COMMAND_SEQUENCE_ERROR = 0x00C, "Command Sequence Error";
    INVALID_SGL_SEGMENT = 0x00D, "Invalid SGL Segment Descriptor";
    INVALID_SGL_COUNT = 0x00E, "Invalid Number of SGL Descriptors";
    INVALID_SGL_LENGTH = 0x00F, "Data SGL Length Invalid";
    INVALID_SGL_TYPE = 0x011, "SGL Descriptor Type Invalid";
    OPERATION_DENIED = 0x015, "Operation Denied";
    INVALID_SGL_OFFSET = 0x016, "SGL Offset Invalid";
    HOST_ID_INCONSISTENT = 0x018, "Host Identifier Inconsistent Format";
    KEEP_ALIVE_EXPIRED = 0x019, "Keep Alive Timer Expired";
    KEEP_ALIVE_INVALID = 0x01A, "Keep Alive Timeout Invalid";
    ABORTED_PREEMPT = 0x01B, "Command Aborted due to Preempt and Abort";
    NAMESPACE_WRITE_PROTECTED = 0x020, "Namespace is Write Protected";
    COMMAND_INTERRUPTED = 0x021, "Command Interrupted";
    TRANSIENT_TRANSPORT_ERROR = 0x022, "Transient Transport Error";
    MEDIA_NOT_READY = 0x024, "Admin Command Media Not Ready";
    LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
    CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
    NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
    RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
    FORMAT_IN_PROGRESS = 0x084, "Format In Progress";
    INVALID_QUEUE_ID = 0x101, "Invalid Queue Identifier";
    INVALID_QUEUE_SIZE = 0x102, "Invalid Queue Size";
    ABORT_LIMIT_EXCEEDED = 0x103, "Abort Command Limit Exceeded";
    AER_LIMIT_EXCEEDED = 0x105, "Asynchronous Event Request Limit Exceeded";
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    INVALID_FORMAT = 0x10A, "Invalid Format";
    FEATURE_NOT_SAVEABLE = 0x10D, "Feature Identifier Not Saveable";
    FEATURE_NOT_CHANGEABLE = 0x10E, "Feature Not Changeable";
    FEATURE_NOT_PER_NAMESPACE = 0x10F, "Feature Not Namespace Specific";
    CONTROLLER_RESET_IN_PROGRESS = 0x13F, "Cross-Controller Reset in Progress";
    CONTROLLER_RESET_LOG_FULL = 0x140, "Cross-Controller Reset Log Page Full";
    CONTROLLER_RESET_LIMIT_EXCEEDED = 0x141, "Cross-Controller Reset Limit Exceeded";
    CONNECT_INCOMPATIBLE_FORMAT = 0x180, "Connect Incompatible Format";
    CONNECT_CONTROLLER_BUSY = 0x181, "Connect Controller Busy";
    CONNECT_INVALID_PARAMETERS = 0x182, "Connect Invalid Parameters";
    CONNECT_RESTART_DISCOVERY = 0x183, "Connect Restart Discovery";
    CONNECT_INVALID_HOST = 0x184, "Connect Invalid Host";
    INVALID_QUEUE_TYPE = 0x185, "Invalid Queue Type";
    DISCOVER_RESTART = 0x190, "Discover Restart";
    AUTHENTICATION_REQUIRED = 0x191, "Authentication Required";
    WRITE_FAULT = 0x280, "Write Fault";
    UNRECOVERED_READ_ERROR = 0x281, "Unrecovered Read Error";
    GUARD_CHECK_ERROR = 0x282, "End-to-end Guard Check Error";
    COMPARE_FAILURE = 0x285, "Compare Failure";
    ACCESS_DENIED = 0x286, "Access Denied";
    DEALLOCATED_BLOCK = 0x287, "Deallocated or Unwritten Logical Block";
    INTERNAL_PATH_ERROR = 0x300, "Internal Path Error";
    ANA_PERSISTENT_LOSS = 0x301, "Asymmetric Access Persistent Loss";
    ANA_INACCESSIBLE = 0x302, "Asymmetric Access Inaccessible";
    ANA_TRANSITION = 0x303, "Asymmetric Access Transition";
    CONTROLLER_PATHING_ERROR = 0x360, "Controller Pathing Error";
    HOST_PATHING_ERROR = 0x370, "Host Pathing Error";
    ABORTED_BY_HOST = 0x371, "Command Aborted By Host";
}

impl StatusCode {
    /// From the two fields.
    #[must_use]
    pub fn new(code_type: u8, code: u8) -> StatusCode {
        StatusCode(u16::from(code_type & 7) << 8 | u16::from(code))
    }

    /// SCT: 0 generic, 1 command specific, 2 media and data integrity, 3 path related, 7 vendor specific.
    #[must_use]
    pub fn code_type(self) -> u8 {
        self.0.to_le_bytes()[1] & 7
    }

    /// SC: the code within its type.
    #[must_use]
    pub fn code(self) -> u8 {
        self.0.to_le_bytes()[0]
    }
}

impl fmt::Debug for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "status type {} code {:#04x}", self.code_type(), self.code()),
        }
    }
}

/// The status field of a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NvmeStatus {
    /// What happened.
    pub code: StatusCode,
    /// CRD: which of the controller's three Command Retry Delay Times to wait before trying again; 0 = none. 2 bits.
    pub retry_delay: u8,
    /// M: the error log says more.
    pub more: bool,
    /// DNR: the same command would fail again.
    pub do_not_retry: bool,
}

impl NvmeStatus {
    /// All went well.
    pub const SUCCESS: NvmeStatus =
        NvmeStatus { code: StatusCode::SUCCESS, retry_delay: 0, more: false, do_not_retry: false };

    /// A failure that trying again will not change.
    #[must_use]
    pub const fn fatal(code: StatusCode) -> NvmeStatus {
        NvmeStatus { code, retry_delay: 0, more: false, do_not_retry: true }
    }

    /// A failure that may pass.
    #[must_use]
    pub const fn retryable(code: StatusCode) -> NvmeStatus {
        NvmeStatus { code, retry_delay: 0, more: false, do_not_retry: false }
    }

    /// Whether the command succeeded.
    #[must_use]
    pub fn is_success(self) -> bool {
        self.code == StatusCode::SUCCESS
    }

    /// As bytes 14 and 15 of a completion: bit 0 is the phase tag, which Fabrics does not use.
    #[must_use]
    pub fn to_u16(self) -> u16 {
        (self.code.0 & 0x7ff) << 1
            | u16::from(self.retry_delay & 3) << 12
            | u16::from(self.more) << 14
            | u16::from(self.do_not_retry) << 15
    }

    /// From bytes 14 and 15 of a completion.
    #[must_use]
    pub fn from_u16(field: u16) -> NvmeStatus {
        NvmeStatus {
            code: StatusCode(field >> 1 & 0x7ff),
            retry_delay: (field >> 12).to_le_bytes()[0] & 3,
            more: field & 1 << 14 != 0,
            do_not_retry: field & 1 << 15 != 0,
        }
    }

    /// What the layers above decide on, from what an NVMe controller said of an I/O command. `None` when the command succeeded.
    #[must_use]
    pub fn to_block_status(self) -> Option<Status> {
        Some(match self.code {
            StatusCode::SUCCESS => return None,
            StatusCode::INVALID_OPCODE => Status::Unsupported,
            StatusCode::INVALID_FIELD | StatusCode::LBA_OUT_OF_RANGE => Status::Invalid,
            StatusCode::CAPACITY_EXCEEDED => Status::NoSpace,
            StatusCode::NAMESPACE_WRITE_PROTECTED | StatusCode::OPERATION_DENIED => Status::ReadOnly,
            StatusCode::RESERVATION_CONFLICT | StatusCode::ABORTED_PREEMPT => Status::Conflict,
            StatusCode::ABORT_REQUESTED | StatusCode::ABORTED_SQ_DELETION | StatusCode::ABORTED_BY_HOST => {
                Status::Aborted
            }
            // In an I/O command set this is Attempted Write to Read Only Range.
            StatusCode::CONNECT_INVALID_PARAMETERS => Status::ReadOnly,
            code if code.code_type() == 3 => Status::Path,
            _ => Status::Media,
        })
    }

    /// What our target tells a host when a request failed.
    #[must_use]
    pub fn from_block_status(status: Status) -> NvmeStatus {
        match status {
            Status::Media => NvmeStatus::fatal(StatusCode::UNRECOVERED_READ_ERROR),
            Status::Path => NvmeStatus::retryable(StatusCode::INTERNAL_PATH_ERROR),
            Status::Timeout => NvmeStatus::retryable(StatusCode::COMMAND_INTERRUPTED),
            Status::NoSpace => NvmeStatus::fatal(StatusCode::CAPACITY_EXCEEDED),
            Status::ReadOnly => NvmeStatus::fatal(StatusCode::NAMESPACE_WRITE_PROTECTED),
            Status::Conflict => NvmeStatus::fatal(StatusCode::RESERVATION_CONFLICT),
            Status::Aborted => NvmeStatus::retryable(StatusCode::ABORT_REQUESTED),
            Status::Unsupported => NvmeStatus::fatal(StatusCode::INVALID_OPCODE),
            Status::Invalid => NvmeStatus::fatal(StatusCode::INVALID_FIELD),
        }
    }
}

impl fmt::Display for NvmeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if self.do_not_retry { f.write_str(" (do not retry)") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bits_are_where_the_specification_has_them() {
        let status =
            NvmeStatus { code: StatusCode::new(2, 0x81), retry_delay: 2, more: true, do_not_retry: true };
        // DNR 15, M 14, CRD 13:12, SCT 11:9, SC 8:1
        assert_eq!(status.to_u16(), 1 << 15 | 1 << 14 | 2 << 12 | 2 << 9 | 0x81 << 1);
        assert_eq!(status.code, StatusCode::UNRECOVERED_READ_ERROR);
        for field in 0..=u16::MAX {
            assert_eq!(NvmeStatus::from_u16(field).to_u16(), field & !1);
        }
    }

    #[test]
    fn every_block_status_survives_the_wire_or_becomes_one_that_means_the_same() {
        for status in Status::ALL {
            let back = NvmeStatus::from_block_status(status).to_block_status();
            let expected = if status == Status::Timeout { Status::Media } else { status };
            assert_eq!(back, Some(expected), "{}", status.name());
        }
        assert_eq!(NvmeStatus::SUCCESS.to_block_status(), None);
    }

    #[test]
    fn a_status_reads_well() {
        assert_eq!(
            NvmeStatus::fatal(StatusCode::CONNECT_INVALID_HOST).to_string(),
            "Connect Invalid Host (do not retry)"
        );
        assert_eq!(StatusCode(0x7c1).to_string(), "status type 7 code 0xc1");
    }
}
