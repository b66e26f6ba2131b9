//! No ghost writes: whatever holds an older write back, the network or the target's device, and however the path comes back, it
//! never lands on a newer one. And no ghost reads: what comes late does not reach memory that was given back.

use super::client::{Ask, Client};
use super::lab::{data, lab};
use super::scripted::Scripted;
use super::*;
use crate::nvme::admin_opcode::CROSS_CONTROLLER_RESET;
use faults::{Act, Cut, Door, Proxy, Way, kind, opcode};
use hawser_block::{Lba, Request, Status};

/// What goes in the command's capsule, and what goes by R2T.
const SIZES: [u32; 2] = [8, 1024];

/// The bytes that carry the data of the next write to block 0.
fn carries_the_data(blocks: u32) -> impl FnMut(&faults::Pdu<'_>) -> bool + Send {
    let kind = if blocks == SIZES[0] { kind::CAPSULE_CMD } else { kind::H2C_DATA };
    move |pdu| pdu.writes(0) && pdu.kind() == kind
}

#[test]
fn a_write_that_the_network_holds_back_never_lands_on_a_newer_one_when_another_path_takes_over() {
    for blocks in SIZES {
        let mut lab = lab(2, |_| {});
        let first = lab.path_in_use();
        let held = lab.proxies[first].hold_one(carries_the_data(blocks));
        lab.client.submit(vec![Ask::write(0, blocks, data(1, blocks))]);
        assert!(held.wait_caught(1, PATIENCE));
        let resets = lab.proxies[1 - first].rule(|pdu| {
            let reset = pdu.command.is_some_and(|command| command.opcode == CROSS_CONTROLLER_RESET);
            (reset && pdu.queue == Some(0) && pdu.way == Way::ToTarget).then_some(Act::Hold(usize::MAX))
        });
        let connects = lab.proxies[1 - first].counts().connects;
        // The host loses the path. The target hears nothing of it.
        lab.proxies[first].set_door(Door::Refuse);
        lab.proxies[first].cut(Cut::ResetHost);
        let read = lab.client.submit(vec![Ask::read(8192, 1, 512)]);
        // Which of the two comes first is the network's business: neither waits for anything but an answer.
        let (one, other) = (lab.client.next(), lab.client.next());
        assert_eq!((one.outcome, other.outcome), (Ok(()), Ok(())));
        assert!(one.token == read || other.token == read);
        assert_eq!((resets.caught(), lab.proxies[1 - first].counts().connects), (1, connects));
        assert_eq!(lab.client.run(Ask::write(0, blocks, data(2, blocks))).outcome, Ok(()));
        held.release();
        let proxy = &lab.proxies[first];
        wait_until("all that was held back has arrived, or cannot", || proxy.links() == 0);
        assert!(lab.content(blocks) == data(2, blocks), "{blocks} blocks: an older write came last");
    }
}

#[test]
fn a_write_that_the_network_holds_back_never_lands_on_a_newer_one_when_the_same_path_comes_back() {
    for blocks in SIZES {
        let mut lab = lab(1, |_| {});
        let held = lab.proxies[0].hold_one(carries_the_data(blocks));
        lab.client.submit(vec![Ask::write(0, blocks, data(1, blocks))]);
        assert!(held.wait_caught(1, PATIENCE));
        let before = lab.proxies[0].links();
        lab.proxies[0].cut(Cut::ResetHost);
        assert_eq!(lab.client.next().outcome, Ok(()));
        assert_eq!(lab.client.run(Ask::write(0, blocks, data(2, blocks))).outcome, Ok(()));
        held.release();
        let proxy = &lab.proxies[0];
        wait_until("the old connections have ended", || proxy.links() == before);
        assert!(lab.content(blocks) == data(2, blocks), "{blocks} blocks: an older write came last");
    }
}

/// Where no controller can be reset through another, time alone proves that a lost one is quiet.
#[test]
fn without_resets_a_write_that_the_network_holds_back_is_waited_for() {
    let (target, host) = (Scripted::start(NQN), reactor("host"));
    let proxy = Proxy::start(target.address).unwrap();
    let mut config = config(proxy.address());
    config.timers.keep_alive_tmo = Duration::from_millis(1500);
    config.timers.quiesce_tmo = Duration::from_millis(500);
    let device = NvmeDevice::open(config, &[host.handle().clone()]).unwrap();
    wait_ready(&device);
    let mut client = Client::open(&device, host.handle());
    let held = proxy.hold_one(carries_the_data(8));
    client.submit(vec![Ask::write(0, 8, data(1, 8))]);
    assert!(held.wait_caught(1, PATIENCE));
    let connects = proxy.counts().connects;
    proxy.cut(Cut::ResetHost);
    client.submit(vec![Ask::write(0, 8, data(2, 8)), Ask::read(100, 8, 512)]);
    assert_eq!(client.next().token, 2, "reads do not wait");
    assert!(proxy.counts().connects > connects && target.state().log.len() == 1, "nor is the old write sent");
    // Later than the reconnect, and sooner than the time after which its target has given it up.
    held.release();
    wait_until("it arrives", || target.state().log.len() >= 2);
    assert_eq!((client.next().token, client.next().token), (0, 1));
    assert!(target.state().disk[..4096] == data(2, 8), "an older write came last");
    drop((client, device, host));
}

/// The target's half of that promise: it gives a host up that says nothing, and takes in nothing more of what it had sent.
#[test]
fn our_target_takes_nothing_from_an_association_whose_keep_alive_has_expired() {
    let mut lab = lab(2, |config| config.timers.keep_alive_tmo = Duration::from_millis(1000));
    let first = lab.path_in_use();
    let held = lab.proxies[first].hold_one(carries_the_data(8));
    lab.client.submit(vec![Ask::write(0, 8, data(1, 8))]);
    assert!(held.wait_caught(1, PATIENCE));
    for proxy in &lab.proxies {
        proxy.set_door(Door::Refuse);
        // Keep-alives are held back too.
        proxy.cut(Cut::ResetHost);
    }
    let target = &lab.target;
    wait_until("it is given up", || target.hosts(NQN).is_empty());
    held.release();
    let proxies = &lab.proxies;
    wait_until("all has arrived, or cannot", || proxies.iter().all(|proxy| proxy.links() == 0));
    assert_eq!(lab.disk.stats().kind(hawser_block::IoKind::Write).requests, 0);
}

fn is_write(request: &Request) -> bool {
    request.operation.is_write() && request.lba == Lba(0)
}

/// The device of the target hangs with the write in it: a reset of its controller, and a Connect, are answered when it has ended.
#[test]
fn a_write_that_the_targets_device_holds_back_is_waited_for_on_another_path_and_on_the_same() {
    for (paths, blocks) in [(1, 8), (1, 1024), (2, 8), (2, 1024)] {
        let mut lab = lab(paths, |_| {});
        let first = lab.path_in_use();
        lab.disk.hold_one(is_write);
        lab.client.submit(vec![Ask::write(0, blocks, data(1, blocks))]);
        let disk = Arc::clone(&lab.disk);
        wait_until("it is at the device", || disk.held() == 1);
        let connects = lab.proxies[first].counts().connects;
        lab.proxies[first].cut(Cut::Reset);
        // Before its host knows, the second would go to the other path, beside the first: as both may that are under way at once.
        let proxy = &lab.proxies[first];
        wait_until("a new association is asked for", || proxy.counts().connects > connects);
        lab.client.submit(vec![Ask::write(0, blocks, data(2, blocks))]);
        if paths == 2 {
            assert_eq!(lab.client.run(Ask::read(8192, 1, 512)).outcome, Ok(()), "the other path is good");
        }
        // A reset is answered after two seconds at the latest; both writes wait for its end all the same.
        std::thread::sleep(Duration::from_millis(2500));
        assert!(lab.client.try_next().is_none(), "neither may be done while the first is at the device");
        assert_eq!(lab.disk.stats().kind(hawser_block::IoKind::Write).requests, 0);
        disk.release();
        assert_eq!((lab.client.next().outcome, lab.client.next().outcome), (Ok(()), Ok(())));
        assert!(lab.content(blocks) == data(2, blocks), "{paths} paths, {blocks} blocks");
    }
}

/// A target that answers minutes late: whoever gives the request up gets its memory back only when nothing can write to it.
#[test]
fn data_that_comes_after_a_request_was_given_up_reaches_nobody() {
    for blocks in [8, 2048] {
        let mut lab = lab(1, |_| {});
        assert_eq!(lab.client.run(Ask::write(0, blocks, data(1, blocks))).outcome, Ok(()));
        // In the middle of its data.
        let late = lab.proxies[0].rule(|pdu| {
            (pdu.is(Way::ToHost, opcode::READ) && pdu.kind() == kind::C2H_DATA).then_some(Act::Hold(1000))
        });
        lab.client.submit(vec![Ask::read(0, blocks, 512)]);
        assert!(late.wait_caught(1, PATIENCE));
        lab.client.abort();
        let told = lab.client.next();
        assert_eq!(told.outcome, Err(Status::Aborted));
        let then = told.memory.bytes();
        late.release();
        // Another way, and the same once more: what was late has come, or never will.
        assert!(lab.content(blocks) == data(1, blocks));
        assert!(told.memory.bytes() == then, "{blocks} blocks: memory changed after its request had ended");
    }
}

/// The same by time: `io_timeout` ends the association, and the request goes on with the next.
#[test]
fn a_command_that_lasts_too_long_ends_its_association_and_is_asked_again() {
    let mut lab = lab(1, |config| config.timers.io_timeout = Duration::from_millis(500));
    assert_eq!(lab.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
    lab.disk.hold_one(|request| request.lba == Lba(0));
    let connects = lab.proxies[0].counts().connects;
    lab.client.submit(vec![Ask::read(0, 8, 512)]);
    let disk = Arc::clone(&lab.disk);
    wait_until("it is at the device", || disk.held() == 1);
    let proxy = &lab.proxies[0];
    wait_until("a new association is asked for", || proxy.counts().connects > connects);
    assert!(lab.client.try_next().is_none());
    // Minutes later.
    disk.release();
    let told = lab.client.next();
    assert_eq!(told.outcome, Ok(()));
    assert!(told.data == data(1, 8));
    assert_eq!(lab.device.trouble(), "");
}
