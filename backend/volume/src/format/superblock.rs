//! The superblock: what pool a device belongs to, who else does, and who has all the data.
//!
//! ```text
//!      0 magic 8 │ version 4 │ CRC 4 │ pool 16 │ this 16 │ opened_by 16
//!     64 generation 8 │ epoch 8 │ extent_bytes 8 │ region_bytes 8 │ log_bytes 8
//!    104 level 4 │ block_bytes 4 │ strip_bytes 4 │ unit_bytes 4 │ intent_pages 4 │ metadata_pages 4
//!    128 sets 2 │ members 2 │ spares 2 │ name's length 2 │ flags 4: 1 opened │ parity_log_pages 4
//!    144 name 64
//!    208 8 sets of 8:      members 2 │ reserved 2 │ regions 4
//!    272 8 spares of 16:   UUID
//!    400 64 members of 32: UUID 16 │ data_bytes 8 │ flags 4: 1 in sync │ reserved 4
//!   2448 replacement: UUID 16 │ copied_bytes 8 │ member 2 │ reserved 6; all zero: none
//!   2480 scrub: flags 4: 1 under way, 2 repair │ volume 4 │ index 4 │ reserved 4 │ done 8 │ mismatches 8 │ failures 8; all zero: none
//!   2520 data faults 8 │ parity faults 8 │ 2536 reserved, to 4096
//! ```
//!
//! All copies of one generation differ in `this` only.

use super::bytes::{
    fill_page, is_sealed, name_of, put_header, put_u16, put_u32, put_u64, seal, take, take_header,
    take_reserved, take_u16, take_u32, take_u64, take_uuid, wrong,
};
use super::{FormatError, INTENTS_PER_PAGE, Layout, PAGE_BYTES, Uuid, is_name};
use crate::raid::Level;

pub use super::NAME_BYTES_MAX;

/// The most members of a pool, all sets together.
pub const MEMBERS_MAX: usize = 64;
/// The most spares.
pub const SPARES_MAX: usize = 8;
/// The most sets.
pub const SETS_MAX: usize = 8;
/// The most members of one set.
pub const SET_MEMBERS_MAX: u16 = 32;
/// The largest extent: 64 MiB, rounded up to whole stripes. A stripe of 31 data strips of 64 KiB is 1.9 MiB.
pub const EXTENT_BYTES_MAX: u64 = 66 << 20;
/// The most units of an extent: the bits of a record.
pub const UNITS_MAX: u64 = 256;
/// No member counts for more: 64 PiB, so that no sum over members overflows.
pub const MEMBER_BYTES_MAX: u64 = 1 << 56;
/// No log is longer: 1 TiB, so that no offset overflows.
pub const LOG_BYTES_MAX: u64 = 1 << 40;
/// No parity log is longer: 256 MiB, which an opening reads.
pub const PARITY_LOG_PAGES_MAX: u32 = 1 << 16;

const MAGIC: &[u8; 8] = b"HAWSERSB";
/// Behind the members: 400 + 64 × 32.
const REPLACEMENT_AT: usize = 2448;
/// Behind the replacement.
const SCRUB_AT: usize = 2480;
const OPENED: u32 = 1;
const IN_SYNC: u32 = 1;
const SCRUBBING: u32 = 1;
const REPAIRING: u32 = 2;

/// A member, as the superblock has it. Its place in the list is its place in the array.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberRecord {
    /// Its UUID.
    pub uuid: Uuid,
    /// It has all the data.
    pub in_sync: bool,
    /// What of it can be used for data.
    pub data_bytes: u64,
}

/// A device that is to take a member's place, and is given what that has while it stays in service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replacement {
    /// Its UUID, now and when it is the member.
    pub uuid: Uuid,
    /// So many bytes of the member's data area are on it, in regions that are not marked.
    pub copied_bytes: u64,
    /// The member's place in the list.
    pub member: u16,
}

/// A comparison of the members that has begun and not ended: where the next process goes on with it, and what it has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubRecord {
    /// What differs is rewritten.
    pub repair: bool,
    /// The volume that it is at. All of those with lower numbers is compared.
    pub volume: u32,
    /// The first index of that volume that is not.
    pub index: u32,
    /// Mapped indices that are, of all volumes.
    pub done: u64,
    /// Units of them that differed.
    pub mismatches: u64,
    /// Of those, how many are known to be of data, and of parity.
    pub data_faults: u64,
    /// See there.
    pub parity_faults: u64,
    /// Units of them that could not be compared, or not be rewritten.
    pub failures: u64,
}

/// A set of members: an array of the pool's level. Sets follow each other in the list of members, and in the pool's extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetRecord {
    /// How many members it has.
    pub members: u16,
    /// How many intent bits it has; those of set 0 come first.
    pub regions: u32,
}

/// What every member and spare says of the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The pool.
    pub pool_uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its RAID level, that of each set.
    pub level: Level,
    /// The logical block of all members.
    pub block_bytes: u32,
    /// What of one member follows on what of another.
    pub strip_bytes: u32,
    /// The unit of allocation.
    pub extent_bytes: u64,
    /// What one bit of an extent's validity covers.
    pub unit_bytes: u32,
    /// What one intent bit covers of each member.
    pub region_bytes: u64,
    /// Where things stand.
    pub layout: Layout,
    /// Raised by each change of a superblock; the highest knows best.
    pub generation: u64,
    /// Raised by each opening for writing.
    pub epoch: u64,
    /// The host that has it open, or had when it ended without closing it.
    pub opened_by: Option<Uuid>,
    /// The sets.
    pub sets: Vec<SetRecord>,
    /// The members.
    pub members: Vec<MemberRecord>,
    /// Those that wait to replace a member.
    pub spares: Vec<Uuid>,
    /// The one that is just replacing a member.
    pub replacement: Option<Replacement>,
    /// The scrub that is under way.
    pub scrub: Option<ScrubRecord>,
    /// The member, spare or replacement that this copy stands on.
    pub this: Uuid,
}

impl Superblock {
    /// How often the pool was opened for writing: the upper half of the epoch.
    #[must_use]
    pub fn openings(&self) -> u64 {
        self.epoch >> 32
    }

    /// The page. What [`validate`](Superblock::validate) refuses may not come here.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(
            self.sets.len() <= SETS_MAX
                && self.members.len() <= MEMBERS_MAX
                && self.spares.len() <= SPARES_MAX,
            "a superblock with {} members that was not checked",
            self.members.len()
        );
        assert!(is_name(&self.name), "the name `{}` was not checked", self.name);
        let count = |len: usize| u16::try_from(len).expect("at most 64");
        let mut out = Vec::with_capacity(PAGE_BYTES);
        put_header(&mut out, MAGIC);
        out.extend_from_slice(&self.pool_uuid);
        out.extend_from_slice(&self.this);
        out.extend_from_slice(&self.opened_by.unwrap_or_default());
        let Layout { intent_pages, log_bytes, metadata_pages, parity_log_pages } = self.layout;
        for long in [self.generation, self.epoch, self.extent_bytes, self.region_bytes, log_bytes] {
            put_u64(&mut out, long);
        }
        let level = level_number(self.level);
        for word in [level, self.block_bytes, self.strip_bytes, self.unit_bytes, intent_pages, metadata_pages]
        {
            put_u32(&mut out, word);
        }
        for len in [self.sets.len(), self.members.len(), self.spares.len(), self.name.len()] {
            put_u16(&mut out, count(len));
        }
        put_u32(&mut out, if self.opened_by.is_some() { OPENED } else { 0 });
        put_u32(&mut out, parity_log_pages);
        out.extend_from_slice(self.name.as_bytes());
        out.resize(208, 0);
        for set in &self.sets {
            put_u16(&mut out, set.members);
            put_u16(&mut out, 0);
            put_u32(&mut out, set.regions);
        }
        out.resize(272, 0);
        self.spares.iter().for_each(|spare| out.extend_from_slice(spare));
        out.resize(400, 0);
        for member in &self.members {
            out.extend_from_slice(&member.uuid);
            put_u64(&mut out, member.data_bytes);
            put_u32(&mut out, if member.in_sync { IN_SYNC } else { 0 });
            put_u32(&mut out, 0);
        }
        out.resize(REPLACEMENT_AT, 0);
        if let Some(replacement) = self.replacement {
            out.extend_from_slice(&replacement.uuid);
            put_u64(&mut out, replacement.copied_bytes);
            put_u16(&mut out, replacement.member);
        }
        out.resize(SCRUB_AT, 0);
        if let Some(scrub) = self.scrub {
            let repairing = if scrub.repair { REPAIRING } else { 0 };
            for word in [SCRUBBING | repairing, scrub.volume, scrub.index, 0] {
                put_u32(&mut out, word);
            }
            for long in [scrub.done, scrub.mismatches, scrub.failures, scrub.data_faults, scrub.parity_faults]
            {
                put_u64(&mut out, long);
            }
        }
        fill_page(&mut out);
        seal(&mut out);
        out
    }

    /// The superblock in a page; `None` when there is none.
    ///
    /// # Errors
    /// There is one, and it is torn, of another version, or says what cannot be.
    pub fn decode(bytes: &[u8]) -> Result<Option<Superblock>, FormatError> {
        let page = bytes.get(..PAGE_BYTES).ok_or_else(|| wrong!("a superblock of {} bytes", bytes.len()))?;
        if page[..8] != *MAGIC {
            return Ok(None);
        }
        // The version before the CRC: another version may have it elsewhere.
        let version = u32::from_le_bytes([page[8], page[9], page[10], page[11]]);
        if version == super::bytes::VERSION && !is_sealed(page) {
            return Err(wrong!("the superblock is torn: its CRC is wrong"));
        }
        let superblock = parse(page).map_err(|error| wrong!("the superblock: {error}"))?;
        superblock.validate().map_err(|error| wrong!("the superblock: {error}"))?;
        if superblock.encode() != page {
            return Err(wrong!("the superblock: a reserved field is not zero"));
        }
        Ok(Some(superblock))
    }

    /// Its place among the members; `None`: a spare.
    #[must_use]
    pub fn place(&self) -> Option<u16> {
        let place = self.members.iter().position(|member| member.uuid == self.this)?;
        u16::try_from(place).ok()
    }

    /// How many members have metadata: the first ones of set 0.
    #[must_use]
    pub fn metadata_members(&self) -> u16 {
        metadata_members(self.level, self.sets.first().map_or(0, |set| set.members))
    }

    /// Whether all that it says goes together.
    ///
    /// # Errors
    /// What does not, in one line.
    pub fn validate(&self) -> Result<(), FormatError> {
        if !is_name(&self.name) {
            return Err(wrong!("the pool's name `{}` is none", self.name.escape_default()));
        }
        self.validate_sizes()?;
        self.validate_layout()?;
        self.validate_members()?;
        self.validate_sets()
    }

    fn validate_sizes(&self) -> Result<(), FormatError> {
        let (block, strip, unit) = (self.block_bytes, self.strip_bytes, self.unit_bytes);
        if !block.is_power_of_two() || !(512..=4096).contains(&block) {
            return Err(wrong!("block_bytes {block} is not a power of two from 512 to 4096"));
        }
        if !strip.is_power_of_two() || !(4 << 10..=1 << 20).contains(&strip) {
            return Err(wrong!("strip_bytes {strip} is not a power of two from 4096 to 1048576"));
        }
        let extent = self.extent_bytes;
        if extent == 0 || extent > EXTENT_BYTES_MAX {
            return Err(wrong!("extent_bytes {extent} is not from 1 to {EXTENT_BYTES_MAX}"));
        }
        let is_unit = unit.is_power_of_two() && unit >= 4096 && u64::from(unit) <= extent;
        if !is_unit || extent.div_ceil(u64::from(unit)) > UNITS_MAX {
            return Err(wrong!("unit_bytes {unit} does not go with extent_bytes {extent}"));
        }
        let region = self.region_bytes;
        if !region.is_power_of_two() || region < (64 << 10).max(u64::from(strip)) || region > MEMBER_BYTES_MAX
        {
            return Err(wrong!("region_bytes {region} is no power of two, or less than 65536 or a strip"));
        }
        Ok(())
    }

    fn validate_layout(&self) -> Result<(), FormatError> {
        let Layout { log_bytes, metadata_pages, parity_log_pages, .. } = self.layout;
        if log_bytes == 0 || !log_bytes.is_multiple_of(PAGE_BYTES as u64) || log_bytes > LOG_BYTES_MAX {
            return Err(wrong!("log_bytes {log_bytes} is not whole pages, or more than {LOG_BYTES_MAX}"));
        }
        if !(3..super::NONE).contains(&metadata_pages) {
            return Err(wrong!("metadata_pages {metadata_pages} has no room for two roots and more"));
        }
        let members = self.sets.iter().map(|set| set.members).max().unwrap_or(0);
        let least = parity_log_pages_min(self.level, members, self.strip_bytes);
        let most = if least == 0 { 0 } else { PARITY_LOG_PAGES_MAX };
        if !(least..=most).contains(&parity_log_pages) {
            return Err(wrong!("parity_log_pages {parity_log_pages} is not from {least} to {most}"));
        }
        Ok(())
    }

    fn validate_members(&self) -> Result<(), FormatError> {
        let (members, spares) = (self.members.len(), self.spares.len());
        if members > MEMBERS_MAX || spares > SPARES_MAX {
            return Err(wrong!(
                "{members} members and {spares} spares, more than {MEMBERS_MAX} and {SPARES_MAX}"
            ));
        }
        for (place, member) in self.members.iter().enumerate() {
            let bytes = member.data_bytes;
            if bytes == 0 || bytes > MEMBER_BYTES_MAX || !bytes.is_multiple_of(u64::from(self.block_bytes)) {
                return Err(wrong!("member {place} has {bytes} bytes for data"));
            }
        }
        if let Some(Replacement { copied_bytes, member, .. }) = self.replacement {
            let Some(replaced) = self.members.get(usize::from(member)) else {
                return Err(wrong!("member {member} is being replaced, and there are {members}"));
            };
            if copied_bytes > replaced.data_bytes {
                return Err(wrong!("{copied_bytes} bytes of member {member} are copied, which has fewer"));
            }
        }
        let mut uuids: Vec<&Uuid> =
            self.members.iter().map(|member| &member.uuid).chain(&self.spares).collect();
        uuids.extend(self.replacement.as_ref().map(|replacement| &replacement.uuid));
        if !uuids.contains(&&self.this) {
            return Err(wrong!("the device is neither among the members nor among the spares"));
        }
        uuids.sort_unstable();
        if uuids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(wrong!("two members, spares or replacements have the same UUID"));
        }
        Ok(())
    }

    fn validate_sets(&self) -> Result<(), FormatError> {
        if !(1..=SETS_MAX).contains(&self.sets.len()) {
            return Err(wrong!("{} sets, and not 1 to {SETS_MAX}", self.sets.len()));
        }
        let sum: usize = self.sets.iter().map(|set| usize::from(set.members)).sum();
        if sum != self.members.len() {
            return Err(wrong!("the sets have {sum} members, the list has {}", self.members.len()));
        }
        let is_redundant = redundancy(self.level, 2) > 0;
        if self.scrub.is_some() && !is_redundant {
            return Err(wrong!("a scrub is under way, and the level has nothing to compare"));
        }
        let mut members = self.members.as_slice();
        for (index, set) in self.sets.iter().enumerate() {
            let (least, most) = member_counts(self.level);
            if !(least..=most).contains(&set.members) {
                return Err(wrong!("set {index} has {} members, and not {least} to {most}", set.members));
            }
            let stripe = u64::from(stripe_strips(self.level, set.members)) * u64::from(self.strip_bytes);
            if !self.extent_bytes.is_multiple_of(stripe) {
                return Err(wrong!(
                    "extent_bytes {} is not whole stripes of {stripe} in set {index}",
                    self.extent_bytes
                ));
            }
            let (these, others) = members.split_at(usize::from(set.members));
            members = others;
            // The last region begins inside of each member.
            let last = u64::from(set.regions).checked_sub(1).map(|last| last.checked_mul(self.region_bytes));
            let is_inside = |last: Option<u64>| {
                last.is_some_and(|last| these.iter().all(|member| last < member.data_bytes))
            };
            if is_redundant && !last.is_some_and(is_inside) {
                return Err(wrong!(
                    "set {index} has {} regions, and they do not go with its members",
                    set.regions
                ));
            }
        }
        let regions: u64 = self.sets.iter().map(|set| u64::from(set.regions)).sum();
        let bits = u64::from(self.layout.intent_pages) * u64::from(INTENTS_PER_PAGE);
        if is_redundant && regions > bits {
            return Err(wrong!("{regions} regions, and intent pages for {bits}"));
        }
        Ok(())
    }
}

/// The fields of a page, unchecked but for what has no value at all.
fn parse(page: &[u8]) -> Result<Superblock, FormatError> {
    let (mut fixed, mut b) = page.split_at(208);
    let f = &mut fixed;
    take_header(f, MAGIC)?;
    let (pool_uuid, this, opened_by) = (take_uuid(f)?, take_uuid(f)?, take_uuid(f)?);
    let (generation, epoch, extent_bytes) = (take_u64(f)?, take_u64(f)?, take_u64(f)?);
    let (region_bytes, log_bytes) = (take_u64(f)?, take_u64(f)?);
    let level = take_u32(f)?;
    let level = level_of(level).ok_or_else(|| wrong!("a level of number {level}"))?;
    let (block_bytes, strip_bytes, unit_bytes) = (take_u32(f)?, take_u32(f)?, take_u32(f)?);
    let (intent_pages, metadata_pages) = (take_u32(f)?, take_u32(f)?);
    let mut counted = |most: usize, what: &str| match usize::from(take_u16(f)?) {
        count if count > most => Err(wrong!("{count} {what}, more than {most}")),
        count => Ok(count),
    };
    let (sets_len, members_len) = (counted(SETS_MAX, "sets")?, counted(MEMBERS_MAX, "members")?);
    let (spares_len, name_len) = (counted(SPARES_MAX, "spares")?, counted(NAME_BYTES_MAX, "bytes of name")?);
    let flags = take_u32(f)?;
    let layout = Layout { intent_pages, log_bytes, metadata_pages, parity_log_pages: take_u32(f)? };
    let name = name_of(&take::<NAME_BYTES_MAX>(f)?[..name_len])?;

    let mut sets = Vec::with_capacity(SETS_MAX);
    for _ in 0..SETS_MAX {
        let members = take_u16(&mut b)?;
        take_reserved(&mut b, 2)?;
        sets.push(SetRecord { members, regions: take_u32(&mut b)? });
    }
    sets.truncate(sets_len);
    let mut spares = Vec::with_capacity(SPARES_MAX);
    for _ in 0..SPARES_MAX {
        spares.push(take_uuid(&mut b)?);
    }
    spares.truncate(spares_len);
    let mut members = Vec::with_capacity(MEMBERS_MAX);
    for _ in 0..MEMBERS_MAX {
        let (uuid, data_bytes, flags) = (take_uuid(&mut b)?, take_u64(&mut b)?, take_u32(&mut b)?);
        take_reserved(&mut b, 4)?;
        members.push(MemberRecord { uuid, in_sync: flags & IN_SYNC != 0, data_bytes });
    }
    members.truncate(members_len);
    let (uuid, copied_bytes, member) = (take_uuid(&mut b)?, take_u64(&mut b)?, take_u16(&mut b)?);
    let replacement = (uuid != [0; 16]).then_some(Replacement { uuid, copied_bytes, member });
    take_reserved(&mut b, 6)?;
    let (flags_of_scrub, volume, index) = (take_u32(&mut b)?, take_u32(&mut b)?, take_u32(&mut b)?);
    take_reserved(&mut b, 4)?;
    let (done, mismatches, failures) = (take_u64(&mut b)?, take_u64(&mut b)?, take_u64(&mut b)?);
    let (data_faults, parity_faults) = (take_u64(&mut b)?, take_u64(&mut b)?);
    let repair = flags_of_scrub & REPAIRING != 0;
    let scrub = (flags_of_scrub & SCRUBBING != 0).then_some(ScrubRecord {
        repair,
        volume,
        index,
        done,
        mismatches,
        data_faults,
        parity_faults,
        failures,
    });
    Ok(Superblock {
        pool_uuid,
        name,
        level,
        block_bytes,
        strip_bytes,
        extent_bytes,
        unit_bytes,
        region_bytes,
        layout,
        generation,
        epoch,
        opened_by: (flags & OPENED != 0).then_some(opened_by),
        sets,
        members,
        spares,
        replacement,
        scrub,
        this,
    })
}

/// What one bit of an extent's validity covers: the smallest power of two from 4096 on that makes at most 256 bits.
#[must_use]
pub fn unit_bytes_for(extent_bytes: u64) -> u32 {
    let least = extent_bytes.div_ceil(UNITS_MAX).clamp(4096, 1 << 31);
    u32::try_from(least.next_power_of_two()).expect("at most 2^31")
}

/// The fewest pages that a parity log of sets of so many members can have: the headers, and two entries of the longest kind.
#[must_use]
pub fn parity_log_pages_min(level: Level, members: u16, strip_bytes: u32) -> u32 {
    match level {
        Level::Raid5 | Level::Raid6 => {
            let payload = u32::from(members) * strip_bytes.min(super::parity_log::ENTRY_LEN_MAX);
            super::parity_log::HEADER_PAGES + 2 * (1 + payload.div_ceil(4096))
        }
        _ => 0,
    }
}

/// How many members have metadata: the first ones of set 0, one more than may be lost of it.
#[must_use]
pub fn metadata_members(level: Level, members_of_set_0: u16) -> u16 {
    redundancy(level, members_of_set_0).saturating_add(1).min(members_of_set_0)
}

/// How many members of a set may be lost, whichever they are.
fn redundancy(level: Level, members: u16) -> u16 {
    match level {
        Level::Linear | Level::Raid0 => 0,
        Level::Raid1 => members.saturating_sub(1),
        Level::Raid10 | Level::Raid5 => 1,
        Level::Raid6 => 2,
    }
}

/// The least and the most members of a set.
fn member_counts(level: Level) -> (u16, u16) {
    match level {
        Level::Linear => (1, SET_MEMBERS_MAX),
        Level::Raid0 | Level::Raid10 => (2, SET_MEMBERS_MAX),
        Level::Raid1 => (2, 4),
        Level::Raid5 => (3, SET_MEMBERS_MAX),
        Level::Raid6 => (4, SET_MEMBERS_MAX),
    }
}

/// The strips of data in what an extent is a multiple of. A row of near-2 over an odd number of members ends with half of a pair,
/// so that one strip is all that it can be.
fn stripe_strips(level: Level, members: u16) -> u16 {
    match level {
        Level::Linear | Level::Raid1 => 1,
        Level::Raid0 => members,
        Level::Raid10 if members.is_multiple_of(2) => members / 2,
        Level::Raid10 => 1,
        Level::Raid5 => members - 1,
        Level::Raid6 => members - 2,
    }
}

fn level_number(level: Level) -> u32 {
    match level {
        Level::Linear => 0,
        Level::Raid0 => 1,
        Level::Raid1 => 2,
        Level::Raid10 => 3,
        Level::Raid5 => 4,
        Level::Raid6 => 5,
    }
}

fn level_of(number: u32) -> Option<Level> {
    [Level::Linear, Level::Raid0, Level::Raid1, Level::Raid10, Level::Raid5, Level::Raid6]
        .into_iter()
        .find(|&level| level_number(level) == number)
}
