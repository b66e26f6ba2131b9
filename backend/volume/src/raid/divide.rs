//! Division by what stays the same: sizes, and numbers of members.

/// A number of bytes to divide by; most are powers of two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) bytes: u64,
    shift: Option<u32>,
}

impl Size {
    pub(super) fn new(bytes: u64) -> Size {
        Size { bytes, shift: bytes.is_power_of_two().then(|| bytes.trailing_zeros()) }
    }

    /// How often it is in `bytes`, and the rest.
    #[inline]
    pub(super) fn split(self, bytes: u64) -> (u64, u64) {
        match self.shift {
            Some(shift) => (bytes >> shift, bytes & (self.bytes - 1)),
            None => (bytes / self.bytes, bytes % self.bytes),
        }
    }

    #[inline]
    pub(super) fn times(self, count: u64) -> u64 {
        count * self.bytes
    }
}

/// Divides by a number of members without the division, which takes 20 to 40 cycles where a multiplication takes 4.
///
/// With m = ⌈2^64 / d⌉ = (2^64 + e) / d, e < d: ⌊n·m / 2^64⌋ = ⌊n/d + n·e / (d·2^64)⌋, which is ⌊n/d⌋ while n·e < 2^64.
/// As e < 32, all n < 2^59 are right; positions are fewer than `SET_BYTES_MAX`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Divisor {
    inverse: u64,
    divisor: u64,
}

impl Divisor {
    pub(super) fn new(divisor: u16) -> Divisor {
        let divisor = u64::from(divisor);
        // 2^64 / 1 has no room; only linear has sets of one member, and does not divide by it.
        Divisor { inverse: (u64::MAX / divisor).wrapping_add(1), divisor }
    }

    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "a quotient of a u64; a rest below MEMBERS_MAX")]
    pub(super) fn divide(self, number: u64) -> (u64, u16) {
        let quotient = ((u128::from(number) * u128::from(self.inverse)) >> 64) as u64;
        (quotient, (number - quotient * self.divisor) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raid::tests::Random;
    use crate::raid::{MEMBERS_MAX, SET_BYTES_MAX};

    #[test]
    fn inverse_agrees_with_division_up_to_the_largest_position() {
        let mut random = Random(3);
        for members in 2..=MEMBERS_MAX {
            let (divisor, by) = (u64::from(members), Divisor::new(members));
            let mut check = |number: u64| {
                let number = number.min(SET_BYTES_MAX);
                let (quotient, rest) = by.divide(number);
                assert_eq!(
                    (quotient, u64::from(rest)),
                    (number / divisor, number % divisor),
                    "{number} / {divisor}"
                );
            };
            (0..1000).for_each(&mut check);
            for _ in 0..10_000 {
                let number = random.next() >> (6 + random.below(50));
                // The multiples, and what is just below them, are where a quotient can be wrong.
                let multiple = number / divisor * divisor;
                let largest = SET_BYTES_MAX - number % 1000;
                [number, multiple, multiple.saturating_sub(1), largest].into_iter().for_each(&mut check);
            }
        }
    }
}
