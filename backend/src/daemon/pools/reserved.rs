//! The reservations of an open pool's members: that they are still ours.
//!
//! ```text
//!   a member was away, or a minute is over ─► who has it?
//!       we                  nothing
//!       nobody              the target has lost it (a restart that keeps none): it is taken again
//!       another host        that took the pool: nothing is read or written any more
//! ```
//!
//! Owns: when that is looked at. Must not know: how a reservation is taken.

use super::Shared;
use super::state::{Entry, Phase, State, is_reached};
use crate::assemble::pool as assemble;
use crate::assemble::reserve::Kept;
use crate::assemble::{host, reserve};
use crate::daemon::pools::look::blocking;
use hawser_block::Device;
use hawser_volume::pool::{Pool, PoolView};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often it is looked at where nothing tells that it may have changed.
const EVERY: Duration = Duration::from_secs(60);

impl Shared {
    /// Begins to look where that is due.
    pub(super) fn see_reserved(
        self: &Arc<Self>,
        state: &mut State,
        uuid: [u8; 16],
        view: &PoolView,
        now: Instant,
    ) {
        let Some(Entry { phase: Phase::Open(open), .. }) = state.pools.get(&uuid) else { return };
        if view.is_failed {
            return;
        }
        let pool = open.pool.clone();
        let is_ours = |name: &str| {
            let is_member = view.members.iter().any(|member| member.device.as_deref() == Some(name));
            is_member && open.reserved.iter().any(|device| device.name() == name)
        };
        let mut begun = 0;
        for known in state.devices.iter_mut().filter(|known| is_ours(known.name.as_str())) {
            let changes = known.changes.load(Ordering::Relaxed);
            let is_seen =
                known.reservation.seen.is_some_and(|(seen, at)| seen == changes && at + EVERY > now);
            if is_seen || known.reservation.is_asked || !is_reached(known.device.as_ref()) {
                continue;
            }
            known.reservation.is_asked = true;
            begun += 1;
            let (shared, pool, device) = (Arc::clone(self), pool.clone(), Arc::clone(&known.device));
            tokio::spawn(async move {
                let is_known = shared.is_kept(&pool, Arc::clone(&device)).await;
                let mut state = shared.state();
                state.tasks = state.tasks.saturating_sub(1);
                if let Some(known) =
                    state.devices.iter_mut().find(|known| known.name.as_str() == device.name())
                {
                    known.reservation.is_asked = false;
                    known.reservation.seen = is_known.then(|| (changes, Instant::now()));
                }
                drop(state);
                shared.tell();
            });
        }
        state.tasks += begun;
    }

    /// Looks, and does what is to be done; whether it is known how it is.
    async fn is_kept(&self, pool: &Pool, device: Arc<dyn Device>) -> bool {
        let identity = host::identity(&self.config.host, &self.config.daemon.state_dir);
        let Ok(identity) = identity else { return false };
        let (asked, name) = (Arc::clone(&device), pool.name());
        let kept = blocking(move || Ok(reserve::keep(asked.as_ref(), &identity.id.0))).await;
        let lost = match kept {
            Ok(Kept::Ours) => return true,
            Ok(Kept::Again) => {
                log::warn!(
                    "pool {name}: device {}: its target had lost the reservation: taken again",
                    device.name()
                );
                // Who opened it meanwhile may have closed it too.
                pool.check_owner().await
            }
            Ok(Kept::Lost(what)) => pool.lose(&what).await,
            Ok(Kept::Unknown(what)) | Err(what) => {
                log::warn!("pool {name}: whether a member is still reserved is not known: {what}");
                return false;
            }
        };
        lost.map_err(|error| log::warn!("pool {name}: {}", assemble::line_of(error))).is_ok()
    }
}
