//! Pools of a daemon that serves: as a VM sees them, as people change them, after a death.

use super::{MIB, Rig, disk, holds, json, pool_state, slow, wish, write};
use crate::common::{Place, until};
use crate::frontend::{DATA, Guest, T_FLUSH, T_OUT};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

#[test]
fn what_a_vm_writes_is_there_after_a_restart_and_nothing_is_left_in_the_run_state() {
    let rig = Rig::new(2, 256, &disk("v", "p0/v", ""));
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 10GiB");
    let daemon = rig.place.serve();
    assert_eq!(daemon.disk("v").0, "listening", "{}", rig.place.log());
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    // 10 GiB, in sectors.
    assert_eq!(guest.config()[..8], (20u64 << 20).to_le_bytes());
    holds(&mut guest, 9 << 30, 0);
    for index in 0..20 {
        write(&mut guest, index * 400 * MIB, u8::try_from(index + 1).unwrap());
    }
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, 0);
    assert_eq!(rig.tails().len(), 1);
    assert!(slow(&daemon, "v", "write_miss") >= 20);
    let metrics = daemon.http("GET", "/metrics", "").2;
    for want in [
        "hawser_pool_state{pool=\"p0\",state=\"ready\"} 1",
        "hawser_pool_members{pool=\"p0\",state=\"in_sync\"} 2",
        "hawser_volume_mapped_bytes{pool=\"p0\",volume=\"v\"} ",
        "hawser_volume_slow_requests_total{pool=\"p0\",volume=\"v\",class=\"write_miss\"} ",
    ] {
        assert!(metrics.contains(want), "{want} is not in\n{metrics}");
    }
    let status = rig.online("status");
    assert!(status.contains("slow in p0/v: ") && status.contains("p0    ready"), "{status}");
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    assert!(rig.tails().is_empty(), "{}", rig.place.log());
    let check = rig.offline("pool check p0");
    assert!(check.contains("20 mapped extents"), "{check}");
    let daemon = rig.place.serve();
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    for index in 0..20 {
        holds(&mut guest, index * 400 * MIB, u8::try_from(index + 1).unwrap());
        holds(&mut guest, index * 400 * MIB + 4096, 0);
    }
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn after_kill_9_every_acknowledged_write_is_there_without_a_flush() {
    let rig = Rig::new(2, 512, &disk("v", "p0/v", ""));
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 10GiB");
    let mut daemon = rig.place.serve();
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    let mut written = Vec::new();
    for round in 0..4u64 {
        for index in 0..30 {
            // First writes to new extents, and writes into those of before.
            let at = (round * 30 + index) * 2 * MIB;
            write(&mut guest, at, u8::try_from(round * 30 + index + 1).unwrap());
            write(&mut guest, at + 64 * 4096, u8::try_from(index + 1).unwrap());
            written.push((at, u8::try_from(round * 30 + index + 1).unwrap()));
        }
        if round == 2 {
            assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, 0);
        }
        daemon.kill();
        daemon = rig.place.serve();
        guest = guest.reconnect(&rig.socket("v"), &wish());
        for (at, fill) in &written {
            holds(&mut guest, *at, *fill);
        }
    }
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    assert!(rig.offline("pool check p0").contains("120 mapped extents"));
}

#[test]
fn a_clone_of_a_running_volume_has_what_that_had_then() {
    let mut rig = Rig::new(4, 256, &disk("v", "p0/v", ""));
    rig.offline("pool create p0 --raid raid10 d0 d1 d2 d3");
    rig.offline("volume create p0/v --size 10GiB");
    let daemon = rig.place.serve();
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    for index in 0..8 {
        write(&mut guest, index * 3 * MIB, 1);
    }
    assert_eq!(rig.online("volume snapshot p0/v s1"), "snapshot p0/s1 of v\n");
    for index in 0..4 {
        write(&mut guest, index * 3 * MIB, 2);
    }
    rig.online("volume snapshot p0/v s2 p0/s1 s3");
    write(&mut guest, 0, 3);
    assert_eq!(rig.online("volume clone p0/s1 p0/c"), "volume p0/c cloned: 10 GiB\n");
    let socket = rig.place.text("c.sock");
    assert_eq!(rig.online(&format!("disk add c --volume p0/c --socket {socket} --save")), "disk c added\n");
    let mut other = Guest::connect(&rig.socket("c"), &wish());
    for index in 0..8 {
        holds(&mut other, index * 3 * MIB, 1);
    }
    write(&mut other, 7 * 3 * MIB, 9);
    holds(&mut guest, 7 * 3 * MIB, 1);
    holds(&mut guest, 0, 3);
    assert!(slow(&daemon, "v", "copy_on_write") >= 1 && slow(&daemon, "c", "copy_on_write") >= 1);
    // What a snapshot has comes out while the volume is used.
    let (out, none) = (rig.place.text("out"), rig.place.text("none"));
    assert_eq!(
        rig.online(&format!("volume export p0/s1 {out}")),
        format!("p0/s1 exported to {out}: 10 GiB\n")
    );
    let image = fs::File::open(rig.place.path("out")).unwrap();
    assert_eq!(image.metadata().unwrap().len(), 10 << 30);
    assert!(image.metadata().unwrap().blocks() * 512 < 64 * MIB, "zeroes are holes");
    let mut piece = vec![0; 25 << 20];
    image.read_exact_at(&mut piece, 0).unwrap();
    let want = |at: u64| u8::from(at % (3 * MIB) < 4096 && at / (3 * MIB) < 8);
    assert!((0..).zip(&piece).all(|(at, byte)| *byte == want(at)));
    // A volume that is written to meanwhile comes out as it was at one instant: what was written first is never older.
    let (first, last) = (90 * MIB, (10 << 30) - 4096);
    write(&mut guest, first, 10);
    write(&mut guest, last, 10);
    std::thread::scope(|scope| {
        let exporting = scope.spawn(|| rig.online(&format!("volume export p0/v {none}")));
        let mut fill = 10;
        while !exporting.is_finished() {
            fill += u8::from(fill < 250);
            write(&mut guest, first, fill);
            write(&mut guest, last, fill);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(fill > 12, "nothing was written meanwhile");
        assert_eq!(exporting.join().unwrap(), format!("p0/v exported to {none}: 10 GiB\n"));
    });
    let image = fs::File::open(rig.place.path("none")).unwrap();
    let byte_at = |at: u64| {
        let mut byte = [0];
        image.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    };
    let (first, last) = (byte_at(first), byte_at(last));
    assert!(first == last || first == last + 1, "{first}, {last}");
    let volumes = rig.online("volume list --json");
    assert!(!volumes.contains("export-"), "{volumes}");
    let free = |rig: &Rig| json(&rig.online("pool list --json"))[0]["free_bytes"].as_u64().unwrap();
    let before = free(&rig);
    // A snapshot is served where nothing can be written.
    let socket = rig.place.text("s.sock");
    let add = format!("disk add s --volume p0/s2 --socket {socket}");
    let line = rig.online_refused(&add, 1);
    assert_eq!(line, "p0/s2 is a snapshot, want read_only = true, or a clone of it");
    rig.online(&format!("{add} --read-only"));
    let mut third = Guest::connect(&rig.socket("s"), &wish());
    holds(&mut third, 0, 2);
    assert_ne!(third.request(T_OUT, 0, &[4; 4096], 0).0, 0);
    // What is used is not deleted; the rest in any order.
    let line = rig.online_refused("volume delete p0/c", 1);
    assert_eq!(line, "volume p0/c is disk c's, want that removed first");
    for name in ["s1", "s3"] {
        assert_eq!(
            rig.online(&format!("volume delete p0/{name}")),
            format!("volume p0/{name} deleted: 10 GiB\n")
        );
    }
    drop((third, other));
    rig.online("disk remove s");
    rig.online("disk remove c --save");
    rig.online("volume delete p0/c");
    rig.online("volume delete p0/s2");
    for index in 0..8 {
        holds(
            &mut guest,
            index * 3 * MIB,
            if index == 0 {
                3
            } else if index < 4 {
                2
            } else {
                1
            },
        );
    }
    until("what nobody else had is free", || free(&rig) > before);
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    rig.configure("");
    let check = rig.offline("pool check p0");
    assert!(check.contains(" 10 mapped extents"), "{check}");
}

#[test]
fn a_volume_that_is_not_there_is_waited_for_and_grows_under_its_vm() {
    let snapshot = disk("s", "p0/s", "");
    let rest = disk("v", "p0/v", "") + &snapshot + &disk("x", "px/v", "");
    let rig = Rig::new(2, 256, &rest);
    rig.offline("pool create p0 --raid raid1 d0 d1");
    let daemon = rig.place.serve();
    assert_eq!(daemon.disk("v"), ("waiting".to_owned(), Some("pool p0 has no volume v".to_owned())));
    assert_eq!(daemon.disk("x").1.unwrap(), "pool px was not found on any device yet");
    rig.online("volume create p0/v --size 1GiB");
    until("it listens", || daemon.disk("v").0 == "listening");
    rig.online("volume snapshot p0/v s");
    until("it is known", || {
        daemon.disk("s").1.is_some_and(|why| why.starts_with("p0/s is a snapshot, want read_only"))
    });
    assert_eq!(daemon.disk("s").0, "waiting");
    rig.online("volume resize p0/v --size 2GiB");
    let size = || daemon.status()["disks"][0]["size_bytes"].as_u64();
    until("the disk has grown", || size() == Some(2 << 30));
    let line = rig.online_refused("disk add y --volume py/v --socket /tmp/y", 2);
    assert_eq!(line, "volume: pool \"py\" is not there; there are p0");
    let line = rig.online_refused("disk add y --volume p0/none --socket /tmp/y", 1);
    assert_eq!(line, "pool p0 has no volume none");
    let line = rig.online_refused(&format!("disk add y --device d0 --socket {}", rig.place.text("y")), 1);
    assert_eq!(line, "device d0 is a member of pool p0, want one of its volumes");
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_pool_starts_without_a_member_after_its_time_and_gets_it_back() {
    let rest = disk("v", "p0/v", "") + "[[pool]]\nname = \"p0\"\nassemble_timeout = 2\n";
    let rig = Rig::new(2, 256, &rest);
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 1GiB");
    let daemon = rig.place.serve();
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    write(&mut guest, 0, 1);
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    fs::rename(rig.place.path("d1"), rig.place.path("away")).unwrap();
    let daemon = rig.place.serve();
    let waiting = daemon.status()["pools"][0].clone();
    if waiting["state"] == "waiting" {
        assert_eq!(
            waiting["troubles"][0],
            "member 1 is not there; waiting for at most 2 s (assemble_timeout)"
        );
        let why = daemon.disk("v").1.unwrap();
        assert!(why.starts_with("pool p0 is not open yet: member 1 is not there"), "{why}");
        assert!(rig.online_refused("pool status p0", 1).ends_with("pool p0 is waiting"));
    }
    until("it starts without", || daemon.disk("v").0 == "listening");
    assert_eq!(pool_state(&daemon, "p0"), "degraded");
    let output = rig.place.run(&["pool", "status", "p0"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("missing"), "{output:?}");
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    holds(&mut guest, 0, 1);
    for index in 0..20 {
        write(&mut guest, index * 8 * MIB, 2);
    }
    fs::rename(rig.place.path("away"), rig.place.path("d1")).unwrap();
    until("it is back and has everything", || pool_state(&daemon, "p0") == "ready");
    write(&mut guest, 0, 3);
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    // The one that was away has it all.
    fs::rename(rig.place.path("d0"), rig.place.path("away")).unwrap();
    let daemon = rig.place.serve();
    until("it starts without the other", || daemon.disk("v").0 == "listening");
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    holds(&mut guest, 0, 3);
    (1..20).for_each(|index| holds(&mut guest, index * 8 * MIB, 2));
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_pool_is_made_changed_and_scrubbed_while_a_daemon_serves() {
    let rig = Rig::new(
        8,
        256,
        "[[device]]\nname = \"m\"\nuri = \"mem:?size=64MiB\"\n[[disk]]\nname = \"m\"\ndevice = \"m\"\nsocket = \"@/m.sock\"\n",
    );
    let daemon = rig.place.serve();
    let made = rig.online("pool create p0 --raid raid1 --spares 1 d0 d1 d2");
    assert!(made.starts_with("pool p0 created: raid1, "), "{made}");
    let status = rig.online("pool status p0");
    assert!(status.contains("  -       d2      spare"), "{status}");
    rig.online("volume create p0/v --size 1GiB");
    let socket = rig.place.text("v.sock");
    rig.online(&format!("disk add v --volume p0/v --socket {socket}"));
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    for index in 0..20 {
        write(&mut guest, index * 5 * MIB, 5);
    }
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, 0);
    let done = rig.online("pool scrub p0 --wait");
    assert!(done.starts_with("pool p0 scrubbed, members do not differ"), "{done}");
    let done = rig.online("pool replace p0 d1 d3 --wait");
    assert!(done.starts_with("pool p0 has d3 in the place of d1"), "{done}");
    assert_eq!(pool_state(&daemon, "p0"), "ready", "what it waited for");
    let members = json(&rig.online("pool list --json"))[0]["members"].clone();
    assert_eq!((&members[1]["device"], &members[1]["state"]), (&"d3".into(), &"in_sync".into()));
    let size = |rig: &Rig| json(&rig.online("pool list --json"))[0]["size_bytes"].as_u64().unwrap();
    let before = size(&rig);
    rig.online("pool grow p0 d4 d5 --wait");
    until("it has grown", || size(&rig) > before + 200 * MIB);
    rig.online("pool add-spare p0 d6");
    // The one that was replaced is nobody's.
    assert_eq!(json(&rig.online("device show d1 --json"))["pool"], serde_json::Value::Null);
    rig.online("pool replace p0 d3 d1 --wait");
    assert_eq!(json(&rig.online("device show d3 --json"))["pool"], serde_json::Value::Null);
    let line = rig.online_refused("pool replace p0 --abort", 1);
    assert_eq!(line, "pool p0 is replacing no member");
    assert_eq!(pool_state(&daemon, "p0"), "ready");
    let line = rig.online_refused("pool create p1 --raid raid1 --force d0 d7", 1);
    assert_eq!(line, "device d0 is a member of pool p0, want a free device");
    // A disk's size only grows, whether its guest is connected or not.
    let line = rig.online_refused("volume resize p0/v --size 512MiB", 1);
    assert_eq!(line, "volume p0/v is disk v's, it can only grow");
    for (line, code, want) in [
        ("pool create p0 --raid raid1 d1 d7", 1, "pool p0 is there, want another name"),
        ("pool create p1 --raid raid1 d0 d7", 1, "device d0 is a member of pool p0, want a free device"),
        (
            "pool create p1 --raid raid1 m d7",
            1,
            "device m is a disk's or a subsystem's own, want a free device",
        ),
        ("pool create p1 --raid raid1 x d7", 2, "devices: \"x\" is no [[device]], want one of"),
        ("pool create p1 --raid raid1 d7 d7", 2, "devices: device d7 is named twice"),
        ("pool replace p0 d9 d7", 1, "d9"),
        ("pool replace p0 d0 d4", 1, "device d4 is a member of pool p0"),
        ("pool grow px d7", 1, "pool \"px\" is not there; there are p0"),
        ("volume create px/v --size 1GiB", 1, "pool \"px\" is not there; there are p0"),
    ] {
        let line = rig.online_refused(line, code);
        assert!(line.contains(want), "{line}");
    }
    for index in 0..20 {
        holds(&mut guest, index * 5 * MIB, 5);
    }
    let device = json(&rig.online("device show d4 --json"));
    assert_eq!(device["pool"], "p0");
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    let daemon = rig.place.serve();
    until("it comes back", || pool_state(&daemon, "p0") == "ready");
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_pool_does_not_go_on_by_itself_from_a_member_that_was_away() {
    let rest = disk("v", "p0/v", "") + "[[pool]]\nname = \"p0\"\nassemble_timeout = 1\n";
    let rig = Rig::new(2, 128, &rest);
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 64MiB");
    let move_file = |from: &str, to: &str| fs::rename(rig.place.path(from), rig.place.path(to)).unwrap();
    move_file("d0", "d0.away");
    let daemon = rig.place.serve();
    until("it starts without d0", || daemon.disk("v").0 == "listening");
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    write(&mut guest, 0, 7);
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    // Alone, d0 says that all is well.
    move_file("d0.away", "d0");
    move_file("d1", "d1.away");
    let line = rig.refused("volume create p0/w --size 64MiB", 1);
    assert!(
        line.contains("pool p0: what is there is older than what this host last had (generation "),
        "{line}"
    );
    let daemon = rig.place.serve();
    let why = || daemon.status()["pools"][0]["troubles"][0].as_str().unwrap_or("").to_owned();
    until("it says so", || why().contains("is older than what this host last had"));
    assert!(why().starts_with("member 1 is not there; "), "{}", why());
    assert_eq!(daemon.disk("v").0, "waiting");
    move_file("d1.away", "d1");
    until("it goes on from d1", || daemon.disk("v").0 == "listening");
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    holds(&mut guest, 0, 7);
    drop(guest);
    until("d0 has it", || pool_state(&daemon, "p0") == "ready");
    assert_eq!(daemon.end(), Some(0));
    // Whoever knows better says so, and from then on that is the pool.
    move_file("d1", "d1.away");
    fs::write(
        fs::read_dir(rig.place.path("lib"))
            .unwrap()
            .find_map(|entry| {
                let path = entry.unwrap().path();
                path.file_name()?.to_str()?.starts_with("pool-").then_some(path)
            })
            .unwrap(),
        "999 999\n",
    )
    .unwrap();
    rig.offline("volume create p0/w --size 64MiB --degraded");
    let daemon = rig.place.serve();
    until("it starts", || daemon.disk("v").0 == "listening");
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_device_that_was_replaced_takes_nobodys_place_at_the_next_start() {
    let rest = disk("v", "p0/v", "") + "[[pool]]\nname = \"p0\"\nassemble_timeout = 1\n";
    let rig = Rig::new(3, 128, &rest);
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 64MiB");
    let done = rig.offline("pool replace p0 d1 d2");
    assert!(done.starts_with("pool p0 has d2 in the place of d1"), "{done}");
    rig.offline("pool status p0");
    fs::rename(rig.place.path("d2"), rig.place.path("away")).unwrap();
    let daemon = rig.place.serve();
    until("it starts without d2", || daemon.disk("v").0 == "listening");
    assert_eq!(pool_state(&daemon, "p0"), "degraded");
    fs::rename(rig.place.path("away"), rig.place.path("d2")).unwrap();
    until("d2 is back", || pool_state(&daemon, "p0") == "ready");
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn two_pools_of_one_name_are_both_left_closed() {
    let mut rig = Rig::new(2, 128, "");
    rig.offline("pool create p0 --raid linear d0");
    // The other one is made where the first is not seen.
    let text = fs::read_to_string(&rig.config).unwrap();
    let only = text.replace("name = \"d0\"\nuri = \"file://", "name = \"d0\"\nuri = \"null:?size=128MiB\" #");
    fs::write(&rig.config, only).unwrap();
    rig.offline("pool create p0 --raid linear d1");
    rig.configure(&disk("v", "p0/v", ""));
    let line = rig.refused("volume create p0/v --size 1GiB", 1);
    assert!(line.starts_with("two pools are called p0: ") && line.contains("(on d0)"), "{line}");
    let daemon = rig.place.serve();
    let pools = daemon.status()["pools"].clone();
    assert_eq!(pools.as_array().unwrap().len(), 2);
    for pool in pools.as_array().unwrap() {
        assert_eq!(pool["state"], "waiting");
        assert!(pool["troubles"][0].as_str().unwrap().starts_with("two pools are called p0: "), "{pool}");
    }
    assert_eq!(daemon.disk("v").0, "waiting");
    assert!(rig.place.log().contains("two pools are called p0: "), "{}", rig.place.log());
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_second_initiator_under_one_identity_is_refused() {
    let place = Place::new();
    let far = "[[device]]\nname = \"r\"\nuri = \"nvme+tcp://127.0.0.1:1/nqn.2026-11.io.hawser:none\"\n";
    place.configure(far);
    let daemon = place.serve();
    let other = Place::new();
    let text = fs::read_to_string(place.path("hawser.toml")).unwrap();
    let text =
        text.replace(&place.text("api"), &other.text("api")).replace(&place.text("lib"), &other.text("lib"));
    fs::write(other.path("hawser.toml"), text).unwrap();
    let config = other.text("hawser.toml");
    let line = other.fails(&["serve", "--config", &config], 1);
    let host = &place.host;
    let want = format!(
        "another process, pid {}, is host nqn.2014-08.org.nvmexpress:uuid:{host} with identifier {host}",
        daemon.pid()
    );
    assert!(line.starts_with(&want), "{line}");
    assert_eq!(
        other.names(),
        ["api.state", "hawser.toml"],
        "nothing but a run state that says that it never began"
    );
    // A death frees it.
    daemon.kill();
    let daemon = other.serve();
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn a_pool_that_is_full_says_so_hurts_nobody_else_and_can_be_grown() {
    for policy in ["error", "wait"] {
        let rest = disk("a", "p0/a", "") + &disk("b", "p0/b", "");
        let policy_text = format!("[[pool]]\nname = \"p0\"\nno_space = \"{policy}\"\nlow_water = 50\n");
        let rig = Rig::new(4, 96, &(rest + &policy_text));
        rig.offline("pool create p0 --raid raid0 d0 d1");
        rig.offline("volume create p0/a --size 10GiB");
        rig.offline("volume create p0/b --size 10GiB");
        let daemon = rig.place.serve();
        let mut one = Guest::connect(&rig.socket("a"), &wish());
        let mut other = Guest::connect(&rig.socket("b"), &wish());
        write(&mut other, 0, 1);
        let pool = || daemon.status()["pools"][0].clone();
        let extent = pool()["extent_bytes"].as_u64().unwrap();
        let mapped = || daemon.status()["volumes"][1]["mapped_bytes"].as_u64().unwrap();
        until("it is seen what b has", || mapped() > 0);
        let extents = pool()["free_bytes"].as_u64().unwrap() / extent;
        for index in 0..extents {
            write(&mut one, index * extent, 2);
        }
        until("it is low", || !pool()["troubles"].as_array().unwrap().is_empty());
        // The next one finds nothing; what has space goes on.
        let at = extents * extent;
        if policy == "error" {
            assert_ne!(one.request(T_OUT, at / 512, &[3; 4096], 0).0, 0);
            write(&mut one, 0, 3);
        } else {
            let parts = one.plain(T_OUT, at / 512, &[3; 4096], 0, DATA);
            one.submit(0, &parts);
        }
        if policy == "error" {
            until("it is counted", || slow(&daemon, "a", "no_space") > 0);
        }
        write(&mut other, 4096, 4);
        holds(&mut other, 0, 1);
        rig.online("pool grow p0 d2 d3");
        if policy == "error" {
            write(&mut one, at, 3);
        } else {
            one.rings[0].wait_used(&one.ram);
            assert_eq!(one.ram.read(DATA + 16, 1), [0], "it had waited for space");
        }
        holds(&mut one, at, 3);
        holds(&mut one, (extents - 1) * extent, 2);
        drop((one, other));
        assert_eq!(daemon.end(), Some(0));
        rig.offline("pool check p0");
    }
}
