//! The guest tests: their list, and the run that prints one line per test and a count at the end.

#![forbid(unsafe_code)]

mod boot;
mod initiator;
mod migration;
mod other;
pub(crate) mod pieces;
mod reboot;
mod resize;
mod restart;

use crate::Result;
use crate::lab::Lab;
use std::time::Instant;

pub use pieces::{Served, boot, verify_options};

/// How a test ended, other than by an error.
pub enum Outcome {
    /// It passed; the text is what it measured.
    Passed(String),
    /// It cannot run here; the text says why.
    Skipped(String),
}

type Body = fn(&Lab) -> Result<Outcome>;

/// One guest test.
pub struct Test {
    /// Its name: the case and the outcome.
    pub name: &'static str,
    body: Body,
}

/// All guest tests, in the order in which they run.
pub const TESTS: &[Test] = &[
    Test { name: "control_seabios_boots_from_qemu_storage_daemon", body: other::control },
    Test { name: "control_kernel_initiator_verifies_on_kernel_target", body: other::control_kernels },
    Test { name: "seabios_boots_from_our_target", body: boot::seabios_ours },
    Test { name: "ovmf_boots_from_our_target", body: boot::ovmf_ours },
    Test { name: "two_disks_with_several_queues_are_told_apart", body: boot::two_disks },
    Test { name: "three_reboots_and_other_queue_sizes_come_up_again", body: reboot::reboots },
    Test { name: "a_disk_that_grows_is_seen_by_its_guest_without_a_reboot", body: resize::grows },
    Test { name: "a_vm_migrates_to_and_fro_under_load_and_loses_nothing", body: migration::migrates },
    Test { name: "twenty_kills_under_load_lose_nothing", body: restart::kills },
    Test { name: "kills_of_a_file_s_owner_under_load_lose_nothing", body: restart::kills_of_file_owner },
    Test { name: "sigterm_and_newer_binary_under_load_lose_nothing", body: restart::upgrades },
    Test { name: "seabios_boots_from_kernel_target_that_restarts_under_load", body: boot::seabios_kernel },
    Test { name: "ovmf_boots_from_kernel_target", body: boot::ovmf_kernel },
    Test { name: "kernel_initiator_verifies_on_our_target_that_restarts", body: initiator::kernel_initiator },
    Test { name: "a_minute_of_every_fault_loses_nothing", body: crate::soak::a_minute },
    Test { name: "cloud_hypervisor_boots_from_our_target", body: other::cloud_hypervisor },
];

/// Counts of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Passed.
    pub passed: u64,
    /// Failed.
    pub failed: u64,
    /// Skipped, with the reason printed.
    pub skipped: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// Runs the tests whose names contain `filter`; an interruption ends the run.
pub fn run(lab: &Lab, filter: &str) -> Result<Counts> {
    if !TESTS.iter().any(|test| test.name.contains(filter)) {
        return Err(format!("no guest test has {filter:?} in its name"));
    }
    let mut counts = Counts::default();
    for test in TESTS.iter().filter(|test| test.name.contains(filter)) {
        let started = Instant::now();
        let result = (test.body)(lab);
        let seconds = started.elapsed().as_secs_f64();
        match result {
            Ok(Outcome::Passed(what)) => {
                counts.passed += 1;
                println!("guest {} ... ok ({what}; {seconds:.1} s)", test.name);
            }
            Ok(Outcome::Skipped(reason)) => {
                counts.skipped += 1;
                println!("guest {} ... skipped ({reason})", test.name);
            }
            Err(error) => {
                counts.failed += 1;
                println!("guest {} ... FAILED ({seconds:.1} s)\n    {error}", test.name);
                if error.contains("interrupted") {
                    return Err("interrupted".into());
                }
            }
        }
    }
    Ok(counts)
}
