//! RDMA as both sides use it: the driver, devices and what they know of memory, connections.
//!
//! Owns: everything between a queue pair's logic and the table of the verbs driver ([`hawser_verbs_abi`]). Must not know: what commands
//! are for.
//!
//! ```text
//!   driver ── libhawser_verbs.so, opened when RDMA is asked for; its table is all that is known of verbs
//!   domain ── a device in this process: which memory is registered with it, by which keys
//!   link ──── one connection: rdma_cm's id, its queue pair, memory of its own, windows; how it ends
//!   pinned ── memory that is taken away while a device has it
//!   arena ─── payload buffers of a target's connection, within its memory
//!   ready ─── a descriptor of theirs, awaited in the reactor's one io_uring
//!   private ─ what NVMe sends along with a connection's set-up; words ── errors, for people
//! ```

pub(crate) mod arena;
pub(crate) mod domain;
pub mod driver;
pub(crate) mod link;
mod pinned;
pub(crate) mod private;
mod ready;
pub(crate) mod words;

pub use pinned::watch_memory;
pub(crate) use ready::Readiness;

/// By which keys a target reaches the memory of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyPolicy {
    /// By a window of its own, over the bytes of that command, for as long as that is under way. Devices without windows (type 2B) are
    /// refused.
    #[default]
    Window,
    /// By the key of the whole region, which does not change: a target can read and write all of a guest's memory, at any time.
    Region,
}

impl KeyPolicy {
    /// The word in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            KeyPolicy::Window => "window",
            KeyPolicy::Region => "region",
        }
    }
}

impl std::str::FromStr for KeyPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<KeyPolicy, String> {
        Ok(match text {
            "window" => KeyPolicy::Window,
            "region" => KeyPolicy::Region,
            _ => return Err(format!("{text:?} is no kind of key, want window or region")),
        })
    }
}
