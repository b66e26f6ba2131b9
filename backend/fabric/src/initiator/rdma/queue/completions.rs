//! What has completed: sends, binds and invalidations of ours, answers of the controller's, and the ends that follow.

use super::{KeyState, RdmaError, RdmaQueue, Slot, kind};
use crate::initiator::queue::{Answer, SLOTS_MAX};
use crate::nvme::Cqe;
use crate::nvme::bytes::{low16, low32};
use crate::rdma::KeyPolicy;
use crate::simulated::is_broken;
use hawser_verbs_abi::{STATUS_FLUSHED, SendRequest, WorkCompletion, operation};

impl RdmaQueue {
    /// Takes a completion.
    ///
    /// # Errors
    /// When the connection cannot go on.
    pub(in super::super) fn handle(&mut self, completion: &WorkCompletion) -> Result<(), RdmaError> {
        let cid = low16(low32(completion.user));
        let failed = completion.status != 0;
        match completion.user >> 32 {
            kind::RECEIVE => {
                self.receives_posted = self.receives_posted.saturating_sub(1);
                if !failed {
                    return self.received(cid, completion);
                }
            }
            kind::SEND => {
                self.sends_posted = self.sends_posted.saturating_sub(1);
                if let Some(slot) = self.slot_of(cid) {
                    slot.sending = false;
                    // A bind before it went well, or it would have had a completion of its own.
                    if std::mem::take(&mut slot.binding) {
                        self.sends_posted = self.sends_posted.saturating_sub(1);
                    }
                    if !failed {
                        self.settle(cid);
                    }
                }
            }
            kind::BIND => {
                self.sends_posted = self.sends_posted.saturating_sub(1);
                if let Some(slot) = self.slot_of(cid) {
                    slot.binding = false;
                }
            }
            kind::INVALIDATE => {
                self.sends_posted = self.sends_posted.saturating_sub(1);
                if let Some(slot) = self.slot_of(cid)
                    && !failed
                {
                    slot.key = KeyState::Dead;
                    self.settle(cid);
                }
            }
            _ => {}
        }
        if failed {
            let first = !std::mem::replace(&mut self.over, true);
            if first || completion.status != STATUS_FLUSHED {
                return Err(RdmaError::Work { status: completion.status, vendor: completion.vendor });
            }
        }
        Ok(())
    }

    fn slot_of(&mut self, cid: u16) -> Option<&mut Slot> {
        let slot = self.slots.get_mut(usize::from(cid & (SLOTS_MAX - 1)))?;
        (slot.taken && slot.cid == cid).then_some(slot)
    }

    /// An answer came into this receive's memory.
    fn received(&mut self, index: u16, completion: &WorkCompletion) -> Result<(), RdmaError> {
        let wrong = |what: String| Err(RdmaError::Protocol(what));
        if index >= self.layout.receives || completion.len as usize != Cqe::LEN {
            self.over = true;
            return wrong(format!("an answer has {} bytes, want {}", completion.len, Cqe::LEN));
        }
        let mut bytes = [0; Cqe::LEN];
        // SAFETY: a completion's place within our memory; the receive that wrote to it has ended, and the next one is posted after
        // this.
        unsafe {
            let from = self.area.start.add(self.layout.completion(index));
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
        let cqe = Cqe::from_bytes(&bytes);
        let policy = self.limits.policy;
        let Some(slot) = self.slot_of(cqe.cid).filter(|slot| slot.answer.is_none()) else {
            self.over = true;
            return wrong(format!("CID is {:#x}, want one of a command that is outstanding", cqe.cid));
        };
        if completion.has_invalidated {
            if policy != KeyPolicy::Window
                || slot.key != KeyState::Alive
                || slot.name != completion.invalidated
            {
                let (name, got) = (slot.name, completion.invalidated);
                self.over = true;
                return wrong(format!(
                    "the answer invalidates key {got:#x}, want the command's own, {name:#x}"
                ));
            }
            slot.key = KeyState::Dead;
        }
        slot.answer = Some(Answer { status: cqe.status, result: cqe.result });
        self.sq_head = cqe.sq_head;
        if let Some(flow) = &mut self.limits.flow
            && !flow.answered(cqe.sq_head)
        {
            self.limits.flow = None;
        }
        if !self.over && !is_broken("rdma_forget_receives") {
            self.receive(index);
        }
        self.settle(cqe.cid);
        Ok(())
    }

    /// Ends a command of which everything has come, or asks for the end of its key.
    fn settle(&mut self, cid: u16) {
        let over = self.over;
        let Some(slot) = self.slot_of(cid).filter(|slot| slot.answer.is_some()) else { return };
        if is_broken("rdma_end_before_key_is_dead") && !slot.sending {
            self.end(cid & (SLOTS_MAX - 1));
            return;
        }
        if slot.key == KeyState::Alive && !over {
            slot.key = KeyState::Dying;
            let key = slot.name;
            self.sends.push(SendRequest {
                user: kind::INVALIDATE << 32 | u64::from(cid),
                operation: operation::INVALIDATE,
                key,
                ..SendRequest::NONE
            });
            return;
        }
        if slot.key == KeyState::Dead && (!slot.sending || is_broken("rdma_end_before_sent")) {
            self.end(cid & (SLOTS_MAX - 1));
        }
    }

    /// A command is over: nothing names its memory any more.
    pub(super) fn end(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let Some(answer) = slot.answer.take() else { unreachable!("a command ends with its answer") };
        slot.taken = false;
        slot.key = KeyState::Dead;
        (slot.sending, slot.binding) = (false, false);
        if let Some(chunk) = slot.chunk.take() {
            if !slot.copy_back.is_empty() && answer.status.is_success() {
                // SAFETY: the command has ended: nobody writes to the chunk any more, which has as many bytes. The request has
                // not, and is a read.
                unsafe { slot.copy_back.copy_from(self.area.start.add(self.layout.chunk(chunk))) };
            }
            self.chunks.give_back(chunk);
        }
        self.free.push(index);
        let parent = &mut self.parents[usize::from(slot.parent)];
        parent.left -= 1;
        if parent.answer.status.is_success() {
            parent.answer = answer;
        }
        if !answer.status.is_success() {
            // It has failed: the rest of it is not asked for.
            parent.issued = true;
        }
        if parent.left == 0 && parent.issued {
            parent.taken = false;
            let (user, answer, index) = (parent.user, parent.answer, slot.parent);
            self.waiting.retain(|waiting| *waiting != index);
            self.ended.push((user, answer));
            self.free_parents.push(index);
        }
        if let Some(flow) = &mut self.limits.flow
            && self.free.len() == self.slots.len()
        {
            flow.all_answered();
        }
        self.pump();
    }
}
