//! Linux md reads what a pool has written: data and parity stand where md puts them, for every level.
//!
//! ```text
//!   here                                          guest
//!   pool create, image import ─► member files ─► SCSI disks ─► md on their data areas ─► out.raw ─► compared here
//! ```
//!
//! Each word of the volume says which one it is, so that an extent is recognised wherever it is: the order in which a volume gets its extents
//! is the pool's own affair. Where a data area begins is read from the superblock, as `docs/on-disk-format.md` describes it. md is
//! set up through sysfs, without metadata: it is told level, strip, offset and size, and writes nothing of its own. (With external
//! metadata RAID 5 and 6 wait for a program that keeps it.) Where there is parity md reads everything again, with as many members
//! left out as may be lost: what it computes from our parity is the data too.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::LIBRARY;
use crate::Result;
use crate::daemon::Daemon;
use crate::json::Json;
use crate::lab::Lab;
use crate::pools::{POOL, empty_file};
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Of the first member's file: metadata and a little data.
const MEMBER_BYTES: u64 = 40 * MIB;
/// Of each pass in the guest's output: more than any array holds.
const OUT_BYTES: u64 = 140 * MIB;
const LEVELS: [&str; 6] = ["linear", "raid0", "raid1", "raid10", "raid5", "raid6"];
const MODULES: &str = "virtio_scsi sd_mod md_mod linear raid0 raid1 raid10 raid456";
const STRIPS: [u64; 2] = [4 << 10, 64 << 10];
const MEMBERS: [usize; 4] = [2, 3, 4, 5];
/// What marks a word of the pattern.
const TAG: u64 = 0x4857_0000_0000_0000;

/// One pool.
struct Case {
    level: &'static str,
    strip_bytes: u64,
    extent_bytes: u64,
    /// How many extents the volume has.
    extents: u64,
    data_offset: u64,
    /// What of each member counts.
    data_bytes: Vec<u64>,
    /// Of the first member, in the guest.
    first_disk: usize,
}

impl Case {
    fn name(&self) -> String {
        format!("{} of {}, strips of {} KiB", self.level, self.data_bytes.len(), self.strip_bytes >> 10)
    }

    /// Which members md has to do without, each time that it reads this. As parity goes around, any two of them stand for data and data,
    /// data and parity, and both parities, in one row or another.
    fn passes(&self) -> Vec<(&Case, Vec<usize>)> {
        let last = self.data_bytes.len() - 1;
        let without = match parities(self.level) {
            0 => vec![vec![]],
            1 => vec![vec![], vec![last / 2]],
            _ => vec![vec![], vec![0, last / 2], vec![last]],
        };
        without.into_iter().map(|without| (self, without)).collect()
    }
}

pub(super) fn md(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let (mut cases, mut files) = (Vec::new(), Vec::new());
    for level in LEVELS {
        for members in MEMBERS.into_iter().filter(|members| has_members(level, *members)) {
            for strip_bytes in STRIPS {
                let made = make(lab, &scratch, level, members, strip_bytes, &mut files);
                cases.push(made.map_err(|e| format!("{level} of {members}, strips of {strip_bytes}: {e}"))?);
            }
        }
    }
    let passes: Vec<(&Case, Vec<usize>)> = cases.iter().flat_map(Case::passes).collect();
    let explain = |(case, without): &(&Case, Vec<usize>), e: &str| match &without[..] {
        [] => format!("{}: {e}", case.name()),
        without => format!("{}, without members {without:?}: {e}", case.name()),
    };
    let out = empty_file(&scratch, "out.raw", OUT_BYTES * passes.len() as u64)?;
    let mut guest = start(lab, &scratch, &files, &out)?;
    for (number, pass) in passes.iter().enumerate() {
        read_by_md(&mut guest, pass, number).map_err(|e| explain(pass, &e))?;
    }
    guest.run_for("sync", 30)?;
    guest.quit()?;
    let mut bytes = 0;
    for (number, pass) in passes.iter().enumerate() {
        bytes +=
            compare(pass.0, Path::new(&out), number as u64 * OUT_BYTES).map_err(|e| explain(pass, &e))?;
    }
    Ok(Outcome::Passed(format!(
        "{} pools, {} times with members left out, {} MiB as md puts and computes them",
        cases.len(),
        passes.len() - cases.len(),
        bytes / MIB
    )))
}

/// A pool whose one volume fills it with the pattern; its members' files are added to `files`.
fn make(
    lab: &Lab,
    scratch: &Scratch,
    level: &'static str,
    members: usize,
    strip_bytes: u64,
    files: &mut Vec<String>,
) -> Result<Case> {
    let first_disk = files.len();
    let mut sections = String::new();
    let mut args = vec!["pool".to_owned(), "create".to_owned(), POOL.to_owned()];
    for member in 0..members {
        // Unlike in size, none of them a multiple of all strips: what counts of each is a part of the answer.
        let bytes = MEMBER_BYTES + member as u64 * (MIB + 5 * BLOCK);
        let file = empty_file(scratch, &format!("m{}.raw", first_disk + member), bytes)?;
        sections += &format!("[[device]]\nname = \"m{member}\"\nuri = \"file://{file}\"\n\n");
        args.push(format!("m{member}"));
        files.push(file);
    }
    args.extend([
        "--raid".to_owned(),
        level.to_owned(),
        "--strip".to_owned(),
        format!("{}KiB", strip_bytes >> 10),
    ]);
    args.push("--json".to_owned());
    let daemon = Daemon::configure("make", &lab.hawser, scratch.path(), &sections)?;
    let pool = Json::parse(&daemon.offline(&args.iter().map(String::as_str).collect::<Vec<_>>())?)?;
    let extent_bytes = whole(pool.number("extent_bytes")?)?;
    let extents = whole(pool.number("size_bytes")?)? / extent_bytes;
    if extents < 4 {
        return Err(format!("{extents} extents are too few to show anything: {pool:?}"));
    }
    let pattern = scratch.file("pattern.raw");
    write_pattern(&pattern, extents * extent_bytes).map_err(|e| format!("{}: {e}", pattern.display()))?;
    Daemon::import(&lab.hawser, &daemon.config(), &pattern, &format!("{POOL}/v"), false)?;
    let mut superblock = vec![0; 4096];
    let first = &files[first_disk];
    File::open(first)
        .and_then(|mut file| file.seek(SeekFrom::Start(4096)).and_then(|_| file.read_exact(&mut superblock)))
        .map_err(|e| format!("{first}: {e}"))?;
    let (data_offset, data_bytes) = data_areas(&superblock, members)?;
    Ok(Case { level, strip_bytes, extent_bytes, extents, data_offset, data_bytes, first_disk })
}

/// Which numbers of members are looked at.
fn has_members(level: &str, members: usize) -> bool {
    match level {
        "raid5" => (3..=5).contains(&members),
        "raid6" => (4..=5).contains(&members),
        _ => (2..=4).contains(&members),
    }
}

/// How many strips of a stripe are parity.
fn parities(level: &str) -> usize {
    match level {
        "raid5" => 1,
        "raid6" => 2,
        _ => 0,
    }
}

fn whole(number: f64) -> Result<u64> {
    format!("{number:.0}").parse().map_err(|_| format!("{number} is no size"))
}

fn write_pattern(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for word in 0..bytes / 8 {
        file.write_all(&(TAG | word).to_le_bytes())?;
    }
    file.flush()
}

/// Where data begins, and how much of each member counts: `docs/on-disk-format.md`, "Where things stand" and "Superblock".
fn data_areas(superblock: &[u8], members: usize) -> Result<(u64, Vec<u64>)> {
    let number = |at: usize, bytes: usize| {
        superblock[at..at + bytes].iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    if &superblock[..8] != b"HAWSERSB" || number(130, 2) != members as u64 {
        return Err(format!("no superblock of {members} members: {:02x?}", &superblock[..160]));
    }
    let (intent_pages, log_bytes, metadata_pages) = (number(120, 4), number(96, 8), number(124, 4));
    let parity_log_pages = number(140, 4);
    let end = MIB + intent_pages * 4096 + log_bytes + (metadata_pages + parity_log_pages) * 4096;
    Ok((end.next_multiple_of(MIB), (0..members).map(|member| number(400 + 32 * member + 16, 8)).collect()))
}

/// A guest with all members as disks of one SCSI controller, and a disk for what md reads.
fn start(lab: &Lab, scratch: &Scratch, files: &[String], out: &str) -> Result<Qemu> {
    let mut more = vec!["-device".to_owned(), "virtio-scsi-pci,id=members".to_owned()];
    for (number, file) in files.iter().enumerate() {
        let drive = format!("file={file},format=raw,if=none,id=m{number},file.locking=off");
        let disk = format!("scsi-hd,bus=members.0,scsi-id=0,lun={number},drive=m{number}");
        more.extend(["-drive".to_owned(), drive, "-device".to_owned(), disk]);
    }
    let drive = format!("file={out},format=raw,if=none,id=out,cache=unsafe,file.locking=off");
    more.extend([
        "-drive".to_owned(),
        drive,
        "-device".to_owned(),
        "virtio-blk-pci,drive=out,serial=out".to_owned(),
    ]);
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let mut guest = Qemu::from_kernel("md", &lab.image, scratch.path(), lab.accel, &[], &more)?;
    guest.run_for(
        &format!(
            "cat > /run/lib.sh <<'END'\n{LIBRARY}\nEND\n. /run/lib.sh
            for module in {MODULES}; do modprobe $module || fail \"no module $module\"; done
            all() {{ [ $(ls -d /sys/block/sd* | wc -l) = {} ]; }}
            within 30 all",
            files.len()
        ),
        60,
    )?;
    Ok(guest)
}

/// md over the members of a case, read to its place in the output. Where there are copies, md compares them.
fn read_by_md(guest: &mut Qemu, (case, without): &(&Case, Vec<usize>), number: usize) -> Result<()> {
    let smallest = match parities(case.level) {
        0 => case.data_bytes.iter().min().copied().unwrap_or(0),
        // Rows behind the last extent hold nothing, and no parity of it.
        parities => case.extents * case.extent_bytes / (case.data_bytes.len() - parities) as u64,
    };
    // Without zones, as a pool has none; linear takes all of each.
    let sizes: Vec<String> = case
        .data_bytes
        .iter()
        .map(|bytes| if case.level == "linear" { bytes >> 10 } else { smallest >> 10 }.to_string())
        .collect();
    let layout = match case.level {
        "raid10" => "echo 258 > layout # near-2",
        "raid5" | "raid6" => "echo 2 > layout # left-symmetric",
        _ => "",
    };
    let check = match case.level {
        "raid1" | "raid10" | "raid5" | "raid6" if without.is_empty() => {
            "echo check > sync_action
            is_idle() { [ $(cat sync_action) = idle ]; }
            within 60 is_idle
            [ $(cat mismatch_cnt) = 0 ] || fail \"copies or parity differ in $(cat mismatch_cnt) sectors\""
        }
        _ => "",
    };
    let script = format!(
        "set -e; . /run/lib.sh
        for disk in /sys/block/vd*; do [ \"$(cat $disk/serial)\" = out ] && out=/dev/${{disk##*/}}; done
        echo md_{number} > /sys/module/md_mod/parameters/new_array
        cd /sys/block/md_{number}/md
        echo none > metadata_version
        echo {level} > level
        echo {members} > raid_disks
        echo {strip} > chunk_size
        {layout}
        echo {component} > component_size
        echo none > resync_start
        disk={disk} slot=0
        for size in {sizes}; do
            case \" {without} \" in *\" $slot \"*) ;; *)
                block=$(ls -d /sys/class/scsi_disk/*:0:0:$disk/device/block/*)
                cat $block/dev > new_dev
                cd dev-${{block##*/}}
                echo {offset} > offset
                echo $size > size
                echo $slot > slot
                cd .. ;;
            esac
            disk=$((disk + 1)) slot=$((slot + 1))
        done
        echo active > array_state
        dd if=/dev/md_{number} of=$out bs=1M count={mib} seek={seek} iflag=direct oflag=direct 2> /run/dd.out || fail \"$(cat /run/dd.out)\"
        {check}
        cd /
        echo clear > /sys/block/md_{number}/md/array_state",
        level = case.level,
        members = case.data_bytes.len(),
        strip = case.strip_bytes,
        component = smallest >> 10,
        disk = case.first_disk,
        sizes = sizes.join(" "),
        without = without.iter().map(usize::to_string).collect::<Vec<_>>().join(" "),
        offset = case.data_offset / 512,
        mib = OUT_BYTES / MIB,
        seek = number as u64 * OUT_BYTES / MIB,
    );
    guest.run_for(&script, 60).map(drop)
}

/// All extents of the volume are there, whole, each once; how many bytes that is.
fn compare(case: &Case, out: &Path, from: u64) -> Result<u64> {
    let explain = |e: std::io::Error| format!("{}: {e}", out.display());
    let mut file = File::open(out).map_err(explain)?;
    file.seek(SeekFrom::Start(from)).map_err(explain)?;
    let mut bytes = vec![0; usize::try_from(case.extent_bytes).map_err(|e| e.to_string())?];
    let words = case.extent_bytes / 8;
    let mut seen = vec![false; usize::try_from(case.extents).map_err(|e| e.to_string())?];
    for place in 0..case.extents {
        file.read_exact(&mut bytes).map_err(explain)?;
        let word_at = |at: &[u8]| at.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        let first = word_at(&bytes[..8]) ^ TAG;
        let index = usize::try_from(first / words).unwrap_or(usize::MAX);
        if !first.is_multiple_of(words) || seen.get(index) != Some(&false) {
            return Err(format!(
                "place {place} of md has no extent of the volume, or one that was there before: {:02x?}",
                &bytes[..16]
            ));
        }
        seen[index] = true;
        if let Some((at, found)) =
            (0..).zip(bytes.chunks_exact(8)).find(|(at, found)| word_at(found) ^ TAG != first + at)
        {
            return Err(format!(
                "place {place} of md is extent {index} of the volume, but byte {} of it, which is {:x}, should be {:x}",
                at * 8,
                word_at(found),
                TAG | (first + at)
            ));
        }
    }
    Ok(case.extents * case.extent_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn extents_in_any_order_are_found_and_a_wrong_word_is_named() {
        let scratch = Scratch::new().unwrap();
        let file = scratch.file("out");
        let case = Case {
            level: "raid0",
            strip_bytes: 4096,
            extent_bytes: 8192,
            extents: 3,
            data_offset: 0,
            data_bytes: vec![0; 2],
            first_disk: 0,
        };
        write_pattern(&file, 3 * 8192).unwrap();
        let mut bytes = fs::read(&file).unwrap();
        bytes.rotate_left(8192);
        fs::write(&file, &bytes).unwrap();
        assert_eq!(compare(&case, &file, 0), Ok(3 * 8192));
        bytes[8192 + 4096] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let error = compare(&case, &file, 0).unwrap_err();
        assert!(error.contains("place 1 of md is extent 2") && error.contains("byte 4096"), "{error}");
        bytes.copy_within(0..8192, 8192);
        fs::write(&file, &bytes).unwrap();
        assert!(compare(&case, &file, 0).unwrap_err().contains("was there before"));
    }
}
