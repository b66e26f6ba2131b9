//! `resolve()`: from a volume's request to members' requests, in one pass. Pure: it reads the tables and marks nothing but regions as
//! touched.
//!
//! ```text
//!   blocks of the volume ── table: one load per extent ──► extent, birth, which units are valid
//!        extent + offset ── RAID arithmetic ──► member, offset          a read takes one copy, a write all
//! ```
//!
//! What cannot be planned so is [`Resolved::Slow`], with the reason.

use super::shared::{Class, View};
use crate::plan::TRANSFER_BYTES_MAX;
use crate::raid::{self, Parity, Set};
use crate::thin::VolumeMap;
use hawser_block::{Operation, Request, Status};

#[cfg(test)]
mod tests;

/// A request to one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The member's number.
    pub member: u16,
    /// Where on its device, in bytes.
    pub offset: u64,
    /// Where in the request's payload, in bytes.
    pub start: u32,
    /// How many bytes.
    pub len: u32,
}

/// A whole stripe that a write overwrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stripe {
    /// The set's number.
    pub set: u32,
    /// Its row in the set.
    pub row: u64,
    /// Where its data is in the request's payload, in bytes.
    pub start: u32,
    /// Where its parities shall be: P, then Q behind it. They have addresses behind the payload's end.
    pub parity: u32,
}

/// What a request becomes.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Requests to members. Copies of the same bytes follow each other.
    pub steps: Vec<Step>,
    /// Stripes of which parity has to be computed first.
    pub stripes: Vec<Stripe>,
    /// How many bytes all parities have.
    pub parity_bytes: u32,
    /// Parts of the payload, as start and length, that read as zeroes.
    pub zeroes: Vec<(u32, u32)>,
}

impl Plan {
    /// With room for the longest request in the smallest strips, on two members.
    #[must_use]
    pub fn new() -> Plan {
        let most = (TRANSFER_BYTES_MAX as usize >> 12) + 2;
        Plan {
            steps: Vec::with_capacity(2 * most),
            stripes: Vec::with_capacity(most),
            parity_bytes: 0,
            zeroes: Vec::with_capacity(most),
        }
    }

    fn clear(&mut self) {
        self.steps.clear();
        self.stripes.clear();
        self.parity_bytes = 0;
        self.zeroes.clear();
    }

    fn zero(&mut self, start: u64, len: u64) {
        let (start, len) = (narrow(start), narrow(len));
        match self.zeroes.last_mut() {
            Some((before, so_far)) if *before + *so_far == start => *so_far += len,
            _ => self.zeroes.push((start, len)),
        }
    }
}

/// How a request goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// By the plan.
    Plan,
    /// Slowly, for this reason.
    Slow(Class),
    /// Not at all.
    Refused(Status),
}

#[expect(clippy::cast_possible_truncation, reason = "a request has at most 4 MiB")]
fn narrow(bytes: u64) -> u32 {
    debug_assert!(bytes <= u64::from(u32::MAX));
    bytes as u32
}

/// What `request` is to `volume`, in bytes: where it begins, and how many.
///
/// # Errors
/// When it cannot be right.
#[inline]
pub fn bounds(view: &View, map: &VolumeMap, request: &Request) -> Result<(u64, u64), Status> {
    let shift = view.block_shift;
    let len = u64::from(request.blocks.0) << shift;
    let size = map.size_bytes();
    let blocks = size >> shift;
    if len == 0 || request.lba.0 >= blocks || u64::from(request.blocks.0) > blocks - request.lba.0 {
        return Err(Status::Invalid);
    }
    if request.operation.has_payload()
        && (request.buffers.len() as u64 != len || len > u64::from(TRANSFER_BYTES_MAX))
    {
        return Err(Status::Invalid);
    }
    Ok((request.lba.0 << shift, len))
}

/// Has the table's entry for a request in the cache when `resolve` comes to it. Looks at nothing else, and refuses nothing.
#[inline]
pub fn prefetch(view: &View, map: &VolumeMap, request: &Request) {
    let extent_bytes = view.thin.extent_bytes;
    let first = request.lba.0.wrapping_shl(view.block_shift);
    let (index, _) = split(extent_bytes, first);
    view.table.prefetch(map, u32::try_from(index).unwrap_or(u32::MAX));
}

/// Plans a read or a write; `rotor` chooses among copies and is moved on. Channels take its two ways one by one: a read of one step needs no list.
#[must_use]
pub fn resolve(
    view: &View,
    map: &VolumeMap,
    request: &Request,
    rotor: &mut u32,
    plan: &mut Plan,
) -> Resolved {
    if request.operation == Operation::Read
        && let Some(step) = resolve_one(view, map, request, rotor)
    {
        plan.clear();
        plan.steps.push(step);
        return Resolved::Plan;
    }
    resolve_parts(view, map, request, rotor, plan)
}

/// The same of what [`resolve_one`] does not plan.
pub(super) fn resolve_parts(
    view: &View,
    map: &VolumeMap,
    request: &Request,
    rotor: &mut u32,
    plan: &mut Plan,
) -> Resolved {
    plan.clear();
    let (first, len) = match bounds(view, map, request) {
        Ok(bounds) => bounds,
        Err(status) => return Resolved::Refused(status),
    };
    match request.operation {
        Operation::Read => {
            *rotor = rotor.wrapping_add(1);
            read(view, map, (first, len), *rotor, plan)
        }
        Operation::Write { .. } if map.is_read_only() => Resolved::Refused(Status::ReadOnly),
        Operation::Write { .. } => write(view, map, (first, len), plan),
        _ if map.is_read_only() => Resolved::Refused(Status::ReadOnly),
        _ => Resolved::Slow(Class::Discard),
    }
}

/// The one step of a read that lies in one extent and one strip, as most do; `None`: [`resolve_parts`] says what it is.
#[inline(always)]
pub(super) fn resolve_one(view: &View, map: &VolumeMap, request: &Request, rotor: &mut u32) -> Option<Step> {
    let (first, len) = bounds(view, map, request).ok()?;
    let (index, within) = split(view.thin.extent_bytes, first);
    if len > view.thin.extent_bytes - within {
        return None;
    }
    let entry = view.table.lookup(map, narrow(index));
    if !entry.is_mapped() {
        return None;
    }
    let extent = match entry.is_partial() {
        false => entry.low(),
        true => valid_extent(view, entry.low(), within, len)?,
    };
    if extent >= view.array.extents() {
        return None;
    }
    let (set, address) = view.array.locate(extent);
    let set = view.array.set(set);
    let copy = match set.only_copy(address + within, len) {
        Some(copy) => copy,
        None => {
            let piece =
                set.pieces(address + within, len).next().filter(|piece| u64::from(piece.len) == len)?;
            *rotor = rotor.wrapping_add(1);
            set.choose(&piece, *rotor).ok()?
        }
    };
    Some(Step { member: copy.member, offset: view.data_offset + copy.offset, start: 0, len: narrow(len) })
}

/// The extent of a partial entry, where all of these bytes of it are valid.
fn valid_extent(view: &View, partial: u32, within: u64, len: u64) -> Option<u32> {
    let partial = view.table.partial(partial);
    let (is_valid, _, run) = runs(partial.bits, view.thin.unit_shift(), within, len).next()?;
    (is_valid && run == len).then_some(partial.extent)
}

/// Which extent of a volume has this byte, and where in it.
#[inline]
fn split(extent_bytes: u64, at: u64) -> (u64, u64) {
    match extent_bytes.is_power_of_two() {
        true => (at >> extent_bytes.trailing_zeros(), at & (extent_bytes - 1)),
        false => (at / extent_bytes, at % extent_bytes),
    }
}

/// The parts of bytes of a volume that lie in one extent each: its index, where in it, where in the request, how many.
pub(crate) fn by_extent(
    extent_bytes: u64,
    (first, len): (u64, u64),
) -> impl Iterator<Item = (u32, u64, u64, u64)> {
    let mut done = 0;
    let (mut index, mut within) = split(extent_bytes, first);
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let here = (extent_bytes - within).min(len - done);
        let part = (narrow(index), within, done, here);
        (index, within, done) = (index + 1, 0, done + here);
        Some(part)
    })
}

/// Runs of units in bytes `within..within + len` of an extent that are alike valid or not: which, where, how many bytes.
pub(crate) fn runs(
    bits: [u64; 4],
    unit_shift: u32,
    within: u64,
    len: u64,
) -> impl Iterator<Item = (bool, u64, u64)> {
    let is_valid = move |unit: u64| bits[usize::try_from(unit >> 6).unwrap_or(3)] >> (unit & 63) & 1 != 0;
    let (mut at, end) = (within, within + len);
    std::iter::from_fn(move || {
        if at == end {
            return None;
        }
        let (from, valid) = (at, is_valid(at >> unit_shift));
        while at < end && is_valid(at >> unit_shift) == valid {
            at = end.min(((at >> unit_shift) + 1) << unit_shift);
        }
        Some((valid, from, at - from))
    })
}

fn read(view: &View, map: &VolumeMap, range: (u64, u64), rotor: u32, plan: &mut Plan) -> Resolved {
    for (index, within, start, len) in by_extent(view.thin.extent_bytes, range) {
        let entry = view.table.lookup(map, index);
        if !entry.is_mapped() {
            plan.zero(start, len);
            continue;
        }
        if !entry.is_partial() {
            if let Err(class) = read_extent(view, entry.low(), within, (start, len), rotor, plan) {
                return Resolved::Slow(class);
            }
            continue;
        }
        let partial = view.table.partial(entry.low());
        for (valid, at, len) in runs(partial.bits, view.thin.unit_shift(), within, len) {
            let start = start + (at - within);
            let extent = if valid { partial.extent } else { partial.fallback };
            if extent == crate::format::NONE {
                plan.zero(start, len);
            } else if let Err(class) = read_extent(view, extent, at, (start, len), rotor, plan) {
                return Resolved::Slow(class);
            }
        }
    }
    Resolved::Plan
}

fn class_of(slow: raid::Slow) -> Class {
    match slow {
        raid::Slow::Unsynced => Class::ReadMiss,
        raid::Slow::Window | raid::Slow::Intent => Class::Intent,
        raid::Slow::Degraded => Class::Degraded,
    }
}

/// Plans a read of an extent's bytes.
pub(crate) fn read_extent(
    view: &View,
    extent: u32,
    within: u64,
    (start, len): (u64, u64),
    rotor: u32,
    plan: &mut Plan,
) -> Result<(), Class> {
    if extent >= view.array.extents() {
        // The pool has grown since we looked.
        return Err(Class::ReadMiss);
    }
    let (set, address) = view.array.locate(extent);
    let set = view.array.set(set);
    for piece in set.pieces(address + within, len) {
        let copy = set.choose(&piece, rotor).map_err(class_of)?;
        plan.steps.push(Step {
            member: copy.member,
            offset: view.data_offset + copy.offset,
            start: narrow(start + piece.start),
            len: piece.len,
        });
    }
    Ok(())
}

fn write(view: &View, map: &VolumeMap, range: (u64, u64), plan: &mut Plan) -> Resolved {
    let shared_generation = map.shared_generation();
    for (index, within, start, len) in by_extent(view.thin.extent_bytes, range) {
        let entry = view.table.lookup(map, index);
        if !entry.is_mapped() {
            return Resolved::Slow(Class::WriteMiss);
        }
        if entry.birth() <= shared_generation {
            return Resolved::Slow(Class::CopyOnWrite);
        }
        let extent = if entry.is_partial() {
            let partial = view.table.partial(entry.low());
            if runs(partial.bits, view.thin.unit_shift(), within, len).any(|(valid, ..)| !valid) {
                return Resolved::Slow(Class::WriteMiss);
            }
            partial.extent
        } else {
            entry.low()
        };
        if let Err(class) = write_extent(view, extent, within, (start, len), range.1, plan) {
            return Resolved::Slow(class);
        }
    }
    Resolved::Plan
}

/// Plans a write of an extent's bytes to all copies; parities come behind the `payload` bytes of the request.
fn write_extent(
    view: &View,
    extent: u32,
    within: u64,
    (start, len): (u64, u64),
    payload: u64,
    plan: &mut Plan,
) -> Result<(), Class> {
    if extent >= view.array.extents() {
        return Err(Class::WriteMiss);
    }
    let (number, address) = view.array.locate(extent);
    let set: &Set = view.array.set(number);
    if let Some(parity) = set.parity() {
        return write_stripes(view, (number, set, parity), address + within, (start, len), payload, plan);
    }
    for piece in set.pieces(address + within, len) {
        let copies = set.writable(&piece).map_err(class_of)?;
        plan.steps.extend(copies.as_slice().iter().map(|copy| Step {
            member: copy.member,
            offset: view.data_offset + copy.offset,
            start: narrow(start + piece.start),
            len: piece.len,
        }));
    }
    Ok(())
}

/// The same of a set with parity: whole stripes, on members that are all there.
fn write_stripes(
    view: &View,
    (number, set, parity): (usize, &Set, &Parity),
    address: u64,
    (start, len): (u64, u64),
    payload: u64,
    plan: &mut Plan,
) -> Result<(), Class> {
    let stripes = &parity.stripes;
    let (strip, whole) = (stripes.strip_bytes(), stripes.stripe_bytes());
    if !address.is_multiple_of(whole) || !len.is_multiple_of(whole) {
        return Err(Class::PartialStripe);
    }
    let rows = address / whole..(address + len) / whole;
    // First the marks: who finds them sees the members as they were when they were set, or later.
    set.are_stripes_writable(rows.start * strip, (rows.end - rows.start) * strip).map_err(class_of)?;
    if !set.are_all_in_sync() {
        return Err(Class::Degraded);
    }
    if !parity.is_unlogged() {
        return Err(Class::Intent);
    }
    for (index, row) in (0..).zip(rows) {
        let start = start + index * whole;
        let parity = payload + u64::from(plan.parity_bytes);
        plan.parity_bytes += narrow(u64::from(stripes.parities()) * strip);
        plan.stripes.push(Stripe {
            set: u32::try_from(number).unwrap_or(u32::MAX),
            row,
            start: narrow(start),
            parity: narrow(parity),
        });
        let offset = view.data_offset + row * strip;
        let mut add = |member: u16, at: u64| {
            let member = set.first_member() + member;
            plan.steps.push(Step { member, offset, start: narrow(at), len: narrow(strip) });
        };
        for data in 0..stripes.data_strips() {
            add(stripes.member_of_data(row, data), start + u64::from(data) * strip);
        }
        add(stripes.member_of_p(row), parity);
        if let Some(member) = stripes.member_of_q(row) {
            add(member, parity + strip);
        }
    }
    Ok(())
}
