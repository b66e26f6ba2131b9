//! What Linux md does to its members for one small write: counted, to stand beside what a pool does (`cargo xtask bench`).
//!
//! ```text
//!   here: a superblock on each empty file ─► guest: SCSI disks ─► md through sysfs ─► fio, 4 KiB at random ─► the disks' own counts
//! ```
//!
//! The members are all zeroes, so that parity is right from the beginning and md makes nothing anew. Nothing of it depends on how fast
//! the guest is but how many writes the journal finds waiting, and joins.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::LIBRARY;
use crate::Result;
use crate::lab::Lab;
use crate::pools::empty_file;
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use std::io::{Seek, SeekFrom, Write};

const SECTOR: u64 = 512;
const MEMBER_SECTORS: u64 = 128 << 11;
const DATA_SECTORS: u64 = MEMBER_SECTORS - DATA_OFFSET;
const DATA_OFFSET: u64 = 2048;
/// Where a superblock of version 1.2 stands.
const SUPER_OFFSET: u64 = 8;
/// Where the partial parity log is, counted from there, and its length.
const PPL: (u16, u16) = (8, 1024);
const CHUNK_SECTORS: u32 = 128;
const WRITES: u32 = 4000;
const DEPTH: u32 = 32;

/// What keeps a crash from leaving data and parity apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Policy {
    /// Nothing.
    Resync,
    /// A log of all that is written, on a device of its own.
    Journal,
    /// What parity was before, on the member that has it.
    Ppl,
}

impl Policy {
    /// md's word for it.
    fn name(self) -> &'static str {
        match self {
            Policy::Resync => "resync",
            Policy::Journal => "journal",
            Policy::Ppl => "ppl",
        }
    }

    /// `feature_map`, linux/raid/md_p.h.
    fn features(self) -> u32 {
        match self {
            Policy::Resync => 0,
            Policy::Journal => 512,
            Policy::Ppl => 1024,
        }
    }
}

struct Array {
    level: u8,
    members: usize,
    policy: Policy,
}

const ARRAYS: [Array; 5] = [
    Array { level: 5, members: 3, policy: Policy::Resync },
    Array { level: 5, members: 3, policy: Policy::Journal },
    Array { level: 5, members: 3, policy: Policy::Ppl },
    Array { level: 6, members: 4, policy: Policy::Resync },
    Array { level: 6, members: 4, policy: Policy::Journal },
];

impl Array {
    fn disks(&self) -> usize {
        self.members + usize::from(self.policy == Policy::Journal)
    }

    /// `struct mdp_superblock_1` of disk `number`, linux/raid/md_p.h; the journal's is the last.
    fn superblock(&self, number: usize) -> Vec<u8> {
        let mut bytes = vec![0; 256 + 2 * self.disks()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let policy = self.policy as u8;
        put(0, &0xa92b_4efc_u32.to_le_bytes()); // magic
        put(4, &1_u32.to_le_bytes()); // major_version
        put(8, &self.policy.features().to_le_bytes());
        put(16, &[0x48, self.level, policy, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]); // set_uuid
        put(72, &u32::from(self.level).to_le_bytes());
        put(76, &2_u32.to_le_bytes()); // layout: left-symmetric
        put(80, &DATA_SECTORS.to_le_bytes());
        put(88, &CHUNK_SECTORS.to_le_bytes());
        put(92, &u32::try_from(self.members).unwrap_or(0).to_le_bytes()); // raid_disks
        if self.policy == Policy::Ppl {
            put(96, &PPL.0.to_le_bytes());
            put(98, &PPL.1.to_le_bytes());
        }
        put(128, &DATA_OFFSET.to_le_bytes());
        put(136, &DATA_SECTORS.to_le_bytes());
        put(144, &SUPER_OFFSET.to_le_bytes());
        let index = u32::try_from(number).unwrap_or(0);
        put(160, &index.to_le_bytes()); // dev_number
        put(168, &[0x48, self.level, policy, number.to_le_bytes()[0], 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]); // device_uuid
        put(200, &1_u64.to_le_bytes()); // events
        put(208, &u64::MAX.to_le_bytes()); // resync_offset: in sync
        put(220, &u32::try_from(self.disks()).unwrap_or(0).to_le_bytes()); // max_dev
        for disk in 0..self.disks() {
            let role = if disk < self.members { u16::try_from(disk).unwrap_or(0) } else { 0xfffd };
            put(256 + 2 * disk, &role.to_le_bytes());
        }
        // The sum of all words, carries folded in once.
        let words = bytes
            .chunks(4)
            .map(|word| word.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)));
        let sum: u64 = words.sum();
        let sum = u32::try_from((sum & 0xffff_ffff) + (sum >> 32)).unwrap_or(0);
        bytes[216..220].copy_from_slice(&sum.to_le_bytes());
        bytes
    }
}

/// Of some disks: reads, writes, bytes written.
#[derive(Clone, Copy)]
struct Counts([f64; 3]);

impl Counts {
    /// From one of md's disks on, or of its journal.
    fn parse(line: Option<&str>) -> Result<Counts> {
        let numbers: Vec<f64> =
            line.unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect();
        match numbers[..] {
            [reads, writes, sectors] => Ok(Counts([reads, writes, sectors * 512.0])),
            _ => Err(format!("no counts: {line:?}")),
        }
    }

    fn per_write_since(self, before: Counts) -> [f64; 3] {
        std::array::from_fn(|at| (self.0[at] - before.0[at]) / f64::from(WRITES))
    }
}

pub(super) fn count(lab: &Lab) -> Result<Outcome> {
    Ok(Outcome::Passed(format!("md for each 4 KiB written at random: {}", lines(lab)?.join("; "))))
}

/// Counts them: a line for each array, such as `RAID 5 of 3, journal: 1.00 reads, 2.00 writes, 8.0 KiB, log …`.
pub fn lines(lab: &Lab) -> Result<Vec<String>> {
    let scratch = Scratch::new()?;
    let mut more = vec!["-device".to_owned(), "virtio-scsi-pci,id=members".to_owned()];
    let mut disks = 0;
    for array in &ARRAYS {
        for number in 0..array.disks() {
            let file = empty_file(&scratch, &format!("m{disks}.raw"), MEMBER_SECTORS * SECTOR)?;
            let written = std::fs::OpenOptions::new().write(true).open(&file).and_then(|mut opened| {
                opened.seek(SeekFrom::Start(SUPER_OFFSET * SECTOR))?;
                opened.write_all(&array.superblock(number))
            });
            written.map_err(|e| format!("{file}: {e}"))?;
            let drive = format!("file={file},format=raw,if=none,id=m{disks},cache=unsafe,file.locking=off");
            let disk = format!("scsi-hd,bus=members.0,scsi-id=0,lun={disks},drive=m{disks}");
            more.extend(["-drive".to_owned(), drive, "-device".to_owned(), disk]);
            disks += 1;
        }
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let mut guest = Qemu::from_kernel("md", &lab.image, scratch.path(), lab.accel, &[], &more)?;
    guest.run_for(
        &format!(
            "cat > /run/lib.sh <<'END'\n{LIBRARY}\n{SUM}\nEND\n. /run/lib.sh
            for module in virtio_scsi sd_mod md_mod raid456; do modprobe $module || fail \"no module $module\"; done
            all() {{ [ $(ls -d /sys/block/sd* | wc -l) = {disks} ]; }}
            within 30 all"
        ),
        60,
    )?;
    let (mut first, mut lines) = (0, Vec::new());
    for array in &ARRAYS {
        let name = format!("RAID {} of {}, {}", array.level, array.members, array.policy.name());
        let counts = count_of(&mut guest, array, first).map_err(|e| format!("{name}: {e}"))?;
        lines.push(format!("{name}: {counts}"));
        first += array.disks();
    }
    guest.quit()?;
    Ok(lines)
}

/// sum DISK…: reads, writes and sectors written of all of them.
const SUM: &str = "sum() {
    for disk in \"$@\"; do cat /sys/class/scsi_disk/*:0:0:$disk/device/block/*/stat; done |
        awk '{ reads += $1; writes += $5; sectors += $7 } END { print reads + 0, writes + 0, sectors + 0 }'
}";

fn count_of(guest: &mut Qemu, array: &Array, first: usize) -> Result<String> {
    let numbers =
        |range: std::ops::Range<usize>| range.map(|disk| disk.to_string()).collect::<Vec<_>>().join(" ");
    let (members, all) = (first..first + array.members, first..first + array.disks());
    let journal = members.end..all.end;
    let name = format!("md_{first}");
    let script = format!(
        "set -e; . /run/lib.sh
        echo {name} > /sys/module/md_mod/parameters/new_array
        cd /sys/block/{name}/md
        echo 1.2 > metadata_version
        for disk in {all}; do cat /sys/class/scsi_disk/*:0:0:$disk/device/block/*/dev > new_dev; done
        echo active > array_state
        [ $(cat consistency_policy) = {policy} ] || fail \"$(cat consistency_policy)\"
        [ $(cat sync_action) = idle ] || fail \"$(cat sync_action)\"
        sum {members}; sum {journal}
        fio --name=job --filename=/dev/{name} --direct=1 --rw=randwrite --bs=4k --iodepth={DEPTH} --ioengine=io_uring --number_ios={WRITES} \
            --end_fsync=1 > /run/fio.out 2>&1 || fail \"$(cat /run/fio.out)\"
        grep -q 'total=r=0,w={WRITES}\\|issued rwts: total=0,{WRITES},' /run/fio.out || fail \"$(cat /run/fio.out)\"
        sum {members}; sum {journal}
        cd /
        echo clear > /sys/block/{name}/md/array_state",
        all = numbers(all),
        policy = array.policy.name(),
        members = numbers(members),
        journal = numbers(journal),
    );
    let said = guest.run_for(&script, 90)?;
    let mut lines = said.lines();
    let mut next = || Counts::parse(lines.next());
    let (members_before, journal_before, members_after, journal_after) = (next()?, next()?, next()?, next()?);
    let [reads, writes, bytes] = members_after.per_write_since(members_before);
    let line = format!("{reads:.2} reads, {writes:.2} writes, {:.1} KiB", bytes / 1024.0);
    let [_, log_writes, log_bytes] = journal_after.per_write_since(journal_before);
    Ok(match array.policy {
        Policy::Resync => line + ", no log",
        Policy::Journal => format!(
            "{line}, log on a device of its own {log_writes:.2} writes, {:.1} KiB",
            log_bytes / 1024.0
        ),
        Policy::Ppl => line + ", log among them",
    })
}
