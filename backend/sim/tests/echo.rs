//! The world itself: bytes arrive whole and in order, the same seed gives the same history, faults are felt.

use hawser_runtime::{Fd, Op, Reactor, Runtime};
use hawser_sim::{World, WorldConfig};
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

fn address() -> SocketAddr {
    "10.0.0.1:4420".parse().unwrap()
}

/// Accepts for ever, and sends back what it gets.
fn serve(reactor: &Reactor, listener: Fd) {
    let runtime = reactor.runtime().clone();
    reactor.runtime().spawn(async move {
        while let Ok(fd) = runtime.accept(listener, None).await.into_result() {
            let runtime = runtime.clone();
            runtime.clone().spawn(async move { echo(&runtime, Fd(i32::try_from(fd).unwrap())).await });
        }
    });
}

async fn echo(runtime: &Runtime, fd: Fd) {
    loop {
        let mut buffer = vec![0u8; 777];
        let op = Op::Recv { fd, buffer: buffer.as_mut_ptr(), len: 777 };
        // SAFETY: the buffer is this future's, which is not dropped before its world ends.
        let received = unsafe { runtime.operate(&op, None) }.await.result;
        if received <= 0 {
            break;
        }
        let op = Op::Send { fd, buffer: buffer.as_ptr(), len: received.unsigned_abs() };
        // SAFETY: as above.
        if unsafe { runtime.operate(&op, None) }.await.result != received {
            break;
        }
    }
    runtime.close(fd);
}

async fn connect(runtime: &Runtime) -> Result<Fd, i32> {
    let fd = runtime.tcp_socket(false).unwrap();
    let v4 = libc::sockaddr_in {
        sin_family: 2,
        sin_port: 4420u16.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_be_bytes([10, 0, 0, 1]).to_be() },
        sin_zero: [0; 8],
    };
    let len = u32::try_from(size_of::<libc::sockaddr_in>()).unwrap();
    let op = Op::Connect { fd, address: (&raw const v4).cast(), len };
    // SAFETY: the address is this future's, which is not dropped before its world ends.
    let result = unsafe { runtime.operate(&op, None) }.await.result;
    if result == 0 { Ok(fd) } else { Err(result) }
}

/// What a client found out.
#[derive(Clone, Debug, Default, PartialEq)]
struct Report {
    echoed: Vec<u8>,
    failure: Option<i32>,
    finished: bool,
}

fn client(reactor: &Reactor, rounds: usize, report: &Rc<RefCell<Report>>) {
    let runtime = reactor.runtime().clone();
    let report = Rc::clone(report);
    reactor.runtime().spawn(async move {
        let fd = match connect(&runtime).await {
            Ok(fd) => fd,
            Err(errno) => {
                *report.borrow_mut() = Report { failure: Some(errno), finished: true, ..Report::default() };
                return;
            }
        };
        for round in 0..rounds {
            let payload: Vec<u8> = (0..5000).map(|i| u8::try_from((i * 7 + round) % 251).unwrap()).collect();
            let op = Op::Send { fd, buffer: payload.as_ptr(), len: 5000 };
            // SAFETY: the payload is this future's.
            let sent = unsafe { runtime.operate(&op, None) }.await.result;
            let mut got = 0;
            while sent == 5000 && got < 5000 {
                let mut buffer = vec![0u8; 5000];
                let op = Op::Recv { fd, buffer: buffer.as_mut_ptr(), len: 5000 };
                // SAFETY: the buffer is this future's, which is not dropped before its world ends.
                let received = unsafe { runtime.operate(&op, None) }.await.result;
                if received <= 0 {
                    report.borrow_mut().failure = Some(received);
                    break;
                }
                let received = usize::try_from(received).unwrap();
                report.borrow_mut().echoed.extend_from_slice(&buffer[..received]);
                got += received;
            }
            if got < 5000 {
                break;
            }
        }
        report.borrow_mut().finished = true;
        runtime.close(fd);
    });
}

fn history(seed: u64, rounds: usize, disturb: impl Fn(&World)) -> (u64, Report) {
    let world = World::new(WorldConfig::new(seed));
    let listener = world.listen(address());
    let mut reactors = [world.reactor(), world.reactor()];
    serve(&reactors[0], listener);
    let report = Rc::new(RefCell::new(Report::default()));
    disturb(&world);
    client(&reactors[1], rounds, &report);
    world.run(&mut reactors, Duration::from_secs(60), || report.borrow().finished).unwrap();
    let report = report.borrow().clone();
    (world.now().0, report)
}

#[test]
fn bytes_come_back_whole_and_in_order_and_a_seed_replays_exactly() {
    let expected: Vec<u8> = (0..4)
        .flat_map(|round| (0..5000).map(move |i| u8::try_from((i * 7 + round) % 251).unwrap()))
        .collect();
    let mut ends = Vec::new();
    for seed in 0..50 {
        let (end, report) = history(seed, 4, |_| ());
        assert_eq!(report.echoed, expected, "seed {seed}");
        assert_eq!(report.failure, None);
        assert_eq!(history(seed, 4, |_| ()), (end, report), "seed {seed} replays");
        ends.push(end);
    }
    ends.sort_unstable();
    ends.dedup();
    assert!(ends.len() > 40, "seeds differ");
}

#[test]
fn a_refused_connection_a_silence_and_a_deadline_are_felt() {
    let (_, refused) = history(1, 1, |world| world.set_down(address(), true));
    assert_eq!(refused.failure, Some(-libc::ECONNREFUSED));
    let (end, silent) = history(1, 1, |world| world.silence(address(), Duration::from_secs(5)));
    assert_eq!(silent.failure, None);
    assert!(end > 6_000_000_000, "nothing came before the silence ended");

    let world = World::new(WorldConfig::new(1));
    let listener = world.listen(address());
    let mut reactors = [world.reactor(), world.reactor()];
    serve(&reactors[0], listener);
    let report = Rc::new(RefCell::new(Report::default()));
    client(&reactors[1], 10_000, &report);
    let started = world.run(&mut reactors, Duration::from_secs(60), || report.borrow().echoed.len() > 20_000);
    assert_eq!(started, Ok(()));
    world.reset_connections(address());
    world.run(&mut reactors, Duration::from_secs(60), || report.borrow().finished).unwrap();
    assert_eq!(report.borrow().failure, Some(-libc::ECONNRESET));
}
