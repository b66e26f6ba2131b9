//! The guest's file trees: the initial RAM disk and the root, from busybox, fio and a few kernel modules.

#![forbid(unsafe_code)]

use super::kernel::{Modules, copy_module, shell};
use crate::Result;
use crate::process::output;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) const INITRAMFS_INIT: &str = include_str!("../../guest/initramfs-init");
pub(super) const INIT: &str = include_str!("../../guest/init");
pub(super) const AGENT: &str = include_str!("../../guest/agent");

/// What finds and mounts the root disk.
const BOOT_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// What a guest may load later: a network card, the kernel's NVMe target and initiator, a block device for them; SCSI disks of
/// QEMU's, and Linux md on them; RDMA over a network interface (Soft-RoCE), and NVMe over that.
const ROOT_MODULES: [&str; 29] = [
    "virtio_net",
    "configfs",
    "crct10dif_generic",
    "crct10dif_pclmul",
    "crc_t10dif",
    "crc64_rocksoft_generic",
    "crc64_rocksoft",
    "null_blk",
    "nvmet",
    "nvmet_tcp",
    "nvme_core",
    "nvme_fabrics",
    "nvme_tcp",
    "crc32c_generic",
    "virtio_scsi",
    "sd_mod",
    "md_mod",
    "linear",
    "raid0",
    "raid1",
    "raid10",
    "raid456",
    "dummy",
    "crc32_generic",
    "rdma_rxe",
    "ib_uverbs",
    "rdma_ucm",
    "nvmet_rdma",
    "nvme_rdma",
];

/// Programs that the root has besides busybox, with their libraries.
const PROGRAMS: [&str; 4] = ["/usr/bin/fio", "/usr/sbin/nvme", "/sbin/mke2fs", "/usr/bin/rdma"];

/// rdma-core, for what programs open at run time: its libraries, Soft-RoCE's part of it, and the file that names that.
const RDMA_CORE: [&str; 2] =
    ["/usr/lib/x86_64-linux-gnu/librdmacm.so.1", "/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so"];
const RDMA_CONFIG: &str = "/etc/libibverbs.d/rxe.driver";

const BUSYBOX: &str = "/bin/busybox";

fn write_script(path: &Path, text: &str) -> Result<()> {
    let explain = |e| format!("{}: {e}", path.display());
    fs::write(path, text).map_err(explain)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(explain)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    fs::copy(from, to).map(drop).map_err(|e| format!("{} to {}: {e}", from.display(), to.display()))
}

fn make_folders(root: &Path, names: &[&str]) -> Result<()> {
    names.iter().try_for_each(|name| {
        let path = root.join(name);
        fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))
    })
}

/// Packs the initial RAM disk from a folder made at `folder`.
pub(super) fn initramfs(modules: &Modules, folder: &Path, image: &Path) -> Result<()> {
    make_folders(folder, &["bin", "dev", "proc", "sys", "root", "modules"])?;
    copy(Path::new(BUSYBOX), &folder.join("bin/busybox"))?;
    write_script(&folder.join("init"), INITRAMFS_INIT)?;
    let mut order = String::new();
    for file in modules.closure(&BOOT_MODULES)? {
        order += &copy_module(&file, &folder.join("modules"))?;
        order.push('\n');
    }
    fs::write(folder.join("modules/order"), order).map_err(|e| format!("modules/order: {e}"))?;
    let pack = "find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 | gzip -1 > ";
    shell(&format!("{pack} '{}'", image.display()), folder).map(drop)
}

/// Fills `root` with the guest's root tree.
pub(super) fn root(modules: &Modules, root: &Path) -> Result<()> {
    make_folders(
        root,
        &["bin", "sbin", "usr/bin", "usr/sbin", "dev", "proc", "sys", "run", "tmp", "root", "etc", "mnt"],
    )?;
    copy(Path::new(BUSYBOX), &root.join("bin/busybox"))?;
    for applet in output(Command::new(BUSYBOX).arg("--list"))?.lines() {
        // mke2fs is the real one, below.
        if !["busybox", "mke2fs"].contains(&applet) {
            symlink("/bin/busybox", root.join("bin").join(applet)).map_err(|e| format!("{applet}: {e}"))?;
        }
    }
    for program in PROGRAMS {
        add_program(root, program)?;
    }
    for library in RDMA_CORE {
        add_program(root, library)?;
    }
    copy(Path::new(RDMA_CONFIG), &root.join(RDMA_CONFIG.trim_start_matches('/')))?;
    symlink("mke2fs", root.join("sbin/mkfs.ext4")).map_err(|e| format!("mkfs.ext4: {e}"))?;
    if Path::new("/etc/mke2fs.conf").exists() {
        copy(Path::new("/etc/mke2fs.conf"), &root.join("etc/mke2fs.conf"))?;
    }
    write_script(&root.join("sbin/init"), INIT)?;
    write_script(&root.join("sbin/agent"), AGENT)?;

    for file in modules.closure(&ROOT_MODULES)? {
        let relative = modules.relative(&file)?;
        copy_module(&file, &root.join(relative.parent().unwrap_or(Path::new(""))))?;
    }
    output(Command::new("/sbin/depmod").arg("-b").arg(root).arg(modules.release())).map(drop)
}

/// Copies programs and what the dynamic loader would load for them, all into one folder, without debugging information.
pub(super) fn programs(programs: &[PathBuf], folder: &Path) -> Result<()> {
    make_folders(folder, &["lost+found"])?;
    for program in programs {
        for file in files_of(program)? {
            copy(&file, &folder.join(file.file_name().unwrap_or_default()))?;
        }
        let own = folder.join(program.file_name().unwrap_or_default());
        output(Command::new("objcopy").arg("--strip-debug").arg(own))?;
    }
    Ok(())
}

/// Copies a program and what the dynamic loader would load for it, each to its own path.
fn add_program(root: &Path, program: &str) -> Result<()> {
    let files = files_of(Path::new(program))?;
    files.iter().try_for_each(|file| copy(file, &root.join(file.strip_prefix("/").unwrap_or(file))))
}

/// A program and what the dynamic loader would load for it.
fn files_of(program: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![program.to_path_buf()];
    for line in output(Command::new("ldd").arg(program))?.lines() {
        // "libaio.so.1 => /lib/x86_64-linux-gnu/libaio.so.1 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
        let path = line.rsplit_once("=> ").map_or(line, |(_, path)| path).trim();
        let path = path.split(" (").next().unwrap_or_default();
        if path == "not found" {
            return Err(format!("{}: ldd: {}", program.display(), line.trim()));
        }
        if path.starts_with('/') {
            files.push(PathBuf::from(path));
        }
    }
    Ok(files)
}
