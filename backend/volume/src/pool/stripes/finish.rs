//! Whole stripes that were begun on the hot path, and did not come to all members: some of a stripe's strips are new, some are not, and of what is
//! lost now nobody could compute either. So they are ended here, from the copy that they were sent from, whoever has given up waiting for them.

use super::row::{Contents, Row, Slots, each};
use super::{Held, Ways};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::place::{Copied, UnderWay};
use crate::pool::resolve::Stripe;
use crate::pool::shared::View;
use hawser_block::Outcome;
use std::rc::Rc;
use std::sync::Arc;

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
    /// Ends what was begun: each strip is written, or its member is out.
    pub(crate) async fn finish(&self, begun: &Begun) -> Outcome {
        coverage::count(coverage::Event::StripesFinished);
        for stripe in &begun.stripes {
            let set = begun.view.array.set(stripe.set as usize);
            let strip = usize::try_from(set.strip_bytes()).expect("a strip is small");
            let row = Row { since: begun.since, ..Row::new(&begun.view, set, stripe.row, 0, strip) };
            let contents = begun.contents(stripe, &row, self);
            let slots: Slots = each(row.all_data() | row.all_parity())
                .filter(|slot| row.leaf(*slot).is_some())
                .fold(0, |slots, slot| slots | 1 << slot);
            self.in_place(&row, &contents, slots).await?;
        }
        Ok(())
    }
}
