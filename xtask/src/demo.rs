//! `cargo xtask demo`: a VM boots from a remote disk, and its back end is killed under it.

use guest_tests::fio;
use guest_tests::lab::Lab;
use guest_tests::qemu::Firmware;
use guest_tests::suite::{Served, boot, verify_options};
use guest_tests::{Result, progress};
use std::path::Path;
use std::time::Instant;

/// Seconds of each fio run.
const FIO_SECONDS: u64 = 5;
/// Seconds of the load under which the back end is killed.
const LOAD_SECONDS: u32 = 12;

/// Runs the demo and prints its table.
pub(crate) fn run() -> Result<()> {
    let lab = Lab::open()?;
    let started = Instant::now();
    let mut table = Table::new();

    progress("target daemon on loopback; the guest image goes to it over NVMe/TCP");
    let importing = Instant::now();
    let mut served = Served::start(&lab, 2, true)?;
    table.row(
        "image imported over NVMe/TCP",
        format!("{:.1} s", importing.elapsed().as_secs_f64()),
        &format!("{} MiB, verified", guest_tests::image::DISK_BYTES >> 20),
    );

    progress("QEMU boots from the disk, through SeaBIOS and GRUB");
    let folder = served.scratch().path().to_path_buf();
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

    progress("fio writes and verifies; kill -9 to the back end, and a new one");
    let load = fio::start(&mut guest, &verify_options(lab.accel, LOAD_SECONDS))?;
    served.serve.await_writes("disk0", 2000)?;
    served.serve.kill()?;
    progress("the back end is dead");
    served.serve.launch()?;
    progress("a new back end runs");
    let report =
        fio::finish(&mut guest, load, u64::from(LOAD_SECONDS)).map_err(|e| served.serve.explain(&e))?;
    table.row(
        "pause when the back end was killed",
        format!("{:.2} s", report.latency_max),
        "the longest request of that run",
    );
    table.row(
        "verify across the kill",
        "ok".into(),
        &format!("{:.0} reads and writes, fio's errors: {:.0}", report.ios, report.errors),
    );
    let errors = guest.io_errors()?;
    table.row("I/O errors in the guest's kernel log", errors.to_string(), "");

    progress("the end: VM, back end, target");
    let qemu = guest.pid();
    guest.sync_and_quit()?;
    served.stop()?;
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
            "hawser demo ({}, 2 queues, built for tests: speed is `cargo xtask bench`'s)",
            lab.accel
        ))
    );
    match (errors, left.is_empty()) {
        (0, true) => Ok(()),
        (0, false) => Err("something was left behind".into()),
        _ => Err(format!("the guest saw {errors} I/O errors")),
    }
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
