//! Writes of unknown outcome that their user leaves: they end at once, and the device says that they may still be carried out.

use super::client::{Ask, Client};
use super::lost_controllers::{HOUR, data, next_instance, target, writes};
use super::scripted::Scripted;
use super::*;
use crate::nvme::cross_reset::ResetState;
use hawser_block::Status;

/// A device whose lost associations are quiet when the target says so, and not before.
fn open(target: &Scripted, reactors: &[&ReactorThread]) -> Arc<NvmeDevice> {
    let mut config = config(target.address);
    config.timers.quiesce_tmo = HOUR;
    let handles: Vec<_> = reactors.iter().map(|reactor| reactor.handle().clone()).collect();
    let device = NvmeDevice::open(config, &handles).unwrap();
    wait_ready(&device);
    device
}

/// A mirror waited for 41 s for a write to the half that was dead, though it had been put out long before.
#[test]
fn a_write_that_is_left_ends_at_once_and_may_still_be_carried_out_until_the_target_says() {
    let (target, host, other) = (target(), reactor("host"), reactor("other"));
    let device = open(&target, &[&host, &other]);
    let mut client = Client::open(&device, host.handle());
    let mut beside = Client::open(&device, other.handle());
    target.state().hold_io = true;
    client.submit(vec![Ask::write(0, 8, data(1))]);
    wait_until("it has arrived", || target.state().log.len() == 1);
    next_instance(&target);
    target.state().hold_io = false;
    target.cut();
    client.leave();
    assert!(device.has_left_behind(), "from the call on");
    assert_eq!(client.next().outcome, Err(Status::Aborted));
    assert!(device.has_left_behind() && !device.has_unknown_writes());
    wait_until("the reset is asked for", || !target.state().resets_of_others.is_empty());
    // On whatever lane, wherever it goes: what was left may go there.
    let late =
        [client.submit(vec![Ask::write(0, 8, data(2))]), beside.submit(vec![Ask::write(64, 8, data(2))])];
    assert_eq!(
        (client.run(Ask::read(100, 8, 512)).outcome, beside.run(Ask::read(100, 8, 512)).outcome),
        (Ok(()), Ok(()))
    );
    assert_eq!(writes(&target), 1, "it is not quiet yet");
    assert!(device.has_left_behind());
    target.state().reset_state = Some(ResetState::Succeeded);
    let told = [client.next(), beside.next()];
    assert_eq!(told.map(|told| (told.token, told.outcome)), late.map(|token| (token, Ok(()))));
    assert!(!device.has_left_behind() && writes(&target) == 3);
    drop((client, beside, device, host, other));
}

#[test]
fn a_write_that_is_given_up_and_not_left_waits_and_another_users_too() {
    let (target, host) = (target(), reactor("host"));
    let device = open(&target, &[&host]);
    let clients = [(); 2].map(|()| Client::open(&device, host.handle()));
    let [mut leaver, mut waiter] = clients;
    target.state().hold_io = true;
    leaver.submit(vec![Ask::write(0, 8, data(1))]);
    waiter.submit(vec![Ask::write(8, 8, data(2))]);
    wait_until("both have arrived", || target.state().log.len() == 2);
    next_instance(&target);
    target.state().hold_io = false;
    target.cut();
    waiter.abort();
    wait_until("the reset is asked for", || !target.state().resets_of_others.is_empty());
    assert!(device.has_unknown_writes() && !device.has_left_behind());
    assert!(waiter.try_next().is_none() && leaver.try_next().is_none());
    // Long after its association was lost.
    leaver.leave();
    assert_eq!(leaver.next().outcome, Err(Status::Aborted));
    assert!(device.has_unknown_writes() && device.has_left_behind() && waiter.try_next().is_none());
    target.state().reset_state = Some(ResetState::Succeeded);
    assert_eq!(waiter.next().outcome, Err(Status::Aborted));
    assert!(!device.has_unknown_writes() && !device.has_left_behind());
    assert_eq!(writes(&target), 2);
    drop((leaver, waiter, device, host));
}

#[test]
fn what_was_left_is_over_by_time_too() {
    let (target, host) = (Scripted::start(NQN), reactor("host"));
    let mut config = config(target.address);
    config.timers.keep_alive_tmo = Duration::from_millis(1000);
    config.timers.quiesce_tmo = Duration::from_millis(500);
    let device = NvmeDevice::open(config, &[host.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, host.handle());
    target.state().hold_io = true;
    let begun = Instant::now();
    client.submit(vec![Ask::write(0, 8, data(1)), Ask::write(8, 8, data(1)), Ask::read(16, 8, 512)]);
    wait_until("all have arrived", || target.state().log.len() == 3);
    client.leave();
    assert!([(); 3].map(|()| client.next().outcome) == [Err(Status::Aborted); 3]);
    assert!(begun.elapsed() < Duration::from_millis(2000), "{:?}", begun.elapsed());
    target.state().hold_io = false;
    wait_until("they are forgotten", || !device.has_left_behind());
    assert!(begun.elapsed() >= Duration::from_millis(2500), "{:?}", begun.elapsed());
    assert_eq!(client.run(Ask::write(0, 8, data(2))).outcome, Ok(()));
    drop((client, device, host));
}

#[test]
fn what_was_left_and_was_never_sent_leaves_nothing_behind() {
    let (target, host) = (Scripted::start(NQN), reactor("host"));
    let device = open(&target, &[&host]);
    let mut client = Client::open(&device, host.handle());
    drop(target);
    wait_until("it is lost", || device.state() != DeviceState::Ready);
    client.submit(vec![Ask::write(0, 8, data(1))]);
    client.leave();
    assert_eq!((client.next().outcome, device.has_left_behind()), (Err(Status::Aborted), false));
    drop((client, device, host));
}
