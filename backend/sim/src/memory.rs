//! Memory of simulated disks, by the page: what was written is there, and the rest follows from what the disk was before.
//!
//! A disk has megabytes, of which a history writes some hundred pages. Only these take memory, are copied, and are given back to the
//! thread, whose next disk takes them over.
//!
//! ```text
//!   untouched   zero, or junk: a piece of one pattern that all disks share, of each disk and page another one
//!   written     a page of its own
//! ```
//!
//! Invariants: what is read never depends on who had a page before; what is behind the end is untouched.

use crate::random::Random;
use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, Range};
use std::sync::LazyLock;

/// What a page has.
pub const PAGE_BYTES: usize = 4096;
type Page = [u8; PAGE_BYTES];
/// Pages that a thread keeps at most: 64 MB.
const KEPT_MAX: usize = 16 << 10;

/// Places in the pattern where a page of junk may begin.
const JUNK_PLACES: u64 = 1 << 15;
const WORD_BYTES: usize = 8;

static ZEROES: Page = [0; PAGE_BYTES];
static JUNK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(0x6a75_6e6b);
    let words = JUNK_PLACES + (PAGE_BYTES / WORD_BYTES) as u64;
    (0..words).flat_map(|_| random.next_u64().to_le_bytes()).collect()
});

thread_local! {
    static KEPT: RefCell<Vec<Box<Page>>> = const { RefCell::new(Vec::new()) };
}

/// What is read where nothing was written.
#[derive(Clone, Copy)]
enum Untouched {
    Zero,
    /// Of this disk.
    Junk(u64),
}

impl Untouched {
    fn page(self, page: usize) -> &'static [u8] {
        match self {
            Untouched::Zero => &ZEROES,
            Untouched::Junk(number) => {
                // Any place for a page of disk 0. An odd step to the next disk's: no two of them have the same.
                let place = Random::new(page as u64).next_u64().wrapping_add(number.wrapping_mul(61));
                let place = usize::try_from(place % JUNK_PLACES).expect("a place in the pattern");
                &JUNK[place * WORD_BYTES..][..PAGE_BYTES]
            }
        }
    }
}

/// So many bytes.
pub struct Memory {
    pages: Vec<Option<Box<Page>>>,
    len: usize,
    untouched: Untouched,
}

impl Memory {
    /// All zero.
    #[must_use]
    pub fn new(len: usize) -> Memory {
        Memory::of(len, Untouched::Zero)
    }

    /// Words that mean nothing: what a disk holds that was used before. Memories of another number have others, up to 32768 of them.
    #[must_use]
    pub fn junk(len: usize, number: u64) -> Memory {
        Memory::of(len, Untouched::Junk(number))
    }

    fn of(len: usize, untouched: Untouched) -> Memory {
        let mut memory = Memory { pages: Vec::new(), len: 0, untouched };
        memory.grow(len);
        memory
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// These bytes: a copy, if they are of several pages.
    #[must_use]
    pub fn get(&self, range: Range<usize>) -> Cow<'_, [u8]> {
        let mut pieces = self.pieces(range);
        match (pieces.next(), pieces.next()) {
            (None, _) => Cow::Borrowed(&[]),
            (Some(only), None) => Cow::Borrowed(only),
            (Some(first), Some(second)) => {
                Cow::Owned([first, second].into_iter().chain(pieces).flatten().copied().collect())
            }
        }
    }

    /// These bytes, page by page.
    pub fn pieces(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        self.check(&range);
        by_page(range).map(|(page, within)| {
            let bytes = self.pages[page].as_deref().map_or(self.untouched.page(page), |page| &page[..]);
            &bytes[within]
        })
    }

    /// These bytes, to be changed: of one page.
    ///
    /// # Panics
    /// When they are not.
    pub fn change(&mut self, range: Range<usize>) -> &mut [u8] {
        self.check(&range);
        let mut pages = by_page(range);
        let (page, within) = pages.next().expect("some bytes");
        assert!(pages.next().is_none(), "bytes of several pages");
        &mut self.page(page, false)[within]
    }

    /// Each page's of these bytes is given to `write`, which writes all of it.
    pub fn write_with(&mut self, range: Range<usize>, mut write: impl FnMut(&mut [u8])) {
        self.check(&range);
        for (page, within) in by_page(range) {
            write(&mut self.page(page, within.len() == PAGE_BYTES)[within]);
        }
    }

    /// Writes these bytes there.
    pub fn write(&mut self, at: usize, mut bytes: &[u8]) {
        self.write_with(at..at + bytes.len(), |piece| {
            let (here, rest) = bytes.split_at(piece.len());
            piece.copy_from_slice(here);
            bytes = rest;
        });
    }

    /// Makes these bytes zero.
    pub fn zero(&mut self, range: Range<usize>) {
        match self.untouched {
            Untouched::Zero => self.forget(range),
            Untouched::Junk(_) => self.write_with(range, |piece| piece.fill(0)),
        }
    }

    /// Makes these bytes what they were at first.
    pub fn forget(&mut self, range: Range<usize>) {
        self.check(&range);
        for (page, within) in by_page(range) {
            if within.len() == PAGE_BYTES {
                give_back(self.pages[page].take());
            } else if let Some(bytes) = &mut self.pages[page] {
                bytes[within.clone()].copy_from_slice(&self.untouched.page(page)[within]);
            }
        }
    }

    /// The page that this byte is in is as it was at first.
    #[must_use]
    pub fn is_untouched(&self, at: usize) -> bool {
        self.pages[at / PAGE_BYTES].is_none()
    }

    /// These bytes, all of one page, unless that is as it was at first.
    #[must_use]
    pub fn written(&self, range: Range<usize>) -> Option<&[u8]> {
        let page = self.pages[range.start / PAGE_BYTES].as_deref()?;
        Some(&page[range.start % PAGE_BYTES..][..range.len()])
    }

    /// The page that this byte is in, which is as at first afterwards; `None`: it was.
    pub fn take(&mut self, at: usize) -> Option<OldPage> {
        self.pages[at / PAGE_BYTES].take().map(|page| OldPage(Some(page)))
    }

    /// More of them; none fewer.
    pub fn grow(&mut self, len: usize) {
        self.len = self.len.max(len);
        self.pages.resize_with(self.len.div_ceil(PAGE_BYTES), || None);
    }

    /// All zero, whatever they were at first.
    pub fn clear(&mut self) {
        self.pages.iter_mut().for_each(|page| give_back(page.take()));
        self.untouched = Untouched::Zero;
    }

    fn check(&self, range: &Range<usize>) {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
    }

    /// A page to write to. If not `is_whole`, what is not written stays.
    fn page(&mut self, page: usize, is_whole: bool) -> &mut Page {
        let untouched = self.untouched;
        self.pages[page].get_or_insert_with(|| {
            let kept = KEPT.with_borrow_mut(Vec::pop);
            let mut bytes = kept.unwrap_or_else(|| Box::new(ZEROES));
            if !is_whole {
                bytes.copy_from_slice(untouched.page(page));
            }
            bytes
        })
    }
}

/// The pages of a range, with what each has of it.
fn by_page(range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut from = range.start;
    std::iter::from_fn(move || {
        let (page, begin) = (from / PAGE_BYTES, from % PAGE_BYTES);
        let len = (range.end - from).min(PAGE_BYTES - begin);
        from += len;
        (len > 0).then_some((page, begin..begin + len))
    })
}

fn give_back(page: Option<Box<Page>>) {
    let Some(page) = page else { return };
    // A thread that ends keeps nothing.
    let _ = KEPT.try_with(|kept| {
        let mut kept = kept.borrow_mut();
        if kept.len() < KEPT_MAX {
            kept.push(page);
        }
    });
}

/// What a page was.
pub struct OldPage(Option<Box<Page>>);

impl Deref for OldPage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().map_or(&[], |page| page)
    }
}

impl fmt::Debug for OldPage {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a page")
    }
}

impl Drop for OldPage {
    fn drop(&mut self) {
        give_back(self.0.take());
    }
}

impl Clone for Memory {
    fn clone(&self) -> Memory {
        let mut copy = Memory::of(self.len, self.untouched);
        for (page, bytes) in self.pages.iter().enumerate() {
            if let Some(bytes) = bytes {
                copy.page(page, true).copy_from_slice(&bytes[..]);
            }
        }
        copy
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.clear();
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} bytes", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(memory: &Memory) -> Vec<u8> {
        memory.get(0..memory.len()).into_owned()
    }

    #[test]
    fn pages_that_another_has_written_are_zero_again() {
        let mut first = Memory::new(20_000);
        first.write(4090, &[1; 10]);
        first.change(19_999..20_000).fill(1);
        let place = first.get(19_999..20_000).as_ptr();
        drop(first);
        let mut second = Memory::new(20_001);
        second.write(20_000, &[2]);
        let places = [0, 4096].map(|at| second.get(16_384 + at % 4096..20_000).as_ptr());
        assert!(places.contains(&place) || second.is_untouched(0), "it is used again");
        assert!(all(&second)[..20_000].iter().all(|byte| *byte == 0));
        second.write(0, &[2; 20_001]);
        second.grow(70_000);
        assert!(all(&second)[..20_001].iter().all(|byte| *byte == 2));
        assert!(all(&second)[20_001..].iter().all(|byte| *byte == 0));
        let third = second.clone();
        second.zero(10..20_000);
        assert!(
            all(&third)[..20_001].iter().all(|byte| *byte == 2)
                && all(&third)[20_001..].iter().all(|byte| *byte == 0)
        );
        assert!(*second.get(9..11) == [2, 0] && *second.get(19_999..20_001) == [0, 2]);
        assert!(second.is_untouched(69_999) && second.is_untouched(4096) && !second.is_untouched(9));
        second.clear();
        assert!(second.len() == 70_000 && all(&second).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn junk_is_each_disks_own_and_comes_back() {
        let one = Memory::junk(50_000, 5);
        let other = Memory::junk(50_000, 6);
        let (before, others) = (all(&one), all(&other));
        for page in 0..12 {
            let range = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
            assert!(before[range.clone()] != others[range.clone()], "page {page} of two disks");
            assert!(before[range] != before[(page + 1) * PAGE_BYTES % 49_152..][..PAGE_BYTES], "two pages");
        }
        let mut changed = one.clone();
        changed.write(100, &[7; 9000]);
        assert!(changed.is_untouched(12_288) && !changed.is_untouched(0));
        changed.zero(45_000..50_000);
        let now = all(&changed);
        assert!(now[..100] == before[..100] && now[9100..45_000] == before[9100..45_000]);
        assert!(now[100..9100].iter().all(|byte| *byte == 7) && now[45_000..].iter().all(|byte| *byte == 0));
        changed.forget(0..50_000);
        assert!(all(&changed) == before);
        changed.clear();
        assert!(all(&changed).iter().all(|byte| *byte == 0), "another disk in its place");
    }
}
