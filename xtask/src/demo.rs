//! `cargo xtask demo`: a VM boots from a thin clone in a pool over three remote targets; a target and the VM's back end are killed
//! under it.

use guest_tests::fio;
use guest_tests::lab::Lab;
use guest_tests::pools::{self, CLONE, GOLDEN, Pooled, SNAPSHOT};
use guest_tests::qemu::{Firmware, Qemu};
use guest_tests::scratch::Scratch;
use guest_tests::suite::{boot, verify_options};
use guest_tests::{Result, progress};
use std::path::Path;
use std::time::Instant;

/// Seconds of each fio run.
const FIO_SECONDS: u64 = 3;
/// Writes of the VM after the last blow.
const LAST_WRITES: u32 = 10_000;
/// Targets, and so members of the pool.
const MEMBERS: usize = 3;
/// The member whose target is killed.
const VICTIM: usize = 1;
const MIB: f64 = 1_048_576.0;

/// Runs the demo and prints its table.
pub(crate) fn run() -> Result<()> {
    let lab = Lab::open()?;
    let started = Instant::now();
    let mut table = Table::new();

    let mut pooled = pool(&lab, &mut table)?;
    let golden = pooled.mapped_bytes(GOLDEN)?;
    let used = pooled.view()?.used_bytes;

    progress("QEMU boots from the clone, through SeaBIOS and GRUB");
    let folder = pooled.scratch().path().to_path_buf();
    let mut guest = boot(&lab, "reconnect.cfg", Firmware::SeaBios, &folder, &[])?;
    let kernel = guest.run("uname -sr")?;
    table.row(
        "power-on to the guest's shell",
        format!("{:.1} s", guest.age().as_secs_f64()),
        &format!("SeaBIOS, GRUB, {kernel}"),
    );

    for (direction, what) in
        [("randread", "fio in the guest, 4k random read"), ("randwrite", "fio in the guest, 4k random write")]
    {
        progress(what);
        let options = format!(
            "--filename=/dev/vda3 --ioengine=io_uring --iodepth=16 --rw={direction} --bs=4k --size=64M --time_based --runtime={FIO_SECONDS}"
        );
        let report = fio::run(&mut guest, &options, FIO_SECONDS)?;
        table.row(what, format!("{:.0} IOPS", report.read_iops + report.write_iops), "queue depth 16");
    }

    strike(&lab, &mut pooled, &mut guest, &mut table)?;
    let errors = guest.io_errors()?;
    table.row("I/O errors in the guest's kernel log", errors.to_string(), "");

    let whole = pooled.wait("whole", pools::View::is_whole)?;
    let view = pooled.view()?;
    table.row(
        "members in sync",
        format!(
            "{} of {}",
            view.members.iter().filter(|state| *state == "in_sync").count(),
            view.members.len()
        ),
        &format!(
            "{:.0} MiB copied after the back end's death; {:.1} s after the load",
            view.copied_bytes() / MIB,
            whole.as_secs_f64()
        ),
    );
    progress("scrub: parity is compared with data");
    pooled.scrub()?;
    table.row("scrub", "ok".into(), "parity is right everywhere");
    let own = pooled.view()?.used_bytes - used;
    table.row(
        "space of image and clone",
        format!("{:.0} + {:.0} MiB", golden / MIB, own / MIB),
        "what was imported, and what the VM has changed",
    );

    progress("the end: VM, back end, targets");
    let qemu = guest.pid();
    guest.sync_and_quit()?;
    pooled.serve.terminate()?;
    pooled.stop()?;
    let left = left_behind(&folder, qemu);
    table.row(
        "left behind",
        if left.is_empty() { "nothing".into() } else { left.join(", ") },
        "processes, sockets, mounts, files",
    );
    table.row(
        "the whole demo",
        format!("{:.0} s", started.elapsed().as_secs_f64()),
        "after build and downloads",
    );
    print!(
        "{}",
        table.text(&format!(
            "hawser demo ({}, RAID 5 over {MEMBERS} targets, built for tests: speed is `cargo xtask bench`'s)",
            lab.accel
        ))
    );
    match (errors, left.is_empty()) {
        (0, true) => Ok(()),
        (0, false) => Err("something was left behind".into()),
        _ => Err(format!("the guest saw {errors} I/O errors")),
    }
}

/// Three targets, a pool, the image in it, a clone of that, and a daemon that serves the clone.
fn pool(lab: &Lab, table: &mut Table) -> Result<Pooled> {
    progress("three target daemons on loopback; a RAID 5 pool over them");
    let scratch = Scratch::new()?;
    let targets = pools::targets(lab, &scratch, MEMBERS, pools::MEMBER_BYTES)?;
    let uris = targets.iter().enumerate().map(|(number, target)| pools::uri_of_target(target, number));
    let uris = uris.collect::<Result<Vec<_>>>()?;
    let mut pooled = Pooled::create(lab, scratch, targets, &uris, "raid5", &[pools::the_disk()])?;
    progress("the guest image goes to a volume");
    let importing = Instant::now();
    pooled.import(lab, true)?;
    table.row(
        "image imported to the pool",
        format!("{:.1} s", importing.elapsed().as_secs_f64()),
        &format!("{} MiB over NVMe/TCP, verified; a snapshot of it", guest_tests::image::DISK_BYTES >> 20),
    );
    pooled.serve.launch()?;
    pooled.wait("open", pools::View::is_whole)?;
    let cloning = Instant::now();
    pooled.serve.command(&["volume", "clone", SNAPSHOT, CLONE])?;
    table.row(
        "clone of the image",
        format!("{:.2} s", cloning.elapsed().as_secs_f64()),
        "shares every block with it",
    );
    pooled.serve.await_disk("disk0", "listening")?;
    Ok(pooled)
}

/// A target dies and comes back, then the back end is killed, all under one load.
fn strike(lab: &Lab, pooled: &mut Pooled, guest: &mut Qemu, table: &mut Table) -> Result<()> {
    progress("fio writes and verifies; kill -9 to a target");
    fio::begin(guest, &verify_options(lab.accel, fio::UNTIL_ENDED))?;
    pooled.serve.await_writes("disk0", 1000)?;
    pooled.targets[VICTIM].kill()?;
    let killed = Instant::now();
    pooled.wait("without its member", |view| view.members[VICTIM] != "in_sync")?;
    progress("the pool does without it");
    pooled.serve.await_writes("disk0", 500)?;
    let waited = killed.elapsed();
    pooled.targets[VICTIM].launch()?;
    progress("the target is back");
    let resync = pooled.wait("whole", pools::View::is_whole)?;
    let copied = pooled.view()?.copied_bytes();
    table.row(
        "a target killed, and started again",
        format!("{:.1} s", resync.as_secs_f64()),
        &format!(
            "until the pool is whole, {:.0} MiB copied; the VM waited {:.1} s",
            copied / MIB,
            waited.as_secs_f64()
        ),
    );
    progress("kill -9 to the back end");
    pooled.serve.kill()?;
    pooled.serve.launch()?;
    progress("a new back end runs");
    pooled.serve.await_writes("disk0", LAST_WRITES)?;
    let report = fio::end(guest).map_err(|e| pooled.serve.explain(&e))?;
    table.row(
        "the longest pause that the VM saw",
        format!("{:.2} s", report.latency_max),
        "the longest request of that run",
    );
    table.row(
        "verify across both kills",
        "ok".into(),
        &format!("{:.0} reads and writes, errors {:.0}, wrong 0", report.ios, report.errors),
    );
    Ok(())
}

/// What still names the demo's folder, which must be gone: files, mounts, processes.
fn left_behind(folder: &Path, qemu: u32) -> Vec<String> {
    let mut left = Vec::new();
    let name = folder.display().to_string();
    if folder.exists() {
        left.push(name.clone());
    }
    if Path::new(&format!("/proc/{qemu}")).exists() {
        left.push(format!("process {qemu}"));
    }
    let mentions =
        |path: &Path| std::fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(&name));
    for table in ["/proc/self/mounts", "/proc/net/unix"] {
        if mentions(Path::new(table)) {
            left.push(table.to_owned());
        }
    }
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        if mentions(&entry.path().join("cmdline")) {
            left.push(format!("process {}", entry.file_name().to_string_lossy()));
        }
    }
    left
}

struct Table {
    rows: Vec<[String; 3]>,
}

impl Table {
    fn new() -> Self {
        Self { rows: Vec::new() }
    }

    fn row(&mut self, what: &str, value: String, note: &str) {
        self.rows.push([what.to_owned(), value, note.to_owned()]);
    }

    /// Columns as wide as their longest cell; values to the right.
    fn text(&self, title: &str) -> String {
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (what, value, note) = (width(0), width(1), width(2));
        let rule = format!("+{}+{}+{}+\n", "-".repeat(what + 2), "-".repeat(value + 2), "-".repeat(note + 2));
        let mut text = format!("\n{title}\n{rule}");
        for row in &self.rows {
            text += &format!("| {:<what$} | {:>value$} | {:<note$} |\n", row[0], row[1], row[2]);
        }
        text + &rule
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_lines_are_equally_long() {
        let mut table = Table::new();
        table.row("a", "1".into(), "note");
        table.row("longer", "100 s".into(), "");
        let text = table.text("title");
        let widths: Vec<usize> = text.lines().skip(2).map(|line| line.chars().count()).collect();
        assert!(widths.len() == 4 && widths.iter().all(|width| *width == widths[0]), "{text}");
    }
}
