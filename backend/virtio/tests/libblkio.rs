//! libblkio, a vhost-user-blk client that others wrote: it adds small regions on a live device, and sends a descriptor with
//! REM_MEM_REG.

mod support;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use hawser_block::{BlockSize, DiscardLimits, Geometry, Operation, WriteZeroesLimits};
use std::mem::MaybeUninit;
use std::path::Path;
use support::Served;

fn connect(socket: &Path, queues: i32, queue_size: i32, poll: bool) -> (Blkio, Vec<Blkioq>) {
    let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
    device.set_str("path", socket.to_str().unwrap()).unwrap();
    device.connect().unwrap();
    let (used, unused) =
        if poll { ("num-poll-queues", "num-queues") } else { ("num-queues", "num-poll-queues") };
    device.set_i32(unused, 0).unwrap();
    device.set_i32(used, queues).unwrap();
    device.set_i32("queue-size", queue_size).unwrap();
    let mut started = device.start().unwrap();
    started.queues.append(&mut started.poll_queues);
    (device, started.queues)
}

/// Waits for `count` completions, and gives their requests' numbers and results.
fn wait(queue: &mut Blkioq, count: usize) -> Vec<(usize, i32)> {
    let mut results = Vec::new();
    let mut completions: Vec<MaybeUninit<Completion>> = (0..count).map(|_| MaybeUninit::uninit()).collect();
    while results.len() < count {
        let wanted = count - results.len();
        let got = queue.do_io(&mut completions[..wanted], 1, None, None).unwrap();
        for completion in &completions[..got] {
            // SAFETY: `do_io` filled the first `got`.
            let completion = unsafe { completion.assume_init_ref() };
            results.push((completion.user_data, completion.ret));
        }
    }
    results.sort_unstable();
    results
}

fn fill(region: &MemoryRegion, offset: usize, bytes: &[u8]) {
    assert!(offset + bytes.len() <= region.len);
    let at = std::ptr::with_exposed_provenance_mut::<u8>(region.addr + offset);
    // SAFETY: within the region, which the library has mapped.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
}

fn content(region: &MemoryRegion, offset: usize, len: usize) -> Vec<u8> {
    assert!(offset + len <= region.len);
    let at = std::ptr::with_exposed_provenance::<u8>(region.addr + offset);
    // SAFETY: within the region; nothing writes to it now.
    unsafe { std::slice::from_raw_parts(at, len) }.to_vec()
}

fn pointer(region: &MemoryRegion, offset: usize) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(region.addr + offset)
}

fn full() -> Geometry {
    let mut geometry = Geometry::new(BlockSize::B512, 16384);
    geometry.discard = Some(DiscardLimits { blocks_max: 4096, granularity_blocks: 1, reads_zeroes: true });
    geometry.write_zeroes = Some(WriteZeroesLimits { blocks_max: 4096, may_unmap: true });
    geometry
}

#[test]
fn every_operation_by_interrupt_and_by_polling() {
    for poll in [false, true] {
        let served = Served::new(full());
        let (mut device, mut queues) = connect(&served.socket, 2, 64, poll);
        assert_eq!(device.get_u64("capacity").unwrap(), 16384 * 512);
        assert_eq!(device.get_i32("max-segments").unwrap(), 126);
        assert_eq!(device.get_i32("max-queues").unwrap(), 4);
        // Regions that are added while the rings run, small ones too.
        let region = device.alloc_mem_region(1 << 20).unwrap();
        device.map_mem_region(&region).unwrap();
        for (index, queue) in queues.iter_mut().enumerate() {
            let data: Vec<u8> = (0..65536).map(|at| u8::try_from((at * 7 + index) % 251).unwrap()).collect();
            fill(&region, 0, &data);
            queue.write(4096, pointer(&region, 0), 65536, 1, ReqFlags::empty());
            assert_eq!(wait(queue, 1), [(1, 0)]);
            for part in 0..16usize {
                let start = 4096 + 4096 * part as u64;
                queue.read(start, pointer(&region, 0x8_0000 + 4096 * part), 4096, part, ReqFlags::empty());
            }
            assert_eq!(wait(queue, 16), (0..16).map(|part| (part, 0)).collect::<Vec<_>>());
            assert!(content(&region, 0x8_0000, 65536) == data);
            queue.flush(2, ReqFlags::empty());
            queue.discard(4096, 4096, 3, ReqFlags::empty());
            queue.write_zeroes(8192, 4096, 4, ReqFlags::empty());
            queue.write_zeroes(12288, 4096, 5, ReqFlags::NO_UNMAP);
            assert_eq!(wait(queue, 4), [(2, 0), (3, 0), (4, 0), (5, 0)]);
            queue.read(4096, pointer(&region, 0), 16384, 6, ReqFlags::empty());
            assert_eq!(wait(queue, 1), [(6, 0)]);
            assert!(content(&region, 0, 12288) == vec![0; 12288]);
            assert!(content(&region, 12288, 4096) == data[12288..16384]);
        }
        let zeroes = |unmap| Operation::WriteZeroes { unmap, fua: false };
        let state = served.device.fake.state();
        for right in [(Operation::Discard, 8, 8), (zeroes(true), 16, 8), (zeroes(false), 24, 8)] {
            assert!(state.log.contains(&right), "{right:?}");
        }
    }
}

#[test]
fn regions_come_and_go_while_other_requests_run() {
    let served = Served::new(full());
    let (mut device, mut queues) = connect(&served.socket, 1, 128, false);
    let queue = &mut queues[0];
    let steady = device.alloc_mem_region(1 << 20).unwrap();
    device.map_mem_region(&steady).unwrap();
    for round in 0..50usize {
        for part in 0..20usize {
            let at = 4096 * part;
            fill(&steady, at, &[u8::try_from(round + part).unwrap(); 4096]);
            queue.write(at as u64, pointer(&steady, at), 4096, part, ReqFlags::empty());
        }
        let mut completions: [MaybeUninit<Completion>; 0] = [];
        queue.do_io(&mut completions, 0, None, None).unwrap();
        let region = device.alloc_mem_region(4096 * (1 + round % 3)).unwrap();
        device.map_mem_region(&region).unwrap();
        queue.read(0, pointer(&region, 0), 512, 99, ReqFlags::empty());
        assert_eq!(wait(queue, 21).len(), 21);
        device.unmap_mem_region(&region);
        device.free_mem_region(&region);
        queue.read(4096, pointer(&steady, 0x8_0000), 4096, 1, ReqFlags::empty());
        assert_eq!(wait(queue, 1), [(1, 0)]);
        assert!(content(&steady, 0x8_0000, 4096) == [u8::try_from(round + 1).unwrap(); 4096]);
    }
    assert_eq!(served.disk.queue_counters()[0].mistakes.get(), 0);
}

#[test]
fn a_client_comes_again_with_other_rings() {
    let served = Served::new(full());
    for round in 0..20 {
        let (mut device, mut queues) =
            connect(&served.socket, 1 + round % 4, 4 << (round % 8), round % 2 == 0);
        let region = device.alloc_mem_region(8192).unwrap();
        device.map_mem_region(&region).unwrap();
        for queue in &mut queues {
            queue.read(0, pointer(&region, 0), 4096, 7, ReqFlags::empty());
            assert_eq!(wait(queue, 1), [(7, 0)]);
        }
        drop(queues);
    }
}
