//! `hawser image import`: what arrives, what is refused, and that a refusal writes nothing.

use crate::common::Place;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

const MIB: usize = 1 << 20;

/// A place with a `file:` device of `size` bytes that is full of 0xee, a `mem:` and a `null:`.
fn place(size: usize, more: &str) -> (Place, String) {
    let place = Place::new();
    fs::write(place.path("device"), vec![0xee; size]).unwrap();
    let file = place.configure(&format!(
        "[[device]]\nname = \"f\"\nuri = \"file://@/device\"\n{more}\n[[device]]\nname = \"n\"\nuri = \"null:?size=64MiB\"\n"
    ));
    (place, file.display().to_string())
}

/// Data, a hole, zeroes that are no hole, data, a hole at the end.
fn image() -> Vec<u8> {
    let mut image = vec![0; 11 * MIB];
    for (at, byte) in image.iter_mut().enumerate() {
        let in_data = at < 3 * MIB + 777 || (7 * MIB + 5..9 * MIB).contains(&at);
        *byte = if in_data { (at * 31 % 251).to_le_bytes()[0] | 1 } else { 0 };
    }
    image
}

fn write_sparse(place: &Place, name: &str, image: &[u8]) {
    let file = fs::File::create(place.path(name)).unwrap();
    file.set_len(image.len() as u64).unwrap();
    file.write_all_at(&image[..5 * MIB], 0).unwrap();
    file.write_all_at(&image[7 * MIB..9 * MIB], 7 * MIB as u64).unwrap();
}

#[test]
fn a_raw_image_arrives_whole_and_its_empty_parts_as_holes() {
    let (place, config) = place(16 * MIB, "");
    write_sparse(&place, "raw", &image());
    let done = place.ok(&["image", "import", &place.text("raw"), "f", "--config", &config, "--verify"]);
    assert_eq!(done, format!("{} imported to f: 11 MiB, verified\n", place.text("raw")));
    let device = fs::read(place.path("device")).unwrap();
    assert!(device[..11 * MIB] == image(), "the image's bytes");
    assert!(device[11 * MIB..].iter().all(|byte| *byte == 0xee), "what lies behind it is left alone");
    let blocks = fs::metadata(place.path("device")).unwrap().blocks() * 512;
    assert!(blocks <= 12 * MIB as u64, "{blocks} bytes: empty parts take space");
    assert_eq!(place.names(), ["device", "hawser.toml", "raw"], "nothing else is left");
}

#[test]
fn a_qcow2_image_arrives_like_a_raw_one() {
    let (place, config) = place(16 * MIB, "");
    write_sparse(&place, "raw", &image());
    let convert = Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .args([place.path("raw"), place.path("qcow2")])
        .status();
    let Ok(converted) = convert else {
        skips::skip("no qemu-img on PATH (Debian: qemu-utils) to make a qcow2 image with");
        return;
    };
    assert!(converted.success());
    place.ok(&["image", "import", &place.text("qcow2"), "f", "--config", &config, "--verify"]);
    assert!(fs::read(place.path("device")).unwrap()[..11 * MIB] == image());
    fs::write(place.path("cut"), &fs::read(place.path("qcow2")).unwrap()[..1000]).unwrap();
    let line = place.fails(&["image", "import", &place.text("cut"), "f", "--config", &config], 1);
    assert!(line.starts_with(&format!("{}: is damaged: qemu-img: ", place.text("cut"))), "{line}");
    assert_eq!(place.names(), ["cut", "device", "hawser.toml", "qcow2", "raw"], "no temporary file is left");
}

#[test]
fn an_image_that_ends_within_a_block_is_filled_up_with_zeroes() {
    for block_size in [512, 4096] {
        let (place, config) = place(MIB, &format!("block_size = {block_size}"));
        fs::write(place.path("raw"), vec![7; 1000]).unwrap();
        place.ok(&["image", "import", &place.text("raw"), "f", "--config", &config, "--verify"]);
        let device = fs::read(place.path("device")).unwrap();
        let block_end = 1000usize.next_multiple_of(block_size);
        assert!(device[..1000].iter().all(|byte| *byte == 7));
        assert!(device[1000..block_end].iter().all(|byte| *byte == 0));
        assert!(device[block_end..].iter().all(|byte| *byte == 0xee));
    }
}

#[test]
fn an_image_larger_than_its_device_is_refused_and_nothing_is_written() {
    let (place, config) = place(MIB, "");
    fs::write(place.path("raw"), vec![7; MIB + 1]).unwrap();
    let line = place.fails(&["image", "import", &place.text("raw"), "f", "--config", &config], 1);
    let device = place.text("device");
    assert_eq!(
        line,
        format!(
            "device f (file://{device}): has 1048576 bytes and the image 1048577, want a device of at least the image's size"
        )
    );
    assert!(fs::read(place.path("device")).unwrap().iter().all(|byte| *byte == 0xee));
}

#[test]
fn a_device_that_keeps_nothing_is_found_out_by_verifying() {
    let (place, config) = place(MIB, "");
    write_sparse(&place, "raw", &image());
    place.ok(&["image", "import", &place.text("raw"), "n", "--config", &config]);
    let line = place.fails(&["image", "import", &place.text("raw"), "n", "--config", &config, "--verify"], 1);
    assert!(line.ends_with("differs from the image at byte 0"), "{line}");
}

#[test]
fn a_member_of_a_pool_is_not_written_over() {
    let (place, config) = place(128 * MIB, "");
    fs::write(place.path("device"), vec![0; 128 * MIB]).unwrap();
    fs::write(place.path("raw"), vec![7; MIB]).unwrap();
    let raw = place.text("raw");
    let import = vec!["image", "import", &raw, "f", "--config", &config];
    place.ok(&["pool", "create", "p0", "--raid", "linear", "f", "--config", &config]);
    let before = fs::read(place.path("device")).unwrap();
    let line = place.fails(&import, 1);
    let want = format!(
        "device f (file://{}) is a member of pool p0, want one of its volumes, or --force",
        place.text("device")
    );
    assert_eq!(line, want);
    let daemon = place.serve();
    crate::common::until("the pool is open", || daemon.status()["pools"][0]["state"] == "ready");
    let line = place.fails(&import, 1);
    assert!(line.contains(" is pool p0's in the daemon at "), "{line}");
    assert_eq!(daemon.end(), Some(0));
    place.ok(&["pool", "check", "p0", "--config", &config]);
    assert!(before[32 * MIB..] == fs::read(place.path("device")).unwrap()[32 * MIB..], "no data");
    place.ok(&[import, vec!["--force"]].concat());
}

#[test]
fn mistakes_are_one_line() {
    let (place, config) = place(MIB, "read_only = true");
    fs::write(place.path("raw"), vec![7; 512]).unwrap();
    fs::write(place.path("empty"), "").unwrap();
    let (raw, empty) = (place.text("raw"), place.text("empty"));
    let none = place.text("none");
    for (args, code, want) in [
        ([&raw, "x"], 2, "\"x\" is no [[device]], want one of f or n"),
        ([&none, "f"], 1, "none: cannot be opened: No such file"),
        ([&empty, "f"], 1, "empty: is empty, want a raw or qcow2 image"),
        ([&raw, "f"], 1, "is read-only, want a device that can be written"),
    ] {
        let line = place.fails(&["image", "import", args[0], args[1], "--config", &config], code);
        assert!(line.contains(want), "{line}");
    }
    let line = place.fails(&["image", "import", &raw, "f", "--config", &none], 2);
    assert!(line.contains("none: cannot be read"), "{line}");
}
