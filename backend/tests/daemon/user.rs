//! A daemon that is started as root and does not stay it.

use crate::common::Place;
use crate::frontend::{Guest, T_IN, T_OUT, Wish};
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

const NOBODY: u32 = 65534;

/// A folder that others may enter, and a configuration in it whose run and state folders are not there.
fn configure(place: &Place, daemon: &str, disk: &str) -> String {
    fs::set_permissions(place.path("x").parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
    let text = format!(
        "[daemon]\napi = \"@/run/api\"\nstate_dir = \"@/lib\"\n{daemon}\
         [[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n\
         [[disk]]\nname = \"d\"\ndevice = \"m\"\nsocket = \"@/run/d.sock\"\n{disk}\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:0\"]\n"
    );
    let folder = place.path("x").parent().unwrap().display().to_string();
    fs::write(place.path("hawser.toml"), text.replace('@', &folder)).unwrap();
    place.text("hawser.toml")
}

fn is_root() -> bool {
    // SAFETY: plain system call.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        skips::skip("only root can become somebody else");
    }
    root
}

#[test]
fn a_daemon_with_a_user_serves_without_anything_of_roots() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    configure(&place, "user = \"nobody\"\n", "");
    for _ in 0..2 {
        let daemon = place.serve_at("hawser.toml", "run/api", &[]);
        let mut threads = 0;
        for task in fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let of = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            };
            assert_eq!(of("Uid:"), ["65534"; 4]);
            assert_eq!(of("Gid:"), ["65534"; 4]);
            assert!(!of("Groups:").contains(&"0".to_owned()), "{status}");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                assert_eq!(of(set), ["0000000000000000"], "{set}");
            }
            assert_eq!(of("NoNewPrivs:"), ["1"]);
            threads += 1;
        }
        assert!(threads >= 4, "main, signals, API, reactor");
        for name in ["run", "lib", "run/d.sock", "run/api"] {
            assert_eq!(fs::metadata(place.path(name)).unwrap().uid(), NOBODY, "{name}");
        }
        let mut guest = Guest::connect(&place.path("run/d.sock"), &Wish::default());
        assert_eq!(guest.request(T_OUT, 8, &[7; 4096], 0).0, 0);
        assert_eq!(guest.request(T_IN, 8, &[], 4096), (0, vec![7; 4096]));
        drop(guest);
        assert_eq!(daemon.end(), Some(0));
    }
}

#[test]
fn what_a_user_cannot_do_is_one_line_before_anything_is_made() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let refused = |daemon: &str, disk: &str, want: &str| {
        let file = configure(&place, daemon, disk);
        let line = place.fails(&["serve", "--config", &file], 2);
        assert!(line.contains(want), "{line}");
        assert_eq!(place.names(), ["hawser.toml"], "nothing was made");
    };
    let user = "user = \"nobody\"\n";
    refused("user = \"nobody-of-this-name\"\n", "", "[daemon] user: \"nobody-of-this-name\" is no user");
    refused("user = \"root\"\n", "", "[daemon] user: is root's");
    refused("user = \"nobody\"\ngroup = \"root\"\n", "", "[daemon] group: is root's");
    refused(
        "user = \"nobody\"\ngroup = \"none-of-this-name\"\n",
        "",
        "[daemon] group: \"none-of-this-name\"",
    );
    refused("group = \"nogroup\"\n", "", "[daemon] group: has no effect without user");
    refused(
        user,
        "socket_user = \"root\"\n",
        "[[disk]] socket_user: \"root\" cannot be given a socket by \"nobody\"",
    );
    refused(user, "socket_user = \"0\"\n", "[[disk]] socket_user: \"0\" cannot be given");

    // Folders that are there stay whose they are, and who may not write there says so.
    fs::create_dir(place.path("run")).unwrap();
    let file = configure(&place, user, "");
    let line = place.fails(&["serve", "--config", &file], 1);
    assert!(line.contains("run/api.state: cannot be made: Permission denied"), "{line}");
    assert_eq!(fs::metadata(place.path("run")).unwrap().uid(), 0);
}

/// Who is not root and is told to become somebody else cannot.
#[test]
fn only_root_can_become_somebody_else() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    configure(&place, "user = \"daemon\"\n", "");
    fs::create_dir(place.path("open")).unwrap();
    fs::set_permissions(place.path("open"), Permissions::from_mode(0o777)).unwrap();
    let file = place.text("hawser.toml");
    let line = place.fails_as_nobody(&["serve", "--config", &file], 2);
    assert!(
        line.contains("[daemon] user: only root can become \"daemon\", and this is user 65534"),
        "{line}"
    );
    // A service manager has made it that user, but in another group: sockets and files would be that one's.
    configure(&place, "user = \"nobody\"\ngroup = \"daemon\"\n", "");
    let line = place.fails_as_nobody(&["serve", "--config", &file], 2);
    assert!(line.contains("[daemon] group: want a start in that group"), "{line}");
}
