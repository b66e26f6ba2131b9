//! Which strips of a stripe do not go with the others, and where.
//!
//! Owns: the judgement, of bytes that were read. Must not know: what is done about it.
//!
//! A device that is wrong is so by blocks, and two devices need not be wrong in the same ones: each block is judged by itself. Not each byte: of two strips
//! that are wrong in one byte, one time in a few the sums fit a third.

use crate::pool::stripes::Slots;
use std::ops::Range;

/// What does not go with the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A strip of data.
    Data,
    /// One of two parities.
    Parity,
    /// With one parity nobody can tell, nor where more than one strip is wrong.
    Unknown,
}

/// Blocks beside each other in which the same does not go with the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Differing {
    /// Which bytes of each strip.
    pub(super) columns: Range<usize>,
    /// Who is wrong: the parities where that cannot be told.
    pub(super) slots: Slots,
    pub(super) fault: Fault,
}

/// What differs in these strips, which are all of a stripe's, or the same part of each: data in order, then the parities.
pub(super) fn differing(strips: &[&[u8]], parities: usize, block_bytes: usize) -> Vec<Differing> {
    let (data, sums) = strips.split_at(strips.len() - parities);
    let len = data[0].len();
    let (mut sum, mut weighted) = (vec![0; len], vec![0; len]);
    match sums {
        [p] => {
            crate::parity::xor(data, &mut sum);
            crate::parity::xor_into(p, &mut sum);
        }
        [p, q] => {
            crate::parity::pq(data, &mut sum, &mut weighted);
            crate::parity::xor_into(p, &mut sum);
            crate::parity::xor_into(q, &mut weighted);
        }
        _ => unreachable!("one parity or two"),
    }
    let mut found: Vec<Differing> = Vec::new();
    for start in (0..len).step_by(block_bytes) {
        let columns = start..len.min(start + block_bytes);
        let of_block = fault_of(&sum[columns.clone()], &weighted[columns.clone()], data.len(), parities);
        let Some((slots, fault)) = of_block else { continue };
        match found.last_mut() {
            Some(last) if (last.columns.end, last.slots, last.fault) == (start, slots, fault) => {
                last.columns.end = columns.end;
            }
            _ => found.push(Differing { columns, slots, fault }),
        }
    }
    found
}

/// Who is wrong in a block, given by what its parities are wrong.
fn fault_of(sum: &[u8], weighted: &[u8], data: usize, parities: usize) -> Option<(Slots, Fault)> {
    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    let (p, q) = (1 << data, 1 << (data + 1));
    match (is_zero(sum), is_zero(weighted)) {
        (true, true) => None,
        (false, _) if parities == 1 => Some((p, Fault::Unknown)),
        (false, true) => Some((p, Fault::Parity)),
        (true, false) => Some((q, Fault::Parity)),
        (false, false) => {
            // One strip of data is wrong by `sum` if Q is wrong by its multiple of it.
            let is_it = |slot: &usize| {
                let mut product = weighted.to_vec();
                crate::parity::mul_into(*slot, sum, &mut product);
                is_zero(&product)
            };
            let mut fitting = (0..data).filter(is_it);
            match (fitting.next(), fitting.next()) {
                (Some(slot), None) => Some((1 << slot, Fault::Data)),
                _ => Some((p | q, Fault::Unknown)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Differing, Fault, differing};
    use crate::parity;
    use crate::raid::tests::Random;

    const BLOCK: usize = 512;
    const LEN: usize = 8 * BLOCK;

    fn stripe(random: &mut Random, data: usize, parities: usize) -> Vec<Vec<u8>> {
        let byte = |random: &mut Random| u8::try_from(random.below(256)).unwrap();
        let mut strips: Vec<Vec<u8>> = (0..data).map(|_| (0..LEN).map(|_| byte(random)).collect()).collect();
        let (mut p, mut q) = (vec![0; LEN], vec![0; LEN]);
        let all: Vec<&[u8]> = strips.iter().map(Vec::as_slice).collect();
        parity::pq(&all, &mut p, &mut q);
        strips.extend([p, q].into_iter().take(parities));
        strips
    }

    fn found(strips: &[Vec<u8>], parities: usize) -> Vec<Differing> {
        let strips: Vec<&[u8]> = strips.iter().map(Vec::as_slice).collect();
        differing(&strips, parities, BLOCK)
    }

    /// All of the bytes were judged together: two strips that are wrong in blocks of their own were taken for nobody knows what, and the parities made
    /// again of wrong data, though each of the two was known.
    #[test]
    fn strips_that_are_wrong_in_blocks_of_their_own_are_told_apart() {
        let mut random = Random(3);
        for data in 2..=6 {
            let good = stripe(&mut random, data, 2);
            assert_eq!(found(&good, 2), []);
            for (one, other) in (0..data + 2).flat_map(|one| (0..data + 2).map(move |other| (one, other))) {
                let mut strips = good.clone();
                strips[one][BLOCK + 7] ^= 0x10;
                strips[other][3 * BLOCK..5 * BLOCK].iter_mut().for_each(|byte| *byte ^= 0x80);
                let want = |slot: usize, from: usize, to: usize| Differing {
                    columns: from * BLOCK..to * BLOCK,
                    slots: 1 << slot,
                    fault: if slot < data { Fault::Data } else { Fault::Parity },
                };
                assert_eq!(
                    found(&strips, 2),
                    [want(one, 1, 2), want(other, 3, 5)],
                    "{one} and {other} of {data}"
                );
            }
        }
    }

    #[test]
    fn a_block_that_is_wrong_on_two_is_unknown_and_the_others_are_not() {
        let mut random = Random(4);
        let mut strips = stripe(&mut random, 4, 2);
        strips[1][..2 * BLOCK].iter_mut().for_each(|byte| *byte ^= 3);
        strips[2][BLOCK] ^= 5;
        assert_eq!(
            found(&strips, 2),
            [
                Differing { columns: 0..BLOCK, slots: 1 << 1, fault: Fault::Data },
                Differing { columns: BLOCK..2 * BLOCK, slots: 0b11 << 4, fault: Fault::Unknown },
            ]
        );
    }

    #[test]
    fn one_parity_tells_where_and_not_who() {
        let mut random = Random(5);
        let mut strips = stripe(&mut random, 3, 1);
        assert_eq!(found(&strips, 1), []);
        strips[0][BLOCK] ^= 1;
        strips[3][2 * BLOCK] ^= 1;
        let want = Differing { columns: BLOCK..3 * BLOCK, slots: 1 << 3, fault: Fault::Unknown };
        assert_eq!(found(&strips, 1), [want]);
    }
}
