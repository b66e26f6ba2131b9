//! The bench runs from end to end, briefly, so that it cannot rot. Skipped, with the reason, without its two servers.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hawser_benches::sys::{TempDir, find_program, spawn_group};

/// The binary to measure: `HAWSER_BIN`, or the one that cargo built beside ours.
fn hawser() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_BIN_EXE_bench")).with_file_name("hawser");
    std::env::var_os("HAWSER_BIN").map(PathBuf::from).or(Some(beside)).filter(|path| path.is_file())
}

/// The binary to measure, where the rival is there too; else says that the test is skipped.
#[track_caller]
fn both_servers() -> Option<PathBuf> {
    let Some(hawser) = hawser() else {
        skips::skip("no hawser beside the tests; cargo build -p hawser, or HAWSER_BIN");
        return None;
    };
    if find_program("qemu-storage-daemon").is_none() {
        skips::skip("no qemu-storage-daemon on PATH (Debian: qemu-system-common)");
        return None;
    }
    Some(hawser)
}

#[test]
fn every_case_runs_briefly() {
    let Some(hawser) = both_servers() else { return };
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.arg("--quick").arg("--hawser").arg(hawser);
    let mut bench = spawn_group(command, None).expect("the bench starts");
    let status = bench.inner().wait().expect("its status");
    assert!(status.success(), "a case did not run: {status}");
}

/// Stands in for a fio that has the engine libblkio, which no package has: it refuses what that engine would refuse (no
/// driver, a path without a socket, an option that it does not have), writes down its arguments, and reports 123456 IOPS.
const FIO: &str = r#"#!/bin/sh
case "$1" in
--enghelp) printf 'Available IO engines:\n\tio_uring\n\tlibblkio\n'; exit 0 ;;
--version) echo fio-3.40; exit 0 ;;
esac
driver= path= wait= hipri=0
for argument; do
    case "$argument" in
    --libblkio_driver=virtio-blk-vhost-user) driver=1 ;;
    --libblkio_path=*) path=${argument#*=} ;;
    --libblkio_wait_mode=eventfd | --libblkio_wait_mode=block | --libblkio_wait_mode=loop) wait=${argument#*=} ;;
    --hipri=[01]) hipri=${argument#*=} ;;
    --ioengine=libblkio | --name=* | --thread=1 | --time_based=1 | --runtime=* | --output-format=json) ;;
    --rw=* | --bs=* | --iodepth=* | --iodepth_batch_complete_max=* | --cpus_allowed=*) ;;
    *) echo "fio: unrecognized option '$argument'" >&2; exit 1 ;;
    esac
done
[ "$driver" ] || { echo 'fio: engine libblkio requires option libblkio_driver to be set' >&2; exit 1; }
[ -S "$path" ] || { echo "fio: blkio_connect() failed: $path" >&2; exit 1; }
[ "$wait$hipri" != eventfd1 ] || { echo 'fio: option hipri is incompatible with libblkio_wait_mode=eventfd' >&2; exit 1; }
echo "$@" >> "$0.calls"
cat << 'END'
fio: a note before the report
{"fio version": "fio-3.40", "jobs": [{"jobname": "bench",
  "read": {"total_ios": 123456, "iops": 123456.0, "clat_ns": {"percentile":
    {"50.000000": 7000, "99.000000": 8000, "99.900000": 9000}}},
  "write": {"total_ios": 0, "iops": 0.0}}]}
END
"#;

#[test]
fn a_fio_with_the_engine_is_taken_and_asked_for_the_same_load() {
    let Some(hawser) = both_servers() else {
        return;
    };
    let (folder, report) = bench_beside_fio(&hawser, FIO, "null/randread-4k/qd32/poll100");
    assert!(report.contains("- load: fio-3.40 with the engine libblkio, completions by eventfd"), "{report}");
    assert!(report.contains("| 123k ±0%") && report.contains("7.0 / 8.0 / 9.0"), "{report}");

    let calls = std::fs::read_to_string(folder.path().join("fio.calls")).expect("it was called");
    let calls: Vec<Vec<&str>> = calls.lines().map(|line| line.split(' ').collect()).collect();
    assert_eq!(calls.len(), 2, "one sample of each server: {calls:?}");
    let path_of = |call: &[&str]| {
        call.iter().find(|argument| argument.starts_with("--libblkio_path=")).map(|p| (*p).to_owned())
    };
    assert_ne!(path_of(&calls[0]), path_of(&calls[1]), "two servers");
    for call in &calls {
        for want in [
            "--ioengine=libblkio",
            "--libblkio_driver=virtio-blk-vhost-user",
            "--libblkio_wait_mode=eventfd",
            "--hipri=0",
            "--thread=1",
            "--time_based=1",
            "--runtime=1",
            "--rw=randread",
            "--bs=4k",
            "--iodepth=32",
            "--iodepth_batch_complete_max=32",
            "--cpus_allowed=1",
            "--output-format=json",
        ] {
            assert!(call.contains(&want), "{want} is not in {call:?}");
        }
    }
}

/// Runs a moment of one case with this script as the `fio` on PATH; its folder, and the report.
fn bench_beside_fio(hawser: &Path, script: &str, case: &str) -> (TempDir, String) {
    let folder = TempDir::new(None).expect("a temporary folder");
    let fio = folder.path().join("fio");
    std::fs::write(&fio, script).expect("written");
    std::fs::set_permissions(&fio, std::fs::Permissions::from_mode(0o755)).expect("made a program");
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").expect("PATH"));
    let report = folder.path().join("report.md");
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--quick", "--only", case, "--out"])
        .arg(&report)
        .arg("--hawser")
        .arg(hawser)
        .env("PATH", path)
        .output()
        .expect("the bench runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = std::fs::read_to_string(report).expect("a report");
    (folder, report)
}

#[test]
fn a_fio_without_the_engine_is_left_alone() {
    let Some(hawser) = both_servers() else { return };
    let without = FIO.replace("\\tlibblkio", "\\tlibaio");
    let (folder, report) = bench_beside_fio(&hawser, &without, "null/randread-4k/qd1/poll0");
    assert!(report.contains("- load: blkclient (crate blkio)"), "{report}");
    assert!(!folder.path().join("fio.calls").exists());
}

#[test]
fn what_is_wrong_is_named() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_bench")).args(["--hawser", "/nonexistent"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--hawser /nonexistent: not there"));
    let output = Command::new(env!("CARGO_BIN_EXE_bench")).args(["--rounds=0"]).output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
}
