//! A pool's data space: extents over one or several sets.
//!
//! Invariants: immutable; the sets it names are shared with the arrays that it was grown from.

use super::{Pieces, Set};
use std::sync::Arc;

/// Sets, one after the other.
#[derive(Clone, Debug)]
pub struct Array {
    sets: Vec<Arc<Set>>,
    /// The first extent of each set, and the number of all extents as the last.
    starts: Vec<u32>,
    extent_bytes: u64,
}

impl Array {
    /// An array of `sets`, whose extents are counted in this order.
    ///
    /// # Errors
    /// A line that says why these do not make an array.
    pub fn new(sets: Vec<Arc<Set>>) -> Result<Array, String> {
        let Some(extent_bytes) = sets.first().map(|set| set.extent_bytes()) else {
            return Err("an array has at least one set of members".to_owned());
        };
        let mut starts = Vec::with_capacity(sets.len() + 1);
        let (mut extents, mut members) = (0_u32, 0_u16);
        starts.push(0);
        for (index, set) in sets.iter().enumerate() {
            if set.extent_bytes() != extent_bytes {
                return Err(format!(
                    "set {index} has extents of {} bytes, the array of {extent_bytes}",
                    set.extent_bytes()
                ));
            }
            if set.first_member() < members {
                return Err(format!(
                    "set {index} begins with member {}, which set {} has already: {members} or more would be right",
                    set.first_member(),
                    index - 1
                ));
            }
            members = set.first_member() + set.members();
            // The last number is no extent: it says "none" in the format.
            extents = extents.checked_add(set.extents()).filter(|extents| *extents < u32::MAX).ok_or_else(
                || {
                    format!(
                        "with set {index} the array has more than {} extents: larger ones are needed",
                        u32::MAX - 1
                    )
                },
            )?;
            starts.push(extents);
        }
        Ok(Array { sets, starts, extent_bytes })
    }

    /// How many extents there are.
    #[must_use]
    pub fn extents(&self) -> u32 {
        *self.starts.last().expect("`new` puts the number of extents there")
    }

    /// The bytes of an extent.
    #[must_use]
    pub fn extent_bytes(&self) -> u64 {
        self.extent_bytes
    }

    /// The sets.
    #[must_use]
    pub fn sets(&self) -> &[Arc<Set>] {
        &self.sets
    }

    /// The `index`-th set.
    #[must_use]
    pub fn set(&self, index: usize) -> &Arc<Set> {
        &self.sets[index]
    }

    /// The set that has `extent`, and the extent's address in it.
    #[must_use]
    #[inline]
    pub fn locate(&self, extent: u32) -> (usize, u64) {
        if let [_, extents] = self.starts[..] {
            assert!(extent < extents, "extent {extent} of {extents}");
            return (0, u64::from(extent) * self.extent_bytes);
        }
        assert!(extent < self.extents(), "extent {extent} of {}", self.extents());
        let index = self.starts.partition_point(|start| *start <= extent) - 1;
        (index, u64::from(extent - self.starts[index]) * self.extent_bytes)
    }

    /// The set that has `extent`, and what `len` bytes of the extent are on its members.
    #[must_use]
    #[inline]
    pub fn pieces(&self, extent: u32, offset_in_extent: u64, len: u64) -> (&Set, Pieces<'_>) {
        assert!(
            offset_in_extent <= self.extent_bytes && len <= self.extent_bytes - offset_in_extent,
            "{len} bytes at {offset_in_extent} of an extent"
        );
        let (index, address) = self.locate(extent);
        let set = &*self.sets[index];
        (set, set.pieces(address + offset_in_extent, len))
    }

    /// The set that `member` of the pool's list belongs to, and its place there.
    #[must_use]
    pub fn set_of_member(&self, member: u16) -> Option<(usize, u16)> {
        self.sets.iter().enumerate().find_map(|(index, set)| {
            let place = member.checked_sub(set.first_member())?;
            (place < set.members()).then_some((index, place))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raid::{Level, SetConfig};

    fn set(first_member: u16, members: usize, extents: u64, extent_bytes: u64) -> Arc<Set> {
        let set = Set::new(SetConfig {
            level: Level::Raid1,
            first_member,
            member_bytes: vec![extents * extent_bytes; members],
            strip_bytes: 4096,
            extent_bytes,
            region_bytes: 1 << 20,
            data_offset: 0,
            parity_log: (0, 1024),
        });
        Arc::new(set.expect("good"))
    }

    #[test]
    fn every_extent_is_found_where_counting_finds_it() {
        for extents in [&[5_u64][..], &[1, 1], &[3, 1, 7], &[2, 9, 1, 1, 4]] {
            let sets = (0..).zip(extents).map(|(index, extents)| set(index * 3, 2, *extents, 8192)).collect();
            let array = Array::new(sets).expect("good");
            let mut extent = 0;
            for (index, extents) in extents.iter().enumerate() {
                for place in 0..*extents {
                    assert_eq!(array.locate(extent), (index, place * 8192));
                    let (set, mut pieces) = array.pieces(extent, 4096, 100);
                    assert!(std::ptr::eq(set, &**array.set(index)));
                    let piece = pieces.next().expect("one");
                    assert_eq!((piece.start, piece.len, pieces.next()), (0, 100, None));
                    assert_eq!(piece.copies.as_slice()[0].offset, place * 8192 + 4096);
                    assert_eq!(usize::from(piece.copies.as_slice()[0].member), index * 3);
                    extent += 1;
                }
            }
            assert_eq!(array.extents(), extent);
        }
    }

    #[test]
    fn members_are_found_in_their_sets() {
        let array = Array::new(vec![set(0, 2, 1, 4096), set(3, 3, 1, 4096)]).expect("good");
        let found: Vec<_> = (0..7).map(|member| array.set_of_member(member)).collect();
        let expected = [Some((0, 0)), Some((0, 1)), None, Some((1, 0)), Some((1, 1)), Some((1, 2)), None];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_grown_array_shares_the_state_of_its_old_sets() {
        let old = Array::new(vec![set(0, 2, 4, 4096)]).expect("good");
        let mut sets = old.sets().to_vec();
        sets.push(set(2, 2, 4, 4096));
        let grown = Array::new(sets).expect("good");
        grown.set(0).intents.set(0);
        assert!(old.set(0).intents.get(0));
        assert_eq!((old.extents(), grown.extents()), (4, 8));
    }

    #[test]
    fn sets_that_do_not_go_together_are_refused_by_name() {
        let refused = |sets| Array::new(sets).expect_err("refused");
        assert_eq!(refused(vec![]), "an array has at least one set of members");
        let unlike = refused(vec![set(0, 2, 1, 8192), set(2, 2, 1, 4096)]);
        assert_eq!(unlike, "set 1 has extents of 4096 bytes, the array of 8192");
        let twice = refused(vec![set(0, 2, 1, 4096), set(1, 2, 1, 4096)]);
        assert!(twice.starts_with("set 1 begins with member 1, which set 0 has already"), "{twice}");
        let many = refused(vec![set(0, 2, 1 << 31, 4096), set(2, 2, 1 << 31, 4096)]);
        assert!(many.starts_with("with set 1 the array has more than 4294967294 extents"), "{many}");
    }

    #[test]
    #[should_panic(expected = "extent 5 of 5")]
    fn an_extent_that_is_not_there_is_our_bug() {
        let _ = Array::new(vec![set(0, 2, 5, 4096)]).expect("good").locate(5);
    }
}
