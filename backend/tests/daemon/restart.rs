//! A restart as systemd does it, seen by a VM that writes all the time: a pause, no error, and nothing lost.

use crate::common::{PATIENCE, Place};
use crate::frontend::{DATA, Guest, T_IN, T_OUT, Wish};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// What a manager hears.
struct Manager(UnixDatagram);

impl Manager {
    fn hear(&self) -> String {
        let mut buffer = [0; 4096];
        let len = self.0.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    /// Waits for a message that begins so; all of them until then.
    fn hear_until(&self, begins: &str) -> Vec<String> {
        let mut heard = Vec::new();
        while !heard.last().is_some_and(|last: &String| last.starts_with(begins)) {
            heard.push(self.hear());
        }
        heard
    }
}

const WRITES: usize = 16;

/// Puts writes of 4 KiB into the ring, all of them at once, and waits for none.
fn begin(guest: &mut Guest, fill: u8, which: std::ops::Range<usize>) {
    for index in which {
        let (sector, at) = (index as u64 * 8, DATA + index as u64 * 0x2000);
        let parts =
            guest.plain(T_OUT, sector, &[fill.wrapping_add(u8::try_from(index).unwrap()); 4096], 0, at);
        guest.submit(0, &parts);
    }
}

/// The guest knows nothing of daemons: it waits, however long that takes, and sees no error.
fn finish(guest: &mut Guest) {
    let since = Instant::now();
    for _ in 0..WRITES {
        while guest.rings[0].used_idx(&guest.ram) == guest.rings[0].last_used {
            assert!(since.elapsed() < PATIENCE, "a write never ended");
            std::thread::sleep(Duration::from_millis(1));
        }
        guest.rings[0].wait_used(&guest.ram);
    }
    for index in 0..WRITES as u64 {
        assert_eq!(guest.ram.read(DATA + index * 0x2000 + 16, 1), [0], "write {index} failed");
    }
}

#[test]
fn a_restart_under_load_is_a_pause_for_the_guest() {
    let place = Place::new();
    std::fs::File::create(place.path("store")).unwrap().set_len(1 << 20).unwrap();
    place.configure(
        "drain_timeout = 3\n[[device]]\nname = \"f\"\nuri = \"file://@/store\"\n\
         [[disk]]\nname = \"d\"\ndevice = \"f\"\nsocket = \"@/d.sock\"\n",
    );
    let manager = Manager(UnixDatagram::bind(place.path("notify")).unwrap());
    manager.0.set_read_timeout(Some(PATIENCE)).unwrap();
    let notify = place.text("notify");
    let start = || place.serve_with(&[("NOTIFY_SOCKET", &notify)]);
    let wish = Wish { inflight: true, ..Wish::default() };

    let mut daemon = start();
    manager.hear_until("READY=1\n");
    let mut guest = Guest::connect(&place.path("d.sock"), &wish);
    for round in 0..5u8 {
        let fill = round * 32 + 1;
        begin(&mut guest, fill, 0..WRITES / 2);
        daemon.signal("TERM");
        // systemd kills who does not ask for the time that its drain takes.
        let heard = manager.hear_until("STOPPING=1\n");
        assert!(heard.last().unwrap().contains("EXTEND_TIMEOUT_USEC=13000000\n"), "{heard:?}");
        assert_eq!(daemon.wait().code(), Some(0));
        // The guest goes on to ask while nobody is there.
        assert!(!place.path("d.sock").exists());
        begin(&mut guest, fill, WRITES / 2..WRITES);
        daemon = start();
        let heard = manager.hear_until("READY=1\n");
        assert!(
            heard.iter().any(|said| said.starts_with("STATUS=Starting\nEXTEND_TIMEOUT_USEC=")),
            "{heard:?}"
        );
        guest = guest.reconnect(&place.path("d.sock"), &wish);
        finish(&mut guest);
        for index in 0..WRITES {
            let want = vec![fill + u8::try_from(index).unwrap(); 4096];
            assert_eq!(guest.request(T_IN, index as u64 * 8, &[], 4096), (0, want), "round {round}, {index}");
        }
    }
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    let store = std::fs::read(place.path("store")).unwrap();
    for index in 0..WRITES {
        let want = 4 * 32 + 1 + u8::try_from(index).unwrap();
        assert!(store[index * 4096..][..4096].iter().all(|byte| *byte == want), "block {index}");
    }
}
