//! One round: everything that is to be changed in a stripe now.
//!
//! ```text
//!   reconstruct        D0'  D1   D2          P = D0' + D1 + D2            reads what is not overwritten
//!   read-modify        D0'            P      P' = P + D0 + D0'            reads what is overwritten, and the parities
//! ```
//!
//! Parity can be changed only where it is right. Where nobody has written yet, or after a crash, it is not: there it is made of all data.

use super::row::bytes_mut;
use super::row::{Bad, Contents, Lost, Row, Slots, each};
use super::stuck::Stuck;
use super::{Change, Changed, Ways};
use crate::format::parity_log::ENTRY_LEN_MAX;
use crate::parity;
use crate::pool::coverage;
use crate::pool::wait::all;
use crate::raid::{Mode, Set, Slow};
use crate::simulated::is_broken;
use hawser_block::Status;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How much of each data strip's columns is overwritten.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cover {
    Nothing,
    Part,
    All,
}

impl Ways {
    /// Carries out changes of a stripe that is ours; later ones prevail.
    pub(super) async fn round(
        &self,
        set: &Arc<Set>,
        number: u64,
        changes: &[Change],
    ) -> Result<Changed, Status> {
        // From looking at the members to the end: a barrier waits for it.
        let _under_way = self.place.under_way();
        if !self.is_writable() {
            return Err(Status::ReadOnly);
        }
        let view = self.shared.view();
        let strip = u64::from(set.strip_bytes());
        match set.are_stripes_writable(number * strip, strip) {
            Ok(()) => {}
            Err(Slow::Degraded) => return Err(Status::Path),
            Err(_) => return Ok(Changed::NotNow),
        }
        let whole = Row { since: self.shared.joins(), ..Row::new(&view, set, number, 0, 0) };
        let is_healthy = set.are_all_in_sync() && whole.in_sync().count_ones() as usize == whole.slots();
        let columns = columns_of(changes, strip);
        let step = match is_healthy {
            true => u64::from(ENTRY_LEN_MAX),
            // Alike valid, or not, from one end to the other.
            false => u64::from(ENTRY_LEN_MAX).min(u64::from(view.thin.unit_bytes)),
        };
        let parts: Vec<(u64, u64)> = columns.into_iter().flat_map(|range| steps(range, step)).collect();
        let rows: Vec<Row<'_>> = parts
            .into_iter()
            .map(|(within, len)| {
                let len = usize::try_from(len).expect("a strip is small");
                Row { within, len, ..whole }
            })
            .collect();
        let is_valid = |within, len| changes.iter().any(|change| (change.is_valid)(number, within, len));
        let is_fresh = |row: &Row<'_>| !is_valid(row.within, row.len as u64);
        // Of what nobody has written parity is not right, though it may be beside.
        let unit = u64::from(view.thin.unit_bytes);
        let units = |row: &Row<'_>| steps(row.within..row.within + row.len as u64, unit);
        let is_known = |row: &Row<'_>| units(row).all(|(within, len)| is_valid(within, len));
        let is_alone = changes.iter().all(|change| change.is_alone) || is_broken("fresh_beside_others");
        if !is_healthy && rows.iter().any(is_fresh) && !is_alone {
            // What others have just written, and not noted yet, would count as zeroes.
            return Ok(Changed::NotNow);
        }
        let lost = |row: &Row<'_>| match (is_fresh(row), is_alone) {
            (false, _) if is_known(row) || is_broken("mixed_columns_computed") => Lost::Computed,
            (true, true) => Lost::Zeroes,
            // Of columns that are not alike valid what cannot be read is no one thing.
            _ => Lost::Unknown,
        };
        let each_row = rows.iter().map(|row| async {
            let changed = self.columns(row, changes, lost(row), is_known(row)).await?;
            if changed == Changed::Done || !is_alone || is_fresh(row) || is_known(row) {
                return Ok(changed);
            }
            // Unit by unit, each of which is.
            let narrow = |len: u64| usize::try_from(len).expect("a strip is small");
            for (within, len) in units(row) {
                let part = Row { within, len: narrow(len), ..*row };
                if self.columns(&part, changes, lost(&part), is_known(&part)).await? == Changed::NotNow {
                    return Ok(Changed::NotNow);
                }
            }
            Ok(Changed::Done)
        });
        let outcomes = all(each_row).await.into_iter().collect::<Result<Vec<Changed>, Status>>()?;
        Ok(outcomes.into_iter().find(|outcome| *outcome == Changed::NotNow).unwrap_or(Changed::Done))
    }

    /// Changes some columns.
    async fn columns(
        &self,
        row: &Row<'_>,
        changes: &[Change],
        lost: Lost,
        is_known: bool,
    ) -> Result<Changed, Status> {
        let (in_sync, written) = (row.in_sync(), row.written());
        let covers: Vec<Cover> = (0..row.data()).map(|slot| cover_of(row, changes, slot)).collect();
        let with = |cover: Cover| {
            (0..row.data()).filter(|slot| covers[*slot] == cover).fold(0, |slots, slot| slots | 1 << slot)
        };
        let (untouched, part): (Slots, Slots) = (with(Cover::Nothing), with(Cover::Part));
        let touched = row.all_data() & !untouched;
        let parities = row.all_parity() & written;
        let is_whole = touched == row.all_data() && part == 0;
        let is_healthy = in_sync.count_ones() as usize == row.slots();

        let mut bad = Bad::default();
        let contents = match self.is_changed_by_difference(row, touched, untouched | part, is_known) {
            true => self.by_difference(row, changes, touched, parities, &mut bad).await?,
            false => self.by_all(row, changes, (untouched | part, part), parities, &mut bad, lost).await?,
        };
        let Some(contents) = contents else { return Ok(Changed::NotNow) };
        // What counts as zeroes becomes zeroes where it is written to: it may be in sync, and counted by this parity, later.
        let zeroed = match lost {
            Lost::Zeroes if !is_broken("zeroes_not_written") => {
                let is_there = |slot: &usize| contents[*slot].is_some();
                let lacking = each(untouched & written & (bad.slots | !in_sync)).filter(is_there);
                lacking.fold(0, |slots, slot| slots | 1 << slot)
            }
            _ => 0,
        };
        let slots = (touched & written) | parities | zeroed;
        // Without it only where nothing that could be lost stands in these columns; and where all of it is overwritten on all members: then
        // parity is made again from whatever part of it has come there.
        let needs_no_log = lost == Lost::Zeroes || (is_whole && is_healthy && self.is_unlogged(row).await);
        let is_in_log = row.parity.guards.is_logged(row.row) && !is_broken("older_entry_forgotten");
        let is_logged = is_in_log || !needs_no_log || is_broken("whole_stripes_logged");
        let is_logged = is_logged && !is_broken("parity_write_unlogged");
        let entry = match is_logged {
            true => Some(self.log(row, &contents, slots).await?),
            false => None,
        };
        let outcome = self.in_place(row, &contents, slots).await;
        // Else it is needed: the next process does it again.
        if let Some(number) = entry.filter(|_| outcome.is_ok()) {
            row.parity.ring().placed(number);
        }
        match (&outcome, entry) {
            (Err(_), Some(_)) if !is_broken("half_written_computed") => {
                row.parity.stays_half_written(row.row)
            }
            (Err(_), None) if lost != Lost::Zeroes => row.doubt(&self.shared),
            _ => {}
        }
        outcome.map(|()| Changed::Done)
    }

    /// Whether a whole stripe may be written without the log: the members have to know that before.
    async fn is_unlogged(&self, row: &Row<'_>) -> bool {
        let first = row.set.first_member();
        row.parity.is_unlogged()
            || self
                .shared
                .request(move |owner| async move { owner.allow_unlogged(first).await })
                .await
                .is_ok()
    }

    /// Whether parity is changed by what the data changes by.
    fn is_changed_by_difference(&self, row: &Row<'_>, touched: Slots, rest: Slots, is_known: bool) -> bool {
        let (in_sync, written) = (row.in_sync(), row.written());
        let parities = row.all_parity() & written;
        let is_readable = (touched | parities) & !in_sync == 0;
        let is_known = is_known || is_broken("fresh_parity_trusted");
        if !is_known || parities == 0 || !is_readable {
            return false;
        }
        let lost = row.all_data() & !in_sync;
        if lost != 0 {
            // What is lost stays in the parities as it is, unless all is needed anyhow.
            return rest & lost != 0;
        }
        let first = row.row * u64::from(row.set.strip_bytes()) + row.within;
        let mut regions = row.set.region_of(first)..=row.set.region_of(first + row.len as u64 - 1);
        let is_right = !regions.any(|region| row.set.unsynced.get(region));
        let is_shorter = touched.count_ones() + parities.count_ones() < rest.count_ones();
        is_right && is_shorter
    }

    async fn by_difference(
        &self,
        row: &Row<'_>,
        changes: &[Change],
        touched: Slots,
        parities: Slots,
        bad: &mut Bad,
    ) -> Result<Option<Contents>, Status> {
        let gathered = self.gather(row, touched | parities, bad, Lost::Computed).await?;
        let Some(mut contents) = gathered else { return Ok(None) };
        coverage::count(coverage::Event::StripeByDifference);
        let mut sums: Vec<_> = contents.drain(row.data()..).collect();
        for slot in each(touched) {
            let mut new = Some(Rc::new(self.place.spare.take(row.len)));
            let old = bytes_mut(&mut contents[slot], row.len);
            let bytes = bytes_mut(&mut new, row.len);
            bytes.copy_from_slice(old);
            overlay(row, changes, slot, bytes);
            // What it changes by.
            parity::xor_into(bytes, old);
            for parity_slot in each(parities) {
                let sum = bytes_mut(&mut sums[parity_slot - row.data()], row.len);
                match parity_slot - row.data() {
                    0 => parity::xor_into(old, sum),
                    _ => parity::mul_into(slot, old, sum),
                }
            }
            contents[slot] = new;
        }
        contents.append(&mut sums);
        Ok(Some(contents))
    }

    async fn by_all(
        &self,
        row: &Row<'_>,
        changes: &[Change],
        (rest, part): (Slots, Slots),
        parities: Slots,
        bad: &mut Bad,
        lost: Lost,
    ) -> Result<Option<Contents>, Status> {
        let need = if parities == 0 { part } else { rest };
        let Some(mut contents) = self.gather(row, need, bad, lost).await? else { return Ok(None) };
        for slot in each(row.all_data() & !rest) {
            contents[slot] = Some(Rc::new(self.place.spare.take(row.len)));
        }
        for slot in each(row.all_data()) {
            if contents[slot].is_some() {
                overlay(row, changes, slot, bytes_mut(&mut contents[slot], row.len));
            }
        }
        if parities == 0 {
            return Ok(Some(contents));
        }
        let mut sums: Vec<_> =
            each(row.all_parity()).map(|_| Some(Rc::new(self.place.spare.take(row.len)))).collect();
        let data: Vec<&[u8]> = contents[..row.data()]
            .iter()
            .map(|content| content.as_ref().expect("all data is there").bytes(0, row.len))
            .collect();
        match &mut sums[..] {
            [p] => parity::xor(&data, bytes_mut(p, row.len)),
            [p, q] => parity::pq(&data, bytes_mut(p, row.len), bytes_mut(q, row.len)),
            _ => unreachable!("one parity or two"),
        }
        contents.truncate(row.data());
        contents.append(&mut sums);
        Ok(Some(contents))
    }

    /// Reads, again when somebody else has ended that.
    async fn gather(
        &self,
        row: &Row<'_>,
        need: Slots,
        bad: &mut Bad,
        lost: Lost,
    ) -> Result<Option<Contents>, Status> {
        loop {
            match row.gather(&self.lanes, &self.place, need, bad, lost).await {
                Err(Status::Aborted) if self.is_writable() => {
                    self.runtime.sleep(Duration::from_millis(10)).await;
                }
                other => return other,
            }
        }
    }

    /// Writes slots, each until it is there or its member is out.
    async fn in_place(&self, row: &Row<'_>, contents: &Contents, slots: Slots) -> Result<(), Status> {
        // What is put there again may be older.
        while row.parity.is_behind() && self.is_writable() {
            self.runtime.sleep(Duration::from_millis(1)).await;
        }
        if row.parity.is_behind() {
            return Err(Status::ReadOnly);
        }
        let writes = each(slots).map(|slot| {
            let content = Rc::clone(contents[slot].as_ref().expect("what is written is there"));
            async move {
                let mut stuck = Stuck::new(&self.shared);
                loop {
                    if row.set.mode(row.place(slot)) == Mode::Away {
                        return Ok(());
                    }
                    // A member that is out and back meanwhile is put out again when it fails, and not tried for ever.
                    let row = &Row { since: self.shared.joins(), ..*row };
                    let written =
                        self.write_unless_out(row, slot, (row.offset(), false), &content, row.len).await;
                    let Err(status) = written else {
                        return Ok(());
                    };
                    if is_broken("left_half_written") {
                        return Err(status);
                    }
                    if self.member_failed(row, slot, status, true).await.is_err() {
                        // Nobody can be put out. It may come back: what is half written is not left so.
                        self.is_stuck(row, slot, status, true, &mut stuck).await;
                    }
                    // Who is out does not lack it.
                    if !self.is_writable() && row.set.mode(row.place(slot)) != Mode::Away {
                        return Err(status);
                    }
                }
            }
        });
        all(writes).await.into_iter().collect()
    }
}

/// The columns that changes touch, of any strip: apart from each other, in order.
fn columns_of(changes: &[Change], strip: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for change in changes {
        let (first, last) = (change.from / strip, (change.to - 1) / strip);
        let (begin, end) = (change.from % strip, (change.to - 1) % strip + 1);
        match last - first {
            0 => ranges.push(begin..end),
            1 if end < begin => ranges.extend([0..end, begin..strip]),
            _ => ranges.push(0..strip),
        }
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let mut apart: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match apart.last_mut() {
            Some(before) if range.start <= before.end => before.end = before.end.max(range.end),
            _ => apart.push(range),
        }
    }
    apart
}

/// A range, cut at multiples of `step`.
fn steps(range: Range<u64>, step: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let len = (step - at % step).min(range.end - at);
        let part = (at, len);
        at += len;
        (len > 0).then_some(part)
    })
}

/// What a change has of the columns of a data strip: where in them, and where in its buffer.
fn part_of(row: &Row<'_>, change: &Change, slot: usize) -> Option<(Range<usize>, usize)> {
    let first = slot as u64 * u64::from(row.set.strip_bytes()) + row.within;
    let from = change.from.max(first);
    let to = change.to.min(first + row.len as u64);
    let narrow = |bytes: u64| usize::try_from(bytes).expect("a stripe is small");
    (from < to).then(|| (narrow(from - first)..narrow(to - first), change.at + narrow(from - change.from)))
}

fn cover_of(row: &Row<'_>, changes: &[Change], slot: usize) -> Cover {
    let parts = changes.iter().filter_map(|change| part_of(row, change, slot));
    let mut ranges: Vec<Range<usize>> = parts.map(|(range, _)| range).collect();
    if ranges.is_empty() {
        return Cover::Nothing;
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let end = ranges.iter().fold(0, |end, range| if range.start <= end { end.max(range.end) } else { end });
    if end == row.len { Cover::All } else { Cover::Part }
}

fn overlay(row: &Row<'_>, changes: &[Change], slot: usize, bytes: &mut [u8]) {
    for change in changes {
        if let Some((range, at)) = part_of(row, change, slot) {
            bytes[range.clone()].copy_from_slice(change.bounce.bytes(at, range.len()));
        }
    }
}
