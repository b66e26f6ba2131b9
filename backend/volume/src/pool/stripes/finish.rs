//! Whole stripes that were begun on the hot path, and did not come to all members: some of a stripe's strips are new, some are not, and of what is
//! lost now nobody could compute either. So they are ended here, from the copy that they were sent from, whoever has given up waiting for them.

use super::row::{Contents, Row, Slots, each};
use super::stuck::Stuck;
use super::{Held, Ways};
use crate::format::parity_log::ENTRY_LEN_MAX;
use crate::pool::bounce::Bounce;
use crate::pool::owner::Owner;
use crate::pool::place::{Copied, UnderWay};
use crate::pool::resolve::Stripe;
use crate::pool::shared::View;
use crate::pool::wait::all;
use crate::raid::Mode;
use crate::simulated::is_broken;
use hawser_block::{Outcome, Status};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Stripes that a failed write has begun. They are nobody else's until this is dropped.
pub(crate) struct Begun {
    pub(crate) view: Arc<View>,
    pub(crate) stripes: Vec<Stripe>,
    /// Their data, and behind it their parities.
    pub(crate) copy: Bounce,
    pub(crate) data_bytes: usize,
    pub(crate) since: u64,
    pub(crate) _held: Vec<Held>,
    pub(crate) _copied: Copied,
    pub(crate) _under_way: UnderWay,
}

impl Begun {
    /// What a stripe's slots shall hold.
    fn contents(&self, stripe: &Stripe, row: &Row<'_>, ways: &Ways) -> Contents {
        let first = &self.stripes[0];
        let data_at = (stripe.start - first.start) as usize;
        let parity_at = self.data_bytes + (stripe.parity - first.parity) as usize;
        let content = |slot: usize| {
            let at = match slot.checked_sub(row.data()) {
                None => data_at + slot * row.len,
                Some(parity) => parity_at + parity * row.len,
            };
            let content = ways.place.spare.take(row.len);
            content.fill(0, self.copy.bytes(at, row.len));
            Some(Rc::new(content))
        };
        (0..row.slots()).map(content).collect()
    }
}

impl Ways {
    /// Ends what was begun: each strip is written, or its member is out. Where not all members can go that do not take it, and none has gone, the
    /// stripe stays as it is, and is doubtful; as it does when the pool takes no more writes.
    ///
    /// # Errors
    /// Why it stays.
    pub(crate) async fn finish(&self, begun: &Begun) -> Outcome {
        let stripes = begun.stripes.iter().map(|stripe| self.finish_stripe(begun, stripe));
        all(stripes).await.into_iter().collect()
    }

    /// All of a stripe in the log, after all; the entries' numbers.
    async fn log_whole(&self, row: &Row<'_>, contents: &Contents) -> Result<Vec<u64>, Status> {
        let mut numbers = Vec::new();
        let most = ENTRY_LEN_MAX as usize;
        for within in (0..row.len).step_by(most) {
            let len = most.min(row.len - within);
            let part = Row { within: row.within + within as u64, len, ..*row };
            let columns = |content: &Option<Rc<Bounce>>| {
                let bounce = self.place.spare.take(len);
                bounce.fill(0, content.as_ref()?.bytes(within, len));
                Some(Rc::new(bounce))
            };
            let contents: Contents = contents.iter().map(columns).collect();
            numbers.push(self.log(&part, &contents, row.written()).await?);
        }
        Ok(numbers)
    }

    async fn finish_stripe(&self, begun: &Begun, stripe: &Stripe) -> Outcome {
        let set = begun.view.array.set(stripe.set as usize);
        let strip = usize::try_from(set.strip_bytes()).expect("a strip is small");
        let row = Row { since: begun.since, ..Row::new(&begun.view, set, stripe.row, 0, strip) };
        let contents = begun.contents(stripe, &row, self);
        let mut missing: Slots = each(row.all_data() | row.all_parity())
            .filter(|slot| row.leaf(*slot).is_some())
            .fold(0, |slots, slot| slots | 1 << slot);
        let (mut stuck, mut logged) = (Stuck::new(&self.shared), None);
        loop {
            let is_there = |slot: &usize| set.mode(row.place(*slot)) != Mode::Away;
            missing = each(missing).filter(is_there).fold(0, |slots, slot| slots | 1 << slot);
            if missing == 0 {
                logged.into_iter().flatten().for_each(|number| row.parity.ring().placed(number));
                return Ok(());
            }
            if !self.is_writable() {
                match logged {
                    Some(_) => row.parity.stays_half_written(row.row),
                    // It may be another host's by now.
                    None => row.doubt(&self.shared),
                }
                return Err(Status::ReadOnly);
            }
            let row = &Row { since: self.shared.joins(), ..row };
            let writes = each(missing).map(|slot| {
                let content = contents[slot].as_ref().expect("all of them are there");
                async move {
                    (slot, self.write_unless_out(row, slot, (row.offset(), false), content, row.len).await)
                }
            });
            let outcomes = all(writes).await;
            let failed = outcomes.into_iter().filter_map(|(slot, outcome)| Some((slot, outcome.err()?)));
            let failed: Vec<(usize, Status)> = failed.filter(|(slot, _)| is_there(slot)).collect();
            missing = failed.iter().fold(0, |slots, (slot, _)| slots | 1 << slot);
            let by_members = failed.iter().filter(|(_, status)| *status != Status::Aborted);
            let first = by_members.clone().next().copied();
            let members = by_members.fold(0, |bits, (slot, _)| bits | 1 << row.member(*slot));
            match first {
                None if missing == 0 => {}
                // By somebody who does not know of us.
                None => {
                    self.runtime.sleep(Duration::from_millis(10)).await;
                }
                Some((slot, status)) => {
                    let since = row.since;
                    let report = move |owner: Rc<Owner>| async move {
                        owner.report_together(members, status, since).await
                    };
                    let is_recorded = self.shared.request(report).await.is_ok();
                    // Who is out of reach may come back, and then the others can go.
                    let is_final = set.are_all_in_sync() && !matches!(status, Status::Path | Status::Timeout);
                    if !is_recorded && is_final {
                        if !is_broken("left_undoubted") {
                            row.doubt(&self.shared);
                        }
                        return Err(status);
                    }
                    if is_recorded {
                        continue;
                    }
                    if logged.is_none() && !set.are_all_in_sync() && !is_broken("stuck_stripe_unlogged") {
                        // A member that was lost meanwhile lacks it, and another does not take it: whoever opens the pool next can end it.
                        logged = self.log_whole(row, &contents).await.ok();
                    }
                    self.is_stuck(row, slot, status, logged.is_some(), &mut stuck).await;
                }
            }
        }
    }
}
