//! Writes of whole stripes, a few at a time: what was just copied, and the parity that was just computed, go on to the members while
//! the cache has them.
//!
//! ```text
//!   1 MiB on RAID 5 of 3 ── 128 KiB of it ── copy ── P ── members ── the next 128 KiB, in the same buffer if the members were fast
//! ```
//!
//! Each part is a request of its own, with its copy and its stripes; the guest's ends with the last of them.
//!
//! Invariants: nothing is awaited between the parts, and they are all of one plan. It is looked at again in one way: what would go to a
//! member that was given up meanwhile, whose abort has been, takes the slow way as a last part.

use super::{Core, Slot, VolumeChannel, parity_of};
use crate::pool::bounce::Bounce;
use crate::pool::coverage;
use crate::pool::resolve::{Plan, Step, Stripe};
use crate::pool::shared::Class;
use hawser_block::{BlockCount, Buffers, Completion, Lba, Outcome, Request, Status, Token};
use hawser_runtime::Slab;
use std::ops::Range;

#[cfg(test)]
mod tests;

/// What a part has, data and parity, unless it is one stripe: with its source, a half of a second-level cache of 512 KiB. As one part 1 MiB
/// went to a RAID 5 at 0.43 times the speed of a RAID 0, in parts of 512 KiB at 0.43, of 256 KiB at 0.6. Requests of simulations are small.
const PART_BYTES: usize = if cfg!(hawser_mutations) { 32 << 10 } else { 256 << 10 };
/// What is copied of each strip before its parity is computed: with few strips the first-level cache has it still. Strips of 64 KiB as a whole took
/// 1.1 times as long, with their way to members in memory.
const COLUMNS_BYTES: usize = 4 << 10;
/// Marks the tokens of parts.
const PART_BIT: u64 = 1 << 62;

/// A request that went out in parts.
pub(super) struct Whole {
    token: Token,
    left: u32,
    outcome: Outcome,
    /// A member has failed a part of it.
    has_failed: bool,
    /// A cache was lost meanwhile, which parts of it that have ended may have been in.
    has_met_loss: bool,
}

impl Whole {
    pub(super) fn has_met_loss(&mut self) {
        self.has_met_loss = true;
    }

    /// Members have failed what has this token: whether it is the first of its request.
    pub(super) fn fails_first(wholes: &mut Slab<Whole>, token: Token) -> bool {
        if token.0 & PART_BIT == 0 {
            return true;
        }
        let whole = wholes.get_mut(key_of(token)).expect("a part ends once");
        !std::mem::replace(&mut whole.has_failed, true)
    }
}

/// Stripes and steps of a plan, by their numbers.
struct Part {
    stripes: Range<usize>,
    steps: Range<usize>,
}

impl VolumeChannel {
    /// The first part that begins with this stripe and step.
    fn part(&self, plan: &Plan, stripe: usize, step: usize) -> Part {
        let (mut end, mut bytes, mut steps) = (stripe, 0, step);
        while let Some(next) = plan.stripes.get(end) {
            let stripes = &parity_of(&self.view, next).stripes;
            let strips = usize::from(stripes.data_strips() + stripes.parities());
            bytes += strips * usize::try_from(stripes.strip_bytes()).expect("a strip is small");
            if end > stripe && bytes > PART_BYTES {
                break;
            }
            (end, steps) = (end + 1, steps + strips);
        }
        Part { stripes: stripe..end, steps: step..steps }
    }

    /// Carries out the plan, which is of whole stripes. They are taken, and what is to be copied is counted.
    pub(super) fn start_stripes(&mut self, request: Request, turn: usize) {
        let plan = std::mem::take(&mut self.plan);
        let since = self.core.shared.joins();
        let mut part = self.part(&plan, 0, 0);
        let is_split = part.stripes.end < plan.stripes.len();
        let token = match is_split {
            // One more, so that it does not end before all are begun.
            true => {
                coverage::count(coverage::Event::InParts);
                let whole = Whole {
                    token: request.token,
                    left: 1,
                    outcome: Ok(()),
                    has_failed: false,
                    has_met_loss: false,
                };
                Token(self.wholes.insert(whole) as u64 | PART_BIT)
            }
            false => request.token,
        };
        let mut copied = request.buffers.len();
        loop {
            if is_split {
                let whole = self.wholes.get_mut(key_of(token)).expect("one is left");
                whole.left += 1;
            }
            self.start_part(&plan, &part, Request { token, ..request }, since);
            if part.stripes.end == plan.stripes.len() {
                break;
            }
            self.submit_lanes();
            let mut ended = std::mem::take(&mut self.ended_early);
            let given_up = self.reap_lanes(&mut ended);
            if !ended.is_empty() {
                self.core.ended.borrow_mut().append(&mut ended);
                self.core.runtime.wake(self.core.user);
            }
            self.ended_early = ended;
            let members = plan.steps[part.steps.end..].iter().fold(0, |all, step| all | 1 << step.member);
            if members & given_up != 0 || !self.are_in_sync(members) {
                let rest = self.give_up(&plan, part.stripes.end, Request { token, ..request });
                copied -= rest.buffers.len();
                let whole = self.wholes.get_mut(key_of(token)).expect("one is left");
                whole.left += 1;
                self.slowly(rest, Class::Degraded);
                break;
            }
            part = self.part(&plan, part.stripes.end, part.steps.end);
        }
        if is_split {
            self.core.end(token, Ok(()));
        }
        self.core.volume.count_copied(copied);
        self.core.place.leave(turn);
        self.plan = plan;
    }

    /// Gives back what a request has taken for its stripes from this one on, which are not written by the plan: they are what is returned.
    fn give_up(&mut self, plan: &Plan, from: usize, request: Request) -> Request {
        let stripes = &plan.stripes[from..];
        for stripe in stripes {
            parity_of(&self.view, stripe).guards.give_back(stripe.row);
        }
        let (start, shift) = (stripes[0].start, self.view.block_shift);
        let len = request.buffers.len() - start as usize;
        self.core.place.end_copy(len);
        Request {
            lba: Lba(request.lba.0 + u64::from(start >> shift)),
            blocks: BlockCount(request.blocks.0 - (start >> shift)),
            buffers: request.buffers.slice(start as usize, len),
            ..request
        }
    }

    fn start_part(&mut self, plan: &Plan, part: &Part, request: Request, since: u64) {
        let stripes = &plan.stripes[part.stripes.clone()];
        let steps = &plan.steps[part.steps.clone()];
        // The plan has all parity behind the whole payload.
        let payload = request.buffers.len();
        let (first, first_parity) = (stripes[0].start as usize, stripes[0].parity as usize);
        let next = plan.stripes.get(part.stripes.end);
        let data_end = next.map_or(payload, |next| next.start as usize);
        let parity_end = next.map_or(payload + plan.parity_bytes as usize, |next| next.parity as usize);
        let len = data_end - first;
        let place = |at: usize| match at < payload {
            true => at - first,
            false => len + at - first_parity,
        };
        let shift = self.view.block_shift;
        let narrow = |bytes: usize| u32::try_from(bytes).expect("a request has at most 4 MiB");
        let piece = Request {
            lba: Lba(request.lba.0 + (first as u64 >> shift)),
            blocks: BlockCount(narrow(len) >> shift),
            buffers: request.buffers.slice(first, len),
            ..request
        };
        let mut copy = self.core.place.spare.take(len + parity_end - first_parity);
        for stripe in stripes {
            self.copy(
                stripe,
                &piece,
                (place(stripe.start as usize), place(stripe.parity as usize)),
                &mut copy,
            );
        }
        let mut list = self.lists.pop().unwrap_or_default();
        list.extend_from_slice(stripes);
        let slot = Slot::new(piece, self.core.place.enter(), narrow(steps.len()));
        let key = self.slots.insert(slot);
        let slot = self.slots.get_mut(key).expect("just inserted");
        for Step { member, offset, start, len } in steps {
            slot.members |= 1 << member;
            let lane = self.lanes[usize::from(*member)].as_mut();
            let lane = lane.expect("plans are made for members that are there");
            lane.begin(&self.core, *member);
            lane.batch.push(Request {
                operation: request.operation,
                lba: Lba(offset >> shift),
                blocks: BlockCount(len >> shift),
                buffers: copy.buffers(place(*start as usize), *len as usize),
                token: Token(key as u64),
            });
        }
        let more = slot.more(&mut self.more, key);
        (more.since, more.copy, more.stripes) = (since, Some(copy), list);
    }

    /// Copies a stripe of the payload and computes its parity.
    fn copy(&self, stripe: &Stripe, request: &Request, (at, p_at): (usize, usize), copy: &mut Bounce) {
        let stripes = &parity_of(&self.view, stripe).stripes;
        let strip = usize::try_from(stripes.strip_bytes()).expect("a strip is small");
        let data = usize::from(stripes.data_strips());
        let q_at = (stripes.parities() == 2).then_some(p_at + strip);
        let payload: [Buffers; crate::parity::DATA_MAX] = std::array::from_fn(|index| match index < data {
            true => request.buffers.slice(at + index * strip, strip),
            false => Buffers::EMPTY,
        });
        for from in (0..strip).step_by(COLUMNS_BYTES) {
            let columns = from..strip.min(from + COLUMNS_BYTES);
            for (index, payload) in payload[..data].iter().enumerate() {
                copy.copy_payload(at + index * strip + from, &payload.slice(from, columns.len()));
            }
            copy.sums((at, strip, data), columns, p_at, q_at);
        }
    }

    /// A request has ended: it is among `ended`, unless it is a part of one that has not.
    pub(super) fn has_ended(
        (wholes, core): (&mut Slab<Whole>, &Core),
        completion: Completion,
        ended: &mut Vec<Completion>,
    ) {
        if completion.token.0 & PART_BIT == 0 {
            return ended.push(completion);
        }
        let key = key_of(completion.token);
        let whole = wholes.get_mut(key).expect("a part ends once");
        whole.left -= 1;
        // The first failure stands, but one that says "given up" says less than any other.
        if completion.outcome.is_err() && matches!(whole.outcome, Ok(()) | Err(Status::Aborted)) {
            whole.outcome = completion.outcome;
        }
        if whole.left == 0 {
            let Whole { token, outcome, has_met_loss, .. } = wholes.remove(key).expect("looked up just now");
            if has_met_loss {
                core.has_lost();
            }
            ended.push(Completion { token, outcome });
        }
    }
}

fn key_of(token: Token) -> usize {
    usize::try_from(token.0 & !PART_BIT).expect("a key of ours")
}
