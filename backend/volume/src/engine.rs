//! The volume as a device, and the channel that carries plans out.

use crate::plan::{self, Plan};
use hawser_block::{
    Channel, Completion, Device, DeviceState, DiscardLimits, Geometry, Outcome, Request, StatsSet, Status,
    Token, WriteZeroesLimits, channel,
};
use hawser_runtime::{Runtime, Slab, SourceId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A device made of members: today of one, whole.
pub struct Volume {
    name: String,
    member: Arc<dyn Device>,
    read_only: bool,
    stats: Arc<StatsSet>,
    /// Raised whenever the member says that it has changed.
    changes: Arc<AtomicU64>,
}

impl Volume {
    /// The whole of `member`, under the disk's name.
    #[must_use]
    pub fn whole(name: String, member: Arc<dyn Device>, read_only: bool) -> Volume {
        let changes = Arc::<AtomicU64>::default();
        let raised = Arc::downgrade(&changes);
        member.subscribe(Box::new(move || {
            if let Some(changes) = raised.upgrade() {
                changes.fetch_add(1, Ordering::Release);
            }
        }));
        Volume { name, member, read_only, stats: Arc::default(), changes }
    }
}

impl Device for Volume {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        let member = self.member.geometry()?;
        let transfer_blocks_max = plan::TRANSFER_BYTES_MAX >> member.block_size.shift();
        Some(Geometry {
            transfer_blocks_max,
            read_only: self.read_only || member.read_only,
            discard: member.discard.map(|limits| DiscardLimits {
                blocks_max: plan::offered(limits.blocks_max, limits.granularity_blocks),
                ..limits
            }),
            write_zeroes: member.write_zeroes.map(|limits| WriteZeroesLimits {
                blocks_max: plan::offered(limits.blocks_max, 1),
                ..limits
            }),
            ..member
        })
    }

    fn quiesce_time(&self) -> std::time::Duration {
        self.member.quiesce_time()
    }

    fn has_unknown_writes(&self) -> bool {
        self.member.has_unknown_writes()
    }

    fn has_left_behind(&self) -> bool {
        self.member.has_left_behind()
    }

    fn state(&self) -> DeviceState {
        self.member.state()
    }

    fn trouble(&self) -> String {
        self.member.trouble()
    }

    fn uuid(&self) -> [u8; 16] {
        self.member.uuid()
    }

    fn leaves_payload(&self) -> bool {
        self.member.leaves_payload()
    }

    fn cache_identity(&self) -> Option<[u8; 16]> {
        self.member.cache_identity()
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.member.subscribe(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn channel::Channel> {
        Box::new(VolumeChannel {
            runtime: runtime.clone(),
            user,
            device: Arc::clone(&self.member),
            member: self.member.channel(runtime, user),
            changes: Arc::clone(&self.changes),
            seen_changes: self.changes.load(Ordering::Acquire),
            geometry: self.member.geometry().expect("a channel is opened once the geometry is known"),
            read_only: self.read_only,
            split: Slab::with_capacity(16),
            pieces: Vec::with_capacity(64),
            refused: Vec::with_capacity(64),
            ended: Vec::with_capacity(64),
        })
    }

    /// The volume's own layer adds nothing to time: the disk and the member keep the numbers.
    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }
}

struct Split {
    token: Token,
    pieces_left: u32,
    outcome: Outcome,
}

struct VolumeChannel {
    runtime: Runtime,
    user: SourceId,
    device: Arc<dyn Device>,
    member: Box<dyn Channel>,
    /// The member's, as of `seen_changes`.
    geometry: Geometry,
    changes: Arc<AtomicU64>,
    seen_changes: u64,
    read_only: bool,
    split: Slab<Split>,
    /// Member requests of the batch that are pieces.
    pieces: Vec<Request>,
    /// Ended without a member.
    refused: Vec<Completion>,
    /// The member's ends, on their way through.
    ended: Vec<Completion>,
}

impl VolumeChannel {
    /// Looks at the member again if it has said that it changed.
    fn refresh(&mut self) {
        let changes = self.changes.load(Ordering::Acquire);
        if changes != self.seen_changes {
            self.seen_changes = changes;
            self.geometry = self.device.geometry().unwrap_or(self.geometry);
        }
    }
}

impl Channel for VolumeChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.refresh();
        if batch.iter().all(|request| plan::is_plain(request, &self.geometry, self.read_only)) {
            self.member.submit(batch);
            return;
        }
        let refused_before = self.refused.len();
        batch.retain(|request| match plan::resolve(request, &self.geometry, self.read_only) {
            Plan::Whole => true,
            Plan::Pieces(count) => {
                assert!(request.token.0 & Token::VOLUME_BIT == 0, "volumes do not nest");
                let split = Split { token: request.token, pieces_left: count, outcome: Ok(()) };
                let token = Token(self.split.insert(split) as u64 | Token::VOLUME_BIT);
                self.pieces
                    .extend((0..count).map(|index| plan::piece(request, &self.geometry, index, token)));
                false
            }
            Plan::Refused(status) => {
                self.refused.push(Completion { token: request.token, outcome: Err(status) });
                false
            }
        });
        if self.refused.len() > refused_before {
            self.runtime.wake(self.user);
        }
        if !batch.is_empty() {
            self.member.submit(batch);
        }
        if !self.pieces.is_empty() {
            self.member.submit(&mut self.pieces);
        }
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.refused);
        if self.split.is_empty() {
            self.member.reap(ended);
            return;
        }
        self.member.reap(&mut self.ended);
        for completion in self.ended.drain(..) {
            if completion.token.0 & Token::VOLUME_BIT == 0 {
                ended.push(completion);
            } else if let Some(whole) = end_piece(&mut self.split, completion) {
                ended.push(whole);
            }
        }
    }

    fn is_working(&self) -> bool {
        self.member.is_working()
    }

    fn abort(&mut self) {
        self.member.abort();
    }

    fn leave(&mut self) {
        self.member.leave();
    }
}

/// Counts one piece down; gives the end of the whole request when it was the last.
fn end_piece(splits: &mut Slab<Split>, piece: Completion) -> Option<Completion> {
    let key = usize::try_from(piece.token.0 & !Token::VOLUME_BIT).ok();
    let key = key.filter(|key| splits.get(*key).is_some()).expect("a piece ends once");
    let split = splits.get_mut(key).expect("looked up just now");
    split.pieces_left -= 1;
    // The first failure stands, but one that says "given up" says less than any other.
    if piece.outcome.is_err() && matches!(split.outcome, Ok(()) | Err(Status::Aborted)) {
        split.outcome = piece.outcome;
    }
    if split.pieces_left > 0 {
        return None;
    }
    let split = splits.remove(key).expect("looked up just now");
    Some(Completion { token: split.token, outcome: split.outcome })
}
