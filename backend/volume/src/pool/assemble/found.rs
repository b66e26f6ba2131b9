//! Who is a member, and who has the data: what the superblocks say, put together.

use super::{array_of, leaves_of, read_superblock, wrong};
use crate::format::{Superblock, Uuid};
use crate::pool::PoolError;
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::owner::survives;
use crate::raid::{Array, Mode};
use hawser_block::Device;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// The members that are there, and what they say.
pub(super) struct Found {
    pub(super) book: Superblock,
    pub(super) array: Array,
    /// By the member's number: its device, and what it says.
    pub(super) members: Vec<Option<(Leaf, Superblock)>>,
    pub(super) spares: Vec<(Uuid, Option<Leaf>)>,
    /// The one that is just replacing a member.
    pub(super) replacement: Option<Leaf>,
    /// Members that cannot be used as they are, and why: as if they were missing.
    pub(super) unfit: BTreeMap<usize, String>,
}

impl Found {
    /// Finds out who has the data. Marks them in sync in the array.
    pub(super) async fn read(lanes: &Rc<Lanes>, devices: Vec<Arc<dyn Device>>) -> Result<Found, PoolError> {
        let mut labels: Vec<(Leaf, Superblock)> = Vec::new();
        for leaf in leaves_of(devices)? {
            match read_superblock(lanes, &leaf).await {
                Ok(Some(label)) => labels.push((leaf, label)),
                Ok(None) => return Err(PoolError::Unknown(format!("{} belongs to no pool", leaf.name()))),
                Err(error) => return Err(error),
            }
        }
        check_no_rivals(&labels)?;
        let knows_best = |(_, label): &&(Leaf, Superblock)| {
            (label.generation, label.epoch, label.members.iter().filter(|member| !member.in_sync).count())
        };
        let Some((best_leaf, book)) = labels.iter().max_by_key(knows_best).cloned() else {
            return Err(wrong("no device is given".to_owned()));
        };
        let array = array_of(&book)?;
        let mut members: Vec<Option<(Leaf, Superblock)>> = vec![None; book.members.len()];
        let mut spares: Vec<(Uuid, Option<Leaf>)> = book.spares.iter().map(|uuid| (*uuid, None)).collect();
        let (mut replacement, mut unfit) = (None, BTreeMap::new());
        for (leaf, label) in labels {
            if label.pool_uuid != book.pool_uuid {
                return Err(PoolError::Conflict(format!(
                    "{} belongs to pool {} and {} to pool {}",
                    leaf.name(),
                    label.name,
                    best_leaf.name(),
                    book.name
                )));
            }
            if let Some(spare) = spares.iter_mut().find(|(uuid, _)| *uuid == label.this) {
                spare.1 = Some(leaf);
                continue;
            }
            if book.replacement.is_some_and(|it| it.uuid == label.this) {
                replacement = Some(leaf);
                continue;
            }
            match book.members.iter().position(|member| member.uuid == label.this) {
                None => {
                    log::warn!("{} was a member of pool {} and has been replaced", leaf.name(), book.name)
                }
                Some(number) => {
                    let needed = book.layout.data_offset() + book.members[number].data_bytes;
                    let size = leaf.device.geometry().map_or(0, |geometry| geometry.size_bytes());
                    if size < needed {
                        let what = too_small(&leaf, size, number, needed);
                        log::warn!("pool {}: {what}: it counts as missing", book.name);
                        unfit.insert(number, what);
                        continue;
                    }
                    if let Some((other, _)) = &members[number] {
                        return Err(PoolError::Conflict(format!(
                            "{} and {} both say that they are member {number} of pool {}",
                            other.name(),
                            leaf.name(),
                            book.name
                        )));
                    }
                    members[number] = Some((leaf, label));
                }
            }
        }
        let found = Found { book, array, members, spares, replacement, unfit };
        Ok(found)
    }

    /// Takes a member out of those that are in sync, if the others have all the data.
    pub(super) fn goes_on_without(&self, member: &Uuid) -> bool {
        let number = self.book.members.iter().position(|record| record.uuid == *member);
        let place = number.and_then(|number| self.array.set_of_member(u16::try_from(number).ok()?));
        let Some((set, index)) = place else { return false };
        let set = self.array.set(set);
        let survives = set.level().is_redundant() && survives(set, 1 << index);
        if survives {
            set.set_mode(index, Mode::Away);
        }
        survives
    }

    pub(super) fn is_in_sync(&self, number: usize) -> bool {
        self.book.members[number].in_sync && self.members[number].is_some()
    }

    /// Sets who is in sync; says who should be there and is not.
    pub(super) fn set_modes(&self, degraded: bool) -> Result<(), PoolError> {
        let name = &self.book.name;
        let mut missing = Vec::new();
        for (number, record) in self.book.members.iter().enumerate() {
            let (set, index) = self
                .array
                .set_of_member(u16::try_from(number).unwrap_or(0))
                .expect("every member is in a set");
            match self.is_in_sync(number) {
                true => self.array.set(set).set_mode(index, Mode::InSync),
                false if record.in_sync => missing.push(number),
                false => {}
            }
        }
        for set in self.array.sets() {
            let has_all = (0..set.members())
                .all(|member| set.mode(member) == Mode::InSync || survives(set, 1 << member));
            if !has_all {
                let lacking: Vec<String> = (0..set.members())
                    .filter(|member| set.mode(*member) != Mode::InSync)
                    .map(|member| (set.first_member() + member).to_string())
                    .collect();
                let members = if lacking.len() == 1 { "member" } else { "members" };
                return Err(PoolError::Conflict(format!(
                    "pool {name} lacks data without its {members} {}{}",
                    lacking.join(", "),
                    self.unfit_text()
                )));
            }
        }
        if !missing.is_empty() && !degraded {
            let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
            let what = match missing.as_slice() {
                [one] => format!("member {one} is missing, want it back"),
                [..] => format!("members {} are missing, want them back", missing.join(", ")),
            };
            return Err(PoolError::Conflict(format!(
                "pool {name} is not complete: {what}, or --degraded{}",
                self.unfit_text()
            )));
        }
        Ok(())
    }

    fn unfit_text(&self) -> String {
        self.unfit.values().fold(String::new(), |text, what| text + "; " + what)
    }

    /// Those who have the tables.
    pub(super) fn with_tables(&self) -> Vec<Leaf> {
        let count = usize::from(self.book.metadata_members());
        let numbers = (0..count).filter(|number| self.is_in_sync(*number));
        numbers.filter_map(|number| Some(self.members[number].as_ref()?.0.clone())).collect()
    }
}

/// What is said of a member that was larger.
pub(in crate::pool) fn too_small(leaf: &Leaf, size: u64, number: usize, needed: u64) -> String {
    format!(
        "{} has {size} bytes, and as member {number} it had at least {needed}: want it as large as it was, or another in its place (pool replace)",
        leaf.name()
    )
}

/// Members that each went on without the other: neither knows the other as one that has the data.
fn check_no_rivals(labels: &[(Leaf, Superblock)]) -> Result<(), PoolError> {
    let trusts = |label: &Superblock, other: &Uuid| {
        label.members.iter().any(|member| member.uuid == *other && member.in_sync)
    };
    // Who trusts somebody that knows more and has put him out was not used without him: he is behind.
    let is_behind = |label: &Superblock| {
        let knows = |other: &Superblock| {
            trusts(label, &other.this) || label.replacement.is_some_and(|it| it.uuid == other.this)
        };
        labels.iter().any(|(_, other)| {
            other.generation > label.generation && knows(other) && !trusts(other, &label.this)
        })
    };
    let candidates: Vec<&(Leaf, Superblock)> = labels.iter().filter(|(_, label)| !is_behind(label)).collect();
    for (one, (leaf, label)) in candidates.iter().enumerate() {
        for (other_leaf, other) in &candidates[one + 1..] {
            let are_members = label.place().is_some() && other.place().is_some();
            let is_of_pool = label.pool_uuid == other.pool_uuid;
            let both_have_data = trusts(label, &label.this) && trusts(other, &other.this);
            let both_refuse = !trusts(label, &other.this) && !trusts(other, &label.this);
            // Of one opening the higher generation knows more, and that is all.
            let are_apart = label.epoch != other.epoch;
            if are_members && is_of_pool && are_apart && both_have_data && both_refuse {
                return Err(PoolError::Conflict(format!(
                    "{} and {} were each used without the other, so they differ: pool {} opens with one of them; the other \
                     can be put in as a replacement",
                    leaf.name(),
                    other_leaf.name(),
                    label.name
                )));
            }
        }
    }
    Ok(())
}
