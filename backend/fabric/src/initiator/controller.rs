//! The owner's task: makes associations, keeps them alive, follows changes, and makes them again. Straight-line code on
//! one reactor; lanes on all reactors are told by message.
//!
//! ```text
//!          ┌──────────── connect a path ◄──────────────┐ back-off with jitter
//!          ▼                                           │
//!  admin queue ► enable ► identify ► queues ► lanes connect ► start
//!                                                      │
//!                          keep-alive, events, losses ─┴► tear all lanes down (barrier)
//! ```

use super::admin::{ADMIN_ENTRIES, Admin};
use super::config::{NvmeConfig, PathTimers};
use super::device::{Shared, lane_of};
use super::geometry::{Identity, Known};
use super::lane::{Notice, Start};
use super::queue::SLOTS_MAX;
use super::signal::{Either, Mailbox, Seldom, first, within};
use super::socket::{self, QueueRequest};
use crate::nvme::bytes::{low16, low32};
use crate::nvme::fabrics::CNTLID_DYNAMIC;
use crate::nvme::features;
use crate::nvme::identify::{
    CNTRLTYPE_DISCOVERY, IdentifyController, IdentifyNamespace, IdentifyNvmController, NamespaceIds,
    OAES_NAMESPACE_ATTRIBUTE, VENDOR_MARK, cns,
};
use crate::nvme::log::AsyncEvent;
use crate::nvme::{Sgl, Sqe};
use crate::uri::NvmeUri;
use hawser_block::DeviceState;
use hawser_runtime::{Instant, Runtime};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Entries of an I/O queue that we ask for: twice the depth that saturates one core here.
const IO_ENTRIES: u16 = 256;
/// How long a lost association is asked to prove that it is quiet, before a new one is made.
const RESET_LIMIT: Duration = Duration::from_secs(1);
/// How often events that we do nothing about are logged at most.
const EVENT_LOG_EVERY: Duration = Duration::from_secs(60);
/// The first wait before reconnecting; it doubles up to `reconnect_delay`.
const RECONNECT_FIRST: Duration = Duration::from_millis(100);

/// Why an attempt or an association ended.
enum End {
    /// It may work the next time.
    Trouble(String),
    /// The same, and nothing more can be asked of the controller.
    Silence(String),
    /// What was reached must not be used.
    Refused(String),
    /// Nobody uses the device any more.
    Closed,
}

impl From<String> for End {
    fn from(why: String) -> End {
        End::Trouble(why)
    }
}

/// An association that is over, and whose commands may still be executed.
struct Unquiet {
    /// `None`: we do not know.
    address: Option<SocketAddr>,
    /// The target has ended it, or has seen its end.
    target_knows: bool,
    /// From then on they are not.
    until: Instant,
}

impl Unquiet {
    /// Whether it is quiet after a Connect to `address`, which waits for what its target knows to be over, or does not.
    fn is_quiet(&self, address: &SocketAddr, connect_waits: bool, now: Instant) -> bool {
        connect_waits && self.target_knows && self.address == Some(*address) || self.until <= now
    }
}

struct Association {
    number: u64,
    address: SocketAddr,
    admin: Admin,
    identity: Identity,
    nsid: u32,
}

struct Task {
    runtime: Runtime,
    shared: Arc<Shared>,
    number: u64,
    path: usize,
    /// There was an association before.
    reached: bool,
    unquiet: Vec<Unquiet>,
    /// Since when there is no association.
    lost_at: Instant,
    failing: bool,
    attempts: u32,
    logged: String,
}

/// Runs until the device is closed.
pub(crate) async fn run(runtime: Runtime, shared: Arc<Shared>) {
    let lost_at = runtime.refresh_now();
    let NvmeConfig { paths, timers, had_predecessor, .. } = &shared.config;
    // A predecessor was on one of the paths, at one of its addresses. With several we do not know which.
    let address = match paths.as_slice() {
        [path] => path.address.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, path.address.port)),
        _ => None,
    };
    let until = lost_at + timers.expiry() + timers.quiesce_tmo;
    let predecessor = Unquiet { address, target_knows: true, until };
    let unquiet = if *had_predecessor { vec![predecessor] } else { Vec::new() };
    let mut task = Task {
        runtime,
        shared,
        number: 0,
        path: 0,
        reached: false,
        unquiet,
        lost_at,
        failing: false,
        attempts: 0,
        logged: String::new(),
    };
    task.run().await;
}

impl Task {
    async fn run(&mut self) {
        loop {
            self.number += 1;
            let shared = Arc::clone(&self.shared);
            let uri = shared.config.paths[self.path].clone();
            let attempt = first(self.associate(&uri), closed(&shared)).await;
            let end = match attempt {
                Either::First(Ok(association)) => {
                    let began = self.ready(&uri);
                    let end = self.serve(&association).await;
                    if matches!(end, End::Closed) {
                        association.admin.shut_down().await;
                    }
                    self.lost_at = self.runtime.refresh_now();
                    // An association that does not last is no reason to begin with short waits again.
                    let lasted = self.lost_at - began > self.timers().reconnect_delay;
                    self.attempts = if lasted { 0 } else { self.attempts };
                    self.tear_down().await;
                    self.leave(&association, &end).await;
                    association.admin.close().await;
                    end
                }
                Either::First(Err(end)) => {
                    self.tear_down().await;
                    end
                }
                Either::Second(()) => {
                    self.tear_down().await;
                    End::Closed
                }
            };
            let (why, refused) = match end {
                End::Closed => break,
                End::Trouble(why) | End::Silence(why) => (why, false),
                End::Refused(why) => (why, true),
            };
            let delay = self.delay();
            self.trouble(&why, refused, delay);
            self.path = (self.path + 1) % self.shared.config.paths.len();
            if self.wait(delay).await.is_err() {
                break;
            }
        }
        for index in 0..self.shared.reactors.len() {
            let key = self.shared.key;
            self.shared.reactors[index].run(move |runtime| {
                let lane = runtime.local::<super::lane::Lanes>().0.borrow_mut().remove(&key);
                if let Some(lane) = lane {
                    lane.borrow_mut().remove();
                }
            });
        }
    }

    /// Takes down what is known of the commands of an association that is over.
    async fn leave(&mut self, association: &Association, end: &End) {
        let controller = &association.identity.controller;
        let admin = &association.admin;
        let may_prove = controller.vendor.starts_with(&VENDOR_MARK) && !matches!(end, End::Silence(_));
        if may_prove && !admin.was_ended_by_target() && admin.reset(RESET_LIMIT).await.is_ok() {
            log::debug!("{}: the lost association has been reset", self.shared.config.name);
            return;
        }
        let until = self.lost_at + self.timers().expiry() + quiesce(controller, &self.timers());
        self.unquiet.retain(|unquiet| unquiet.until > self.lost_at);
        let (address, target_knows) = (Some(association.address), admin.was_ended_by_target());
        self.unquiet.push(Unquiet { address, target_knows, until });
    }

    fn timers(&self) -> PathTimers {
        self.shared.config.timers
    }

    /// Doubling from 0.1 s to `reconnect_delay`, and of that between a half and the whole, so that many initiators do not
    /// return at the same moment.
    fn delay(&mut self) -> Duration {
        let whole = RECONNECT_FIRST * 2u32.saturating_pow(self.attempts.min(16));
        let whole = whole.min(self.timers().reconnect_delay);
        self.attempts += 1;
        let permille = 500 + low32(self.runtime.random() % 501);
        whole * permille / 1000
    }

    /// Waits between attempts; `Err` when the device was closed. Requests begin to fail when `ctrl_loss_tmo` is over.
    async fn wait(&mut self, delay: Duration) -> Result<(), ()> {
        let until = self.runtime.refresh_now() + delay;
        loop {
            let now = self.runtime.refresh_now();
            let gives_up = match self.timers().ctrl_loss_tmo {
                Some(limit) if !self.failing => self.lost_at + limit,
                _ => Instant::NEVER,
            };
            if gives_up <= now {
                self.fail_waiting();
                continue;
            }
            if until <= now {
                return Ok(());
            }
            let shared = Arc::clone(&self.shared);
            if within(&self.runtime, until.min(gives_up) - now, closed(&shared)).await.is_some() {
                return Err(());
            }
        }
    }

    fn fail_waiting(&mut self) {
        self.failing = true;
        for index in 0..self.shared.reactors.len() {
            self.shared.on_lane(index, super::lane::Lane::fail_waiting);
        }
        self.shared.change(|status| status.state = DeviceState::Failed);
    }

    fn trouble(&mut self, why: &str, refused: bool, delay: Duration) {
        let name = &self.shared.config.name;
        if self.logged != why {
            log::warn!("{name}: {why}");
            why.clone_into(&mut self.logged);
        }
        let line = format!("{name}: {why}; retrying in {:.1} s", delay.as_secs_f32());
        let failed = refused || self.failing;
        self.shared.change(|status| {
            status.trouble = line;
            status.state = match status.known {
                _ if failed => DeviceState::Failed,
                None => DeviceState::Connecting,
                Some(_) => DeviceState::Reconnecting,
            };
        });
        if refused && !self.failing {
            self.fail_waiting();
        }
    }

    fn ready(&mut self, uri: &NvmeUri) -> Instant {
        let again = if std::mem::replace(&mut self.reached, true) { "again " } else { "" };
        log::info!("{}: {again}connected to {uri}", self.shared.config.name);
        self.logged.clear();
        self.failing = false;
        self.shared.change(|status| {
            status.state = DeviceState::Ready;
            status.trouble.clear();
        });
        self.runtime.refresh_now()
    }

    /// Waits until no lane has an operation under way: the barrier before the next attempt.
    async fn tear_down(&self) {
        let done = Arc::new(Mailbox::default());
        for index in 0..self.shared.reactors.len() {
            let done = Arc::clone(&done);
            self.shared.on_lane(index, move |lane| lane.tear_down(done));
        }
        for _ in 0..self.shared.reactors.len() {
            done.next().await;
        }
    }

    async fn associate(&self, uri: &NvmeUri) -> Result<Association, End> {
        let addresses = socket::resolve(&uri.address).await;
        let addresses = addresses.map_err(|why| format!("resolve {}: {why}", uri.address.host))?;
        let mut request = QueueRequest {
            host: self.shared.config.host.clone(),
            subsystem_nqn: uri.subsystem_nqn.clone(),
            queue_id: 0,
            entries: ADMIN_ENTRIES,
            cntlid: CNTLID_DYNAMIC,
            keep_alive_ms: u32::try_from(self.timers().keep_alive_tmo.as_millis()).unwrap_or(u32::MAX),
            digests: uri.digests,
            in_capsule_max: 0,
        };
        let (address, queue) = self.connect_admin(&addresses, &request).await?;
        request.cntlid = queue.cntlid;
        let admin = Admin::new(&self.runtime, queue);
        let identity = identify(&admin, uri).await?;
        let mut known = known(&identity, uri)?;
        let before = self.shared.status().known;
        if let Some(before) = before {
            before.accept(&known).map_err(End::Refused)?;
            // What a cache held of us does not become durable by our using another controller.
            known.geometry.volatile_cache |= before.geometry.volatile_cache;
        }

        let lanes = self.shared.reactors.len();
        let ask = u16::try_from(lanes).unwrap_or(u16::MAX);
        let sqe = Sqe::set_features(features::id::NUMBER_OF_QUEUES, features::queues_to_value(ask));
        let (granted, _) = admin.command("set the number of queues", sqe, 0).await?;
        let granted = features::queues_from_value(low32(granted)) as usize;
        if granted < lanes {
            let why =
                format!("the controller grants {granted} I/O queues, and {lanes} reactors need one each");
            return Err(End::Trouble(why));
        }
        if identity.controller.async_events & OAES_NAMESPACE_ATTRIBUTE != 0 {
            let value = features::EVENT_NAMESPACE_ATTRIBUTE;
            let sqe = Sqe::set_features(features::id::ASYNC_EVENT_CONFIGURATION, value);
            // Without it, growth is noticed at the next association.
            if let Err(why) = admin.command("ask for events", sqe, 0).await {
                log::debug!("{}: {why}", self.shared.config.name);
            }
        }

        request.keep_alive_ms = 0;
        request.in_capsule_max = match identity.controller.in_capsule_data_offset {
            0 => identity.controller.in_capsule_data_max(),
            _ => 0,
        };
        request.entries = io_entries(&identity);
        self.connect_lanes(&address, &request).await?;

        let start = Start {
            association: self.number,
            geometry: known.geometry,
            nsid: uri.nsid,
            earlier_are_quiet: self.earlier_are_quiet(&address, &identity.controller),
            quiesce: quiesce(&identity.controller, &self.timers()),
            retry_delays: identity.controller.retry_delays,
        };
        self.shared.change(|status| status.known = Some(known));
        for index in 0..lanes {
            self.shared.on_lane(index, move |lane| lane.start(&start));
        }
        Ok(Association { number: self.number, address, admin, identity, nsid: uri.nsid })
    }

    /// Our own target's Connect waits for the commands of our earlier associations, and takes in nothing more of those of
    /// which it knows that they are over: after it they are quiet. That says nothing of another address, where another target
    /// may still be at work (a name may have several), nor of what a silent network may still deliver.
    fn earlier_are_quiet(&self, address: &SocketAddr, controller: &IdentifyController) -> bool {
        let connect_waits = controller.vendor.starts_with(&VENDOR_MARK);
        let now = self.runtime.now();
        self.unquiet.iter().all(|unquiet| unquiet.is_quiet(address, connect_waits, now))
    }

    async fn connect_admin(
        &self,
        addresses: &[SocketAddr],
        request: &QueueRequest,
    ) -> Result<(SocketAddr, socket::ConnectedQueue), String> {
        let mut last = String::new();
        for address in addresses {
            match socket::connect_queue(&self.runtime, address, request).await {
                Ok(queue) => return Ok((*address, queue)),
                Err(why) => last = format!("connect {address}: {why}"),
            }
        }
        Err(last)
    }

    async fn connect_lanes(&self, address: &SocketAddr, request: &QueueRequest) -> Result<(), String> {
        let done = Arc::new(Mailbox::<Result<(), String>>::default());
        for (index, reactor) in self.shared.reactors.iter().enumerate() {
            let queue_id = low16(low32(index as u64 + 1));
            let request = QueueRequest { queue_id, ..request.clone() };
            let (done, address) = (Arc::clone(&done), *address);
            let (key, number) = (self.shared.key, self.number);
            reactor.run(move |runtime| {
                if let Some(lane) = lane_of(runtime, key) {
                    lane.borrow_mut().expect(number);
                }
                let own = runtime.clone();
                runtime.spawn(async move {
                    let connected = socket::connect_queue(&own, &address, &request).await;
                    done.post(connected.map(|queue| {
                        if let Some(lane) = lane_of(&own, key) {
                            lane.borrow_mut().install(number, queue, request.entries - 1);
                        }
                    }));
                });
            });
        }
        let mut result = Ok(());
        for index in 0..self.shared.reactors.len() {
            if let Err(why) = done.next().await {
                result = Err(format!("connect {address}, I/O queue {}: {why}", index + 1));
            }
        }
        result
    }

    /// Keeps an association until it ends.
    async fn serve(&mut self, association: &Association) -> End {
        let admin = &association.admin;
        let busy = first(self.keep_alive(admin), self.follow_events(association));
        let ended = first(lost(admin), self.notices(association.number));
        match first(busy, ended).await {
            Either::First(Either::First(end) | Either::Second(end))
            | Either::Second(Either::First(end) | Either::Second(end)) => end,
        }
    }

    async fn keep_alive(&self, admin: &Admin) -> End {
        let limit = self.timers().keep_alive_tmo;
        if limit.is_zero() {
            return std::future::pending().await;
        }
        loop {
            self.runtime.sleep(limit / 2).await;
            match within(&self.runtime, limit, admin.command("keep-alive", Sqe::keep_alive(), 0)).await {
                None => {
                    return End::Silence(format!("no answer to a keep-alive in {} s", limit.as_secs_f32()));
                }
                Some(Err(why)) => return End::Trouble(why),
                Some(Ok(_)) => {}
            }
        }
    }

    async fn notices(&self, number: u64) -> End {
        loop {
            match self.shared.notices.next().await {
                Notice::Closed => return End::Closed,
                Notice::Lost { association, why } if association == number => return End::Trouble(why),
                Notice::Lost { .. } => {}
            }
        }
    }

    async fn follow_events(&self, association: &Association) -> End {
        let admin = &association.admin;
        let mut log = Seldom::new(EVENT_LOG_EVERY);
        loop {
            let event = match admin.event().await {
                Err(why) => return End::Trouble(why),
                // No such requests here: nothing to follow.
                Ok(None) => return std::future::pending().await,
                Ok(Some(event)) => event,
            };
            // Reading the log page lets the next event of this kind come.
            let (len, nsid) =
                if event == AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED { (4096, 0) } else { (512, u32::MAX) };
            let sqe = Sqe::get_log_page(event.log_page, nsid, 0, len, false, Sgl::NONE);
            if let Err(why) = admin.command("read a log page", sqe, len).await {
                log::debug!("{}: {why}", self.shared.config.name);
            }
            if event != AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED {
                if log.may(self.runtime.now()) {
                    log::info!("{}: the controller reports {event:?}", self.shared.config.name);
                }
                continue;
            }
            if let Err(end) = self.namespace_changed(association).await {
                return end;
            }
        }
    }

    async fn namespace_changed(&self, association: &Association) -> Result<(), End> {
        let what = "identify the namespace";
        let data = association.admin.identify(what, cns::NAMESPACE, association.nsid).await?;
        let before = &association.identity;
        let identity = Identity {
            capabilities: before.capabilities,
            controller: before.controller.clone(),
            nvm: before.nvm,
            namespace: IdentifyNamespace::from_bytes(&data),
            ids: before.ids,
        };
        let mut now = Known { geometry: identity.geometry().map_err(End::Refused)?, uuid: identity.uuid() };
        let Some(known) = self.shared.status().known else { return Ok(()) };
        known.accept(&now).map_err(End::Refused)?;
        now.geometry.volatile_cache |= known.geometry.volatile_cache;
        if now != known {
            let (old, new) = (known.geometry.size_bytes(), now.geometry.size_bytes());
            log::info!("{}: the device changed, {old} bytes before, {new} now", self.shared.config.name);
            for index in 0..self.shared.reactors.len() {
                self.shared.on_lane(index, move |lane| lane.set_geometry(now.geometry));
            }
            self.shared.change(|status| status.known = Some(now));
        }
        Ok(())
    }
}

/// Awaits that nobody uses the device any more. What is said of associations that are over is not heard.
async fn closed(shared: &Shared) {
    while !matches!(shared.notices.next().await, Notice::Closed) {}
}

/// Awaits the loss of the admin queue.
async fn lost(admin: &Admin) -> End {
    End::Trouble(admin.lost().await)
}

/// Starts the controller and asks it everything.
async fn identify(admin: &Admin, uri: &NvmeUri) -> Result<Identity, End> {
    let capabilities = admin.enable().await?;
    let data = admin.identify("identify the controller", cns::CONTROLLER, 0).await?;
    let controller = IdentifyController::from_bytes(&data);
    if controller.controller_type == CNTRLTYPE_DISCOVERY {
        return Err(End::Trouble(format!("{} is a discovery service, not a subsystem", uri.subsystem_nqn)));
    }
    let data = admin.identify("identify the namespace", cns::NAMESPACE, uri.nsid).await?;
    let namespace = IdentifyNamespace::from_bytes(&data);
    // Controllers before 1.3 have no list of identifiers, those before 1.4 no command set's own limits.
    let what = "identify the namespace's identifiers";
    let ids = match admin.identify_if_known(what, cns::NAMESPACE_IDS, uri.nsid).await? {
        Some(data) => NamespaceIds::from_bytes(&data),
        None => NamespaceIds { nguid: namespace.nguid, eui64: namespace.eui64, ..NamespaceIds::default() },
    };
    let what = "identify the command set's limits";
    let nvm = match admin.identify_if_known(what, cns::COMMAND_SET_CONTROLLER, 0).await? {
        Some(data) => IdentifyNvmController::from_bytes(&data),
        None => IdentifyNvmController::default(),
    };
    Ok(Identity { capabilities, controller, nvm, namespace, ids })
}

fn known(identity: &Identity, uri: &NvmeUri) -> Result<Known, End> {
    let geometry = identity.geometry().map_err(|why| format!("namespace {}: {why}", uri.nsid))?;
    Ok(Known { geometry, uuid: identity.uuid() })
}

/// CQT where the controller says it, else `quiesce_tmo`.
fn quiesce(controller: &IdentifyController, timers: &PathTimers) -> Duration {
    match controller.quiesce_time_ms {
        0 => timers.quiesce_tmo,
        ms => Duration::from_millis(u64::from(ms)),
    }
}

/// As many entries as we like, the controller's queues have, and its commands may be.
fn io_entries(identity: &Identity) -> u16 {
    let queue = identity.capabilities.queue_entries_max.saturating_add(1);
    let commands = match identity.controller.commands_max {
        0 => u16::MAX,
        max => max,
    };
    IO_ENTRIES.min(queue).min(commands).clamp(2, SLOTS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name had two addresses, with a target at each. After the first was lost, the second's promise about its own earlier
    /// associations was taken for one about the first's, because both were the same URI.
    #[test]
    fn a_target_speaks_for_its_own_address_and_for_what_it_has_seen() {
        let (here, there): (SocketAddr, SocketAddr) =
            ("127.0.0.1:4420".parse().unwrap(), "[::1]:4420".parse().unwrap());
        let until = Instant(1000);
        let lost = |address, target_knows| Unquiet { address, target_knows, until };
        for (unquiet, address, connect_waits, now, quiet) in [
            (lost(Some(here), true), here, true, 0, true),
            (lost(Some(here), true), there, true, 0, false),
            (lost(Some(here), true), there, true, 1000, true),
            (lost(Some(here), true), here, false, 0, false),
            (lost(Some(here), false), here, true, 999, false),
            (lost(None, true), here, true, 999, false),
        ] {
            assert_eq!(unquiet.is_quiet(&address, connect_waits, Instant(now)), quiet);
        }
    }
}
