//! What a controller makes up, and what is ours to end: the queue without a device.

use super::*;
use hawser_runtime::buffers::AlignedBuffer;
use hawser_verbs_abi::STATUS_FLUSHED;

const DEPTH: u16 = 4;

struct Lab {
    queue: RdmaQueue,
    memory: AlignedBuffer,
    layout: Layout,
    /// Of all requests; never longer than it was made for, so that they stay in place.
    iovecs: Vec<libc::iovec>,
}

fn lab(policy: KeyPolicy) -> Lab {
    let layout = Layout::new(DEPTH, true);
    let memory = AlignedBuffer::new(layout.len());
    let windows: Vec<_> = (1..=u32::from(DEPTH))
        .map(|index| (std::ptr::without_provenance_mut(index as usize), index << 8))
        .collect();
    let limits =
        RdmaLimits { in_capsule_max: 0, segments_max: 9, policy, runs_max: plan::RUNS_MAX, flow: None };
    let area =
        Area { start: memory.as_ptr(), region: std::ptr::null_mut(), keys: Keys { local: 1, remote: 2 } };
    let mut queue = RdmaQueue::new(layout, limits, area, &windows);
    let receives = queue.posts().0.len();
    queue.posted(receives, 0);
    Lab { queue, memory, layout, iovecs: Vec::with_capacity(512) }
}

impl Lab {
    /// A read of a block into memory that is not registered: by way of a chunk, and a window. Its identifier, and its key.
    fn read(&mut self, buffer: &mut [u8; 512]) -> (u16, u32) {
        assert!(self.iovecs.len() < self.iovecs.capacity());
        self.iovecs.push(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 512 });
        // SAFETY: the buffer and the iovec outlive the request, in each test.
        let buffers = unsafe { Buffers::new(&raw const self.iovecs[self.iovecs.len() - 1], 1, 512) };
        let sqe = Sqe::new(io_opcode::READ, 1, Sgl::NONE);
        self.queue.submit(sqe, Transfer::ToHost(buffers), 77);
        let sends = self.queue.posts().1;
        let bound: Vec<u32> =
            sends.iter().filter(|send| send.operation == operation::BIND).map(|send| send.key).collect();
        let count = sends.len();
        let cid = low16(low32(sends[count - 1].user));
        self.queue.posted(0, count);
        (cid, bound.first().copied().unwrap_or(0))
    }

    fn sent(&mut self, cid: u16) -> Result<(), RdmaError> {
        self.queue.handle(&WorkCompletion { user: kind::SEND << 32 | u64::from(cid), ..WorkCompletion::NONE })
    }

    /// An answer to `cid` comes into the first receive.
    fn answer(&mut self, cid: u16, len: u32, invalidated: Option<u32>) -> Result<(), RdmaError> {
        let cqe = Cqe { result: 0, sq_head: 1, sq_id: 0, cid, status: NvmeStatus::SUCCESS };
        let bytes = cqe.to_bytes();
        // SAFETY: a completion's place within the memory.
        unsafe {
            let place = self.memory.as_ptr().add(self.layout.completion(0));
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len());
        }
        self.queue.handle(&WorkCompletion {
            user: kind::RECEIVE << 32,
            len,
            invalidated: invalidated.unwrap_or(0),
            has_invalidated: invalidated.is_some(),
            ..WorkCompletion::NONE
        })
    }

    fn ended(&mut self) -> usize {
        self.queue.ended().count()
    }
}

const LEN: u32 = 16;

#[test]
fn answers_that_are_made_up_end_the_connection() {
    let mut buffer = [0; 512];
    type Answer = fn(u16, u32) -> (u16, u32, Option<u32>);
    let cases: [(&str, Answer); 5] = [
        ("CID is", |cid, key| (cid ^ 1, LEN, Some(key))),
        ("CID is", |cid, key| (cid.wrapping_add(1 << SLOT_BITS), LEN, Some(key))),
        ("has 15 bytes, want 16", |cid, key| (cid, 15, Some(key))),
        ("invalidates key", |cid, key| (cid, LEN, Some(key + 1))),
        ("invalidates key", |cid, _| (cid, LEN, Some(0))),
    ];
    for (want, made_up) in cases {
        let mut lab = lab(KeyPolicy::Window);
        let (cid, key) = lab.read(&mut buffer);
        lab.sent(cid).unwrap();
        let (cid, len, invalidated) = made_up(cid, key);
        match lab.answer(cid, len, invalidated) {
            Err(RdmaError::Protocol(said)) => assert!(said.contains(want), "{said}"),
            other => panic!("{want}: {other:?}"),
        }
        assert_eq!((lab.ended(), lab.queue.room()), (0, 0), "{want}");
        assert_eq!(lab.queue.drain(), [(77, true)], "{want}");
    }
    // And where there are no windows, nothing is to be invalidated.
    let mut lab = lab(KeyPolicy::Region);
    let (cid, _) = lab.read(&mut buffer);
    assert!(matches!(lab.answer(cid, LEN, Some(2)), Err(RdmaError::Protocol(_))));
}

#[test]
fn an_answer_that_comes_twice_ends_the_connection() {
    let mut buffer = [0; 512];
    let mut lab = lab(KeyPolicy::Window);
    let (cid, key) = lab.read(&mut buffer);
    lab.sent(cid).unwrap();
    lab.answer(cid, LEN, Some(key)).unwrap();
    assert_eq!(lab.ended(), 1);
    assert!(matches!(lab.answer(cid, LEN, Some(key)), Err(RdmaError::Protocol(_))));
}

/// In whatever order they come: the answer, the end of the send, and the end of the key.
#[test]
fn a_request_ends_when_its_answer_its_send_and_its_key_have() {
    let mut buffer = [0; 512];
    for remote in [true, false] {
        for sent_first in [true, false] {
            let mut lab = lab(KeyPolicy::Window);
            let (cid, key) = lab.read(&mut buffer);
            if sent_first {
                lab.sent(cid).unwrap();
            }
            assert_eq!(lab.ended(), 0);
            lab.answer(cid, LEN, remote.then_some(key)).unwrap();
            if !remote {
                let (receives, sends) = lab.queue.posts();
                assert_eq!((receives.len(), sends.len(), sends[0].operation), (1, 1, operation::INVALIDATE));
                assert_eq!(sends[0].key, key);
                lab.queue.posted(1, 1);
                assert_eq!(lab.ended(), 0, "its key is alive");
                let user = kind::INVALIDATE << 32 | u64::from(cid);
                lab.queue.handle(&WorkCompletion { user, ..WorkCompletion::NONE }).unwrap();
            }
            if !sent_first {
                assert_eq!(lab.ended(), 0, "its send has not completed");
                lab.sent(cid).unwrap();
            }
            assert_eq!(lab.ended(), 1);
        }
    }
}

#[test]
fn what_is_flushed_is_counted_and_what_was_answered_has_ended() {
    let mut buffer = [0; 512];
    let mut lab = lab(KeyPolicy::Window);
    let (cid, _) = lab.read(&mut buffer);
    lab.answer(cid, LEN, None).unwrap();
    lab.queue.end_posting();
    let flushed = |user| WorkCompletion { user, status: STATUS_FLUSHED, ..WorkCompletion::NONE };
    let mut is_last = lab.queue.counter();
    // The bind went well, which is not told; the send did not. One of the receives has brought the answer, and was not posted again.
    assert!(!is_last(&flushed(kind::SEND << 32 | u64::from(cid))));
    for index in 1..lab.layout.receives {
        let last = is_last(&flushed(kind::RECEIVE << 32 | u64::from(index)));
        assert_eq!(last, index == lab.layout.receives - 1);
    }
    lab.queue.end_answered();
    assert_eq!((lab.ended(), lab.queue.drain().len()), (1, 0));
}

/// Nothing is allocated for a command: what is kept of them has the room that it was made with, at full depth too.
#[test]
fn nothing_grows_at_full_depth() {
    let mut buffers = [[0; 512]; DEPTH as usize];
    let mut lab = lab(KeyPolicy::Window);
    let rooms = |queue: &RdmaQueue| {
        let lists = [queue.sends.capacity(), queue.receives.capacity(), queue.segments.capacity()];
        let others = [queue.ended.capacity(), queue.free.capacity(), queue.free_parents.capacity()];
        (lists, others, queue.waiting.capacity())
    };
    let before = rooms(&lab.queue);
    for _ in 0..100 {
        let under_way: Vec<_> = buffers.iter_mut().map(|buffer| lab.read(buffer)).collect();
        assert_eq!(lab.queue.room(), 0);
        for (cid, key) in &under_way {
            lab.sent(*cid).unwrap();
            lab.answer(*cid, LEN, Some(*key)).unwrap();
            let receives = lab.queue.posts().0.len();
            lab.queue.posted(receives, 0);
        }
        assert_eq!(lab.ended(), under_way.len());
    }
    assert_eq!(rooms(&lab.queue), before);
}
