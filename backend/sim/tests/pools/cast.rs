//! Everybody in a history: the members, the process with its pool, and the guests; and what kills and starts them.

mod members;
mod process;

pub(crate) use members::Member;

use crate::guest::{Client, Guest, Rules, Shared};
use crate::model::Models;
use crate::plan::Plan;
use crate::tail::SimTail;
use hawser_block::Device;
use hawser_runtime::{Instant, Reactor};
use hawser_sim::{Random, Trap, World, WorldConfig};
use hawser_volume::pool::{NoSpacePolicy, Pool, PoolError, PoolView};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// The longest that something may take that nothing hinders.
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) type AnyAsk = Pin<Box<dyn Future<Output = Result<(), PoolError>>>>;

/// What was asked for, if it is there.
pub(crate) fn ready<T>(ask: &mut (impl Future<Output = T> + Unpin + ?Sized)) -> Option<T> {
    match Pin::new(ask).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => Some(answer),
        Poll::Pending => None,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Good,
    /// Some requests fail, or some blocks cannot be read.
    Faulty,
    Dead,
}

/// A guest's queue, whether or not there is a process that serves it.
pub(crate) struct Queue {
    pub(crate) guest: Rc<RefCell<Guest>>,
    pub(crate) client: Option<Rc<RefCell<Client>>>,
    pub(crate) lane: usize,
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    Kill,
    Cut,
}

/// Everybody.
pub(crate) struct Cast {
    pub(crate) plan: Plan,
    pub(crate) world: World,
    pub(crate) shared: Shared,
    pub(crate) tail: SimTail,
    pub(crate) members: Vec<Member>,
    /// The owner's is the first.
    pub(crate) reactors: Vec<Reactor>,
    pub(crate) pool: Option<Pool>,
    pub(crate) queues: Vec<Queue>,
    /// A change of volumes that goes on.
    pub(crate) change: Option<AnyAsk>,
    /// Other things that were asked for: what, and whether it may be refused.
    pub(crate) asks: Vec<(String, bool, AnyAsk)>,
    /// What it is when the trap springs.
    pub(crate) crash: Crash,
    /// Follows from the seed and the event's number.
    pub(crate) random: Random,
    pub(crate) counts: BTreeMap<&'static str, u64>,
    /// Volumes are to be read whole before anything else happens.
    pub(crate) wants_verify: bool,
    /// There are volumes that nobody uses yet.
    wants_attach: bool,
    pub(crate) next_name: u64,
    next_disk: u8,
    told_no_space: u64,
    /// Members that are dead stay so.
    pub(crate) keeps_dead: bool,
    /// When space was last given back.
    pub(crate) freed_at: Instant,
    /// A member's power was lost, and the pool may not know yet.
    pub(crate) doubtful_until: Instant,
    /// A member was lost when the process ended: it may be that nobody can say what it had. The pool may be refused without it, and not with it.
    pub(crate) is_lost_with_process: bool,
    /// A member was put out just before the process ended, or may have been: the pool may be refused, with it too.
    pub(crate) is_lost_before: bool,
    /// A member's cache was lost with the process, or just before, and what was in it may be lost.
    pub(crate) is_cache_lost: bool,
    /// Until then a member that died may not be known to be out, or what was written without the log may not be durable.
    pub(crate) lost_until: Instant,
    /// The pool was refused, rightly, and that is the end.
    pub(crate) is_half_written: bool,
    /// All shall be well, and stay so.
    pub(crate) is_mended: bool,
}

impl Drop for Cast {
    fn drop(&mut self) {
        self.end_process();
    }
}

impl Cast {
    pub(crate) fn new(plan: Plan) -> Cast {
        let world = World::new(WorldConfig::new(plan.seed));
        let trap = Arc::new(Trap::default());
        let block_bytes = plan.block_size.bytes() as usize;
        let shared = Shared {
            models: Rc::new(RefCell::new(Models::new(block_bytes))),
            troubles: Rc::default(),
            rules: Rc::new(RefCell::new(Rules { may_lack_space: true, ..Rules::default() })),
            world: world.clone(),
            trap: Arc::clone(&trap),
            block_bytes,
        };
        let tail = SimTail::new(plan.tail_bytes, trap);
        let random = Random::new(plan.seed ^ 0x57_4561);
        let mut cast = Cast {
            world,
            shared,
            tail,
            members: Vec::new(),
            reactors: Vec::new(),
            pool: None,
            queues: Vec::new(),
            change: None,
            asks: Vec::new(),
            crash: Crash::Kill,
            random,
            counts: BTreeMap::new(),
            wants_verify: false,
            wants_attach: false,
            next_name: 0,
            next_disk: 0,
            told_no_space: 0,
            keeps_dead: false,
            freed_at: Instant::default(),
            doubtful_until: Instant::default(),
            is_lost_with_process: false,
            is_lost_before: false,
            is_cache_lost: false,
            lost_until: Instant::default(),
            is_half_written: false,
            is_mended: false,
            plan,
        };
        for _ in 0..cast.plan.members {
            let member = cast.new_member();
            cast.members.push(Member { is_new: false, ..member });
        }
        cast
    }

    pub(crate) fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Lets time pass until `at`, or until `done` says so: which it was. A process that dies meanwhile is started again.
    pub(crate) fn pass(
        &mut self,
        at: Instant,
        done: &mut dyn FnMut(&mut Cast) -> bool,
    ) -> Result<bool, String> {
        loop {
            let over = self.run(at, done)?;
            if self.shared.trap.is_sprung() {
                let crash = self.crash;
                self.count("crashes_at_steps");
                self.die(crash)?;
                if self.world.now() >= at {
                    return Ok(false);
                }
                continue;
            }
            return Ok(over);
        }
    }

    /// The same, without seeing to the process.
    fn run(&mut self, at: Instant, done: &mut dyn FnMut(&mut Cast) -> bool) -> Result<bool, String> {
        loop {
            let mut reactors = std::mem::take(&mut self.reactors);
            let world = self.world.clone();
            let mut over = false;
            let done = || {
                if self.shared.trap.is_sprung() {
                    return true;
                }
                self.poll_asks();
                over = done(self);
                over || self.wants_attach
                    || self.shared.trap.is_sprung()
                    || !self.shared.troubles.borrow().is_empty()
            };
            let ran = catch_unwind(AssertUnwindSafe(|| world.run_until(&mut reactors, at, done)));
            self.reactors = reactors;
            // What panics is kept as it is.
            ran.unwrap_or_else(|panic| resume_unwind(panic))?;
            if let Some(trouble) = self.shared.troubles.borrow().first() {
                return Err(format!("{trouble} ({:?})", self.world.now()));
            }
            if !std::mem::take(&mut self.wants_attach) || self.shared.trap.is_sprung() {
                return Ok(over);
            }
            self.attach_all();
            if over {
                return Ok(true);
            }
        }
    }

    /// Lets time pass until `done`; not for ever.
    pub(crate) fn wait(&mut self, what: &str, done: &mut dyn FnMut(&mut Cast) -> bool) -> Result<(), String> {
        let end = self.world.now() + PATIENCE;
        // Who waits for space may wait for ever: then somebody gives some back.
        let is_patient = self.plan.no_space == NoSpacePolicy::Error;
        while self.world.now() < end {
            let at = if is_patient { end } else { end.min(self.world.now() + Duration::from_secs(20)) };
            if self.pass(at, done)? {
                return Ok(());
            }
            if !is_patient {
                crate::events::make_room(self);
            }
        }
        Err(format!("{what} does not end: {}", self.state()))
    }

    fn trouble(&self, what: String) {
        self.shared.troubles.borrow_mut().push(what);
    }

    fn poll_asks(&mut self) {
        if let Some(answer) = self.change.as_mut().and_then(ready) {
            self.change = None;
            self.change_ends(answer);
        }
        if self.asks.is_empty() {
            return self.look_for_space();
        }
        let mut asks = std::mem::take(&mut self.asks);
        let outdated = self.members.iter().filter(|member| member.is_outdated);
        let outdated: Vec<String> = outdated.map(Member::name).collect();
        let mut replaced = Vec::new();
        asks.retain_mut(|(what, may_fail, ask)| {
            let Some(answer) = ready(ask) else { return true };
            if crate::tells() {
                println!("{:?} {what}: {answer:?}", self.world.now());
            }
            if let (Err(PoolError::Conflict(why)), Some(name)) = (&answer, what.strip_prefix("add_member "))
                && (why.contains("has been replaced")
                    || why.contains("was used without the others")
                        && outdated.iter().any(|other| other == name))
            {
                replaced.push(name.to_owned());
            }
            if what == "abort_replace" && answer.is_ok() {
                self.members.iter_mut().for_each(|member| member.is_leaving = false);
            }
            // A spare was faster.
            let is_late = what.starts_with("replace ") && matches!(answer, Err(PoolError::Unknown(_)));
            let may_fail = *may_fail || is_late || self.shared.rules.borrow().may_fail;
            if let (Err(why), false) = (&answer, may_fail) {
                self.trouble(format!("{what}: {why:?}"));
            }
            false
        });
        asks.append(&mut self.asks);
        self.asks = asks;
        if let Some(pool) = self.pool.as_ref().filter(|_| !replaced.is_empty()) {
            let view = pool.view();
            let is_listed = |name: &str| view.members.iter().any(|it| it.device.as_deref() == Some(name));
            for member in &mut self.members {
                let name = member.disk.name();
                member.is_retired |= replaced.iter().any(|other| other == name) && !is_listed(name);
            }
        }
        self.look_for_space();
    }

    fn look_for_space(&mut self) {
        let lacked = self.shared.rules.borrow().no_space;
        if lacked > self.told_no_space {
            self.told_no_space = lacked;
            self.check_no_space();
        }
    }

    /// Somebody was told that there is no space.
    fn check_no_space(&mut self) {
        let Some(pool) = &self.pool else { return };
        let view = pool.view();
        // What was deleted comes back when nobody can name it any more.
        let recently = self.world.now() < self.freed_at + Duration::from_secs(1);
        // It may be a member that says so.
        if self.shared.rules.borrow().may_fail {
            return;
        }
        let used = self.shared.models.borrow().extents_max() * view.extent_bytes;
        if !recently && !self.may_lack_metadata(&view) && used + 12 * view.extent_bytes < view.size_bytes / 2
        {
            let needed = self.shared.models.borrow().pages_max();
            self.trouble(format!(
                "no space, with at most {used} bytes in use of {}, and {needed} pages of {} bytes",
                view.size_bytes, view.metadata_bytes
            ));
        }
    }

    /// Room for mappings may be used up: as much again is needed as they take.
    fn may_lack_metadata(&self, view: &PoolView) -> bool {
        let pages = self.plan.metadata_bytes / 4096;
        let needed = self.shared.models.borrow().pages_max().max(view.metadata_used_bytes / 4096);
        self.plan.metadata_bytes < 300 << 10 || needed * 3 > pages
    }

    fn change_ends(&mut self, answer: Result<(), PoolError>) {
        if crate::tells() {
            println!("{:?} the change ends: {answer:?}", self.world.now());
        }
        let may_fail = self.shared.rules.borrow().may_fail;
        match answer {
            Ok(()) => {
                let ended = self.shared.models.borrow_mut().op_ends(true);
                if let Err(why) = ended {
                    self.trouble(why);
                }
                // Where the reactors are.
                self.wants_attach = true;
            }
            // Nobody knows what is left of it: the next process will say.
            Err(PoolError::Failed(_)) if may_fail => {
                self.crash = Crash::Kill;
                self.shared.trap.spring();
            }
            Err(why) => {
                let op = self.refused_change();
                let ended = self.shared.models.borrow_mut().op_ends(false);
                if let Err(why) = ended {
                    self.trouble(why);
                }
                if !op {
                    self.trouble(format!("a change of volumes: {why:?}"));
                }
            }
        }
    }

    /// Whether the change that was asked for may be refused.
    fn refused_change(&self) -> bool {
        let view = self.pool.as_ref().map(Pool::view);
        if view.is_some_and(|view| self.may_lack_metadata(&view)) {
            return true;
        }
        let lacks_space = self.shared.rules.borrow().no_space > 0;
        self.shared.models.borrow().may_be_refused() || lacks_space
    }

    /// Nothing goes on, and nobody has anything to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.change.is_none()
            && self.asks.is_empty()
            && self.queues.iter().all(|queue| queue.guest.borrow().is_done())
    }

    /// Every volume has a queue, and every queue a client, if there is a process.
    pub(crate) fn attach_all(&mut self) {
        let Some(pool) = self.pool.clone() else { return };
        let names = self.shared.models.borrow().names();
        for name in names.keys() {
            let has = self.queues.iter().filter(|queue| queue.guest.borrow().volume == *name).count();
            for _ in has..1 {
                self.new_queue(name);
            }
        }
        for queue in &mut self.queues {
            if queue.client.is_some() {
                continue;
            }
            let name = queue.guest.borrow().volume.clone();
            let Some(device) = pool.device(&name) else {
                self.shared.troubles.borrow_mut().push(format!("{name} is no device"));
                continue;
            };
            let reactor = &self.reactors[queue.lane % self.reactors.len()];
            let runtime = reactor.runtime();
            let guest = Rc::clone(&queue.guest);
            let client =
                runtime.enter(|| Client::start(runtime, guest, |user| device.channel(runtime, user)));
            queue.client = Some(client);
        }
    }

    pub(crate) fn new_queue(&mut self, name: &str) {
        let random = Random::new(self.plan.seed ^ self.random.next_u64());
        let guest = Guest::new(self.shared.clone(), name, random, self.plan.habits);
        let lane = self.random.index(self.plan.lanes + 1);
        self.queues.push(Queue { guest: Rc::new(RefCell::new(guest)), client: None, lane });
    }

    /// Queues of these volumes leave their devices; nothing of theirs is under way.
    pub(crate) fn detach(&mut self, which: impl Fn(&str) -> bool) {
        for queue in &mut self.queues {
            if !which(&queue.guest.borrow().volume) {
                continue;
            }
            let reactor = &self.reactors[queue.lane % self.reactors.len()];
            if let Some(client) = queue.client.take() {
                reactor.runtime().enter(|| client.borrow_mut().close(reactor.runtime()));
            }
        }
    }

    /// Those who have something to do go on.
    pub(crate) fn wake_guests(&mut self) {
        for queue in &self.queues {
            let Some(client) = &queue.client else { continue };
            let reactor = &self.reactors[queue.lane % self.reactors.len()];
            reactor.runtime().enter(|| client.borrow_mut().go(reactor.runtime()));
        }
    }

    /// Guests have so much to do at least.
    pub(crate) fn go_on(&mut self, least: usize) {
        for queue in &self.queues {
            let mut guest = queue.guest.borrow_mut();
            guest.to_do = guest.to_do.max(if guest.read_only { least / 3 } else { least });
        }
        self.wake_guests();
    }

    /// One queue of each volume reads it whole.
    pub(crate) fn verify_all(&mut self) {
        let mut seen: VecDeque<String> = VecDeque::new();
        for queue in &self.queues {
            let mut guest = queue.guest.borrow_mut();
            if !seen.contains(&guest.volume) {
                seen.push_back(guest.volume.clone());
                guest.verify();
            }
        }
        self.wake_guests();
    }

    /// Where on the disks a write's content is, for people.
    pub(crate) fn tell_where(&self, id: u64) {
        for member in &self.members {
            let mut state = member.disk.state();
            let stable = state.stable();
            for (what, bytes) in [("", &state.content), (" stable", &stable)] {
                for (at, sector) in bytes.get(0..bytes.len()).chunks_exact(512).enumerate() {
                    let word =
                        |index: usize| u64::from_le_bytes(sector[index * 8..][..8].try_into().unwrap());
                    if word(0) == id {
                        println!("{}{what}: {id:#x} of block {} at {:#x}", member.name(), word(1), at * 512);
                    }
                }
            }
        }
        if let Some(pool) = &self.pool {
            println!("{:#?}", pool.view());
        }
    }

    /// What everybody waits for, for people.
    pub(crate) fn state(&self) -> String {
        let mut text = String::new();
        if let Some(pool) = &self.pool {
            let view = pool.view();
            for member in &view.members {
                let device = member.device.as_deref().unwrap_or("-");
                text += &format!("{:?} {device} {} {:?}; ", member.place, member.state.name(), member.why);
            }
            text += &format!("{:?} {:?} ", view.tasks, view.troubles);
        }
        for (what, _, _) in &self.asks {
            text += &format!("[{what}] ");
        }
        if self.change.is_some() {
            text += "[a change of volumes] ";
        }
        for queue in &self.queues {
            let guest = queue.guest.borrow();
            if !guest.is_done() {
                let (to_do, to_verify) = (guest.to_do, guest.to_verify.len());
                text += &format!("[{}: {to_do}+{to_verify} to do: {}]", guest.volume, guest.waits_for());
            }
        }
        text
    }
}
