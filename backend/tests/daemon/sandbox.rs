//! What a daemon may not do, and what it tells the service manager.

use crate::common::{PATIENCE, Place};
use std::fs;
use std::os::unix::net::UnixDatagram;

const DISK: &str = r#"
[[device]]
name = "m0"
uri = "mem:?size=16MiB"
[[disk]]
name = "d"
device = "m0"
socket = "@/d.sock"
"#;

/// landlock(7): asks for the version of what the kernel has.
fn kernel_has_landlock() -> bool {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: a question without attributes: nothing is read, and no descriptor is made.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, LANDLOCK_CREATE_RULESET_VERSION)
    };
    version > 0
}

#[test]
fn every_thread_of_a_daemon_is_restricted() {
    let place = Place::new();
    place.configure(DISK);
    let daemon = place.serve();
    daemon.status();
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1\n") && status.contains("Seccomp:\t2\n"), "{status}");
        threads += 1;
    }
    assert!(threads >= 4, "main, signals, API, reactor");
    assert_eq!(daemon.end(), Some(0));
    let log = place.log();
    // Whatever it said about Landlock was taken for enforcement, also that the kernel does not have it.
    if kernel_has_landlock() {
        assert!(log.contains("landlock: files are opened for writing below "), "{log}");
    } else {
        assert!(log.contains("landlock: this kernel does not have it"), "{log}");
        skips::skip("this kernel has no Landlock to be restricted by");
    }
    assert!(log.contains("seccomp: ") && !log.contains("ENOSYS"), "nothing was refused: {log}");
}

#[test]
fn a_path_outside_is_refused_with_its_key() {
    let (place, other) = (Place::new(), Place::new());
    let outside = other.text("d.sock");
    let file = place.configure(&DISK.replace("@/d.sock", &outside));
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 2);
    let want = format!(
        "{}:11:10: [[disk]] socket: {outside:?} is outside of what the daemon may open",
        file.display()
    );
    assert!(line.starts_with(&want) && line.ends_with("or its folder in [daemon] allow_paths"), "{line}");
    assert_eq!(place.names(), ["hawser.toml"], "nothing was made");

    place.configure(DISK);
    let daemon = place.serve();
    let add = |name: &str| {
        ["disk", "add", name, "--device", "m0", "--read-only", "--socket", &outside]
            .map(str::to_owned)
            .to_vec()
    };
    let arguments = add("e");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let line = place.fails(&arguments, 2);
    assert!(
        line.starts_with(&format!("socket: {outside:?} is outside of what the daemon may open")),
        "{line}"
    );
    assert_eq!(daemon.end(), Some(0));

    let folder = |place: &Place| place.path("x").parent().unwrap().display().to_string();
    place.configure(&format!("allow_paths = [{:?}, {:?}]\n{DISK}", folder(&place), folder(&other)));
    let daemon = place.serve();
    place.ok(&arguments);
    assert!(other.path("d.sock").exists());
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn the_service_manager_hears_of_start_and_end() {
    let place = Place::new();
    place.configure(DISK);
    let manager = UnixDatagram::bind(place.path("notify")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let hear = || {
        let mut buffer = [0; 4096];
        let len = manager.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    };
    let daemon = place.serve_with(&[("NOTIFY_SOCKET", &place.text("notify"))]);
    let first = hear();
    assert!(first.starts_with("STATUS=Starting\nEXTEND_TIMEOUT_USEC="), "{first}");
    assert_eq!(hear(), "READY=1\nSTATUS=Serving\n");
    assert_eq!(daemon.end(), Some(0));
    // Once for a removal that may be under way, once for the disks. The manager was told once only, and killed a daemon that
    // waited for a removal first; the target gets what is left then.
    for _ in 0..2 {
        assert_eq!(hear(), "STOPPING=1\nSTATUS=Draining for up to 10 s\nEXTEND_TIMEOUT_USEC=20000000\n");
    }
    let last = hear();
    assert!(last.starts_with("STOPPING=1\n") && last.contains("EXTEND_TIMEOUT_USEC="), "{last}");

    // Nobody there is no trouble of ours.
    let daemon = place.serve_with(&[("NOTIFY_SOCKET", "@hawser-nobody-listens-here")]);
    assert_eq!(daemon.end(), Some(0));
}

/// The unit named a group that not every machine has, and nobody had looked at it but by eye. What a unit says wrongly systemd
/// ignores with a warning, so that it is the warnings that count.
#[test]
fn the_unit_is_understood_by_systemd_and_asks_for_no_group_that_may_be_missing() {
    let unit = include_str!("../../../docs/systemd/hawser.service");
    assert!(!unit.lines().any(|line| line.starts_with("SupplementaryGroups=")), "starting fails without it");
    let place = Place::new();
    let file = place.path("hawser.service");
    fs::write(&file, unit.replace("/usr/local/bin/hawser", env!("CARGO_BIN_EXE_hawser"))).unwrap();
    let verified = std::process::Command::new("systemd-analyze").arg("verify").arg(&file).output();
    let Ok(verified) = verified else {
        return skips::skip("no systemd-analyze on PATH (Debian: systemd)");
    };
    let said = String::from_utf8_lossy(&verified.stderr);
    let ours: Vec<&str> = said.lines().filter(|line| line.contains("hawser.service")).collect();
    assert!(ours.is_empty(), "{said}");
}
