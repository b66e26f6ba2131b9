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
use std::time::Duration;

/// Requests to connect that may wait.
const BACKLOG: i32 = 1024;
/// How often a device that was removed is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

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
                while self.serve(&own, &shared, &mut end, (index, address)).await == Over::Removed {
                    // The device waits until its ids are closed.
                    dispose(&own, end);
                    let Either::First(back) = first(listen_again(&own, address), self.stop.next()).await
                    else {
                        return;
                    };
                    log::info!("target: at rdma://{address}: listening again");
                    end = back;
                }
                dispose(&own, end);
            });
        });
    }

    /// Lets hosts in until it is stopped, or cannot go on.
    async fn serve(
        &self,
        runtime: &Runtime,
        shared: &Arc<Shared>,
        end: &mut End,
        (index, address): (usize, SocketAddr),
    ) -> Over {
        let ready = Readiness::new(runtime, end.channel.fd());
        loop {
            match end.channel.event() {
                Ok(Some(event)) if event.kind == event::CONNECT_REQUEST => {
                    incoming(runtime, shared, &event, (index, address));
                    continue;
                }
                Ok(Some(event)) => {
                    log::warn!("target: at rdma://{address}: {}", words::event(&event));
                    if event.kind == event::DEVICE_REMOVAL {
                        return Over::Removed;
                    }
                    continue;
                }
                Ok(None) => {}
                Err(code) => {
                    log::error!("target: at rdma://{address}: rdma_cm: {}", words::errno(code));
                    return Over::Stopped;
                }
            }
            if let Either::Second(()) = first(ready.fired(), self.stop.next()).await {
                return Over::Stopped;
            }
        }
    }
}

/// Why a listener lets nobody in any more.
#[derive(PartialEq, Eq)]
enum Over {
    Stopped,
    /// Its device was removed, and may come back.
    Removed,
}

/// Listens at the address as soon as a device leads there again.
async fn listen_again(runtime: &Runtime, address: SocketAddr) -> End {
    loop {
        runtime.sleep(LOOK_AGAIN).await;
        let found = Arc::new(Mailbox::default());
        let post = Arc::clone(&found);
        let look = move || {
            let listening = driver::table().ok().and_then(|table| {
                let mut end = End::open(table).ok()?;
                end.listen(&address, BACKLOG).ok().map(|_| end)
            });
            post.post(listening);
        };
        if runtime.on_thread("rdma-listen", look).is_ok()
            && let Some(end) = found.next().await
        {
            return end;
        }
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
    let own = Arc::clone(shared);
    let take = move || {
        let (asked, shared) = (asked, own);
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
        let why = format!("a host cannot be let in: {error}");
        match admitted {
            Some((id, at)) => shared.expel(id, at, &why),
            None => log::warn!("target: {why}"),
        }
    }
}
