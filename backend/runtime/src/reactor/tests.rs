//! Reactors on threads: events, timers, messages, tasks, and what happens to all of them at the end.

use super::*;
use crate::op::Op;
use std::sync::mpsc;
use std::time::Duration;

struct Echo {
    heard: mpsc::Sender<Event>,
}

impl Source for Echo {
    fn poll(&mut self, _: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let _ = self.heard.send(event);
        }
    }
}

#[test]
fn events_timers_messages_and_tasks_arrive() {
    let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
    let (heard, hears) = mpsc::channel();
    // SAFETY: plain system call.
    let raw = unsafe { libc::eventfd(1, libc::EFD_NONBLOCK) };
    let tell = heard.clone();
    thread.handle().call(move |runtime| {
        let fd = Fd(raw);
        let id = runtime.add_source(Rc::new(RefCell::new(Echo { heard: tell })));
        runtime.poll_readable(id, 5, fd);
        runtime.timer(id, runtime.now() + Duration::from_millis(20), 9);
        let inner = runtime.clone();
        runtime.spawn(async move {
            inner.sleep(Duration::from_millis(40)).await;
            inner.cancel(id, 5);
            // SAFETY: no memory is named.
            let nop = unsafe { inner.operate(&Op::Nop, None) }.await;
            assert_eq!(nop.result, 0);
        });
    });
    let next = || hears.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(next(), Event::Op { key: 5, completed: Completed { result: 1, more: true } });
    assert_eq!(next(), Event::Timer { key: 9 });
    assert_eq!(next(), Event::Op { key: 5, completed: Completed { result: -libc::ECANCELED, more: false } });
    drop(thread);
    // SAFETY: ours since the eventfd call.
    unsafe { libc::close(raw) };
}

#[test]
fn an_operation_dropped_by_its_task_keeps_its_buffer_until_it_ends() {
    let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
    let mut fds = [0i32; 2];
    // SAFETY: `fds` has room for two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr()) }, 0);
    struct Guard(mpsc::Sender<()>, Box<[u8; 64]>);
    impl Drop for Guard {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }
    let (dropped, drops) = mpsc::channel();
    thread.handle().call(move |runtime| {
        let mut guard = Guard(dropped, Box::new([0; 64]));
        let op = Op::Recv { fd: Fd(fds[0]), buffer: guard.1.as_mut_ptr(), len: 64 };
        // SAFETY: the guard owns the buffer.
        drop(unsafe { runtime.operate(&op, Some(Box::new(guard))) });
    });
    drops.recv_timeout(Duration::from_secs(20)).expect("freed once the cancellation was delivered");
    drop(thread);
    // SAFETY: ours since socketpair.
    unsafe {
        libc::close(fds[0]);
        libc::close(fds[1]);
    }
}

#[test]
fn an_ended_reactor_drops_its_tasks_and_answers_nobody() {
    let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
    let handle = thread.handle().clone();
    let (dropped, drops) = mpsc::channel::<()>();
    handle.call(move |runtime| {
        let runtime_kept = runtime.clone();
        runtime.spawn(async move {
            let _until_dropped = dropped;
            runtime_kept.sleep(Duration::from_secs(3600)).await;
        });
    });
    drop(thread);
    assert_eq!(drops.recv_timeout(Duration::from_secs(20)), Err(mpsc::RecvTimeoutError::Disconnected));
    assert_eq!(handle.call(|_| 1), None);
}

#[test]
fn what_an_abandoned_operation_owned_may_use_the_executor_when_it_is_dropped() {
    let thread = ReactorThread::spawn("test", ReactorConfig::default()).unwrap();
    struct Spawns(Runtime, mpsc::Sender<()>);
    impl Drop for Spawns {
        fn drop(&mut self) {
            let told = self.1.clone();
            // SAFETY: no memory is named.
            let op = unsafe { self.0.operate(&Op::Nop, None) };
            self.0.spawn(async move {
                op.await;
                let _ = told.send(());
            });
        }
    }
    let (tell, told) = mpsc::channel();
    thread.handle().call(move |runtime| {
        // SAFETY: no memory is named.
        drop(unsafe { runtime.operate(&Op::Nop, Some(Box::new(Spawns(runtime.clone(), tell)))) });
    });
    told.recv_timeout(Duration::from_secs(20)).expect("the drop ran, and its task");
}

#[test]
fn a_sleeping_reactor_is_woken_every_time() {
    let thread = ReactorThread::spawn("test", ReactorConfig { cpu: None, poll_us: 0 }).unwrap();
    for round in 0..10_000 {
        assert_eq!(thread.handle().call(move |_| round), Some(round));
    }
}
