//! The proxy between two plain sockets.

use super::*;
use std::io::Read;

const PATIENCE: Duration = Duration::from_secs(60);

/// A PDU of this type with `len` bytes in all.
fn pdu(kind: u8, len: u32, fill: u8) -> Vec<u8> {
    let mut bytes = vec![fill; len as usize];
    bytes[0] = kind;
    bytes[3] = 0;
    bytes[4..8].copy_from_slice(&len.to_le_bytes());
    bytes
}

struct Ends {
    proxy: Proxy,
    host: TcpStream,
    target: TcpStream,
}

fn ends() -> Ends {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = Proxy::start(listener.local_addr().unwrap()).unwrap();
    let host = TcpStream::connect(proxy.address()).unwrap();
    let target = listener.accept().unwrap().0;
    for stream in [&host, &target] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    while proxy.links() == 0 {
        thread::yield_now();
    }
    Ends { proxy, host, target }
}

fn take(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn nothing_comes(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(stream.read(&mut [0]).is_err());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
}

#[test]
fn bytes_pass_unchanged_both_ways_whatever_they_are() {
    let Ends { proxy, mut host, mut target } = ends();
    let mut sent = Vec::new();
    for round in 0..200u32 {
        sent.extend(pdu(6, 8 + round * 91, round.to_le_bytes()[0]));
    }
    // And no PDUs at the end.
    sent.extend([7; 1000]);
    let expected = sent.clone();
    let mut writer = host.try_clone().unwrap();
    let writing = thread::spawn(move || sent.chunks(1013).for_each(|part| writer.write_all(part).unwrap()));
    assert!(take(&mut target, expected.len()) == expected);
    writing.join().unwrap();
    target.write_all(&expected).unwrap();
    assert!(take(&mut host, expected.len()) == expected);
    assert_eq!(proxy.counts().connects, 1);
}

/// What was still on its way in the network when its sender died comes all the same.
#[test]
fn what_is_held_back_comes_after_its_sender_has_gone() {
    let Ends { proxy, mut host, mut target } = ends();
    let hold = proxy.rule(|pdu| (pdu.way == Way::ToTarget && pdu.kind() == 6).then_some(Act::Hold(9)));
    host.write_all(&pdu(4, 20, 1)).unwrap();
    host.write_all(&pdu(6, 30, 2)).unwrap();
    host.write_all(&pdu(4, 40, 3)).unwrap();
    assert!(hold.wait_caught(1, PATIENCE));
    assert_eq!(take(&mut target, 29)[20..], pdu(6, 30, 2)[..9]);
    nothing_comes(&mut target);
    // The other way goes on.
    target.write_all(&pdu(5, 24, 4)).unwrap();
    assert_eq!(take(&mut host, 24), pdu(5, 24, 4));
    link::reset(host);
    nothing_comes(&mut target);
    proxy.hold_ends(true);
    hold.release();
    let rest = take(&mut target, 21 + 40);
    assert_eq!((&rest[..21], &rest[21..]), (&pdu(6, 30, 2)[9..], &pdu(4, 40, 3)[..]));
    nothing_comes(&mut target);
    proxy.hold_ends(false);
    assert_eq!(target.read(&mut [0]).unwrap(), 0, "and then its end");
    drop(target);
    let shared = Arc::clone(&proxy.shared);
    let mut state = shared.lock();
    while !state.links.is_empty() {
        state = shared.changed.wait(state).unwrap();
    }
}

#[test]
fn a_bit_is_turned_a_pdu_is_late_and_the_order_stays() {
    let Ends { proxy, mut host, mut target } = ends();
    let late = Duration::from_millis(100);
    let flip = proxy.rule(|pdu| (pdu.kind() == 7).then_some(Act::Flip(12)));
    let delay = proxy.rule(move |pdu| (pdu.kind() == 5).then_some(Act::Delay(late)));
    let begun = Instant::now();
    let sent = [pdu(7, 24, 1), pdu(5, 24, 2), pdu(4, 24, 3)].concat();
    target.write_all(&sent).unwrap();
    let mut expected = sent;
    expected[12] ^= 1;
    assert_eq!(take(&mut host, 72), expected);
    assert!(begun.elapsed() >= late);
    assert_eq!((flip.caught(), delay.caught()), (1, 1));
    let counts = proxy.counts();
    assert_eq!((counts.flipped, counts.delayed, counts.held, counts.pdus), (1, 1, 0, 3));
}

#[test]
fn cuts_end_what_they_say_and_how() {
    let is_reset = |stream: &mut TcpStream| {
        stream.read(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
    };
    let Ends { proxy, mut host, mut target } = ends();
    proxy.cut(Cut::Reset);
    assert!(is_reset(&mut host) && is_reset(&mut target));

    let Ends { proxy, mut host, mut target } = ends();
    proxy.cut(Cut::ResetHost);
    assert!(is_reset(&mut host));
    nothing_comes(&mut target);
    target.write_all(&pdu(5, 24, 1)).unwrap();

    let Ends { proxy, mut host, mut target } = ends();
    proxy.cut(Cut::FinHost);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    host.write_all(&pdu(4, 24, 1)).unwrap();
    assert_eq!(take(&mut target, 24), pdu(4, 24, 1), "it may still send");

    let Ends { proxy, mut host, mut target } = ends();
    let _after = proxy.rule(|_| Some(Act::CutAfter(10, Cut::Reset)));
    host.write_all(&pdu(4, 24, 1)).unwrap();
    assert!(is_reset(&mut host));
    let mut got = Vec::new();
    assert!(target.read_to_end(&mut got).is_err());
    assert!(got.is_empty() || got == pdu(4, 24, 1)[..10]);
}

#[test]
fn a_door_may_be_shut_or_silent_and_a_black_hole_never_answers() {
    let Ends { proxy, .. } = ends();
    proxy.set_door(Door::Refuse);
    let mut refused = TcpStream::connect(proxy.address()).unwrap();
    assert!(!matches!(refused.read(&mut [0]), Ok(1)));
    proxy.set_door(Door::Silent);
    let mut silent = TcpStream::connect(proxy.address()).unwrap();
    silent.write_all(&pdu(0, 128, 0)).unwrap();
    nothing_comes(&mut silent);
    assert_eq!(proxy.counts().connects, 3);
    let hole = BlackHole::start().unwrap();
    let limit = Duration::from_millis(100);
    let error = TcpStream::connect_timeout(&hole.address().unwrap(), limit).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
}

#[test]
fn pdus_know_their_commands() {
    let mut commands = pdu::Commands::default();
    let mut connect = pdu(kind::CAPSULE_CMD, 72, 0);
    (connect[8], connect[12], connect[50]) = (opcode::FABRICS, 1, 3);
    commands.note(&connect);
    assert_eq!(commands.queue, Some(3));
    let mut write = pdu(kind::CAPSULE_CMD, 72, 0);
    (write[8], write[10], write[48], write[56]) = (opcode::WRITE, 9, 100, 7);
    let command = Some(Command { opcode: opcode::WRITE, lba: 100, blocks: 8 });
    assert_eq!(commands.note(&write), command);
    let mut data = pdu(kind::H2C_DATA, 64, 0);
    (data[3], data[8]) = (24, 9);
    let bytes = &data[..];
    let seen =
        Pdu { link: 0, queue: commands.queue, way: Way::ToTarget, bytes, command: commands.note(bytes) };
    assert_eq!((seen.command, seen.data_at()), (command, Some(24)));
    assert!(seen.writes(107) && !seen.writes(108) && !seen.writes(99));
    assert!(!Pdu { queue: Some(0), ..seen }.writes(107), "an admin command");
}
