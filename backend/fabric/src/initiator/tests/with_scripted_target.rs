//! Against a target that holds, refuses, lies and changes.

use super::client::{Ask, Client};
use super::scripted::Scripted;
use super::*;
use crate::nvme::command::io_opcode;
use crate::nvme::identify::VENDOR_MARK;
use crate::nvme::{NvmeStatus, StatusCode};
use hawser_block::{Operation, Status};

pub(super) struct Bench {
    // Dropped in this order: the device before its reactor, the target last.
    client: Client,
    device: Arc<NvmeDevice>,
    _reactor: ReactorThread,
    target: Scripted,
}

fn bench(target: Scripted, change: impl FnOnce(&mut NvmeConfig)) -> Bench {
    let reactor = reactor("host");
    let mut config = config(target.address);
    change(&mut config);
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let client = Client::open(&device, reactor.handle());
    Bench { client, device, _reactor: reactor, target }
}

fn data(seed: u8, blocks: usize) -> Vec<u8> {
    (0..blocks * 512).map(|at| seed ^ at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect()
}

fn opcodes(target: &Scripted) -> Vec<u8> {
    target.state().log.iter().map(|(_, sqe)| sqe.opcode).collect()
}

/// A write and a read that the target has taken and not answered, when its connections are cut.
fn lose_a_write_and_a_read(bench: &mut Bench) {
    bench.target.state().hold_io = true;
    bench.client.submit(vec![Ask::write(0, 8, data(1, 8)), Ask::read(8, 8, 512)]);
    wait_until("both have arrived", || bench.target.state().log.len() == 2);
    bench.target.state().hold_io = false;
    bench.target.cut();
}

#[test]
fn elsewhere_a_write_of_unknown_outcome_waits_until_the_old_association_is_quiet() {
    let mut bench = bench(Scripted::start(NQN), |config| {
        config.timers.keep_alive_tmo = Duration::from_millis(1200);
        config.timers.quiesce_tmo = Duration::from_millis(300);
    });
    lose_a_write_and_a_read(&mut bench);
    let read = bench.client.next();
    assert_eq!((read.token, read.outcome), (1, Ok(())), "the read does not wait");
    // Later writes wait behind the one whose outcome is unknown.
    bench.client.submit(vec![Ask::write(0, 8, data(2, 8))]);
    assert_eq!((bench.client.next().token, bench.client.next().token), (0, 2));
    assert_eq!(
        opcodes(&bench.target),
        [io_opcode::WRITE, io_opcode::READ, io_opcode::READ, io_opcode::WRITE, io_opcode::WRITE]
    );
    let state = bench.target.state();
    let waited = state.log[3].0 - state.log[0].0;
    assert!(waited >= Duration::from_millis(1500), "{waited:?}");
    assert!(state.disk[..4096] == data(2, 8), "in the order in which they came");
}

#[test]
fn where_connect_waits_for_earlier_associations_a_write_is_sent_again_at_once() {
    let target = Scripted::start(NQN);
    target.state().controller.vendor[..8].copy_from_slice(&VENDOR_MARK);
    // An hour would be too long for this test.
    let mut bench = bench(target, |config| config.timers.quiesce_tmo = Duration::from_secs(3600));
    lose_a_write_and_a_read(&mut bench);
    assert_eq!((bench.client.next().outcome, bench.client.next().outcome), (Ok(()), Ok(())));
    assert_eq!(
        opcodes(&bench.target),
        [io_opcode::WRITE, io_opcode::READ, io_opcode::WRITE, io_opcode::READ],
        "in the order in which they came"
    );
}

#[test]
fn after_mere_silence_that_promise_is_not_enough() {
    let target = Scripted::start(NQN);
    target.state().controller.vendor[..8].copy_from_slice(&VENDOR_MARK);
    let mut bench = bench(target, |config| {
        config.timers.keep_alive_tmo = Duration::from_millis(700);
        config.timers.quiesce_tmo = Duration::from_millis(300);
        config.timers.io_timeout = Duration::from_millis(100);
    });
    bench.target.state().deaf = true;
    bench.target.state().hold_io = true;
    bench.client.submit(vec![Ask::write(0, 8, data(1, 8))]);
    wait_until("it is given up", || bench.target.state().associations > 1);
    bench.target.state().hold_io = false;
    assert_eq!(bench.client.next().outcome, Ok(()));
    let state = bench.target.state();
    let waited = state.log[1].0 - state.log[0].0;
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
}

/// An end that we made ourselves, over the target's breach of the protocol, counted as one that the target knows of.
#[test]
fn an_end_of_our_own_making_proves_nothing_unless_the_controller_can_be_reset() {
    for deaf in [true, false] {
        let target = Scripted::start(NQN);
        target.state().controller.vendor[..8].copy_from_slice(&VENDOR_MARK);
        let mut bench = bench(target, |config| {
            config.timers.keep_alive_tmo = Duration::from_millis(1500);
            config.timers.quiesce_tmo = Duration::from_secs(if deaf { 0 } else { 3600 });
        });
        bench.target.state().deaf = deaf;
        bench.target.state().garbage = Some(vec![0xff; 64]);
        assert_eq!(bench.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
        let state = bench.target.state();
        assert_eq!(state.disables, 1);
        let waited = state.log[1].0 - state.log[0].0;
        assert!(!deaf || waited >= Duration::from_secs(3), "{waited:?}");
    }
}

/// A target came back without a cache, and the flush of what its cache had held before was answered without asking it.
#[test]
fn a_flush_is_owed_also_to_a_controller_that_has_no_cache_any_more() {
    let target = Scripted::start(NQN);
    target.state().controller.volatile_write_cache = 1;
    let mut bench = bench(target, |_| {});
    assert_eq!(bench.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
    bench.target.state().controller.volatile_write_cache = 0;
    bench.target.cut();
    wait_until("it is reached again", || bench.target.state().associations == 2);
    wait_ready(&bench.device);
    assert!(bench.device.geometry().unwrap().volatile_cache);
    assert_eq!(bench.client.run(Ask::plain(Operation::Flush, 0, 0)).outcome, Ok(()));
    assert_eq!(opcodes(&bench.target), [io_opcode::WRITE, io_opcode::FLUSH]);
}

/// A request that waited for a target whose limits were smaller when it came back was sent as it was.
#[test]
fn requests_that_have_become_too_large_go_in_pieces() {
    let mut bench = bench(Scripted::start(NQN), |_| {});
    let content = data(5, 40);
    bench.target.state().disk[..content.len()].copy_from_slice(&content);
    bench.target.state().hold_io = true;
    bench.client.submit(vec![Ask::read(0, 40, 512)]);
    wait_until("it has arrived", || bench.target.state().log.len() == 1);
    bench.target.state().hold_io = false;
    // 2^1 pages of 4 KiB, 16 blocks.
    bench.target.state().controller.transfer_size_max = 1;
    bench.target.cut();
    let told = bench.client.next();
    assert_eq!(told.outcome, Ok(()));
    assert!(told.data == content);
    let ranges: Vec<_> =
        bench.target.state().log.iter().map(|(_, sqe)| (sqe.lba(), sqe.block_count())).collect();
    assert_eq!(ranges, [(0, 40), (0, 16), (16, 16), (32, 8)]);
    // Whoever has not heard of it yet may still ask for as much as before.
    assert_eq!(bench.client.run(Ask::read(0, 40, 512)).outcome, Ok(()));
    assert_eq!(bench.device.stats().kind(hawser_block::IoKind::Read).requests, 2);
}

#[test]
#[should_panic(expected = "a channel is dropped when it is idle")]
fn a_channel_that_is_dropped_with_a_request_in_it_is_a_bug() {
    struct Nothing;
    impl hawser_runtime::Source for Nothing {
        fn poll(&mut self, _: &hawser_runtime::Runtime, _: &mut Vec<hawser_runtime::Event>) {}
    }
    let mut reactor = hawser_runtime::Reactor::new(ReactorConfig::default()).unwrap();
    let runtime = reactor.runtime().clone();
    let target = Scripted::start(NQN);
    let device = NvmeDevice::open(config(target.address), &[runtime.handle()]).unwrap();
    reactor.step();
    let id = runtime.add_source(std::rc::Rc::new(std::cell::RefCell::new(Nothing)));
    let mut channel = device.channel(&runtime, id);
    let flush = hawser_block::Request {
        operation: Operation::Flush,
        lba: hawser_block::Lba(0),
        blocks: hawser_block::BlockCount(0),
        buffers: hawser_block::Buffers::EMPTY,
        token: hawser_block::Token(1),
    };
    channel.submit(&mut vec![flush]);
    drop(channel);
}

#[test]
fn after_a_predecessor_the_first_writes_wait_and_reads_do_not() {
    let mut bench = bench(Scripted::start(NQN), |config| {
        config.had_predecessor = true;
        config.timers.keep_alive_tmo = Duration::from_millis(700);
        config.timers.quiesce_tmo = Duration::from_millis(300);
    });
    bench.client.submit(vec![Ask::write(0, 8, data(1, 8)), Ask::read(8, 8, 512)]);
    assert_eq!((bench.client.next().token, bench.client.next().token), (1, 0));
}

#[test]
fn an_aborted_write_of_unknown_outcome_ends_when_it_can_do_no_harm_any_more() {
    let mut bench = bench(Scripted::start(NQN), |config| {
        config.timers.keep_alive_tmo = Duration::from_millis(700);
        config.timers.quiesce_tmo = Duration::from_millis(300);
    });
    bench.target.state().hold_io = true;
    let begun = Instant::now();
    bench.client.submit(vec![Ask::write(0, 8, data(1, 8)), Ask::read(8, 8, 512)]);
    wait_until("both have arrived", || bench.target.state().log.len() == 2);
    bench.client.abort();
    let read = bench.client.next();
    assert_eq!((read.token, read.outcome), (1, Err(Status::Aborted)));
    let write = bench.client.next();
    assert_eq!((write.token, write.outcome), (0, Err(Status::Aborted)));
    assert!(begun.elapsed() >= Duration::from_secs(1));
    bench.target.state().hold_io = false;
    assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
}

#[test]
fn growth_that_an_event_tells_of_is_followed() {
    let mut bench = bench(Scripted::start(NQN), |_| {});
    let before = bench.device.geometry().unwrap().blocks;
    assert_eq!(bench.client.run(Ask::read(before, 1, 512)).outcome, Err(Status::Invalid));
    for blocks in [before + 1, 4096] {
        wait_until("an event is asked for", || bench.target.has_event_request());
        bench.target.state().namespace.size = blocks;
        bench.target.tell_change();
        wait_until("the growth is seen", || bench.device.geometry().unwrap().blocks == blocks);
        wait_until("the lane knows", || bench.device.state() == DeviceState::Ready);
        assert_eq!(bench.client.run(Ask::read(blocks - 1, 1, 512)).outcome, Ok(()));
    }
    assert_eq!(bench.target.state().associations, 1);
}

#[test]
fn growth_while_the_target_was_away_is_followed() {
    let bench = bench(Scripted::start(NQN), |_| {});
    bench.target.state().namespace.size = 4096;
    bench.target.cut();
    wait_until("the growth is seen", || bench.device.geometry().unwrap().blocks == 4096);
}

#[test]
fn a_device_that_shrank_is_refused_with_both_sizes() {
    let mut bench = bench(Scripted::start(NQN), |_| {});
    wait_until("an event is asked for", || bench.target.has_event_request());
    bench.target.state().namespace.size = 1024;
    bench.target.tell_change();
    wait_until("the device has failed", || bench.device.state() == DeviceState::Failed);
    wait_until("both sizes are told", || {
        bench.device.trouble().contains("the device shrank: its size was 1048576 bytes and is 524288")
    });
    assert_eq!(bench.device.geometry().unwrap().blocks, 2048, "it only ever grows");
    assert_eq!(bench.client.run(Ask::read(0, 1, 512)).outcome, Err(Status::Path));
    bench.target.state().namespace.size = 2048;
    wait_ready(&bench.device);
    assert_eq!(bench.client.run(Ask::read(0, 1, 512)).outcome, Ok(()));
}

#[test]
fn a_refusal_that_may_pass_is_tried_again_and_one_that_does_not_is_told() {
    let target = Scripted::start(NQN);
    target.state().controller.retry_delays = [1, 0, 0];
    let mut bench = bench(target, |_| {});
    let behavior =
        bench.target.state().host_behavior.clone().expect("it was told that delays are waited for");
    assert_eq!((behavior.len(), behavior[0]), (512, 1));
    let passing = NvmeStatus { retry_delay: 1, ..NvmeStatus::retryable(StatusCode::COMMAND_INTERRUPTED) };
    bench.target.state().statuses.extend([passing, NvmeStatus::retryable(StatusCode::NAMESPACE_NOT_READY)]);
    assert_eq!(bench.client.run(Ask::write(0, 1, data(1, 1))).outcome, Ok(()));
    assert_eq!(bench.target.state().log.len(), 3);

    bench.target.state().statuses.push_back(NvmeStatus::fatal(StatusCode::UNRECOVERED_READ_ERROR));
    assert_eq!(bench.client.run(Ask::read(0, 1, 512)).outcome, Err(Status::Media));
    assert_eq!(bench.target.state().log.len(), 4);
    let final_word = NvmeStatus { retry_delay: 1, ..NvmeStatus::fatal(StatusCode::INTERNAL_PATH_ERROR) };
    bench.target.state().statuses.push_back(final_word);
    assert_eq!(bench.client.run(Ask::read(0, 1, 512)).outcome, Err(Status::Path));
    assert_eq!(bench.target.state().log.len(), 5);

    let never = NvmeStatus { retry_delay: 1, ..NvmeStatus::retryable(StatusCode::INTERNAL_ERROR) };
    bench.target.state().statuses.extend([never; 6]);
    assert_eq!(bench.client.run(Ask::read(0, 1, 512)).outcome, Err(Status::Media));
    assert_eq!(bench.target.state().log.len(), 11, "once, and five times more");
    assert_eq!(bench.device.stats().failures(Status::Media), 2);
}

#[test]
fn garbage_ends_the_association_and_nothing_is_lost() {
    let mut bench = bench(Scripted::start(NQN), |_| {});
    for (round, garbage) in
        [vec![0xff; 64], vec![5, 0, 24, 0, 25, 0, 0, 0], [7, 0, 24, 24, 28, 0, 0, 0].repeat(4)]
            .into_iter()
            .enumerate()
    {
        bench.target.state().garbage = Some(garbage);
        assert_eq!(bench.client.run(Ask::read(8, 8, 512)).outcome, Ok(()));
        assert_eq!(bench.target.state().associations, round + 2);
    }
    let counters = bench.device.counters();
    assert!(counters.contains(&("protocol_errors", 3)), "{counters:?}");
    assert!(counters.contains(&("digest_errors", 0)), "{counters:?}");
}

#[test]
fn a_target_that_breaks_the_protocol_is_told_of_by_field() {
    let target = Scripted::start(NQN);
    let mut bench = bench(target, |config| config.timers.reconnect_delay = Duration::from_secs(3600));
    // Nothing is tried again in this test's time.
    bench.target.state().garbage = Some(vec![5, 0, 24, 0, 25, 0, 0, 0]);
    let seen = Arc::new(std::sync::Mutex::new(String::new()));
    let (note, device) = (Arc::clone(&seen), Arc::downgrade(&bench.device));
    bench.device.subscribe(Box::new(move || {
        let trouble = device.upgrade().map(|device| device.trouble()).unwrap_or_default();
        if !trouble.is_empty() {
            *note.lock().unwrap() = trouble;
        }
    }));
    assert_eq!(bench.client.run(Ask::read(8, 8, 512)).outcome, Ok(()));
    let seen = seen.lock().unwrap();
    assert!(seen.contains("the target broke the protocol: CapsuleResp: PLEN is 0x19"), "{seen}");
}

#[test]
fn an_unanswered_keep_alive_ends_the_association() {
    let bench = bench(Scripted::start(NQN), |config| {
        config.timers.keep_alive_tmo = Duration::from_millis(200);
    });
    bench.target.state().deaf = true;
    wait_until("it is given up", || bench.target.state().associations > 1);
    bench.target.state().deaf = false;
    wait_ready(&bench.device);
}

#[test]
fn a_command_that_is_not_answered_ends_the_association() {
    let mut bench = bench(Scripted::start(NQN), |config| {
        config.timers.io_timeout = Duration::from_millis(300);
    });
    bench.target.state().hold_io = true;
    bench.client.submit(vec![Ask::read(0, 8, 512)]);
    wait_until("it is given up", || bench.target.state().associations > 1);
    wait_until("what was not sent is thrown away", || bench.target.state().resets > 0);
    bench.target.state().hold_io = false;
    assert_eq!(bench.client.next().outcome, Ok(()));
}

/// That bytes keep coming is no answer: one of 24 bytes would take five seconds.
#[test]
fn a_target_that_sends_a_byte_now_and_then_is_given_up_as_one_that_is_silent() {
    for (keep_alive, io, cause) in [(0, 300, "io_timeout"), (200, 3_600_000, "keep_alive")] {
        let mut bench = bench(Scripted::start(NQN), |config| {
            config.timers.keep_alive_tmo = Duration::from_millis(keep_alive);
            config.timers.io_timeout = Duration::from_millis(io);
            config.timers.quiesce_tmo = Duration::from_millis(100);
        });
        bench.target.state().drips = true;
        if cause == "io_timeout" {
            bench.client.submit(vec![Ask::read(0, 8, 512)]);
        }
        wait_until("it is given up", || {
            bench.device.paths()[0].losses.iter().any(|(name, count)| *name == cause && *count > 0)
        });
        bench.target.state().drips = false;
        if cause == "io_timeout" {
            assert_eq!(bench.client.next().outcome, Ok(()));
        }
        wait_ready(&bench.device);
    }
}

#[test]
fn a_target_that_insists_on_flow_control_gets_it() {
    let target = Scripted::start(NQN);
    target.state().refuse_attributes = true;
    let mut bench = bench(target, |_| {});
    assert_eq!(bench.client.run(Ask::write(0, 1, data(3, 1))).outcome, Ok(()));
    // It never moves SQHD: it is not waited for, or the queue would be full for ever.
    bench.client.submit((0..200).map(|at| Ask::read(at, 1, 512)).collect());
    assert!((0..200).all(|_| bench.client.next().outcome == Ok(())));
    assert_eq!(bench.target.state().associations, 1);
}

#[test]
fn what_makes_a_device_unreachable_is_told() {
    let told = |change: &dyn Fn(&Scripted), expected: &str| {
        let (target, reactors) = (Scripted::start(NQN), [reactor("h0"), reactor("h1")]);
        change(&target);
        let handles = [reactors[0].handle().clone(), reactors[1].handle().clone()];
        let device = NvmeDevice::open(config(target.address), &handles);
        let device = device.unwrap();
        wait_until(expected, || device.trouble().contains(expected));
        assert_eq!(device.state(), DeviceState::Connecting);
        drop(device);
    };
    told(
        &|target| target.state().queues = 1,
        "the controller grants 1 I/O queues, and 2 reactors need one each",
    );
    told(&|target| target.state().namespace.size = 0, "namespace 1: the namespace is not active");
    told(
        &|target| target.state().namespace.formats[0].metadata_bytes = 8,
        "namespace 1: Identify Namespace: LBAF.MS is 0x8, not 0: metadata is not supported",
    );
    told(&|target| target.state().controller.controller_type = 2, "is a discovery service, not a subsystem");
}

#[test]
fn a_device_without_a_cache_answers_a_flush_and_one_with_a_cache_sends_it() {
    let mut plain = bench(Scripted::start(NQN), |_| {});
    assert_eq!(plain.client.run(Ask::plain(Operation::Flush, 0, 0)).outcome, Ok(()));
    assert_eq!(opcodes(&plain.target), [0u8; 0]);
    let target = Scripted::start(NQN);
    target.state().controller.volatile_write_cache = 1;
    let mut cached = bench(target, |_| {});
    assert_eq!(cached.client.run(Ask::plain(Operation::Flush, 0, 0)).outcome, Ok(()));
    assert_eq!(opcodes(&cached.target), [io_opcode::FLUSH]);
}

/// A target that has not answered Connect to an I/O queue yet.
fn connecting(keep_alive_tmo: Duration) -> (Arc<NvmeDevice>, ReactorThread, Scripted) {
    let target = Scripted::start(NQN);
    target.state().hold_connects = true;
    let reactor = reactor("host");
    let mut config = config(target.address);
    config.timers.keep_alive_tmo = keep_alive_tmo;
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_until("an I/O queue is being connected", || target.state().io_connects == 1);
    (device, reactor, target)
}

/// None was sent before the path was ready: a target that took its time with I/O queues dropped the association over it.
#[test]
fn an_association_is_kept_alive_while_its_queues_connect() {
    let (device, _reactor, target) = connecting(Duration::from_millis(600));
    wait_until("keep-alives come", || target.state().keep_alives == 3);
    target.state().hold_connects = false;
    wait_ready(&device);
    let before = {
        let state = target.state();
        assert_eq!((state.associations, state.io_connects), (1, 1));
        state.keep_alives
    };
    wait_until("they go on", || target.state().keep_alives > before + 1);
}

/// Queues that were being connected were waited for, up to a minute, when the association was over already.
#[test]
fn queues_that_connect_are_given_up_with_their_admin_queue() {
    let (device, _reactor, target) = connecting(Duration::from_secs(10));
    let since = std::time::Instant::now();
    target.cut_first();
    wait_until("it is tried again", || target.state().associations == 2);
    assert!(since.elapsed() < Duration::from_secs(5));
    target.state().hold_connects = false;
    wait_ready(&device);
}

/// The same, where nothing ends the connection.
#[test]
fn queues_that_connect_are_given_up_when_the_controller_falls_silent() {
    let (device, _reactor, target) = connecting(Duration::from_millis(600));
    target.state().deaf = true;
    wait_until("it is tried again", || target.state().associations == 2);
    target.state().deaf = false;
    target.state().hold_connects = false;
    wait_ready(&device);
}
