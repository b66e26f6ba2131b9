//! Pools over targets that several hosts reach: one of them writes, whatever the others try, and whoever dies.

use crate::common::{Place, Serving, until};
use crate::frontend::{DATA, Guest, T_FLUSH, T_IN, T_OUT, Wish};
use std::fs;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// A target with two files as namespaces.
pub(crate) fn storage() -> (Place, Serving, String) {
    let storage = Place::new();
    let mut text = String::new();
    let mut namespaces = String::new();
    for index in 0..2 {
        fs::File::create(storage.path(&format!("store{index}"))).unwrap().set_len(256 * MIB).unwrap();
        text += &format!("[[device]]\nname = \"f{index}\"\nuri = \"file://@/store{index}\"\n");
        namespaces += &format!("[[subsystem.namespace]]\nnsid = {}\ndevice = \"f{index}\"\n", index + 1);
    }
    text += "[[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:0\"]\n";
    storage.configure(&(text + &namespaces));
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    (storage, target, listen)
}

/// A host of a pool on these namespaces.
pub(crate) fn host(listen: &str, more: &str) -> Place {
    let host = Place::new();
    let device = |nsid| {
        format!(
            "[[device]]\nname = \"n{nsid}\"\nuri = \"nvme+{listen}/nqn.2026-11.io.hawser:t?nsid={nsid}\"\nreconnect_delay = 1\n"
        )
    };
    let disk = "[[disk]]\nname = \"v\"\nvolume = \"p0/v\"\nsocket = \"@/v.sock\"\n";
    host.configure(&format!("{}{}{disk}{more}", device(1), device(2)));
    host
}

pub(crate) fn config(place: &Place) -> String {
    place.text("hawser.toml")
}

/// A pool of these devices, and a volume of it.
fn make(host: &Place, raid: &str, devices: &[&str]) {
    let at = ["--config", &config(host)];
    host.ok(&[&["pool", "create", "p0", "--raid", raid], devices, &at].concat());
    host.ok(&[&["volume", "create", "p0/v", "--size", "1GiB"], &at[..]].concat());
}

/// A host that has a mirror on both namespaces.
fn first(listen: &str) -> (Place, Serving) {
    let one = host(listen, "");
    make(&one, "raid1", &["n1", "n2"]);
    let first = one.serve();
    until("the first has it", || first.disk("v").0 == "listening");
    (one, first)
}

/// One that takes a pool from whoever has it.
fn taker(listen: &str) -> (Place, Serving) {
    let two = host(listen, "[[pool]]\nname = \"p0\"\nassume_exclusive = true\n");
    let second = two.serve();
    until("the second has it", || second.disk("v").0 == "listening");
    (two, second)
}

pub(crate) fn wish() -> Wish {
    Wish { inflight: true, ..Wish::default() }
}

/// Whether 4 KiB were written. Patient: a write of unknown outcome ends when its target cannot carry it out any more.
fn write(guest: &mut Guest, at: u64, fill: u8) -> bool {
    let parts = guest.plain(T_OUT, at / 512, &[fill; 4096], 0, DATA);
    guest.submit(0, &parts);
    until("the write ends", || guest.rings[0].used_idx(&guest.ram) != guest.rings[0].last_used);
    guest.rings[0].wait_used(&guest.ram);
    guest.ram.read(DATA + 16, 1) == [0]
}

fn holds(guest: &mut Guest, at: u64, fill: u8) {
    let (status, data) = guest.request(T_IN, at / 512, &[], 4096);
    assert_eq!(status, 0, "read at {at}");
    assert!(data.iter().all(|byte| *byte == fill), "at {at}: {:?} instead of {fill}", &data[..16]);
}

fn trouble(daemon: &Serving) -> String {
    daemon.status()["pools"][0]["troubles"][0].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_pool_is_one_host_s_until_that_lets_it_go_or_is_said_to_be_gone() {
    let (_storage, target, listen) = storage();
    let (one, first) = first(&listen);
    let mut guest = Guest::connect(&one.path("v.sock"), &wish());
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 1));
    }
    // Nobody else has it meanwhile: by name.
    let two = host(&listen, "");
    let second = two.serve();
    let want = format!("is reserved by host {}", one.host);
    until("the second is refused", || trouble(&second).contains(&want));
    assert_eq!(second.disk("v").0, "waiting");
    assert_eq!(second.end(), Some(0));
    let line = two.fails(&["volume", "create", "p0/w", "--config", &config(&two), "--size", "1GiB"], 1);
    assert!(line.contains(&want), "{line}");
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 2));
    }
    drop(guest);
    // It lets go in order: then another has it without a word.
    assert_eq!(first.end(), Some(0));
    let second = two.serve();
    until("the second has it", || second.disk("v").0 == "listening");
    let mut guest = Guest::connect(&two.path("v.sock"), &wish());
    (0..20).for_each(|index| holds(&mut guest, index * 3 * MIB, 2));
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 3));
    }
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, 0);
    drop(guest);
    // It dies: another has it only when somebody says so.
    second.kill();
    let first = one.serve();
    let want = format!("is reserved by host {}", two.host);
    until("the first is refused", || trouble(&first).contains(&want));
    assert_eq!(first.end(), Some(0));
    let list = one.ok(&["volume", "list", "--config", &config(&one), "--json"]);
    assert!(list.contains("\"name\": \"v\""), "who only looks may: {list}");
    drop(target);
}

#[test]
fn who_takes_a_pool_from_a_host_that_lives_after_all_gets_it_whole() {
    let (_storage, target, listen) = storage();
    let (one, first) = first(&listen);
    let mut guest = Guest::connect(&one.path("v.sock"), &wish());
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 1));
    }
    assert_eq!(guest.request(T_FLUSH, 0, &[], 0).0, 0);
    // Somebody is wrong about the first.
    let (two, second) = taker(&listen);
    let mut other = Guest::connect(&two.path("v.sock"), &wish());
    (0..20).for_each(|index| holds(&mut other, index * 3 * MIB, 1));
    for index in 0..20 {
        assert!(write(&mut other, index * 3 * MIB, 2));
    }
    // Whatever the first still tries, it fails, and nothing of it lands.
    let mut failed = 0;
    for index in 0..40 {
        failed += u32::from(!write(&mut guest, index * 3 * MIB, 9));
    }
    assert_eq!(failed, 40, "{}", one.log());
    until("the first knows that it has lost it", || first.status()["pools"][0]["state"] == "failed");
    (0..20).for_each(|index| holds(&mut other, index * 3 * MIB, 2));
    assert_eq!(other.request(T_FLUSH, 0, &[], 0).0, 0);
    drop(guest);
    first.kill();
    drop(other);
    assert_eq!(second.end(), Some(0));
    let check = two.ok(&["pool", "check", "p0", "--config", &config(&two)]);
    assert!(check.contains("20 mapped extents"), "{check}");
    assert_eq!(target.end(), Some(0));
}

#[test]
fn a_volume_is_a_namespace_for_other_hosts() {
    let storage = Place::new();
    for index in 0..2 {
        fs::File::create(storage.path(&format!("d{index}"))).unwrap().set_len(256 * MIB).unwrap();
    }
    let text = "[[device]]\nname = \"d0\"\nuri = \"file://@/d0\"\n[[device]]\nname = \"d1\"\nuri = \"file://@/d1\"\n\
                [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\
                [[subsystem.namespace]]\nnsid = 1\nvolume = \"p0/v\"\n";
    storage.configure(text);
    make(&storage, "raid1", &["d0", "d1"]);
    let target = storage.serve();
    let listen = target.status()["subsystems"][0]["listen"][0].as_str().unwrap().to_owned();
    assert_eq!(target.status()["subsystems"][0]["namespaces"][0]["volume"], "p0/v");
    let place = Place::new();
    place.configure(&format!(
        "[[device]]\nname = \"r\"\nuri = \"nvme+{listen}/nqn.2026-11.io.hawser:t\"\n\
         [[disk]]\nname = \"v\"\ndevice = \"r\"\nsocket = \"@/v.sock\"\n"
    ));
    let daemon = place.serve();
    until("it is reached", || daemon.disk("v").0 == "listening");
    let mut guest = Guest::connect(&place.path("v.sock"), &wish());
    for index in 0..10 {
        assert!(write(&mut guest, index * 7 * MIB, 6));
        holds(&mut guest, index * 7 * MIB, 6);
    }
    let line = storage.fails(&["volume", "delete", "p0/v"], 1);
    assert_eq!(line, "volume p0/v is subsystem nqn.2026-11.io.hawser:t's, want that removed first");
    drop(guest);
    assert_eq!((daemon.end(), target.end()), (Some(0), Some(0)));
}

/// A target with one file as its namespace, at a port that stays the same.
fn one_of_several(index: u16, port: u16) -> (Place, Serving) {
    let storage = Place::new();
    fs::File::create(storage.path("store")).unwrap().set_len(256 * MIB).unwrap();
    storage.configure(&format!(
        "[[device]]\nname = \"f\"\nuri = \"file://@/store\"\n\
         [[subsystem]]\nnqn = \"nqn.2026-11.io.hawser:t{index}\"\nlisten = [\"tcp://127.0.0.1:{port}\"]\n\
         [[subsystem.namespace]]\nnsid = 1\ndevice = \"f\"\n"
    ));
    let target = storage.serve();
    (storage, target)
}

/// What was lost is soon taken for quiet.
const QUICK: &str = "keep_alive_tmo = 1\nquiesce_tmo = 1\n";

/// So many of them, and what a host says of them: devices `n0`…, which are soon given up.
fn several(count: u16, timers: &str) -> (Vec<(Place, Serving)>, String) {
    // All at once, so that no port is had twice.
    let listeners: Vec<_> = (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports = listeners.iter().map(|listener| listener.local_addr().unwrap().port());
    let ports: Vec<u16> = ports.collect();
    drop(listeners);
    let device = |(index, port): (u16, &u16)| {
        format!(
            "[[device]]\nname = \"n{index}\"\nuri = \"nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:t{index}\"\n\
             reconnect_delay = 1\nfast_io_fail_tmo = 1\n{timers}"
        )
    };
    let devices = (0..).zip(&ports).map(device).collect();
    ((0..).zip(ports).map(|(index, port)| one_of_several(index, port)).collect(), devices)
}

#[test]
fn a_target_that_dies_is_done_without_until_it_is_back_or_a_spare_has_its_place() {
    let (mut targets, devices) = several(3, QUICK);
    let host = Place::new();
    let disk = "[[disk]]\nname = \"v\"\nvolume = \"p0/v\"\nsocket = \"@/v.sock\"\n";
    host.configure(&format!("{devices}{disk}[[pool]]\nname = \"p0\"\nspare_delay = 3\n"));
    make(&host, "raid1", &["n0", "n1"]);
    let daemon = host.serve();
    until("it is there", || daemon.disk("v").0 == "listening");
    let mut guest = Guest::connect(&host.path("v.sock"), &wish());
    let state = |want: &str| {
        let pool = daemon.status()["pools"][0].clone();
        pool["state"] == want
    };
    let member = |place: usize, key: &str| daemon.status()["pools"][0]["members"][place][key].clone();
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 1));
    }
    // One dies under writes: its guest sees a pause.
    let (storage, target) = targets.pop().unwrap();
    let spare = (storage, target);
    let (storage, target) = targets.pop().unwrap();
    target.kill();
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 2), "{}", host.log());
    }
    until("it is out", || state("degraded"));
    let target = storage.serve();
    until("it has everything again", || state("ready"));
    for index in 0..20 {
        holds(&mut guest, index * 3 * MIB, 2);
    }
    // It dies for good, and a spare takes its place.
    host.ok(&["pool", "add-spare", "p0", "n2"]);
    target.kill();
    for index in 0..20 {
        assert!(write(&mut guest, index * 3 * MIB, 3));
    }
    until("the spare has its place", || member(1, "device") == "n2" && state("ready"));
    // Now the other one: the spare has it all.
    let (_first, target) = targets.pop().unwrap();
    target.kill();
    for index in 0..20 {
        holds(&mut guest, index * 3 * MIB, 3);
    }
    assert!(write(&mut guest, 0, 4));
    drop(guest);
    assert_eq!(daemon.end(), Some(0));
    drop(spare);
}

/// A target was killed with a write in it, and the mirror waited for as long as that could have been carried out. Here that is two minutes.
#[test]
fn a_write_that_a_target_dies_with_is_not_waited_for_where_another_has_it() {
    for raid in ["raid1", "raid5"] {
        let (mut targets, devices) = several(3, "keep_alive_tmo = 30\nquiesce_tmo = 60\n");
        let host = Place::new();
        let disk = "[[disk]]\nname = \"v\"\nvolume = \"p0/v\"\nsocket = \"@/v.sock\"\n";
        host.configure(&format!("{devices}{disk}"));
        make(&host, raid, &["n0", "n1", "n2"]);
        let daemon = host.serve();
        until("it is there", || daemon.disk("v").0 == "listening");
        let mut guest = Guest::connect(&host.path("v.sock"), &wish());
        let state = |want: &str| daemon.status()["pools"][0]["state"] == want;
        for index in 0..20 {
            assert!(write(&mut guest, index * 4096, 1));
        }
        let (storage, target) = targets.pop().unwrap();
        // What comes to it from now on stays in its sockets.
        target.stop();
        let parts = guest.plain(T_OUT, 0, &vec![2; 20 * 4096], 0, DATA);
        guest.submit(0, &parts);
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(guest.rings[0].used_idx(&guest.ram), guest.rings[0].last_used, "it is under way");
        let since = Instant::now();
        target.kill();
        guest.rings[0].wait_used(&guest.ram);
        assert!(since.elapsed() < Duration::from_secs(20), "{raid}: {:?} {}", since.elapsed(), host.log());
        assert_eq!(guest.ram.read(DATA + 16, 1), [0], "the guest sees no error");
        until("it is out", || state("degraded"));
        for index in 0..20 {
            holds(&mut guest, index * 4096, 2);
            assert!(write(&mut guest, index * 4096, 3));
        }
        // It knows that nothing of before is left.
        let target = storage.serve();
        until("it has everything again", || state("ready"));
        targets.remove(0).1.kill();
        for index in 0..20 {
            holds(&mut guest, index * 4096, 3);
        }
        drop(guest);
        assert_eq!(daemon.end(), Some(0));
        drop(target);
    }
}

/// A target that keeps no reservations over its restart, or has lost them, lets everybody write: a host that has a pool there takes them again.
#[test]
fn a_reservation_that_a_target_has_lost_is_taken_again() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (storage, target) = one_of_several(0, port);
    let one = Place::new();
    let text = format!(
        "[[device]]\nname = \"n\"\nuri = \"nvme+tcp://127.0.0.1:{port}/nqn.2026-11.io.hawser:t0?nsid=1\"\nreconnect_delay = 1\n\
         [[disk]]\nname = \"v\"\nvolume = \"p0/v\"\nsocket = \"@/v.sock\"\n"
    );
    one.configure(&text);
    make(&one, "linear", &["n"]);
    let daemon = one.serve();
    until("it is there", || daemon.disk("v").0 == "listening");
    let mut guest = Guest::connect(&one.path("v.sock"), &wish());
    assert!(write(&mut guest, 0, 1));
    let holder = || {
        let (_, _, body) = daemon.http("GET", "/v1/devices/n/reservation", "");
        let status: serde_json::Value = serde_json::from_str(&body).unwrap();
        let all = status["registrants"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|it| it["holds"] == true).map(|it| it["hostid"].as_str().unwrap().to_owned())
    };
    assert_eq!(holder().as_ref(), Some(&one.host));
    target.kill();
    fs::remove_dir_all(storage.path("lib/reservations")).unwrap();
    let target = storage.serve();
    assert!(write(&mut guest, MIB, 2), "{}", one.log());
    until("it is ours again", || holder().as_ref() == Some(&one.host));
    // It says so when it has it.
    until("it is told", || {
        one.log().contains("pool p0: device n: its target had lost the reservation: taken again")
    });
    // Nobody else has it by chance.
    let two = Place::new();
    two.configure(&text);
    let second = two.serve();
    let want = format!("is reserved by host {}", one.host);
    until("the second is refused", || trouble(&second).contains(&want));
    assert_eq!(second.end(), Some(0));
    holds(&mut guest, 0, 1);
    holds(&mut guest, MIB, 2);
    drop(guest);
    assert_eq!((daemon.end(), target.end()), (Some(0), Some(0)));
}

/// A host that had the pool while it could not reach the target does not take the reservation back, whether it writes or not.
#[test]
fn a_reservation_that_another_host_has_taken_is_not_taken_back() {
    let (_storage, target, listen) = storage();
    let (one, first) = first(&listen);
    first.stop();
    let (two, second) = taker(&listen);
    first.signal("CONT");
    until("the first knows", || first.status()["pools"][0]["state"] == "failed");
    let mut guest = Guest::connect(&two.path("v.sock"), &wish());
    assert!(write(&mut guest, 0, 7));
    holds(&mut guest, 0, 7);
    let (_, _, body) = second.http("GET", "/v1/devices/n1/reservation", "");
    assert!(body.contains(&two.host) && !body.contains(&one.host), "{body}");
    drop(guest);
    first.kill();
    assert_eq!((second.end(), target.end()), (Some(0), Some(0)));
}

/// A member is back that was away when another host took the pool. The host that had lost it gave it to its own pool, as `assume_exclusive` lets it, and so took that
/// member from the host that has the pool, which lost it in turn.
#[test]
fn who_has_lost_a_pool_takes_no_member_that_comes_back() {
    let (mut targets, devices) = several(3, QUICK);
    let more = "[[disk]]\nname = \"v\"\nvolume = \"p0/v\"\nsocket = \"@/v.sock\"\n\
                [[pool]]\nname = \"p0\"\nassume_exclusive = true\nassemble_timeout = 1\n";
    let (one, two) = (Place::new(), Place::new());
    for host in [&one, &two] {
        host.configure(&format!("{devices}{more}"));
    }
    make(&one, "raid1", &["n0", "n1"]);
    let (storage, target) = targets.remove(1);
    target.kill();
    let first = one.serve();
    until("the first has it", || first.disk("v").0 == "listening");
    let second = two.serve();
    until("the second has it", || second.disk("v").0 == "listening");
    until("the first knows", || first.status()["pools"][0]["state"] == "failed");
    first.stop();
    let target = storage.serve();
    until("the second is whole", || second.status()["pools"][0]["state"] == "ready");
    let mut guest = Guest::connect(&two.path("v.sock"), &wish());
    assert!(write(&mut guest, 0, 7));
    first.signal("CONT");
    let state_of = |daemon: &Serving| daemon.http("GET", "/v1/devices/n1", "").2;
    until("the first reaches it", || state_of(&first).contains("\"ready\""));
    // It would be tried within a few seconds.
    std::thread::sleep(std::time::Duration::from_secs(8));
    let (_, _, body) = second.http("GET", "/v1/devices/n1/reservation", "");
    assert!(body.contains(&two.host) && !body.contains(&one.host), "{body}");
    assert_eq!(second.status()["pools"][0]["state"], "ready", "{}", two.log());
    // Nor when it is asked to: not that member, and not a spare that the other has taken.
    two.ok(&["pool", "add-spare", "p0", "n2"]);
    for device in ["n1", "n2"] {
        let spare = one.fails(&["pool", "add-spare", "p0", device, "--force"], 1);
        let (_, _, body) = second.http("GET", &format!("/v1/devices/{device}/reservation"), "");
        assert!(body.contains(&two.host) && !body.contains(&one.host), "{device}: {body}");
        assert!(spare.contains("pool p0: nothing is read or written any more"), "{device}: {spare}");
    }
    for index in 1..9 {
        assert!(write(&mut guest, index * MIB, 8));
        holds(&mut guest, index * MIB, 8);
    }
    drop(guest);
    first.kill();
    assert_eq!((second.end(), target.end()), (Some(0), Some(0)));
    for (_, target) in targets {
        assert_eq!(target.end(), Some(0));
    }
}

/// A pool without redundancy waits for its member as long as that takes. Whoever asks it for something waits too, but not everybody, and
/// all others have their answers.
#[test]
fn a_pool_that_hangs_keeps_only_some_of_those_who_ask() {
    let (_storage, target, listen) = storage();
    let one = host(&listen, "");
    make(&one, "linear", &["n1"]);
    let daemon = one.serve();
    until("it is there", || daemon.disk("v").0 == "listening");
    target.stop();
    let create = |number: usize| {
        let body = format!("{{\"name\": \"w{number}\", \"size_bytes\": 1048576}}");
        let (code, _, body) = daemon.http("POST", "/v1/pools/p0/volumes", &body);
        (code, body)
    };
    std::thread::scope(|scope| {
        let mut asked: Vec<_> = (0..9).map(|number| scope.spawn(move || create(number))).collect();
        until("one of them is refused", || asked.iter().any(|it| it.is_finished()));
        let refused = asked.iter().position(|it| it.is_finished()).unwrap();
        let (code, body) = asked.remove(refused).join().unwrap();
        assert!(code == 409 && body.contains("pool p0 is busy: 8 others wait for it"), "{code}: {body}");
        assert_eq!(daemon.status()["pools"][0]["name"], "p0");
        assert!(asked.iter().all(|it| !it.is_finished()), "they wait");
        target.signal("CONT");
        for waiting in asked {
            let (code, body) = waiting.join().unwrap();
            assert_eq!(code, 201, "{body}");
        }
    });
    assert_eq!((daemon.end(), target.end()), (Some(0), Some(0)));
}
