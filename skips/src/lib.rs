//! How a test says that it could not be run here, and why. libtest knows passed, failed and ignored, and swallows what a test
//! that passes prints: a test that returned early counted as passed.
//!
//! Each such test adds a line to the file that [`FILE`] names. `cargo xtask test` sets it, shows the lines, and counts their
//! tests as skipped.

use std::io::Write;
use std::panic::Location;

/// The environment variable that names the file.
pub const FILE: &str = "HAWSER_SKIPS";

/// Says that the calling test, or a part of it, is skipped; the caller returns.
///
/// # Panics
/// When the file cannot be written: a skip that nobody sees is a failure.
#[track_caller]
pub fn skip(reason: impl std::fmt::Display) {
    let caller = Location::caller();
    let thread = std::thread::current();
    // libtest names a test's thread after it, unless it runs all of them on its own.
    let test = thread.name().filter(|name| *name != "main").unwrap_or("a test");
    // One write: other tests add theirs at the same time.
    let reason = reason.to_string().replace('\n', " ");
    let line = format!("{test} ... skipped ({}:{}: {reason})\n", caller.file(), caller.line());
    print!("{line}");
    let Some(file) = std::env::var_os(FILE) else { return };
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .expect("the file that HAWSER_SKIPS names can be written");
    file.write_all(line.as_bytes()).expect("the file that HAWSER_SKIPS names can be written");
}
