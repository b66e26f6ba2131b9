//! From an address to a connected queue: address and route, queue pair, connection, Fabrics Connect. Straight-line code.
//!
//! Nothing here blocks a reactor: rdma_cm's events are awaited, and what takes a device its time is done on threads.

use super::layout::Layout;
use super::plan;
use super::queue::{Area, CAPSULE_SEGMENTS_MAX, RdmaError, RdmaLimits, RdmaQueue, SENDS_PER_SLOT};
use crate::initiator::queue::{SqFlow, Transfer};
use crate::initiator::signal::{Mailbox, within};
use crate::initiator::socket::{self, ConnectError, QueueRequest};
use crate::nvme::bytes::low32;
use crate::nvme::fabrics::{CATTR_NO_FLOW_CONTROL, NO_SQ_HEAD};
use crate::nvme::{Cqe, Sgl};
use crate::rdma::domain::{Domain, Purpose};
use crate::rdma::link::{End, Link, dispose};
use crate::rdma::private::{Accept, Request};
use crate::rdma::{KeyPolicy, Readiness, driver, words};
use hawser_block::Buffers;
use hawser_runtime::Runtime;
use hawser_runtime::buffers::AlignedBuffer;
use hawser_verbs_abi::{CmEvent, ConnectParameters, QueueSize, Table, WorkCompletion, event};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// How long each step of a connection's set-up may take: address and route.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// The other end's answer may take longer: the kernel asks again every 4.3 s (CMA_CM_RESPONSE_TIMEOUT), and a target that has just lost
/// its connections takes them away first. Whoever gives up sooner makes it more work, and is never let in.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// As for TCP: a target may first wait for the commands of our last association.
const FABRICS_CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// A queue that takes commands.
pub(crate) struct RdmaPair {
    link: Held<Box<Link>>,
    queue: Box<RdmaQueue>,
    depth: u16,
    /// Of the memory that the queue knows.
    generation: u64,
}

impl RdmaPair {
    /// The connection, its queue, how many commands that takes, and the generation of the memory that it knows.
    pub(super) fn into_parts(self) -> (Box<Link>, Box<RdmaQueue>, u16, u64) {
        (self.link.take(), self.queue, self.depth, self.generation)
    }
}

/// Drops what it has elsewhere than on its reactor, wherever the code that holds it is left.
struct Held<T: Send + 'static> {
    runtime: Runtime,
    what: Option<T>,
}

impl<T: Send + 'static> Held<T> {
    fn new(runtime: &Runtime, what: T) -> Held<T> {
        Held { runtime: runtime.clone(), what: Some(what) }
    }

    fn get(&mut self) -> &mut T {
        self.what.as_mut().expect("only `take` takes it")
    }

    fn take(mut self) -> T {
        self.what.take().expect("taken once")
    }
}

impl<T: Send + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        if let Some(what) = self.what.take() {
            dispose(&self.runtime, what);
        }
    }
}

/// Runs what takes its time on a thread.
async fn on_thread<R: Send + 'static>(
    runtime: &Runtime,
    job: impl FnOnce() -> R + Send + 'static,
) -> Result<R, String> {
    let answer = Arc::new(Mailbox::default());
    let post = Arc::clone(&answer);
    let started = runtime.on_thread("rdma", move || post.post(job()));
    started.map_err(|error| socket::plain(&error))?;
    Ok(answer.next().await)
}

/// Awaits the next event of a connection on its way.
async fn next_event(
    runtime: &Runtime,
    end: &mut End,
    ready: &Readiness,
    (what, timeout): (&str, Duration),
) -> Result<CmEvent, String> {
    let awaited = within(runtime, timeout, async {
        loop {
            match end.channel.event() {
                Ok(Some(event)) => return Ok(event),
                Ok(None) => ready.fired().await,
                Err(code) => return Err(format!("rdma_cm: {}", words::errno(code))),
            }
        }
    })
    .await;
    awaited.unwrap_or_else(|| Err(format!("{what} in time")))
}

fn expect(event: &CmEvent, kind: u32) -> Result<(), ConnectError> {
    if event.kind == kind {
        return Ok(());
    }
    Err(ConnectError { why: words::event(event), refused: words::is_refusal(event) })
}

/// Connects a queue. `Ok(Err(..))`: the target answers Connect with an error.
pub(crate) async fn connect_queue(
    runtime: &Runtime,
    address: &SocketAddr,
    request: &QueueRequest,
    attributes: u8,
) -> Result<Result<(RdmaPair, u16), Cqe>, ConnectError> {
    let table = on_thread(runtime, driver::table).await??;
    let mut link = establish(runtime, table, address, request).await?;
    let layout = layout_of(request, link.get());
    let limits = RdmaLimits {
        in_capsule_max: 0,
        segments_max: segments_of(link.get()),
        policy: request.rdma_keys,
        runs_max: plan::runs_max(),
        flow: None,
    };
    let area = {
        let link = link.get();
        Area { start: link.memory.as_ptr(), region: link.region, keys: link.keys }
    };
    let mut queue = Box::new(RdmaQueue::new(layout, limits, area, &link.get().windows));
    let answer = fabrics_connect(runtime, link.get(), &mut queue, request, attributes, &layout).await?;
    if !answer.status.is_success() {
        return Ok(Err(answer));
    }
    let cntlid = socket::connect_answer(&answer)?;
    let switched_off = attributes & CATTR_NO_FLOW_CONTROL != 0 && answer.sq_head == NO_SQ_HEAD;
    let flow = (!switched_off).then(|| SqFlow::new(layout.depth + 1, answer.sq_head));
    let in_capsule_max = if request.queue_id == 0 { 0 } else { request.in_capsule_max };
    queue.set_limits(in_capsule_max, flow);
    // Connect's data is nobody's payload.
    queue.take_moved();
    let (generation, entries) = link.get().domain.entries();
    queue.set_entries(entries);
    Ok(Ok((RdmaPair { link, queue, depth: layout.depth, generation }, cntlid)))
}

fn segments_of(link: &Link) -> usize {
    CAPSULE_SEGMENTS_MAX.min(link.domain.attributes.segments_max as usize).max(1)
}

/// Commands that the queue has, as far as the device has work requests for them.
fn depth_of(request: &QueueRequest, domain: &Domain) -> u16 {
    let room = domain.attributes.requests_max / SENDS_PER_SLOT;
    (request.entries - 1).min(u16::try_from(room).unwrap_or(u16::MAX)).max(1)
}

fn layout_of(request: &QueueRequest, link: &Link) -> Layout {
    Layout::new(depth_of(request, &link.domain), request.queue_id == 0)
}

/// From an address to a connection that is established.
async fn establish(
    runtime: &Runtime,
    table: &'static Table,
    address: &SocketAddr,
    request: &QueueRequest,
) -> Result<Held<Box<Link>>, ConnectError> {
    let opened = End::open(table);
    let mut end = match opened {
        Ok(end) => Held::new(runtime, end),
        // Without a device there is no rdma_cm either.
        Err(code) => return Err(no_device(runtime, table, code).await.into()),
    };
    let ready = Readiness::new(runtime, end.get().channel.fd());
    if let Err(code) = end.get().resolve_address(address, STEP_TIMEOUT) {
        return Err(no_device(runtime, table, code).await.into());
    }
    let event = next_event(runtime, end.get(), &ready, ("the address is not resolved", STEP_TIMEOUT)).await?;
    if event.kind == event::ADDRESS_ERROR {
        return Err(no_device(runtime, table, event.status.abs().saturating_neg()).await.into());
    }
    expect(&event, event::ADDRESS_RESOLVED)?;
    let device = end.get().device();
    if device.is_null() {
        return Err(no_device(runtime, table, -libc::ENODEV).await.into());
    }
    let device = device as usize;
    let policy: KeyPolicy = request.rdma_keys;
    let domain =
        on_thread(runtime, move || Domain::of(table, device as *mut _, Purpose::Initiator(policy))).await??;

    end.get()
        .resolve_route(STEP_TIMEOUT)
        .map_err(|code| format!("there is no route: {}", words::errno(code)))?;
    let event = next_event(runtime, end.get(), &ready, ("no route was found", STEP_TIMEOUT)).await?;
    expect(&event, event::ROUTE_RESOLVED)?;

    let depth = depth_of(request, &domain);
    let layout = Layout::new(depth, request.queue_id == 0);
    let size = QueueSize {
        // And one more of each, for what is posted again before its place is free.
        sends: SENDS_PER_SLOT * u32::from(depth) + 1,
        receives: u32::from(layout.receives) + 1,
        segments: low32(CAPSULE_SEGMENTS_MAX as u64).min(domain.attributes.segments_max).max(1),
    };
    let windows = if policy == KeyPolicy::Window { usize::from(depth) } else { 0 };
    let reads = |max: u32| u8::try_from(max).unwrap_or(u8::MAX);
    let (answered, own) = (reads(domain.attributes.reads_answered_max), reads(domain.attributes.reads_max));
    let bare = end.take();
    let furnished = on_thread(runtime, move || bare.furnish(domain, size, layout.len(), windows)).await??;
    let mut link = Held::new(runtime, Box::new(furnished));

    let private =
        Request { queue_id: request.queue_id, receives: depth + 1, sends: depth, cntlid: 0 }.to_bytes();
    let parameters = ConnectParameters {
        private: private.as_ptr(),
        private_len: u8::try_from(private.len()).unwrap_or(0),
        responder_resources: answered,
        initiator_depth: own,
    };
    // Nothing comes before we have sent Connect: receives are posted with it.
    let connected = link.get().connect(&parameters);
    connected.map_err(|code| format!("the connection cannot be asked for: {}", words::errno(code)))?;
    let event = next_event(runtime, &mut link.get().end, &ready, ("no answer", ANSWER_TIMEOUT)).await?;
    if event.kind == event::DEVICE_REMOVAL {
        link.get().domain.device_is_gone();
    }
    expect(&event, event::ESTABLISHED)?;
    let private = &event.private[..usize::from(event.private_len)];
    match Accept::from_bytes(private) {
        Some(accept) if accept.receives > 0 && accept.receives < depth => {
            let why =
                format!("the target has room for {} commands, and we asked for {depth}", accept.receives);
            Err(why.into())
        }
        Some(_) => Ok(link),
        None => Err("what listens there does not speak NVMe/RDMA".into()),
    }
}

async fn no_device(runtime: &Runtime, table: &'static Table, code: i32) -> String {
    let why = words::errno(code);
    on_thread(runtime, move || words::no_device(table, &why)).await.unwrap_or_else(|why| why)
}

/// Sends Connect, and awaits the answer.
async fn fabrics_connect(
    runtime: &Runtime,
    link: &mut Link,
    queue: &mut RdmaQueue,
    request: &QueueRequest,
    attributes: u8,
    layout: &Layout,
) -> Result<Cqe, ConnectError> {
    let ready = Readiness::new(runtime, link.queue_fd());
    let (command, data) = socket::connect_command(request, layout.depth, attributes);
    let data = data.to_bytes();
    let memory = AlignedBuffer::new(data.len());
    // SAFETY: new memory of this length; `data` is elsewhere.
    unsafe { memory.as_ptr().copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    let iovec = Box::new(libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: data.len() });
    // SAFETY: memory and iovec live to the end of this function. Its bytes are copied when the command is made, because no device
    // knows this memory.
    let buffers = unsafe { Buffers::new(&raw const *iovec, 1, low32(data.len() as u64)) };
    queue.submit(command.to_sqe(Sgl::NONE), Transfer::FromHost(buffers), 0);

    let answered = within(runtime, FABRICS_CONNECT_TIMEOUT, async {
        loop {
            post(link, queue)?;
            let armed = link.arm();
            armed.map_err(|code| format!("completions cannot be waited for: {}", words::errno(code)))?;
            let mut polled = [WorkCompletion::NONE; 8];
            let count = link.poll(&mut polled);
            let count =
                count.map_err(|code| format!("completions cannot be polled: {}", words::errno(code)))?;
            for completion in &polled[..count] {
                queue.handle(completion).map_err(|error| match error {
                    RdmaError::Protocol(what) => format!("the target broke the protocol: {what}"),
                    RdmaError::Work { status, .. } => {
                        format!("no answer to Connect: {}", words::completion(status))
                    }
                })?;
            }
            // Not before its send has completed, and its key is dead.
            if let Some((_, answer)) = queue.ended().next() {
                return Ok(answer);
            }
            if count == 0 {
                ready.fired().await;
            }
        }
    })
    .await;
    let answer: Result<_, String> = answered.ok_or("no answer to Connect in time")?;
    let answer = answer?;
    Ok(Cqe { result: answer.result, sq_head: queue.sq_head(), sq_id: 0, cid: 0, status: answer.status })
}

fn post(link: &mut Link, queue: &mut RdmaQueue) -> Result<(), String> {
    let (receives, sends) = queue.posts();
    let (receive_count, send_count) = (receives.len(), sends.len());
    // SAFETY: all that these name is the link's own memory.
    let posted = unsafe { link.post_receives(receives).and_then(|()| link.post_sends(sends)) };
    queue.posted(receive_count, send_count);
    posted.map_err(|(_, code)| {
        format!("RDMA device {} takes no work: {}", link.domain.name, words::errno(code))
    })
}
