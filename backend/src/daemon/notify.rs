//! Tells systemd, or whoever set NOTIFY_SOCKET, how the daemon is doing (`sd_notify(3)`).
//!
//! Nothing here is an error: without the variable nobody wants to know, and a service manager that has gone has gone. There is no
//! RELOADING: the configuration is read once.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Everything that can be served is served.
pub(super) fn ready() {
    send("READY=1\nSTATUS=Serving\n");
}

/// The start waits for what a predecessor has left: the manager is to be patient for so long.
pub(super) fn waiting(at_most: Duration) {
    send(&format!("STATUS=Starting\nEXTEND_TIMEOUT_USEC={}\n", at_most.as_micros()));
}

/// The end has begun, and takes up to `drain` from now on, and a bit for what was given up.
pub(super) fn stopping(drain: Duration) {
    let patience = drain + Duration::from_secs(10);
    send(&format!(
        "STOPPING=1\nSTATUS=Draining for up to {} s\nEXTEND_TIMEOUT_USEC={}\n",
        drain.as_secs(),
        patience.as_micros()
    ));
}

fn send(text: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    // A name that begins with @ is one of Linux's abstract names.
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(text.as_bytes(), &address));
    if let Err(error) = sent {
        log::warn!("systemd is not told how the daemon is: NOTIFY_SOCKET {}: {error}", name.display());
    }
}
