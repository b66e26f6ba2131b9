//! What every reactor sees of a pool, without asking anybody.

use super::ask::{self, Answer};
use super::lanes::Leaf;
use super::lost_caches::LostCaches;
use super::owner::{self, Owner};
use super::{Ask, PoolError, PoolView};
use crate::format::superblock::MEMBERS_MAX;
use crate::raid::Array;
use crate::thin::{Table, Thin, VolumeMap};
use hawser_block::{StatsSet, Status};
use hawser_runtime::{ReactorHandle, Runtime};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why a request did not take the hot path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A read of blocks whose copies may differ, or more than once because a copy could not be read.
    ReadMiss,
    /// A write to blocks that are not there yet.
    WriteMiss,
    /// A write to blocks that a snapshot shares.
    CopyOnWrite,
    /// A write of a part of a parity stripe.
    PartialStripe,
    /// A request to a set that lacks members.
    Degraded,
    /// A request that a member failed.
    DeviceFailure,
    /// A request whose mapping could not be changed.
    MappingFailure,
    /// A write for which there was no space.
    NoSpace,
    /// A write to a region that is not marked yet, or that is just being resynchronised.
    Intent,
    /// A discard or write-zeroes.
    Discard,
    /// A write with FUA while changes of the mapping are not durable yet: they become so with it.
    Fua,
    /// A write that would have to be copied while as much is copied as may be.
    CopyLimit,
}

impl Class {
    /// All, in the order of their numbers.
    pub const ALL: [Class; 12] = [
        Class::ReadMiss,
        Class::WriteMiss,
        Class::CopyOnWrite,
        Class::PartialStripe,
        Class::Degraded,
        Class::DeviceFailure,
        Class::MappingFailure,
        Class::NoSpace,
        Class::Intent,
        Class::Discard,
        Class::Fua,
        Class::CopyLimit,
    ];

    /// The name in metrics and status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Class::ReadMiss => "read_miss",
            Class::WriteMiss => "write_miss",
            Class::CopyOnWrite => "copy_on_write",
            Class::PartialStripe => "partial_stripe",
            Class::Degraded => "degraded",
            Class::DeviceFailure => "device_failure",
            Class::MappingFailure => "mapping_failure",
            Class::NoSpace => "no_space",
            Class::Intent => "intent",
            Class::Discard => "discard",
            Class::Fua => "fua",
            Class::CopyLimit => "copy_limit",
        }
    }
}

/// Which classes a request was counted under: once under each, however often it is tried and into however many parts it falls.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counted(Cell<u16>);

const _: () = assert!(Class::ALL.len() <= u16::BITS as usize);

impl Counted {
    /// Under this one.
    pub(crate) fn under(class: Class) -> Counted {
        Counted(Cell::new(1 << class as u16))
    }

    /// Counts a request of this volume under one more, unless it was.
    pub(crate) fn count(&self, volume: &VolumeShared, class: Class) {
        let bit = 1 << class as u16;
        if self.0.get() & bit == 0 {
            self.0.set(self.0.get() | bit);
            volume.count(class);
        }
    }
}

/// The array and the tables as they are now. A change of members makes another one.
#[derive(Clone)]
pub struct View {
    /// Where data is.
    pub array: Array,
    /// The mappings.
    pub table: Arc<Table>,
    /// What an extent is.
    pub thin: Thin,
    /// Where data begins on each member.
    pub data_offset: u64,
    /// log2 of the block size.
    pub block_shift: u32,
    /// Several members have the same data.
    pub is_redundant: bool,
    /// A write goes to several devices, from a copy of its payload.
    pub is_copied: bool,
    /// It is another host's now, who may have given any extent to another volume: nothing is read any more.
    pub is_lost: bool,
    /// The members' devices, those that are there.
    pub(crate) leaves: Vec<Option<Leaf>>,
}

impl View {
    /// For benches and tests of [`super::resolve`], which asks nothing of devices.
    #[must_use]
    pub fn without_devices(
        array: Array,
        table: Arc<Table>,
        thin: Thin,
        data_offset: u64,
        block_shift: u32,
    ) -> View {
        let is_redundant = array.sets().iter().any(|set| set.level().is_redundant());
        View {
            array,
            table,
            thin,
            data_offset,
            block_shift,
            is_redundant,
            is_copied: is_redundant,
            is_lost: false,
            leaves: Vec::new(),
        }
    }
}

/// Whether all writes that have ended were flushed since. Costs a write two loads of what seldom changes.
#[derive(Default)]
pub(crate) struct Unflushed {
    /// FLUSHes that have begun.
    begun: AtomicU64,
    /// How many had, and one, when the last write ended; 0: there was none.
    written: AtomicU64,
    /// What ended before so many had begun has been flushed.
    flushed: AtomicU64,
}

impl Unflushed {
    /// A write has ended, and nobody has been told so yet; or one begins that may end in parts.
    #[inline]
    pub(crate) fn has_written(&self) {
        let now = self.begun.load(Ordering::Acquire) + 1;
        if self.written.load(Ordering::Relaxed) < now {
            self.written.fetch_max(now, Ordering::AcqRel);
        }
    }

    /// A FLUSH begins: its number.
    pub(crate) fn begin(&self) -> u64 {
        self.begun.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// It has ended well.
    pub(crate) fn has_flushed(&self, number: u64) {
        self.flushed.fetch_max(number, Ordering::AcqRel);
    }

    /// Writes have ended since this FLUSH began.
    pub(crate) fn has_more_than(&self, number: u64) -> bool {
        self.written.load(Ordering::Acquire) > number
    }

    /// Nothing that has ended can be lost with a cache.
    pub(crate) fn is_none(&self) -> bool {
        self.written.load(Ordering::Acquire) <= self.flushed.load(Ordering::Acquire)
    }
}

/// A volume as all reactors see it.
pub(crate) struct VolumeShared {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) uuid: [u8; 16],
    pub(crate) is_snapshot: bool,
    /// Replaced when it grows.
    pub(crate) map: Mutex<Arc<VolumeMap>>,
    pub(crate) slow: [AtomicU64; Class::ALL.len()],
    /// Payload of writes that was copied, because it went to several members.
    pub(crate) copied_bytes: AtomicU64,
    /// How often something may have been lost that is its, and how much of that its FLUSHes have told.
    pub(crate) losses: AtomicU64,
    pub(crate) told_losses: AtomicU64,
    pub(crate) unflushed: Unflushed,
    /// Channels that are open.
    pub(crate) users: AtomicUsize,
    pub(crate) stats: Arc<StatsSet>,
    pub(crate) listeners: Mutex<Vec<Box<dyn Fn() + Send + Sync>>>,
}

impl VolumeShared {
    /// So many bytes of payload were copied.
    pub(crate) fn count_copied(&self, bytes: usize) {
        self.copied_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Something may have been lost that is its: its FLUSHes fail, until one has that stands for all of it. Of a write that was under way then that
    /// is said when it has ended, and before anybody is told that it has.
    pub(crate) fn has_lost(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
    }

    /// That was told by no FLUSH.
    pub(crate) fn is_untold(&self) -> bool {
        self.told_losses.load(Ordering::Acquire) < self.losses.load(Ordering::Acquire)
    }

    pub(crate) fn count(&self, class: Class) {
        self.slow[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn slow_counts(&self) -> Vec<(&'static str, u64)> {
        Class::ALL.map(|class| (class.name(), self.slow[class as usize].load(Ordering::Relaxed))).to_vec()
    }

    pub(crate) fn map(&self) -> Arc<VolumeMap> {
        Arc::clone(&lock(&self.map))
    }

    pub(crate) fn tell(&self) {
        for listener in lock(&self.listeners).iter() {
            listener();
        }
    }
}

/// A pool as all threads see it.
pub(crate) struct Shared {
    /// Tells pools apart within a process.
    pub(crate) number: u64,
    pub(crate) name: String,
    pub(crate) uuid: [u8; 16],
    pub(crate) owner: ReactorHandle,
    view: Mutex<Arc<View>>,
    /// Raised with each change of `view`, or of a volume's map.
    pub(crate) version: AtomicU64,
    /// Changes of the mapping that are not durable yet.
    pub(crate) pending: AtomicU64,
    /// It is only looked at.
    pub(crate) is_read_only: bool,
    /// Writes are taken.
    pub(crate) is_writable: AtomicBool,
    /// They are not any more, and reads are.
    pub(crate) is_stopped: AtomicBool,
    reactors: Mutex<Vec<ReactorHandle>>,
    unsynced_marks: AtomicU64,
    /// Caches that were lost with what no other member makes good, as soon as anybody hears of it.
    pub(crate) lost_caches: LostCaches,
    /// How often a member has come back. What began before tells nothing of a member that came back after it.
    joins: AtomicU64,
    /// How often each member was given up while it was out of reach: what is under way at it is ended.
    pub(crate) given_up: [AtomicU64; MEMBERS_MAX],
    /// Writes to each member that nobody waits for any more, and that may still reach it: it is not brought back before.
    pub(crate) left_behind: [AtomicU64; MEMBERS_MAX],
    /// Held by who takes a member out of those that are read, so that the last is never taken.
    pub(crate) modes: Mutex<()>,
    pub(crate) volumes: Mutex<BTreeMap<u32, Arc<VolumeShared>>>,
    /// As the owner last told.
    pub(crate) told: Mutex<Told>,
}

/// What the owner tells people.
pub(crate) struct Told {
    pub(crate) pool: PoolView,
    /// Extents that each volume has mapped, and where it came from.
    pub(crate) volumes: BTreeMap<u32, (u64, Option<String>)>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(pool: PoolView, owner: ReactorHandle, view: View, is_read_only: bool) -> Arc<Shared> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        Arc::new(Shared {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            name: pool.name.clone(),
            uuid: pool.uuid,
            owner,
            view: Mutex::new(Arc::new(view)),
            version: AtomicU64::new(1),
            pending: AtomicU64::new(0),
            is_read_only,
            is_writable: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            reactors: Mutex::default(),
            unsynced_marks: AtomicU64::new(0),
            lost_caches: LostCaches::default(),
            joins: AtomicU64::new(0),
            given_up: [const { AtomicU64::new(0) }; MEMBERS_MAX],
            left_behind: [const { AtomicU64::new(0) }; MEMBERS_MAX],
            modes: Mutex::default(),
            volumes: Mutex::default(),
            told: Mutex::new(Told { pool, volumes: BTreeMap::new() }),
        })
    }

    /// Raised before a region is marked as not the same everywhere.
    pub(crate) fn unsynced_marks(&self) -> u64 {
        self.unsynced_marks.load(Ordering::SeqCst)
    }

    /// A region is about to be marked as not the same everywhere.
    pub(crate) fn mark_unsynced(&self) {
        self.unsynced_marks.fetch_add(1, Ordering::SeqCst);
    }

    /// Something was lost. A device tells it to whoever flushes it next; here it is told to the users of each volume that may have had a part in it.
    pub(crate) fn has_lost(&self) {
        let volumes = lock(&self.volumes);
        volumes.values().filter(|volume| !volume.unflushed.is_none()).for_each(|volume| volume.has_lost());
    }

    /// Volumes that have lost something, as far as is known, and whose users were not told.
    pub(crate) fn untold(&self) -> Vec<u32> {
        let volumes = lock(&self.volumes);
        volumes.values().filter(|volume| volume.is_untold()).map(|volume| volume.id).collect()
    }

    /// To be asked when it is known who is written to, and told with what they fail.
    pub(crate) fn joins(&self) -> u64 {
        self.joins.load(Ordering::Acquire)
    }

    /// A member is about to come back.
    pub(crate) fn joins_now(&self) -> u64 {
        self.joins.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub(crate) fn view(&self) -> Arc<View> {
        Arc::clone(&lock(&self.view))
    }

    pub(crate) fn set_view(&self, view: View) {
        *lock(&self.view) = Arc::new(view);
        self.version.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn volume_named(&self, name: &str) -> Option<Arc<VolumeShared>> {
        lock(&self.volumes).values().find(|volume| volume.name == name).cloned()
    }

    pub(crate) fn add_reactor(&self, reactor: ReactorHandle) {
        let mut reactors = lock(&self.reactors);
        if !reactors.iter().any(|other| other.same(&reactor)) {
            reactors.push(reactor);
        }
    }

    pub(crate) fn reactors(&self) -> Vec<ReactorHandle> {
        lock(&self.reactors).clone()
    }

    /// Asks the owner to do something; `None` when it is not there any more.
    pub(crate) fn ask<T, F>(&self, work: impl FnOnce(Rc<Owner>) -> F + Send + 'static) -> Answer<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (reply, answer) = ask::channel();
        let number = self.number;
        self.owner.run(move |runtime| {
            let Some(owner) = owner::find(runtime, number) else { return };
            let task = work(owner);
            runtime.spawn(async move { reply.send(task.await) });
        });
        answer
    }

    /// The same for a request, which fails when there is no owner. On the owner's own reactor nothing crosses threads, and nothing is
    /// waited for but the work itself.
    pub(crate) async fn request<T, F>(
        &self,
        work: impl FnOnce(Rc<Owner>) -> F + Send + 'static,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + 'static,
    {
        let here = Runtime::current();
        if here.handle().same(&self.owner) {
            return match owner::find(&here, self.number) {
                Some(owner) => work(owner).await,
                None => Err(Status::Aborted),
            };
        }
        drop(here);
        self.ask(work).await.unwrap_or(Err(Status::Aborted))
    }

    /// The same for people.
    pub(crate) fn control<T, F>(&self, work: impl FnOnce(Rc<Owner>) -> F + Send + 'static) -> Ask<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, PoolError>> + 'static,
    {
        let (number, name) = (self.number, self.name.clone());
        Ask::of(&self.owner, move |runtime| {
            let task = owner::find(&runtime, number).map(work);
            async move {
                match task {
                    Some(task) => task.await,
                    None => Err(PoolError::Failed(format!("pool {name} is closed"))),
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Unflushed;

    #[test]
    fn what_ended_before_a_flush_began_is_flushed_by_it() {
        let it = Unflushed::default();
        assert!(it.is_none(), "nothing was written");
        it.has_written();
        assert!(!it.is_none());
        let first = it.begin();
        it.has_written();
        it.has_flushed(first);
        assert!(!it.is_none(), "one has ended since");
        let (failed, second) = (it.begin(), it.begin());
        assert!(failed < second && !it.is_none());
        it.has_flushed(second);
        assert!(it.is_none());
    }
}
