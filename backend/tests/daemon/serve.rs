//! The daemon's life: starting, refusing to start, ending, dying, and what the next one makes of it.

use crate::common::{Place, until};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};

const DISK: &str = r#"
[[device]]
name = "m0"
uri = "mem:?size=16MiB"
[[disk]]
name = "d"
device = "m0"
socket = "@/d.sock"
socket_mode = "0660"
"#;

#[test]
fn a_daemon_listens_while_it_serves_and_leaves_only_its_state_behind() {
    let place = Place::new();
    place.configure(DISK);
    let daemon = place.serve();
    let mode = |name: &str| fs::metadata(place.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("api"), mode("api.state"), mode("d.sock")), (0o600, 0o700, 0o660));
    let status = daemon.status();
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(status["disks"][0]["state"], "listening");
    assert_eq!(status["devices"][0]["size_bytes"], 16 << 20);
    UnixStream::connect(place.path("d.sock")).unwrap();
    assert_eq!(daemon.end(), Some(0));
    assert_eq!(place.names(), ["api.state", "conf.d", "hawser.toml", "log"], "and a folder for --save");
    assert!(place.log().contains("serving: api "), "{}", place.log());
}

#[test]
fn a_second_daemon_on_the_same_api_socket_is_refused_and_the_first_goes_on() {
    let place = Place::new();
    let file = place.configure(DISK);
    let daemon = place.serve();
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    assert!(line.starts_with(&format!("already running, pid {}: ", daemon.pid())), "{line}");
    assert_eq!(daemon.disk("d").0, "listening");
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_replaces_its_sockets() {
    let place = Place::new();
    place.configure(DISK);
    for round in 0..3 {
        let daemon = place.serve();
        assert_eq!(daemon.disk("d").0, "listening", "round {round}");
        assert_eq!(daemon.status()["crashes"], 0, "SIGKILL is no crash");
        UnixStream::connect(place.path("d.sock")).unwrap();
        daemon.kill();
        assert!(place.path("d.sock").exists(), "nobody was left to remove it");
    }
    assert!(place.log().contains("starts again"), "{}", place.log());
}

#[test]
fn a_busy_socket_is_named_and_nothing_is_half_created() {
    let place = Place::new();
    let more = "[[disk]]\nname = \"e\"\ndevice = \"m0\"\nread_only = true\nsocket = \"@/e.sock\"\n";
    let file = place.configure(&format!("{DISK}{more}"));
    let _other = UnixListener::bind(place.path("e.sock")).unwrap();
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    let want = format!("{}:17:10: [[disk]] socket: ", file.display());
    assert!(line.starts_with(&want) && line.contains(&place.text("e.sock")), "{line}");
    assert_eq!(place.names(), ["api.state", "conf.d", "e.sock", "hawser.toml"]);
    let state = fs::read_to_string(place.path("api.state/state.json")).unwrap();
    assert!(state.contains("\"ended\": true"), "nobody is waited for after a start that failed: {state}");
    fs::write(place.path("plain"), "").unwrap();
    let file = place.configure(&DISK.replace("d.sock", "plain"));
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    assert!(line.contains("[[disk]] socket: ") && line.contains("plain"), "{line}");
    assert!(place.path("plain").exists());
}

#[test]
fn a_missing_permission_is_one_line() {
    let place = Place::new();
    let file = place.configure(&format!("sandbox = false\n{}", DISK.replace("@/d.sock", "/proc/d.sock")));
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    assert!(line.contains("[[disk]] socket: ") && line.contains("/proc/d.sock"), "{line}");
    let file =
        place.configure(&DISK.replace("socket_mode = \"0660\"", "socket_user = \"nobody-of-this-name\""));
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    assert!(line.contains("nobody-of-this-name"), "{line}");
    assert!(!place.path("d.sock").exists() && !place.path("api").exists());
}

#[test]
fn a_wrong_device_is_refused_before_anything_is_made() {
    let place = Place::new();
    fs::write(place.path("odd"), [0; 1000]).unwrap();
    let device = |uri: &str| format!("[[device]]\nname = \"x\"\nuri = \"{uri}\"\n");
    for (uri, code, want) in [
        ("mem:?size=4GB", 2, "no size"),
        ("mem:?size=3KiB\"\nblock_size = 4096 #", 2, "block"),
        ("gopher://x", 2, "is no device"),
        ("file://@/none", 1, "cannot be opened"),
        ("file://@/odd", 1, "not a multiple of the block size"),
        ("file:///dev/zero", 1, "neither a regular file nor a block device"),
    ] {
        let file = place.configure(&device(uri));
        let line = place.fails(&["serve", "--config", &file.display().to_string()], code);
        assert!(line.starts_with(&format!("{}:6:7: [[device]] uri: ", file.display())), "{line}");
        assert!(line.contains(want), "{line}");
        assert!(!place.path("api").exists());
    }
}

#[test]
fn a_cpu_that_is_not_ours_is_refused() {
    let place = Place::new();
    let file = place.configure(DISK);
    let text = fs::read_to_string(&file).unwrap().replace("[daemon]\n", "[daemon]\nreactors = [4095]\n");
    fs::write(&file, text).unwrap();
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 2);
    assert!(line.contains("[daemon] reactors: CPU 4095 is not ours to use"), "{line}");
}

#[test]
fn run_state_of_an_unknown_version_is_refused_without_loss() {
    let place = Place::new();
    let file = place.configure(DISK);
    place.serve().kill();
    let state = place.path("api.state/state.json");
    let newer = fs::read_to_string(&state).unwrap().replace("\"version\": 1", "\"version\": 7");
    fs::write(&state, &newer).unwrap();
    let record = fs::read(place.path("api.state/crash")).unwrap();
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    assert!(line.contains("state.json: run state of version 7, want 1: start the binary"), "{line}");
    assert_eq!(fs::read_to_string(&state).unwrap(), newer);
    assert_eq!(fs::read(place.path("api.state/crash")).unwrap(), record);
}

/// Writes what the handler of a fatal signal leaves: reactor 0 died by SIGSEGV on a request of the first disk. The layout
/// is the one at the head of `virtio/src/crash.rs`.
fn pretend_crash(place: &Place, counter: u64) {
    let record = fs::OpenOptions::new().write(true).open(place.path("api.state/crash")).unwrap();
    let (signal, busy, disk, queue, head) = (11u32, 1u32, 0u32, 0u32, 3u32);
    let mut note: Vec<u8> =
        [signal, busy, disk, queue, head, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    note.extend([counter, counter].into_iter().flat_map(u64::to_le_bytes));
    record.write_all_at(&note, 135_168).unwrap();
    let name: Vec<u8> = [0u32, 1].into_iter().flat_map(u32::to_le_bytes).chain([b'd']).collect();
    if !is_named(place) {
        record.write_all_at(&name, 4096).unwrap();
    }
}

/// A disk gets its place in the record with its first queue.
fn is_named(place: &Place) -> bool {
    fs::read(place.path("api.state/crash")).unwrap()[4100] != 0
}

#[test]
fn the_same_request_twice_sets_the_disk_aside_until_it_is_resumed() {
    let place = Place::new();
    let more = "[[disk]]\nname = \"e\"\ndevice = \"m0\"\nread_only = true\nsocket = \"@/e.sock\"\n";
    place.configure(&format!("{DISK}{more}"));
    place.serve().kill();

    pretend_crash(&place, 9);
    let daemon = place.serve();
    assert_eq!(daemon.disk("d").0, "listening", "once is no pattern");
    assert_eq!(daemon.status()["crashes"], 1);
    daemon.kill();

    pretend_crash(&place, 9);
    let daemon = place.serve();
    let (state, why) = daemon.disk("d");
    assert_eq!(state, "suspended");
    assert!(why.unwrap().contains("died twice by SIGSEGV on a request (queue 0, head 3, number 9)"));
    assert!(UnixStream::connect(place.path("d.sock")).is_err(), "it does not listen");
    assert_eq!(daemon.disk("e").0, "listening", "others go on");
    assert!(place.ok(&["status"]).contains("suspended"));
    daemon.kill();

    let daemon = place.serve();
    assert_eq!(daemon.disk("d").0, "suspended", "over restarts");
    assert_eq!(place.ok(&["disk", "resume", "d"]), "disk d resumed\n");
    assert_eq!(daemon.disk("d"), ("listening".to_owned(), None));
    UnixStream::connect(place.path("d.sock")).unwrap();
    assert_eq!(place.fails(&["disk", "resume", "d"], 1), "disk d is not suspended");
    daemon.kill();

    let daemon = place.serve();
    assert_eq!(daemon.disk("d").0, "listening", "resumed is resumed");
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn another_build_is_told_from_the_same_one() {
    let place = Place::new();
    place.configure(DISK);
    place.serve().kill();
    let state = place.path("api.state/state.json");
    let build = serde_json::from_str::<serde_json::Value>(&fs::read_to_string(&state).unwrap()).unwrap();
    let build = build["build_id"].as_str().unwrap();
    fs::write(&state, fs::read_to_string(&state).unwrap().replace(build, "0123abcd")).unwrap();
    let daemon = place.serve();
    assert_eq!(daemon.status()["build_id"], *build);
    until("the log names both", || {
        place.log().contains(&format!("build {build} takes over from build 0123abcd"))
    });
}
