//! One namespace by two paths, to two scripted targets.

use super::client::{Ask, Client};
use super::scripted::Scripted;
use super::*;
use crate::initiator::{CacheDoubt, IoPolicy};
use crate::nvme::ana::{AnaState, CMIC_ANA};
use crate::nvme::command::io_opcode;
use crate::nvme::cross_reset::ControllerInstance;
use crate::nvme::identify::{IdentifyNamespace, NamespaceIds, OAES_ANA_CHANGE, VENDOR_MARK};
use crate::nvme::vendor::Vendor;
use crate::nvme::{NvmeStatus, StatusCode};
use hawser_block::{Operation, Status};

const HOUR: Duration = Duration::from_secs(3600);

struct Bench {
    // Dropped in this order: the device before its reactor, the targets last.
    client: Client,
    device: Arc<NvmeDevice>,
    _reactor: ReactorThread,
    targets: [Scripted; 2],
}

fn targets() -> [Scripted; 2] {
    let targets = [Scripted::start(NQN), Scripted::start(NQN)];
    for (target, cntlid) in targets.iter().zip([5, 6]) {
        let mut state = target.state();
        state.cntlid = cntlid;
        state.controller.cntlid = cntlid;
        state.namespace.ana_group = 1;
    }
    targets
}

fn bench(targets: [Scripted; 2], change: impl FnOnce(&mut NvmeConfig)) -> Bench {
    let reactor = reactor("host");
    let mut config = config(targets[0].address);
    config.paths.push(super::config(targets[1].address).paths[0].clone());
    change(&mut config);
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    wait_all_live(&device);
    let client = Client::open(&device, reactor.handle());
    Bench { client, device, _reactor: reactor, targets }
}

fn wait_all_live(device: &NvmeDevice) {
    wait_until("all paths are live", || device.paths().iter().all(|path| path.state == "live"));
}

fn data(seed: u8, blocks: usize) -> Vec<u8> {
    (0..blocks * 512).map(|at| seed ^ at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect()
}

impl Bench {
    fn commands(&self) -> [usize; 2] {
        [0, 1].map(|path| self.targets[path].state().log.len())
    }

    /// Submits a write and a read that one target takes and does not answer; says which.
    fn hold_a_write_and_a_read(&mut self) -> usize {
        for target in &self.targets {
            target.state().hold_io = true;
        }
        self.client.submit(vec![Ask::write(0, 8, data(1, 8)), Ask::read(8, 8, 512)]);
        wait_until("both have arrived", || self.commands().contains(&2));
        let taken = self.commands().iter().position(|count| *count == 2).expect("one path is taken");
        self.targets[1 - taken].state().hold_io = false;
        taken
    }

    /// Ends a target for good.
    fn kill(&mut self, path: usize) {
        self.targets[path] = Scripted::start(NQN);
    }
}

/// CIU and CIRN of a controller, and that it resets others.
fn with_cross_resets(target: &Scripted, random: u64) {
    let mut state = target.state();
    state.controller.instance_uniquifier = 9;
    state.controller.instance_random = random;
    state.controller.cross_resets_max = 4;
}

#[test]
fn reads_move_at_once_and_writes_when_the_lost_paths_commands_must_have_ended() {
    let targets = targets();
    for target in &targets {
        target.state().controller.vendor[..8].copy_from_slice(&VENDOR_MARK);
    }
    let mut bench = bench(targets, |config| {
        config.timers.keep_alive_tmo = Duration::from_millis(1000);
        config.timers.quiesce_tmo = Duration::from_millis(500);
    });
    let dead = bench.hold_a_write_and_a_read();
    let arrived = bench.targets[dead].state().log[0].0;
    bench.kill(dead);
    let read = bench.client.next();
    assert_eq!((read.token, read.outcome), (1, Ok(())), "the read does not wait");
    assert_eq!(bench.device.state(), DeviceState::Ready);
    // Writes elsewhere on the disk do not wait; what the held write may still change does, behind it.
    let elsewhere = bench.client.submit(vec![Ask::write(100, 8, data(3, 8)), Ask::write(4, 8, data(2, 8))]);
    assert_eq!(bench.client.next().token, elsewhere);
    // The good path is lost and returns: that says nothing of the dead one.
    bench.targets[1 - dead].cut();
    assert_eq!((bench.client.next().token, bench.client.next().token), (0, elsewhere + 1));
    let state = bench.targets[1 - dead].state();
    assert!(state.log.iter().all(|(_, sqe)| sqe.opcode == 1 || sqe.opcode == 2));
    let again = state.log.iter().find(|(_, sqe)| sqe.opcode == 1 && sqe.lba() == 0).expect("it was sent");
    let waited = again.0 - arrived;
    assert!(waited >= Duration::from_millis(2500), "{waited:?}");
    assert!(state.disk[..2048] == data(1, 8)[..2048] && state.disk[2048..6144] == data(2, 8));
}

#[test]
fn a_lost_controller_is_reset_through_the_other_path_and_writes_go_on() {
    let targets = targets();
    with_cross_resets(&targets[0], 100);
    with_cross_resets(&targets[1], 101);
    // An hour would be too long for this test.
    let mut bench = bench(targets, |config| config.timers.quiesce_tmo = HOUR);
    let dead = bench.hold_a_write_and_a_read();
    bench.kill(dead);
    assert_eq!((bench.client.next().outcome, bench.client.next().outcome), (Ok(()), Ok(())));
    let (cntlid, random) = if dead == 0 { (5, 100) } else { (6, 101) };
    let resets = bench.targets[1 - dead].state().resets_of_others.clone();
    assert_eq!(resets, [ControllerInstance { cntlid, uniquifier: 9, random }]);
}

#[test]
fn what_a_killed_process_left_behind_is_reset_by_the_one_after_it() {
    what_was_left_is_reset(true);
}

/// The process after a killed one could not reach the target, and was ended in order. The one after that took no notice of what
/// both had known: its writes could be overtaken by those of the killed one.
#[test]
fn what_a_killed_process_left_behind_is_reset_also_when_another_has_ended_in_order_since() {
    what_was_left_is_reset(false);
}

fn what_was_left_is_reset(had_predecessor: bool) {
    let folder = Folder::new("record");
    let file = folder.file();
    let targets = targets();
    with_cross_resets(&targets[0], 100);
    with_cross_resets(&targets[1], 101);
    let first = bench(targets, |config| config.record = Some(file.clone()));
    let left = std::fs::read(&file).unwrap();
    let Bench { client, device, targets, .. } = first;
    drop((client, device));
    wait_until("an orderly end leaves nothing", || {
        std::fs::read_to_string(&file).unwrap().lines().count() == 1
    });
    // As if it had been killed before. In another file: a thread may be about to write this one once more.
    let file = file.with_extension("left");
    std::fs::write(&file, left).unwrap();
    for target in &targets {
        target.state().controller.instance_random += 10;
        target.state().controller.cntlid += 10;
    }
    let mut second = bench(targets, |config| {
        config.had_predecessor = had_predecessor;
        config.record = Some(file.clone());
        config.timers.quiesce_tmo = HOUR;
    });
    let outcome = second.client.run(Ask::write(0, 8, data(1, 8))).outcome;
    assert_eq!(outcome, Ok(()));
    let reset: Vec<_> =
        second.targets.iter().flat_map(|target| target.state().resets_of_others.clone()).collect();
    for (cntlid, random) in [(5, 100), (6, 101)] {
        assert!(reset.contains(&ControllerInstance { cntlid, uniquifier: 9, random }), "{reset:?}");
    }
}

#[test]
fn a_path_to_another_namespace_is_refused_by_name_and_does_not_disturb() {
    let targets = targets();
    targets[1].state().ids.uuid = [0xab; 16];
    let reactor = reactor("host");
    let mut config = config(targets[0].address);
    config.paths.push(super::config(targets[1].address).paths[0].clone());
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_until("one is live and one has failed", || {
        let mut states: Vec<_> = device.paths().iter().map(|path| path.state).collect();
        states.sort_unstable();
        states == ["failed", "live"]
    });
    assert_eq!(device.state(), DeviceState::Ready);
    let told = device.trouble();
    assert!(told.contains("the namespace is another: its UUID was") && told.contains("127.0.0.1:"), "{told}");
    let mut client = Client::open(&device, reactor.handle());
    assert_eq!(client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    drop((client, device, reactor));
}

/// The pair of targets with a path to each, of which the second's namespace appears when the first is in use.
fn one_after_the_other(targets: &[Scripted; 2]) -> (ReactorThread, Arc<NvmeDevice>) {
    let second = std::mem::take(&mut targets[1].state().namespace.size);
    let reactor = reactor("host");
    let mut config = config(targets[0].address);
    config.paths.push(super::config(targets[1].address).paths[0].clone());
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    wait_until("the second is asked", || device.trouble().contains("the namespace is not active"));
    targets[1].state().namespace.size = second;
    (reactor, device)
}

/// A second path that was larger counted as growth: the guest saw a size that the first path did not have.
#[test]
fn a_second_path_that_differs_in_a_name_its_size_or_its_format_is_refused_by_name() {
    type Change = fn(&mut IdentifyNamespace, &mut NamespaceIds);
    let cases: [(Change, &str); 6] = [
        (|_, ids| ids.uuid = [0xab; 16], "its UUID was 09090909-0909-0909-0909-090909090909 and is abab"),
        (|_, ids| ids.nguid = [0xab; 16], "its NGUID was 08080808080808080808080808080808 and is abab"),
        (|_, ids| ids.eui64 = [0xab; 8], "its EUI64 was 0707070707070707 and is abababab"),
        (|namespace, _| namespace.size = 4096, "its size is 2097152 bytes here and 1048576 on the others"),
        (|namespace, _| namespace.size = 1024, "its size is 524288 bytes here and 1048576 on the others"),
        (|namespace, _| *namespace = IdentifyNamespace::plain(2048, 12), "was 512 and is 4096"),
    ];
    for (change, told) in cases {
        let targets = targets();
        for target in &targets {
            target.state().ids =
                NamespaceIds { uuid: [9; 16], nguid: [8; 16], eui64: [7; 8], command_set: 0 };
        }
        {
            let state = &mut *targets[1].state();
            change(&mut state.namespace, &mut state.ids);
        }
        let (reactor, device) = one_after_the_other(&targets);
        wait_until(told, || device.trouble().contains(told));
        wait_until("it has failed", || device.paths()[1].state == "failed");
        assert_eq!((device.paths()[0].state, device.state()), ("live", DeviceState::Ready));
        assert_eq!(device.geometry().unwrap().blocks, 2048);
        let mut client = Client::open(&device, reactor.handle());
        assert_eq!(client.run(Ask::read(2047, 1, 512)).outcome, Ok(()));
        assert_eq!(client.run(Ask::read(2048, 1, 512)).outcome, Err(Status::Invalid));
        drop((client, device, reactor));
    }
}

/// Paths of a namespace that has grown learn it one after the other: the first to know made it large for the guest, whose
/// requests the other refused.
#[test]
fn a_device_has_grown_when_all_its_paths_say_so() {
    let bench = bench(targets(), |_| {});
    let size = || bench.device.geometry().unwrap().blocks;
    wait_until("events are asked for", || bench.targets.iter().all(Scripted::has_event_request));
    bench.targets[0].state().namespace.size = 4096;
    bench.targets[0].tell_change();
    wait_until("it is asked for the next", || bench.targets[0].has_event_request());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(size(), 2048);
    assert!(bench.device.paths().iter().all(|path| path.state == "live"));
    // The second says nothing by itself; the next word of the first has it asked.
    bench.targets[1].state().namespace.size = 3000;
    bench.targets[0].tell_change();
    wait_until("the smaller counts", || size() == 3000);
    bench.targets[1].state().namespace.size = 4096;
    bench.targets[1].tell_change();
    wait_until("both have grown", || size() == 4096);
}

#[test]
fn growth_that_a_lost_path_did_not_know_of_is_followed_and_the_path_is_refused_until_it_does() {
    let bench = bench(targets(), |_| {});
    let size = || bench.device.geometry().unwrap().blocks;
    wait_until("events are asked for", || bench.targets.iter().all(Scripted::has_event_request));
    bench.targets[0].state().namespace.size = 4096;
    bench.targets[0].tell_change();
    wait_until("it is asked for the next", || bench.targets[0].has_event_request());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(size(), 2048);
    bench.targets[1].state().namespace.size = 0;
    bench.targets[1].cut();
    wait_until("the only path counts", || size() == 4096);
    bench.targets[1].state().namespace.size = 2048;
    let told = "its size is 1048576 bytes here and 2097152 on the others";
    wait_until(told, || bench.device.trouble().contains(told));
    bench.targets[1].state().namespace.size = 4096;
    wait_all_live(&bench.device);
    assert_eq!(size(), 4096);
}

/// A path that comes back knows of growth before the others, which nobody tells: they are asked.
#[test]
fn a_path_that_returns_larger_has_the_others_asked_and_is_taken_then() {
    let bench = bench(targets(), |_| {});
    for target in &bench.targets {
        target.state().namespace.size = 4096;
    }
    bench.targets[1].cut();
    wait_until("both have grown", || bench.device.geometry().unwrap().blocks == 4096);
    wait_all_live(&bench.device);
    assert_eq!(bench.targets[0].state().associations, 1);
}

#[test]
fn a_namespace_without_a_name_has_one_path_only() {
    let targets = targets();
    for target in &targets {
        target.state().ids.uuid = [0; 16];
    }
    let reactor = reactor("host");
    let mut config = config(targets[0].address);
    config.paths.push(super::config(targets[1].address).paths[0].clone());
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_until("it is told", || device.trouble().contains("has no UUID, NGUID or EUI64"));
    drop((device, reactor));
}

#[test]
fn policies_choose_among_good_paths() {
    // In turns of up to 128 KiB, which leave in one send: eight of these reads.
    for (policy, count, wanted) in [
        (IoPolicy::Numa, 10, [0, 10]),
        (IoPolicy::RoundRobin, 12, [4, 8]),
        (IoPolicy::QueueDepth, 10, [5, 5]),
    ] {
        let mut bench = bench(targets(), |config| config.policy = policy);
        for target in &bench.targets {
            target.state().hold_io = true;
        }
        bench.client.submit((0..count).map(|at| Ask::read(at * 32, 32, 512)).collect());
        wait_until("all have arrived", || bench.commands().iter().sum::<usize>() as u64 == count);
        let mut commands = bench.commands();
        commands.sort_unstable();
        assert_eq!(commands, wanted, "{policy:?}");
        for target in &bench.targets {
            target.state().hold_io = false;
            target.cut();
        }
        for _ in 0..count {
            assert_eq!(bench.client.next().outcome, Ok(()));
        }
    }
}

#[test]
fn a_round_robin_alternates_where_commands_come_one_by_one() {
    let mut bench = bench(targets(), |config| config.policy = IoPolicy::RoundRobin);
    let before = bench.commands();
    for _ in 0..6 {
        assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    }
    let after = bench.commands();
    assert_eq!([after[0] - before[0], after[1] - before[1]], [3, 3]);
}

fn with_ana(states: [AnaState; 2]) -> [Scripted; 2] {
    let targets = targets();
    for (target, state) in targets.iter().zip(states) {
        let mut target = target.state();
        target.ana = state;
        target.controller.multipath = CMIC_ANA | 2;
        target.controller.ana_groups = 1;
        target.controller.async_events |= OAES_ANA_CHANGE;
    }
    targets
}

#[test]
fn asymmetric_access_is_followed() {
    let mut bench = bench(with_ana([AnaState::NonOptimized, AnaState::Optimized]), |_| {});
    let read = |bench: &mut Bench| {
        let before = bench.commands();
        assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
        let after = bench.commands();
        [after[0] - before[0], after[1] - before[1]]
    };
    assert_eq!(read(&mut bench), [0, 1], "the best is taken");
    // It changes, and tells: the other one is taken.
    let view = |bench: &Bench, path: usize| bench.device.paths()[path].ana;
    for (state, taken) in [
        (AnaState::Inaccessible, [1, 0]),
        (AnaState::Optimized, [0, 1]),
        (AnaState::Change, [1, 0]),
        (AnaState::NonOptimized, [0, 1]),
        (AnaState::Optimized, [0, 1]),
        (AnaState::PersistentLoss, [1, 0]),
    ] {
        wait_until("an event is asked for", || bench.targets[1].has_event_request());
        bench.targets[1].change_ana(state);
        wait_until("it is seen", || view(&bench, 1) == Some(state.name()));
        let one = read(&mut bench);
        if state == AnaState::NonOptimized {
            assert_eq!(one[0] + one[1], 1, "both are as good");
        } else {
            assert_eq!(one, taken, "{state}");
        }
    }
    assert_eq!(bench.device.state(), DeviceState::Ready);
}

#[test]
fn a_refusal_for_access_moves_a_command_before_any_event_and_all_inaccessible_is_a_pause() {
    let mut bench = bench(with_ana([AnaState::Optimized; 2]), |_| {});
    // Without a word, both in turn.
    for path in [0, 1] {
        bench.targets[path].state().ana = AnaState::Inaccessible;
        let written = bench.client.submit(vec![Ask::write(0, 8, data(1, 8))]);
        if path == 0 {
            assert_eq!((bench.client.next().token, 0), (written, 0));
        }
    }
    wait_until("both are seen", || bench.device.paths().iter().all(|path| path.ana == Some("inaccessible")));
    assert!(bench.client.try_next().is_none());
    // Nor is it told when it is over: it is looked for.
    bench.targets[0].state().ana = AnaState::NonOptimized;
    assert_eq!(bench.client.next().outcome, Ok(()));
}

#[test]
fn requests_fail_when_no_path_is_waited_for_any_more_and_work_when_one_returns() {
    let mut bench = bench(targets(), |config| {
        config.timers.fast_io_fail_tmo = Some(Duration::from_millis(300));
    });
    for target in &bench.targets {
        target.state().namespace.size = 0;
        target.cut();
    }
    wait_until("no path is waited for", || bench.device.state() == DeviceState::Failed);
    assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Err(Status::Path));
    bench.targets[1].state().namespace.size = 2048;
    wait_until("one returns", || bench.device.state() == DeviceState::Ready);
    assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    assert_eq!(bench.device.paths()[0].state, "failed");
}

fn with_caches(identities: [u8; 2]) -> [Scripted; 2] {
    let targets = targets();
    for (target, identity) in targets.iter().zip(identities) {
        let mut state = target.state();
        state.controller.volatile_write_cache = 1;
        state.controller.vendor = Vendor { cache_identity: Some([identity; 16]) }.to_bytes();
    }
    targets
}

fn flush() -> Ask {
    Ask::plain(Operation::Flush, 0, 0)
}

fn flushes(target: &Scripted) -> usize {
    target.state().log.iter().filter(|(_, sqe)| sqe.opcode == io_opcode::FLUSH).count()
}

/// With two paths in turn, a flush reached one controller, and the writes of the other stayed in its cache.
#[test]
fn a_flush_reaches_every_controller_with_a_cache() {
    let mut bench = bench(with_caches([1, 2]), |config| config.policy = IoPolicy::RoundRobin);
    for at in 0..4 {
        assert_eq!(bench.client.run(Ask::write(at * 8, 8, data(1, 8))).outcome, Ok(()));
    }
    assert_eq!(bench.client.run(flush()).outcome, Ok(()));
    assert_eq!([0, 1].map(|path| flushes(&bench.targets[path])), [1, 1]);
}

/// Two reactors, two controllers with a cache each: what one reactor has written is flushed by whoever flushes.
#[test]
fn a_flush_on_one_reactor_reaches_the_controllers_that_another_has_written_to() {
    let targets = with_caches([1, 2]);
    let reactors = [reactor("host0"), reactor("host1")];
    let mut config = config(targets[0].address);
    config.paths.push(super::config(targets[1].address).paths[0].clone());
    config.policy = IoPolicy::RoundRobin;
    let handles = reactors.each_ref().map(|reactor| reactor.handle().clone());
    let device = NvmeDevice::open(config, &handles).unwrap();
    wait_ready(&device);
    wait_all_live(&device);
    let [mut writer, mut flusher] = handles.each_ref().map(|handle| Client::open(&device, handle));
    let writes = |writer: &mut Client| {
        for at in 0..4 {
            assert_eq!(writer.run(Ask::write(at * 8, 8, data(1, 8))).outcome, Ok(()));
        }
        for target in &targets {
            assert!(target.state().log.iter().any(|(_, sqe)| sqe.opcode == io_opcode::WRITE));
        }
    };
    writes(&mut writer);
    assert_eq!(flusher.run(flush()).outcome, Ok(()));
    assert_eq!(targets.each_ref().map(flushes), [1, 1]);
    // And it is told of what was lost of the other's writes.
    writes(&mut writer);
    targets[1].state().controller.vendor = Vendor { cache_identity: Some([7; 16]) }.to_bytes();
    targets[1].cut();
    wait_until("it is reached again", || targets[1].state().associations == 2);
    wait_all_live(&device);
    assert_eq!(flusher.run(flush()).outcome, Err(Status::Media));
    assert_eq!(flusher.run(flush()).outcome, Ok(()));
    drop((writer, flusher, device, reactors));
}

#[test]
fn a_cache_that_was_lost_with_writes_in_it_fails_the_next_flush_and_only_that() {
    for (kept, outcome) in [(true, Ok(())), (false, Err(Status::Media))] {
        let mut bench = bench(with_caches([1, 1]), |_| {});
        assert_eq!(bench.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
        for target in &bench.targets {
            if !kept {
                target.state().controller.vendor = Vendor { cache_identity: Some([7; 16]) }.to_bytes();
            }
            let before = target.state().associations;
            target.cut();
            wait_until("it is reached again", || target.state().associations > before);
        }
        wait_all_live(&bench.device);
        // Whoever has copies elsewhere does not wait for a FLUSH to be told.
        assert_eq!(bench.device.cache_losses(), u64::from(!kept));
        assert_eq!(bench.client.run(flush()).outcome, outcome);
        assert_eq!(bench.client.run(flush()).outcome, Ok(()));
        assert_eq!(bench.device.cache_losses(), u64::from(!kept));
    }
}

#[test]
fn for_other_targets_the_configuration_says_what_a_new_association_means_for_a_cache() {
    for (doubt, outcome, fua) in [
        (CacheDoubt::Trust, Ok(()), false),
        (CacheDoubt::FailFlush, Err(Status::Media), false),
        (CacheDoubt::WriteThrough, Ok(()), true),
    ] {
        let targets = targets();
        for target in &targets {
            target.state().controller.volatile_write_cache = 1;
        }
        let mut bench = bench(targets, |config| config.on_cache_doubt = doubt);
        assert_eq!(bench.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
        let written = bench.commands().iter().position(|count| *count == 1).expect("one path is taken");
        let target = &bench.targets[written];
        assert_eq!(target.state().log[0].1.fua(), fua);
        target.cut();
        wait_until("it is reached again", || target.state().associations == 2);
        wait_all_live(&bench.device);
        assert_eq!(bench.device.cache_losses(), u64::from(doubt == CacheDoubt::FailFlush));
        assert_eq!(bench.client.run(flush()).outcome, outcome, "{doubt:?}");
        assert_eq!(bench.client.run(flush()).outcome, Ok(()));
    }
}

/// A command that failed for its path was tried five times on the same one, and failed, with a good path beside it.
#[test]
fn a_path_error_moves_the_command_to_another_path_at_once() {
    for policy in [IoPolicy::Numa, IoPolicy::RoundRobin, IoPolicy::QueueDepth] {
        let mut bench = bench(targets(), |config| config.policy = policy);
        let trouble = NvmeStatus::retryable(StatusCode::INTERNAL_PATH_ERROR);
        // Whichever is taken first.
        bench.targets[0].state().statuses.extend([trouble; 20]);
        for _ in 0..4 {
            assert_eq!(bench.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
        }
        let [bad, good] = bench.commands();
        assert!(good == 4 && bad <= 4, "{policy:?}: {bad} and {good}");
        // When both fail it, each is tried in turn, for a while.
        bench.targets[0].state().statuses = [trouble; 20].into();
        bench.targets[1].state().statuses = [trouble; 20].into();
        assert_eq!(bench.client.run(Ask::read(0, 8, 512)).outcome, Err(Status::Path));
        let [bad_after, good_after] = bench.commands();
        assert_eq!((bad_after - bad, good_after - good), (3, 3), "{policy:?}");
    }
}
