//! Which regions may differ between members after a crash: marks that are durable before a region is written.
//!
//! Regions are numbered through all sets. A mark is set before the first write, and cleared lazily: hidden from writers; all who were under
//! way have ended; all members have flushed; no member of the set is away, and none lacks the region; then the page is written. So the marks
//! that are left tell how far a rebuild had come when it was interrupted.

use super::Owner;
use crate::format::{self, INTENTS_PER_PAGE, PAGE_BYTES};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::raid::{Mode, Set};
use crate::simulated::is_broken;
use hawser_block::Outcome;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

const WORDS_PER_PAGE: usize = (INTENTS_PER_PAGE / 64) as usize;

/// The marks.
#[derive(Default)]
pub(crate) struct Intents {
    /// As they shall be on the members.
    wanted: Vec<u64>,
    /// As they are there.
    durable: Vec<u64>,
    /// About to be cleared, unless somebody wants them.
    clearing: BTreeSet<u32>,
}

impl Intents {
    /// All marks, by page, as read; `None`: a page that could not be: everything in it is marked.
    pub(crate) fn new(pages: Vec<Option<Vec<u64>>>) -> Intents {
        let words = pages.into_iter().flat_map(|page| page.unwrap_or_else(|| vec![u64::MAX; WORDS_PER_PAGE]));
        let durable: Vec<u64> = words.collect();
        Intents { wanted: durable.clone(), durable, clearing: BTreeSet::new() }
    }

    pub(crate) fn is_durable(&self, region: u32) -> bool {
        get(&self.durable, region)
    }
}

fn get(words: &[u64], region: u32) -> bool {
    words.get(region as usize / 64).is_some_and(|word| word >> (region % 64) & 1 != 0)
}

fn set(words: &mut [u64], region: u32, value: bool) {
    let (word, bit) = (&mut words[region as usize / 64], 1 << (region % 64));
    if value { *word |= bit } else { *word &= !bit }
}

impl Owner {
    /// The number of a set's first region.
    pub(crate) fn first_region(&self, set: usize) -> u32 {
        self.view().array.sets()[..set].iter().map(|set| set.regions()).sum()
    }

    /// Marks regions of a set; when it ends, writes may go there.
    pub(crate) async fn mark(self: &Rc<Self>, set_index: usize, regions: &BTreeSet<u32>) -> Outcome {
        let array_set = Arc::clone(self.view().array.set(set_index));
        let missing: Vec<u32> =
            regions.iter().copied().filter(|region| !array_set.intents.get(*region)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let first = self.first_region(set_index);
        if is_broken("ack_before_intent") {
            missing.iter().for_each(|region| array_set.intents.set(*region));
        }
        loop {
            {
                let intents = &mut *self.intents.borrow_mut();
                for region in &missing {
                    set(&mut intents.wanted, first + region, true);
                    intents.clearing.remove(&(first + region));
                }
            }
            self.write_intents().await?;
            // Who clears marks may have found one that somebody else had set meanwhile, and taken it away again.
            let intents = self.intents.borrow();
            let is_there = |region: &u32| {
                get(&intents.wanted, first + region)
                    && intents.is_durable(first + region)
                    && !intents.clearing.contains(&(first + region))
            };
            if missing.iter().all(is_there) {
                break;
            }
        }
        for region in missing {
            array_set.touched.set(region);
            array_set.intents.set(region);
            coverage::count(coverage::Event::IntentSet);
        }
        Ok(())
    }

    /// Writes pages that are not as they shall be.
    async fn write_intents(self: &Rc<Self>) -> Outcome {
        let _turn = self.turns.intents.take().await;
        let is_dirty = |intents: &Intents, page: usize| {
            let words = page * WORDS_PER_PAGE..(page + 1) * WORDS_PER_PAGE;
            intents.wanted[words.clone()] != intents.durable[words]
        };
        let pages = self.intents.borrow().wanted.len() / WORDS_PER_PAGE;
        let dirty: Vec<usize> = (0..pages).filter(|page| is_dirty(&self.intents.borrow(), *page)).collect();
        for page in dirty {
            self.write_intent_page(page).await?;
        }
        Ok(())
    }

    async fn write_intent_page(self: &Rc<Self>, page: usize) -> Outcome {
        let words = page * WORDS_PER_PAGE..(page + 1) * WORDS_PER_PAGE;
        let content = self.intents.borrow().wanted[words.clone()].to_vec();
        let number = u32::try_from(page).expect("few pages");
        let bytes = format::encode_intents(&self.shared.uuid, number, &content);
        let offset = self.book.borrow().layout.intents_offset() + (page * PAGE_BYTES) as u64;
        let bounce = Rc::new(Bounce::holding(&bytes));
        {
            // Until it is known which of the two is there, only what both say is.
            let durable = &mut self.intents.borrow_mut().durable[words.clone()];
            durable.iter_mut().zip(&content).for_each(|(durable, wanted)| *durable &= wanted);
        }
        self.write_everywhere(offset, &bounce, PAGE_BYTES, true).await?;
        self.intents.borrow_mut().durable[words].copy_from_slice(&content);
        Ok(())
    }

    /// Writes all pages: a member has come that has none of them.
    pub(crate) async fn rewrite_intents(self: &Rc<Self>) -> Outcome {
        let _turn = self.turns.intents.take().await;
        let pages = self.intents.borrow().wanted.len() / WORDS_PER_PAGE;
        for page in 0..pages {
            self.write_intent_page(page).await?;
        }
        Ok(())
    }

    /// Marks everything in a set from some byte of its members on: a member has come that has nothing of it.
    pub(crate) async fn mark_from(self: &Rc<Self>, set_index: usize, from: u64) -> Outcome {
        let view = self.view();
        let set = view.array.set(set_index);
        let regions = (set.region_of(from)..set.regions()).collect();
        self.mark(set_index, &regions).await
    }

    /// Whether somebody in a set lacks what nothing tells but the marks: a replacement, or a member that has lost its cache, whether it
    /// was in sync or was just being brought up to date.
    fn is_lacking(&self, set: &Set) -> bool {
        self.is_doubted(set) || self.replacement_lacks(set)
    }

    /// Clears marks of regions that nobody has written to since this was last called; `all`: whoever has.
    pub(crate) async fn clear_idle_intents(self: &Rc<Self>, all: bool) -> Outcome {
        let sets: Vec<Arc<Set>> = self.view().array.sets().to_vec();
        let mut hidden: Vec<(usize, u32)> = Vec::new();
        for (index, array_set) in sets.iter().enumerate() {
            if !are_all_there(array_set) || self.is_lacking(array_set) {
                continue;
            }
            for region in array_set.intents.iter_set().collect::<Vec<_>>() {
                let is_touched = array_set.touched.take(region);
                if (all || !is_touched) && !array_set.unsynced.get(region) {
                    hidden.push((index, region));
                }
            }
        }
        if hidden.is_empty() {
            return Ok(());
        }
        let lost = self.shared.lost_caches.look();
        for (index, region) in &hidden {
            sets[*index].intents.clear(*region);
            self.intents.borrow_mut().clearing.insert(self.first_region(*index) + region);
        }
        self.barrier().await;
        let flushed = match is_broken("clear_intent_without_flush") {
            true => Ok(()),
            false => self.flush_members().await,
        };
        let is_lost = self.shared.lost_caches.look() != lost;
        if is_lost {
            self.shared.mark_unsynced();
        }
        for (index, region) in &hidden {
            let flat = self.first_region(*index) + region;
            let array_set = &sets[*index];
            if is_lost {
                // Members that stayed have each lost something else. Who marked what is marked did not see this region.
                array_set.unsynced.set(*region);
                if let Some(parity) = array_set.parity().filter(|_| array_set.are_all_in_sync()) {
                    parity.doubtful.set(*region);
                }
            }
            let is_still_wanted = !self.intents.borrow_mut().clearing.remove(&flat);
            if is_still_wanted {
                continue;
            }
            let is_same = flushed.is_ok()
                && are_all_there(array_set)
                && !self.is_lacking(array_set)
                && !array_set.unsynced.get(*region);
            if is_same {
                set(&mut self.intents.borrow_mut().wanted, flat, false);
                coverage::count(coverage::Event::IntentCleared);
            } else {
                array_set.intents.set(*region);
            }
        }
        flushed?;
        self.write_intents().await
    }
}

/// Whether all members of a set get all writes: then what is not marked as differing is the same on all of them.
fn are_all_there(set: &Set) -> bool {
    (0..set.members()).all(|member| set.mode(member) != Mode::Away)
}
