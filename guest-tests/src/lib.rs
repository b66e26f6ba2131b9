//! Real VMs against real targets: guest images, QEMU, the guest's shell, hawser daemons, and the tests made of them.
//!
//! Owns: everything that starts a process for a test or for the demo, and everything that removes its traces.
//! Must not know: hawser's crates; it meets the binary as a user does, by its command line, sockets and API.
//! Invariants: see [`process`] (children die with us) and [`scratch`] (folders are swept).

pub mod accel;
pub mod daemon;
pub mod fio;
pub mod image;
pub mod json;
pub mod lab;
pub mod pools;
pub mod process;
pub mod qemu;
pub mod scratch;
pub mod shell;
pub mod soak;
pub mod suite;

use std::sync::OnceLock;
use std::time::Instant;

/// The result of a step; an error is one text for a person.
pub type Result<T> = std::result::Result<T, String>;

static STARTED: OnceLock<Instant> = OnceLock::new();

/// Says on standard error what begins now, and when, in seconds since the first such line.
pub fn progress(what: &str) {
    let seconds = STARTED.get_or_init(Instant::now).elapsed().as_secs_f64();
    eprintln!("[{seconds:6.1} s] {what}");
}
