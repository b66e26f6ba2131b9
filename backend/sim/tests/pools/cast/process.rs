//! The process that has the pool: how it begins, dies, and ends.

use super::{Cast, Crash, Health, Member, PATIENCE, ready};
use crate::model::Names;
use hawser_block::Device;
use hawser_runtime::ReactorHandle;
use hawser_sim::SimDisk;
use hawser_volume::pool::{self, CreateOptions, OpenOptions, Pool, PoolError};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// The pool's name and UUID, and who opens it.
const NAME: &str = "p0";
const POOL_UUID: [u8; 16] = [0x70; 16];
const HOST: [u8; 16] = [1; 16];

impl Cast {
    fn start_reactors(&mut self) -> ReactorHandle {
        assert!(self.reactors.is_empty(), "one process at a time");
        for _ in 0..=self.plan.lanes {
            let reactor = self.world.reactor();
            self.reactors.push(reactor);
        }
        self.reactors[0].runtime().handle()
    }

    pub(super) fn end_process(&mut self) {
        self.change = None;
        self.asks.clear();
        for queue in &mut self.queues {
            if let Some(client) = queue.client.take() {
                client.borrow_mut().abandon();
            }
        }
        // Who serves what others use last.
        for reactor in self.reactors.drain(..).rev() {
            self.world.kill(reactor);
        }
        self.pool = None;
    }

    /// The process ends without warning, and the next one begins.
    pub(crate) fn die(&mut self, crash: Crash) -> Result<(), String> {
        self.end(crash);
        self.start(crash == Crash::Cut)
    }

    fn end(&mut self, crash: Crash) {
        self.world.note(&[6, crash as u64, self.world.now().0]);
        if crate::tells() {
            println!("{:?} {crash:?}, {} bytes in the tail", self.world.now(), self.tail.len());
        }
        if self.tail.len() > 0 && crash == Crash::Kill {
            self.count("tails_found");
        }
        if self.plan.has_parity() {
            // Of who is out since a while what was written without the log has been made durable.
            self.is_lost_before |= self.world.now() < self.lost_until || self.has_faulty();
            // A whole stripe that was being written when the process ends, and a member that is lost at the same moment, are one too many.
            crate::events::heal_unnoticed(self);
            self.is_cache_lost |= self.is_lost_before || self.world.now() < self.doubtful_until;
            if !self.is_mended && self.random.chance(300) {
                // Of what is in the log there is one copy more than members may be lost.
                crate::events::lose_at_crash(self);
            }
        }
        self.end_process();
        {
            // They end as another process's, or never.
            let mut rules = self.shared.rules.borrow_mut();
            (rules.straddling, rules.lost_until) = (0, self.shared.models.borrow_mut().request());
        }
        self.shared.trap.clear();
        let replays = crash == Crash::Kill && self.random.chance(600);
        if crash == Crash::Cut {
            for member in &self.members {
                member.disk.state().lose_cache();
            }
            self.tail.lose_power();
            self.shared.rules.borrow_mut().must_be_told.clear();
        }
        self.count(if crash == Crash::Cut { "cuts" } else { "kills" });
        for queue in &self.queues {
            let mut guest = queue.guest.borrow_mut();
            guest.process_died(replays);
            if !replays {
                guest.stop();
            }
        }
        let mut models = self.shared.models.borrow_mut();
        if crash == Crash::Cut {
            models.cut();
        } else {
            models.process_died();
        }
    }

    fn open_options(&self) -> OpenOptions {
        let mut options = OpenOptions::new(HOST, Box::new(self.tail.clone()));
        options.no_space = self.plan.no_space;
        options.discard = self.plan.discards;
        options.intent_idle = self.plan.intent_idle;
        options.spare_delay = self.plan.spare_delay;
        options.sync_bytes_per_second = self.plan.sync_bytes_per_second;
        options
    }

    /// Asks on the owner's reactor, and waits.
    pub(crate) fn ask<T: 'static>(
        &mut self,
        what: &str,
        mut ask: impl Future<Output = Result<T, PoolError>> + Unpin + 'static,
    ) -> Result<Result<T, PoolError>, String> {
        let mut answer = None;
        let at = self.world.now() + PATIENCE;
        let over = self.run(at, &mut |_| {
            answer = ready(&mut ask);
            answer.is_some()
        })?;
        match (over, answer) {
            (true, Some(answer)) => Ok(answer),
            _ => Err(format!("{what} does not end: {}", self.state())),
        }
    }

    /// Devices that can be reached and say that they are of the pool, in any order.
    fn devices(&mut self) -> Result<Vec<Arc<dyn Device>>, String> {
        let reachable =
            self.members.iter().filter(|member| !member.is_retired && member.health != Health::Dead);
        let mut disks: Vec<(Arc<SimDisk>, bool)> =
            reachable.map(|member| (Arc::clone(&member.disk), member.is_new || member.is_leaving)).collect();
        for at in (1..disks.len()).rev() {
            disks.swap(at, self.random.index(at + 1));
        }
        let mut devices: Vec<Arc<dyn Device>> = Vec::new();
        for (disk, is_new) in disks {
            if is_new || self.random.chance(200) {
                let owner = self.reactors[0].runtime().handle();
                let ask = pool::probe(&owner, Arc::clone(&disk) as Arc<dyn Device>);
                let label = match self.ask("a probe", ask)? {
                    Ok(label) => label,
                    // A superblock that was being written when the power went.
                    Err(_) if is_new => None,
                    Err(_) if self.present().any(|member| member.health == Health::Faulty) => {
                        crate::events::mend_faulty(self);
                        return self.devices();
                    }
                    Err(why) => return Err(format!("a probe: {why:?}")),
                };
                match label {
                    Some(label) if label.pool == NAME && label.pool_uuid == POOL_UUID => {}
                    // It was not taken, or is one no more.
                    None if is_new => continue,
                    other => return Err(format!("{} says {other:?}", disk.name())),
                }
            }
            devices.push(disk);
        }
        Ok(devices)
    }

    /// Writes the pool.
    pub(crate) fn create(&mut self) -> Result<(), String> {
        let owner = self.start_reactors();
        let devices = self.members.iter().map(|member| Arc::clone(&member.disk) as Arc<dyn Device>).collect();
        let mut options = CreateOptions::new(NAME, POOL_UUID, self.plan.level);
        options.strip_bytes = self.plan.strip_bytes;
        options.extent_bytes = self.plan.extent_bytes;
        options.region_bytes = self.plan.region_bytes;
        options.log_bytes = self.plan.log_bytes;
        options.parity_log_bytes = self.plan.parity_log_bytes;
        options.metadata_bytes = Some(self.plan.metadata_bytes);
        let ask = pool::create(&owner, devices, options);
        self.ask("creation", ask)?.map_err(|why| format!("creation: {why:?}"))?;
        self.end_process();
        Ok(())
    }

    /// Starts a process that opens the pool; it may die in between.
    pub(crate) fn start(&mut self, mut cut: bool) -> Result<(), String> {
        let mut deaths = 0;
        if !self.keeps_dead && self.random.chance(300) {
            // Whoever was dead may be back before anybody looks.
            crate::events::heal_dead(self);
        }
        let mut degraded = self.random.chance(700);
        if !self.plan.is_redundant() {
            // Nobody opens what cannot be read.
            crate::events::heal_all(self);
        }
        loop {
            self.shared.trap.clear();
            self.start_reactors();
            if self.random.chance(200) {
                self.check(false)?;
            }
            let devices = self.devices()?;
            let is_missing = self.present().any(|member| member.health == Health::Dead);
            let mut options = self.open_options();
            options.degraded = is_missing && degraded;
            if crate::tells() {
                let names: Vec<&str> = devices.iter().map(|device| device.name()).collect();
                println!("{:?} opens with {names:?}, degraded: {}", self.world.now(), options.degraded);
            }
            let owner = self.reactors[0].runtime().handle();
            let mut ask = Pool::open(&owner, devices, options);
            let dies = deaths < 3 && self.random.chance(150);
            let mut until = self.world.now() + PATIENCE;
            if dies && self.random.chance(500) {
                self.shared.trap.set(1 + self.random.below(30));
            } else if dies {
                let most = 4_000_000u64 >> self.random.below(10);
                until = self.world.now() + Duration::from_nanos(1 + self.random.below(most));
            }
            let mut answer = None;
            let over = self.run(until, &mut |_| {
                answer = ready(&mut ask);
                answer.is_some()
            })?;
            if self.shared.trap.is_sprung() || (dies && !over) {
                deaths += 1;
                let crash = if self.random.chance(500) { Crash::Cut } else { Crash::Kill };
                cut |= crash == Crash::Cut;
                drop(ask);
                self.count("deaths_while_opening");
                self.end(crash);
                continue;
            }
            self.shared.trap.clear();
            match answer {
                Some(Ok(pool)) => {
                    self.pool = Some(pool);
                    return self.started(cut);
                }
                Some(Err(why)) if is_missing && !degraded => {
                    if crate::tells() {
                        println!("refused: {why:?}");
                    }
                    self.count("refused_without_degraded");
                    degraded = true;
                    self.end_process();
                }
                Some(Err(why)) if self.present().any(|member| member.health == Health::Faulty) => {
                    if crate::tells() {
                        println!("cannot be read: {why:?}");
                    }
                    self.count("opened_when_mended");
                    crate::events::mend_faulty(self);
                    self.end_process();
                }
                Some(Err(PoolError::Conflict(why)))
                    if why.contains("whole stripes were being written")
                        && (self.is_lost_with_process || self.is_lost_before) =>
                {
                    // A member and the power were lost at once, and nobody can say what is right: that is said.
                    self.count("refused_as_half_written");
                    self.end_process();
                    if crate::events::return_lost(self) {
                        // With the member nothing is lost.
                        self.is_lost_with_process = false;
                    } else if self.is_lost_before {
                        self.is_half_written = true;
                        return Err(why);
                    } else {
                        return Err(format!("refused with all that there is: {why}"));
                    }
                }
                Some(Err(PoolError::Conflict(why))) if self.gives_up_outdated(&why) => {
                    degraded = true;
                    self.end_process();
                }
                Some(Err(why)) => return Err(format!("the pool cannot be opened: {why:?}")),
                None => return Err(format!("the pool is not opened in {PATIENCE:?}")),
            }
        }
    }

    /// The pool is refused with a member that nobody can tell to be behind: whether there is one, which is not given to it any more.
    fn gives_up_outdated(&mut self, why: &str) -> bool {
        let is_it = |member: &&mut Member| {
            member.is_outdated
                && !member.is_retired
                && member.health != Health::Dead
                && why.contains(member.disk.name())
        };
        let is_refused = why.contains("were each used without the other");
        let Some(member) = self.members.iter_mut().find(is_it).filter(|_| is_refused) else { return false };
        if crate::tells() {
            println!("without {}: {why}", member.disk.name());
        }
        member.is_retired = true;
        self.count("outdated_members");
        true
    }

    fn started(&mut self, cut: bool) -> Result<(), String> {
        if (self.is_cache_lost || self.is_lost_with_process || self.is_lost_before) && !cut {
            // All members stay where some stripes could not be computed without one; then it is told.
            let mut models = self.shared.models.borrow_mut();
            let mut rules = self.shared.rules.borrow_mut();
            (rules.may_tell_loss, rules.lost_at) = (models.lose_unflushed(), models.request());
            rules.lost_until = rules.lost_at;
        }
        (self.is_lost_with_process, self.is_lost_before, self.is_cache_lost) = (false, false, false);
        let pool = self.pool.clone().ok_or("it is open")?;
        let shift = self.plan.block_size.shift();
        self.shared.models.borrow_mut().extent_blocks = pool.view().extent_bytes >> shift;
        self.shared.models.borrow_mut().metadata_pages = self.plan.metadata_bytes / 4096;
        let actual: Names = pool
            .volumes()
            .into_iter()
            .map(|volume| (volume.name, (volume.size_bytes >> shift, volume.is_snapshot)))
            .collect();
        self.shared.models.borrow_mut().recovered(&actual, cut)?;
        self.queues.retain(|queue| actual.contains_key(&queue.guest.borrow().volume));
        self.take_roll();
        self.wants_verify = true;
        self.attach_all();
        Ok(())
    }

    /// Looks at everything that the members say; nobody has the pool open.
    pub(crate) fn check(&mut self, is_closed: bool) -> Result<(), String> {
        if self.present().any(|member| member.health == Health::Faulty) {
            // Nothing can be said of what cannot be read.
            return Ok(());
        }
        let mut devices = self.devices()?;
        if is_closed {
            // What never became a member.
            let is_new =
                |name: &str| self.members.iter().any(|member| member.is_new && member.disk.name() == name);
            devices.retain(|device| !is_new(device.name()));
        }
        let owner = self.reactors[0].runtime().handle();
        let ask = pool::check(&owner, devices);
        let report = self.ask("a check", ask)?;
        self.count("checks");
        let report = match report {
            Err(PoolError::Conflict(why)) if !is_closed && self.gives_up_outdated(&why) => return Ok(()),
            report => report.map_err(|why| format!("a check: {why:?}"))?,
        };
        // What members miss is no fault of what is there.
        let is_expected = |fault: &String| {
            // One of two copies, and what was being written, when a crash came between.
            let of_crash = [
                "superblock at",
                "a root, is torn",
                "its parity log's header",
                "its parity log has an entry",
            ];
            fault.contains(" is stale") || !is_closed && of_crash.iter().any(|text| fault.contains(text))
        };
        let faults: Vec<&String> = report.faults.iter().filter(|fault| !is_expected(fault)).collect();
        match faults.first() {
            Some(fault) => Err(format!("a check finds {} faults: {fault}", faults.len())),
            None => Ok(()),
        }
    }

    /// Closes the pool and ends the process; `false`: that died, and the next one has it open.
    pub(crate) fn close(&mut self) -> Result<bool, String> {
        self.wait("what goes on before the pool is closed", &mut |cast| cast.is_idle())?;
        self.detach(|_| true);
        let Some(pool) = self.pool.take() else { return Ok(true) };
        let mut ask = pool.close();
        let (mut answer, at) = (None, self.world.now() + PATIENCE);
        self.run(at, &mut |_| {
            answer = ready(&mut ask);
            answer.is_some()
        })?;
        if self.shared.trap.is_sprung() {
            self.die(self.crash)?;
            return Ok(false);
        }
        match answer.ok_or_else(|| format!("closing does not end: {}", self.state()))? {
            Ok(()) => {}
            Err(_) if self.shared.rules.borrow().may_fail => {
                self.die(Crash::Kill)?;
                return Ok(false);
            }
            Err(why) => return Err(format!("closing: {why:?}")),
        }
        drop(pool);
        self.shared.models.borrow_mut().all_durable();
        self.end_process();
        Ok(true)
    }

    /// A process that looks only.
    pub(crate) fn start_for_check(&mut self) -> Result<(), String> {
        self.start_reactors();
        Ok(())
    }

    /// See there.
    pub(crate) fn end_check(&mut self) {
        self.end_process();
    }

    /// Whether the pool can be opened with all that there is, which must not be; says how.
    pub(crate) fn opens_split(&mut self) -> Result<Option<String>, String> {
        let mut how = None;
        for degraded in [false, true] {
            let owner = self.start_reactors();
            let devices = self.present().map(|member| Arc::clone(&member.disk) as Arc<dyn Device>).collect();
            let mut options = self.open_options();
            options.degraded = degraded;
            let answer = self.ask("opening", Pool::open(&owner, devices, options))?;
            if crate::tells() {
                println!("both halves: {:?}", answer.as_ref().err());
            }
            if answer.is_ok() {
                how = Some(format!("degraded: {degraded}"));
            }
            drop(answer);
            self.end_process();
        }
        Ok(how)
    }
}
