//! The bootable disk: one DOS label that SeaBIOS and UEFI firmware both start from.
//!
//! ```text
//! sector 0      GRUB's boot.img and the partition table
//! sector 1      GRUB's core.img, in the gap before the first partition
//! 1 MiB         p1  EFI system partition (FAT): systemd-boot, kernel, initial RAM disk; GRUB reads them too
//! 65 MiB        p2  root (ext4)
//! 321 MiB       p3  scratch: zeroes, for fio
//! ```
//! Chain loaders that overwrite themselves (syslinux) are of no use here: without KVM, QEMU does not notice that another
//! process wrote code into the guest's memory.

#![forbid(unsafe_code)]

use super::kernel::shell;
use crate::Result;
use crate::process::output;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;
const SECTOR: u64 = 512;

struct Partition {
    kind: u8,
    active: bool,
    start: u64,
    bytes: u64,
}

/// Where the root file system begins.
pub const ROOT_START: u64 = 65 * MIB;
/// Size of the root file system: fio's libraries are most of it.
pub const ROOT_BYTES: u64 = 256 * MIB;
const ESP: Partition = Partition { kind: 0xef, active: false, start: MIB, bytes: 64 * MIB };
const ROOT: Partition = Partition { kind: 0x83, active: true, start: ROOT_START, bytes: ROOT_BYTES };
const SCRATCH: Partition = Partition { kind: 0x83, active: false, start: 321 * MIB, bytes: 128 * MIB };

/// Size of the disk.
pub const DISK_BYTES: u64 = 450 * MIB;
/// Number of the scratch partition: `/dev/vda3`.
pub const SCRATCH_PARTITION: u32 = 3;

const COMMAND_LINE: &str = "root=LABEL=hawser-root rw console=ttyS0,115200 loglevel=4";

/// A file system of `bytes` with the content of `tree`.
pub(super) fn ext4(tree: &Path, label: &str, bytes: u64, image: &Path) -> Result<()> {
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-L", label, "-E", "root_owner=0:0", "-d"]);
    output(mke2fs.arg(tree).arg(image).arg(format!("{}k", bytes / 1024))).map(drop)
}

/// Writes `work/disk.raw` from the root tree and from `vmlinuz` and `initrd.img` in `work`.
pub(super) fn bootable(root: &Path, work: &Path) -> Result<()> {
    let explain = |e: std::io::Error| format!("disk.raw: {e}");
    esp(work)?;
    ext4(root, "hawser-root", ROOT.bytes, &work.join("root.ext4"))?;
    let mut disk = File::create(work.join("disk.part")).map_err(explain)?;
    disk.set_len(DISK_BYTES).map_err(explain)?;
    for (file, partition) in [("esp.fat", &ESP), ("root.ext4", &ROOT)] {
        let path = work.join(file);
        copy_sparse(&path, &mut disk, partition.start)?;
        fs::remove_file(&path).map_err(explain)?;
    }

    let mut first =
        fs::read("/usr/lib/grub/i386-pc/boot.img").map_err(|e| format!("GRUB's boot.img: {e}"))?;
    first.resize(512, 0);
    for (number, partition) in [&ESP, &ROOT, &SCRATCH].into_iter().enumerate() {
        let at = 446 + 16 * number;
        first[at..at + 16].copy_from_slice(&partition.entry()?);
    }
    first[440..444].copy_from_slice(b"hwsr");
    first[510..512].copy_from_slice(&[0x55, 0xaa]);
    let core = grub_core(work)?;
    if SECTOR + core.len() as u64 > ESP.start {
        return Err(format!(
            "GRUB's core image of {} bytes does not fit before the first partition",
            core.len()
        ));
    }
    disk.seek(SeekFrom::Start(0)).map_err(explain)?;
    disk.write_all(&first).and_then(|()| disk.write_all(&core)).map_err(explain)?;
    disk.sync_all().map_err(explain)?;
    fs::rename(work.join("disk.part"), work.join("disk.raw")).map_err(explain)
}

impl Partition {
    /// The 16 bytes of the DOS partition table; CHS fields say "use LBA".
    fn entry(&self) -> Result<[u8; 16]> {
        let sectors =
            |bytes: u64| u32::try_from(bytes / SECTOR).map_err(|_| "a partition beyond 2 TiB".to_owned());
        let mut entry = [0xfe, 0xff, 0xff, 0xff, 0xfe, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
        entry[0] = if self.active { 0x80 } else { 0 };
        entry[4] = self.kind;
        entry[8..12].copy_from_slice(&sectors(self.start)?.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors(self.bytes)?.to_le_bytes());
        Ok(entry)
    }
}

fn esp(work: &Path) -> Result<()> {
    let loader = "timeout 0\ndefault hawser.conf\neditor no\n";
    let entry = format!("title hawser guest\nlinux /vmlinuz\ninitrd /initrd.img\noptions {COMMAND_LINE}\n");
    for (name, text) in [("loader.conf", loader), ("hawser.conf", entry.as_str())] {
        fs::write(work.join(name), text).map_err(|e| format!("{name}: {e}"))?;
    }
    // mtools reads a configuration file of the user's, which has no business here.
    shell(
        &format!(
            "truncate -s {} esp.fat
            /sbin/mkfs.fat -F 32 -n HAWSER-ESP -h {} esp.fat > /dev/null
            export MTOOLSRC=/dev/null MTOOLS_SKIP_CHECK=1
            mmd -i esp.fat ::/EFI ::/EFI/BOOT ::/loader ::/loader/entries
            mcopy -i esp.fat /usr/lib/systemd/boot/efi/systemd-bootx64.efi ::/EFI/BOOT/BOOTX64.EFI
            mcopy -i esp.fat loader.conf ::/loader/loader.conf
            mcopy -i esp.fat hawser.conf ::/loader/entries/hawser.conf
            mcopy -i esp.fat vmlinuz initrd.img ::/
            rm loader.conf hawser.conf",
            ESP.bytes,
            ESP.start / SECTOR,
        ),
        work,
    )
    .map(drop)
}

fn grub_core(work: &Path) -> Result<Vec<u8>> {
    let script = format!("set root=(hd0,msdos1)\nlinux /vmlinuz {COMMAND_LINE}\ninitrd /initrd.img\nboot\n");
    fs::write(work.join("grub.cfg"), script).map_err(|e| format!("grub.cfg: {e}"))?;
    shell(
        "grub-mkimage -O i386-pc -p '(hd0,msdos1)/grub' -c grub.cfg -o core.img biosdisk part_msdos fat linux boot",
        work,
    )?;
    let core = fs::read(work.join("core.img")).map_err(|e| format!("core.img: {e}"))?;
    for file in ["core.img", "grub.cfg"] {
        fs::remove_file(work.join(file)).map_err(|e| format!("{file}: {e}"))?;
    }
    Ok(core)
}

/// Copies a file into `disk` at `offset` and leaves holes where it is zero.
fn copy_sparse(from: &Path, disk: &mut File, offset: u64) -> Result<()> {
    let explain = |e: std::io::Error| format!("{}: {e}", from.display());
    let mut source = File::open(from).map_err(explain)?;
    let mut buffer = vec![0; 64 * 1024];
    let mut at = offset;
    loop {
        let count = source.read(&mut buffer).map_err(explain)?;
        if count == 0 {
            return Ok(());
        }
        let chunk = &buffer[..count];
        if chunk.iter().any(|byte| *byte != 0) {
            disk.seek(SeekFrom::Start(at)).and_then(|_| disk.write_all(chunk)).map_err(explain)?;
        }
        at += count as u64;
    }
}
