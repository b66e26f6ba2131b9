//! Every mistake in a configuration gives one line that names file, place, key, value and what would be right.

use hawser_config::Config;
use std::path::PathBuf;

fn error_of(files: &[(&str, &str)]) -> String {
    let files: Vec<(PathBuf, String)> =
        files.iter().map(|(path, text)| (PathBuf::from(path), (*text).to_owned())).collect();
    match Config::parse(&files) {
        Ok(_) => "no error".to_owned(),
        Err(error) => error.to_string(),
    }
}

const DEVICE: &str = "[[device]]\nname = \"n0\"\nuri = \"mem:?size=1GiB\"\n";

/// One file `h.toml`; the device n0 stands on lines 1 to 3.
fn with_device(rest: &str) -> String {
    error_of(&[("h.toml", &format!("{DEVICE}{rest}"))])
}

fn disk(keys: &str) -> String {
    with_device(&format!("[[disk]]\nname = \"d\"\ndevice = \"n0\"\nsocket = \"/run/d.sock\"\n{keys}"))
}

#[test]
fn a_whole_file_is_understood() {
    let text = r#"
[daemon]
api = "/run/hawser/api.sock"
reactors = [0, 1]
poll_us = 0
drain_timeout = 3
state_dir = "/var/lib/hawser"
[host]
nqn = "nqn.2014-08.org.nvmexpress:uuid:0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
id = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
[[device]]
name = "n0"
uri = ["mem:?size=4GiB"]
block_size = 4096
[[disk]]
name = "vm1-root"
device = "n0"
socket = "/run/hawser/vm1-root.sock"
socket_mode = "0660"
socket_user = "libvirt-qemu"
socket_group = "64055"
serial = "vm1"
queues = 2
read_only = true
[[subsystem]]
nqn = "nqn.2026-11.io.hawser:n0"
listen = ["tcp://127.0.0.1:0", "tcp://[::1]:4420"]
allowed_hosts = ["nqn.2026-11.io.hawser:host"]
[[subsystem.namespace]]
nsid = 1
device = "n0"
uuid = "0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff"
"#;
    let config = Config::parse(&[(PathBuf::from("h.toml"), text.to_owned())]).unwrap();
    assert_eq!(config.daemon.reactors, Some(vec![0, 1]));
    let disk = &config.disks[0].value;
    assert_eq!((disk.queues, disk.read_only, disk.serial().as_str()), (2, true, "vm1"));
    assert_eq!(config.subsystems[0].value.namespaces[0].nsid, 1);
    assert_eq!(config.devices[0].value.uri.0, ["mem:?size=4GiB"]);
}

#[test]
fn defaults_are_the_documented_ones() {
    let text = format!(
        "{DEVICE}[[disk]]\nname = \"a-name-of-more-than-20-bytes\"\ndevice = \"n0\"\nsocket = \"/d\"\n"
    );
    let config = Config::parse(&[(PathBuf::from("h.toml"), text)]).unwrap();
    assert_eq!(config.daemon.api.to_string(), "/run/hawser/api.sock");
    assert_eq!(config.daemon.api_mode.to_string(), "0600");
    assert_eq!((config.daemon.poll_us, config.daemon.drain_timeout), (100, 10));
    assert!(config.daemon.reactors.is_none());
    let disk = &config.disks[0].value;
    assert_eq!((disk.queues, disk.read_only, disk.serial().as_str()), (1, false, "a-name-of-more-than-"));
}

#[test]
fn mistakes_in_one_file_are_named_line_by_line() {
    let cases = [
        (
            with_device("[daemon]\npol_us = 3\n"),
            "h.toml:5:1: [daemon] pol_us: unknown field `pol_us`, expected one of `api`, `api_mode`, `reactors`, `poll_us`, `drain_timeout`, `state_dir`, `user`, `group`, `sandbox`, `allow_paths`",
        ),
        (
            with_device("[deamon]\n"),
            "h.toml:4:2: [deamon]: unknown field `deamon`, expected one of `daemon`, `host`, `discovery`, `device`, `disk`, `subsystem`, `pool`",
        ),
        (
            with_device("[daemon]\nreactors = []\n"),
            "h.toml:5:12: [daemon] reactors: [] is none, want CPU numbers such as [0], or no such key",
        ),
        (
            with_device("[daemon]\nreactors = [1, 0, 1]\n"),
            "h.toml:5:12: [daemon] reactors: 1 is there twice, want another CPU for each reactor",
        ),
        (
            with_device("[daemon]\npoll_us = -1\n"),
            "h.toml:5:11: [daemon] poll_us: invalid value: integer `-1`, expected u32",
        ),
        (
            with_device("[daemon]\npoll_us = 1000001\n"),
            "h.toml:5:11: [daemon] poll_us: 1000001 is too long, want 0 to 1000000 (microseconds)",
        ),
        (
            with_device("[daemon]\ndrain_timeout = \"10s\"\n"),
            "h.toml:5:17: [daemon] drain_timeout: invalid type: string \"10s\", expected u32",
        ),
        (
            with_device("[daemon]\ndrain_timeout = 3601\n"),
            "h.toml:5:17: [daemon] drain_timeout: 3601 is too long, want 0 to 3600 (seconds)",
        ),
        (
            with_device("[host]\nnqn = \"iqn.x\"\n"),
            "h.toml:5:7: [host] nqn: \"iqn.x\" is no NQN, want up to 223 bytes like \"nqn.2026-11.io.hawser:n0\"",
        ),
        (
            with_device("[host]\nid = \"7\"\n"),
            "h.toml:5:6: [host] id: \"7\" is no UUID, want a form like \"0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0ff\"",
        ),
        (
            with_device("[[device]]\nname = \"n0\"\nuri = \"null:?size=1GiB\"\n"),
            "h.toml:5:8: [[device]] name: \"n0\" is in h.toml:1 too, want another",
        ),
        (
            with_device("[[device]]\nname = \"a/b\"\nuri = \"null:?size=1GiB\"\n"),
            "h.toml:5:8: [[device]] name: \"a/b\" is no name, want up to 64 letters, digits, '-', '_' and '.', beginning with a letter or digit",
        ),
        (with_device("[[device]]\nname = \"n1\"\n"), "h.toml:4:1: [[device]]: missing field `uri`"),
        (
            with_device("[[device]]\nname = \"n1\"\nuri = []\n"),
            "h.toml:6:7: [[device]] uri: [] names no path, want at least one URI",
        ),
        (
            with_device("[[device]]\nname = \"n1\"\nuri = 4\n"),
            "h.toml:6:7: [[device]] uri: invalid type: integer `4`, expected a URI, or an array of URIs",
        ),
        (
            with_device("[[device]]\nname = \"n1\"\nuri = \"null:?size=1GiB\"\nblock_size = 1000\n"),
            "h.toml:7:14: [[device]] block_size: 1000 is no block size, want 512 or 4096",
        ),
        (
            disk("serial = \"a-serial-of-21-bytes-\"\n"),
            "h.toml:8:10: [[disk]] serial: \"a-serial-of-21-bytes-\" has 21 bytes, want at most 20",
        ),
        (
            disk("socket_mode = \"rw\"\n"),
            "h.toml:8:15: [[disk]] socket_mode: \"rw\" is no mode, want octal digits such as \"0660\"",
        ),
        (disk("queues = 0\n"), "h.toml:8:10: [[disk]] queues: 0 is out of range, want 1 to 64"),
        (
            disk("queues = 70000\n"),
            "h.toml:8:10: [[disk]] queues: invalid value: integer `70000`, expected u16",
        ),
        (
            disk("[[disk]]\nname = \"d\"\ndevice = \"n0\"\nsocket = \"/run/e.sock\"\n"),
            "h.toml:9:8: [[disk]] name: \"d\" is in h.toml:4 too, want another",
        ),
        (
            disk("[[disk]]\nname = \"e\"\ndevice = \"n0\"\nsocket = \"/run/d.sock\"\n"),
            "h.toml:11:10: [[disk]] socket: \"/run/d.sock\" is in h.toml:4 too, want another",
        ),
        (
            disk("[[disk]]\nname = \"e\"\ndevice = \"n1\"\nsocket = \"/run/e.sock\"\n"),
            "h.toml:10:10: [[disk]] device: \"n1\" is no [[device]], want n0",
        ),
        (
            disk("[daemon]\napi = \"/run/d.sock\"\n"),
            "h.toml:7:10: [[disk]] socket: \"/run/d.sock\" is the API's own, want another path",
        ),
        (
            with_device("[[subsystem]]\nnqn = \"nqn.a\"\nlisten = [\"127.0.0.1\"]\n"),
            "h.toml:6:10: [[subsystem]] listen: \"127.0.0.1\" is no address to listen at, want \"tcp://ADDRESS:PORT\" such as \"tcp://127.0.0.1:4420\", or \"rdma://ADDRESS:PORT\"",
        ),
        (
            with_device("[[subsystem]]\nnqn = \"nqn.a\"\nlisten = []\n"),
            "h.toml:6:10: [[subsystem]] listen: [] is nowhere, want at least one address such as \"tcp://127.0.0.1:4420\"",
        ),
        (
            with_device(
                "[[subsystem]]\nnqn = \"nqn.a\"\nlisten = [\"tcp://127.0.0.1:0\"]\n[[subsystem.namespace]]\nnsid = 0\ndevice = \"n0\"\n",
            ),
            "h.toml:8:8: [[subsystem]] nsid: 0 is no namespace number, want 1 or more",
        ),
        (
            with_device(
                "[[subsystem]]\nnqn = \"nqn.a\"\nlisten = [\"tcp://127.0.0.1:0\"]\n[[subsystem.namespace]]\nnsid = 1\ndevice = \"n0\"\nana_group = 129\n",
            ),
            "h.toml:10:13: [[subsystem]] ana_group: 129 is out of range, want 1 to 128",
        ),
        (
            with_device(
                "[[subsystem]]\nnqn = \"nqn.a\"\nlisten = [\"tcp://127.0.0.1:0\"]\n[[subsystem.namespace]]\nnsid = 1\ndevice = \"x\"\n",
            ),
            "h.toml:9:10: [[subsystem]] device: \"x\" is no [[device]], want n0",
        ),
        (with_device("what\n"), "h.toml:4:5: [[device]]: key with no value, expected `=`"),
    ];
    for (found, wanted) in cases {
        assert_eq!(found, wanted);
    }
}

#[test]
fn a_long_socket_path_is_refused_with_its_length() {
    let text = format!(
        "socket_mode = \"0600\"\n[[disk]]\nname = \"e\"\ndevice = \"n0\"\nsocket = \"/{}\"\n",
        "x".repeat(107)
    );
    let error = disk(&text);
    assert!(error.ends_with("has 108 bytes, want at most 107 (the system's limit for sockets)"), "{error}");
}

#[test]
fn clashes_between_files_name_both() {
    let more = "[[device]]\nname = \"n0\"\nuri = \"null:?size=1GiB\"\n";
    assert_eq!(
        error_of(&[("h.toml", DEVICE), ("conf.d/a.toml", more)]),
        "conf.d/a.toml:2:8: [[device]] name: \"n0\" is in h.toml:1 too, want another"
    );
    assert_eq!(
        error_of(&[("h.toml", "[daemon]\n"), ("conf.d/a.toml", "\n[daemon]\n")]),
        "conf.d/a.toml:2:1: [daemon]: is in h.toml too, want [daemon] in one file only"
    );
}

#[test]
fn files_in_conf_d_are_read_in_order_and_others_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let main = folder.path().join("h.toml");
    std::fs::write(&main, DEVICE).unwrap();
    let conf_d = folder.path().join("conf.d");
    std::fs::create_dir(&conf_d).unwrap();
    let disk = |name: &str| {
        format!(
            "[[disk]]\nname = \"{name}\"\ndevice = \"n0\"\nsocket = \"/run/{name}.sock\"\nshared = true\n"
        )
    };
    std::fs::write(conf_d.join("disk-b.toml"), disk("b")).unwrap();
    std::fs::write(conf_d.join("disk-a.toml"), disk("a")).unwrap();
    std::fs::write(conf_d.join(".disk-c.toml"), "half-written").unwrap();
    std::fs::write(conf_d.join("disk-d.toml~"), "half-written").unwrap();
    let config = Config::load(&main).unwrap();
    let names: Vec<&str> = config.disks.iter().map(|disk| disk.value.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(config.disks[0].file(), conf_d.join("disk-a.toml"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = Config::load(&PathBuf::from("/nonexistent/h.toml")).unwrap_err().to_string();
    assert_eq!(error, "/nonexistent/h.toml: cannot be read: No such file or directory (os error 2)");
}

#[test]
fn two_disks_that_write_to_one_device_both_have_to_say_so() {
    let disk = |name: &str, keys: &str| {
        format!("[[disk]]\nname = \"{name}\"\ndevice = \"n0\"\nsocket = \"/run/{name}.sock\"\n{keys}\n")
    };
    let pair = |a: &str, b: &str| with_device(&format!("{}{}", disk("a", a), disk("b", b)));
    let want = "h.toml:11:10: [[disk]] device: \"n0\" is disk a's too, want read_only = true on one of them, or shared = \
                true on both if their VMs know how to share it";
    assert_eq!(pair("", ""), want);
    assert_eq!(pair("shared = true", ""), want);
    assert_eq!(pair("", "shared = true"), want);
    for (a, b) in [
        ("shared = true", "shared = true"),
        ("read_only = true", ""),
        ("", "read_only = true"),
        ("read_only = true", "read_only = true"),
    ] {
        assert_eq!(pair(a, b), "no error", "{a}, {b}");
    }
    let read_only = DEVICE.replace("mem:?size=1GiB\"", "file:///x\"\nread_only = true");
    let both = format!("{read_only}{}{}", disk("a", ""), disk("b", ""));
    assert_eq!(error_of(&[("h.toml", &both)]), "no error", "nobody can write to it");
}

/// One file `h.toml` with a disk whose keys follow.
fn volume_disk(keys: &str) -> String {
    with_device(&format!("[[disk]]\nname = \"d\"\nsocket = \"/run/d.sock\"\n{keys}"))
}

#[test]
fn behind_a_disk_is_a_device_or_a_volume() {
    assert_eq!(
        volume_disk("volume = \"p0/v\"\n"),
        "no error",
        "whether it is there is known when the pool is open"
    );
    for (found, wanted) in [
        (volume_disk(""), "h.toml:4:1: [[disk]] device: is missing, want it, or volume = \"POOL/VOLUME\""),
        (
            volume_disk("volume = \"p0/v\"\ndevice = \"n0\"\n"),
            "h.toml:7:10: [[disk]] volume: \"p0/v\" is there beside device \"n0\", want one of them",
        ),
        (
            volume_disk("volume = \"p0\"\n"),
            "h.toml:7:10: [[disk]] volume: \"p0\" is no volume, want POOL/VOLUME, both up to 64 letters, digits, '-', '_' and '.'",
        ),
        (
            volume_disk("volume = \"p0/v\"\n[[disk]]\nname = \"e\"\nsocket = \"/e\"\nvolume = \"p0/v\"\n"),
            "h.toml:11:10: [[disk]] volume: \"p0/v\" is disk d's too, want read_only = true on one of them, or shared = true \
             on both if their VMs know how to share it",
        ),
        (
            with_device(
                "[[subsystem]]\nnqn = \"nqn.a\"\nlisten = [\"tcp://127.0.0.1:0\"]\n[[subsystem.namespace]]\nnsid = 1\n",
            ),
            "h.toml:4:1: [[subsystem]] device: is missing, want it, or volume = \"POOL/VOLUME\"",
        ),
    ] {
        assert_eq!(found, wanted);
    }
}

#[test]
fn a_pools_policies_are_checked_and_have_defaults() {
    let pool = |keys: &str| with_device(&format!("[[pool]]\nname = \"p0\"\n{keys}"));
    for (found, wanted) in [
        (
            pool("no_space = \"wait\"\nsync_rate = \"0\"\nlow_water = 0\nassume_exclusive = true\n"),
            "no error",
        ),
        (
            pool("no_space = \"never\"\n"),
            "h.toml:6:12: [[pool]] no_space: unknown variant `never`, expected `error` or `wait`",
        ),
        (
            pool("low_water = 101\n"),
            "h.toml:6:13: [[pool]] low_water: 101 is out of range, want 0 to 100 (percent)",
        ),
        (
            pool("sync_rate = \"fast\"\n"),
            "h.toml:6:13: [[pool]] sync_rate: \"fast\" is no size, want a number and its unit (KiB, MiB, GiB, TiB), such as 4GiB",
        ),
        (
            pool("spare_delay = 86401\n"),
            "h.toml:6:15: [[pool]] spare_delay: 86401 is too long, want 0 to 86400 (seconds)",
        ),
        (
            pool("assemble_timeout = 3601\n"),
            "h.toml:6:20: [[pool]] assemble_timeout: 3601 is too long, want 0 to 3600 (seconds)",
        ),
        (
            pool("raid = \"raid1\"\n"),
            "h.toml:6:1: [[pool]] raid: unknown field `raid`, expected one of `name`, `no_space`, `discard`, `low_water`, `sync_rate`, `member_timeout`, `spare_delay`, `assemble_timeout`, `assume_exclusive`, `accept_loss`",
        ),
        (
            pool("[[pool]]\nname = \"p0\"\n"),
            "h.toml:7:8: [[pool]] name: \"p0\" is in h.toml:4 too, want another",
        ),
    ] {
        assert_eq!(found, wanted);
    }
    let text = "[[pool]]\nname = \"p0\"\nsync_rate = \"1GiB\"\n".to_owned();
    let config = Config::parse(&[(PathBuf::from("h.toml"), text)]).unwrap();
    let (p0, p1) = (config.pool(&"p0".parse().unwrap()), config.pool(&"p1".parse().unwrap()));
    assert_eq!((p0.sync_rate.0, p1.sync_rate.0), (1 << 30, 200 << 20));
    assert_eq!((p1.low_water, p1.spare_delay, p1.assemble_timeout), (10, 60, 30));
    assert!(!p1.assume_exclusive && p1.no_space == hawser_config::NoSpace::Error);
}
