//! [`resolve`] beside a model: strips are placed one after the other, by walking the rows as md's documentation tells it, and each block of a
//! request is looked up by itself.
//!
//! ```text
//!   block ── list of entries ──► extent, or zeroes ── list of sets ──► strip ── list of places ──► members and rows
//! ```
//!
//! Every level, 2 to 32 members, strips of 4 KiB to 1 MiB, one set and two; entries that are full, partial with and without something behind
//! them, shared, and empty; sets that are whole, and sets that lack a member.

use super::*;
use crate::format::{NONE, NewSnapshot, Record, unit_bytes_for};
use crate::pool::bounce::Bounce;
use crate::raid::tests::Random;
use crate::raid::{Array, Level, Mode, SetConfig};
use crate::thin::{Metadata, Thin};
use hawser_block::{BlockCount, Buffers, Lba, Token};
use std::collections::BTreeSet;
use std::sync::Arc;

const SHIFT: u32 = 9;
const BLOCK: u64 = 1 << SHIFT;
const DATA_OFFSET: u64 = 3 << 20;
/// What people ask for; a pool makes whole stripes of it.
const WANTED_EXTENT_BYTES: u64 = 256 << 10;
const EXTENTS: u64 = 10;
const INDICES: u32 = 7;
const REQUESTS: u32 = 12;
/// Blocks of a request that are looked up besides the ends of all steps.
const SAMPLES: u64 = 24;

/// Where something is: the member, by its place in the pool, and its row.
type Place = (u16, u64);

/// A set as the model has it.
struct ModelSet {
    level: Level,
    first: u16,
    /// The places of each strip of data.
    strips: Vec<Vec<Place>>,
    /// The members with P and Q, by row.
    parities: Vec<Vec<u16>>,
    modes: Vec<Mode>,
    extents: u32,
}

/// An entry of the volume.
#[derive(Clone, Default)]
struct ModelEntry {
    extent: Option<u32>,
    fallback: Option<u32>,
    /// By unit; of a full one all are true.
    valid: Vec<bool>,
    is_own: bool,
}

struct Model {
    sets: Vec<ModelSet>,
    entries: Vec<ModelEntry>,
    strip: u64,
    extent_bytes: u64,
    unit: u64,
}

/// What a block is.
#[derive(Debug, PartialEq)]
enum Content {
    Zeroes,
    /// Its set and strip there, and how far in the strip.
    At(usize, usize, u64),
}

/// Strips of data of members with so many rows each, one after the other.
fn place_strips(level: Level, first: u16, rows: &[u64]) -> (Vec<Vec<Place>>, Vec<Vec<u16>>) {
    let members: Vec<u16> = (first..).take(rows.len()).collect();
    let least = *rows.iter().min().expect("members");
    let mut strips: Vec<Vec<Place>> = Vec::new();
    let mut parities = Vec::new();
    match level {
        Level::Linear => {
            for (member, rows) in members.iter().zip(rows) {
                strips.extend((0..*rows).map(|row| vec![(*member, row)]));
            }
        }
        Level::Raid0 => {
            for row in 0..least {
                strips.extend(members.iter().map(|member| vec![(*member, row)]));
            }
        }
        Level::Raid1 => {
            strips.extend((0..least).map(|row| members.iter().map(|member| (*member, row)).collect()));
        }
        Level::Raid10 => {
            // Each strip takes the next two places, wherever a row ends.
            let mut open: Option<Place> = None;
            for place in (0..least).flat_map(|row| members.iter().map(move |member| (*member, row))) {
                match open.take() {
                    Some(before) => strips.push(vec![before, place]),
                    None => open = Some(place),
                }
            }
        }
        Level::Raid5 | Level::Raid6 => {
            // P begins at the last member and goes to the left; what follows it goes round to the right.
            let mut p = members.len() - 1;
            for row in 0..least {
                let mut around = members[p..].iter().chain(&members[..p]).copied();
                parities.push(around.by_ref().take(usize::from(level.parities())).collect());
                strips.extend(around.map(|member| vec![(member, row)]));
                p = p.checked_sub(1).unwrap_or(members.len() - 1);
            }
        }
    }
    (strips, parities)
}

fn below(random: &mut Random, bound: u64) -> u64 {
    random.next() % bound
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

impl ModelSet {
    fn mode(&self, member: u16) -> Mode {
        self.modes[usize::from(member - self.first)]
    }

    fn is_whole(&self) -> bool {
        self.modes.iter().all(|mode| *mode == Mode::InSync)
    }
}

impl Model {
    fn content(&self, byte: u64) -> Content {
        let entry = &self.entries[to_usize(byte / self.extent_bytes)];
        let within = byte % self.extent_bytes;
        let is_valid = entry.extent.is_some() && entry.valid[to_usize(within / self.unit)];
        match if is_valid { entry.extent } else { entry.fallback } {
            None => Content::Zeroes,
            Some(extent) => self.address(extent, within),
        }
    }

    fn address(&self, extent: u32, within: u64) -> Content {
        let (mut set, mut extent) = (0, extent);
        while extent >= self.sets[set].extents {
            extent -= self.sets[set].extents;
            set += 1;
        }
        let address = u64::from(extent) * self.extent_bytes + within;
        Content::At(set, to_usize(address / self.strip), address % self.strip)
    }

    /// Where a block's copies are on the members, that a request of this kind goes to.
    fn copies(&self, byte: u64, is_write: bool) -> Option<BTreeSet<(u16, u64)>> {
        let Content::At(set, strip, beyond) = self.content(byte) else { return None };
        let set = &self.sets[set];
        let takes_part = |member: u16| match set.mode(member) {
            Mode::InSync => true,
            Mode::Syncing => is_write,
            Mode::Away => false,
        };
        let places = set.strips[strip].iter().filter(|(member, _)| takes_part(*member));
        Some(places.map(|(member, row)| (*member, DATA_OFFSET + row * self.strip + beyond)).collect())
    }

    /// What becomes of a write, as far as its extents tell.
    fn write(&self, first: u64, len: u64) -> Resolved {
        let end = first + len;
        for (index, entry) in (0..).zip(&self.entries) {
            let (from, to) = (first.max(index * self.extent_bytes), end.min((index + 1) * self.extent_bytes));
            if from >= to {
                continue;
            }
            let Some(extent) = entry.extent else { return Resolved::Slow(Class::WriteMiss) };
            if !entry.is_own {
                return Resolved::Slow(Class::CopyOnWrite);
            }
            let (from, to) = (from - index * self.extent_bytes, to - index * self.extent_bytes);
            let units = from / self.unit..to.div_ceil(self.unit);
            if units.into_iter().any(|unit| !entry.valid[to_usize(unit)]) {
                return Resolved::Slow(Class::WriteMiss);
            }
            let Content::At(set, ..) = self.address(extent, 0) else { unreachable!("it is an extent") };
            let set = &self.sets[set];
            if set.level.parities() == 0 {
                continue;
            }
            let stripe = self.strip * (set.modes.len() as u64 - u64::from(set.level.parities()));
            if from % stripe != 0 || to % stripe != 0 {
                return Resolved::Slow(Class::PartialStripe);
            }
            if !set.is_whole() {
                return Resolved::Slow(Class::Degraded);
            }
        }
        Resolved::Plan
    }

    /// The same of a read: without redundancy inside a piece there is nobody else to ask.
    fn read(&self, first: u64, len: u64) -> Resolved {
        if self.sets.iter().all(ModelSet::is_whole) {
            return Resolved::Plan;
        }
        // Nothing changes within 4 KiB: not the strip, not the unit.
        let mut blocks = (first / 4096 * 4096..first + len).step_by(4096);
        match blocks.any(|byte| self.copies(byte, false).is_some_and(|copies| copies.is_empty())) {
            true => Resolved::Slow(Class::Degraded),
            false => Resolved::Plan,
        }
    }

    /// Looks at a plan: `first` is where the request begins.
    fn check(&self, plan: &Plan, (first, len): (u64, u64), is_write: bool, random: &mut Random) {
        // Data lies in the payload, parity behind it.
        let (data, parity): (Vec<&Step>, Vec<&Step>) =
            plan.steps.iter().partition(|step| u64::from(step.start) < len);
        for step in &data {
            for at in [0, u64::from(step.len) - BLOCK] {
                let copies = self.copies(first + u64::from(step.start) + at, is_write);
                let found = (step.member, step.offset + at);
                assert!(copies.is_some_and(|copies| copies.contains(&found)), "{step:?} of {first}");
            }
        }
        let sample = |at: u64, random: &mut Random| match len / BLOCK <= SAMPLES {
            true => at * BLOCK,
            false => below(random, len / BLOCK) * BLOCK,
        };
        let samples = (0..SAMPLES.min(len / BLOCK)).map(|at| sample(at, random)).collect::<BTreeSet<u64>>();
        for at in samples {
            let covers = |start: u32, len: u32| (u64::from(start)..u64::from(start + len)).contains(&at);
            let steps = data.iter().filter(|step| covers(step.start, step.len));
            let found: Vec<_> =
                steps.map(|step| (step.member, step.offset + at - u64::from(step.start))).collect();
            let is_zeroed = plan.zeroes.iter().filter(|(start, len)| covers(*start, *len)).count();
            match self.copies(first + at, is_write) {
                None => assert!(found.is_empty() && is_zeroed == 1, "block {} is zeroes", first + at),
                Some(copies) => {
                    assert_eq!(is_zeroed, 0, "block {} is data", first + at);
                    assert_eq!(found.len(), if is_write { copies.len() } else { 1 }, "block {}", first + at);
                    let found: BTreeSet<_> = found.into_iter().collect();
                    assert!(found.is_subset(&copies) && !found.is_empty(), "{found:?} of {copies:?}");
                    assert!(!is_write || found == copies, "{found:?} for {copies:?}");
                }
            }
        }
        let bytes = data.iter().map(|step| u64::from(step.len)).sum::<u64>();
        let zeroes = plan.zeroes.iter().map(|(_, len)| u64::from(*len)).sum::<u64>();
        match is_write {
            false => assert_eq!(bytes + zeroes, len, "each byte once"),
            true => assert!(bytes >= len && zeroes == 0, "each byte"),
        }
        self.check_parity(plan, &parity, (first, len));
    }

    fn check_parity(&self, plan: &Plan, parity: &[&Step], (first, len): (u64, u64)) {
        let mut wanted = BTreeSet::new();
        let (mut at, mut behind) = (0, len);
        for stripe in &plan.stripes {
            let Content::At(number, strip, 0) = self.content(first + at) else { panic!("{stripe:?}") };
            let set = &self.sets[number];
            let (_, row) = set.strips[strip][0];
            let told = (u64::from(stripe.set), stripe.row, u64::from(stripe.start), u64::from(stripe.parity));
            assert_eq!(told, (number as u64, row, at, behind));
            for member in &set.parities[to_usize(row)] {
                wanted.insert((*member, DATA_OFFSET + row * self.strip, behind, self.strip));
                behind += self.strip;
            }
            at += self.strip * (set.modes.len() as u64 - u64::from(set.level.parities()));
        }
        assert!(plan.stripes.is_empty() || at == len, "all stripes");
        assert_eq!(u64::from(plan.parity_bytes), behind - len);
        let found = parity
            .iter()
            .map(|step| (step.member, step.offset, u64::from(step.start), u64::from(step.len)))
            .collect::<BTreeSet<_>>();
        assert_eq!((found.len(), found), (parity.len(), wanted));
    }
}

/// A set with room for some extents, and the same in the model.
fn sets(random: &mut Random, level: Level, count: u16, (first, strip): (u16, u64)) -> (Set, ModelSet, u64) {
    let data = match level {
        Level::Linear | Level::Raid1 => 1,
        Level::Raid10 if count.is_multiple_of(2) => u64::from(count) / 2,
        Level::Raid10 => 1,
        _ => u64::from(count - level.parities()),
    };
    let extent_bytes = WANTED_EXTENT_BYTES.div_ceil(strip * data) * strip * data;
    let strips = EXTENTS * extent_bytes / strip;
    let rows = match level {
        Level::Linear => strips.div_ceil(u64::from(count)),
        Level::Raid10 => (strips * 2).div_ceil(u64::from(count)),
        _ => strips.div_ceil(data),
    };
    // Members are not of one size; all but linear count as the smallest.
    let rows: Vec<u64> = (0..count).map(|_| rows + below(random, 3)).collect();
    let (strips, parities) = place_strips(level, first, &rows);
    let set = Set::new(SetConfig {
        level,
        first_member: first,
        member_bytes: rows.iter().map(|rows| rows * strip + below(random, strip)).collect(),
        strip_bytes: u32::try_from(strip).expect("small"),
        extent_bytes,
        region_bytes: 4 << 20,
        data_offset: DATA_OFFSET,
        parity_log: (0, 1024),
    })
    .expect("good");
    let mut modes = vec![Mode::InSync; usize::from(count)];
    if level.is_redundant() && random.below(3) == 0 {
        let lost = random.below(u32::from(count)) as usize;
        modes[lost] = if random.below(2) == 0 { Mode::Away } else { Mode::Syncing };
    }
    for (member, mode) in (0..).zip(&modes) {
        set.set_mode(member, *mode);
    }
    set.intents.set_all();
    if let Some(parity) = set.parity() {
        parity.set_unlogged(true);
    }
    assert_eq!(u64::from(set.extents()), strips.len() as u64 * strip / extent_bytes);
    let model = ModelSet { level, first, strips, parities, modes, extents: set.extents() };
    (set, model, extent_bytes)
}

/// Units that are valid: runs of them, since guests write so.
fn units(random: &mut Random, thin: Thin) -> Vec<bool> {
    let mut is_valid = random.below(2) == 0;
    let mut run = || {
        is_valid = !is_valid;
        vec![is_valid; 1 + random.below(thin.units()) as usize]
    };
    let mut units = Vec::new();
    while units.len() < thin.units() as usize {
        units.extend(run());
    }
    units.truncate(thin.units() as usize);
    units
}

/// Maps some of a volume, takes a snapshot, and maps some again.
fn map(random: &mut Random, metadata: &mut Metadata, thin: Thin) -> Vec<ModelEntry> {
    let mut entries = vec![ModelEntry::default(); INDICES as usize];
    let mut free: Vec<u32> = (0..thin.extents).collect();
    for birth in [1, 2] {
        for index in 0..INDICES {
            let before = entries[index as usize].clone();
            if random.below(3) == 0 || free.is_empty() {
                continue;
            }
            let valid = match random.below(2) {
                0 => vec![true; thin.units() as usize],
                _ => units(random, thin),
            };
            let is_full = valid.iter().all(|valid| *valid);
            let extent = free.swap_remove(random.below(u32::try_from(free.len()).expect("few")) as usize);
            // What is behind a partial: all of what was there, if that was all of an extent.
            let was_full = before.valid.iter().all(|valid| *valid);
            let fallback = before.extent.filter(|_| was_full && !is_full);
            let mut bits = [0; 4];
            for (unit, _) in valid.iter().enumerate().filter(|(_, valid)| **valid) {
                bits[unit / 64] |= 1 << (unit % 64);
            }
            let record =
                Record::Map { volume: 1, index, birth, extent, fallback: fallback.unwrap_or(NONE), bits };
            metadata.apply(&record).expect("good");
            entries[index as usize] = ModelEntry { extent: Some(extent), fallback, valid, is_own: true };
        }
        if birth == 1 {
            let item = NewSnapshot { origin: 1, id: 2, uuid: [2; 16], name: "s".to_owned() };
            metadata.apply(&Record::Snapshot { items: vec![item] }).expect("good");
            entries.iter_mut().for_each(|entry| entry.is_own = false);
        }
    }
    entries
}

/// Where a request begins and how long it is: anything; some strips; whole stripes, if they are not too long.
fn range(random: &mut Random, model: &Model, size: u64) -> (u64, u64) {
    let most = size.min(u64::from(TRANSFER_BYTES_MAX));
    let set = &model.sets[0];
    let stripe = model.strip * (set.modes.len() as u64 - u64::from(set.level.parities()));
    let (grain, most) = match random.below(4) {
        0 => (BLOCK, most),
        1 => (BLOCK, most.min(3 * model.strip)),
        2 => (4096, most.min(64 << 10)),
        _ if stripe <= most => (stripe, most),
        _ => (BLOCK, most),
    };
    let len = grain * (1 + below(random, most / grain));
    (grain * below(random, (size - len) / grain + 1), len)
}

/// Told when something is wrong with it.
#[derive(Debug)]
#[expect(dead_code, reason = "to be printed")]
struct Case {
    level: Level,
    count: u16,
    members: u16,
    strip: u64,
    first: u64,
    len: u64,
    is_write: bool,
}

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{self:?}");
        }
    }
}

#[derive(Default, Debug)]
struct Seen {
    plans: u64,
    stripes: u64,
    zeroes: u64,
    slow: BTreeSet<&'static str>,
}

fn one_pool(level: Level, members: u16, strip: u64, count: u16, buffers: &Buffers, seen: &mut Seen) {
    let mut random = Random(u64::from(members) << 32 | strip << 8 | u64::from(count));
    let (mut array, mut model_sets, mut extent_bytes) = (Vec::new(), Vec::new(), 0);
    for number in 0..count {
        let (set, model, bytes) = sets(&mut random, level, members, (number * members, strip));
        array.push(Arc::new(set));
        model_sets.push(model);
        extent_bytes = bytes;
    }
    let array = Array::new(array).expect("good");
    let thin = Thin { extents: array.extents(), extent_bytes, unit_bytes: unit_bytes_for(extent_bytes) };
    let mut metadata = Metadata::new(thin, 1000);
    // The last extent is not used to its end.
    let size = u64::from(INDICES) * extent_bytes - 3 * BLOCK;
    let create = Record::CreateVolume { id: 1, uuid: [1; 16], name: "v".to_owned(), size_bytes: size };
    metadata.apply(&create).expect("good");
    let entries = map(&mut random, &mut metadata, thin);
    let unit = u64::from(thin.unit_bytes);
    let model = Model { sets: model_sets, entries, strip, extent_bytes, unit };
    let view = View::without_devices(array, metadata.table(), thin, DATA_OFFSET, SHIFT);
    let map = Arc::clone(metadata.volume(1).expect("made").map());
    let (mut plan, mut rotor) = (Plan::new(), 0);
    for _ in 0..REQUESTS {
        let (first, len) = range(&mut random, &model, size);
        for is_write in [false, true] {
            let case = Case { level, count, members, strip, first, len, is_write };
            let operation = if is_write { Operation::Write { fua: false } } else { Operation::Read };
            let request = Request {
                operation,
                lba: Lba(first >> SHIFT),
                blocks: BlockCount(u32::try_from(len >> SHIFT).expect("small")),
                buffers: buffers.slice(0, to_usize(len)),
                token: Token(0),
            };
            let resolved = resolve(&view, &map, &request, &mut rotor, &mut plan);
            let wanted = if is_write { model.write(first, len) } else { model.read(first, len) };
            assert_eq!(resolved, wanted, "{case:?}");
            match resolved {
                Resolved::Plan => {
                    model.check(&plan, (first, len), is_write, &mut random);
                    seen.plans += 1;
                    seen.stripes += plan.stripes.len() as u64;
                    seen.zeroes += plan.zeroes.len() as u64;
                }
                Resolved::Slow(class) => _ = seen.slow.insert(class.name()),
                Resolved::Refused(status) => panic!("{case:?}: {status:?}"),
            }
        }
    }
}

#[test]
fn a_plan_has_every_block_where_the_model_puts_it() {
    // Nothing looks at it.
    let payload = Bounce::holding(&vec![0; TRANSFER_BYTES_MAX as usize]);
    let buffers = payload.buffers(0, payload.len());
    for level in Level::ALL {
        let mut seen = Seen::default();
        for members in level.members_min().max(2)..=level.members_max() {
            for strip in (12..=20).map(|shift| 1 << shift) {
                for count in [1, 2] {
                    one_pool(level, members, strip, count, &buffers, &mut seen);
                }
            }
        }
        let slow: Vec<_> = seen.slow.iter().copied().collect();
        let wanted: &[&str] = match level.parities() {
            0 => &["copy_on_write", "write_miss"],
            _ => &["copy_on_write", "degraded", "partial_stripe", "write_miss"],
        };
        assert!(seen.plans > 100 && seen.zeroes > 100, "{level}: {seen:?}");
        assert!(level.parities() == 0 || seen.stripes > 100, "{level}: {seen:?}");
        assert_eq!(slow, wanted, "{level}");
    }
}
