//! The commands against a running daemon: tables, JSON, changes that are kept and changes that are not, exit codes.

use crate::common::Place;
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixListener;

const CONFIG: &str = r#"
[[device]]
name = "m0"
uri = "mem:?size=16MiB"
block_size = 4096
[[disk]]
name = "first"
device = "m0"
shared = true
socket = "@/first.sock"
serial = "S1"
"#;

fn add<'a>(name: &'a str, socket: &'a str) -> Vec<&'a str> {
    vec!["disk", "add", name, "--device", "m0", "--shared", "--socket", socket]
}

#[test]
fn tables_are_for_people_and_json_for_scripts() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let status = place.ok(&["status"]);
    assert!(status.contains(&format!("pid {}", daemon.pid())), "{status}");
    let disks = place.ok(&["disk", "list"]);
    let rows: Vec<Vec<&str>> = disks.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0][..5], ["DISK", "DEVICE", "STATE", "SIZE", "QUEUES"]);
    assert_eq!(rows[1][..6], ["first", "m0", "listening", "16", "MiB", "1"]);
    assert_eq!(rows.len(), 2);
    assert!(place.ok(&["device", "list"]).contains("mem:?size=16MiB"));
    let json = |args: &[&str]| serde_json::from_str::<Value>(&place.ok(args)).unwrap();
    assert_eq!(json(&["status", "--json"])["pid"], daemon.pid());
    assert_eq!(json(&["disk", "list", "--json"])[0]["serial"], "S1");
    assert_eq!(json(&["device", "list", "--json"])[0]["block_size"], 4096);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_disk_that_is_added_lives_until_the_daemon_ends() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let socket = place.text("second.sock");
    let mut args = add("second", &socket);
    args.extend(["--serial", "S2", "--queues", "3", "--read-only", "--json", "--socket-mode", "0600"]);
    let disk: Value = serde_json::from_str(&place.ok(&args)).unwrap();
    assert_eq!(
        (&disk["state"], &disk["queues"], &disk["read_only"]),
        (&"listening".into(), &3.into(), &true.into())
    );
    assert_eq!((&disk["serial"], &disk["saved_in"]), (&"S2".into(), &Value::Null));
    assert!(place.path("second.sock").exists());
    assert_eq!(place.ok(&["disk", "remove", "second"]), "disk second removed\n");
    assert!(!place.path("second.sock").exists());
    let alone: Vec<&str> =
        add("second", &socket).into_iter().filter(|argument| *argument != "--shared").collect();
    let line = place.fails(&alone, 1);
    assert!(line.starts_with("device \"m0\" is disk first's too, want read_only = true"), "{line}");
    place.ok(&add("second", &socket));
    daemon.end();
    let daemon = place.serve();
    assert_eq!(daemon.status()["disks"].as_array().unwrap().len(), 1);
    daemon.end();
}

#[test]
fn a_saved_disk_comes_back_and_goes_for_good() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let socket = place.text("second.sock");
    let mut args = add("second", &socket);
    args.push("--save");
    assert_eq!(place.ok(&args), "disk second added\n");
    assert_eq!(fs::read_dir(place.path("conf.d")).unwrap().count(), 1);
    daemon.kill();
    let daemon = place.serve();
    assert_eq!(daemon.disk("second").0, "listening");
    assert_eq!(place.ok(&["disk", "remove", "second", "--save"]), "disk second removed\n");
    assert_eq!(fs::read_dir(place.path("conf.d")).unwrap().count(), 0);
    let line = place.fails(&["disk", "remove", "first", "--save"], 1);
    assert_eq!(
        line,
        format!("disk first is named in {}, want it removed there by hand", place.text("hawser.toml"))
    );
    assert_eq!(daemon.disk("first").0, "listening", "a refused change changes nothing");
    daemon.end();
    let daemon = place.serve();
    assert_eq!(daemon.status()["disks"].as_array().unwrap().len(), 1);
    daemon.end();
}

/// The API, the configuration and the image each had one folder in every test, and nowhere else: the sandbox allowed `conf.d`
/// only if it was there at the start, so that `--save` was refused wherever the configuration had a folder of its own.
#[test]
fn a_disk_is_saved_where_configuration_sockets_and_images_have_folders_of_their_own() {
    let place = Place::new();
    for folder in ["run", "lib", "images", "etc"] {
        fs::create_dir(place.path(folder)).unwrap();
    }
    fs::write(place.path("images/f"), vec![0; 1 << 20]).unwrap();
    let text = "[daemon]\napi = \"@/run/api\"\nstate_dir = \"@/lib\"\n\
                [[device]]\nname = \"m0\"\nuri = \"file://@/images/f\"\n";
    fs::write(place.path("etc/hawser.toml"), text.replace("@/", &place.text(""))).unwrap();
    let daemon = place.serve_at("etc/hawser.toml", "run/api", &[]);
    let (api, socket) = (place.text("run/api"), place.text("run/s"));
    let args = ["disk", "add", "d", "--device", "m0", "--socket", &socket, "--save", "--api", &api];
    assert_eq!(place.ok(&args), "disk d added\n");
    assert_eq!(fs::read_dir(place.path("etc/conf.d")).unwrap().count(), 1);
    assert_eq!(daemon.end(), Some(0));
    let daemon = place.serve_at("etc/hawser.toml", "run/api", &[]);
    assert_eq!(daemon.disk("d").0, "listening");
    place.ok(&["disk", "remove", "d", "--save", "--api", &api]);
    assert_eq!(fs::read_dir(place.path("etc/conf.d")).unwrap().count(), 0);
    assert_eq!(daemon.end(), Some(0));
    assert_eq!(place.names(), ["etc", "images", "lib", "log", "run"], "nothing beside");
}

#[test]
fn a_save_that_fails_adds_nothing() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    // Where the new file is written first.
    fs::create_dir_all(place.path("conf.d/.new-disk-second.toml")).unwrap();
    let socket = place.text("second.sock");
    let mut args = add("second", &socket);
    args.push("--save");
    let line = place.fails(&args, 1);
    assert!(line.contains("conf.d/disk-second.toml: cannot be written"), "{line}");
    assert!(!place.path("second.sock").exists());
    assert_eq!(daemon.status()["disks"].as_array().unwrap().len(), 1);
    daemon.end();
}

#[test]
fn changes_that_cannot_be_are_one_line_and_change_nothing() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let _busy = UnixListener::bind(place.path("busy")).unwrap();
    let (busy, free, first) = (place.text("busy"), place.text("free"), place.text("first.sock"));
    let (api, deep) = (place.text("api"), place.text("no/such/folder"));
    for (args, code, want) in [
        (add("first", &free), 1, "disk first is there, want another name"),
        (add("x", &first), 1, "is disk first's, want another path"),
        (add("x", &api), 1, "is the API's own, want another path"),
        (add("x", &busy), 1, "another program listens here"),
        (add("x", &deep), 1, "No such file"),
        (
            vec!["disk", "add", "x", "--device", "m1", "--socket", &free],
            2,
            "device: \"m1\" is no [[device]], want m0",
        ),
        ([add("x", &free), vec!["--queues", "0"]].concat(), 2, "queues: 0 is out of range, want 1 to 64"),
        (vec!["disk", "remove", "x"], 1, "disk \"x\" is not there; there are first"),
        (vec!["disk", "resume", "x"], 1, "disk \"x\" is not there; there are first"),
        (vec!["disk", "resume", "first"], 1, "disk first is not suspended"),
    ] {
        let line = place.fails(&args, code);
        assert!(line.contains(want), "{args:?}: {line}");
    }
    assert!(!place.path("free").exists());
    assert_eq!(daemon.status()["disks"].as_array().unwrap().len(), 1);
    daemon.end();
}

/// What cannot be written ends us with 1: no panic, no noise.
#[test]
fn a_reader_that_has_seen_enough_is_no_error_of_ours() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    let api = place.text("api");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_hawser"))
        .args(["status", "--api", &api])
        .stdout(full)
        .output()
        .unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(1), 0));
    daemon.end();
}

#[test]
fn a_daemon_that_is_stuck_is_given_up() {
    let place = Place::new();
    place.configure(CONFIG);
    let daemon = place.serve();
    daemon.stop();
    let line = place.fails(&["status"], 1);
    assert!(line.ends_with("the daemon has not answered for 20 s"), "{line}");
    daemon.signal("CONT");
    daemon.end();
}

#[test]
fn wrong_arguments_are_usage() {
    let place = Place::new();
    for args in [
        vec!["disk", "add", "a/b", "--device", "m0", "--socket", "/tmp/x"],
        vec!["disk", "add", "a", "--socket", "/tmp/x"],
        vec!["disk", "add", "a", "--device", "m0", "--socket", "/tmp/x", "--serial", "a-serial-of-21-bytes-"],
        vec!["serve"],
        vec!["frobnicate"],
    ] {
        assert_eq!(place.run(&args).status.code(), Some(2), "{args:?}");
    }
    let long = format!("/tmp/{}", "x".repeat(120));
    assert!(place.fails(&add("a", &long), 2).contains("want at most 107"));
    let file = place.configure(CONFIG).display().to_string();
    assert!(
        place
            .fails(&["serve", "--config", &file, "--ready-fd", "77"], 2)
            .contains("--ready-fd: 77 is no open")
    );
    assert!(
        place.fails(&["serve", "--config", "/nonexistent"], 2).starts_with("/nonexistent: cannot be read")
    );
}

#[test]
fn without_a_daemon_the_socket_is_named() {
    let place = Place::new();
    let api = place.text("api");
    let line = place.fails(&["status"], 1);
    assert!(line.starts_with(&format!("{api}: no daemon serves this API socket")), "{line}");
    drop(UnixListener::bind(place.path("api")).unwrap());
    let line = place.fails(&["disk", "list"], 1);
    assert!(line.starts_with(&format!("{api}: the daemon of this API socket has ended")), "{line}");
}
