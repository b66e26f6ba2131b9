//! How a request fails: few kinds, because RAID and thin provisioning decide on them.

/// The world's failure of one request. Small and `Copy`: it travels on the hot path. Context is logged where it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// The medium could not give or take these blocks; another copy may.
    Media = 1,
    /// No path to the device, for longer than we may wait.
    Path,
    /// The device did not answer in time.
    Timeout,
    /// A thin device has no space left for this write.
    NoSpace,
    /// A write to something read-only.
    ReadOnly,
    /// A reservation of another host forbids it.
    Conflict,
    /// Given up on request: reset or end of the session.
    Aborted,
    /// The device cannot do this operation.
    Unsupported,
    /// The request itself is wrong: past the end, misaligned, empty.
    Invalid,
}

/// The end of a request.
pub type Outcome = Result<(), Status>;

impl Status {
    /// All kinds, for tables and counters.
    pub const ALL: [Status; 9] = [
        Status::Media,
        Status::Path,
        Status::Timeout,
        Status::NoSpace,
        Status::ReadOnly,
        Status::Conflict,
        Status::Aborted,
        Status::Unsupported,
        Status::Invalid,
    ];

    /// The name used in metrics and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Status::Media => "media",
            Status::Path => "path",
            Status::Timeout => "timeout",
            Status::NoSpace => "no_space",
            Status::ReadOnly => "read_only",
            Status::Conflict => "conflict",
            Status::Aborted => "aborted",
            Status::Unsupported => "unsupported",
            Status::Invalid => "invalid",
        }
    }
}
