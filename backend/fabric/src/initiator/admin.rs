//! The admin queue: commands as straight-line code, one future each.

use super::meter::Loss;
use super::queue::{Answer, Transfer};
use super::signal::within;
use super::socket::ConnectedQueue;
use super::transport::Connection;
use crate::nvme::ana::{self, AnaLog, AnaState};
use crate::nvme::cross_reset::{ControllerInstance, IMMEDIATE_SUCCESS, ResetEntry, ResetLog};
use crate::nvme::discovery::{Entry, Header};
use crate::nvme::fabrics::Property;
use crate::nvme::properties::{CC_SHUTDOWN_NORMAL, CC_START, CSTS_FATAL, CSTS_READY, Capabilities, offset};
use crate::nvme::{Sqe, StatusCode, features, identify, log as log_page};
use hawser_block::Buffers;
use hawser_runtime::buffers::AlignedBuffer;
use hawser_runtime::{Event, Runtime, Slab, Source, SourceId};
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// Entries of the admin queue: a few commands, a keep-alive and an event request.
pub(crate) const ADMIN_ENTRIES: u16 = 32;
/// How long an admin command may take; as Linux's admin_timeout.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(60);

/// What a controller says when it is asked to reset another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reset {
    /// Nothing of the other is or will be executed.
    Done,
    /// The log of resets will tell.
    UnderWay,
    /// It knows no such controller: nothing is proved.
    Unknown,
}

/// The data of a command.
#[derive(Clone, Copy)]
enum Moves<'a> {
    /// So many bytes come.
    ToHost(u32),
    /// These go.
    ToController(&'a [u8]),
}

impl Moves<'_> {
    const NOTHING: Moves<'static> = Moves::ToHost(0);

    fn len(self) -> u32 {
        match self {
            Moves::ToHost(len) => len,
            Moves::ToController(bytes) => crate::nvme::bytes::low32(bytes.len() as u64),
        }
    }
}

/// How a command ended, or why it will not.
type CommandResult = Result<Answer, String>;

/// One command that somebody awaits, and the memory for its data.
struct Wait {
    answer: Option<CommandResult>,
    waker: Option<Waker>,
    /// The command's data, and the iovec that names it. Kept until the command has ended, whoever waits.
    data: Option<(AlignedBuffer, Box<libc::iovec>)>,
    abandoned: bool,
}

struct Inner {
    /// `None` only until it is made, which takes the source's name.
    connection: Option<Connection<usize>>,
    waits: Slab<Wait>,
    lost: Option<String>,
    loss: Option<Loss>,
    lost_waker: Option<Waker>,
}

impl Inner {
    fn connection(&mut self) -> &mut Connection<usize> {
        self.connection.as_mut().expect("made with the source")
    }

    fn deliver(&mut self) {
        let Some(connection) = &mut self.connection else { return };
        for ended in connection.ended() {
            Self::finish(&mut self.waits, ended.user, Ok(ended.answer));
        }
        if self.lost.is_none()
            && let Some(error) = connection.error()
        {
            self.lost = Some(error.to_owned());
            self.loss = Some(connection.loss());
            connection.close();
        }
        if let Some(lost) = &self.lost
            && connection.is_quiet()
        {
            for (key, _) in connection.drain() {
                Self::finish(&mut self.waits, key, Err(lost.clone()));
            }
        }
        if self.lost.is_some()
            && let Some(waker) = self.lost_waker.take()
        {
            waker.wake();
        }
    }

    fn finish(waits: &mut Slab<Wait>, key: usize, answer: CommandResult) {
        let Some(wait) = waits.get_mut(key) else { return };
        if wait.abandoned {
            waits.remove(key);
            return;
        }
        wait.answer = Some(answer);
        if let Some(waker) = wait.waker.take() {
            waker.wake();
        }
    }
}

impl Source for Inner {
    fn poll(&mut self, _: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            if let Event::Op { key, completed } = event {
                self.connection().handle(key, completed);
            }
        }
        self.connection().progress();
        self.deliver();
    }

    fn peek(&mut self) -> bool {
        self.connection().peek()
    }

    fn arm(&mut self) -> bool {
        self.connection().arm()
    }
}

const IDENTIFY_LEN: u32 = 4096;

fn identify_sqe(cns: u8, nsid: u32) -> Sqe {
    Sqe::identify(cns, nsid, crate::nvme::Sgl::NONE)
}

fn whole(what: &str, data: Vec<u8>) -> Result<Box<[u8; identify::LEN]>, String> {
    Box::try_from(data.into_boxed_slice()).map_err(|_| format!("{what}: short data"))
}

/// An admin queue that is connected. Dropping it closes the connection.
pub(crate) struct Admin {
    runtime: Runtime,
    id: SourceId,
    inner: Rc<RefCell<Inner>>,
}

impl Admin {
    /// Takes over a connected admin queue.
    pub(crate) fn new(runtime: &Runtime, queue: ConnectedQueue) -> Admin {
        let inner = Rc::new(RefCell::new(Inner {
            connection: None,
            waits: Slab::default(),
            lost: None,
            loss: None,
            lost_waker: None,
        }));
        let id = runtime.add_source(Rc::clone(&inner) as Rc<RefCell<dyn Source>>);
        inner.borrow_mut().connection = Some(Connection::new(runtime, id, 0, queue, ADMIN_ENTRIES - 1));
        Admin { runtime: runtime.clone(), id, inner }
    }

    /// Sends a command, for whose answer there is no limit.
    async fn command_unlimited(&self, sqe: Sqe, moves: Moves<'_>) -> Result<(Answer, Vec<u8>), String> {
        let key = {
            let mut inner = self.inner.borrow_mut();
            if let Some(lost) = &inner.lost {
                return Err(lost.clone());
            }
            if inner.connection().room() == 0 {
                return Err("too many admin commands".to_owned());
            }
            let len = moves.len();
            let data = (len > 0).then(|| {
                let memory = AlignedBuffer::new(len as usize);
                if let Moves::ToController(bytes) = moves {
                    // SAFETY: the buffer is new, and as long as `bytes`, which is elsewhere.
                    unsafe { memory.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
                }
                let iovec = Box::new(libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: memory.len() });
                (memory, iovec)
            });
            // SAFETY: memory and iovec are on the heap, kept in the slab until the command has ended or was drained; the
            // iovec names `len` bytes of it.
            let buffers = data.as_ref().map(|(_, iovec)| unsafe { Buffers::new(&raw const **iovec, 1, len) });
            let transfer = match (buffers, moves) {
                (None, _) => Transfer::None,
                (Some(buffers), Moves::ToHost(_)) => Transfer::ToHost(buffers),
                (Some(buffers), Moves::ToController(_)) => Transfer::FromHost(buffers),
            };
            let key = inner.waits.insert(Wait { answer: None, waker: None, data, abandoned: false });
            inner.connection().submit(sqe, transfer, key);
            inner.connection().flush();
            key
        };
        let mut waiting = Waiting { admin: self, key, done: false };
        poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            let wait = inner.waits.get_mut(key).expect("a wait lives as long as its future");
            let Some(answer) = wait.answer.take() else {
                wait.waker = Some(cx.waker().clone());
                return Poll::Pending;
            };
            let data = wait.data.take();
            inner.waits.remove(key);
            waiting.done = true;
            Poll::Ready(answer.map(|answer| {
                let data = data.map_or(Vec::new(), |(memory, _)| {
                    // SAFETY: the command has ended: nothing writes to its memory any more.
                    unsafe { memory.slice(0, memory.len()) }.to_vec()
                });
                (answer, data)
            }))
        })
        .await
    }

    /// Sends a command, whose answer may have `read_len` bytes of data.
    ///
    /// # Errors
    /// When the connection is lost, no answer comes in time, or the controller says no.
    pub(crate) async fn command(
        &self,
        what: &str,
        sqe: Sqe,
        read_len: u32,
    ) -> Result<(u64, Vec<u8>), String> {
        let (answer, data) = self.answer(what, sqe, Moves::ToHost(read_len)).await?;
        if answer.status.is_success() {
            Ok((answer.result, data))
        } else {
            Err(format!("{what}: {}", answer.status))
        }
    }

    /// Tells the controller what this host can do with its answers: wait as they say (ACRE).
    ///
    /// # Errors
    /// As [`Admin::command`].
    pub(crate) async fn set_host_behavior(&self) -> Result<(), String> {
        let what = "say that retry delays are waited for";
        let sqe = Sqe::set_features(features::id::HOST_BEHAVIOR, 0);
        let mut data = [0; features::HOST_BEHAVIOR_LEN];
        data[0] = features::RETRY_DELAYS_ENABLED;
        let (answer, _) = self.answer(what, sqe, Moves::ToController(&data)).await?;
        if answer.status.is_success() { Ok(()) } else { Err(format!("{what}: {}", answer.status)) }
    }

    /// Sends a command and awaits the controller's answer, whatever it is.
    async fn answer(&self, what: &str, sqe: Sqe, moves: Moves<'_>) -> Result<(Answer, Vec<u8>), String> {
        let answered = within(&self.runtime, ADMIN_TIMEOUT, self.command_unlimited(sqe, moves)).await;
        answered.ok_or_else(|| format!("{what}: no answer in time"))?
    }

    /// Awaits the next asynchronous event; `None` when the controller takes no such request.
    pub(crate) async fn event(&self) -> Result<Option<log_page::AsyncEvent>, String> {
        let (answer, _) = self.command_unlimited(Sqe::async_event_request(), Moves::NOTHING).await?;
        let dword = crate::nvme::bytes::low32(answer.result);
        Ok(answer.status.is_success().then(|| log_page::AsyncEvent::from_dword(dword)))
    }

    /// Whether the target ended the connection, and so knows that the association is over.
    pub(crate) fn was_ended_by_target(&self) -> bool {
        self.inner.borrow_mut().connection().was_ended_by_target()
    }

    /// Why the connection was lost, if it was.
    pub(crate) fn loss(&self) -> Option<Loss> {
        self.inner.borrow().loss
    }

    /// Awaits the loss of the connection.
    pub(crate) async fn lost(&self) -> String {
        poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            match inner.lost.clone() {
                Some(lost) => Poll::Ready(lost),
                None => {
                    inner.lost_waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Identify: 4096 bytes.
    pub(crate) async fn identify(
        &self,
        what: &str,
        cns: u8,
        nsid: u32,
    ) -> Result<Box<[u8; identify::LEN]>, String> {
        let (_, data) = self.command(what, identify_sqe(cns, nsid), IDENTIFY_LEN).await?;
        whole(what, data)
    }

    /// Identify, where older controllers may not know what is asked for: `None` when this one says no. A connection that is
    /// lost meanwhile is an error: it says nothing about the controller.
    pub(crate) async fn identify_if_known(
        &self,
        what: &str,
        cns: u8,
        nsid: u32,
    ) -> Result<Option<Box<[u8; identify::LEN]>>, String> {
        let (answer, data) = self.answer(what, identify_sqe(cns, nsid), Moves::ToHost(IDENTIFY_LEN)).await?;
        if answer.status.is_success() { whole(what, data).map(Some) } else { Ok(None) }
    }

    /// Starts the controller: CC.EN, then waits for CSTS.RDY. Returns its capabilities.
    pub(crate) async fn enable(&self) -> Result<Capabilities, String> {
        let (cap, _) = self.command("read CAP", Property::get(offset::CAP, true), 0).await?;
        let cap = Capabilities::from_u64(cap);
        self.command("set CC.EN", Property::set(offset::CC, false, u64::from(CC_START)), 0).await?;
        // CAP.TO is in 500 ms (base 3.1.3.1); at least a try.
        let deadline = self.runtime.now() + Duration::from_millis(500) * u32::from(cap.timeout.max(1));
        loop {
            let (csts, _) = self.command("read CSTS", Property::get(offset::CSTS, false), 0).await?;
            let csts = crate::nvme::bytes::low32(csts);
            if csts & CSTS_FATAL != 0 {
                return Err("the controller reports a fatal error (CSTS.CFS)".to_owned());
            }
            if csts & CSTS_READY != 0 {
                return Ok(cap);
            }
            if self.runtime.now() >= deadline {
                return Err("the controller did not become ready in time (CSTS.RDY)".to_owned());
            }
            self.runtime.sleep(Duration::from_millis(10)).await;
        }
    }

    /// Resets the controller: clears CC.EN, and waits until CSTS.RDY is clear, for at most `limit`. With success no command
    /// of its I/O queues is under way any more, where the controller keeps to the specification (base 3.5.3); ours does,
    /// Linux's nvmet clears RDY at once.
    ///
    /// # Errors
    /// When it cannot be told, or not in time.
    pub(crate) async fn reset(&self, limit: Duration) -> Result<(), String> {
        let reset = async {
            self.command("clear CC.EN", Property::set(offset::CC, false, 0), 0).await?;
            loop {
                let (csts, _) = self.command("read CSTS", Property::get(offset::CSTS, false), 0).await?;
                if crate::nvme::bytes::low32(csts) & CSTS_READY == 0 {
                    return Ok(());
                }
                self.runtime.sleep(Duration::from_millis(10)).await;
            }
        };
        let reset = within(&self.runtime, limit, reset).await;
        reset.unwrap_or_else(|| Err("the controller was not reset in time".to_owned()))
    }

    /// Has another controller of the subsystem reset.
    ///
    /// # Errors
    /// When the controller does not do it.
    pub(crate) async fn reset_other(&self, other: &ControllerInstance) -> Result<Reset, String> {
        let what = "reset the lost controller";
        let (answer, _) = self.answer(what, other.reset(), Moves::NOTHING).await?;
        let immediate = crate::nvme::bytes::low32(answer.result) & IMMEDIATE_SUCCESS != 0;
        match answer.status.code {
            StatusCode::SUCCESS if immediate => Ok(Reset::Done),
            StatusCode::SUCCESS | StatusCode::CONTROLLER_RESET_IN_PROGRESS => Ok(Reset::UnderWay),
            StatusCode::INVALID_FIELD => Ok(Reset::Unknown),
            _ => Err(format!("{what}: {}", answer.status)),
        }
    }

    /// How the resets go that are under way. Those that have ended are told once: the controller may forget them then.
    pub(crate) async fn resets(&self) -> Result<Vec<ResetEntry>, String> {
        let (id, len) = (log_page::id::CROSS_CONTROLLER_RESET, ResetLog::LEN_MAX);
        let sqe = Sqe::get_log_page(id, 0, 0, len, true, crate::nvme::Sgl::NONE);
        let sqe = sqe.with_log_specific(ResetLog::REMOVE_COMPLETED);
        let (_, data) = self.command("read the log of resets", sqe, len).await?;
        Ok(ResetLog::from_bytes(&data).entries)
    }

    /// The asymmetric access of the namespaces in group `group`; `None` when the log does not have it.
    pub(crate) async fn ana_state(&self, group: u32, len: u32) -> Result<Option<AnaState>, String> {
        let what = "read the ANA log page";
        let sqe = Sqe::get_log_page(log_page::id::ANA, 0, 0, len, false, crate::nvme::Sgl::NONE);
        let (_, data) = self.command(what, sqe.with_log_specific(ana::GROUPS_ONLY), len).await?;
        let log = AnaLog::from_bytes(&data).map_err(|error| error.to_string())?;
        Ok(log.state_of(group))
    }

    /// Tells the controller that we leave in order. Best effort.
    pub(crate) async fn shut_down(&self) {
        let cc = u64::from(CC_START | CC_SHUTDOWN_NORMAL);
        let sqe = Property::set(offset::CC, false, cc);
        let _ =
            within(&self.runtime, Duration::from_secs(1), self.command_unlimited(sqe, Moves::NOTHING)).await;
    }

    /// The discovery log, read until it did not change in between.
    pub(crate) async fn discovery_log(&self) -> Result<Vec<Entry>, String> {
        /// More than any target has; a bound on what a peer can make us read.
        const RECORDS_MAX: u64 = 4096;
        let page = |offset: u64, len: usize| {
            let len = crate::nvme::bytes::low32(len as u64);
            let id = log_page::id::DISCOVERY;
            (Sqe::get_log_page(id, 0, offset, len, false, crate::nvme::Sgl::NONE), len)
        };
        for _ in 0..10 {
            let header = self.discovery_header(page(0, Header::LEN)).await?;
            if header.records > RECORDS_MAX {
                return Err(format!("discovery log page: NUMREC is {}, too many", header.records));
            }
            let mut entries = Vec::new();
            for record in 0..header.records {
                let at = Header::LEN as u64 + record * Entry::LEN as u64;
                let (sqe, len) = page(at, Entry::LEN);
                let (_, data) = self.command("read the discovery log", sqe, len).await?;
                let data: &[u8; Entry::LEN] = data.as_slice().try_into().map_err(|_| "short data")?;
                entries.push(Entry::from_bytes(data).map_err(|error| error.to_string())?);
            }
            if self.discovery_header(page(0, Header::LEN)).await?.generation == header.generation {
                return Ok(entries);
            }
        }
        Err("the discovery log keeps changing".to_owned())
    }

    async fn discovery_header(&self, (sqe, len): (Sqe, u32)) -> Result<Header, String> {
        let (_, data) = self.command("read the discovery log", sqe, len).await?;
        let data: &[u8; Header::LEN] = data.as_slice().try_into().map_err(|_| "short data")?;
        Header::from_bytes(data).map_err(|error| error.to_string())
    }

    /// Gives the connection up and awaits the end of its operations.
    pub(crate) async fn close(&self) {
        self.inner.borrow_mut().connection().close();
        loop {
            {
                let mut inner = self.inner.borrow_mut();
                inner.deliver();
                if inner.connection().is_quiet() {
                    return;
                }
            }
            self.runtime.sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // The operations under way must end before their memory goes: a task of its own sees to that.
        let (runtime, id, inner) = (self.runtime.clone(), self.id, Rc::clone(&self.inner));
        inner.borrow_mut().connection().close();
        self.runtime.spawn(async move {
            while !inner.borrow_mut().connection().is_quiet() {
                runtime.sleep(Duration::from_millis(1)).await;
            }
            runtime.remove_source(id);
        });
    }
}

struct Waiting<'a> {
    admin: &'a Admin,
    key: usize,
    done: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut inner = self.admin.inner.borrow_mut();
        match inner.waits.get_mut(self.key) {
            Some(wait) if wait.answer.is_some() => {
                inner.waits.remove(self.key);
            }
            // The command is still under way: its memory stays until it ends.
            Some(wait) => wait.abandoned = true,
            None => {}
        }
    }
}
