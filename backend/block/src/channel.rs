//! A device, and a reactor's own way to it.

use crate::geometry::Geometry;
use crate::request::{Completion, Request};
use crate::reservation::{ReservationCommand, ReservationStatus, ReserveError};
use crate::stats::StatsSet;
use hawser_runtime::{Runtime, SourceId};
use std::sync::Arc;
use std::time::Duration;

/// How a device is doing, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Never reached yet: its geometry is not known.
    Connecting,
    /// Takes requests.
    Ready,
    /// Was reached before and is not now; requests wait.
    Reconnecting,
    /// Requests fail.
    Failed,
}

impl DeviceState {
    /// The word that people and the API see.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DeviceState::Connecting => "connecting",
            DeviceState::Ready => "ready",
            DeviceState::Reconnecting => "reconnecting",
            DeviceState::Failed => "failed",
        }
    }
}

/// One of several ways to a device, for people.
#[derive(Clone)]
pub struct PathView {
    /// As configured.
    pub uri: String,
    /// `live`, `connecting`, or `failed` when it is not waited for any more.
    pub state: &'static str,
    /// What the other end says of it, such as `optimized`; `None` where it says nothing.
    pub ana: Option<&'static str>,
    /// What is wrong with it, or empty.
    pub trouble: String,
    /// What was asked through it, in the commands that it takes: from sending to answer.
    pub stats: Arc<StatsSet>,
    /// Names as in the API, and numbers since the device was opened.
    pub counters: Vec<(&'static str, u64)>,
    /// How often what it had was lost, by cause.
    pub losses: Vec<(&'static str, u64)>,
    /// How long it has been in each state.
    pub times: Vec<(&'static str, Duration)>,
}

/// A block device that all threads share.
pub trait Device: Send + Sync {
    /// The name from the configuration.
    fn name(&self) -> &str;

    /// What it is now; `None` until it was reached once. Only ever grows.
    fn geometry(&self) -> Option<Geometry>;

    /// How it is doing.
    fn state(&self) -> DeviceState;

    /// Why it is not `Ready`: one line for people; empty when it is.
    fn trouble(&self) -> String {
        String::new()
    }

    /// A UUID that is the same for the same blocks wherever they are reached; all zero when not known.
    fn uuid(&self) -> [u8; 16];

    /// Names the volatile cache that writes are in until they are flushed: while it stays the same, they are still there.
    /// Another one after a restart or a reconnect means that they may be lost. `None`: not known.
    fn cache_identity(&self) -> Option<[u8; 16]> {
        None
    }

    /// How often, since this process has it, a volatile cache was lost with writes in it that nobody had flushed, or is taken to have been: from then on it
    /// may read as before them. Listeners hear of each before any request ends that came after it.
    fn cache_losses(&self) -> u64 {
        0
    }

    /// Whether one of these losses was told by no FLUSH yet: of a process before this one, where that was not told of it.
    fn owes_a_loss(&self) -> bool {
        false
    }

    /// Whether a read leaves its payload as it was (`null:`): whoever reads into memory that held somebody else's data must
    /// clear it first.
    fn leaves_payload(&self) -> bool {
        false
    }

    /// How long after [`Channel::abort`] a request that is under way may go on at most, as far as is known now. 0: it ends at
    /// once, or with the operation that the system has begun.
    fn quiesce_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Whether it keeps writes of which nobody knows whether they were, or will be, carried out: they do not end with the others when it fails,
    /// nor when it is ready again, but when no trace of them is left on the way to it. Whoever has another copy of what they write need not wait for
    /// that: see [`Channel::leave`].
    fn has_unknown_writes(&self) -> bool {
        false
    }

    /// Whether writes that were left ([`Channel::leave`]), on whichever channel, may still be carried out.
    fn has_left_behind(&self) -> bool {
        false
    }

    /// Calls `listener` whenever geometry or state has changed, on whatever thread noticed. It must be quick and must not
    /// call back into the device. It is kept as long as the device lives; hold weak references in it.
    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>);

    /// Opens a way to it on this reactor. When requests have ended, `user` is woken ([`Runtime::wake`]) to reap them.
    ///
    /// Only once the geometry is known.
    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel>;

    /// Counters and latencies of all its channels.
    fn stats(&self) -> Arc<StatsSet>;

    /// Carries a reservation command out for this host, whatever the way. It takes as long as it takes (a minute at most): never on
    /// a reactor.
    ///
    /// # Errors
    /// Why it was not, or may not have been.
    fn reserve(&self, _command: ReservationCommand) -> Result<(), ReserveError> {
        Err(ReserveError::Unsupported)
    }

    /// Who is registered, and who has it. Never on a reactor.
    ///
    /// # Errors
    /// Why that is not known.
    fn reservations(&self) -> Result<ReservationStatus, ReserveError> {
        Err(ReserveError::Unsupported)
    }

    /// The ways to it, in the configuration's order; none where there is but the device itself.
    fn paths(&self) -> Vec<PathView> {
        Vec::new()
    }

    /// What only this kind of device counts: names as in the API, such as `bounced_requests`, and numbers since it was opened.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// How it was told to behave: keys as in the configuration, and values.
    fn settings(&self) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }

    /// Takes paths by another policy from now on.
    ///
    /// # Errors
    /// When there is no such policy, or nothing to choose from: one line.
    fn set_io_policy(&self, _policy: &str) -> Result<(), String> {
        Err("io_policy is for nvme+tcp:// and nvme+rdma:// only".to_owned())
    }

    /// From now on a request that has waited so long for a way to it fails instead of waiting on, unless its configuration says how long. For
    /// whoever has another copy. [`Duration::MAX`]: it waits, as in the beginning.
    fn fail_after(&self, _patience: Duration) {}

    /// Bytes of payload that this process has copied instead of having them moved to or from the user's memory, by reason.
    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// One user's way to a device, on one reactor.
///
/// A channel is dropped only when it is idle: every request that went in has been reaped.
pub trait Channel {
    /// Takes all requests out of `batch` and starts them; they may end at once. The doorbell is rung once, here or at the
    /// reactor's next enter. A request above [`Geometry::transfer_blocks_max`] or past the end ends as `Invalid`.
    fn submit(&mut self, batch: &mut Vec<Request>);

    /// Moves the ends of requests to `ended`, in the order in which they ended.
    fn reap(&mut self, ended: &mut Vec<Completion>);

    /// Whether requests that it holds are ended by this thread's own work, portion by portion, with nothing to wait for: then
    /// waking the guest for those that have ended overlaps with the rest.
    fn is_working(&self) -> bool {
        false
    }

    /// Ends all requests as soon as that can be done safely (tearing an association down if need be): they are still
    /// reaped as usual, `Aborted` or however they ended. For a user that has waited long enough.
    fn abort(&mut self) {}

    /// Like `abort`, and a write of which nobody knows what becomes of it ends as well, `Aborted`, as soon as its memory is not used any more: the
    /// device may carry it out long after that, over whatever was written to the same blocks since. From this call until none can be any more,
    /// [`Device::has_left_behind`] says so. Whoever leaves writes sees to it that nothing is written to that device before it
    /// does not say so any more, through whatever channel; and that what stands there then, in any block that a write that was left named, old or
    /// new or in part, is taken for garbage. So only who does not use the device any more can leave it.
    ///
    /// A device that needs the time itself may hold writes back that come too early; that is no promise.
    fn leave(&mut self) {
        self.abort();
    }
}
