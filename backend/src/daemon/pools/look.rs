//! The thread `pools`: it looks at what is known, and begins what can be begun.

use super::past::{self, Past};
use super::state::{Entry, Knowledge, Open, Phase, State, is_reached};
use super::{ABSENT_EVERY, ASK_MAX, LOOK_EVERY, RETRY_MAX, RETRY_MIN, SETTLED, Shared};
use crate::assemble::device::{self, OpenError, Opening};
use crate::assemble::pool::{self as assemble, Found};
use crate::assemble::{host, reserve};
use crate::tail::{self, FileTail};
use hawser_block::Device;
use hawser_config::value::Name;
use hawser_runtime::ReactorHandle;
use hawser_volume::pool::{self, Label, OpenOptions, Pool};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whatever waits for a change looks again.
    pub(super) fn tell(&self) {
        self.wake.notify_one();
        self.changed.notify_all();
    }

    /// Looks at everything, begins what can be begun, and says when to look again.
    fn look(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let mut state = self.state();
        let tried = self.try_absent(&mut state, now);
        let asked = self.ask(&mut state, now);
        let labels = state.devices.iter().filter(|known| !known.direct && !known.taken).filter_map(|known| {
            let Knowledge::Member(label) = &known.knowledge else { return None };
            Some((&known.name, label))
        });
        let mut all = Found::all(labels);
        state
            .pools
            .retain(|uuid, entry| !matches!(entry.phase, Phase::Waiting { .. }) || all.contains_key(uuid));
        for (uuid, entry) in &mut state.pools {
            if let Some(found) = all.remove(uuid) {
                entry.found = found;
            }
        }
        for (uuid, found) in all {
            let phase = Phase::Waiting { again: now, wait: RETRY_MIN, tried: Vec::new() };
            let (trouble, seen, past) = (String::new(), String::new(), None);
            state.pools.insert(uuid, Entry { found, since: now, phase, trouble, seen, past });
        }
        let uuids: Vec<[u8; 16]> = state.pools.keys().copied().collect();
        let mut next = asked;
        for uuid in uuids {
            let at = match state.pools[&uuid].phase {
                Phase::Waiting { .. } if asked.is_none() => self.consider(&mut state, uuid, now),
                Phase::Waiting { .. } | Phase::Opening => None,
                Phase::Open(_) => self.give_back(&mut state, uuid, now),
            };
            next = [next, at].into_iter().flatten().min();
        }
        state.fill();
        let failed = state.devices.iter().filter_map(|known| match known.knowledge {
            Knowledge::Failed { again, .. } => Some(again),
            _ => None,
        });
        failed.chain(next).chain(tried).min()
    }

    /// Tries to open devices that were not there. Returns when to try again.
    fn try_absent(self: &Arc<Self>, state: &mut State, now: Instant) -> Option<Instant> {
        state.absent.retain(|absent| !absent.place.is_there());
        for absent in state.absent.iter_mut().filter(|absent| absent.again.is_some_and(|again| again <= now))
        {
            // A file's lock may be waited for: one attempt at a time.
            absent.again = None;
            let (shared, placed, place) =
                (Arc::clone(self), absent.config.clone(), Arc::clone(&absent.place));
            let attempt = move || {
                let opening = Opening { had_predecessor: true, offline: false, in_run_state: true };
                match device::open(&placed, &shared.config, opening, &shared.reactors) {
                    Ok(device) => {
                        log::info!("device {}: is there now", placed.value.name);
                        place.set(device);
                    }
                    Err(OpenError::Config(error)) => place.set_trouble(&error.to_string()),
                    Err(OpenError::Failed(what)) => place.set_trouble(&what),
                }
                let mut state = shared.state();
                if let Some(absent) = state.absent.iter_mut().find(|it| Arc::ptr_eq(&it.place, &place)) {
                    absent.again = Some(Instant::now() + ABSENT_EVERY);
                }
                drop(state);
                shared.tell();
                Ok(())
            };
            tokio::spawn(blocking(attempt));
        }
        state.absent.iter().filter_map(|absent| absent.again).min()
    }

    /// Asks devices that were reached what they belong to. Returns when those that are being asked are not waited for any more.
    fn ask(self: &Arc<Self>, state: &mut State, now: Instant) -> Option<Instant> {
        let mut until = None;
        for known in state.devices.iter_mut().filter(|known| !known.direct && !known.taken) {
            let is_due = match known.knowledge {
                Knowledge::Unknown => true,
                Knowledge::Failed { again, .. } => again <= now,
                Knowledge::Asking(_) | Knowledge::Nothing | Knowledge::Member(_) => false,
            };
            if is_due && is_reached(known.device.as_ref()) {
                let wait = match known.knowledge {
                    Knowledge::Failed { wait, .. } => wait,
                    _ => RETRY_MIN,
                };
                known.knowledge = Knowledge::Asking(now);
                let asked = pool::probe(&self.reactors[0], Arc::clone(&known.device));
                let (shared, name) = (Arc::clone(self), known.name.clone());
                tokio::spawn(async move { shared.answered(&name, asked.await, wait) });
            }
            if let Knowledge::Asking(since) = known.knowledge
                && since + ASK_MAX > now
            {
                until = until.max(Some(since + ASK_MAX));
            }
        }
        until
    }

    fn answered(&self, name: &Name, answer: Result<Option<Label>, pool::PoolError>, wait: Duration) {
        let mut state = self.state();
        if let Some(known) = state.devices.iter_mut().find(|known| known.name == *name)
            && matches!(known.knowledge, Knowledge::Asking(_))
        {
            known.knowledge = match answer {
                Ok(None) => Knowledge::Nothing,
                Ok(Some(label)) => Knowledge::Member(label),
                Err(error) => {
                    log::warn!(
                        "device {name}: whether it belongs to a pool is not known: {}",
                        assemble::line_of(error)
                    );
                    Knowledge::Failed { again: Instant::now() + wait, wait: (wait * 2).min(RETRY_MAX) }
                }
            };
        }
        drop(state);
        self.tell();
    }

    /// Opens a pool that can be opened now; else says why not, and when to look again.
    fn consider(self: &Arc<Self>, state: &mut State, uuid: [u8; 16], now: Instant) -> Option<Instant> {
        let clash = {
            let entry = &state.pools[&uuid];
            let same = |(other, it): &(&[u8; 16], &Entry)| {
                **other != uuid && it.found.label.pool == entry.found.label.pool
            };
            let other = state.pools.iter().find(same);
            other.map(|(_, other)| assemble::clash_line(&entry.found.label.pool, &entry.found, &other.found))
        };
        let entry = state.pools.get_mut(&uuid)?;
        let Phase::Waiting { again, tried, .. } = &entry.phase else { return None };
        if let Some(what) = clash {
            entry.set_trouble(what);
            return None;
        }
        let Ok(name) = entry.found.label.pool.parse::<Name>() else {
            let what = format!("its name, {:?}, cannot be used here", entry.found.label.pool);
            entry.set_trouble(what);
            return None;
        };
        let policy = self.config.pool(&name);
        let until = entry.since + Duration::from_secs(u64::from(policy.assemble_timeout));
        let missing = entry.found.missing_line().or_else(|| entry.found.replacement_line());
        if let Some(missing) = &missing
            && until > now
        {
            let what =
                format!("{missing}; waiting for at most {} s (assemble_timeout)", policy.assemble_timeout);
            entry.set_trouble(what);
            return Some(until);
        }
        if let Some(what) = past::is_older(&self.config.daemon.state_dir, &entry.found.label) {
            entry.set_trouble(match &missing {
                Some(missing) => format!("{missing}; {what}"),
                None => what,
            });
            return Some(now + LOOK_EVERY);
        }
        let names: Vec<Name> = entry.found.devices.iter().map(|(name, ..)| name.clone()).collect();
        if *tried == names && *again > now {
            return Some(*again);
        }
        let wait = match &entry.phase {
            Phase::Waiting { wait, tried, .. } if *tried == names => *wait,
            _ => RETRY_MIN,
        };
        entry.phase = Phase::Opening;
        log::info!("pool {name}: is being opened on {}", entry.found.device_names());
        if let Some(missing) = &missing {
            log::warn!("pool {name}: {missing}: it is started without");
        }
        let devices = state.devices.iter().filter(|known| names.contains(&known.name));
        let devices: Vec<Arc<dyn Device>> = devices.map(|known| Arc::clone(&known.device)).collect();
        let owner = self.reactors[state.opened % self.reactors.len()].clone();
        state.opened += 1;
        state.tasks += 1;
        // Whoever opens it finds out for himself what is missing.
        let (shared, degraded) = (Arc::clone(self), until <= now);
        tokio::spawn(async move {
            let opened = shared.open(uuid, &policy, owner, devices, degraded).await;
            shared.opened(uuid, opened, names, wait);
        });
        None
    }

    async fn open(
        &self,
        uuid: [u8; 16],
        policy: &hawser_config::PoolConfig,
        owner: ReactorHandle,
        devices: Vec<Arc<dyn Device>>,
        degraded: bool,
    ) -> Result<Open, String> {
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir)?;
        let host = identity.id.0;
        let (members, assume_exclusive) = (devices.clone(), policy.assume_exclusive);
        let reserved = blocking(move || reserve::take_all(members, host, assume_exclusive)).await?;
        let path = tail::file_of(&self.folder, &uuid);
        let opened = match FileTail::open(&path, &uuid) {
            Ok(tail) => {
                let options =
                    OpenOptions { degraded, ..assemble::open_options(policy, host, Box::new(tail)) };
                Pool::open(&owner, devices, options).await.map_err(assemble::line_of)
            }
            Err(what) => Err(what),
        };
        match opened {
            Ok(pool) => {
                let (state_dir, past) = (self.config.daemon.state_dir.clone(), Past::of(&pool.view()));
                let kept = blocking(move || {
                    past::keep(&state_dir, &uuid, past);
                    Ok(())
                });
                kept.await?;
                Ok(Open { pool, reserved, tail: path })
            }
            Err(what) => {
                // Another host may have more luck.
                let left = blocking(move || {
                    reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
                    Ok(())
                });
                left.await?;
                Err(what)
            }
        }
    }

    fn opened(&self, uuid: [u8; 16], opened: Result<Open, String>, tried: Vec<Name>, wait: Duration) {
        let mut state = self.state();
        state.tasks = state.tasks.saturating_sub(1);
        if let Some(entry) = state.pools.get_mut(&uuid) {
            match opened {
                Ok(open) => {
                    log::info!("pool {}: open, {} volumes", open.pool.name(), open.pool.volumes().len());
                    entry.phase = Phase::Open(open);
                    entry.set_trouble(String::new());
                }
                Err(what) => {
                    let again = Instant::now() + wait;
                    entry.phase = Phase::Waiting { again, wait: (wait * 2).min(RETRY_MAX), tried };
                    entry.set_trouble(what);
                }
            }
        }
        drop(state);
        self.tell();
    }

    /// Gives an open pool its members that are reached only now.
    fn give_back(self: &Arc<Self>, state: &mut State, uuid: [u8; 16], now: Instant) -> Option<Instant> {
        let entry = state.pools.get_mut(&uuid)?;
        let pool = entry.pool()?.clone();
        let view = pool.view();
        let name = view.name.clone();
        let shown = assemble::pool_view(&view);
        let seen = std::iter::once(shown.state.name().to_owned())
            .chain(shown.troubles)
            .collect::<Vec<_>>()
            .join(": ");
        if entry.seen != seen {
            log::info!("pool {name}: {seen}");
            entry.seen = seen;
        }
        let past = Past::of(&view);
        let mut next = now + LOOK_EVERY;
        match entry.past {
            Some((seen, since)) if seen == past => {
                // It was on its way to the members then.
                if let Some(since) = since
                    && since + SETTLED <= now
                {
                    entry.past = Some((past, None));
                    let state_dir = self.config.daemon.state_dir.clone();
                    state.tasks += 1;
                    let shared = Arc::clone(self);
                    tokio::spawn(async move {
                        let kept = blocking(move || {
                            past::keep(&state_dir, &uuid, past);
                            Ok(())
                        });
                        // It has said so itself.
                        let _ = kept.await;
                        let mut state = shared.state();
                        state.tasks = state.tasks.saturating_sub(1);
                        drop(state);
                        shared.tell();
                    });
                } else if let Some(since) = since {
                    next = next.min(since + SETTLED);
                }
            }
            _ => {
                entry.past = Some((past, Some(now)));
                next = next.min(now + SETTLED);
            }
        }
        let members: Vec<Name> = entry.found.devices.iter().map(|(name, ..)| name.clone()).collect();
        let is_complete = !entry.lacks_device();
        // Who asks for a change may be about to give it more.
        if is_complete && self.asks.is_idle(&name) {
            state.tasks += usize::from(self.let_go(entry, &view));
        }
        if view.is_failed {
            // Another host has it: what comes back is that one's.
            return Some(next);
        }
        self.see_reserved(state, uuid, &view, now);
        for known in state.devices.iter_mut().filter(|known| members.contains(&known.name)) {
            // Those that it has it looks after itself.
            if view.members.iter().any(|member| member.device.as_deref() == Some(known.name.as_str())) {
                known.again = (now, RETRY_MIN);
                continue;
            }
            if known.taken || !is_reached(known.device.as_ref()) {
                continue;
            }
            let (at, wait) = known.again;
            if at > now {
                next = next.min(at);
                continue;
            }
            known.again = (now + wait, (wait * 2).min(RETRY_MAX));
            if is_complete {
                // It was replaced, and may not say any more that it is a member.
                known.knowledge = Knowledge::Unknown;
                continue;
            }
            state.tasks += 1;
            let (shared, device, pool) = (Arc::clone(self), Arc::clone(&known.device), pool.clone());
            let first = wait == RETRY_MIN;
            tokio::spawn(async move {
                let added = shared.add(&pool, Arc::clone(&device)).await;
                let mut state = shared.state();
                state.tasks = state.tasks.saturating_sub(1);
                match added {
                    Ok(reserved) => {
                        log::info!("pool {}: device {} is back", pool.name(), device.name());
                        if let Some(Entry { phase: Phase::Open(open), .. }) = state.pools.get_mut(&uuid) {
                            open.reserved.extend(reserved);
                        }
                    }
                    Err(what) if first => {
                        log::warn!("pool {}: device {}: {what}", pool.name(), device.name())
                    }
                    Err(_) => {}
                }
                drop(state);
                shared.tell();
            });
        }
        Some(next)
    }

    /// Ends the reservations of devices that were replaced; whether there are any.
    fn let_go(self: &Arc<Self>, entry: &mut Entry, view: &pool::PoolView) -> bool {
        let Phase::Open(open) = &mut entry.phase else { return false };
        let is_member = |device: &Arc<dyn Device>| {
            view.members.iter().any(|member| member.device.as_deref() == Some(device.name()))
        };
        let replaced: Vec<Arc<dyn Device>> =
            open.reserved.extract_if(.., |device| !is_member(device)).collect();
        if replaced.is_empty() {
            return false;
        }
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            let left = blocking({
                let shared = Arc::clone(&shared);
                move || {
                    let identity = host::identity(&shared.config.host, &shared.config.daemon.state_dir)?;
                    replaced.iter().for_each(|device| reserve::leave(device.as_ref(), &identity.id.0));
                    Ok(())
                }
            });
            // It has said so itself.
            let _ = left.await;
            let mut state = shared.state();
            state.tasks = state.tasks.saturating_sub(1);
            drop(state);
            shared.tell();
        });
        true
    }

    async fn add(&self, pool: &Pool, device: Arc<dyn Device>) -> Result<Vec<Arc<dyn Device>>, String> {
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir)?;
        let assume_exclusive = pool.name().parse().is_ok_and(|name| self.config.pool(&name).assume_exclusive);
        let (members, host) = (vec![Arc::clone(&device)], identity.id.0);
        let reserved = blocking(move || reserve::take_all(members, host, assume_exclusive)).await?;
        if let Err(error) = pool.add_member(device).await {
            // It may be another host's, or nobody's.
            let left = blocking(move || {
                reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &host));
                Ok(())
            });
            left.await?;
            return Err(assemble::line_of(error));
        }
        Ok(reserved)
    }
}

pub(super) async fn run(shared: Arc<Shared>) -> bool {
    loop {
        let stop = shared.state().stop;
        if let Some(deadline) = stop {
            return shared.close(deadline).await;
        }
        match shared.look() {
            None => shared.wake.notified().await,
            Some(at) => {
                // Whether it was woken or is late, it looks.
                let _ = tokio::time::timeout_at(at.into(), shared.wake.notified()).await;
            }
        }
    }
}

/// What may take long, on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(error.to_string()))
}
