//! Stripes, as far as the owner has to do with them: the parity log's end, and parity that is made right again.

use super::Owner;
use super::differing::{Differing, Fault, differing};
use super::resync::SCRUB;
use crate::format::{PAGE_BYTES, ParityHeader};
use crate::pool::bounce::{Bounce, Spare};
use crate::pool::coverage;
use crate::pool::lanes::Leaf;
use crate::pool::shared::View;
use crate::pool::stripes::{Bad, Contents, Entries, Lost, Row, Slots, Ways, each, read_entries};
use crate::pool::wait::{all, next_pass};
use crate::raid::{Level, Mode, Parity, Piece, Set};
use crate::simulated::is_broken;
use hawser_block::{Operation, Outcome, Status};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// The most of each strip that is made right at a time.
const COLUMNS_MAX: u64 = 256 << 10;
/// So many of these at a time.
const BESIDE: usize = 16;

impl Owner {
    pub(crate) fn ways(&self) -> Ways {
        Ways {
            runtime: self.runtime.clone(),
            shared: Arc::clone(&self.shared),
            place: Rc::clone(&self.place),
            lanes: Rc::clone(&self.lanes),
        }
    }

    fn sets_with_parity(&self) -> Vec<Arc<Set>> {
        let view = self.view();
        view.array.sets().iter().filter(|set| set.parity().is_some()).cloned().collect()
    }

    /// What stands on the members now of each set's parity log: what a flush from here on makes durable.
    pub(super) fn stripes_placed(&self) -> Vec<(Arc<Set>, u64)> {
        let sets = self.sets_with_parity().into_iter();
        let placed = sets.filter_map(|set| {
            let before = set.parity()?.ring().placed_before();
            Some((set, before))
        });
        placed.collect()
    }

    pub(super) fn stripes_flushed(&self, placed: &[(Arc<Set>, u64)]) {
        for (set, before) in placed {
            set.parity().expect("only of sets with parity").ring().is_flushed(*before);
        }
    }

    /// Makes room in a set's parity log.
    pub(crate) async fn release_parity_log(self: Rc<Self>, first_member: u16) -> Outcome {
        let set = self.sets_with_parity().into_iter().find(|set| set.first_member() == first_member);
        match set {
            Some(set) => self.release_stripes(&set).await,
            None => Err(Status::Invalid),
        }
    }

    /// The same of all sets.
    pub(crate) async fn release_all_stripes(self: &Rc<Self>) -> Outcome {
        for set in self.sets_with_parity() {
            self.release_stripes(&set).await?;
        }
        Ok(())
    }

    pub(super) async fn release_stripes(self: &Rc<Self>, set: &Arc<Set>) -> Outcome {
        let _turn = self.turns.parity.take().await;
        let parity = set.parity().expect("only of sets with parity");
        parity.ring().is_release_wanted = false;
        if parity.ring().is_empty() {
            return Ok(());
        }
        if is_broken("parity_released_unflushed") {
            let before = parity.ring().placed_before();
            parity.ring().is_flushed(before);
        }
        let (flushed, placed) = {
            let ring = parity.ring();
            (ring.flushed_before(), ring.placed_before())
        };
        if flushed < placed {
            self.flush_members().await?;
        }
        let (released, last) = {
            let ring = parity.ring();
            (ring.flushed_before(), ring.header.1)
        };
        if released == last {
            return Ok(());
        }
        if !is_broken("parity_released_in_memory_only")
            && let Err(status) = self.write_parity_header(set, released).await
        {
            // It is tried again: who takes it for done would never have room in the log again.
            parity.ring().header.1 = last;
            return Err(status);
        }
        parity.release(released);
        coverage::count(coverage::Event::ParityReleased);
        Ok(())
    }

    /// The same of one set, until no entry is left that was made before this one. Those that are at work at them end, or fail with the pool.
    pub(super) async fn release_stripes_before(self: &Rc<Self>, set: &Arc<Set>, number: u64) -> Outcome {
        let parity = set.parity().expect("only of sets with parity");
        loop {
            self.release_stripes(set).await?;
            if parity.ring().oldest() >= number {
                return Ok(());
            }
            self.check_writable()?;
            self.runtime.sleep(Duration::from_millis(1)).await;
        }
    }

    /// Whether something in the log may not stand in place on all members.
    pub(crate) fn has_stripes_half_written(&self) -> bool {
        let mut sets = self.sets_with_parity().into_iter();
        sets.any(|set| set.parity().is_some_and(|parity| !parity.ring().is_empty()))
    }

    /// Nobody puts right what a crash has left half written, since the pool is only looked at: what is lost there is not computed. (A set that
    /// lacks members already is not opened so.)
    pub(crate) fn doubt_what_is_marked(&self) {
        for set in self.sets_with_parity().into_iter().filter(|set| set.are_all_in_sync()) {
            let parity = set.parity().expect("only of sets with parity");
            set.unsynced.iter_set().for_each(|region| parity.doubtful.set(region));
        }
    }

    /// Lets whole stripes of a set be written without the log, once its members know.
    pub(crate) async fn allow_unlogged(self: Rc<Self>, first_member: u16) -> Outcome {
        let set = self.sets_with_parity().into_iter().find(|set| set.first_member() == first_member);
        let set = set.ok_or(Status::Invalid)?;
        let parity = set.parity().expect("only of sets with parity");
        let _turn = self.turns.parity.take().await;
        let is_careless = is_broken("unlogged_begun_without_all");
        if !parity.is_unlogged() && (set.are_all_in_sync() || is_careless) {
            self.check_writable()?;
            if is_broken("unlogged_not_told") {
                parity.set_unlogged(true);
                return Ok(());
            }
            parity.ring().is_unlogged_known = true;
            let released = parity.ring().header.1;
            self.write_parity_header(&set, released).await?;
            // Who is found to be lost by just this ends it again: then it is not begun.
            parity.set_unlogged(set.are_all_in_sync() || is_careless);
        }
        match set.are_all_in_sync() {
            true => Ok(()),
            false => Err(Status::Path),
        }
    }

    /// What was written without the log becomes durable, and the members know that there is no more of it. Nobody who is under way may wait for this.
    pub(super) async fn end_unlogged(self: &Rc<Self>, set: &Arc<Set>) -> Outcome {
        let parity = set.parity().expect("only of sets with parity");
        let is_known = parity.ring().is_unlogged_known;
        if !is_known || parity.doubtful.any() {
            return Ok(());
        }
        parity.set_unlogged(false);
        self.barrier().await;
        let _turn = self.turns.parity.take().await;
        if !is_broken("unlogged_ended_unflushed") {
            self.flush_members().await?;
        }
        if parity.is_unlogged() || parity.doubtful.any() {
            // Somebody has begun again, or has not ended what he began.
            return Ok(());
        }
        let released = {
            let mut ring = parity.ring();
            ring.is_unlogged_known = false;
            ring.header.1
        };
        self.write_parity_header(set, released).await
    }

    /// The same of all sets, where nobody has written so since this was called last, or nobody can; `all`: everywhere.
    pub(crate) async fn end_idle_unlogged(self: &Rc<Self>, all: bool) -> Outcome {
        for set in self.sets_with_parity() {
            let is_idle = !set.intents.any() || all || !set.are_all_in_sync();
            if is_idle {
                self.end_unlogged(&set).await?;
            }
        }
        Ok(())
    }

    /// A member is out: from now on a power cut must not find what was written without the log while it was there.
    pub(super) fn after_loss(self: &Rc<Self>, set: &Arc<Set>) {
        if set.parity().is_some() {
            let (owner, set) = (Rc::clone(self), Arc::clone(set));
            self.runtime.spawn(async move {
                if let Err(status) = owner.end_unlogged(&set).await {
                    log::warn!("pool {}: cannot make stripes durable: {}", owner.shared.name, status.name());
                }
            });
        }
    }

    /// Tells all members which entries count from now on. The turn is the caller's, or nobody else is there yet.
    pub(crate) async fn write_parity_header(self: &Rc<Self>, set: &Arc<Set>, released: u64) -> Outcome {
        let parity = set.parity().expect("only of sets with parity");
        let header = {
            let mut ring = parity.ring();
            ring.header = (ring.header.0 + 1, released);
            let unlogged = ring.is_unlogged_known;
            ParityHeader { number: ring.header.0, released, key: ring.key, unlogged }
        };
        let targets: Vec<(u16, Leaf)> =
            self.targets().into_iter().filter(|(member, _)| is_of(set, *member)).collect();
        self.put_parity_header(parity, &header, &targets).await
    }

    /// Begins the log of a set that is just being made, on one of its members.
    pub(super) async fn begin_parity_log(self: &Rc<Self>, set: &Arc<Set>, leaf: &Leaf) -> Outcome {
        let Some(parity) = set.parity() else { return Ok(()) };
        let key = {
            let mut ring = parity.ring();
            if ring.header.0 == 0 {
                ring.key[..8].copy_from_slice(&self.runtime.random().to_le_bytes());
                ring.key[8..].copy_from_slice(&self.runtime.random().to_le_bytes());
                ring.header = (1, 0);
            }
            ring.key
        };
        for number in [0, 1] {
            let header = ParityHeader { number, released: 0, key, unlogged: false };
            let bounce = Rc::new(Bounce::holding(&header.encode(&self.shared.uuid)));
            let offset = parity.log_offset + number * PAGE_BYTES as u64;
            self.lanes.write(leaf, offset, &bounce, 0, PAGE_BYTES, true).await?;
        }
        Ok(())
    }

    /// Tells one member, which has just come. The parity's turn is not the caller's.
    pub(super) async fn repeat_parity_header(self: &Rc<Self>, set: &Arc<Set>, number: u16) -> Outcome {
        let Some(parity) = set.parity() else { return Ok(()) };
        let _turn = self.turns.parity.take().await;
        let leaf = self.members.borrow()[usize::from(number)].leaf.clone().ok_or(Status::Path)?;
        let ((last, released), key, unlogged) = {
            let ring = parity.ring();
            (ring.header, ring.key, ring.is_unlogged_known)
        };
        // In both places: what stood there is of another time.
        for number_before in [last.saturating_sub(1), last] {
            let header = ParityHeader { number: number_before, released, key, unlogged };
            self.put_parity_header(parity, &header, &[(number, leaf.clone())]).await?;
        }
        Ok(())
    }

    async fn put_parity_header(
        self: &Rc<Self>,
        parity: &Parity,
        header: &ParityHeader,
        targets: &[(u16, Leaf)],
    ) -> Outcome {
        // Another host's counts as well, and the higher number wins.
        self.check_ours()?;
        let bounce = Rc::new(Bounce::holding(&header.encode(&self.shared.uuid)));
        targets.iter().for_each(|_| parity.count_log_write(PAGE_BYTES));
        let offset = parity.log_offset + header.number % 2 * PAGE_BYTES as u64;
        let since = self.shared.joins();
        let results = self.lanes.write_to_all(targets, offset, &bounce, PAGE_BYTES, true).await;
        for (member, outcome) in results {
            if let Err(status) = outcome {
                self.report_whatever(1 << member, status, since).await?;
            }
        }
        Ok(())
    }

    /// A member, by place in the set, has lost what it had not made durable: what the log says of it is put in place again, and made durable. Meanwhile
    /// nobody computes, and nobody begins in place ([`Parity::is_behind`]); who is at it writes what is the newest in the log.
    ///
    /// # Errors
    /// It cannot be written, or not all of the log can be read.
    pub(super) async fn put_in_place_again(
        self: &Rc<Self>,
        set: &Arc<Set>,
        index: u16,
        leaf: &Leaf,
        has_log: impl Fn(u16) -> bool,
    ) -> Outcome {
        if is_broken("lost_cache_not_mended") {
            return Ok(());
        }
        let parity = set.parity().expect("only of sets with parity");
        let view = self.view();
        let header = {
            let ring = parity.ring();
            let (number, released) = ring.header;
            ParityHeader { number, released, key: ring.key, unlogged: ring.is_unlogged_known }
        };
        let mut entries = Entries::new();
        let pool = &self.shared.uuid;
        for place in (0..set.members()).filter(|place| has_log(*place)) {
            let Some(leaf) = &view.leaves[usize::from(set.first_member() + place)] else { continue };
            read_entries(&self.lanes, leaf, (set, pool), &header, &mut entries, &mut Vec::new()).await?;
        }
        // What is newest goes first, and nothing older over it: it may be read already.
        let mut done: BTreeMap<u64, Vec<Range<u64>>> = BTreeMap::new();
        for (entry, payload) in entries.values().rev().filter(|(entry, _)| entry.places >> index & 1 != 0) {
            let before = (entry.places & ((1 << index) - 1)).count_ones() as usize;
            let payload = &payload[before * entry.len as usize..];
            let (first, end) = (u64::from(entry.within), u64::from(entry.within) + u64::from(entry.len));
            let covered = done.entry(entry.row).or_default();
            for part in uncovered(covered, first..end) {
                let narrow = |bytes: u64| usize::try_from(bytes).expect("a strip is small");
                let bytes = &payload[narrow(part.start - first)..narrow(part.end - first)];
                let offset = view.data_offset + entry.row * u64::from(set.strip_bytes()) + part.start;
                let bounce = Rc::new(Bounce::holding(bytes));
                self.lanes.write(leaf, offset, &bounce, 0, bytes.len(), false).await?;
            }
            covered.push(first..end);
            coverage::count(coverage::Event::StripesReplayed);
        }
        match self.lanes.flush(leaf).await {
            // It tells once what it has lost before.
            Err(Status::Media) => self.lanes.flush(leaf).await,
            outcome => outcome,
        }
    }

    /// Makes rows of a set's stripes whole: what members lack that are being brought up to date, and parity that may be wrong. The window is
    /// the caller's. How many strips were not right.
    pub(super) async fn mend_stripes(
        self: &Rc<Self>,
        set: &Arc<Set>,
        rows: Range<u64>,
    ) -> Result<u64, Status> {
        if self.mend_only(set, &rows).await? {
            return Ok(0);
        }
        let view = self.view();
        let strip = u64::from(set.strip_bytes());
        let (mut wrong, mut at) = (0, rows.start);
        let mut parts = Vec::new();
        while at < rows.end {
            let (number, within) = (at / strip, at % strip);
            let len = COLUMNS_MAX.min(strip - within).min(rows.end - at);
            parts.push((number, within, usize::try_from(len).expect("a strip is small")));
            at += len;
        }
        // Beside each other, or the way to the members and back is all that it does where strips are small.
        for parts in parts.chunks(BESIDE) {
            let since = self.shared.joins();
            let row = |&(number, within, len)| Row { since, ..Row::new(&view, set, number, within, len) };
            let rows: Vec<Row<'_>> = parts.iter().map(row).collect();
            for mended in all(rows.iter().map(|row| self.mend_columns(row))).await {
                wrong += mended?;
            }
        }
        Ok(wrong)
    }

    /// The same where one member of a RAID 5 lacks what it should have and all others have it: that is their sum, whichever of the strips are
    /// parity, so that no row is looked at alone. Whether it was done.
    async fn mend_only(self: &Rc<Self>, set: &Arc<Set>, rows: &Range<u64>) -> Result<bool, Status> {
        let lacking = || (0..set.members()).filter(|place| set.mode(*place) != Mode::InSync);
        let parity = set.parity().expect("only of sets with parity");
        let mut regions = set.region_of(rows.start)..=set.region_of(rows.end - 1);
        let (first, since, view) = (set.first_member(), self.shared.joins(), self.view());
        let leaf = |place: u16| view.leaves[usize::from(first + place)].as_ref();
        let (Some(only), 1) = (lacking().next(), lacking().count()) else { return Ok(false) };
        if set.level() != Level::Raid5
            || set.mode(only) != Mode::Syncing
            || regions.any(|region| parity.doubtful.get(region))
            || (0..set.members()).any(|place| leaf(place).is_none())
        {
            return Ok(false);
        }
        let level = parity.when_level();
        let (at, len) = (view.data_offset + rows.start, usize::try_from(rows.end - rows.start));
        let len = len.expect("a window is small");
        let others: Vec<(u16, Rc<Bounce>)> = (0..set.members())
            .filter(|place| *place != only)
            .map(|place| (place, Rc::new(self.place.spare.take(len))))
            .collect();
        let mut reads = Vec::with_capacity(others.len());
        for (place, into) in &others {
            let leaf = leaf(*place).expect("looked at just now");
            let (into, kept) = (into.buffers(0, len), Some(Rc::clone(into)));
            reads.push(self.lanes.start(leaf, Operation::Read, at, into, kept));
            // Where our own CPU reads, a request that has come meanwhile does not wait for all of them.
            next_pass().await;
        }
        let mut is_read = true;
        for read in reads {
            is_read &= read.await.is_ok();
        }
        // What was read from a member that has been found to lack something meanwhile may be old.
        if !is_read || !lacking().eq([only]) || level.is_none() || parity.when_level() != level {
            return Ok(false);
        }
        let mut sum = self.place.spare.take(len);
        let strips: Vec<&[u8]> = others.iter().map(|(_, bounce)| bounce.bytes(0, len)).collect();
        crate::parity::xor(&strips, sum.bytes_mut(0, len));
        self.may_mend()?;
        let new = leaf(only).expect("looked at just now");
        if let Err(status) = self.lanes.write(new, at, &Rc::new(sum), 0, len, false).await {
            self.report_lacking(first + only, status, since).await?;
        }
        Ok(true)
    }

    async fn mend_columns(self: &Rc<Self>, row: &Row<'_>) -> Result<u64, Status> {
        let (in_sync, written) = (row.in_sync(), row.written());
        let lost_data = row.all_data() & !in_sync;
        let lacking = written & !in_sync;
        // With all data there parity is made of it, whatever stands there.
        let made = lacking | if lost_data == 0 { row.all_parity() & written } else { 0 };
        if made == 0 {
            return Ok(0);
        }
        if lost_data != 0 && row.is_doubtful() {
            return Err(Status::Media);
        }
        let mut bad = Bad::default();
        let from = match lost_data {
            0 => row.all_data(),
            _ => in_sync,
        };
        let gathered =
            row.gather(&self.lanes, &self.place, from, &mut bad, computed_unless_doubtful(row)).await?;
        let mut contents = gathered.ok_or(Status::Media)?;
        if let Some(status) = bad.other.filter(|_| lost_data == 0) {
            // It has what parity is to be made of.
            return Err(status);
        }
        for slot in each(made) {
            contents[slot] = Some(Rc::new(self.place.spare.take(row.len)));
        }
        // What could not be read has been computed.
        row.recover(&mut contents, from, made)?;
        // What is right already is not written again.
        let compared = made & in_sync;
        let mut wrong = made & !in_sync;
        for slot in each(compared) {
            let leaf = row.leaf(slot).expect("who is in sync is there");
            let old = Rc::new(self.place.spare.take(row.len));
            let read = self.lanes.read(leaf, row.offset(), &old, 0, row.len).await;
            let new = contents[slot].as_ref().expect("made just now");
            if read.is_err() || old.bytes(0, row.len) != new.bytes(0, row.len) {
                wrong |= 1 << slot;
            }
        }
        self.may_mend()?;
        if is_broken("parity_not_made_again") {
            wrong &= !compared;
        }
        for slot in each(wrong) {
            let leaf = row.leaf(slot).expect("who is written to is there");
            let content = contents[slot].as_ref().expect("made just now");
            if let Err(status) = self.lanes.write(leaf, row.offset(), content, 0, row.len, false).await {
                self.report_lacking(row.member(slot), status, row.since).await?;
            }
        }
        let mended = u64::from((wrong & compared).count_ones());
        if mended > 0 {
            coverage::count(coverage::Event::ParityMended);
        }
        Ok(mended)
    }

    /// Rewrites what a medium has lost in these rows. The window is the caller's.
    pub(super) async fn rewrite_bad_strips(self: &Rc<Self>, set: &Arc<Set>, rows: Range<u64>) -> Outcome {
        let view = self.view();
        let strip = u64::from(set.strip_bytes());
        for at in (rows.start / 4096..rows.end.div_ceil(4096)).map(|block| block * 4096) {
            let since = self.shared.joins();
            let row = Row { since, ..Row::new(&view, set, at / strip, at % strip, 4096) };
            self.scrub_columns(&row, Wanted::Readable).await?;
        }
        Ok(())
    }

    /// Reads a piece, or computes it. Nobody may change its stripe meanwhile.
    pub(super) async fn read_or_compute(
        self: &Rc<Self>,
        view: &View,
        set: &Set,
        piece: &Piece,
        bad: bool,
    ) -> Result<Rc<Bounce>, Status> {
        let (row, slot) = row_of(view, set, piece);
        let mut bad = Bad::known(if bad { 1 << slot } else { 0 });
        let lost = computed_unless_doubtful(&row);
        let gathered = row.gather(&self.lanes, &self.place, 1 << slot, &mut bad, lost).await?;
        Ok(gathered.ok_or(Status::Media)?[slot].take().expect("asked for"))
    }

    /// Whether the strips of these columns go together, and who is wrong, where that can be told; mends them if that is wanted. What a medium has
    /// lost is written again. The window is the caller's. What differs.
    pub(super) async fn scrub_columns(
        self: &Rc<Self>,
        row: &Row<'_>,
        wanted: Wanted,
    ) -> Result<Vec<Differing>, Status> {
        let all_slots = row.all_data() | row.all_parity();
        let mut bad = Bad::default();
        let lost = computed_unless_doubtful(row);
        let gathered = row.gather(&self.lanes, &self.place, all_slots, &mut bad, lost).await?;
        let contents = gathered.ok_or(Status::Media)?;
        let mut found = Vec::new();
        if wanted != Wanted::Readable && self.work.compared.get().is_none() {
            // It was let go of while it was read, and may have been discarded.
            return Ok(found);
        }
        if row.in_sync() == all_slots && bad.slots == 0 && wanted != Wanted::Readable {
            found = differing_of(row, &contents);
            if row.is_unsynced() {
                // Nobody's fault: a crash has left it so, and parity is about to be made again.
                found.iter_mut().for_each(|it| (it.slots, it.fault) = (row.all_parity(), Fault::Unknown));
            }
            self.tell_faults(row, &found);
        }
        // What cannot be read has been computed.
        self.rewrite(row, &contents, bad.media).await?;
        if let Some(status) = bad.other.filter(|_| wanted != Wanted::Readable) {
            return Err(status);
        }
        if wanted == Wanted::Repaired {
            for Differing { columns, slots, .. } in &found {
                let part = Row { within: row.within + columns.start as u64, len: columns.len(), ..*row };
                let mut contents = part_of(&contents, columns, &self.place.spare);
                part.recover(&mut contents, all_slots & !slots, *slots)?;
                self.rewrite(&part, &contents, *slots).await?;
            }
        }
        Ok(found)
    }

    /// Writes those of these slots that are in sync.
    async fn rewrite(
        self: &Rc<Self>,
        row: &Row<'_>,
        contents: &[Option<Rc<Bounce>>],
        slots: Slots,
    ) -> Outcome {
        for slot in each(slots) {
            self.may_mend()?;
            let leaf = row.leaf(slot).filter(|_| row.in_sync() >> slot & 1 != 0);
            let Some(leaf) = leaf else { continue };
            let content = contents[slot].as_ref().expect("what is written is there");
            match self.lanes.write(leaf, row.offset(), content, 0, row.len, false).await {
                Ok(()) => {
                    coverage::count(coverage::Event::Repaired);
                    self.members.borrow_mut()[usize::from(row.member(slot))].repaired += 1;
                    log::warn!(
                        "pool {}: {SCRUB}: {} bytes at {} of member {} are written again",
                        self.shared.name,
                        row.len,
                        row.offset(),
                        row.member(slot)
                    );
                }
                Err(status) => self.report(1 << row.member(slot), status, row.since).await?,
            }
        }
        Ok(())
    }

    fn tell_faults(&self, row: &Row<'_>, found: &[Differing]) {
        let pool = &self.shared.name;
        let mut known: Slots = 0;
        for Differing { columns, slots, fault } in found {
            let at = row.offset() - row.view.data_offset;
            let (at, last) = (at + columns.start as u64, at + columns.end as u64 - 1);
            let who = match fault {
                Fault::Unknown => {
                    log::warn!(
                        "pool {pool}: {SCRUB}: data and parity do not go together in bytes {at} to {last} of the members' data"
                    );
                    continue;
                }
                Fault::Data => "data",
                Fault::Parity => "parity",
            };
            known |= slots;
            for slot in each(*slots) {
                let member = row.member(slot);
                let name = self.device_name(member);
                log::warn!(
                    "pool {pool}: {SCRUB}: {name} (member {member}) has wrong {who} in bytes {at} to {last} of its data"
                );
            }
        }
        let mut members = self.members.borrow_mut();
        each(known).for_each(|slot| members[usize::from(row.member(slot))].wrong += 1);
    }
}

/// What a scrub is to do with columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Only what a medium has lost is written again: parity need not be right, of what nobody has written.
    Readable,
    /// They are compared, too.
    Compared,
    /// And what is wrong is written again.
    Repaired,
}

/// What is lost, or cannot be read, is not made of parity that a crash left unknown: it would count as right from then on.
fn computed_unless_doubtful(row: &Row<'_>) -> Lost {
    match row.is_doubtful() {
        true => Lost::Unknown,
        false => Lost::Computed,
    }
}

/// What differs in columns of which all is there.
fn differing_of(row: &Row<'_>, contents: &[Option<Rc<Bounce>>]) -> Vec<Differing> {
    let there = contents.iter().map(|content| content.as_ref().expect("all of them are there"));
    let strips: Vec<&[u8]> = there.map(|bounce| bounce.bytes(0, row.len)).collect();
    differing(&strips, row.slots() - row.data(), 1 << row.view.block_shift)
}

/// What some of a row's columns hold, of which all is there.
fn part_of(contents: &[Option<Rc<Bounce>>], columns: &Range<usize>, spare: &Rc<Spare>) -> Contents {
    let part = |content: &Option<Rc<Bounce>>| {
        let part = spare.take(columns.len());
        let content = content.as_ref().expect("all of them are there");
        part.fill(0, content.bytes(columns.start, columns.len()));
        Some(Rc::new(part))
    };
    contents.iter().map(part).collect()
}

/// The columns that a piece of data is in, and its slot.
pub(super) fn row_of<'a>(view: &'a View, set: &'a Set, piece: &Piece) -> (Row<'a>, usize) {
    let copy = piece.copies.as_slice()[0];
    let strip = u64::from(set.strip_bytes());
    let row = Row::new(view, set, copy.offset / strip, copy.offset % strip, piece.len as usize);
    let slot = (0..row.data()).find(|slot| row.member(*slot) == copy.member);
    (row, slot.expect("a piece of data is on one of them"))
}

/// Whether a member belongs to a set.
fn is_of(set: &Set, member: u16) -> bool {
    (set.first_member()..set.first_member() + set.members()).contains(&member)
}

/// The rows of the members that a piece's stripe is in.
pub(super) fn stripe_window(set: &Set, piece: &Piece) -> Range<u64> {
    let strip = u64::from(set.strip_bytes());
    let start = piece.copies.as_slice()[0].offset / strip * strip;
    start..start + strip
}

/// What of a range is in none of these.
fn uncovered(covered: &[Range<u64>], range: Range<u64>) -> Vec<Range<u64>> {
    covered.iter().fold(vec![range], |left, other| {
        let parts = left.into_iter().flat_map(|part| {
            let before = part.start..part.end.min(other.start);
            let behind = part.start.max(other.end)..part.end;
            [before, behind]
        });
        parts.filter(|part| part.start < part.end).collect()
    })
}
