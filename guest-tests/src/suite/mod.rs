//! The guest tests: their list, and the run that prints one line per test and a count at the end.

#![forbid(unsafe_code)]

mod boot;
mod clones;
mod host;
mod initiator;
mod migration;
mod nvmet;
mod other;
pub(crate) mod pieces;
mod placement;
mod pools;
mod queues;
mod rdma;
mod reboot;
mod resize;
mod restart;
mod small_writes;
mod stuck;

use crate::Result;
use crate::image::Release;
use crate::lab::Lab;
use crate::qemu::EMULATORS_FAULT;
use std::time::Instant;

pub use pieces::{Served, boot, verify_options};
pub use small_writes::lines as md_small_writes;

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
    /// The kernels of its guests: it runs once with each.
    kernels: &'static [Release],
    body: Body,
}

const OLD: &[Release] = &[Release::Bookworm];
const NEW: &[Release] = &[Release::Trixie];
const BOTH: &[Release] = &[Release::Bookworm, Release::Trixie];

/// All guest tests, in the order in which they run.
pub const TESTS: &[Test] = &[
    test("control_seabios_boots_from_qemu_storage_daemon", OLD, other::control),
    test("control_kernel_initiator_verifies_on_kernel_target", OLD, other::control_kernels),
    test("seabios_boots_from_our_target", OLD, boot::seabios_ours),
    test("ovmf_boots_from_our_target", NEW, boot::ovmf_ours),
    test("two_disks_with_several_queues_are_told_apart", NEW, boot::two_disks),
    test("firmware_and_kernel_use_other_queues_of_one_disk", BOTH, queues::matrix),
    test("three_reboots_and_other_queue_sizes_come_up_again", NEW, reboot::reboots),
    test("a_disk_that_grows_is_seen_by_its_guest_without_a_reboot", BOTH, resize::grows),
    test("a_vm_migrates_to_and_fro_under_load_and_loses_nothing", NEW, migration::migrates),
    test("twenty_kills_under_load_lose_nothing", OLD, restart::kills),
    test("kills_of_a_file_s_owner_under_load_lose_nothing", NEW, restart::kills_of_file_owner),
    test("sigterm_and_newer_binary_under_load_lose_nothing", NEW, restart::upgrades),
    test("a_vm_is_stopped_in_time_though_its_target_does_not_answer", NEW, stuck::stops),
    test("seabios_boots_from_kernel_target_that_restarts_under_load", OLD, boot::seabios_kernel),
    test("ovmf_boots_from_kernel_target", NEW, boot::ovmf_kernel),
    test("our_initiator_follows_the_kernel_target_s_paths", BOTH, nvmet::follows),
    test("kernel_initiator_verifies_on_our_target_that_restarts", BOTH, initiator::kernel_initiator),
    test("our_initiator_over_rdma_verifies_on_the_kernel_target", BOTH, rdma::initiator),
    test("our_initiator_over_rdma_goes_on_when_the_link_was_down", NEW, rdma::link_down),
    test("kernel_initiator_over_rdma_verifies_on_our_target_that_restarts", BOTH, rdma::target_of_ours),
    test("linux_md_reads_what_pools_wrote", OLD, placement::md),
    test("linux_md_counts_its_small_writes", OLD, small_writes::count),
    test("a_vm_boots_from_a_raid1_pool_while_a_member_dies_and_returns", NEW, pools::raid1),
    test("a_vm_boots_from_a_raid10_pool_while_a_member_dies_and_returns", OLD, pools::raid10),
    test("a_vm_boots_from_a_raid5_pool_while_a_member_dies_and_returns", OLD, pools::raid5),
    test("a_vm_boots_from_a_raid6_pool_while_a_member_dies_and_returns", OLD, pools::raid6),
    test("a_kernel_target_and_one_of_ours_mirror_each_other", NEW, pools::kernel_member),
    test("ten_vms_boot_from_ten_clones_of_one_image", OLD, clones::ten),
    test("a_minute_of_every_fault_loses_nothing", NEW, crate::soak::a_minute),
    test("kernel_host_finds_our_target_as_the_table_says", BOTH, host::checks),
    test("cloud_hypervisor_boots_from_our_target", OLD, other::cloud_hypervisor),
];

const fn test(name: &'static str, kernels: &'static [Release], body: Body) -> Test {
    Test { name, kernels, body }
}

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

/// Runs the tests whose names contain `filter`, each with its kernels; an interruption ends the run.
pub fn run(lab: &mut Lab, filter: &str) -> Result<Counts> {
    if !TESTS.iter().any(|test| test.name.contains(filter)) {
        return Err(format!("no guest test has {filter:?} in its name"));
    }
    let mut counts = Counts::default();
    for test in TESTS.iter().filter(|test| test.name.contains(filter)) {
        for kernel in test.kernels {
            let started = Instant::now();
            let mut result = lab.use_kernel(*kernel).and_then(|()| (test.body)(lab));
            if let Err(error) = &result
                && error.contains(EMULATORS_FAULT)
            {
                println!("guest {}: once more: {error}", test.name);
                result = (test.body)(lab);
            }
            let seconds = started.elapsed().as_secs_f64();
            let name = match lab.image.release == *kernel {
                true => format!("{} (Linux {})", test.name, lab.image.kernel_version),
                false => format!("{} ({kernel})", test.name),
            };
            match result {
                Ok(Outcome::Passed(what)) => {
                    counts.passed += 1;
                    println!("guest {name} ... ok ({what}; {seconds:.1} s)");
                }
                Ok(Outcome::Skipped(reason)) => {
                    counts.skipped += 1;
                    println!("guest {name} ... skipped ({reason})");
                }
                Err(error) => {
                    counts.failed += 1;
                    println!("guest {name} ... FAILED ({seconds:.1} s)\n    {error}");
                    if error.contains("interrupted") {
                        return Err("interrupted".into());
                    }
                }
            }
        }
    }
    Ok(counts)
}
