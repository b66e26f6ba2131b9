//! Which parts of the parity log are in use. Counts pages; knows nothing of their content or of I/O.
//!
//! ```text
//!   pages of the area   │ header │ header │ 7 7 7 │ 8 8 │ 9 9 9 9 │  free  │ 5 5 │ 6 6 6 │
//!                                                                 head ↑    ↑ tail: the oldest that is not released
//! ```
//!
//! An entry lies in one piece; numbers grow with each. One is *placed* when what it says stands on the members, and can be released when all
//! members have been flushed since, those before it too.

use std::collections::{BTreeSet, VecDeque};

/// The parity log of one set.
#[derive(Debug, Default)]
pub struct Ring {
    /// Of the area for entries.
    pages: u32,
    head: u32,
    entries: VecDeque<Entry>,
    next: u64,
    /// Entries before this one are flushed.
    flushed: u64,
    /// What tells this opening's entries from others.
    pub key: [u8; 16],
    /// Of the last header that was written, and what it says is released.
    pub header: (u64, u64),
    /// The last header says that whole stripes are written without the log.
    pub is_unlogged_known: bool,
    /// Somebody has asked for a release.
    pub is_release_wanted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    number: u64,
    page: u32,
    row: u64,
    is_placed: bool,
}

impl Ring {
    /// An empty one, with room for entries of so many pages together.
    #[must_use]
    pub fn new(pages: u32) -> Ring {
        Ring { pages, ..Ring::default() }
    }

    /// Of the area for entries.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Room for an entry about this row: its number, and its page in the area. `None`: not before some are released.
    pub fn begin(&mut self, pages: u32, row: u64) -> Option<(u64, u32)> {
        let page = self.room(pages)?;
        let number = self.next;
        self.next += 1;
        self.head = page + pages;
        self.entries.push_back(Entry { number, page, row, is_placed: false });
        Some((number, page))
    }

    /// Where an entry of so many pages would go.
    fn room(&self, pages: u32) -> Option<u32> {
        assert!(pages > 0 && 2 * pages <= self.pages, "an entry of {pages} pages in {}", self.pages);
        // One page is never used: a full ring would look like an empty one.
        match self.entries.front().map(|entry| entry.page) {
            None => Some(0),
            Some(tail) if self.head < tail => (pages < tail - self.head).then_some(self.head),
            Some(_) if pages <= self.pages - self.head => Some(self.head),
            Some(tail) => (pages < tail).then_some(0),
        }
    }

    /// Whether there is room for an entry of so many pages.
    #[must_use]
    pub fn has_room(&self, pages: u32) -> bool {
        self.room(pages).is_some()
    }

    /// What an entry says stands on the members.
    pub fn placed(&mut self, number: u64) {
        let first = self.entries.front().map_or(0, |entry| entry.number);
        let at = number.checked_sub(first).and_then(|at| usize::try_from(at).ok());
        let entry = at.and_then(|at| self.entries.get_mut(at));
        entry.expect("an entry is released after it was placed").is_placed = true;
    }

    /// All before this number are placed.
    #[must_use]
    pub fn placed_before(&self) -> u64 {
        let first = self.entries.iter().find(|entry| !entry.is_placed);
        first.map_or(self.next, |entry| entry.number)
    }

    /// All before this number have been flushed, too.
    pub fn is_flushed(&mut self, before: u64) {
        self.flushed = self.flushed.max(before);
    }

    /// All before this number can be released.
    #[must_use]
    pub fn flushed_before(&self) -> u64 {
        self.flushed
    }

    /// Entries before this number are not needed any more, and nobody will look for them: their rows.
    pub fn release(&mut self, before: u64) -> Vec<u64> {
        let mut rows = Vec::new();
        while let Some(entry) = self.entries.front().filter(|entry| entry.number < before) {
            assert!(entry.is_placed && before <= self.flushed, "entry {} is needed", entry.number);
            rows.push(entry.row);
            self.entries.pop_front();
        }
        rows
    }

    /// The rows that entries are about.
    #[must_use]
    pub fn rows(&self) -> BTreeSet<u64> {
        self.entries.iter().map(|entry| entry.row).collect()
    }

    /// The number of the oldest entry, or that of the next where there is none.
    #[must_use]
    pub fn oldest(&self) -> u64 {
        self.entries.front().map_or(self.next, |entry| entry.number)
    }

    /// The number of the next entry.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// None.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// It is time to release some.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        let Some(tail) = self.entries.front().map(|entry| entry.page) else { return false };
        let used = if self.head > tail { self.head - tail } else { self.pages - tail + self.head };
        used > self.pages / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raid::tests::Random;

    /// Beside a list of who has which page.
    #[test]
    fn no_page_has_two_entries_whatever_the_order() {
        for seed in 0..200 {
            let mut random = Random(seed);
            let pages = 8 + random.below(40);
            let mut ring = Ring::new(pages);
            let mut owners: Vec<Option<u64>> = vec![None; pages as usize];
            let mut open: Vec<(u64, bool)> = Vec::new();
            for _ in 0..400 {
                match random.below(4) {
                    0 | 1 => {
                        let want = 1 + random.below(pages / 2);
                        let Some((number, page)) = ring.begin(want, number_row(0)) else {
                            assert!(!open.is_empty(), "an empty ring has room");
                            continue;
                        };
                        for owner in &mut owners[page as usize..(page + want) as usize] {
                            assert_eq!(owner.replace(number), None, "in use");
                        }
                        open.push((number, false));
                    }
                    2 => {
                        let at = random.below(u32::try_from(open.len()).expect("few") + 1);
                        if let Some(entry) = open.get_mut(at as usize) {
                            entry.1 = true;
                            ring.placed(entry.0);
                        }
                    }
                    _ => {
                        let before = ring.placed_before();
                        let expected = open.iter().find(|entry| !entry.1).map_or(ring.next, |entry| entry.0);
                        assert_eq!(before, expected);
                        ring.is_flushed(before);
                        ring.release(before);
                        owners.iter_mut().for_each(|owner| *owner = owner.filter(|owner| *owner >= before));
                        open.retain(|entry| entry.0 >= before);
                        assert_eq!(ring.len(), open.len());
                    }
                }
            }
        }
    }

    fn number_row(number: u64) -> u64 {
        number * 3
    }

    #[test]
    fn rows_of_what_is_released_come_back_in_order() {
        let mut ring = Ring::new(10);
        for row in [7, 7, 9] {
            let (number, _) = ring.begin(3, row).expect("room");
            ring.placed(number);
        }
        assert_eq!(ring.begin(3, 1), None);
        assert!(ring.is_half_full());
        ring.is_flushed(2);
        assert_eq!(ring.release(2), [7, 7]);
        assert_eq!(ring.begin(3, 1), Some((3, 0)));
    }

    #[test]
    #[should_panic(expected = "is needed")]
    fn what_is_not_flushed_is_not_released() {
        let mut ring = Ring::new(10);
        let (number, _) = ring.begin(3, 0).expect("room");
        ring.placed(number);
        ring.release(1);
    }
}
