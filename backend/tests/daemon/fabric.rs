//! A target daemon and an initiator daemon, and what happens when the target is not there.

use crate::common::{Place, until};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;

const TARGET: &str = r#"
[[device]]
name = "f0"
uri = "file://@/store"
[[subsystem]]
nqn = "nqn.2026-11.io.hawser:t"
listen = ["tcp://127.0.0.1:PORT"]
[[subsystem.namespace]]
nsid = 1
device = "f0"
[[subsystem]]
nqn = "nqn.2026-11.io.hawser:guarded"
listen = ["tcp://127.0.0.1:0"]
allowed_hosts = ["nqn.2026-11.io.hawser:nobody"]
"#;

fn initiator(port: u16) -> String {
    format!(
        r#"
[host]
nqn = "nqn.2026-11.io.hawser:test-host"
id = "OWN-HOST-ID"
[[device]]
name = "r0"
uri = "nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:t?nsid=1"
reconnect_delay = 1
[[device]]
name = "m0"
uri = "mem:?size=16MiB"
[[disk]]
name = "far"
device = "r0"
socket = "@/far.sock"
[[disk]]
name = "near"
device = "m0"
socket = "@/near.sock"
"#
    )
}

/// A folder with a target's configuration. Its device is a file: a `mem:` is another one after each start.
fn storage(port: u16) -> Place {
    let place = Place::new();
    std::fs::File::create(place.path("store")).unwrap().set_len(16 << 20).unwrap();
    place.configure(&TARGET.replace("PORT", &port.to_string()));
    place
}

/// A port that nobody listens at: free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn a_disk_waits_for_its_target_while_others_are_served() {
    let port = free_port();
    let host = Place::new();
    host.configure(&initiator(port));
    let daemon = host.serve();
    assert_eq!(daemon.disk("near").0, "listening");
    assert_eq!(daemon.disk("far").0, "waiting");
    assert!(!host.path("far.sock").exists(), "nothing is accepted that cannot be served");
    until("the trouble has a name", || {
        daemon.disk("far").1.is_some_and(|trouble| trouble.contains("refused"))
    });
    assert!(host.log().contains("listens once its device r0 is reached"), "{}", host.log());

    let storage = storage(port);
    let target = storage.serve();
    until("the disk listens", || daemon.disk("far") == ("listening".to_owned(), None));
    UnixStream::connect(host.path("far.sock")).unwrap();
    let hosts = || target.status()["subsystems"][0]["hosts"].clone();
    assert_eq!(hosts(), serde_json::json!(["nqn.2026-11.io.hawser:test-host"]));
    assert_eq!(daemon.status()["devices"][0]["size_bytes"], 16 << 20);

    target.kill();
    until("the device says so", || daemon.status()["devices"][0]["state"] == "reconnecting");
    let target = storage.serve();
    until("it is reached again", || daemon.status()["devices"][0]["state"] == "ready");

    assert_eq!(daemon.end(), Some(0));
    assert!(!host.log().contains("targets did not end"), "{}", host.log());
    until("the association has ended", || target.status()["subsystems"][0]["hosts"] == serde_json::json!([]));
    assert_eq!(target.end(), Some(0));
}

#[test]
fn a_target_shows_its_ports_and_answers_discovery() {
    let storage = storage(0);
    let target = storage.serve();
    let status = target.status();
    let listen = |index: usize| status["subsystems"][index]["listen"][0].as_str().unwrap().to_owned();
    let (open, guarded) = (listen(0), listen(1));
    assert!(!open.ends_with(":0") && !guarded.ends_with(":0") && open != guarded);
    let found = storage.ok(&["device", "discover", &open, "--json"]);
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    let entry = found.as_array().unwrap().iter().find(|entry| entry["nqn"] == "nqn.2026-11.io.hawser:t");
    let entry = entry.unwrap_or_else(|| panic!("{found}"));
    assert_eq!((entry["kind"].as_str(), entry["transport"].as_str()), (Some("subsystem"), Some("tcp")));
    assert!(open.ends_with(entry["port"].as_str().unwrap()));
    assert!(storage.ok(&["device", "discover", &open]).contains("nqn.2026-11.io.hawser:t"));
    assert!(storage.ok(&["status"]).contains("1:f0"));

    // A target that refuses us is as good as none for an offline command, and says why: that was asked for again and again, for
    // 20 s, and the test did not look at the reason.
    let host = Place::new();
    let uri = format!("nvme+{guarded}/nqn.2026-11.io.hawser:guarded");
    let file = host.configure(&format!("[[device]]\nname = \"g\"\nuri = \"{uri}\"\n"));
    std::fs::write(host.path("image"), [1; 4096]).unwrap();
    let (file, image) = (file.display().to_string(), host.text("image"));
    let line = host.fails(&["image", "import", &image, "g", "--config", &file], 1);
    let address = guarded.strip_prefix("tcp://").unwrap();
    let reason = "the target refused: Connect Invalid Host";
    let want = format!("{file}:6:7: [[device]] uri: {uri}: connect {address}: {reason}");
    assert!(line.starts_with(&want) && line.ends_with(" among the hosts that it allows"), "{line}");

    let uri = format!("nvme+{guarded}/nqn.2026-11.io.hawser:absent");
    host.configure(&format!("[[device]]\nname = \"g\"\nuri = \"{uri}\"\n"));
    let line = host.fails(&["image", "import", &image, "g", "--config", &file], 1);
    let reason = "the target refused: Connect Invalid Parameters: SUBNQN, want a subsystem that it has";
    assert!(line.starts_with(&format!("{file}:6:7: [[device]] uri: {uri}: ")), "{line}");
    assert!(line.contains(reason), "{line}");
    assert_eq!(target.end(), Some(0));

    let (dead, two) = (free_port(), free_port());
    let uris = [dead, two].map(|port| format!("nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:t"));
    host.configure(&format!("[[device]]\nname = \"g\"\nuri = {uris:?}\n"));
    let line = host.fails(&["image", "import", &image, "g", "--config", &file], 1);
    assert!(line.starts_with(&format!("{file}:6:7: [[device]] uri: {}: ", uris.join(", "))), "{line}");
    for port in [dead, two] {
        let reason = "connection refused, want an address at which a target listens";
        assert!(line.contains(&format!("connect 127.0.0.1:{port}: {reason}")), "{line}");
    }
}

#[test]
fn discovery_of_nobody_is_one_line() {
    let place = Place::new();
    let line = place.fails(&["device", "discover", &format!("tcp://127.0.0.1:{}", free_port())], 1);
    assert!(line.contains("refused"), "{line}");
    let line = place.fails(&["device", "discover", "127.0.0.1:4420"], 2);
    assert!(line.contains("want tcp://HOST:PORT"), "{line}");
}

#[test]
fn a_busy_port_is_named() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = busy.local_addr().unwrap().port();
    let place = storage(port);
    let file = place.path("hawser.toml");
    let line = place.fails(&["serve", "--config", &file.display().to_string()], 1);
    let want = format!("{}:10:10: [[subsystem]] listen: ", file.display());
    assert!(line.starts_with(&want) && line.contains(&format!("127.0.0.1:{port}")), "{line}");
    assert!(!place.path("api").exists());
}

#[test]
fn data_goes_through_a_target_and_back() {
    let storage = storage(0);
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    let port = listen.rsplit(':').next().unwrap().parse().unwrap();
    let host = Place::new();
    let file = host.configure(&initiator(port));
    let image: Vec<u8> =
        (0..5_000_001u32).map(|at| if at % 3_000_000 < 99 { 0 } else { at.to_le_bytes()[1] }).collect();
    std::fs::write(host.path("image"), image).unwrap();
    let done = host.ok(&[
        "image",
        "import",
        &host.text("image"),
        "r0",
        "--verify",
        "--config",
        &file.display().to_string(),
    ]);
    assert!(done.ends_with("verified\n"), "{done}");
    until("its association has ended", || target.status()["subsystems"][0]["hosts"] == serde_json::json!([]));
    assert!(!host.path("lib/import-r0").exists(), "it has ended in order");
    let line =
        host.fails(&["image", "import", "/dev/null", "r0", "--config", &file.display().to_string()], 1);
    assert!(line.contains("/dev/null: is neither a file nor a block device"), "{line}");
    assert_eq!(target.end(), Some(0));
}

#[test]
fn the_paths_of_a_device_are_listed_with_their_states() {
    let storage = Place::new();
    storage.configure(
        "[[device]]\nname = \"m\"\nuri = \"mem:?size=16MiB\"\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"m\"\n",
    );
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    let good = format!("nvme+{listen}/nqn.2026-11.io.hawser:t?nsid=1");
    let bad = format!("nvme+tcp://127.0.0.1:{}/nqn.2026-11.io.hawser:t?nsid=1", free_port());
    let host = Place::new();
    host.configure(&format!("[[device]]\nname = \"r\"\nuri = [\"{good}\", \"{bad}\"]\n"));
    let daemon = host.serve();
    let paths = || daemon.status()["devices"][0]["paths"].clone();
    until("one path is live, and the other has been tried", || {
        paths()[0]["state"] == "live" && paths()[1]["trouble"].is_string()
    });
    assert_eq!(paths()[1]["state"], "connecting");
    let table = host.ok(&["device", "list"]);
    let row = |uri: &str| {
        table.lines().find(|line| line.ends_with(uri)).unwrap_or_else(|| panic!("{table}")).to_owned()
    };
    assert!(row(&good).trim_start().starts_with("path") && row(&good).contains("live"), "{table}");
    assert!(row(&bad).contains("connecting"), "{table}");
    assert_eq!(daemon.end(), Some(0));
    assert_eq!(target.end(), Some(0));
}

/// An address that was made inaccessible was optimized again when the daemon had been started again.
#[test]
fn an_ana_state_that_was_set_holds_over_a_restart() {
    let storage = Place::new();
    let port = free_port();
    storage.configure(&format!(
        "[[device]]\nname = \"m\"\nuri = \"mem:?size=16MiB\"\n[[device]]\nname = \"o\"\nuri = \"mem:?size=16MiB\"\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:{port}\"]\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"m\"\n\
         [[subsystem.namespace]]\nnsid = 2\ndevice = \"o\"\nana_group = 9\n"
    ));
    let target = storage.serve();
    let nqn = "nqn.2026-11.io.hawser:t";
    let groups = |target: &crate::common::Serving| {
        target.status()["subsystems"][0]["ports"][0]["ana_groups"].to_string()
    };
    let text = storage.ok(&["subsystem", "ana", nqn, "inaccessible", "--group", "9"]);
    assert!(text.contains("group 1: optimized, group 9: inaccessible"), "{text}");
    let set = groups(&target);
    target.kill();
    let target = storage.serve();
    assert_eq!(groups(&target), set);
    // Both at once, and what is as at the start is not kept.
    let text = storage.ok(&["subsystem", "ana", nqn, "optimized"]);
    assert!(text.contains("group 1: optimized, group 9: optimized"), "{text}");
    let kept = std::fs::read_to_string(storage.path("lib/ana.toml")).unwrap();
    assert!(!kept.contains(nqn), "{kept}");
    let line = storage.fails(&["subsystem", "ana", nqn, "optimized", "--group", "3"], 1);
    assert_eq!(line, "nqn.2026-11.io.hawser:t has no ANA group 3, want one of 1, 9");
    let line = storage.fails(&["subsystem", "ana", nqn, "good"], 2);
    assert!(line.starts_with("\"good\" is no ANA state"), "{line}");
    let line = storage.fails(&["subsystem", "ana", nqn, "change", "--listen", "tcp://1.2.3.4:5"], 1);
    assert_eq!(line, format!("{nqn} is not reached at tcp://1.2.3.4:5; want one of tcp://127.0.0.1:{port}"));
    assert_eq!(target.end(), Some(0));
    std::fs::write(storage.path("lib/ana.toml"), "[[status]]\n").unwrap();
    let file = storage.text("lib/ana.toml");
    let config = storage.text("hawser.toml");
    let line = storage.fails(&["serve", "--config", &config], 1);
    assert!(line.starts_with(&format!("{file}: unknown field `status`")), "{line}");
}

#[test]
fn a_host_is_let_in_and_thrown_out_from_the_command_line() {
    let storage = storage(0);
    let target = storage.serve();
    let listen = target.status()["subsystems"][1]["listen"][0].as_str().unwrap().to_owned();
    let (nqn, me) = ("nqn.2026-11.io.hawser:guarded", "nqn.2026-11.io.hawser:me");
    let place = Place::new();
    place.configure(&format!(
        "[host]\nnqn = \"{me}\"\nid = \"OWN-HOST-ID\"\n[[device]]\nname = \"r\"\nuri = \"nvme+{listen}/{nqn}\"\nreconnect_delay = 1\n"
    ));
    let daemon = place.serve();
    let trouble = || daemon.status()["devices"][0]["trouble"].as_str().unwrap_or_default().to_owned();
    until("it is refused", || trouble().contains("Connect Invalid Host"));
    assert!(
        storage.log().contains(&format!("{nqn}: {me} was refused: it is not among allowed_hosts")),
        "{}",
        storage.log()
    );
    let text = storage.ok(&["subsystem", "host", "add", nqn, me]);
    assert!(text.contains(&format!("allowed hosts  nqn.2026-11.io.hawser:nobody, {me}\n")), "{text}");
    // It has no namespace, but is let in.
    until("it is let in", || trouble().contains("namespace"));
    assert!(storage.ok(&["subsystem", "list"]).contains("nqn.2026-11.io.hawser:guarded\n"));
    storage.ok(&["subsystem", "host", "remove", nqn, me]);
    until("it is refused again", || trouble().contains("Connect Invalid Host"));
    let line = storage.fails(&["subsystem", "host", "remove", nqn, me], 1);
    assert_eq!(line, format!("{me} is not among {nqn}'s allowed hosts"));
    let line = storage.fails(&["subsystem", "host", "add", "nqn.2026-11.io.hawser:t", me], 1);
    assert!(line.ends_with("lets any host in, want allowed_hosts in its [[subsystem]]"), "{line}");
    assert_eq!((daemon.end(), target.end()), (Some(0), Some(0)));
}

#[test]
fn a_device_is_reserved_and_taken_over_from_the_command_line() {
    let storage = storage(0);
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    let hosts = ["one", "two"].map(|name| {
        let place = Place::new();
        place.configure(&format!(
            "[host]\nnqn = \"nqn.2026-11.io.hawser:{name}\"\nid = \"OWN-HOST-ID\"\n\
             [[device]]\nname = \"r\"\n\
             uri = \"nvme+{listen}/nqn.2026-11.io.hawser:t\"\n\
             [[device]]\nname = \"m\"\nuri = \"mem:?size=16MiB\"\n"
        ));
        let daemon = place.serve();
        until("it is reached", || daemon.status()["devices"][0]["state"] == "ready");
        (place, daemon)
    });
    let [one, two] = [0, 1].map(|at| &hosts[at].0);
    let reservation = |place: &Place, arguments: &[&str]| {
        let (action, rest) = arguments.split_first().unwrap();
        let all: Vec<&str> =
            ["device", "reservation", action, "r"].into_iter().chain(rest.iter().copied()).collect();
        place.ok(&all)
    };
    assert_eq!(reservation(one, &["report"]), "reservation: none; generation 0\n");
    let text = reservation(one, &["register", "--nrkey", "0x1a", "--cptpl", "true"]);
    assert!(text.starts_with("reservation: none, outlives a power loss; generation 1\n"), "{text}");
    let text = reservation(one, &["acquire", "--crkey", "26", "--rtype", "write-exclusive"]);
    assert!(text.contains("reservation: write-exclusive,") && text.contains(" 0x1a  yes\n"), "{text}");
    let acquire = ["device", "reservation", "acquire", "r", "--crkey", "2", "--rtype", "1"];
    let line = two.fails(&acquire, 1);
    assert_eq!(line, "device r: Reservation Conflict: another key, or another host has it");
    reservation(two, &["register", "--nrkey", "2"]);
    let preempt = ["preempt", "--crkey", "2", "--prkey", "0x1a", "--rtype", "2", "--abort", "--json"];
    let report: serde_json::Value = serde_json::from_str(&reservation(two, &preempt)).unwrap();
    assert_eq!(report["rtype"], "exclusive-access");
    assert_eq!(report["registrants"][0]["rkey"], "0x2");
    assert_eq!(report["registrants"].as_array().unwrap().len(), 1);
    reservation(two, &["register", "--nrkey", "3", "--crkey", "2"]);
    reservation(two, &["release", "--crkey", "3", "--rtype", "exclusive-access"]);
    let text = reservation(two, &["register", "--unregister", "--iekey"]);
    assert!(text.starts_with("reservation: none") && text.lines().count() == 1, "{text}");

    let line = one.fails(&["device", "reservation", "report", "m"], 2);
    assert_eq!(line, "device m: the device knows no reservations, want an nvme+tcp: one");
    let line = one.fails(&["device", "reservation", "report", "x"], 1);
    assert_eq!(line, "device \"x\" is not there; there are r, m");
    let odd = ["device", "reservation", "acquire", "r", "--crkey", "1", "--rtype", "7"];
    assert!(
        one.fails(&odd, 2).starts_with("\"7\" is no reservation type, want 1 to 6 or one of write-exclusive")
    );
    assert_eq!(target.end(), Some(0));
    until("the loss is seen", || hosts[0].1.status()["devices"][0]["state"] == "reconnecting");
    let line = one.fails(&["device", "reservation", "report", "r"], 1);
    assert_eq!(line, "device r: not sent: no path is good");
    for (_, daemon) in hosts {
        assert_eq!(daemon.end(), Some(0));
    }
}

/// An import wrote to the disk of a running VM without a word, where nothing locks the device.
#[test]
fn an_import_over_what_a_daemon_lets_others_write_to_is_refused() {
    let storage = storage(0);
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    let port = listen.rsplit(':').next().unwrap().parse().unwrap();
    let host = Place::new();
    let file = host.configure(&initiator(port)).display().to_string();
    std::fs::write(host.path("image"), [1; 1 << 20]).unwrap();
    let (image, api) = (host.text("image"), host.text("api"));
    let daemon = host.serve();
    until("the disk listens", || daemon.disk("far").0 == "listening");
    let line = host.fails(&["image", "import", &image, "r0", "--config", &file], 1);
    let uri = format!("nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:t?nsid=1");
    let want = format!(
        "device r0 ({uri}) is disk far's in the daemon at {api}, want `hawser disk remove` first, or --force"
    );
    assert_eq!(line, want);
    let stored = || std::fs::read(storage.path("store")).unwrap();
    assert!(stored().iter().all(|byte| *byte == 0), "nothing was written");
    host.ok(&["image", "import", &image, "r0", "--config", &file, "--force"]);
    assert!(stored()[..1 << 20].iter().all(|byte| *byte == 1));
    host.ok(&["disk", "remove", "far"]);
    host.ok(&["image", "import", &image, "r0", "--config", &file]);
    // What hosts write to is no less in use. Its lock was waited for, for 30 s.
    let file = storage.path("hawser.toml").display().to_string();
    let line = storage.fails(&["image", "import", &image, "f0", "--config", &file], 1);
    assert!(line.contains(") is subsystem nqn.2026-11.io.hawser:t's in the daemon at "), "{line}");
    assert_eq!((daemon.end(), target.end()), (Some(0), Some(0)));
}
