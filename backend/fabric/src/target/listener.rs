//! Where hosts ask to be let in over RDMA.
//!
//! Owns: the listening id, and the way of a request to connect from its event to a reactor. What of that takes a device its time is done
//! on threads; what comes too fast is refused as over TCP.

use super::Shared;
use super::driver::Driver;
use super::rdma::Incoming;
use crate::initiator::signal::{Either, Mailbox, first};
use crate::rdma::link::{End, dispose};
use crate::rdma::private::Reject;
use crate::rdma::{Readiness, driver, words};
use hawser_runtime::{ReactorHandle, Runtime};
use hawser_verbs_abi::{CmEvent, Table, event};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Requests to connect that may wait.
const BACKLOG: i32 = 1024;

/// A listening id. The first that accepts takes it.
pub(super) struct RdmaListener {
    pub(super) fd: i32,
    end: Mutex<Option<End>>,
    stop: Mailbox<()>,
}

impl RdmaListener {
    /// Listens at an address of an RDMA device; the port, which is another than asked for where that was 0. Slow: not on a reactor.
    pub(super) fn bind(address: &SocketAddr) -> Result<(u16, RdmaListener), String> {
        let table = driver::table()?;
        let mut end = End::open(table).map_err(|code| words::no_device(table, &words::errno(code)))?;
        let port = end.listen(address, BACKLOG).map_err(|code| match -code {
            libc::ENODEV | libc::EADDRNOTAVAIL => words::no_device(table, &words::errno(code)),
            _ => words::errno(code),
        })?;
        let fd = end.channel.fd();
        Ok((port, RdmaListener { fd, end: Mutex::new(Some(end)), stop: Mailbox::default() }))
    }

    /// Ends the accepting.
    pub(super) fn stop(&self) {
        self.stop.post(());
    }

    /// Lets hosts in until it is stopped, at the listener `index`.
    pub(super) fn accept(
        self: Arc<RdmaListener>,
        shared: &Arc<Shared>,
        acceptor: &ReactorHandle,
        (index, address): (usize, SocketAddr),
    ) {
        let Some(mut end) = self.end.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let shared = Arc::clone(shared);
        acceptor.run(move |runtime| {
            let own = runtime.clone();
            runtime.spawn(async move {
                let ready = Readiness::new(&own, end.channel.fd());
                loop {
                    match end.channel.event() {
                        Ok(Some(event)) if event.kind == event::CONNECT_REQUEST => {
                            incoming(&own, &shared, &event, (index, address));
                            continue;
                        }
                        Ok(Some(event)) => {
                            log::warn!("target: at rdma://{address}: {}", words::event(&event));
                            continue;
                        }
                        Ok(None) => {}
                        Err(code) => {
                            log::error!("target: at rdma://{address}: rdma_cm: {}", words::errno(code));
                            break;
                        }
                    }
                    if let Either::Second(()) = first(ready.fired(), self.stop.next()).await {
                        break;
                    }
                }
                drop(ready);
                dispose(&own, end);
            });
        });
    }
}

/// A host's end, until a thread has it: it is refused if there is none.
struct Asked {
    table: &'static Table,
    event: CmEvent,
}

// SAFETY: the event's id is a handle that nobody else has.
unsafe impl Send for Asked {}

fn incoming(runtime: &Runtime, shared: &Arc<Shared>, event: &CmEvent, (index, address): (usize, SocketAddr)) {
    let Ok(table) = driver::table() else { return };
    let asked = Asked { table, event: *event };
    let admitted = shared.admit();
    let shared = Arc::clone(shared);
    let take = move || {
        let asked = asked;
        // SAFETY: the event is a request to connect, and this is the only place that takes it.
        let incoming = unsafe { Incoming::take(asked.table, &asked.event) };
        let Some((id, at)) = admitted else {
            if let Ok(incoming) = incoming {
                incoming.reject(Reject::Resources);
            }
            return;
        };
        match incoming.and_then(|incoming| incoming.accept(asked.table)) {
            Err(why) => shared.expel(id, at, &why),
            Ok(wire) => {
                let reactor = shared.places[at].reactor.clone();
                reactor
                    .run(move |runtime| Driver::start_rdma(runtime, shared, id, wire, (index, at, address)));
            }
        }
    };
    if let Err(error) = runtime.on_thread("rdma-accept", take) {
        // The id stays; its host gives up by itself.
        log::warn!("target: a host cannot be let in: {error}");
    }
}
