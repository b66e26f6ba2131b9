//! What a pool keeps on each reactor that uses it: channels for tasks, buffers, and who is under way.
//!
//! Barrier. Whoever acts on what it has read of the pool (a plan, a slow request that writes) is *under way* from reading to the end
//! of its I/O. A barrier turns the page: it waits for those who were under way before, and not for those who come after.
//!
//! ```text
//!   turn 6:  ▒▒▒▒▒▒▒▒▒▒░░░░░       those who came before the barrier … the last of them ends: it is over
//!   turn 7:            ▒▒▒▒▒▒▒▒▒   those who come after it see what was changed before it
//! ```

use super::ask::Reply;
use super::bounce::Spare;
use super::lanes::Lanes;
use super::shared::Shared;
use super::stripes::Queues;
use super::wait::Bell;
use hawser_runtime::{Runtime, SourceId};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;

/// What guests' writes may have copied at a time, on each reactor.
const COPIED_BYTES_MAX: usize = 64 << 20;

/// A pool on a reactor.
pub(crate) struct Place {
    pub(crate) lanes: Rc<Lanes>,
    pub(crate) spare: Rc<Spare>,
    /// Whose channels use the pool here.
    users: RefCell<Vec<SourceId>>,
    /// Bytes of guests' writes that are copied now.
    copied_bytes: Cell<usize>,
    /// Stripes that are being changed from here.
    pub(crate) queues: Queues,
    /// Rung when less is copied, and when somebody gives up.
    pub(crate) bell: Bell,
    turn: Cell<usize>,
    under_way: [Cell<usize>; 2],
    barrier: RefCell<Option<Reply<()>>>,
}

/// Bytes of a guest's write that are copied, until it is dropped.
pub(crate) struct Copied {
    place: Rc<Place>,
    bytes: usize,
}

/// Somebody is under way, until it is dropped.
pub(crate) struct UnderWay {
    place: Rc<Place>,
    turn: usize,
}

/// The places on this reactor, by the pool's number.
#[derive(Default)]
struct Places(RefCell<Vec<(u64, Weak<Place>)>>);

impl Place {
    /// This reactor's place of a pool; made when it is not there.
    pub(crate) fn of(runtime: &Runtime, shared: &Arc<Shared>) -> Rc<Place> {
        let key = shared.number;
        let places = runtime.local::<Places>();
        let found =
            places.0.borrow().iter().find(|(other, _)| *other == key).and_then(|(_, place)| place.upgrade());
        if let Some(place) = found {
            return place;
        }
        let place = Rc::new(Place {
            lanes: Lanes::new(runtime),
            spare: Rc::default(),
            users: RefCell::default(),
            copied_bytes: Cell::new(0),
            queues: Queues::default(),
            bell: Bell::default(),
            turn: Cell::new(0),
            under_way: [Cell::new(0), Cell::new(0)],
            barrier: RefCell::new(None),
        });
        places.0.borrow_mut().retain(|(_, place)| place.strong_count() > 0);
        places.0.borrow_mut().push((key, Rc::downgrade(&place)));
        shared.add_reactor(runtime.handle());
        place
    }

    /// This reactor's place, if there is one.
    pub(crate) fn find(runtime: &Runtime, shared: &Arc<Shared>) -> Option<Rc<Place>> {
        let key = shared.number;
        let places = runtime.local::<Places>();
        let places = places.0.borrow();
        places.iter().find(|(other, _)| *other == key).and_then(|(_, place)| place.upgrade())
    }

    pub(crate) fn add_user(&self, user: SourceId) {
        self.users.borrow_mut().push(user);
    }

    pub(crate) fn remove_user(&self, user: SourceId) {
        let mut users = self.users.borrow_mut();
        if let Some(at) = users.iter().position(|other| *other == user) {
            users.swap_remove(at);
        }
    }

    /// Lets all channels look at their members.
    pub(crate) fn wake_users(&self, runtime: &Runtime) {
        self.users.borrow().iter().for_each(|user| runtime.wake(*user));
    }

    /// Whether so much more may be copied; the first always may. If so, it counts until [`Place::end_copy`].
    pub(crate) fn begin_copy(&self, bytes: usize) -> bool {
        let copied = self.copied_bytes.get();
        let has_room = copied == 0 || copied + bytes <= COPIED_BYTES_MAX;
        if has_room {
            self.copied_bytes.set(copied + bytes);
        }
        has_room
    }

    pub(crate) fn end_copy(&self, bytes: usize) {
        self.copied_bytes.set(self.copied_bytes.get() - bytes);
        self.bell.ring();
    }

    /// What was begun with [`Place::begin_copy`] counts until the result is dropped.
    pub(crate) fn copied(self: &Rc<Self>, bytes: usize) -> Copied {
        Copied { place: Rc::clone(self), bytes }
    }

    /// Waits until so much more may be copied; `None`: it is not waited for any more.
    pub(crate) async fn copy(self: &Rc<Self>, bytes: usize, is_over: impl Fn() -> bool) -> Option<Copied> {
        let look = || match is_over() {
            true => Some(false),
            false => self.begin_copy(bytes).then_some(true),
        };
        self.bell.until(look).await.then(|| self.copied(bytes))
    }

    /// The turn in which somebody gets under way now; given back to [`Place::leave`].
    pub(crate) fn enter(&self) -> usize {
        let turn = self.turn.get();
        self.under_way[turn].set(self.under_way[turn].get() + 1);
        turn
    }

    pub(crate) fn leave(&self, turn: usize) {
        let left = self.under_way[turn].get().checked_sub(1).expect("who leaves was under way");
        self.under_way[turn].set(left);
        if left == 0 && turn != self.turn.get() {
            self.over();
        }
    }

    /// Who got under way with [`Place::enter`] is so until the result is dropped.
    pub(crate) fn still_under_way(self: &Rc<Self>, turn: usize) -> UnderWay {
        UnderWay { place: Rc::clone(self), turn }
    }

    /// The same, until the result is dropped.
    pub(crate) fn under_way(self: &Rc<Self>) -> UnderWay {
        UnderWay { place: Rc::clone(self), turn: self.enter() }
    }

    /// Whether somebody is under way now.
    pub(crate) fn is_anybody_under_way(&self) -> bool {
        self.under_way.iter().any(|count| count.get() > 0)
    }

    /// Answers when all have ended that are under way now. One barrier at a time.
    pub(crate) fn barrier(&self, reply: Reply<()>) {
        let before = self.turn.get();
        let replaced = self.barrier.borrow_mut().replace(reply);
        assert!(replaced.is_none(), "one barrier at a time");
        self.turn.set(1 - before);
        if self.under_way[before].get() == 0 {
            self.over();
        }
    }

    fn over(&self) {
        let reply = self.barrier.borrow_mut().take();
        if let Some(reply) = reply {
            reply.send(());
        }
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.place.end_copy(self.bytes);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.place.leave(self.turn);
    }
}
