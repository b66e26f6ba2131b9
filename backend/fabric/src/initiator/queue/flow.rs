//! SQ flow control (base 3.3.2.1.2), with a target that does not switch it off: what of the queue it has taken, by its own count.
#![forbid(unsafe_code)]

/// A submission queue as its controller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SqFlow {
    entries: u16,
    head: u16,
    tail: u16,
    /// Answers since the head has moved.
    still: u16,
}

impl SqFlow {
    /// Of `entries` entries, after a Connect that was answered with the head at `sq_head`.
    pub(crate) fn new(entries: u16, sq_head: u16) -> SqFlow {
        let head = sq_head % entries.max(1);
        SqFlow { entries: entries.max(2), head, tail: head, still: 0 }
    }

    /// How many commands the controller has not taken out of the queue, as far as it has said.
    fn queued(&self) -> u16 {
        if self.tail >= self.head { self.tail - self.head } else { self.entries - (self.head - self.tail) }
    }

    /// How many more may be sent: one entry stays free, or a full queue would look like an empty one.
    pub(crate) fn room(&self) -> usize {
        usize::from(self.entries - 1 - self.queued())
    }

    /// A command takes an entry.
    pub(crate) fn submitted(&mut self) {
        self.tail = self.after(self.tail, 1);
    }

    /// A command was answered with SQHD. False: what the controller says of its queue is not worth anything, as it has answered
    /// half a queue of commands and not moved the head past any.
    pub(crate) fn answered(&mut self, sq_head: u16) -> bool {
        let moved =
            if sq_head >= self.head { sq_head - self.head } else { self.entries - (self.head - sq_head) };
        if sq_head < self.entries && moved > 0 && moved <= self.queued() {
            self.head = sq_head;
            self.still = 0;
            return true;
        }
        self.still += 1;
        self.still <= self.entries / 2
    }

    /// A read has ended with its data, without an SQHD. It should not be so under flow control; who does it all the same has
    /// taken that command.
    pub(crate) fn answered_with_data(&mut self) {
        if self.queued() > 0 {
            self.head = self.after(self.head, 1);
        }
    }

    /// Every command is answered, and so was taken.
    pub(crate) fn all_answered(&mut self) {
        self.head = self.tail;
    }

    fn after(&self, at: u16, steps: u16) -> u16 {
        (at + steps) % self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_free_again_when_the_head_has_passed_it_and_not_before() {
        let mut flow = SqFlow::new(4, 3);
        for room in [3, 2, 1] {
            assert_eq!(flow.room(), room);
            flow.submitted();
        }
        assert_eq!(flow.room(), 0);
        // Answered, and the head is where it was; then it moves past two, over the end of the queue.
        assert!(flow.answered(3));
        assert_eq!(flow.room(), 0);
        assert!(flow.answered(1));
        assert_eq!(flow.room(), 2);
        // Past what was ever sent, and past the queue's end: not taken over.
        for wrong in [3, 0, 4, 0xffff] {
            let mut flow = flow;
            flow.answered(wrong);
            assert_eq!(flow.room(), 2, "{wrong}");
        }
        flow.all_answered();
        assert_eq!(flow.room(), 3);
    }

    #[test]
    fn who_never_moves_the_head_is_not_waited_for() {
        let mut flow = SqFlow::new(32, 0);
        for _ in 0..31 {
            flow.submitted();
        }
        let believed = (0..31).take_while(|_| flow.answered(0)).count();
        assert_eq!(believed, 16);
    }
}
