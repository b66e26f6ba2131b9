//! Moves a connection's bytes: one receive and one send at a time on its socket, and requests to its devices.
//!
//! A connection ends in two steps. First it is ended: its socket is shut down, and nothing more is begun. When its
//! operations and its requests are over it is quiet: it leaves its controller, and is gone. Requests at devices end by
//! themselves: a device may be shared, and aborting one host's requests may cost all others their way to it. They are
//! aborted when the target stops, or after [`ABORT_GRACE`].

use super::connection::{Action, Connection};
use super::rdma::{KEY_COMPLETIONS, KEY_EVENTS, RdmaWire};
use super::registry::ConnectionRef;
use super::{ABORT_GRACE, Shared};
use crate::nvme::features::EVENT_DISCOVERY_CHANGE;
use crate::simulated::is_broken;
use hawser_block::{Channel, Completion};
use hawser_runtime::{Event, Fd, Op, Runtime, Source, SourceId, TimerId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How long a peer may take from its connection to its Connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Grace on top of the keep-alive time-out: its unit.
const KEEP_ALIVE_GRACE: Duration = Duration::from_secs(1);

/// How long a Cross-Controller Reset is held before its host is told that it lasts: below what hosts give admin commands.
const RESET_HOLD: Duration = Duration::from_secs(2);

const RECEIVE: u32 = 0;
const SEND: u32 = 1;
const ALIVE: u32 = 2;
const ABORT: u32 = 3;

/// This reactor's connections.
#[derive(Default)]
struct Local {
    connections: RefCell<HashMap<u64, Rc<RefCell<Driver>>>>,
}

/// Calls `f` with a connection on its reactor, if it is still there.
pub(super) fn tell(connection: &ConnectionRef, f: impl FnOnce(&mut Driver, &Runtime) + Send + 'static) {
    let id = connection.id;
    connection.reactor.run(move |runtime| {
        let local = runtime.local::<Local>();
        let driver = local.connections.borrow().get(&id).cloned();
        if let Some(driver) = driver {
            f(&mut driver.borrow_mut(), runtime);
        }
    });
}

/// How connections are made quiet.
#[derive(Clone, Copy)]
enum Until {
    /// Their commands end by themselves.
    Ended,
    /// They end at once, for this reason.
    Closed(&'static str),
    /// They go on, but commands that last are aborted.
    AbortedIfNeeded,
}

/// What a connection's bytes go by.
enum Wire {
    Tcp(TcpWire),
    Rdma(Box<RdmaWire>),
}

/// A socket, with one receive and one send at a time.
struct TcpWire {
    fd: Fd,
    places: [libc::iovec; 2],
    message: libc::msghdr,
    receiving: bool,
    /// The length of the batch under way.
    sending: Option<usize>,
}

impl TcpWire {
    fn new(fd: Fd) -> TcpWire {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an all-zero msghdr is one without anything.
        let message = unsafe { std::mem::zeroed() };
        TcpWire { fd, places: [empty; 2], message, receiving: false, sending: None }
    }
}

/// A connection with its socket or queue pair.
pub(super) struct Driver {
    shared: Arc<Shared>,
    /// The position of our reactor, while we count among its I/O queues.
    place: Option<usize>,
    id: u64,
    /// Known as soon as the reactor has it.
    source: Option<SourceId>,
    wire: Wire,
    connection: Connection,
    /// By the connection's lanes.
    channels: Vec<Option<Box<dyn Channel>>>,
    ended: Vec<Completion>,
    /// The wire is done with.
    ending: bool,
    timer: Option<TimerId>,
}

impl Driver {
    /// Takes an accepted socket in.
    pub(super) fn start(
        runtime: &Runtime,
        shared: Arc<Shared>,
        id: u64,
        fd: Fd,
        (listener, place): (usize, usize),
    ) {
        let me = ConnectionRef { reactor: runtime.handle(), id };
        let connection = Connection::new(Arc::clone(&shared), me, listener, local_address(fd));
        Driver::start_with(runtime, shared, id, Wire::Tcp(TcpWire::new(fd)), connection, place);
    }

    /// Takes a queue pair in whose host was let in.
    pub(super) fn start_rdma(
        runtime: &Runtime,
        shared: Arc<Shared>,
        id: u64,
        mut wire: RdmaWire,
        (listener, place, local): (usize, usize, std::net::SocketAddr),
    ) {
        let me = ConnectionRef { reactor: runtime.handle(), id };
        let arena = wire.take_arena().expect("a new queue pair has its payload's memory");
        let connection = Connection::over_rdma(Arc::clone(&shared), me, listener, Some(local), arena);
        Driver::start_with(runtime, shared, id, Wire::Rdma(Box::new(wire)), connection, place);
    }

    fn start_with(
        runtime: &Runtime,
        shared: Arc<Shared>,
        id: u64,
        wire: Wire,
        connection: Connection,
        place: usize,
    ) {
        let driver = Rc::new(RefCell::new(Driver {
            shared,
            place: Some(place),
            id,
            source: None,
            wire,
            connection,
            channels: Vec::new(),
            ended: Vec::new(),
            ending: false,
            timer: None,
        }));
        let source = runtime.add_source(Rc::<RefCell<Driver>>::clone(&driver));
        let local = runtime.local::<Local>();
        local.connections.borrow_mut().insert(id, Rc::clone(&driver));
        let mut this = driver.borrow_mut();
        this.source = Some(source);
        if let Wire::Rdma(wire) = &mut this.wire {
            wire.start(runtime, source);
        }
        this.timer = Some(runtime.timer(source, runtime.now() + CONNECT_TIMEOUT, ALIVE));
        if this.shared.stopping.load(Ordering::Relaxed) {
            this.end(runtime, "the target stops");
        }
        this.go_on(runtime);
    }

    /// Does everything that can be done now.
    fn go_on(&mut self, runtime: &Runtime) {
        self.exchange(runtime);
        for action in self.connection.take_actions() {
            self.act(runtime, action);
        }
        if !self.ending {
            match &self.wire {
                Wire::Tcp(_) => self.transmit(runtime),
                Wire::Rdma(_) => self.move_data(runtime),
            }
        }
        let idle = match &self.wire {
            Wire::Tcp(wire) => !wire.receiving && wire.sending.is_none(),
            Wire::Rdma(wire) => wire.is_idle(),
        };
        if self.ending && idle && self.connection.is_quiet() {
            self.gone(runtime);
        }
    }

    /// The next send and receive on the socket.
    fn transmit(&mut self, runtime: &Runtime) {
        let source = self.source();
        let Wire::Tcp(wire) = &mut self.wire else { return };
        if wire.sending.is_none() {
            if let Some((message, len)) = self.connection.poll_transmit() {
                wire.sending = Some(len);
                // SAFETY: the connection keeps header, iovecs and payload until `transmitted`; we keep it until it is quiet.
                unsafe { runtime.submit(source, SEND, &Op::Sendmsg { fd: wire.fd, message }) };
            } else if self.connection.is_over() {
                // The last words are out.
                return self.end(runtime, "");
            }
        }
        let wanted = !self.connection.is_over() && !self.connection.is_congested();
        if !wire.receiving && wanted {
            let count = self.connection.receive_space(&mut wire.places);
            wire.message.msg_iov = wire.places.as_mut_ptr();
            wire.message.msg_iovlen = count;
            wire.receiving = true;
            let op = Op::Recvmsg { fd: wire.fd, message: &raw mut wire.message };
            // SAFETY: header and places are on the heap with us, and the space is the connection's; all stay while `receiving`.
            unsafe { runtime.submit(source, RECEIVE, &op) };
        }
    }

    /// What has completed on the queue pair, what follows from it at devices, and what is to be posted then.
    fn move_data(&mut self, runtime: &Runtime) {
        let connected = self.connection.is_connected();
        let Wire::Rdma(wire) = &mut self.wire else { return };
        if let Err(why) = wire.progress(&mut self.connection, runtime.now()) {
            return self.end(runtime, &why);
        }
        if self.connection.is_connected() != connected {
            self.check_alive(runtime);
        }
        self.exchange(runtime);
        for action in self.connection.take_actions() {
            self.act(runtime, action);
        }
        let Wire::Rdma(wire) = &mut self.wire else { return };
        if let Err(why) = wire.transmit(&mut self.connection) {
            return self.end(runtime, &why);
        }
        if self.connection.is_over() {
            self.end(runtime, "");
        }
    }

    /// Requests to their devices, and their ends back, until nothing moves.
    fn exchange(&mut self, runtime: &Runtime) {
        let source = self.source();
        loop {
            if self.connection.take_submitting() {
                let lanes = self.connection.lanes();
                if self.channels.len() < lanes.len() {
                    self.channels.resize_with(lanes.len(), || None);
                }
                for (lane, channel) in lanes.iter_mut().zip(&mut self.channels) {
                    if !lane.batch.is_empty() {
                        let channel = channel.get_or_insert_with(|| lane.device.channel(runtime, source));
                        channel.submit(&mut lane.batch);
                    }
                }
            }
            for channel in self.channels.iter_mut().flatten() {
                channel.reap(&mut self.ended);
            }
            if self.ended.is_empty() {
                return;
            }
            for completion in self.ended.drain(..) {
                self.connection.handle_completion(completion);
            }
        }
    }

    fn act(&self, runtime: &Runtime, action: Action) {
        match action {
            Action::Close(connections) => {
                for connection in connections {
                    tell(&connection, |driver, runtime| driver.end(runtime, "its controller was reset"));
                }
            }
            Action::AwaitQuiet(connections) => {
                self.when_quiet(runtime, connections, Until::Ended, 0, |driver, runtime, _| {
                    driver.connection.connected();
                    if !driver.ending {
                        driver.check_alive(runtime);
                    }
                });
            }
            Action::Keep { index, subsystem, position, fence } => {
                let me = ConnectionRef { reactor: runtime.handle(), id: self.id };
                let done: super::keeper::Done = Box::new(move |kept| {
                    tell(&me, move |driver, runtime| {
                        if kept && !fence.is_empty() {
                            let until = Until::AbortedIfNeeded;
                            driver.when_quiet(runtime, fence, until, index as u64, |driver, _, index| {
                                let index = usize::try_from(index).expect("we made it from an index");
                                driver.connection.reserved(index, true);
                            });
                        } else {
                            driver.connection.reserved(index, kept);
                        }
                        driver.go_on(runtime);
                    });
                });
                match &self.shared.keeper {
                    Some(keeper) => keeper.keep(subsystem, position, done),
                    None => done(true),
                }
            }
            Action::Notify { connections, notice, nsid } => {
                for connection in connections {
                    tell(&connection, move |driver, runtime| {
                        driver.connection.reservation_notice(notice, nsid);
                        driver.go_on(runtime);
                    });
                }
            }
            Action::Reset { id, connections } => {
                let why = Until::Closed("its host had it reset through another controller");
                self.when_quiet(runtime, connections, why, id, |driver, _, id| {
                    driver.connection.reset_ended(id)
                });
                let me = ConnectionRef { reactor: runtime.handle(), id: self.id };
                let later = runtime.clone();
                runtime.spawn(async move {
                    later.sleep(RESET_HOLD).await;
                    tell(&me, move |driver, runtime| {
                        driver.connection.reset_lasts(id);
                        driver.go_on(runtime);
                    });
                });
            }
        }
    }

    /// Calls `then` with `id` on this connection when the commands that `connections` have at devices now have ended. Those
    /// of them that are over take nothing more in.
    fn when_quiet(
        &self,
        runtime: &Runtime,
        connections: Vec<ConnectionRef>,
        until: Until,
        id: u64,
        then: fn(&mut Driver, &Runtime, u64),
    ) {
        let left = Arc::new(AtomicUsize::new(connections.len()));
        for connection in connections {
            let left = Arc::clone(&left);
            let me = ConnectionRef { reactor: runtime.handle(), id: self.id };
            let done = Box::new(move || {
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    tell(&me, move |driver, runtime| {
                        then(driver, runtime, id);
                        driver.go_on(runtime);
                    });
                }
            });
            let id = connection.id;
            connection.reactor.run(move |runtime| {
                let local = runtime.local::<Local>();
                let driver = local.connections.borrow().get(&id).cloned();
                match driver {
                    Some(driver) => {
                        let mut driver = driver.borrow_mut();
                        // What lies unread in its socket must not become commands after this answer.
                        if is_broken("reset_leaves_connections") {
                        } else if let Until::Closed(why) = until {
                            driver.end(runtime, why);
                        } else if driver.peer_has_closed() {
                            driver.end(runtime, "its host has closed it");
                        } else if driver.connection.controller().is_some_and(|c| c.is_closed()) {
                            // Its end is on its way here, and would come too late.
                            driver.end(runtime, "its association is over");
                        }
                        let barrier = driver.connection.add_barrier(done);
                        if let (Until::AbortedIfNeeded, Some(barrier)) = (until, barrier) {
                            driver.abort_later(runtime, barrier);
                        }
                    }
                    // Gone, and so quiet.
                    None => done(),
                }
            });
        }
    }

    /// Aborts our requests if somebody still waits at this barrier after a while. Our connection goes on.
    fn abort_later(&self, runtime: &Runtime, barrier: u64) {
        let me = ConnectionRef { reactor: runtime.handle(), id: self.id };
        let (later, after) = (runtime.clone(), self.abort_after());
        runtime.spawn(async move {
            later.sleep(after).await;
            tell(&me, move |driver, runtime| {
                if driver.connection.is_waited_for(barrier) {
                    let host = driver.host();
                    log::warn!(
                        "target: {host} waits to be preempted or reset for {} s: its commands under way are aborted",
                        after.as_secs()
                    );
                    driver.abort();
                    driver.go_on(runtime);
                }
            });
        });
    }

    /// Whose connection it is, for people.
    fn host(&self) -> &str {
        self.connection.controller().map_or("an unknown host", |controller| &controller.host.nqn)
    }

    /// Whether the host is known to have ended the connection, whatever of it is still to be taken in.
    fn peer_has_closed(&mut self) -> bool {
        match &mut self.wire {
            Wire::Tcp(wire) => peer_has_closed(wire.fd),
            Wire::Rdma(wire) => wire.peer_has_closed(),
        }
    }

    fn source(&self) -> SourceId {
        self.source.expect("set before anything is submitted")
    }

    /// A namespace may have changed.
    pub(super) fn namespace_changed(&mut self, runtime: &Runtime) {
        self.connection.handle_namespace_change();
        self.go_on(runtime);
    }

    /// The discovery log has changed, which concerns those that are connected to the discovery service.
    pub(super) fn discovery_changed(&mut self, runtime: &Runtime) {
        let discovery = self.connection.controller().is_some_and(|controller| controller.subsystem.is_none());
        if discovery && self.connection.is_connected() {
            self.notify(runtime, EVENT_DISCOVERY_CHANGE);
        }
    }

    /// Something has happened that the host may want to know: a bit of Asynchronous Event Configuration.
    pub(super) fn notify(&mut self, runtime: &Runtime, event: u32) {
        self.connection.notify(event);
        self.go_on(runtime);
    }

    /// Ends the connection, and with an admin queue's the association.
    pub(super) fn end(&mut self, runtime: &Runtime, why: &str) {
        if self.ending {
            return;
        }
        self.ending = true;
        let trouble = self.connection.take_trouble();
        if let Some(why) = trouble.as_ref().filter(|_| !self.connection.was_given_up())
            && let Some(count) = self.shared.broken.add()
        {
            log::warn!(
                "target: a connection of {} broke the protocol and is closed: {why}; {count} such connections so far",
                self.host()
            );
        }
        let trouble = trouble.or((!why.is_empty()).then(|| why.to_owned()));
        match (self.connection.controller(), trouble) {
            (Some(controller), trouble) if self.connection.is_admin() && controller.subsystem.is_some() => {
                let why = trouble.as_deref().unwrap_or("it closed its connection");
                let nqn = controller.subsystem.as_ref().map_or("discovery", |subsystem| &subsystem.nqn);
                log::info!(
                    "{nqn}: {} is disconnected, controller {}: {why}",
                    controller.host.nqn,
                    controller.cntlid
                );
            }
            (Some(controller), Some(why)) => {
                log::info!("target: a connection of {} is closed: {why}", controller.host.nqn);
            }
            // Anybody can make these.
            (None, Some(why)) => {
                if let Some(count) = self.shared.strays.add() {
                    log::info!(
                        "target: a connection is closed before its host said who it is: {why}; {count} such connections so far"
                    );
                }
            }
            (_, None) => {}
        }
        self.connection.close();
        // Before the host can see the end, so that its next Connect finds an association that is over.
        if self.connection.is_admin()
            && let Some(controller) = self.connection.controller()
        {
            for connection in controller.close() {
                tell(&connection, |driver, runtime| driver.end(runtime, "its association is over"));
            }
        }
        if let Some(timer) = self.timer.take() {
            runtime.cancel_timer(timer);
        }
        let source = self.source();
        match &mut self.wire {
            Wire::Tcp(wire) => runtime.shutdown(wire.fd),
            Wire::Rdma(wire) => wire.close(runtime, source),
        }
        if !self.connection.is_quiet() {
            self.timer = Some(runtime.timer(self.source(), runtime.now() + self.abort_after(), ABORT));
        }
        // Operations may be over already; whether we are quiet is seen in the next pass.
        runtime.wake(self.source());
    }

    /// How long requests are waited for before they are aborted.
    fn abort_after(&self) -> Duration {
        let subsystem = self.connection.controller().and_then(|controller| controller.subsystem.as_ref());
        subsystem.map_or(ABORT_GRACE, |subsystem| subsystem.quiescing().abort_after)
    }

    /// Makes room for newer connections, unless the Connect has come by now.
    pub(super) fn end_stranger(&mut self, runtime: &Runtime) {
        if self.connection.controller().is_none() {
            self.end(runtime, "no Connect came before many newer connections");
        }
    }

    /// Ends the requests that are at devices as soon as that can be.
    pub(super) fn abort(&mut self) {
        for channel in self.channels.iter_mut().flatten() {
            channel.abort();
        }
    }

    /// Nothing of the connection is under way any more.
    fn gone(&mut self, runtime: &Runtime) {
        if let Some(timer) = self.timer.take() {
            runtime.cancel_timer(timer);
        }
        self.leave_place();
        if let Some(controller) = self.connection.controller() {
            controller.leave(self.id);
        }
        self.channels.clear();
        if let Wire::Tcp(wire) = &self.wire {
            runtime.close(wire.fd);
        }
        runtime.remove_source(self.source());
        runtime.local::<Local>().connections.borrow_mut().remove(&self.id);
        self.shared.forget(self.id);
    }

    /// From now on we are no I/O queue of our reactor.
    fn leave_place(&mut self) {
        if let Some(place) = self.place.take() {
            self.shared.places[place].io_queues.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Looks whether the host still lives, and when to look again. Called when it has connected, too.
    fn check_alive(&mut self, runtime: &Runtime) {
        if self.connection.is_admin() {
            self.leave_place();
        }
        if let Some(timer) = self.timer.take() {
            runtime.cancel_timer(timer);
        }
        if !self.connection.is_connected() {
            self.end(runtime, "no Connect came in time");
            return;
        }
        let Some(controller) = self.connection.controller().filter(|_| self.connection.is_admin()) else {
            return;
        };
        let keep_alive = Duration::from_millis(u64::from(controller.keep_alive_ms.load(Ordering::Relaxed)));
        if keep_alive.is_zero() {
            // It may be set later.
            let later = runtime.now() + CONNECT_TIMEOUT;
            self.timer = Some(runtime.timer(self.source(), later, ALIVE));
            return;
        }
        let deadline = controller.last_heard() + keep_alive + KEEP_ALIVE_GRACE;
        if runtime.now() >= deadline {
            self.end(runtime, "keep-alive expired");
        } else {
            self.timer = Some(runtime.timer(self.source(), deadline, ALIVE));
        }
    }
}

impl Source for Driver {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                Event::Op { key: key @ (KEY_EVENTS | KEY_COMPLETIONS), completed } => {
                    let source = self.source();
                    let Wire::Rdma(wire) = &mut self.wire else { continue };
                    if let Err(why) = wire.handle(runtime, source, key, completed) {
                        self.end(runtime, &why);
                    }
                }
                Event::Op { key: RECEIVE, completed } => {
                    if let Wire::Tcp(wire) = &mut self.wire {
                        wire.receiving = false;
                    }
                    match usize::try_from(completed.result) {
                        Ok(count) if count > 0 && !self.ending => {
                            let connected = self.connection.is_connected();
                            self.connection.handle_received(count, runtime.now());
                            if self.connection.is_connected() != connected {
                                self.check_alive(runtime);
                            }
                        }
                        // The host has closed it, or it is broken.
                        _ => self.end(runtime, ""),
                    }
                }
                Event::Op { key: SEND, completed } => {
                    let Wire::Tcp(wire) = &mut self.wire else { continue };
                    let whole = usize::try_from(completed.result).ok() == wire.sending.take();
                    self.connection.transmitted();
                    if !whole {
                        self.end(runtime, "");
                    }
                }
                Event::Op { .. } => {}
                Event::Timer { key: ABORT } => {
                    self.timer = None;
                    log::warn!(
                        "target: a connection of {} has ended, and the device still has its commands: they are aborted",
                        self.host()
                    );
                    self.abort();
                }
                // One that was due when the connection ended may still come.
                Event::Timer { .. } if self.ending => {}
                Event::Timer { .. } => self.check_alive(runtime),
            }
        }
        self.go_on(runtime);
    }

    fn peek(&mut self) -> bool {
        match &mut self.wire {
            Wire::Tcp(_) => false,
            Wire::Rdma(wire) => wire.peek(),
        }
    }

    fn arm(&mut self) -> bool {
        match &mut self.wire {
            Wire::Tcp(_) => false,
            Wire::Rdma(wire) => wire.arm(),
        }
    }
}

/// Whether the kernel knows already that the peer has closed or reset this connection, whatever is still to be read.
fn peer_has_closed(fd: Fd) -> bool {
    const ESTABLISHED: u8 = 1;
    // The first byte of `tcp_info` is the state, and the kernel gives as much as is asked for.
    let mut state = 0u8;
    let mut len: libc::socklen_t = 1;
    // SAFETY: `state` is writable for the one byte that `len` says.
    let result = unsafe {
        libc::getsockopt(fd.0, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut state).cast(), &raw mut len)
    };
    result == 0 && state != ESTABLISHED
}

/// The address that the peer dialled.
fn local_address(fd: Fd) -> Option<std::net::SocketAddr> {
    use std::os::fd::FromRawFd;
    // SAFETY: the socket is ours and open; the wrapper is not dropped, so that it stays open.
    let stream = std::mem::ManuallyDrop::new(unsafe { std::net::TcpStream::from_raw_fd(fd.0) });
    stream.local_addr().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_connection_that_its_peer_closed_is_known_before_its_bytes_are_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, _) = listener.accept().unwrap();
        host.write_all(b"a command").unwrap();
        assert!(!peer_has_closed(Fd(here.as_raw_fd())));
        drop(host);
        assert!(peer_has_closed(Fd(here.as_raw_fd())));
    }
}
