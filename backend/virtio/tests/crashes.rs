//! Requests that kill the process, in processes of their own: the test runs itself again as the server.

mod support;

use hawser_block::{Channel, Completion, Device, Geometry, Request};
use hawser_runtime::{Runtime, SourceId};
use hawser_virtio::{CrashError, CrashFile, VhostDisk};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use support::frontend::*;
use support::{Folder, TestDevice, config, eventually, reactor, small};

/// The block whose request kills the server.
const DEADLY: u64 = 666;

/// Dies in the way that its folder's file `death` says when it is given the deadly block.
struct Deadly(TestDevice, String);

struct DeadlyChannel(Box<dyn Channel>, String, Runtime);

impl Channel for DeadlyChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        if batch.iter().any(|request| request.lba.0 == DEADLY) {
            match self.1.as_str() {
                "panic" => panic!("deadly"),
                // SAFETY: that is the point.
                "segv" => unsafe { std::ptr::null_mut::<u8>().write_volatile(1) },
                "ill" => {
                    // SAFETY: raises the signal on this thread; the process dies of it.
                    unsafe { libc::raise(libc::SIGILL) };
                }
                // SAFETY: plain system call.
                "kill" => unsafe {
                    libc::kill(libc::getpid(), libc::SIGKILL);
                },
                "stuck" => loop {
                    std::thread::park();
                },
                // Not in the queue's turn, but some time later, in work of the device's own. The request never ends.
                "late" => {
                    batch.retain(|request| request.lba.0 != DEADLY);
                    let runtime = self.2.clone();
                    self.2.spawn(async move {
                        runtime.sleep(Duration::from_millis(300)).await;
                        std::process::abort();
                    });
                }
                _ => {}
            }
        }
        self.0.submit(batch);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        self.0.reap(ended);
    }
}

impl Device for Deadly {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn geometry(&self) -> Option<Geometry> {
        self.0.geometry()
    }
    fn state(&self) -> hawser_block::DeviceState {
        Device::state(&self.0)
    }
    fn uuid(&self) -> [u8; 16] {
        self.0.uuid()
    }
    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}
    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        Box::new(DeadlyChannel(self.0.channel(runtime, user), self.1.clone(), runtime.clone()))
    }
    fn stats(&self) -> Arc<hawser_block::StatsSet> {
        self.0.stats()
    }
}

/// The server: says what it found, and serves until it is killed.
#[test]
fn server() {
    let Ok(folder) = std::env::var("HAWSER_CRASH_TEST") else { return };
    let folder = Path::new(&folder);
    // SAFETY: plain system call: the server ends with its parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // The tests' profile unwinds; the daemon's aborts.
    std::panic::set_hook(Box::new(|_| std::process::abort()));
    let (file, crash) = CrashFile::open(&folder.join("crash")).unwrap();
    let death = std::fs::read_to_string(folder.join("death")).unwrap();
    let aside = file.set_aside();
    let mut config = config(&folder.join("s"));
    config.crash = Some(Arc::new(file));
    let reactor = reactor();
    let device = Arc::new(Deadly(TestDevice::new(small()), death));
    let disk = VhostDisk::start(config, device, vec![reactor.handle().clone()]).unwrap();
    // The test harness has taken standard output: a file, then.
    std::fs::write(folder.join("report.new"), format!("{aside:?} {crash:?}")).unwrap();
    std::fs::rename(folder.join("report.new"), folder.join("report")).unwrap();
    loop {
        std::thread::park();
        let _ = &disk;
    }
}

struct Server(Child);

impl Server {
    fn start(folder: &Folder, death: &str) -> (Server, String) {
        let report = folder.path("report");
        let _ = std::fs::remove_file(&report);
        std::fs::write(folder.path("death"), death).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server", "--nocapture", "--test-threads=1"])
            .env("HAWSER_CRASH_TEST", folder.path(""))
            .env("RUST_BACKTRACE", "0")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Server(child);
        eventually("the server reports", || report.exists());
        (server, std::fs::read_to_string(&report).unwrap())
    }

    fn dies_of(mut self) -> Option<i32> {
        self.0.wait().unwrap().signal()
    }

    fn kill(mut self, signal: i32) {
        // SAFETY: our own child, not waited for yet.
        unsafe { libc::kill(i32::try_from(self.0.id()).unwrap(), signal) };
        let _ = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wish() -> Wish {
    Wish { inflight: true, size: 64, ..Wish::default() }
}

fn offer(guest: &mut Guest, sectors: &[u64]) {
    let old = guest.rings[0].next_available;
    for (index, sector) in sectors.iter().enumerate() {
        let parts = guest.plain(T_OUT, *sector, &[1; 512], 0, DATA + 4096 * index as u64);
        let head = guest.rings[0].put_chain(&guest.ram, &parts);
        guest.rings[0].offer(&guest.ram, head);
    }
    guest.rings[0].kick_if_wanted(&guest.ram, old);
}

#[test]
fn the_second_crash_in_the_same_request_sets_its_disk_aside_until_it_is_resumed() {
    for (death, signal) in [("panic", libc::SIGABRT), ("segv", libc::SIGSEGV), ("ill", libc::SIGILL)] {
        let folder = Folder::new();
        let (server, report) = Server::start(&folder, death);
        assert_eq!(report, "[] None");
        let mut guest = Guest::connect(&folder.path("s"), &wish());
        assert_eq!(guest.request(T_OUT, 1, &[1; 512], 0).0, 0);
        // In a batch: the first crash knows the batch, the replay one by one names the request.
        offer(&mut guest, &[10, 11, DEADLY, 12]);
        assert_eq!(server.dies_of(), Some(signal), "{death}");

        let (server, report) = Server::start(&folder, death);
        let right = format!("signal: {signal}, request: Some(CrashedRequest {{ disk: \"test\", queue: 0");
        assert!(report.starts_with("[] ") && report.contains(&right), "{report}");
        assert!(report.contains("counters: (1, 4), again: false"), "{report}");
        let (ram, rings, inflight) = (guest.ram, guest.rings, guest.inflight);
        drop((guest.frontend, guest.stream));
        // It dies in the middle of this connection, maybe before its last message is answered.
        let folder_path = folder.path("s");
        let connected = std::thread::spawn(move || {
            // The connection is kept: its end would stop the replay.
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                Guest::with(&folder_path, &wish(), ram, rings, inflight)
            }))
            .ok()
        });
        assert_eq!(server.dies_of(), Some(signal), "{death}");
        drop(connected.join().unwrap());

        let (server, report) = Server::start(&folder, "none");
        assert!(report.starts_with("[\"test\"] "), "{report}");
        assert!(report.contains("counters: (3, 3), again: true"), "{report}");
        server.kill(libc::SIGKILL);
        // It stays aside over restarts, until somebody resumes it; then the next crash is the first again.
        let (file, crash) = CrashFile::open(&folder.path("crash")).unwrap();
        assert!(crash.is_none() && file.is_set_aside("test"));
        file.resume("test");
        assert!(!file.is_set_aside("test") && file.set_aside().is_empty());
    }
}

/// Reconnects to a server that is going to die of what is replayed, with traffic on a second ring, and waits for its death.
fn replay_to_death(folder: &Folder, server: Server, guest: Guest) -> Guest {
    let Guest { ram, rings, inflight, frontend, stream, .. } = guest;
    drop((frontend, stream));
    let ring_parts: Vec<_> = rings.iter().map(|ring| (ring.next_available, ring.last_used)).collect();
    let (file, log) = (ram.file.try_clone().unwrap(), inflight.as_ref().unwrap().1.try_clone().unwrap());
    let description = inflight.as_ref().unwrap().0;
    let path = folder.path("s");
    let connected = std::thread::spawn(move || {
        // It may die before the last message is answered.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let guest = Guest::with(&path, &two_rings(), ram, rings, inflight);
            // The second ring's queue works, on nothing.
            while !guest.is_ended_now() {
                guest.rings[1].kick.write(1).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        }));
    });
    assert_eq!(server.dies_of(), Some(libc::SIGABRT));
    connected.join().unwrap();
    let ram = Ram::of(file, RAM_GUEST, RAM_BYTES);
    let mut rings: Vec<_> = (0..2).map(|index| new_ring(index, &two_rings())).collect();
    for (ring, (next_available, last_used)) in rings.iter_mut().zip(ring_parts) {
        (ring.next_available, ring.last_used) = (next_available, last_used);
    }
    Guest::unconnected(ram, rings, Some((description, log)))
}

fn two_rings() -> Wish {
    Wish { rings: 2, ..wish() }
}

/// The device died of the request in its own time, not in the queue's. The first crash named nobody; at the second, in the
/// replay, the note was gone as soon as another queue of the reactor had its turn. Only the third, or none, set the disk aside.
#[test]
fn a_crash_in_the_devices_own_work_is_blamed_on_what_is_replayed_at_the_second_time() {
    let folder = Folder::new();
    let (server, _) = Server::start(&folder, "late");
    let mut guest = Guest::connect(&folder.path("s"), &two_rings());
    offer(&mut guest, &[10, DEADLY]);
    assert_eq!(server.dies_of(), Some(libc::SIGABRT));
    let (server, report) = Server::start(&folder, "late");
    assert_eq!(report, "[] Some(Crash { signal: 6, request: None })");
    replay_to_death(&folder, server, guest);
    let (_server, report) = Server::start(&folder, "none");
    assert!(
        report.starts_with("[\"test\"] ") && report.contains("counters: (1, 1), again: true"),
        "{report}"
    );
}

#[test]
fn a_kill_between_a_crash_that_names_nobody_and_a_replay_makes_that_the_first() {
    let folder = Folder::new();
    let (server, _) = Server::start(&folder, "late");
    let mut guest = Guest::connect(&folder.path("s"), &two_rings());
    offer(&mut guest, &[10, DEADLY]);
    assert_eq!(server.dies_of(), Some(libc::SIGABRT));
    Server::start(&folder, "none").0.kill(libc::SIGKILL);
    let (server, report) = Server::start(&folder, "late");
    assert_eq!(report, "[] None");
    let guest = replay_to_death(&folder, server, guest);
    let (server, report) = Server::start(&folder, "late");
    assert!(report.starts_with("[] ") && report.contains("counters: (1, 1), again: false"), "{report}");
    replay_to_death(&folder, server, guest);
    let (_server, report) = Server::start(&folder, "none");
    assert!(report.starts_with("[\"test\"] ") && report.contains("again: true"), "{report}");
}

/// Every log counts its requests from 0. Two guests, each with a first request that we died of, looked like one that tried it
/// twice; so did a crash before an orderly end and one after it.
#[test]
fn the_same_numbers_in_another_log_or_after_an_orderly_end_are_another_request() {
    let folder = Folder::new();
    let crash = |death: &str| {
        let (server, report) = Server::start(&folder, death);
        let mut guest = Guest::connect(&folder.path("s"), &two_rings());
        offer(&mut guest, &[DEADLY]);
        assert_eq!(server.dies_of(), Some(libc::SIGABRT));
        (guest, report)
    };
    crash("panic");
    let (guest, report) = crash("panic");
    assert!(report.contains("head: 0, counters: (0, 0), again: false"), "{report}");
    let (server, report) = Server::start(&folder, "panic");
    assert!(
        report.starts_with("[] ") && report.contains("head: 0, counters: (0, 0), again: false"),
        "{report}"
    );
    server.kill(libc::SIGKILL);
    CrashFile::open(&folder.path("crash")).unwrap().0.end_in_order();
    let (server, _) = Server::start(&folder, "panic");
    replay_to_death(&folder, server, guest);
    let (_server, report) = Server::start(&folder, "none");
    assert!(report.starts_with("[] ") && report.contains("counters: (0, 0), again: false"), "{report}");
}

#[test]
fn deaths_from_outside_never_count() {
    let folder = Folder::new();
    let (server, _) = Server::start(&folder, "kill");
    let mut guest = Guest::connect(&folder.path("s"), &wish());
    offer(&mut guest, &[DEADLY]);
    assert_eq!(server.dies_of(), Some(libc::SIGKILL));
    // While a request is being worked on: a signal that another process sends is not our crash either.
    for signal in [libc::SIGTERM, libc::SIGKILL, libc::SIGABRT, libc::SIGSEGV] {
        let (server, report) = Server::start(&folder, "stuck");
        assert_eq!(report, "[] None", "before {signal}");
        let mut guest = Guest::connect(&folder.path("s"), &wish());
        offer(&mut guest, &[DEADLY]);
        std::thread::sleep(Duration::from_millis(50));
        server.kill(signal);
    }
    let (_server, report) = Server::start(&folder, "none");
    assert_eq!(report, "[] None");
}

#[test]
fn a_record_of_an_unknown_version_is_refused_and_left_as_it_is() {
    let folder = Folder::new();
    let path = folder.path("crash");
    let (file, _) = CrashFile::open(&path).unwrap();
    assert_eq!(file.disk("a"), Some(0));
    assert_eq!(file.disk("b"), Some(1));
    assert_eq!(file.disk("a"), Some(0));
    assert_eq!(file.disk(&"x".repeat(121)), None);
    drop(file);
    let edit = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    edit.write_at(&2u32.to_ne_bytes(), 8).unwrap();
    let before = std::fs::read(&path).unwrap();
    match CrashFile::open(&path) {
        Err(error @ CrashError::UnknownVersion { found: 2, .. }) => {
            assert!(error.to_string().contains("run state of version 2; this program knows version 1"));
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("opened"),
    }
    assert!(std::fs::read(&path).unwrap() == before);
    edit.write_at(&1u32.to_ne_bytes(), 8).unwrap();
    let (file, _) = CrashFile::open(&path).unwrap();
    // Names that nothing hangs on make room: 1024 disks of every run.
    assert_eq!(file.disk("b"), Some(0));
    for index in 1..1024u32 {
        assert_eq!(file.disk(&format!("disk {index}")), Some(index));
    }
    assert_eq!(file.disk("one more"), None);
    // Something else altogether.
    std::fs::write(&path, "not a record").unwrap();
    assert!(matches!(CrashFile::open(&path), Err(CrashError::UnknownVersion { found: 0, .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"not a record");
}

/// Slots of the load below: each has three descriptors and a page of its own.
const SLOTS: u16 = 20;

/// Offers every slot that is free.
fn offer_free(guest: &mut Guest, out: &mut [bool], offered: &mut u64) {
    let old = guest.rings[0].next_available;
    for slot in 0..SLOTS {
        if std::mem::replace(&mut out[usize::from(slot)], true) {
            continue;
        }
        let at = DATA + 4096 * u64::from(slot);
        let parts = guest.plain(T_OUT, *offered % 600, &[1; 512], 0, at);
        let ring = &mut guest.rings[0];
        for (step, part) in (0u16..).zip(&parts) {
            let here = slot * 3 + step;
            let flags = if part.write { 2 } else { 1 };
            ring.put_descriptor(
                &guest.ram,
                ring.descriptor_at(here),
                part.address,
                part.len,
                flags,
                here + 1,
            );
        }
        ring.offer(&guest.ram, slot * 3);
        *offered += 1;
    }
    guest.rings[0].kick_if_wanted(&guest.ram, old);
}

fn take(guest: &mut Guest, out: &mut [bool], done: &mut u64) {
    while let Some((head, _)) = guest.rings[0].take_used(&guest.ram) {
        let slot = head / 3;
        assert!(std::mem::replace(&mut out[usize::from(slot)], false), "head {head} was shown twice");
        assert_eq!(guest.ram.read(DATA + 4096 * u64::from(slot) + 16, 1), [0]);
        *done += 1;
    }
}

#[test]
fn twenty_kills_under_load_lose_nothing_and_repeat_nothing() {
    let folder = Folder::new();
    let (mut out, mut offered, mut done) = ([false; SLOTS as usize], 0, 0);
    let (mut server, _) = Server::start(&folder, "none");
    let mut guest = Guest::connect(&folder.path("s"), &wish());
    for round in 0..20u64 {
        let until = done + 50 + round * 37 % 200;
        eventually("progress", || {
            offer_free(&mut guest, &mut out, &mut offered);
            take(&mut guest, &mut out, &mut done);
            done > until
        });
        offer_free(&mut guest, &mut out, &mut offered);
        if round % 4 == 3 {
            server.kill(libc::SIGTERM);
        } else {
            server.kill(libc::SIGKILL);
        }
        let report;
        (server, report) = Server::start(&folder, "none");
        assert_eq!(report, "[] None");
        guest = guest.reconnect(&folder.path("s"), &wish());
    }
    eventually("everything ends", || {
        take(&mut guest, &mut out, &mut done);
        done == offered
    });
    drop(server);
}
