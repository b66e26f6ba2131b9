//! Columns of one stripe: where their strips are, and what they hold, read or computed.
//!
//! ```text
//!   slot     0    1    …    d-1    d   d+1        data strips in order, then P, then Q
//!           ░░░  ░░░       ░░░    ░░░  ░░░        the same `len` bytes of each, from `within` on
//! ```

use crate::parity::{self, Shard};
use crate::pool::bounce::Bounce;
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::place::Place;
use crate::pool::shared::{Shared, View};
use crate::pool::wait::all;
use crate::raid::{Mode, Parity, Set};
use hawser_block::Status;
use std::rc::Rc;

/// Columns of a stripe of a set with parity.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) view: &'a View,
    pub(crate) set: &'a Set,
    pub(crate) parity: &'a Parity,
    pub(crate) row: u64,
    pub(crate) within: u64,
    pub(crate) len: usize,
    /// [`Shared::joins`](super::super::shared::Shared::joins) when it was begun.
    pub(crate) since: u64,
}

/// What is taken for that which cannot be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// What the others say.
    Computed,
    /// Zeroes: nobody has written to these columns.
    Zeroes,
    /// Nothing. Nobody has noted yet that he has written to these columns, and somebody may have.
    Unknown,
}

/// Slots, as bits.
pub(crate) type Slots = u64;

/// Who could not be read.
#[derive(Clone, Copy, Default)]
pub(crate) struct Bad {
    pub(crate) slots: Slots,
    /// Those of them that say that they have lost it: what is computed may be written there.
    pub(crate) media: Slots,
    /// What another has said. What it holds may be right, and parity wrong: nothing is written there, and parity is not made of what was computed for it.
    pub(crate) other: Option<Status>,
}

impl Bad {
    /// Who is not to be read, for a reason that the caller knows.
    pub(crate) fn known(slots: Slots) -> Bad {
        Bad { slots, ..Bad::default() }
    }

    fn add(&mut self, slot: usize, status: Status) {
        self.slots |= 1 << slot;
        match status {
            Status::Media => self.media |= 1 << slot,
            _ => self.other = Some(status),
        }
    }
}

/// What slots hold.
pub(crate) type Contents = Vec<Option<Rc<Bounce>>>;

/// The slots in a set of them.
pub(crate) fn each(slots: Slots) -> impl Iterator<Item = usize> + Clone {
    (0..64).filter(move |slot| slots >> slot & 1 != 0)
}

impl<'a> Row<'a> {
    pub(crate) fn new(view: &'a View, set: &'a Set, row: u64, within: u64, len: usize) -> Row<'a> {
        let parity = set.parity().expect("only sets with parity have stripes");
        Row { view, set, parity, row, within, len, since: u64::MAX }
    }

    /// How many strips of a stripe are data.
    pub(crate) fn data(&self) -> usize {
        usize::from(self.parity.stripes.data_strips())
    }

    pub(crate) fn slots(&self) -> usize {
        usize::from(self.parity.stripes.members())
    }

    pub(crate) fn all_data(&self) -> Slots {
        (1 << self.data()) - 1
    }

    pub(crate) fn all_parity(&self) -> Slots {
        ((1 << self.slots()) - 1) & !self.all_data()
    }

    /// The member, by place in the set.
    pub(crate) fn place(&self, slot: usize) -> u16 {
        let stripes = &self.parity.stripes;
        match slot.checked_sub(self.data()) {
            None => stripes.member_of_data(self.row, u16::try_from(slot).unwrap_or(0)),
            Some(0) => stripes.member_of_p(self.row),
            Some(_) => stripes.member_of_q(self.row).expect("only RAID 6 has so many slots"),
        }
    }

    /// The member, by its number in the pool.
    pub(crate) fn member(&self, slot: usize) -> u16 {
        self.set.first_member() + self.place(slot)
    }

    pub(crate) fn leaf(&self, slot: usize) -> Option<&'a Leaf> {
        self.view.leaves[usize::from(self.member(slot))].as_ref()
    }

    /// Where it is on each member's device.
    pub(crate) fn offset(&self) -> u64 {
        self.view.data_offset + self.row * u64::from(self.set.strip_bytes()) + self.within
    }

    fn regions(&self) -> impl Iterator<Item = u32> + use<> {
        let first = self.row * u64::from(self.set.strip_bytes()) + self.within;
        self.set.region_of(first)..=self.set.region_of(first + self.len.max(1) as u64 - 1)
    }

    /// What is lost cannot be computed: something came between data and parity, and nothing has put that right.
    pub(crate) fn is_doubtful(&self) -> bool {
        self.parity.is_half_written(self.row) || self.regions().any(|region| self.parity.doubtful.get(region))
    }

    /// It is half written, and stays so, though not in the log. Parity is made again of what there is; until then nobody is put out, and the next
    /// opening is told. Whoever says so is under way: who makes members the same, or tells them that there is no such stripe, waits for that.
    pub(crate) fn doubt(&self, shared: &Shared) {
        shared.mark_unsynced();
        self.regions().for_each(|region| {
            self.set.unsynced.set(region);
            self.parity.doubtful.set(region);
        });
    }

    /// Whether its parity may be wrong for a reason that is known.
    pub(crate) fn is_unsynced(&self) -> bool {
        self.regions().any(|region| self.set.unsynced.get(region))
    }

    fn slots_that(&self, is: impl Fn(usize) -> bool) -> Slots {
        (0..self.slots()).filter(|slot| is(*slot)).fold(0, |slots, slot| slots | 1 << slot)
    }

    /// Whose content is what it should be.
    pub(crate) fn in_sync(&self) -> Slots {
        self.slots_that(|slot| self.set.mode(self.place(slot)) == Mode::InSync && self.leaf(slot).is_some())
    }

    /// Who gets writes.
    pub(crate) fn written(&self) -> Slots {
        self.slots_that(|slot| self.set.mode(self.place(slot)) != Mode::Away && self.leaf(slot).is_some())
    }

    /// What `need` holds: read, and where that cannot be, what `lost` says; `bad` gets who could not be read. `None`: that is nothing.
    /// Nobody may change the stripe meanwhile.
    ///
    /// # Errors
    /// `Aborted`: another time, also while a member lacks what the log says.
    pub(crate) async fn gather(
        &self,
        lanes: &Rc<Lanes>,
        place: &Place,
        need: Slots,
        bad: &mut Bad,
        lost: Lost,
    ) -> Result<Option<Contents>, Status> {
        let mut last = Status::Path;
        loop {
            let Some(level) = self.parity.when_level() else { return Err(Status::Aborted) };
            let readable = self.in_sync() & !bad.slots;
            let missing = need & !readable;
            let from = match (missing, lost) {
                (0, _) => need,
                (_, Lost::Unknown) => return Ok(None),
                (_, Lost::Zeroes) => need & readable,
                (_, Lost::Computed) => readable,
            };
            let lost_count = self.slots() - readable.count_ones() as usize;
            if missing != 0
                && lost == Lost::Computed
                && lost_count > usize::from(self.parity.stripes.parities())
            {
                return Err(last);
            }
            let mut contents: Contents = vec![None; self.slots()];
            for slot in each(from | missing) {
                contents[slot] = Some(Rc::new(place.spare.take(self.len)));
            }
            let reads = each(from).map(|slot| {
                let into = Rc::clone(contents[slot].as_ref().expect("put there just now"));
                async move {
                    let leaf = self.leaf(slot).expect("who is read is there");
                    (slot, lanes.read(leaf, self.offset(), &into, 0, self.len).await)
                }
            });
            let mut is_whole = true;
            for (slot, outcome) in all(reads).await {
                match outcome {
                    Ok(()) => {}
                    Err(Status::Aborted) if self.in_sync() >> slot & 1 != 0 => return Err(Status::Aborted),
                    // Not waited for any more.
                    Err(Status::Aborted) => is_whole = false,
                    Err(status) => {
                        bad.add(slot, status);
                        (last, is_whole) = (status, false);
                    }
                }
            }
            // What was read from a member that has been found to lack something meanwhile may be old.
            if !is_whole || from & !self.in_sync() != 0 || self.parity.when_level() != Some(level) {
                continue;
            }
            if lost == Lost::Zeroes {
                each(missing).for_each(|slot| self.bounce_mut(&mut contents, slot).fill(0));
            } else if missing != 0 {
                self.recover(&mut contents, from, missing)?;
            }
            return Ok(Some(contents));
        }
    }

    fn bounce_mut<'c>(&self, contents: &'c mut Contents, slot: usize) -> &'c mut [u8] {
        bytes_mut(&mut contents[slot], self.len)
    }

    /// Computes `missing` from those that are known.
    pub(crate) fn recover(
        &self,
        contents: &mut Contents,
        known: Slots,
        missing: Slots,
    ) -> Result<(), Status> {
        let mut shards: Vec<Shard<'_>> = Vec::with_capacity(self.slots());
        for (slot, content) in contents.iter_mut().enumerate() {
            shards.push(match () {
                () if known >> slot & 1 != 0 => {
                    Shard::Known(content.as_ref().expect("what is known is there").bytes(0, self.len))
                }
                () if missing >> slot & 1 != 0 => Shard::Wanted(bytes_mut(content, self.len)),
                () => Shard::Lost,
            });
        }
        parity::recover(&mut shards, usize::from(self.parity.stripes.parities())).map_err(|_| Status::Path)
    }
}

/// A buffer that nobody else has.
pub(crate) fn bytes_mut(content: &mut Option<Rc<Bounce>>, len: usize) -> &mut [u8] {
    let bounce = content.as_mut().expect("it is there");
    Rc::get_mut(bounce).expect("its requests have ended").bytes_mut(0, len)
}
