//! A row of bits that all reactors read and some write, without locks.
//!
//! Invariants: bits beyond the length are never set.

use crate::atomic::{AtomicU64, Ordering};
use std::fmt;

const WORD_BITS: u32 = u64::BITS;

/// A fixed number of bits.
///
/// A bit that is seen set (cleared) makes visible what its setter (clearer) did before, except with [`AtomicBits::mark`].
pub struct AtomicBits {
    len: u32,
    words: Box<[AtomicU64]>,
}

impl AtomicBits {
    /// `len` bits, all clear.
    #[must_use]
    pub fn new(len: u32) -> AtomicBits {
        AtomicBits { len, words: (0..len.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// How many bits there are, set or not.
    #[must_use]
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// There are no bits at all.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    fn word(&self, bit: u32) -> (&AtomicU64, u64) {
        assert!(bit < self.len, "bit {bit} of {}", self.len);
        (&self.words[(bit / WORD_BITS) as usize], 1 << (bit % WORD_BITS))
    }

    /// Says whether `bit` is set.
    #[must_use]
    #[inline]
    pub fn get(&self, bit: u32) -> bool {
        let (word, mask) = self.word(bit);
        word.load(Ordering::Acquire) & mask != 0
    }

    /// Sets `bit`.
    pub fn set(&self, bit: u32) {
        let (word, mask) = self.word(bit);
        word.fetch_or(mask, Ordering::AcqRel);
    }

    /// Clears `bit`.
    pub fn clear(&self, bit: u32) {
        let (word, mask) = self.word(bit);
        word.fetch_and(!mask, Ordering::AcqRel);
    }

    /// Sets `bit`, and costs a load where it is set already: for bits that many set again and again. Orders nothing.
    #[inline]
    pub fn mark(&self, bit: u32) {
        let (word, mask) = self.word(bit);
        if word.load(Ordering::Relaxed) & mask == 0 {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// Clears `bit` and says whether it was set: no mark in between is lost.
    #[must_use = "use `clear` when it does not matter"]
    pub fn take(&self, bit: u32) -> bool {
        let (word, mask) = self.word(bit);
        word.fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// The bits of the word at `index` that are within the length.
    fn valid(&self, index: usize) -> u64 {
        let is_last = index + 1 == self.words.len();
        let used = if is_last { (self.len - 1) % WORD_BITS + 1 } else { WORD_BITS };
        u64::MAX >> (WORD_BITS - used)
    }

    /// Sets every bit.
    pub fn set_all(&self) {
        for (index, word) in self.words.iter().enumerate() {
            word.store(self.valid(index), Ordering::Release);
        }
    }

    /// Clears every bit.
    pub fn clear_all(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }

    /// Some bit is set.
    #[must_use]
    pub fn any(&self) -> bool {
        self.words.iter().any(|word| word.load(Ordering::Acquire) != 0)
    }

    /// How many bits are set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.load(Ordering::Acquire).count_ones()).sum()
    }

    /// The set bits, ascending; each word is looked at once, when it is come to.
    pub fn iter_set(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.words).flat_map(|(index, word): (u32, _)| {
            let mut left = word.load(Ordering::Acquire);
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros();
                left &= left.wrapping_sub(1);
                (bit < WORD_BITS).then_some(index * WORD_BITS + bit)
            })
        })
    }

    /// Sets every bit that is set in `other`, which is as long.
    pub fn or_from(&self, other: &AtomicBits) {
        assert_eq!(self.len, other.len, "bits of unlike lengths");
        for (to, from) in self.words.iter().zip(&other.words) {
            to.fetch_or(from.load(Ordering::Acquire), Ordering::AcqRel);
        }
    }

    /// Becomes what `other` is, word by word; `other` is as long.
    pub fn copy_from(&self, other: &AtomicBits) {
        assert_eq!(self.len, other.len, "bits of unlike lengths");
        for (to, from) in self.words.iter().zip(&other.words) {
            to.store(from.load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// As words, bit 0 the lowest of the first.
    #[must_use]
    pub fn to_words(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// Becomes what `words` say: what they lack is clear, what they have beyond the length is dropped.
    pub fn set_words(&self, words: &[u64]) {
        for (index, word) in self.words.iter().enumerate() {
            word.store(words.get(index).copied().unwrap_or(0) & self.valid(index), Ordering::Release);
        }
    }
}

impl fmt::Debug for AtomicBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bits", self.count(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::AtomicBits;
    use crate::raid::tests::Random;

    #[test]
    fn random_operations_agree_with_a_vector_of_bools() {
        let mut random = Random(7);
        for len in [0_u32, 1, 63, 64, 65, 128, 200] {
            let (bits, other) = (AtomicBits::new(len), AtomicBits::new(len));
            let mut model = vec![false; len as usize];
            let mut model_other = model.clone();
            assert_eq!((bits.len(), bits.is_empty()), (len, len == 0));
            for _ in 0..2000 {
                let bit = random.below(len.max(1));
                let place = bit as usize;
                match random.below(if len == 0 { 6 } else { 12 }) {
                    0 => {
                        bits.or_from(&other);
                        model.iter_mut().zip(&model_other).for_each(|(to, from)| *to |= from);
                    }
                    1 => {
                        bits.copy_from(&other);
                        model.clone_from(&model_other);
                    }
                    2 if random.below(8) == 0 => {
                        bits.set_all();
                        model.fill(true);
                    }
                    3 => {
                        bits.clear_all();
                        model.fill(false);
                    }
                    4 => {
                        let mut words = bits.to_words();
                        bits.clear_all();
                        for beyond in len..len.next_multiple_of(64) {
                            words[(beyond / 64) as usize] |= 1 << (beyond % 64);
                        }
                        words.push(u64::MAX);
                        bits.set_words(&words);
                    }
                    5 | 2 => {}
                    6 => {
                        bits.clear(bit);
                        model[place] = false;
                    }
                    7 => assert_eq!(bits.take(bit), std::mem::take(&mut model[place])),
                    8 => {
                        bits.mark(bit);
                        model[place] = true;
                    }
                    9 => {
                        other.set(bit);
                        model_other[place] = true;
                    }
                    10 => {
                        other.clear(bit);
                        model_other[place] = false;
                    }
                    _ => {
                        bits.set(bit);
                        model[place] = true;
                    }
                }
                let set: Vec<u32> = (0..len).filter(|bit| model[*bit as usize]).collect();
                assert_eq!(bits.iter_set().collect::<Vec<_>>(), set);
                assert_eq!(bits.count() as usize, set.len());
                assert_eq!(bits.any(), !set.is_empty());
                assert!((0..len).all(|bit| bits.get(bit) == model[bit as usize]));
            }
        }
    }

    #[test]
    fn marks_of_many_threads_and_takes_of_one_lose_nothing() {
        const ROUNDS: u32 = 20_000;
        let bits = AtomicBits::new(8);
        let taken = std::thread::scope(|scope| {
            let markers: Vec<_> = (0..4_u32)
                .map(|thread| {
                    let bits = &bits;
                    scope.spawn(move || {
                        // Each thread marks its own bit again once it was taken: marks and takes must be as many.
                        for round in 0..ROUNDS {
                            while round > 0 && bits.get(thread) {
                                std::thread::yield_now();
                            }
                            bits.mark(thread);
                        }
                    })
                })
                .collect();
            let mut taken = 0;
            while !markers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                taken += (0..4).filter(|bit| bits.take(*bit)).count();
                std::thread::yield_now();
            }
            taken + (0..4).filter(|bit| bits.take(*bit)).count()
        });
        assert_eq!(taken, 4 * ROUNDS as usize);
    }

    #[test]
    #[should_panic(expected = "bit 65 of 65")]
    fn a_bit_beyond_the_length_is_our_bug() {
        let _ = AtomicBits::new(65).get(65);
    }
}
