//! A foreign client (libblkio) on a disk of a real daemon: what it asks reaches the device and the counters, and the daemon
//! ends in order with requests under way.

use crate::common::{Place, Serving, until};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use serde_json::Value;
use std::fs;
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connected client with one queue and 64 KiB of memory.
struct Client {
    queue: Blkioq,
    memory: MemoryRegion,
    _device: Blkio,
}

impl Client {
    fn connect(socket: &Path, read_only: bool) -> Client {
        let mut device = Blkio::new("virtio-blk-vhost-user").unwrap();
        device.set_str("path", socket.to_str().unwrap()).unwrap();
        device.set_bool("read-only", read_only).unwrap();
        device.connect().unwrap();
        device.set_i32("num-queues", 1).unwrap();
        let mut started = device.start().unwrap();
        let memory = device.alloc_mem_region(64 << 10).unwrap();
        device.map_mem_region(&memory).unwrap();
        Client { queue: started.queues.remove(0), memory, _device: device }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.memory.len);
        std::ptr::with_exposed_provenance_mut(self.memory.addr + offset)
    }

    /// Waits for one request's end.
    fn end(&mut self) -> i32 {
        let mut completion = [MaybeUninit::<Completion>::uninit()];
        assert_eq!(self.queue.do_io(&mut completion, 1, None, None).unwrap(), 1);
        // SAFETY: `do_io` filled one.
        unsafe { completion[0].assume_init_ref() }.ret
    }

    fn write(&mut self, start: u64, byte: u8, len: usize) -> i32 {
        // SAFETY: within the region, which nobody else uses while no request is under way.
        unsafe { std::ptr::write_bytes(self.at(0), byte, len) };
        self.queue.write(start, self.at(0), len, 0, ReqFlags::empty());
        self.end()
    }
}

#[test]
fn requests_that_had_to_be_copied_are_counted() {
    let place = Place::new();
    fs::write(place.path("store"), vec![0xee; 1 << 20]).unwrap();
    place.configure(
        "[[device]]\nname = \"f\"\nuri = \"file://@/store\"\n\
         [[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n\
         [[disk]]\nname = \"d\"\ndevice = \"f\"\nsocket = \"@/d.sock\"\n",
    );
    let daemon = place.serve();
    let mut client = Client::connect(&place.path("d.sock"), false);
    // Direct I/O takes no address in the middle of a sector.
    client.queue.read(0, client.at(5), 4096, 0, ReqFlags::empty());
    assert_eq!(client.end(), 0);
    let devices = daemon.status()["devices"].clone();
    // On some file systems there is no direct I/O; then nothing has to be copied.
    let direct = opened_for_direct_io(&daemon, &place.path("store"));
    assert_eq!(devices[0]["counters"]["bounced_requests"], u64::from(direct));
    assert_eq!(devices[1]["counters"], serde_json::json!({}), "memory is never copied");
    let metrics = daemon.http("GET", "/metrics", "").2;
    let want = format!("hawser_device_bounced_requests_total{{device=\"f\"}} {}", u64::from(direct));
    assert!(metrics.contains(&want), "{metrics}");
    assert!(!metrics.contains("bounced_requests_total{device=\"m\"}"), "{metrics}");
    assert_eq!(daemon.end(), Some(0));
}

fn opened_for_direct_io(daemon: &Serving, file: &Path) -> bool {
    let proc = format!("/proc/{}", daemon.pid());
    let numbers = fs::read_dir(format!("{proc}/fd")).unwrap().flatten().filter_map(|fd| {
        (fs::read_link(fd.path()).ok()? == file).then(|| fd.file_name().into_string().unwrap())
    });
    let flags = |number: String| {
        let info = fs::read_to_string(format!("{proc}/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
        i32::from_str_radix(&flags, 8).unwrap()
    };
    numbers.map(flags).any(|flags| flags & libc::O_DIRECT != 0)
}

fn disk(daemon: &Serving, name: &str) -> Value {
    serde_json::from_str(&daemon.http("GET", &format!("/v1/disks/{name}"), "").2).unwrap()
}

#[test]
fn requests_reach_the_device_and_the_counters() {
    let place = Place::new();
    fs::write(place.path("store"), vec![0xee; 1 << 20]).unwrap();
    place.configure(
        "[[device]]\nname = \"f\"\nuri = \"file://@/store\"\n\
         [[disk]]\nname = \"rw\"\ndevice = \"f\"\nsocket = \"@/rw.sock\"\nserial = \"SN-7\"\n\
         [[disk]]\nname = \"ro\"\ndevice = \"f\"\nsocket = \"@/ro.sock\"\nread_only = true\n",
    );
    let daemon = place.serve();
    let mut client = Client::connect(&place.path("rw.sock"), false);
    assert_eq!(disk(&daemon, "rw")["state"], "connected");
    assert_eq!(client.write(8192, 7, 4096), 0);
    client.queue.flush(0, ReqFlags::empty());
    assert_eq!(client.end(), 0);
    for _ in 0..3 {
        client.queue.read(8192, client.at(8192), 4096, 0, ReqFlags::empty());
        assert_eq!(client.end(), 0);
    }
    let store = fs::read(place.path("store")).unwrap();
    assert!(
        store[8192..12288].iter().all(|byte| *byte == 7) && store[..8192].iter().all(|byte| *byte == 0xee)
    );
    until("everything is counted", || disk(&daemon, "rw")["requests"]["read"] == 3);
    let view = disk(&daemon, "rw");
    assert_eq!(
        view["requests"],
        serde_json::json!({"read": 3, "write": 1, "flush": 1, "discard": 0, "write_zeroes": 0})
    );
    assert_eq!((&view["bytes"]["read"], &view["bytes"]["write"]), (&12288.into(), &4096.into()));
    assert_eq!(view["latency_ns"]["read"]["count"], 3);
    assert!(view["latency_ns"]["read"]["p50"].as_u64().unwrap() > 0);
    assert_eq!((&view["rings"]["sessions"], &view["rings"]["mistakes"]), (&1.into(), &0.into()));
    assert!(view["rings"]["kicks"].as_u64().unwrap() > 0);
    assert_eq!(daemon.status()["devices"][0]["requests"]["read"], 3);
    let metrics = daemon.http("GET", "/metrics", "").2;
    assert!(metrics.contains("hawser_disk_requests_total{disk=\"rw\",kind=\"read\"} 3"), "{metrics}");
    assert!(metrics.contains("hawser_device_bounced_requests_total{device=\"f\"} 0"), "{metrics}");
    assert!(metrics.contains("hawser_disk_sessions_total{disk=\"rw\"} 1"), "{metrics}");

    let ro = disk(&daemon, "ro");
    assert_eq!((&ro["read_only"], &ro["state"]), (&true.into(), &"listening".into()));
    // A disk goes away under its client; the daemon and its other disks do not mind.
    place.ok(&["disk", "remove", "rw"]);
    assert!(!place.path("rw.sock").exists());
    let mut client = Client::connect(&place.path("ro.sock"), true);
    client.queue.read(8192, client.at(0), 4096, 0, ReqFlags::empty());
    assert_eq!(client.end(), 0);
    assert_eq!(daemon.end(), Some(0));
}

/// A daemon whose disk has a request under way that does not end, because its target has been stopped.
struct Stuck {
    // The order is that in which they are dropped.
    client: Client,
    daemon: Serving,
    host: Place,
    target: Serving,
    _storage: Place,
}

/// `write`: it is a write, of whose end nobody can be sure when its connection is given up; else a read.
fn stuck(drain_timeout: u32, write: bool) -> Stuck {
    let storage = Place::new();
    storage.configure(
        "[[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"m\"\n",
    );
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    let host = Place::new();
    // A target that is silent for long is not given up meanwhile.
    host.configure(&format!(
        "drain_timeout = {drain_timeout}\n\
         [[device]]\nname = \"r\"\nuri = \"nvme+{listen}/nqn.2026-11.io.hawser:t\"\n\
         keep_alive_tmo = 3600\nio_timeout = 3600\n\
         [[device]]\nname = \"other\"\nuri = \"mem:?size=1MiB\"\n\
         [[disk]]\nname = \"d\"\ndevice = \"r\"\nsocket = \"@/d.sock\"\n",
    ));
    let daemon = host.serve();
    assert_eq!(
        daemon.disk("d").0,
        "listening",
        "a target that answers is reached before the daemon is ready"
    );
    let mut client = Client::connect(&host.path("d.sock"), false);
    assert_eq!(client.write(0, 1, 4096), 0);
    target.stop();
    if write {
        client.queue.write(0, client.at(0), 4096, 0, ReqFlags::empty());
    } else {
        client.queue.read(0, client.at(0), 4096, 0, ReqFlags::empty());
    }
    // Starts it, and does not wait for it.
    let mut none: [MaybeUninit<Completion>; 0] = [];
    assert_eq!(client.queue.do_io(&mut none, 0, None, None).unwrap(), 0);
    until("it is taken", || disk(&daemon, "d")["rings"]["batches"] == 2);
    Stuck { client, daemon, host, target, _storage: storage }
}

#[test]
fn a_drain_that_cannot_end_is_given_up_after_its_time() {
    let Stuck { client, daemon, host, target, _storage } = stuck(1, false);
    let since = Instant::now();
    assert_eq!(daemon.end(), Some(0));
    assert!(since.elapsed() >= Duration::from_secs(1), "it waited for its drain_timeout");
    assert!(!host.path("d.sock").exists() && !host.path("api").exists());
    drop(client);
    target.signal("CONT");
    assert_eq!(target.end(), Some(0));
}

/// A disk was removed and added again while its target still had a write of it: what the new disk wrote could be overwritten.
#[test]
fn a_device_that_has_writes_of_a_removed_disk_is_not_offered_again() {
    let Stuck { client, daemon, host, target, _storage } = stuck(1, true);
    host.ok(&["disk", "remove", "d"]);
    assert!(host.log().contains("disk d: removed; device r still has requests of it"), "{}", host.log());
    drop(client);
    let socket = host.text("n.sock");
    let add = |device| ["disk", "add", "n", "--device", device, "--socket", &socket];
    let error = host.fails(&add("r"), 1);
    assert!(error.contains("device r still has requests of a disk that was removed"), "{error}");
    host.ok(&add("other"));
    // The next process waits as after a kill.
    assert_eq!(daemon.end(), Some(0));
    let state = fs::read_to_string(host.path("api.state/state.json")).unwrap();
    assert!(state.contains("\"ended\": false"), "{state}");
    target.signal("CONT");
    assert_eq!(target.end(), Some(0));
}

#[test]
fn the_first_signal_drains_and_the_second_ends_at_once() {
    let Stuck { client, daemon, host, target: _target, _storage } = stuck(3600, false);
    daemon.signal("TERM");
    until("it drains", || host.log().contains("SIGTERM: draining for up to 3600 s"));
    until("its disk is being stopped", || daemon.status()["disks"] == serde_json::json!([]));
    // The wait below is far shorter than the drain that is under way.
    daemon.signal("TERM");
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(host.log().contains("SIGTERM again: ending at once"), "{}", host.log());
    let state = fs::read_to_string(host.path("api.state/state.json")).unwrap();
    assert!(state.contains("\"ended\": false"), "the next process waits for what is left: {state}");
    drop(client);
}

#[test]
fn a_daemon_can_be_its_own_target() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let place = Place::new();
    place.configure(&format!(
        "[[device]]\nname = \"r\"\nuri = \"nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:t\"\n\
         [[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n\
         [[disk]]\nname = \"d\"\ndevice = \"r\"\nsocket = \"@/d.sock\"\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:{port}\"]\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"m\"\n",
    ));
    let daemon = place.serve();
    until("the disk listens", || daemon.disk("d").0 == "listening");
    let mut client = Client::connect(&place.path("d.sock"), false);
    assert_eq!(client.write(4096, 9, 4096), 0);
    assert_eq!(daemon.status()["devices"][1]["requests"]["write"], 1);
    assert_eq!(daemon.end(), Some(0));
}
