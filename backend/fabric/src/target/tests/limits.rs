//! How much peers may take from us.

use super::*;

/// What the kernel says of a socket's option.
fn option_of(socket: &impl AsRawFd, level: libc::c_int, option: libc::c_int) -> libc::c_int {
    let mut value: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of_val(&value)).unwrap();
    // SAFETY: `value` is an int, as long as is said.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut len) };
    assert_eq!(result, 0);
    value
}

/// A host without keep-alive that lost its power kept its connections for ever.
#[test]
fn accepted_sockets_notice_a_silent_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    prepare(&listener);
    let _host = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    assert_eq!(option_of(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE), 1);
    assert_eq!(option_of(&socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT), 60_000);
    assert_eq!(option_of(&socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE), 30);
    assert_eq!(option_of(&socket, libc::IPPROTO_TCP, libc::TCP_NODELAY), 1);
}

/// Memory was bounded for each connection, and not for all of them together.
#[test]
fn a_connection_beyond_the_common_budget_is_refused_and_counted() {
    let rig = Rig::mem();
    let target = rig.target.as_ref().unwrap();
    let (mut good, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    assert_eq!(target.stats().connections, 2);
    assert!(target.stats().memory_bytes >= 2 * connection::OWN_BYTES);
    // As if others had taken it all.
    target.shared.memory.charge(MEMORY_BYTES_MAX);
    for _ in 0..3 {
        let mut late = Peer::dial(rig.address);
        assert!(matches!(late.hear(), Heard::End));
    }
    assert_eq!(target.stats().connections_refused, 3);
    // Those that are there go on, one command at a time.
    let bytes = pattern(1 << 20, 1);
    for round in 0..8u64 {
        peer.send(write(round * 2048, bytes.len(), Sgl::transport), &[], &bytes);
    }
    for _ in 0..8 {
        assert_eq!(peer.end().status.code, StatusCode::SUCCESS);
    }
    assert_eq!(good.status(Sqe::keep_alive()), StatusCode::SUCCESS);
    assert!(target.stats().memory_bytes <= MEMORY_BYTES_MAX + 2 * connection::OWN_BYTES + (2 << 20));
    target.shared.memory.credit(MEMORY_BYTES_MAX);
    let (mut next, _) = Peer::admin_as(rig.address, NQN, [9; 16]);
    assert_eq!(next.status(Sqe::keep_alive()), StatusCode::SUCCESS);
    drop((good, peer, next));
    while target.stats().connections > 0 {
        std::thread::yield_now();
    }
    while target.stats().memory_bytes > 0 {
        std::thread::yield_now();
    }
}

/// What peers make happen as often as they like would be as many lines of the log.
#[test]
fn a_flood_is_worth_one_line_in_ten_seconds_which_counts_it() {
    let flood = Seldom::default();
    let begun = Instant::now();
    let lines: Vec<_> = (0..25_000u64)
        .filter_map(|millis| flood.add_at(begun + Duration::from_millis(millis)).map(|count| (millis, count)))
        .collect();
    // As said with the line: how many since the one before.
    assert_eq!(lines, [(0, 1), (10_000, 10_000), (20_000, 10_000)]);
    assert_eq!(flood.count.load(Ordering::Relaxed), 25_000);
    // After a quiet time the next is told at once.
    assert_eq!(flood.add_at(begun + Duration::from_secs(60)), Some(5000));
    assert_eq!(flood.add_at(begun + Duration::from_secs(61)), None);
}

/// Whether this process may have so many descriptors; asks for them.
fn may_open(count: u64) -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a whole rlimit, writable here and readable below.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_cur.max(count.min(limit.rlim_max));
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
    limit.rlim_cur >= count
}

/// Anybody could dial 2048 connections and say nothing: for half a minute every host that came back was refused, and memory was
/// so tight that those that were there kept no buffer.
#[test]
fn thousands_of_connections_that_say_nothing_disturb_nobody_and_keep_nobody_out() {
    const MANY: usize = CONNECTIONS_MAX + 50;
    if !may_open(2 * MANY as u64 + 1000) {
        return skips::skip(format_args!("this process may not have {} descriptors", 2 * MANY + 1000));
    }
    let rig = Rig::mem();
    let target = rig.target.as_ref().unwrap();
    let (mut admin, cntlid) = Peer::admin(rig.address, NQN);
    let mut peer = Peer::io(rig.address, NQN, cntlid, 1, Digests::NONE, true);
    let memory = target.stats().memory_bytes;
    let silent: Vec<_> = (0..MANY).map(|_| std::net::TcpStream::connect(rig.address).unwrap()).collect();
    while target.stats().connections_refused < (MANY - STRANGERS_MAX) as u64 {
        std::thread::yield_now();
    }
    assert_eq!(target.stats().connections_refused, (MANY - STRANGERS_MAX) as u64);
    assert_eq!(target.stats().memory_bytes, memory, "who has not connected takes nothing from others");
    while target.stats().connections > STRANGERS_MAX + 2 {
        std::thread::yield_now();
    }
    assert_eq!(peer.call(read(0, 65536), &[], &[]).0.status.code, StatusCode::SUCCESS);
    assert_eq!(admin.status(Sqe::keep_alive()), StatusCode::SUCCESS);
    // A host comes in, however many are silent.
    let (mut late, cntlid) = Peer::admin_as(rig.address, NQN, [9; 16]);
    assert_eq!(late.status(Sqe::keep_alive()), StatusCode::SUCCESS);
    let mut queue = Peer::open(rig.address, Digests::NONE);
    queue.host_id = [9; 16];
    assert!(queue.connect(NQN, 1, cntlid, true).status.is_success());
    assert_eq!(queue.call(read(0, 65536), &[], &[]).0.status.code, StatusCode::SUCCESS);
    drop(silent);
    while target.stats().connections > 4 {
        std::thread::yield_now();
    }
    assert_eq!(peer.call(read(0, 65536), &[], &[]).0.status.code, StatusCode::SUCCESS);
}
