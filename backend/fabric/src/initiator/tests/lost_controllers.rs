//! Lost associations of ours, and of a process before us: what proves that they are quiet, and what is waited for without.

use super::client::{Ask, Client};
use super::middle_box::MiddleBox;
use super::scripted::Scripted;
use super::*;
use crate::initiator::quiet::{self, Kept, Record};
use crate::nvme::ana::{AnaState, CMIC_ANA};
use crate::nvme::command::io_opcode;
use crate::nvme::cross_reset::{ControllerInstance, ResetState};
use crate::nvme::identify::{OAES_ANA_CHANGE, VENDOR_MARK};

pub(super) const HOUR: Duration = Duration::from_secs(3600);

/// What is lost in these tests.
const LOST: ControllerInstance = ControllerInstance { cntlid: 5, uniquifier: 9, random: 100 };

pub(super) fn data(seed: u8) -> Vec<u8> {
    (0..4096usize).map(|at| seed ^ at.to_le_bytes()[0]).collect()
}

/// One whose Connect waits for what it knows to be over, and that resets other controllers, in its own time.
pub(super) fn target() -> Scripted {
    let target = Scripted::start(NQN);
    let mut state = target.state();
    state.controller.vendor[..8].copy_from_slice(&VENDOR_MARK);
    state.controller.cntlid = LOST.cntlid;
    state.controller.instance_uniquifier = LOST.uniquifier;
    state.controller.instance_random = LOST.random;
    state.controller.cross_resets_max = 4;
    state.reset_state = Some(ResetState::InProgress);
    drop(state);
    target
}

/// The next association is another instance of the controller.
pub(super) fn next_instance(target: &Scripted) {
    let mut state = target.state();
    state.controller.instance_random += 1;
    state.controller.cntlid += 1;
    state.cntlid += 1;
}

pub(super) fn writes(target: &Scripted) -> usize {
    target.state().log.iter().filter(|(_, sqe)| sqe.opcode == io_opcode::WRITE).count()
}

fn lose_a_write(target: &Scripted, client: &mut Client) {
    target.state().hold_io = true;
    client.submit(vec![Ask::write(0, 8, data(1))]);
    wait_until("it has arrived", || target.state().log.len() == 1);
    next_instance(target);
    target.state().hold_io = false;
    target.cut();
}

/// The end of a connection was taken for the target's own, and so for one that the next Connect waits for. It was a middle
/// box's, which kept the target's side open, with a write in it that nobody had read yet.
#[test]
fn an_end_that_may_be_a_middle_boxs_proves_nothing_where_the_controller_can_be_reset() {
    let (target, reactor) = (target(), reactor("host"));
    let mut config = config(target.address);
    config.timers.quiesce_tmo = HOUR;
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, reactor.handle());
    lose_a_write(&target, &mut client);
    wait_until("it is asked for", || target.state().resets_of_others == [LOST]);
    assert_eq!(client.run(Ask::read(100, 8, 512)).outcome, Ok(()));
    assert_eq!(writes(&target), 1, "it is not quiet yet");
    target.state().reset_state = Some(ResetState::Succeeded);
    assert_eq!((client.next().outcome, writes(&target)), (Ok(()), 2));
    wait_until("the target may forget it", || target.state().reset_log.is_empty());
    drop((client, device, reactor));
}

/// A target that was started again knows none of its controllers of before, and they cannot be at work any more.
#[test]
fn a_target_that_knows_no_such_controller_is_taken_at_its_promise() {
    let (target, reactor) = (target(), reactor("host"));
    let mut config = config(target.address);
    config.timers.quiesce_tmo = HOUR;
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, reactor.handle());
    target.state().knows_none = true;
    lose_a_write(&target, &mut client);
    assert_eq!((client.next().outcome, writes(&target)), (Ok(()), 2));
    assert_eq!(target.state().resets_of_others, [LOST]);
    drop((client, device, reactor));
}

/// The reset that a killed process's sockets send was taken for one that has arrived. When it is lost, the target goes on to
/// read what was sent.
#[test]
fn a_predecessors_death_proves_nothing_and_one_reset_does() {
    let (folder, target, reactor) = (Folder::new("death"), target(), reactor("host"));
    let mut config = config(target.address);
    let record = Record {
        address: Some(target.address),
        subsystem_nqn: NQN.into(),
        instance: Some(LOST),
        lives: HOUR,
    };
    quiet::keep(&folder.file(), &Kept { records: vec![record], ..Kept::default() }).unwrap();
    config.had_predecessor = true;
    config.record = Some(folder.file());
    next_instance(&target);
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, reactor.handle());
    client.submit(vec![Ask::write(0, 8, data(1))]);
    wait_until("it is asked for", || target.state().resets_of_others == [LOST]);
    client.submit(vec![Ask::read(100, 8, 512)]);
    assert_eq!((client.next().token, writes(&target)), (1, 0), "only the read");
    target.state().reset_state = Some(ResetState::Succeeded);
    assert_eq!((client.next().token, writes(&target)), (0, 1));
    wait_until("the next process has no need to ask again", || {
        quiet::kept(&folder.file())
            .is_some_and(|kept| kept.records.iter().all(|one| one.instance != Some(LOST)))
    });
    drop((client, device, reactor));
}

/// A run directory that was full kept an old record, which named none of the newer associations.
#[test]
fn what_cannot_be_kept_leaves_nothing_out_of_date() {
    let (folder, target, reactor) = (Folder::new("full"), target(), reactor("host"));
    quiet::keep(&folder.file(), &Kept::default()).unwrap();
    // Where the new record would be written.
    std::fs::create_dir(folder.0.join("n0.new")).unwrap();
    let mut config = config(target.address);
    config.record = Some(folder.file());
    let device = NvmeDevice::open(config.clone(), &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    assert!(!folder.file().exists());
    drop(device);
    // And what cannot be taken away either: the path is not used.
    std::fs::create_dir_all(folder.file().join("in the way")).unwrap();
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_until("it is told", || device.trouble().contains("n0: cannot be written: "));
    assert_ne!(device.state(), DeviceState::Ready);
    drop((device, reactor));
}

/// Nothing is known of a predecessor's associations but what the controllers say: the time that the first of them says was
/// not waited for when it came late, nor a longer one after a shorter one.
#[test]
fn the_controllers_say_how_long_a_predecessors_commands_may_live() {
    const EXPIRY: Duration = Duration::from_millis(200);
    for (quiesce_ms, second_ms, late) in
        [(1500, None, true), (1500, Some(100), false), (600, Some(1800), false)]
    {
        let targets = [Scripted::start(NQN), Scripted::start(NQN)];
        let boxes = [MiddleBox::start(targets[0].address), MiddleBox::start(targets[1].address)];
        let reactor = reactor("host");
        let mut config = config(boxes[0].address);
        config.had_predecessor = true;
        config.timers.keep_alive_tmo = EXPIRY / 2;
        config.timers.quiesce_tmo = Duration::ZERO;
        config.timers.reconnect_delay = Duration::from_millis(20);
        targets[0].state().controller.quiesce_time_ms = quiesce_ms;
        boxes[0].set_closed(late);
        boxes[1].set_closed(true);
        if let Some(second_ms) = second_ms {
            targets[1].state().controller.quiesce_time_ms = second_ms;
            config.paths.push(super::config(boxes[1].address).paths[0].clone());
        }
        let begun = Instant::now();
        let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
        if late {
            std::thread::sleep(2 * EXPIRY);
            boxes[0].set_closed(false);
        }
        wait_ready(&device);
        let mut client = Client::open(&device, reactor.handle());
        client.submit(vec![Ask::write(0, 8, data(1))]);
        // The other one speaks after the first.
        boxes[1].set_closed(false);
        assert_eq!(client.next().outcome, Ok(()));
        let longest = Duration::from_millis(u64::from(quiesce_ms.max(second_ms.unwrap_or(0))));
        assert!(begun.elapsed() >= EXPIRY + longest, "{quiesce_ms} {second_ms:?}: {:?}", begun.elapsed());
        drop((client, device, reactor));
    }
}

/// A quiesce time that a controller says counts instead of the configured one, also where that is longer.
#[test]
fn a_controllers_word_counts_more_than_the_configured_time() {
    let (target, reactor) = (Scripted::start(NQN), reactor("host"));
    target.state().controller.quiesce_time_ms = 300;
    let mut config = config(target.address);
    config.had_predecessor = true;
    config.timers.keep_alive_tmo = Duration::from_millis(500);
    config.timers.quiesce_tmo = HOUR;
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, reactor.handle());
    assert_eq!(client.run(Ask::write(0, 8, data(1))).outcome, Ok(()));
    drop((client, device, reactor));
}

/// Whoever waited for the end of a reset did not look at asymmetric access meanwhile.
#[test]
fn a_reset_that_lasts_does_not_hold_up_what_else_happens() {
    let targets = [target(), target()];
    for target in &targets {
        let mut state = target.state();
        state.namespace.ana_group = 1;
        state.controller.multipath = CMIC_ANA | 2;
        state.controller.ana_groups = 1;
        state.controller.async_events |= OAES_ANA_CHANGE;
    }
    next_instance(&targets[1]);
    let reactor = reactor("host");
    let mut config = config(targets[0].address);
    config.paths.push(super::config(targets[1].address).paths[0].clone());
    config.timers.quiesce_tmo = HOUR;
    let device = NvmeDevice::open(config, &[reactor.handle().clone()]).unwrap();
    wait_until("both are live", || device.paths().iter().all(|path| path.state == "live"));
    targets[0].cut();
    wait_until("a reset is under way", || !targets[1].state().reset_log.is_empty());
    wait_until("an event is asked for", || targets[1].has_event_request());
    targets[1].change_ana(AnaState::NonOptimized);
    wait_until("it is seen", || device.paths()[1].ana == Some(AnaState::NonOptimized.name()));
    assert!(!targets[1].state().reset_log.is_empty(), "the reset goes on");
    drop((device, reactor));
}
