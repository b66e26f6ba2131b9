//! The blocks of a volume, as its model has them: most have one content and are at rest, and take three words each.
//!
//! Copies share pages until one of them changes: a snapshot of a model costs little.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Blocks in a page: one bit each in a word.
const PAGE_BLOCKS: u64 = u64::BITS as u64;

thread_local! {
    /// Of blocks that are at rest again, for the next: each write would ask for three pieces of memory else.
    #[allow(clippy::vec_box, reason = "the boxes are what is kept")]
    static KEPT: RefCell<Vec<Box<Busy>>> = const { RefCell::new(Vec::new()) };
}

/// A few contents; rarely more.
#[derive(Clone)]
pub(crate) enum Few {
    Inline([u64; 3], u8),
    Many(Vec<u64>),
}

impl Few {
    pub(crate) const NONE: Few = Few::Inline([0; 3], 0);

    pub(crate) fn one(id: u64) -> Few {
        Few::Inline([id, 0, 0], 1)
    }

    pub(crate) fn all(&self) -> &[u64] {
        match self {
            Few::Inline(ids, len) => &ids[..usize::from(*len)],
            Few::Many(ids) => ids,
        }
    }

    pub(crate) fn push(&mut self, id: u64) {
        match self {
            Few::Inline(ids, len) if usize::from(*len) < ids.len() => {
                ids[usize::from(*len)] = id;
                *len += 1;
            }
            Few::Inline(ids, _) => *self = Few::Many(ids.iter().copied().chain([id]).collect()),
            Few::Many(ids) => ids.push(id),
        }
    }

    pub(crate) fn contains(&self, id: u64) -> bool {
        self.all().contains(&id)
    }

    /// In order, each once.
    pub(crate) fn sort(&mut self) {
        match self {
            Few::Inline(_, 0 | 1) => {}
            Few::Inline(ids, len) => {
                let mut sorted = *ids;
                sorted[..usize::from(*len)].sort_unstable();
                let mut kept = Few::NONE;
                for id in &sorted[..usize::from(*len)] {
                    if kept.all().last() != Some(id) {
                        kept.push(*id);
                    }
                }
                *self = kept;
            }
            Few::Many(ids) => {
                ids.sort_unstable();
                ids.dedup();
            }
        }
    }
}

impl std::fmt::Debug for Few {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.all().fmt(out)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Write {
    pub(super) seq: u64,
    pub(super) id: u64,
    /// Writes that were under way at the same time.
    pub(super) others: Vec<u64>,
    /// What was there may stay.
    pub(super) is_weak: bool,
}

/// A block that is not at rest.
#[derive(Clone, Debug)]
pub(super) struct Busy {
    pub(super) possible: Few,
    pub(super) writes: Vec<Write>,
    /// Number in the order of begins, and content.
    pub(super) log: Vec<(u64, u64)>,
    pub(super) stable: Few,
}

impl Busy {
    pub(super) fn seen(&self) -> Few {
        let mut seen = self.possible.clone();
        self.writes.iter().for_each(|write| seen.push(write.id));
        seen.sort();
        seen
    }
}

/// A block: at rest it has one content, which is possible and stable.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    content: u64,
    /// It is stable as of this number.
    stable_seq: u64,
    busy: Option<Box<Busy>>,
}

impl Block {
    pub(super) fn busy(&mut self) -> &mut Busy {
        let content = self.content;
        self.busy.get_or_insert_with(|| {
            let (possible, stable) = (Few::one(content), Few::one(content));
            let Some(mut kept) = KEPT.with_borrow_mut(Vec::pop) else {
                return Box::new(Busy { possible, writes: Vec::new(), log: Vec::new(), stable });
            };
            (kept.possible, kept.stable) = (possible, stable);
            kept
        })
    }

    pub(super) fn possible(&self) -> Few {
        self.busy.as_ref().map_or(Few::one(self.content), |busy| busy.possible.clone())
    }

    pub(super) fn stable(&self) -> Few {
        self.busy.as_ref().map_or(Few::one(self.content), |busy| busy.stable.clone())
    }

    pub(super) fn seen(&self) -> Few {
        self.busy.as_ref().map_or(Few::one(self.content), |busy| busy.seen())
    }

    /// Those of which not all is known.
    pub(super) fn as_busy(&self) -> Option<&Busy> {
        self.busy.as_deref()
    }

    pub(super) fn make_stable(&mut self, contents: Few, seq: u64) {
        if seq >= self.stable_seq {
            self.stable_seq = seq;
            let busy = self.busy();
            busy.stable = contents;
            busy.log.retain(|(other, _)| *other > seq);
        }
    }

    pub(super) fn cut(&mut self) {
        self.lose_unflushed();
        if let Some(busy) = &mut self.busy {
            busy.writes.clear();
        }
    }

    /// The same, and who writes goes on.
    pub(super) fn lose_unflushed(&mut self) {
        if let Some(busy) = &mut self.busy {
            busy.possible = busy.stable.clone();
            busy.log.iter().for_each(|(_, id)| busy.possible.push(*id));
            busy.possible.sort();
            // One half of a write may have been there.
            busy.writes.iter_mut().for_each(|write| write.is_weak = true);
        }
    }

    /// Says whether it is at rest.
    fn rest(&mut self) -> bool {
        let Some(busy) = &self.busy else { return true };
        let [content] = *busy.possible.all() else { return false };
        let rests = busy.log.is_empty() && busy.writes.is_empty() && *busy.stable.all() == [content];
        if rests {
            self.content = content;
            // Nothing is under way, and nothing in its log.
            KEPT.with_borrow_mut(|kept| kept.extend(self.busy.take()));
        }
        rests
    }
}

#[derive(Clone)]
struct Page {
    /// Blocks that were ever used.
    there: u64,
    /// Those that are not at rest.
    busy: u64,
    blocks: [Block; u64::BITS as usize],
}

/// Blocks by number.
#[derive(Clone, Default)]
pub(super) struct Blocks(BTreeMap<u64, Rc<Page>>);

impl Blocks {
    /// Changes one, which begins as zeroes.
    pub(super) fn change<T>(&mut self, at: u64, change: impl FnOnce(&mut Block) -> T) -> T {
        let page = self.0.entry(at / PAGE_BLOCKS).or_insert_with(|| {
            Rc::new(Page { there: 0, busy: 0, blocks: std::array::from_fn(|_| Block::default()) })
        });
        change_in(Rc::make_mut(page), at, change)
    }

    /// Changes one, if it was ever used.
    pub(super) fn change_known<T>(&mut self, at: u64, change: impl FnOnce(&mut Block) -> T) -> Option<T> {
        let page = self.0.get_mut(&(at / PAGE_BLOCKS))?;
        let is_there = page.there & bit(at) != 0;
        is_there.then(|| change_in(Rc::make_mut(page), at, change))
    }

    /// Changes all that are not at rest.
    pub(super) fn change_busy(&mut self, mut change: impl FnMut(u64, &mut Block)) {
        for (page_at, page) in self.0.iter_mut().filter(|(_, page)| page.busy != 0) {
            let page = Rc::make_mut(page);
            for at in bits(page.busy).map(|index| page_at * PAGE_BLOCKS + index) {
                change_in(page, at, |block| change(at, block));
            }
        }
    }

    pub(super) fn get(&self, at: u64) -> Option<&Block> {
        let page = self.0.get(&(at / PAGE_BLOCKS))?;
        (page.there & bit(at) != 0).then(|| &page.blocks[index(at)])
    }

    /// Those that are not at rest.
    pub(super) fn busy(&self) -> impl Iterator<Item = (u64, &Busy)> + '_ {
        self.busy_in(0, u64::MAX)
    }

    /// Those of `from..to`.
    pub(super) fn busy_in(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, &Busy)> + '_ {
        let pages = self.0.range(from / PAGE_BLOCKS..to.div_ceil(PAGE_BLOCKS));
        let all = pages.filter(|(_, page)| page.busy != 0).flat_map(|(page_at, page)| {
            bits(page.busy)
                .map(move |bit| page_at * PAGE_BLOCKS + bit)
                .map(|at| (at, &page.blocks[index(at)]))
        });
        let all = all.filter(move |(at, _)| (from..to).contains(at));
        all.filter_map(|(at, block)| Some((at, block.as_busy()?)))
    }

    /// Takes all away from this one on.
    pub(super) fn split_off(&mut self, from: u64) -> Vec<(u64, Block)> {
        let mut gone = Vec::new();
        for (page_at, page) in self.0.range_mut(from / PAGE_BLOCKS..) {
            let of = bits(page.there).map(|index| page_at * PAGE_BLOCKS + index).filter(|at| *at >= from);
            let all: Vec<u64> = of.collect();
            if all.is_empty() {
                continue;
            }
            let page = Rc::make_mut(page);
            for at in all {
                gone.push((at, std::mem::take(&mut page.blocks[index(at)])));
                page.there &= !bit(at);
                page.busy &= !bit(at);
            }
        }
        gone
    }
}

fn change_in<T>(page: &mut Page, at: u64, change: impl FnOnce(&mut Block) -> T) -> T {
    let block = &mut page.blocks[index(at)];
    let changed = change(block);
    let rests = block.rest();
    page.there |= bit(at);
    page.busy = if rests { page.busy & !bit(at) } else { page.busy | bit(at) };
    changed
}

fn index(at: u64) -> usize {
    usize::try_from(at % PAGE_BLOCKS).expect("below 64")
}

fn bit(at: u64) -> u64 {
    1 << (at % PAGE_BLOCKS)
}

/// The bits that are set.
fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| u64::from(word.trailing_zeros()));
        word &= word.wrapping_sub(1);
        bit
    })
}
