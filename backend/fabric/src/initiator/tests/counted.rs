//! What is counted of paths: commands, losses, who took over, and how payload was moved.

use super::client::{Ask, Client};
use super::scripted::Scripted;
use super::*;
use crate::initiator::{CacheDoubt, IoPolicy};
use crate::nvme::{NvmeStatus, StatusCode};
use hawser_block::{IoKind, Operation, PathView, Status};

struct Bench {
    // Dropped in this order: the device before its reactor, the targets last.
    client: Client,
    device: Arc<NvmeDevice>,
    _reactor: ReactorThread,
    targets: Vec<Scripted>,
}

fn bench(count: usize, change: impl FnOnce(&mut NvmeConfig)) -> Bench {
    let targets: Vec<Scripted> = (0..count).map(|_| Scripted::start(NQN)).collect();
    for (target, cntlid) in targets.iter().zip(5..) {
        target.state().cntlid = cntlid;
        target.state().controller.cntlid = cntlid;
        target.state().controller.volatile_write_cache = 1;
    }
    let reactor = reactor("host");
    let mut config = config(targets[0].address);
    config.paths = targets.iter().map(|target| super::config(target.address).paths[0].clone()).collect();
    change(&mut config);
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    wait_until("all paths are live", || device.paths().iter().all(|path| path.state == "live"));
    let client = Client::open(&device, reactor.handle());
    Bench { client, device, _reactor: reactor, targets }
}

fn of(numbers: &[(&'static str, u64)], name: &str) -> u64 {
    numbers.iter().find(|(other, _)| *other == name).expect("a number of this name").1
}

fn path(device: &NvmeDevice, index: usize) -> PathView {
    device.paths().swap_remove(index)
}

#[test]
fn commands_and_refusals_are_counted_where_they_went() {
    let mut bench = bench(2, |config| config.policy = IoPolicy::RoundRobin);
    for at in 0..6 {
        assert_eq!(bench.client.run(Ask::read(at * 8, 8, 512)).outcome, Ok(()));
    }
    for index in 0..2 {
        let read = path(&bench.device, index).stats.kind(IoKind::Read);
        assert_eq!((read.requests, read.bytes, read.latency.count()), (3, 3 * 4096, 3), "path {index}");
    }
    for target in &bench.targets {
        target.state().statuses.push_back(NvmeStatus::retryable(StatusCode::INTERNAL_ERROR));
    }
    assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    let sum = |number: &dyn Fn(&PathView) -> u64| bench.device.paths().iter().map(number).sum::<u64>();
    assert!(sum(&|path| of(&path.counters, "retries")) >= 1);
    assert!(sum(&|path| path.stats.failures(Status::Media)) >= 1);
    assert_eq!(bench.device.stats().failures(Status::Media), 0, "the device's user saw none of it");
}

#[test]
fn a_lost_path_is_counted_with_its_cause_and_with_who_took_over() {
    let mut bench = bench(2, |_| {});
    for target in &bench.targets {
        target.state().hold_io = true;
    }
    bench.client.submit(vec![Ask::read(0, 8, 512)]);
    let taken = |bench: &Bench| bench.targets.iter().position(|target| !target.state().log.is_empty());
    wait_until("it has arrived", || taken(&bench).is_some());
    let dead = taken(&bench).unwrap();
    bench.targets[1 - dead].state().hold_io = false;
    bench.targets[dead].state().hold_io = false;
    bench.targets[dead].cut();
    assert_eq!(bench.client.next().outcome, Ok(()));
    wait_until("it is back", || of(&path(&bench.device, dead).counters, "connects") == 2);
    let view = path(&bench.device, dead);
    assert_eq!((of(&view.losses, "closed"), view.losses.iter().map(|(_, count)| count).sum::<u64>()), (1, 1));
    assert_eq!((of(&view.counters, "failovers"), of(&view.counters, "requeued")), (1, 1));
    assert!(of(&view.counters, "connect_attempts") >= 2);
    let other = path(&bench.device, 1 - dead);
    assert_eq!((of(&other.counters, "failovers"), of(&other.counters, "connects")), (0, 1));
    assert!(other.losses.iter().all(|(_, count)| *count == 0));
}

#[test]
fn commands_that_are_never_answered_are_a_loss_of_their_own_kind() {
    let mut bench = bench(1, |config| config.timers.io_timeout = Duration::from_millis(200));
    bench.targets[0].state().hold_io = true;
    bench.client.submit(vec![Ask::read(0, 8, 512)]);
    wait_until("it was given up", || of(&path(&bench.device, 0).losses, "io_timeout") > 0);
    bench.targets[0].state().hold_io = false;
    assert_eq!(bench.client.next().outcome, Ok(()));
    assert_eq!(of(&path(&bench.device, 0).counters, "failovers"), 0, "there is no other path");
}

/// Nothing said how much of what a guest reads is copied on its way.
#[test]
fn large_reads_land_in_place_and_small_ones_are_copied() {
    let mut bench = bench(1, |_| {});
    let numbers = |bench: &Bench| {
        let copied = bench.device.copied_bytes();
        let whole = of(&bench.device.counters(), "received_in_place_bytes");
        (of(&copied, "small_read"), of(&copied, "large_read_start"), whole)
    };
    assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    assert_eq!(numbers(&bench), (4096, 0, 0));
    let len = 512 << 10;
    assert_eq!(bench.client.run(Ask::read(0, len / 512, 512)).outcome, Ok(()));
    let (small, start, in_place) = numbers(&bench);
    assert_eq!((small, start + in_place), (4096, u64::from(len)));
    assert!(in_place > start, "{in_place} in place, {start} copied");
    assert!(
        bench.device.copied_bytes().iter().all(|(name, bytes)| !name.starts_with("digest") || *bytes == 0)
    );
}

#[test]
fn a_cache_of_no_name_is_doubted_once_for_the_same_writes() {
    let mut bench = bench(1, |config| config.on_cache_doubt = CacheDoubt::Trust);
    let doubts = |bench: &Bench| of(&bench.device.counters(), "cache_doubts");
    let come_back = |bench: &Bench, connects: u64| {
        bench.targets[0].cut();
        wait_until("it is back", || of(&path(&bench.device, 0).counters, "connects") == connects);
    };
    come_back(&bench, 2);
    assert_eq!(doubts(&bench), 0, "nothing was written");
    assert_eq!(bench.client.run(Ask::write(0, 8, vec![1; 4096])).outcome, Ok(()));
    for connects in [3, 4] {
        come_back(&bench, connects);
        assert_eq!(doubts(&bench), 1);
    }
    assert_eq!(bench.client.run(Ask::plain(Operation::Flush, 0, 0)).outcome, Ok(()), "it is trusted");
}

#[test]
fn a_policy_is_changed_while_requests_run() {
    let mut bench = bench(2, |_| {});
    let taken = |bench: &Bench| {
        let mut counts: Vec<_> = bench.targets.iter().map(|target| target.state().log.len()).collect();
        counts.sort_unstable();
        counts
    };
    let read = |bench: &mut Bench| {
        for at in 0..4 {
            assert_eq!(bench.client.run(Ask::read(at * 8, 8, 512)).outcome, Ok(()));
        }
    };
    read(&mut bench);
    assert_eq!(taken(&bench), [0, 4]);
    bench.device.set_io_policy("round-robin").unwrap();
    assert_eq!(bench.device.settings()[0], ("io_policy", "round-robin"));
    read(&mut bench);
    assert_eq!(taken(&bench), [2, 6]);
    let error = bench.device.set_io_policy("best").unwrap_err();
    assert!(error.contains("want numa, round-robin or queue-depth"), "{error}");
}
