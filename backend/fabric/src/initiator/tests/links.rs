//! Links that corrupt, die, flap and never answer.

use super::client::Ask;
use super::lab::{data, lab};
use super::*;
use crate::initiator::IoPolicy;
use faults::{Act, BlackHole, Cut, Door, Pdu, Proxy, Way, kind, opcode};

/// Turns a bit of the first PDU of which `place` says where.
fn flip_one(
    proxy: &Proxy,
    mut place: impl FnMut(&Pdu<'_>) -> Option<usize> + Send + 'static,
) -> faults::Rule {
    let mut done = false;
    proxy.rule(move |pdu| {
        let at = place(pdu).filter(|_| !done)?;
        done = true;
        Some(Act::Flip(at))
    })
}

/// A case's name, the way and kind of the PDU, and whether a bit of its data is turned, or of its header.
type Case = (&'static str, Way, u8, bool);

const CASES: [Case; 7] = [
    ("a command", Way::ToTarget, kind::CAPSULE_CMD, false),
    ("data in a capsule", Way::ToTarget, kind::CAPSULE_CMD, true),
    ("data for the target", Way::ToTarget, kind::H2C_DATA, true),
    ("its header", Way::ToTarget, kind::H2C_DATA, false),
    ("data for the host", Way::ToHost, kind::C2H_DATA, true),
    ("its header", Way::ToHost, kind::C2H_DATA, false),
    ("what asks for data", Way::ToHost, kind::R2T, false),
];

#[test]
fn with_digests_a_turned_bit_anywhere_is_found_and_what_it_was_in_is_done_again() {
    for (name, way, kind, in_data) in CASES {
        for blocks in [8, 1024] {
            let mut lab = lab(1, |config| {
                config.paths[0].digests = crate::tcp::Digests { header: true, data: true };
            });
            let flip = flip_one(&lab.proxies[0], move |pdu| {
                let io = pdu.queue.is_some_and(|queue| queue > 0);
                let wanted = pdu.command.is_some_and(|command| command.opcode != opcode::FABRICS);
                let place = if in_data { pdu.data_at().map(|at| at + 100) } else { Some(20) };
                place.filter(|_| io && wanted && pdu.way == way && pdu.kind() == kind)
            });
            assert_eq!(lab.client.run(Ask::write(0, blocks, data(1, blocks))).outcome, Ok(()), "{name}");
            assert!(lab.content(blocks) == data(1, blocks), "{name}, {blocks} blocks");
            // Small writes need nothing but a capsule, large ones have none with data in it.
            let with_r2t = kind == kind::H2C_DATA || kind == kind::R2T;
            let in_capsule = kind == kind::CAPSULE_CMD && in_data;
            let there = !(with_r2t && blocks == 8 || in_capsule && blocks != 8);
            assert_eq!(flip.caught(), u64::from(there), "{name}, {blocks} blocks");
            // Each side counts what it finds. Where the target finds a header wrong, it ends the connection: to us that is
            // a broken protocol; data it refuses, and the command is sent again.
            let (found_here, found_there) = (way == Way::ToHost, way == Way::ToTarget && in_data);
            let counted = lab.device.counters();
            let expected = ("digest_errors", u64::from(there && found_here));
            assert!(counted.contains(&expected), "{name}, {blocks} blocks: {counted:?}, not {expected:?}");
            let of_target = lab.target.stats().digest_errors;
            assert_eq!(of_target, u64::from(there && found_there), "{name}, {blocks} blocks");
        }
    }
}

/// What the test above rests on: the bit is turned.
#[test]
fn without_digests_a_turned_bit_in_data_is_not_found() {
    let mut lab = lab(1, |_| {});
    let flip = flip_one(&lab.proxies[0], |pdu| {
        pdu.data_at().filter(|_| pdu.is(Way::ToHost, opcode::READ) && pdu.kind() == kind::C2H_DATA)
    });
    assert_eq!(lab.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
    let mut expected = data(1, 8);
    expected[0] ^= 1;
    assert!(lab.content(8) == expected && flip.caught() == 1);
}

#[test]
fn a_dead_path_disturbs_no_good_one_however_it_died() {
    for (door, cut) in
        [(Door::Refuse, Some(Cut::Reset)), (Door::Silent, Some(Cut::Fin)), (Door::Silent, None)]
    {
        let mut lab = lab(2, |config| {
            config.policy = IoPolicy::RoundRobin;
            config.timers.keep_alive_tmo = Duration::from_millis(1000);
        });
        let connects = lab.proxies[1].counts().connects;
        lab.proxies[0].set_door(door);
        // Without a cut, nothing passes any more, and only its keep-alive tells.
        let silence = lab.proxies[0].rule(move |_| cut.is_none().then_some(Act::Hold(0)));
        if let Some(cut) = cut {
            lab.proxies[0].cut(cut);
        }
        let count = 200;
        lab.client.submit((0..count).map(|at| Ask::read(at * 8, 8, 512)).collect());
        for _ in 0..count {
            assert_eq!(lab.client.next().outcome, Ok(()), "{door:?}");
        }
        assert_eq!(lab.client.run(Ask::write(0, 8, data(1, 8))).outcome, Ok(()));
        assert_eq!(lab.device.state(), DeviceState::Ready);
        assert_eq!(lab.proxies[1].counts().connects, connects, "{door:?}: the good path was made anew");
        drop(silence);
    }
}

#[test]
fn with_all_paths_down_requests_wait_and_go_on_with_the_first_that_returns() {
    let mut lab = lab(2, |_| {});
    for proxy in &lab.proxies {
        proxy.set_door(Door::Refuse);
        proxy.cut(Cut::Reset);
    }
    let device = Arc::clone(&lab.device);
    wait_until("both are lost", || device.state() == DeviceState::Reconnecting);
    lab.client.submit(vec![Ask::write(0, 8, data(1, 8)), Ask::read(100, 8, 512)]);
    let tries: Vec<u64> = lab.proxies.iter().map(|proxy| proxy.counts().connects).collect();
    let proxies = &lab.proxies;
    wait_until("both are tried again and again", || {
        proxies.iter().zip(&tries).all(|(proxy, before)| proxy.counts().connects > before + 2)
    });
    assert!(lab.client.try_next().is_none());
    lab.proxies[1].set_door(Door::Open);
    assert_eq!((lab.client.next().outcome, lab.client.next().outcome), (Ok(()), Ok(())));
    assert!(lab.content(8) == data(1, 8));
}

/// A link that takes an association and loses it at once was connected to ten times a second.
#[test]
fn a_flapping_link_is_not_stormed() {
    let mut lab = lab(2, |config| config.timers.reconnect_delay = Duration::from_secs(1));
    // Up to the I/O queue's Connect, and no further.
    let flap = lab.proxies[0].rule(|pdu| {
        let done = pdu.way == Way::ToHost && pdu.kind() == kind::CAPSULE_RESP && pdu.queue == Some(1);
        done.then_some(Act::CutAfter(pdu.bytes.len(), Cut::Reset))
    });
    lab.proxies[0].cut(Cut::Reset);
    let before = lab.proxies[0].counts().connects;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        assert_eq!(lab.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
        std::thread::sleep(Duration::from_millis(5));
    }
    let connects = lab.proxies[0].counts().connects - before;
    // Waits of at least 0.05, 0.1, 0.2, 0.4 s, then 0.5 s: 13 attempts at most, of two connections each.
    assert!((4..=26).contains(&connects), "{connects} connections in {:?}", begun.elapsed());
    assert!(flap.caught() > 0);
}

#[test]
fn who_does_not_answer_a_connect_holds_nobody_up() {
    let mut lab = lab(1, |_| {});
    let (hole, silent) = (BlackHole::start().unwrap(), Proxy::start(lab.proxies[0].address()).unwrap());
    silent.set_door(Door::Silent);
    let reactor = lab.reactors[0].handle().clone();
    let devices: Vec<_> = [hole.address().unwrap(), silent.address()]
        .into_iter()
        .map(|address| NvmeDevice::open(config(address), std::slice::from_ref(&reactor)).unwrap())
        .collect();
    wait_until("the second is asked for", || silent.counts().connects > 0);
    for _ in 0..100 {
        assert_eq!(lab.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
    }
    for device in &devices {
        assert_eq!((device.state(), device.geometry()), (DeviceState::Connecting, None));
    }
    // Nor does either hold up its own end.
    drop(devices);
    silent.set_door(Door::Open);
    assert_eq!(lab.client.run(Ask::read(0, 8, 512)).outcome, Ok(()));
}
