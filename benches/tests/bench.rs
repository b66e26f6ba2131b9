//! The bench runs from end to end, briefly, so that it cannot rot. Skipped, with the reason, without its two servers.

use std::path::{Path, PathBuf};
use std::process::Command;

use hawser_benches::sys::{find_program, spawn_group};

/// The binary to measure: `HAWSER_BIN`, or the one that cargo built beside ours.
fn hawser() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_BIN_EXE_bench")).with_file_name("hawser");
    std::env::var_os("HAWSER_BIN").map(PathBuf::from).or(Some(beside)).filter(|path| path.is_file())
}

#[test]
fn every_case_runs_briefly() {
    let Some(hawser) = hawser() else {
        println!(
            "SKIPPED every_case_runs_briefly: no hawser beside the tests; cargo build -p hawser, or HAWSER_BIN"
        );
        return;
    };
    if find_program("qemu-storage-daemon").is_none() {
        println!(
            "SKIPPED every_case_runs_briefly: no qemu-storage-daemon on PATH (Debian: qemu-system-common)"
        );
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.arg("--quick").arg("--hawser").arg(hawser);
    let mut bench = spawn_group(command, None).expect("the bench starts");
    let status = bench.inner().wait().expect("its status");
    assert!(status.success(), "a case did not run: {status}");
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
