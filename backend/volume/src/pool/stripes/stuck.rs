//! A member that cannot be done without fails what must not stay half done: who waits for it, for how long, and what then.

use super::Ways;
use super::row::Row;
use crate::pool::owner::Owner;
use crate::pool::shared::Shared;
use hawser_block::Status;
use hawser_runtime::Instant;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How long a member that cannot be done without may fail a write in ways that nobody can help with.
const HOPELESS: Duration = Duration::from_secs(10);

/// Who is waited for by a stripe; they are told when it is dropped.
pub(super) struct Stuck {
    shared: Arc<Shared>,
    members: BTreeSet<u16>,
    /// Since when some member fails in a way that nobody can help with.
    hopeless: Option<Instant>,
}

impl Stuck {
    pub(super) fn new(shared: &Arc<Shared>) -> Stuck {
        Stuck { shared: Arc::clone(shared), members: BTreeSet::new(), hopeless: None }
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        for member in std::mem::take(&mut self.members) {
            drop(self.shared.ask(move |owner| owner.waits_no_more(member)));
        }
    }
}

impl Ways {
    /// A member that cannot be done without fails what must not stay half done: that is told, and it is given some time to take it after all. Who
    /// is out of reach, or full, may be so for long, and is waited for; with any other failure the pool takes no more writes in the end. What
    /// is in the log is put in place by the next opening.
    pub(super) async fn is_stuck(
        &self,
        row: &Row<'_>,
        slot: usize,
        status: Status,
        is_logged: bool,
        stuck: &mut Stuck,
    ) {
        let now = self.runtime.now();
        stuck.hopeless = match may_end(status) {
            true => None,
            false => stuck.hopeless.or(Some(now)),
        };
        let is_over = stuck.hopeless.is_some_and(|since| now >= since + HOPELESS);
        let member = row.member(slot);
        let is_first = stuck.members.insert(member);
        let tell = move |owner: Rc<Owner>| async move {
            if is_first {
                owner.waits_for(member, status);
            }
            if is_over {
                owner.stop(member, status, is_logged);
            }
            Ok(())
        };
        let _ = self.shared.request(tell).await;
        self.runtime.sleep(Duration::from_millis(500)).await;
    }
}

/// Somebody can help: with a way to it, or with room.
fn may_end(status: Status) -> bool {
    matches!(status, Status::Path | Status::Timeout | Status::NoSpace)
}
