//! A set of numbers, as bits, with a second level of bits that says which words are not empty: finding the next one is quick
//! in a large set that is nearly empty.

/// The set.
#[derive(Default)]
pub(super) struct Bitmap {
    words: Vec<u64>,
    /// Bit `w`: word `w` is not 0.
    summary: Vec<u64>,
    len: usize,
}

impl Bitmap {
    pub(super) fn new(limit: u32) -> Bitmap {
        let mut set = Bitmap::default();
        set.grow(limit);
        set
    }

    /// Room for the numbers below `limit`.
    pub(super) fn grow(&mut self, limit: u32) {
        let words = (limit as usize).div_ceil(64).max(self.words.len());
        self.words.resize(words, 0);
        self.summary.resize(words.div_ceil(64), 0);
    }

    /// How many numbers are in it.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.len).expect("numbers are u32")
    }

    pub(super) fn contains(&self, number: u32) -> bool {
        let number = number as usize;
        self.words.get(number / 64).is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// Puts it in; false if it was there.
    pub(super) fn insert(&mut self, number: u32) -> bool {
        let number = number as usize;
        let word = &mut self.words[number / 64];
        let is_new = *word >> (number % 64) & 1 == 0;
        *word |= 1 << (number % 64);
        self.summary[number / 4096] |= 1 << (number / 64 % 64);
        self.len += usize::from(is_new);
        is_new
    }

    /// Takes it out; false if it was not there.
    pub(super) fn remove(&mut self, number: u32) -> bool {
        if !self.contains(number) {
            return false;
        }
        let number = number as usize;
        let word = &mut self.words[number / 64];
        *word &= !(1 << (number % 64));
        if *word == 0 {
            self.summary[number / 4096] &= !(1 << (number / 64 % 64));
        }
        self.len -= 1;
        true
    }

    /// The smallest that is not below `from`.
    pub(super) fn next(&self, from: u32) -> Option<u32> {
        let from = from as usize;
        let first = self.words.get(from / 64)? & (u64::MAX << (from % 64));
        if first != 0 {
            return number(from / 64, first);
        }
        let after = from / 64 + 1;
        let mut above = self.summary.get(after / 64)? & (u64::MAX << (after % 64));
        let mut at = after / 64;
        while above == 0 {
            at += 1;
            above = *self.summary.get(at)?;
        }
        let word = at * 64 + above.trailing_zeros() as usize;
        number(word, self.words[word])
    }

    /// As [`Bitmap::next`], and from the beginning if there is none.
    pub(super) fn next_around(&self, from: u32) -> Option<u32> {
        self.next(from).or_else(|| self.next(0))
    }
}

fn number(word: usize, bits: u64) -> Option<u32> {
    u32::try_from(word * 64 + bits.trailing_zeros() as usize).ok()
}
