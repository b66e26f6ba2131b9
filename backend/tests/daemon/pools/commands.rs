//! Commands without a daemon: what they make, what they find, what they refuse.

use super::{MIB, Rig, disk, holds, json, wish, write};
use crate::common::{Place, until};
use crate::frontend::Guest;
use hawser_volume::format::Superblock;
use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

#[test]
fn without_a_daemon_a_pool_is_made_looked_at_and_checked() {
    let rig = Rig::new(3, 256, "");
    assert_eq!(rig.offline("pool list"), "POOL  STATE  RAID  SIZE  FREE  IN SYNC  SPARES  WORK\n");
    let made = rig.offline("pool create p0 --raid raid1 d0 d1");
    assert!(made.starts_with("pool p0 created: raid1, ") && made.ends_with(" MiB\n"), "{made}");
    let list = json(&rig.offline("pool list --json"));
    assert_eq!(list[0]["members"][1]["device"], "d1");
    assert_eq!(
        (list[0]["state"].as_str(), list[0]["free_bytes"].as_u64()),
        (Some("ready"), list[0]["size_bytes"].as_u64())
    );
    let status = rig.offline("pool status p0");
    assert!(status.starts_with("pool p0: ready, raid1\n") && status.contains("d1      in_sync"), "{status}");
    assert_eq!(rig.offline("volume create p0/v --size 20GiB"), "volume p0/v created: 20 GiB\n");
    assert_eq!(rig.offline("volume snapshot p0/v s"), "snapshot p0/s of v\n");
    assert_eq!(rig.offline("volume clone p0/s p0/c"), "volume p0/c cloned: 20 GiB\n");
    assert_eq!(rig.offline("volume resize p0/c --size 1TiB"), "volume p0/c resized: 1 TiB\n");
    let volumes = json(&rig.offline("volume list --json"));
    let names: Vec<&str> =
        volumes.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["c", "s", "v"]);
    assert_eq!((&volumes[0]["size_bytes"], &volumes[1]["snapshot"]), (&(1u64 << 40).into(), &true.into()));
    for volume in ["v", "s", "c"] {
        rig.offline(&format!("volume delete p0/{volume}"));
    }
    let check = json(&rig.offline("pool check p0 --json"));
    assert_eq!(check["faults"], serde_json::json!([]));
    assert!(!rig.place.path("api.state").exists(), "no daemon has been here");
}

#[test]
fn commands_without_a_daemon_take_over_what_one_that_was_killed_has_left() {
    let rig = Rig::new(2, 256, &disk("v", "p0/v", ""));
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 64MiB");
    let daemon = rig.place.serve();
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    for index in 0..10 {
        write(&mut guest, index * 5 * MIB, 7);
    }
    // Nothing without the daemon while it runs.
    for line in ["pool list", "volume list", "volume create p0/w --size 1GiB"] {
        let refusal = rig.refused(line, 1);
        let want = format!("is served by a daemon: use --api {} instead of --config", rig.place.text("api"));
        assert!(refusal.contains(&want) && refusal.contains(&format!("pid {}", daemon.pid())), "{refusal}");
    }
    daemon.kill();
    let all = |image: &[u8]| {
        assert_eq!(image.len() as u64, 64 * MIB);
        let is_right = |(at, byte): (usize, &u8)| {
            *byte == if at as u64 % (5 * MIB) < 4096 && at as u64 / (5 * MIB) < 10 { 7 } else { 0 }
        };
        image.iter().enumerate().all(is_right)
    };
    // One that looks changes nothing, and sees it.
    assert_eq!(rig.tails().len(), 1);
    rig.offline(&format!("volume export p0/v {}", rig.place.text("first")));
    assert_eq!(rig.tails().len(), 1);
    assert!(all(&fs::read(rig.place.path("first")).unwrap()));
    // One that changes something makes it durable.
    rig.offline("volume snapshot p0/v s");
    assert!(rig.tails().is_empty());
    rig.offline(&format!("volume export p0/s {}", rig.place.text("second")));
    assert!(all(&fs::read(rig.place.path("second")).unwrap()));
    let daemon = rig.place.serve();
    let mut guest = guest.reconnect(&rig.socket("v"), &wish());
    for index in 0..10 {
        holds(&mut guest, index * 5 * MIB, 7);
    }
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
}

#[test]
fn an_image_makes_its_volume_and_comes_out_as_it_went_in() {
    let rig = Rig::new(2, 256, "");
    rig.offline("pool create p0 --raid raid0 d0 d1");
    let mut image = vec![0; 20 << 20];
    for (at, byte) in image.iter_mut().enumerate() {
        if at % (4 << 20) < 1_000_000 {
            *byte = (at * 31 % 251).to_le_bytes()[0] | 1;
        }
    }
    fs::write(rig.place.path("raw"), &image).unwrap();
    let raw = rig.place.text("raw");
    let done = rig.offline(&format!("image import {raw} p0/golden --verify"));
    assert_eq!(done, format!("{raw} imported to p0/golden: 20 MiB, verified\n"));
    let volume = json(&rig.offline("volume list --json"))[0].clone();
    assert_eq!(volume["size_bytes"], 20 << 20);
    let out = rig.place.text("out");
    assert_eq!(
        rig.offline(&format!("volume export p0/golden {out}")),
        format!("p0/golden exported to {out}: 20 MiB\n")
    );
    assert!(fs::read(rig.place.path("out")).unwrap() == image);
    let line = rig.refused(&format!("volume export p0/golden {out}"), 1);
    assert!(line.ends_with("the file is there already, want another path"), "{line}");
    // A second import goes to what is there.
    fs::write(rig.place.path("small"), [9; 4096]).unwrap();
    rig.offline(&format!("image import {} p0/golden", rig.place.text("small")));
    rig.offline(&format!("volume export p0/golden {}", rig.place.text("third")));
    let third = fs::read(rig.place.path("third")).unwrap();
    assert!(third[..4096] == [9; 4096] && third[4096..] == image[4096..]);
    let line = rig.refused(&format!("image import {raw} px/golden"), 1);
    assert!(line.contains("pool \"px\" is on no device of ") && line.ends_with("there are p0"), "{line}");
    assert!(rig.offline("pool check p0").contains("1 volumes"));
}

#[test]
fn what_cannot_be_is_refused_by_name_and_changes_nothing() {
    let rest = "[[device]]\nname = \"big\"\nuri = \"file://@/big\"\nblock_size = 4096\n[[device]]\nname = \"m\"\nuri = \"mem:?size=64MiB\"\n\
                [[device]]\nname = \"tiny\"\nuri = \"file://@/tiny\"\n\
                [[device]]\nname = \"ro\"\nuri = \"file://@/ro\"\nread_only = true\n";
    let place_files = |place: &Place| {
        fs::File::create(place.path("big")).unwrap().set_len(256 * MIB).unwrap();
        fs::File::create(place.path("ro")).unwrap().set_len(256 * MIB).unwrap();
        fs::File::create(place.path("tiny")).unwrap().set_len(MIB).unwrap();
    };
    let mut rig = Rig::new(5, 256, "");
    place_files(&rig.place);
    rig.configure(rest);
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 1GiB");
    let before = [fs::read(rig.place.path("d0")).unwrap(), fs::read(rig.place.path("d2")).unwrap()];
    for (line, code, want) in [
        ("pool create p1 --raid raid1 d2", 2, "raid1 has 2 to 4 members, and 1 are given"),
        ("pool create p1 --raid raid10 d2", 2, "raid10 has 2 to 32 members, and 1 are given"),
        (
            "pool create p1 --raid raid7 d2 d3",
            2,
            "--raid: \"raid7\" is no RAID level, want linear, raid0, raid1, raid10, raid5 or raid6",
        ),
        ("pool create p1 --raid raid5 d2 d3", 2, "raid5 has 3 to 32 members, and 2 are given"),
        ("pool create p1 --raid raid6 d2 d3 d4", 2, "raid6 has 4 to 32 members, and 3 are given"),
        ("pool create p1 --raid raid1 d2 tiny", 2, "tiny has 1048576 bytes, want at least "),
        (
            "pool create p1 --raid raid1 d2 big",
            2,
            "big has blocks of 4096 bytes and d2 of 512, want members of one block size",
        ),
        ("pool create p1 --raid raid1 d2 d1", 1, "d1 belongs to pool p0, want another device, or --force"),
        ("pool create p1 --raid raid1 d2 d2", 2, "device d2 is named twice, want each device once"),
        ("pool create p1 --raid raid1 d2 m", 2, "device m is gone when this command ends"),
        ("pool replace p0 d0 m", 2, "device m is gone when this command ends"),
        ("pool grow p0 d2 m", 2, "device m is gone when this command ends"),
        ("pool add-spare p0 m", 2, "device m is gone when this command ends"),
        ("pool create p1 --raid raid1 d2 x", 2, "\"x\" is no [[device]], want one of"),
        ("pool create p0 --raid raid1 d2 d3", 1, "pool p0 is there on device d0, want another name"),
        (
            "pool create p1 --raid raid1 --strip 3KiB d2 d3",
            2,
            "a strip of 3072 bytes cannot be, want a power of two from 4KiB to 1MiB",
        ),
        (
            "pool create p1 --raid raid1 --extent 1GiB d2 d3",
            2,
            "an extent of 1073741824 bytes cannot be, want 4KiB to 64MiB",
        ),
        (
            "pool create p1 --raid raid1 --extent 0MiB d2 d3",
            2,
            "an extent of 0 bytes cannot be, want 4KiB to 64MiB, which is made whole stripes",
        ),
        (
            "pool create p1 --raid raid5 d2 d3 d4 --spares 3",
            2,
            "raid5 has 3 to 32 members, and 0 are given beside 3 spares, of 3 devices",
        ),
        (
            "pool create p1 --raid linear d2 d3 --spares 1",
            2,
            "linear has no second copy that a spare could be given, want no spares",
        ),
        ("pool create p1 --raid raid1 d2 ro", 2, "ro is read-only, want a device that can be written"),
        ("pool add-spare p0 ro", 2, "ro is read-only, want a device that can be written"),
        ("pool replace p0 d1 ro", 2, "ro is read-only, want a device that can be written"),
        ("pool grow p0 d2 ro", 2, "ro is read-only, want a device that can be written"),
        ("volume export p0/v -", 2, "FILE: \"-\" would be stdout"),
        ("pool create p1 --raid raid1 --log 1TiB d2 d3", 2, "d2 has 268435456 bytes, want at least "),
        (
            "pool create p1 --raid raid1 --metadata-size 1TiB d2 d3",
            2,
            "d2 has 268435456 bytes, want at least ",
        ),
        (
            "pool create p1 --raid raid1 --log 0 d2 d3",
            2,
            "pool p1: log_bytes 0 is not whole pages, or more than 1099511627776",
        ),
        ("pool status px", 1, "pool \"px\" is not there; there are p0"),
        ("pool check px", 1, "pool \"px\" is on no device of "),
        ("volume create p0/v --size 1GiB", 1, "volume p0/v is there, want another name"),
        (
            "volume create p0/w --size 0",
            2,
            "volume p0/w: a size of 0 bytes cannot be, want a multiple of 512 from 512 to 2251799812636672",
        ),
        (
            "volume resize p0/v --size 0",
            2,
            "volume p0/v: a size of 0 bytes cannot be, want a multiple of 512 from 512 to 2251799812636672",
        ),
        ("volume resize p0/x --size 1GiB", 1, "volume p0/x is not there"),
        ("volume snapshot p0/x s", 1, "volume p0/x is not there"),
        ("volume snapshot p0/v v", 1, "volume p0/v is there, want another name"),
        ("volume clone p0/v p0/c", 2, "v is no snapshot"),
        ("volume clone p0/s px/c", 2, "p0/s and px/c are in two pools"),
        ("volume snapshot p0/v s1 p1/v s2", 2, "volumes of pools p0 and p1 have no instant in common"),
        ("volume delete p0/x", 1, "volume p0/x is not there; there are v"),
        ("volume create px/v --size 1GiB", 1, "pool \"px\" is on no device of "),
    ] {
        let refusal = rig.refused(line, code);
        assert!(refusal.starts_with(want), "{line}: {refusal}");
    }
    let after = [fs::read(rig.place.path("d0")).unwrap(), fs::read(rig.place.path("d2")).unwrap()];
    assert!(before[1] == after[1], "nothing was written to a free device");
    let list = json(&rig.offline("volume list --json"));
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(rig.offline("pool check p0").lines().count(), 1);
    // What is not quite what was asked for is said.
    let made = rig.offline("pool create p2 --raid linear --extent 4KiB d3");
    assert!(made.starts_with("pool p2 created with extents of 64 KiB: linear, "), "{made}");
    let line = rig.refused("pool add-spare p2 d4", 1);
    assert_eq!(line, "pool p2: linear has no second copy that a spare could be given, want no spares");
    // With the word for it.
    rig.offline("pool create p1 --raid raid1 --force d2 d1");
    assert_eq!(json(&rig.offline("pool list --json"))[1]["name"], "p1");
}

/// `--metadata-size`, without a daemon and from one; and what a pool has if nothing is said.
#[test]
fn a_pool_has_as_much_room_for_mappings_as_is_asked_for() {
    let rig = Rig::new(6, 256, "");
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("pool create p1 --raid raid1 --metadata-size 5MiB d2 d3");
    let daemon = rig.place.serve();
    rig.online("pool create p2 --raid raid1 --metadata-size 21MiB d4 d5");
    assert_eq!(daemon.end(), Some(0));
    let room = |device: &str| {
        let page = fs::read(rig.place.path(device)).unwrap()[4096..8192].to_vec();
        u64::from(Superblock::decode(&page).unwrap().unwrap().layout.metadata_pages) * 4096
    };
    for device in ["d0", "d1"] {
        assert!((8 * MIB..9 * MIB).contains(&room(device)), "{}", room(device));
    }
    assert_eq!(["d2", "d3", "d4", "d5"].map(room), [5 * MIB, 5 * MIB, 21 * MIB, 21 * MIB]);
    let status = rig.offline("pool status p2");
    // Each page is there twice, and a few are kept.
    assert!(status.contains(" of 10.3 MiB\n"), "{status}");
}

#[test]
fn an_image_that_does_not_fit_leaves_no_volume_behind() {
    let rig = Rig::new(2, 128, "");
    rig.offline("pool create p0 --raid raid0 --log 1MiB d0 d1");
    let mut image = vec![0u64; 300 << 17];
    let mut seed = 1u64;
    for word in &mut image {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = seed | 1;
    }
    let bytes: Vec<u8> = image.iter().flat_map(|word| word.to_le_bytes()).collect();
    fs::write(rig.place.path("raw"), bytes).unwrap();
    let line = rig.refused(&format!("image import {} p0/golden", rig.place.text("raw")), 1);
    assert!(line.starts_with("volume p0/golden: writing ") && !line.contains("it is left"), "{line}");
    assert_eq!(rig.offline("volume list --json"), "[]\n");
    assert!(rig.offline("pool check p0").contains(" 0 volumes"));
}

#[test]
fn what_a_disk_of_the_configuration_is_on_is_kept() {
    let rig = Rig::new(2, 128, &disk("v", "p0/v", ""));
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 64MiB");
    // Nobody is connected.
    assert_eq!(json(&rig.offline("volume list --json"))[0]["used_by"], serde_json::json!(["disk v"]));
    let line = rig.refused("volume delete p0/v", 1);
    assert_eq!(line, format!("volume p0/v is disk v's in {}, want that removed first", rig.config));
    fs::write(rig.place.path("raw"), [7; 4096]).unwrap();
    let import = format!("image import {} p0/v", rig.place.text("raw"));
    rig.offline(&import);
    // A guest waits.
    let daemon = rig.place.serve();
    until("the pool is open", || super::pool_state(&daemon, "p0") == "ready");
    let volume = json(&rig.online("volume list --json"))[0].clone();
    assert_eq!((&volume["users"], &volume["used_by"][0]), (&0.into(), &"disk v".into()));
    daemon.kill();
    let line = rig.refused("volume resize p0/v --size 32MiB", 1);
    assert!(line.starts_with("volume p0/v is disk v's, it can only grow"), "{line}");
    let line = rig.refused(&import, 1);
    assert!(line.starts_with("volume p0/v is disk v's, whose daemon did not end in order"), "{line}");
    rig.offline(&format!("{import} --force"));
}

#[test]
fn a_run_folder_of_the_environment_is_not_taken_for_the_files() {
    let rig = Rig::new(2, 128, &disk("v", "p0/v", ""));
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 64MiB");
    let daemon = rig.place.serve();
    let mut guest = Guest::connect(&rig.socket("v"), &wish());
    write(&mut guest, 0, 7);
    daemon.kill();
    let text = fs::read_to_string(&rig.config).unwrap();
    let api = rig.place.text("api");
    // The environment of every command here names another socket now.
    let here = text.replace(&format!("api = \"{api}\""), &format!("api = \"{api}2\""));
    assert!(here != text);
    fs::rename(rig.place.path("api.state"), rig.place.path("api2.state")).unwrap();
    fs::write(&rig.config, here).unwrap();
    rig.offline("volume snapshot p0/v s");
    rig.offline(&format!("volume export p0/s {}", rig.place.text("out")));
    assert!(fs::read(rig.place.path("out")).unwrap()[..4096] == [7; 4096]);
    assert!(!rig.place.path("out.partial").exists());
}

#[test]
fn a_damaged_superblock_or_log_is_named_and_left_as_it_is() {
    let mut rig = Rig::new(2, 256, "");
    rig.offline("pool create p0 --raid linear d0");
    rig.offline("volume create p0/v --size 1GiB");
    // Everything that is written before the data, block by block wrong.
    let path = rig.place.path("d0");
    let whole = fs::read(&path).unwrap();
    let mut found = Vec::new();
    for at in (0..24 << 20).step_by(4096) {
        if whole[at..at + 4096].iter().all(|byte| *byte == 0) {
            continue;
        }
        let mut damaged = whole.clone();
        damaged[at + 24..at + 64].iter_mut().for_each(|byte| *byte ^= 0xff);
        fs::write(&path, &damaged).unwrap();
        let output = rig.place.run(&["pool", "check", "p0", "--config", &rig.config]);
        let code = output.status.code();
        assert!(code == Some(0) || code == Some(1), "at {at}: {output:?}");
        if code == Some(1) {
            found.push(at);
        }
        assert!(fs::read(&path).unwrap() == damaged, "a check writes nothing");
    }
    // Old copies of what is written in turns may be anything.
    assert!(found.contains(&4096) && found.contains(&65536) && found.len() > 2, "{found:?}");
    // Both superblocks.
    let mut damaged = whole.clone();
    let blocks = (0..damaged.len()).step_by(4096);
    let superblocks: Vec<usize> = blocks.filter(|at| &whole[*at..*at + 8] == b"HAWSERSB").collect();
    assert_eq!(superblocks, [4096, 65536]);
    superblocks.iter().for_each(|at| damaged[at + 16] ^= 1);
    fs::write(&path, &damaged).unwrap();
    let line = rig.refused("pool check p0", 1);
    assert!(line.contains("p0") || line.contains("d0"), "{line}");
    rig.configure(&disk("v", "p0/v", ""));
    let daemon = rig.place.serve();
    assert_eq!(daemon.disk("v").0, "waiting");
    assert_eq!(daemon.end(), Some(0));
    assert!(fs::read(&path).unwrap() == damaged);
}

/// What a check that finds something prints.
fn faults(rig: &Rig, pool: &str) -> Vec<String> {
    let output = rig.place.run(&["pool", "check", pool, "--json", "--config", &rig.config]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let faults = json(&String::from_utf8(output.stdout).unwrap())["faults"].clone();
    faults.as_array().unwrap().iter().map(|fault| fault.as_str().unwrap().to_owned()).collect()
}

/// It was "member 1 is missing", twice, and not that its device is there and why it was not taken.
#[test]
fn a_member_of_a_mirror_whose_superblocks_are_both_bad_is_one_fault_with_its_device_and_why() {
    let rig = Rig::new(2, 256, "");
    rig.offline("pool create p0 --raid raid1 d0 d1");
    let path = rig.place.path("d1");
    let mut damaged = fs::read(&path).unwrap();
    [4096, 65536].iter().for_each(|at| damaged[at + 70] ^= 1);
    fs::write(&path, &damaged).unwrap();
    let want =
        "member 1 is missing (d1: superblock at 4096 and at 65536: the superblock is torn: its CRC is wrong)";
    assert_eq!(faults(&rig, "p0"), [want]);
    // A list that lacks something is not a success.
    for line in ["pool list --json", "volume list --json"] {
        let args = [line.split(' ').collect(), vec!["--config", &rig.config]].concat();
        let output = rig.place.run(&args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{line}: {errors}");
        assert!(errors.ends_with("hawser: not all is shown, it lacks device d1\n"), "{line}: {errors}");
        json(&String::from_utf8_lossy(&output.stdout));
    }
    // All that is known of an absent one.
    fs::remove_file(&path).unwrap();
    let found = faults(&rig, "p0");
    let why = "/d1: cannot be opened: No such file or directory (os error 2))";
    assert!(found.len() == 1 && found[0].starts_with("member 1 is missing ("), "{found:?}");
    assert!(found[0].ends_with(why), "{found:?}");
}

/// A file that was made shorter took the whole pool down, though the other members have everything: it counts as missing, and comes back when it is as
/// large as it was.
#[test]
fn a_member_that_has_become_too_small_is_left_out_and_named() {
    let rig = Rig::new(4, 128, "[[pool]]\nname = \"p0\"\nassemble_timeout = 1\n");
    rig.offline("pool create p0 --raid raid5 d0 d1 d2");
    rig.offline("volume create p0/v --size 64MiB");
    let file = fs::OpenOptions::new().write(true).open(rig.place.path("d1")).unwrap();
    file.set_len(100 * MIB).unwrap();
    let why = "d1 has 104857600 bytes, and as member 1 it had at least 13";
    let found = faults(&rig, "p0");
    assert!(found.len() == 1 && found[0].starts_with(why), "{found:?}");
    let line = rig.refused("volume create p0/w --size 64MiB", 1);
    assert!(line.starts_with("pool p0 is not complete") && line.contains(why), "{line}");
    rig.offline("volume create p0/w --size 64MiB --degraded");
    let daemon = rig.place.serve();
    until("it is started without", || super::pool_state(&daemon, "p0") == "degraded");
    assert_eq!(daemon.end(), Some(0));
    file.set_len(128 * MIB).unwrap();
    let daemon = rig.place.serve();
    until("it has everything again", || super::pool_state(&daemon, "p0") == "ready");
    assert_eq!(daemon.end(), Some(0));
    assert!(rig.offline("pool check p0").contains("2 volumes"));
    // With fewer than hold all the data nothing helps but the file as it was.
    file.set_len(100 * MIB).unwrap();
    fs::remove_file(rig.place.path("d0")).unwrap();
    let line = rig.refused("volume create p0/x --size 64MiB --degraded", 1);
    assert!(line.contains("lacks data without its members 0, 1") && line.contains(why), "{line}");
}

/// The first damaged page of a member's tables ended the check of it, and the marks had no device.
#[test]
fn a_damaged_page_of_one_member_is_named_and_the_rest_is_checked() {
    let rig = Rig::new(2, 256, "");
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("volume create p0/v --size 1GiB");
    let path = rig.place.path("d1");
    let whole = fs::read(&path).unwrap();
    let layout = Superblock::decode(&whole[4096..8192]).unwrap().unwrap().layout;
    let damage = |places: &[u64]| {
        let mut damaged = whole.clone();
        for at in places {
            damaged[usize::try_from(at + 70).unwrap()] ^= 1;
        }
        fs::write(&path, damaged).unwrap();
        let output = rig.place.run(&["pool", "check", "p0", "--json", "--config", &rig.config]);
        let report = json(&String::from_utf8(output.stdout).unwrap());
        assert_eq!(report["checked"]["volumes"], 1, "{report}");
        let faults = report["faults"].as_array().unwrap().iter();
        faults.map(|fault| fault.as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let used: Vec<u64> =
        (2..20).map(|page| layout.page_offset(page)).filter(|at| !damage(&[*at]).is_empty()).collect();
    assert!(!used.is_empty(), "{used:?}");
    let found = damage(&used);
    assert_eq!(found.len(), used.len(), "{found:?}");
    assert!(found.iter().all(|fault| fault.starts_with("d1: metadata page ")), "{found:?}");
    let found = damage(&[layout.intents_offset()]);
    let want = format!(
        "d1: page 0 of the marks of regions, at {}, is not whole: all of it counts as marked",
        layout.intents_offset()
    );
    assert_eq!(found, [want]);
}

/// It was 30 s of silence for each of them, one after the other.
#[test]
fn who_is_waited_for_is_said_and_all_are_waited_for_at_once() {
    let rig = Rig::new(2, 128, "");
    rig.offline("pool create p0 --raid raid1 d0 d1");
    let held: Vec<fs::File> = ["d0", "d1"].iter().map(|name| locked(&rig.place.path(name))).collect();
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        drop(held);
    });
    let output = rig.place.run(&["pool", "list", "--config", &rig.config]);
    release.join().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(errors.contains("hawser: waiting for d0, d1, for half a minute at most\n"), "{errors}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("p0    ready"));
}

/// As a process has a device that writes to it.
fn locked(path: &std::path::Path) -> fs::File {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    // SAFETY: an all-zero flock is a lock of a whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(libc::F_WRLCK).unwrap();
    // SAFETY: `lock` is valid, and l_pid 0.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
    file
}

#[test]
fn a_member_that_is_swapped_for_another_is_refused_and_comes_back_through_a_resync() {
    let rig = Rig::new(3, 128, "");
    rig.offline("pool create p0 --raid raid1 d0 d1");
    rig.offline("pool create p1 --raid linear d2");
    rig.offline("volume create p0/v --size 64MiB");
    // The member of another pool is where the second member was.
    fs::rename(rig.place.path("d1"), rig.place.path("away")).unwrap();
    fs::rename(rig.place.path("d2"), rig.place.path("d1")).unwrap();
    fs::File::create(rig.place.path("d2")).unwrap().set_len(128 * MIB).unwrap();
    let before = fs::read(rig.place.path("d1")).unwrap();
    let line = rig.refused("volume create p0/w --size 64MiB", 1);
    assert_eq!(line, "pool p0 is not complete: member 1 is missing, want it back, or --degraded");
    assert_eq!(rig.refused("pool check p0", 1), "pool p0: 1 fault");
    assert_eq!(faults(&rig, "p0"), ["member 1 is missing"]);
    assert!(fs::read(rig.place.path("d1")).unwrap() == before);
    // With the word for it; the member that is away is out from then on.
    fs::write(rig.place.path("raw"), vec![5; 8 << 20]).unwrap();
    rig.offline("volume create p0/w --size 64MiB --degraded");
    let line = rig.refused("pool status p0", 1);
    assert_eq!(line, "pool p0 is degraded");
    fs::rename(rig.place.path("d1"), rig.place.path("d2")).unwrap();
    fs::rename(rig.place.path("away"), rig.place.path("d1")).unwrap();
    let daemon = rig.place.serve();
    until("it has everything again", || super::pool_state(&daemon, "p0") == "ready");
    assert_eq!(daemon.end(), Some(0));
    assert!(rig.offline("pool check p0").contains("2 volumes"));
}
