//! What was about to be changed in stripes when the process before us ended: read from the members' parity logs, and put in place before anything is read.
//!
//! All of it are whole values, so that doing it again does no harm. An entry that no member has whole was not begun in place.

use super::found::Found;
use super::random_uuid;
use crate::format::parity_log::HEADER_PAGES;
use crate::format::{PAGE_BYTES, ParityEntry, ParityHeader, Uuid};
use crate::pool::bounce::Bounce;
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::owner::Owner;
use crate::pool::stripes::{Entries, read_entries};
use crate::pool::{PoolError, coverage};
use crate::raid::{Mode, Parity, Set};
use crate::simulated::is_broken;
use hawser_block::Status;
use std::rc::Rc;
use std::sync::Arc;

/// A set's parity log, put together from its members.
pub(super) struct SetLog {
    set: Arc<Set>,
    header: ParityHeader,
    entries: Entries,
}

impl SetLog {
    /// Something stands in it, and lost members' data is computed from what may be half written.
    pub(super) fn is_half_written(&self) -> bool {
        !self.entries.is_empty() && !self.set.are_all_in_sync()
    }

    /// Whole stripes of this member's were being written without it: nobody could say what a member had of them, so all of them stay, and parity is made
    /// of what there is.
    pub(super) fn is_needed(&self, member: u16) -> bool {
        let first = self.set.first_member();
        self.header.unlogged && (first..first + self.set.members()).contains(&member)
    }

    async fn read_entries(
        &mut self,
        lanes: &Rc<Lanes>,
        leaf: &Leaf,
        pool: &Uuid,
        wrong: &mut Vec<String>,
    ) -> Result<(), Status> {
        read_entries(lanes, leaf, (&self.set, pool), &self.header, &mut self.entries, wrong).await
    }
}

/// The logs of all sets with parity. What was closed has nothing in them.
///
/// # Errors
/// A set that is not complete and was in use, and its log cannot be read by enough of the members: some stripes may be half written, and nobody could
/// tell which.
pub(super) async fn read(
    lanes: &Rc<Lanes>,
    found: &Found,
    was_closed: bool,
    accept_loss: bool,
) -> Result<Vec<SetLog>, PoolError> {
    let mut logs = Vec::new();
    for set in found.array.sets().iter().filter(|set| set.parity().is_some()) {
        let mut log =
            SetLog { set: Arc::clone(set), header: ParityHeader::default(), entries: Entries::new() };
        let mut headers = Vec::new();
        for leaf in leaves_in_sync(found, set) {
            if let Some(header) = read_header(lanes, &leaf, set, &found.book.pool_uuid).await {
                log.header = [log.header, header]
                    .into_iter()
                    .max_by_key(|header| (header.number, header.released))
                    .unwrap_or_default();
                headers.push(leaf);
            }
        }
        if !was_closed {
            let mut readable = 0;
            for leaf in &headers {
                let read = log.read_entries(lanes, leaf, &found.book.pool_uuid, &mut Vec::new()).await;
                readable += u16::from(read.is_ok());
            }
            let is_lacking = set.members() - readable > set.level().parities();
            let why = match (is_lacking, log.header.unlogged) {
                (true, _) => format!(
                    "the log of stripes that were being written can be read on {readable} of its members only"
                ),
                (false, true) => "whole stripes were being written, which are not in the log".to_owned(),
                (false, false) => String::new(),
            };
            let is_right = !is_broken("half_written_opened");
            if !why.is_empty() && !set.are_all_in_sync() && !accept_loss && is_right {
                let lost: Vec<String> = (0..set.members())
                    .filter(|member| set.mode(*member) != Mode::InSync)
                    .map(|member| (set.first_member() + member).to_string())
                    .collect();
                return Err(PoolError::Conflict(format!(
                    "pool {} was not closed and lacks members {}, and {why}: want the missing members back, or --accept-loss: then blocks \
                     of theirs that share a stripe with what was written last, and was not flushed, may read as garbage",
                    found.book.name,
                    lost.join(", ")
                )));
            }
        }
        logs.push(log);
    }
    Ok(logs)
}

fn leaves_in_sync(found: &Found, set: &Set) -> Vec<Leaf> {
    let members = (0..set.members()).filter(|member| set.mode(*member) == Mode::InSync);
    let leaves = members.filter_map(|member| {
        let place = &found.members[usize::from(set.first_member() + member)];
        place.as_ref().map(|(leaf, _)| leaf.clone())
    });
    leaves.collect()
}

fn parity_of(set: &Set) -> &Parity {
    set.parity().expect("only of sets with parity")
}

/// What is wrong with the logs of all sets with parity, and how many entries they have that are needed.
pub(super) async fn check(lanes: &Rc<Lanes>, found: &Found) -> (Vec<String>, u64) {
    let (mut faults, mut needed) = (Vec::new(), 0);
    let (pool, was_closed) = (&found.book.pool_uuid, found.book.opened_by.is_none());
    for set in found.array.sets().iter().filter(|set| set.parity().is_some()) {
        let mut log =
            SetLog { set: Arc::clone(set), header: ParityHeader::default(), entries: Entries::new() };
        for leaf in leaves_in_sync(found, set) {
            for page in 0..u64::from(HEADER_PAGES) {
                match read_header_page(lanes, &leaf, set, pool, page).await {
                    Ok(header) => {
                        log.header = [log.header, header]
                            .into_iter()
                            .max_by_key(|header| (header.number, header.released))
                            .unwrap_or_default();
                    }
                    Err(what) => {
                        faults
                            .push(format!("{}: page {page} of its parity log's header {what}", leaf.name()));
                    }
                }
            }
        }
        for leaf in leaves_in_sync(found, set) {
            let mut wrong = Vec::new();
            if let Err(status) = log.read_entries(lanes, &leaf, pool, &mut wrong).await {
                wrong.push(format!("cannot be read: {}", status.name()));
            }
            faults.extend(wrong.into_iter().map(|what| format!("{}: its parity log {what}", leaf.name())));
        }
        let (first, last) = (log.entries.keys().next(), log.entries.keys().next_back());
        if let (true, Some(first), Some(last)) = (was_closed, first, last) {
            faults.push(format!(
                "the parity log of members {} to {} still needs entries {first} to {last}, though the pool was closed",
                set.first_member(),
                set.first_member() + set.members() - 1
            ));
        }
        needed += log.entries.len() as u64;
    }
    (faults, needed)
}

async fn read_header(lanes: &Rc<Lanes>, leaf: &Leaf, set: &Set, pool: &Uuid) -> Option<ParityHeader> {
    let mut best: Option<ParityHeader> = None;
    for page in 0..u64::from(HEADER_PAGES) {
        let found = read_header_page(lanes, leaf, set, pool, page).await.ok();
        if best.map(|best| best.number) < found.map(|found| found.number) {
            best = found;
        }
    }
    best
}

/// One of the two places of a header, or what is wrong with it.
async fn read_header_page(
    lanes: &Rc<Lanes>,
    leaf: &Leaf,
    set: &Set,
    pool: &Uuid,
    page: u64,
) -> Result<ParityHeader, String> {
    let offset = parity_of(set).log_offset + page * PAGE_BYTES as u64;
    let bytes = lanes.read_bytes(leaf, offset, PAGE_BYTES).await;
    let bytes = bytes.map_err(|status| format!("cannot be read: {}", status.name()))?;
    let header = ParityHeader::decode(bytes.bytes(0, PAGE_BYTES), pool);
    header.ok_or_else(|| "is torn, or none of this pool's".to_owned())
}

/// Puts everything in place that the logs have, and begins new ones. Before the first read.
///
/// # Errors
/// Who does not take it, and cannot be done without.
pub(super) async fn put_in_place(owner: &Rc<Owner>, logs: Vec<SetLog>) -> Result<(), PoolError> {
    let cannot = |status| owner.failed("stripes that were being written cannot be put right", status);
    for log in logs {
        let SetLog { set, header, entries } = log;
        // Until parity is right again. Before anybody can be put out: who is, is lacking from then on.
        let is_doubtful = header.unlogged && set.are_all_in_sync() && set.unsynced.any();
        if is_doubtful && !is_broken("doubts_forgotten") {
            set.unsynced.iter_set().for_each(|region| parity_of(&set).doubtful.set(region));
        }
        let is_used = !entries.is_empty() && !is_broken("parity_replayed_unflushed");
        if is_broken("parity_log_ended_before_replay") {
            begin_anew(owner, &set, &header, is_doubtful).await.map_err(cannot)?;
        }
        let mut in_order: Vec<_> = entries.values().collect();
        if is_broken("parity_log_replayed_backwards") {
            in_order.reverse();
        }
        for (entry, payload) in in_order {
            if is_broken("parity_log_not_replayed") {
                break;
            }
            replay(owner, &set, entry, payload).await?;
            coverage::count(coverage::Event::StripesReplayed);
        }
        if is_used {
            owner.flush_members().await.map_err(cannot)?;
        }
        begin_anew(owner, &set, &header, is_doubtful).await.map_err(cannot)?;
    }
    Ok(())
}

/// None of the entries that are there counts any more.
async fn begin_anew(
    owner: &Rc<Owner>,
    set: &Arc<Set>,
    header: &ParityHeader,
    is_doubtful: bool,
) -> Result<(), Status> {
    {
        let mut ring = parity_of(set).ring();
        ring.key = random_uuid(&owner.runtime);
        ring.header = (header.number, 0);
        ring.is_unlogged_known = is_doubtful;
    }
    // In both places: nobody looks for the old ones again.
    owner.write_parity_header(set, 0).await?;
    owner.write_parity_header(set, 0).await
}

async fn replay(owner: &Rc<Owner>, set: &Set, entry: &ParityEntry, payload: &[u8]) -> Result<(), PoolError> {
    let view = owner.view();
    let len = entry.len as usize;
    let offset = view.data_offset + entry.row * u64::from(set.strip_bytes()) + u64::from(entry.within);
    let since = owner.shared.joins();
    let places = (0..set.members()).filter(|place| entry.places >> place & 1 != 0);
    for (place, bytes) in places.zip(payload.chunks_exact(len)) {
        let member = set.first_member() + place;
        let leaf = view.leaves[usize::from(member)].as_ref();
        let Some(leaf) = leaf.filter(|_| set.mode(place) == Mode::InSync) else { continue };
        let bounce = Rc::new(Bounce::holding(bytes));
        if let Err(status) = owner.lanes.write(leaf, offset, &bounce, 0, len, false).await {
            let reported = owner.report_whatever(1 << member, status, since).await;
            reported.map_err(|status| {
                let what = format!(
                    "stripes that were being written cannot be put right on {} (member {member})",
                    leaf.name()
                );
                owner.failed(&what, status)
            })?;
        }
    }
    Ok(())
}
