//! A path's task: makes associations, keeps them alive, follows changes, and makes them again. Straight-line code on
//! one reactor; lanes on all reactors are told by message. Paths know of each other only what the device does.
//!
//! ```text
//!          ┌──────────── connect ◄─────────────────────┐ back-off with jitter
//!          ▼                                           │
//!  admin queue ► enable ► identify ► queues ► lanes connect ► start
//!                          └───── keep-alive ─────┘    │
//!              keep-alive, events, chores, losses ─────┴► tear the path down in all lanes (barrier)
//! ```

mod events;

use super::admin::{ADMIN_ENTRIES, Admin, Reset};
use super::cache::Fate;
use super::config::PathTimers;
use super::device::{Shared, lane_of};
use super::geometry::{Identity, Known};
use super::identify;
use super::lane::{Lane, Notice, Start};
use super::meter::Loss;
use super::numa;
use super::quiet::{self, Record, Unquiet};
use super::signal::{Either, Mailbox, first, within};
use super::socket::{self, ConnectError, ConnectedQueue, QueueRequest, Wire};
use crate::nvme::Sqe;
use crate::nvme::ana::AnaState;
use crate::nvme::bytes::{low16, low32};
use crate::nvme::cross_reset::{ControllerInstance, ResetEntry, ResetState};
use crate::nvme::fabrics::CNTLID_DYNAMIC;
use crate::nvme::features;
use crate::nvme::identify::{OAES_ANA_CHANGE, OAES_NAMESPACE_ATTRIBUTE, VENDOR_MARK};
use crate::nvme::properties::Capabilities;
use crate::nvme::vendor::Vendor;
use crate::simulated::is_broken;
use crate::uri::NvmeUri;
use hawser_runtime::{Instant, Runtime};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a lost association is asked to prove that it is quiet, before a new one is made.
const RESET_LIMIT: Duration = Duration::from_secs(1);
/// How often the end of a Cross-Controller Reset is looked for, where it takes its time.
const RESET_POLL: Duration = Duration::from_millis(50);
/// How often asymmetric access that will be another soon is looked at.
const ANA_POLL: Duration = Duration::from_millis(500);
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

struct Association {
    number: u64,
    admin: Admin,
    /// When the last keep-alive was sent, or the controller became ready.
    kept_alive: Cell<Instant>,
    identity: Identity,
    nsid: u32,
    /// Its controller reports asymmetric access.
    has_ana: bool,
    record: Record,
    /// When its Connect began, where that waits for what the target knows to be over.
    connect_waits: Option<Instant>,
}

struct Task {
    runtime: Runtime,
    shared: Arc<Shared>,
    path: usize,
    number: u64,
    /// There was an association before.
    reached: bool,
    /// Since when there is no association.
    lost_at: Instant,
    /// What a lane has said of the end of the association.
    loss: Cell<Option<Loss>>,
    hopeless: bool,
    attempts: u32,
    logged: String,
}

/// Runs until the device is closed.
pub(crate) async fn run(runtime: Runtime, shared: Arc<Shared>, path: usize) {
    let lost_at = runtime.refresh_now();
    let mut task = Task {
        runtime,
        shared,
        path,
        number: 0,
        reached: false,
        lost_at,
        loss: Cell::new(None),
        hopeless: false,
        attempts: 0,
        logged: String::new(),
    };
    task.run().await;
}

impl Task {
    async fn run(&mut self) {
        let shared = Arc::clone(&self.shared);
        let uri = shared.config.paths[self.path].clone();
        loop {
            self.number = shared.next_number();
            shared.status().paths[self.path].history.attempts += 1;
            let attempt = first(self.associate(&uri), closed(&shared, self.path)).await;
            let end = match attempt {
                Either::First(Ok(association)) => {
                    let began = self.ready(&uri);
                    let end = self.serve(&association).await;
                    if matches!(end, End::Closed) {
                        association.admin.shut_down().await;
                    }
                    self.lost_at = self.runtime.refresh_now();
                    // An association that does not last is no reason to begin with short waits again.
                    self.count_loss(&association.admin, &end);
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
            if self.wait(delay).await.is_err() {
                break;
            }
        }
        if shared.tasks.fetch_sub(1, Ordering::Relaxed) > 1 {
            return;
        }
        // The last path's task ends the lanes.
        for index in 0..shared.reactors.len() {
            let key = shared.key;
            shared.reactors[index].run(move |runtime| {
                let lane = runtime.local::<super::lane::Lanes>().0.borrow_mut().remove(&key);
                if let Some(lane) = lane {
                    lane.borrow_mut().remove();
                }
            });
        }
    }

    /// Takes down what is known of the commands of an association that is over.
    async fn leave(&mut self, association: &Association, end: &End) {
        let Association { number, admin, record, identity, .. } = association;
        self.shared.caches.end(self.path);
        if matches!(end, End::Closed) {
            self.shared.died(*number, None);
            let _ = self.shared.remember().await;
            return;
        }
        let unquiet = Unquiet {
            association: *number,
            record: record.clone(),
            target_knows: admin.was_ended_by_target(),
            since: self.lost_at,
            until: self.lost_at + record.lives,
        };
        // Other paths' tasks hear of it, and may have it reset.
        self.shared.died(*number, Some(unquiet));
        // What is kept names it already.
        let _ = self.shared.remember().await;
        let keeps_promises = identity.controller.vendor.starts_with(&VENDOR_MARK);
        if keeps_promises
            && !matches!(end, End::Silence(_))
            && !admin.was_ended_by_target()
            && admin.reset(RESET_LIMIT).await.is_ok()
        {
            self.shared.quiet(*number);
        } else if admin.was_ended_by_target() {
            self.shared.target_knows(*number);
        }
    }

    /// Counts the end of an association, if it was not wanted.
    fn count_loss(&self, admin: &Admin, end: &End) {
        let told = self.loss.take();
        let loss = match end {
            End::Closed => return,
            End::Silence(_) => Loss::KeepAlive,
            End::Refused(_) => Loss::Refused,
            End::Trouble(_) => told.or(admin.loss()).unwrap_or_default(),
        };
        let mut status = self.shared.status();
        let took_over = status.serves_without(self.path);
        let history = &mut status.paths[self.path].history;
        history.lost(loss);
        history.failovers += u64::from(took_over);
    }

    fn timers(&self) -> PathTimers {
        self.shared.config.timers
    }

    /// The device, and the path if it has several.
    fn label(&self) -> String {
        let config = &self.shared.config;
        match config.paths.len() {
            1 => config.name.clone(),
            _ => format!("{}: {}", config.name, config.paths[self.path].address),
        }
    }

    fn delay(&mut self) -> Duration {
        let delay = reconnect_delay(self.attempts, self.timers().reconnect_delay, self.runtime.random());
        self.attempts += 1;
        if is_broken("reconnect_at_once") {
            return Duration::from_millis(1);
        }
        delay
    }

    /// Waits between attempts; `Err` when the device was closed. The path becomes hopeless when its time is over.
    async fn wait(&mut self, delay: Duration) -> Result<(), ()> {
        let until = self.runtime.refresh_now() + delay;
        loop {
            let now = self.runtime.refresh_now();
            let gives_up = match self.shared.patience() {
                Some(limit) if !self.hopeless => self.lost_at + limit,
                _ => Instant::NEVER,
            };
            if gives_up <= now {
                self.give_up_hope();
                continue;
            }
            if until <= now {
                return Ok(());
            }
            let shared = Arc::clone(&self.shared);
            let closed = closed(&shared, self.path);
            if within(&self.runtime, until.min(gives_up) - now, closed).await.is_some() {
                return Err(());
            }
        }
    }

    /// The path is not waited for any more. Requests begin to fail when that holds for all.
    fn give_up_hope(&mut self) {
        self.hopeless = true;
        self.shared.change(|status| status.paths[self.path].hopeless = true);
        let (label, seconds) = (self.label(), (self.runtime.now() - self.lost_at).as_secs());
        let gone =
            format!("{label}: it is not waited for any more, {seconds} s after it was lost, but still tried");
        if self.shared.is_hopeless() {
            log::error!("{gone}: no path is left, so that requests fail until one is connected again");
            self.shared.on_lanes(Lane::fail_waiting);
        } else {
            log::warn!("{gone}: requests go to the other paths, or wait for them");
        }
    }

    fn trouble(&mut self, why: &str, refused: bool, delay: Duration) {
        let label = self.label();
        let again = match self.shared.config.offline {
            true => String::new(),
            false => format!("; retrying in {:.1} s", delay.as_secs_f32()),
        };
        if self.logged != why {
            log::warn!("{label}: {why}{again}");
            why.clone_into(&mut self.logged);
        }
        let line = format!("{label}: {why}{again}");
        // What is wrong is there before it is told that something is.
        self.shared.status().paths[self.path].trouble = line;
        self.shared.change(|status| {
            let path = &mut status.paths[self.path];
            path.ready = false;
            path.ana = None;
            path.blocks = None;
        });
        // Growth on others may have waited for this one.
        self.shared.look_again(|blocks, device| blocks > device);
        if refused && !self.hopeless {
            self.give_up_hope();
        }
    }

    fn ready(&mut self, uri: &NvmeUri) -> Instant {
        let again = if std::mem::replace(&mut self.reached, true) { "again " } else { "" };
        log::info!("{}: {again}connected to {uri}", self.shared.config.name);
        self.logged.clear();
        self.hopeless = false;
        self.shared.change(|status| {
            let path = &mut status.paths[self.path];
            path.ready = true;
            path.history.connects += 1;
            path.hopeless = path.ana == Some(AnaState::PersistentLoss);
            path.trouble.clear();
        });
        self.runtime.refresh_now()
    }

    /// Waits until no lane has an operation under way on this path: the barrier before the next attempt.
    async fn tear_down(&self) {
        let done = Arc::new(Mailbox::default());
        for index in 0..self.shared.reactors.len() {
            let (done, path) = (Arc::clone(&done), self.path);
            self.shared.on_lane(index, move |lane| lane.tear_down(path, done));
        }
        for _ in 0..self.shared.reactors.len() {
            done.next().await;
        }
    }

    async fn associate(&self, uri: &NvmeUri) -> Result<Association, End> {
        let connecting_since = self.runtime.refresh_now();
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
            transport: uri.transport,
            rdma_keys: self.shared.config.rdma_keys,
            in_capsule_max: 0,
        };
        let (address, queue) = self.connect_admin(&addresses, &request).await?;
        request.cntlid = queue.cntlid;
        let admin = Admin::new(&self.runtime, queue);
        let capabilities = admin.enable().await?;
        let kept_alive = Cell::new(self.runtime.refresh_now());
        // The controller counts the time from here on, and I/O queues may take long to connect.
        let settled = first(
            self.settle(uri, &admin, capabilities, (&address, request)),
            first(self.keep_alive(&admin, &kept_alive), lost(&admin)),
        );
        let (identity, known, ana) = match settled.await {
            Either::First(settled) => settled?,
            Either::Second(Either::First(end) | Either::Second(end)) => return Err(end),
        };

        self.shared.adopt(self.path, &known, false).map_err(End::Refused)?;
        let controller = &identity.controller;
        let lives = quiet::lives(&self.timers(), controller.quiesce_time_ms);
        let record = Record {
            address: Some(address),
            subsystem_nqn: uri.subsystem_nqn.clone(),
            instance: ControllerInstance::of(controller),
            lives,
        };
        let cache = Vendor::of(controller).and_then(|vendor| vendor.cache_identity);
        match self.shared.caches.begin(self.path, cache) {
            Fate::Kept => {}
            fate @ (Fate::Lost(_) | Fate::Doubted(_)) => {
                log::error!("{}: {fate}: the next FLUSH fails", self.label());
                // Before anybody reads through this association.
                self.shared.tell();
            }
            fate @ Fate::Trusted(_) => log::warn!("{}: {fate}: nothing fails", self.label()),
        }
        // Before the first command, so that a process after us knows where it may be.
        self.shared.born(self.number, record.clone());
        if let Err(why) = self.shared.remember().await {
            self.shared.caches.end(self.path);
            self.shared.died(self.number, None);
            return Err(End::Trouble(why));
        }
        let now = self.runtime.refresh_now();
        self.shared.predecessors_live(lives);
        let connect_waits = controller.vendor.starts_with(&VENDOR_MARK).then_some(connecting_since);
        let resets = controller.cross_resets_max > 0;
        for unquiet in self.shared.unquiet(now) {
            // What can be reset is, as soon as the association serves.
            let is_reset = resets && unquiet.resettable_in(&uri.subsystem_nqn).is_some();
            if !is_reset && unquiet.is_quiet(&record, connect_waits) {
                self.shared.quiet(unquiet.association);
            }
        }
        let start = Start {
            association: self.number,
            limits: known.geometry,
            nsid: uri.nsid,
            lives,
            retry_delays: controller.retry_delays,
            ana,
        };
        self.shared.status().paths[self.path].ana = ana;
        let path = self.path;
        self.shared.on_lanes(move |lane| lane.start(path, &start));
        Ok(Association {
            number: self.number,
            admin,
            kept_alive,
            identity,
            nsid: uri.nsid,
            has_ana: ana.is_some(),
            record,
            connect_waits,
        })
    }

    /// Asks the controller everything, and connects the I/O queues.
    async fn settle(
        &self,
        uri: &NvmeUri,
        admin: &Admin,
        capabilities: Capabilities,
        (address, mut request): (&SocketAddr, QueueRequest),
    ) -> Result<(Identity, Known, Option<AnaState>), End> {
        let identity = identify::identify(admin, capabilities, uri).await?;
        let known = identify::known(&identity, uri)?;
        let ana = identify::ana(admin, &identity).await?;

        // Without it the controller never says how long to wait (CRD).
        if identity.controller.retry_delays[0] > 0
            && let Err(why) = admin.set_host_behavior().await
        {
            log::debug!("{}: {why}", self.label());
        }
        let lanes = self.shared.reactors.len();
        self.ask_for_queues(admin, lanes).await?;
        self.ask_for_events(admin, &identity).await;
        request.keep_alive_ms = 0;
        request.in_capsule_max = match identity.controller.in_capsule_data_offset {
            0 => identity.controller.in_capsule_data_max(),
            _ => 0,
        };
        request.entries = identify::io_entries(&identity);
        self.connect_lanes(address, &request).await?;
        Ok((identity, known, ana))
    }

    async fn ask_for_queues(&self, admin: &Admin, lanes: usize) -> Result<(), String> {
        let ask = u16::try_from(lanes).unwrap_or(u16::MAX);
        let sqe = Sqe::set_features(features::id::NUMBER_OF_QUEUES, features::queues_to_value(ask));
        let (granted, _) = admin.command("set the number of queues", sqe, 0).await?;
        let granted = features::queues_from_value(low32(granted)) as usize;
        if granted < lanes {
            return Err(format!(
                "the controller grants {granted} I/O queues, and {lanes} reactors need one each"
            ));
        }
        Ok(())
    }

    /// Without them, changes are noticed at the next association.
    async fn ask_for_events(&self, admin: &Admin, identity: &Identity) {
        let offered = identity.controller.async_events;
        let pairs = [
            (OAES_NAMESPACE_ATTRIBUTE, features::EVENT_NAMESPACE_ATTRIBUTE),
            (OAES_ANA_CHANGE, features::EVENT_ANA_CHANGE),
        ];
        let wanted =
            pairs.iter().filter(|(offer, _)| offered & offer != 0).fold(0, |all, (_, bit)| all | bit);
        if wanted == 0 {
            return;
        }
        let sqe = Sqe::set_features(features::id::ASYNC_EVENT_CONFIGURATION, wanted);
        if let Err(why) = admin.command("ask for events", sqe, 0).await {
            log::debug!("{}: {why}", self.label());
        }
    }

    async fn connect_admin(
        &self,
        addresses: &[SocketAddr],
        request: &QueueRequest,
    ) -> Result<(SocketAddr, ConnectedQueue), End> {
        let mut last = End::Trouble(String::new());
        for address in addresses {
            match socket::connect_queue(&self.runtime, address, request).await {
                Ok(queue) => return Ok((*address, queue)),
                Err(ConnectError { why, refused }) => {
                    let why = format!("connect {address}: {why}");
                    // A guest waits until it is let in again; who sits at a command does not.
                    let decides = refused && self.shared.config.offline;
                    last = if decides { End::Refused(why) } else { End::Trouble(why) };
                }
            }
        }
        Err(last)
    }

    async fn connect_lanes(&self, address: &SocketAddr, request: &QueueRequest) -> Result<(), String> {
        let done = Arc::new(Mailbox::<(usize, Result<(), String>)>::default());
        let mut given_up = GivenUp::default();
        for (index, reactor) in self.shared.reactors.iter().enumerate() {
            let queue_id = low16(low32(index as u64 + 1));
            let request = QueueRequest { queue_id, ..request.clone() };
            let (done, address) = (Arc::clone(&done), *address);
            let (key, path, number) = (self.shared.key, self.path, self.number);
            let sysfs = self.shared.config.sysfs.clone().filter(|_| self.shared.config.paths.len() > 1);
            let stop = given_up.hears();
            reactor.run(move |runtime| {
                if let Some(lane) = lane_of(runtime, key) {
                    lane.borrow_mut().expect(path, number);
                }
                let own = runtime.clone();
                runtime.spawn(async move {
                    let connecting = socket::connect_queue(&own, &address, &request);
                    let Either::First(connected) = first(connecting, stop.next()).await else { return };
                    let distance = match (&connected, sysfs) {
                        (Ok(ConnectedQueue { wire: Wire::Tcp(queue), .. }), Some(sysfs)) => {
                            numa::distance(sysfs, queue.socket.fd()).await
                        }
                        _ => numa::LOCAL,
                    };
                    let installed = connected.map_err(|error| error.why).map(|queue| {
                        if let Some(lane) = lane_of(&own, key) {
                            lane.borrow_mut().install(path, number, queue, (request.entries - 1, distance));
                        }
                    });
                    done.post((index, installed));
                });
            });
        }
        for _ in 0..self.shared.reactors.len() {
            let (index, installed) = done.next().await;
            installed.map_err(|why| format!("connect {address}, I/O queue {}: {why}", index + 1))?;
        }
        Ok(())
    }

    /// Keeps an association until it ends.
    async fn serve(&self, association: &Association) -> End {
        let admin = &association.admin;
        let busy = first(self.keep_alive(admin, &association.kept_alive), self.follow_events(association));
        let ended = first(lost(admin), self.notices(association.number));
        let jobs = first(self.chores(association), self.reset_lost(association));
        match first(first(busy, jobs), ended).await {
            Either::First(Either::First(Either::First(end) | Either::Second(end)))
            | Either::First(Either::Second(Either::First(end) | Either::Second(end)))
            | Either::Second(Either::First(end) | Either::Second(end)) => end,
        }
    }

    /// Sends keep-alives, the next one half the time-out after `last`, until one is not answered.
    async fn keep_alive(&self, admin: &Admin, last: &Cell<Instant>) -> End {
        let limit = self.timers().keep_alive_tmo;
        if limit.is_zero() {
            return std::future::pending().await;
        }
        loop {
            let now = self.runtime.refresh_now();
            self.runtime.sleep((last.get() + limit / 2) - now).await;
            last.set(self.runtime.refresh_now());
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
            match self.shared.notices[self.path].next().await {
                Notice::Closed => return End::Closed,
                Notice::Lost { association, loss, why } if association == number => {
                    self.loss.set(Some(loss));
                    return End::Trouble(why);
                }
                Notice::Lost { .. } => {}
                Notice::Asymmetric => self.shared.chores[self.path].post_once(()),
            }
        }
    }

    /// What is done when something happens: asymmetric access is looked at, and the namespace where
    /// another path has found it changed.
    async fn chores(&self, association: &Association) -> End {
        loop {
            let look_again = std::mem::take(&mut self.shared.status().paths[self.path].look_again);
            if look_again && let Err(end) = self.namespace_changed(association).await {
                return end;
            }
            let mut passing = false;
            if association.has_ana {
                match identify::ana(&association.admin, &association.identity).await {
                    Err(why) => return End::Trouble(why),
                    Ok(state) => {
                        let state = state.unwrap_or(AnaState::Inaccessible);
                        passing = matches!(state, AnaState::Inaccessible | AnaState::Change);
                        self.set_ana(association.number, state);
                    }
                }
            }
            let next = self.shared.chores[self.path].next();
            if passing {
                within(&self.runtime, ANA_POLL, next).await;
            } else {
                next.await;
            }
        }
    }

    /// Has the controllers of lost associations reset through this one. A reset that lasts holds up no other, and nothing else.
    async fn reset_lost(&self, association: &Association) -> End {
        let Association { admin, identity, record, connect_waits, .. } = association;
        let resets_max = usize::from(identity.controller.cross_resets_max);
        if resets_max == 0 {
            return std::future::pending().await;
        }
        let mut asked = BTreeSet::new();
        let mut under_way: Vec<(u64, ControllerInstance)> = Vec::new();
        loop {
            let mut quiet = Vec::new();
            for unquiet in self.shared.unquiet(self.runtime.now()) {
                let Some(instance) = unquiet.resettable_in(&record.subsystem_nqn) else { continue };
                if under_way.len() >= resets_max || !asked.insert(unquiet.association) {
                    continue;
                }
                match admin.reset_other(&instance).await {
                    Ok(Reset::Done) => quiet.push((unquiet.association, instance)),
                    Ok(Reset::UnderWay) => under_way.push((unquiet.association, instance)),
                    // The target itself is another one than before: what Connect promises is what is left.
                    Ok(Reset::Unknown) if unquiet.is_quiet(record, *connect_waits) => {
                        quiet.push((unquiet.association, instance));
                    }
                    Ok(Reset::Unknown) => {
                        log::debug!("{}: controller {} is not known", self.label(), instance.cntlid);
                    }
                    Err(why) => log::debug!("{}: {why}", self.label()),
                }
            }
            if !under_way.is_empty() {
                let entries = admin.resets().await.unwrap_or_else(|why| {
                    log::debug!("{}: {why}", self.label());
                    Vec::new()
                });
                under_way.retain(|(number, instance)| {
                    let names = |entry: &&ResetEntry| {
                        (entry.cntlid, entry.uniquifier) == (instance.cntlid, instance.uniquifier)
                    };
                    let state = entries.iter().rev().find(names).map(|entry| entry.state);
                    match state {
                        Some(ResetState::InProgress) => return true,
                        Some(ResetState::Succeeded) => quiet.push((*number, *instance)),
                        // Its time will be over.
                        Some(ResetState::Failed) | None => {
                            let cntlid = instance.cntlid;
                            log::debug!("{}: the reset of controller {cntlid} failed", self.label());
                        }
                    }
                    false
                });
            }
            if !quiet.is_empty() {
                for (number, instance) in quiet {
                    let (label, cntlid) = (self.label(), instance.cntlid);
                    log::info!(
                        "{label}: the target has reset controller {cntlid}, whose association was lost: writes of unknown outcome are sent again"
                    );
                    self.shared.quiet(number);
                }
                // A process after us has no need to wait for them. That it is not told costs no more than that.
                let _ = self.shared.remember().await;
                continue;
            }
            let next = self.shared.losses[self.path].next();
            if under_way.is_empty() {
                next.await;
            } else {
                within(&self.runtime, RESET_POLL, next).await;
            }
        }
    }

    fn set_ana(&self, number: u64, state: AnaState) {
        let before = {
            let mut status = self.shared.status();
            let others = status.serves_without(self.path);
            let path = &mut status.paths[self.path];
            let before = path.ana.replace(state);
            let was_usable = before.is_none_or(|before| before.refusal().is_none());
            path.history.failovers += u64::from(was_usable && state.refusal().is_some() && others);
            before
        };
        if before != Some(state) {
            let then = match state {
                AnaState::Optimized => "it is used",
                AnaState::NonOptimized => "it is used while no optimized path is there",
                AnaState::PersistentLoss => "it is not used, nor waited for",
                _ => "it is not used until that changes",
            };
            log::info!(
                "{}: the target says that the namespace is {state} on this path: {then}",
                self.label()
            );
        }
        self.shared.change(|status| {
            status.paths[self.path].hopeless = state == AnaState::PersistentLoss;
        });
        let path = self.path;
        self.shared.on_lanes(move |lane| lane.set_ana(path, number, state));
        if self.shared.is_hopeless() {
            self.shared.on_lanes(Lane::fail_waiting);
        }
    }
}

/// Tells those that connect I/O queues, when it is dropped, that nobody waits for them any more.
#[derive(Default)]
struct GivenUp(Vec<Arc<Mailbox<()>>>);

impl GivenUp {
    fn hears(&mut self) -> Arc<Mailbox<()>> {
        let hears = Arc::new(Mailbox::default());
        self.0.push(Arc::clone(&hears));
        hears
    }
}

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.iter().for_each(|one| one.post(()));
    }
}

/// The wait after so many attempts: doubling from 0.1 s to `limit`, and of that between a half and the whole, so that many
/// initiators do not return at the same moment.
fn reconnect_delay(attempts: u32, limit: Duration, random: u64) -> Duration {
    let whole = RECONNECT_FIRST * 2u32.saturating_pow(attempts.min(16));
    let permille = 500 + low32(random % 501);
    whole.min(limit) * permille / 1000
}

/// Awaits that nobody uses the device any more. What is said of associations that are over is not heard.
async fn closed(shared: &Shared, path: usize) {
    while !matches!(shared.notices[path].next().await, Notice::Closed) {}
}

/// Awaits the loss of the admin queue.
async fn lost(admin: &Admin) -> End {
    End::Trouble(admin.lost().await)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A seeded source: splitmix64.
    fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ (mixed >> 27)
    }

    #[test]
    fn waits_double_up_to_the_limit_and_spread_from_half_to_whole() {
        let (limit, mut seed) = (Duration::from_secs(10), 1);
        for (attempts, whole_ms) in
            [(0, 100), (1, 200), (2, 400), (6, 6400), (7, 10_000), (16, 10_000), (u32::MAX, 10_000)]
        {
            let whole = Duration::from_millis(whole_ms);
            let waits: Vec<_> =
                (0..1000).map(|_| reconnect_delay(attempts, limit, random(&mut seed))).collect();
            let (least, most) = (*waits.iter().min().unwrap(), *waits.iter().max().unwrap());
            assert!(least >= whole / 2 && most <= whole, "{attempts}: {least:?} to {most:?}");
            assert!(least < whole * 52 / 100 && most > whole * 98 / 100, "{attempts}: {least:?} to {most:?}");
            // A thousand hosts that lost the same link do not return within a tenth of the time.
            let tenth = |part: u32| {
                let from = whole / 2 + whole * part / 20;
                waits.iter().filter(|wait| **wait >= from && **wait < from + whole / 20).count()
            };
            assert!((0..10).all(|part| (50..200).contains(&tenth(part))), "{attempts}");
        }
        assert_eq!(reconnect_delay(9, Duration::ZERO, 7), Duration::ZERO);
    }
}
