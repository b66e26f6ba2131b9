//! Our initiator and the kernel's target: two ports, digests, several queues, under a VM's verified load.

#![forbid(unsafe_code)]

use super::Outcome;
use super::pieces::{
    DISK, KernelTarget, LIBRARY, boot, expect_no_trace, host_section, import, multipath_sections,
};
use crate::Result;
use crate::daemon::Daemon;
use crate::image::DISK_BYTES;
use crate::lab::{Lab, NQN};
use crate::process::{Deadline, output};
use crate::qemu::{Firmware, Qemu};
use crate::scratch::Scratch;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// Field order is drop order.
struct Bench {
    vm: Qemu,
    serve: Daemon,
    target: KernelTarget,
}

impl Bench {
    /// Runs a script in the VM, with the library.
    fn vm(&mut self, script: &str) -> Result<String> {
        let script = format!(
            "set -e; . /run/lib.sh
            ios() {{ awk '{{print $1 + $5}}' /sys/block/vda/stat; }}
            {script}"
        );
        self.vm.run_for(&script, 20).map_err(|e| self.serve.explain(&e))
    }

    /// Waits until the device's path number `index` is `state` and the target says `ana` of it.
    fn await_path(&mut self, index: usize, state: &str, ana: &str) -> Result<()> {
        let deadline = Deadline::new(30, format!("path {index} to be {state} and {ana}"));
        loop {
            self.serve.must_live()?;
            let status = self.serve.status()?;
            let path = format!("devices.0.paths.{index}");
            let found = (status.text(&format!("{path}.state"))?, status.text(&format!("{path}.ana")));
            if found.0 == state && (state != "live" || found.1 == Ok(ana)) {
                return Ok(());
            }
            deadline.nap().map_err(|e| self.serve.explain(&format!("{e}; it is {found:?}")))?;
        }
    }

    fn set_ana(&mut self, port: usize, state: &str) -> Result<()> {
        self.target.run(&format!("echo {state} > ports/{port}/ana_groups/1/ana_state"))?;
        self.await_path(port - 1, "live", state)
    }

    /// The VM's load makes progress, or makes none.
    fn busy(&mut self) -> Result<()> {
        self.vm("loading; busy vda").map(drop)
    }

    fn waits(&mut self) -> Result<()> {
        self.vm("loading; usleep 300000; idle vda").map(drop)
    }
}

pub(super) fn follows(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let mut target = KernelTarget::start(lab, &scratch, DISK_BYTES)?;
    import(lab, &scratch, &target.uri(), false)?;
    discovery(lab, &mut target)?;
    let uris = target.uris_with_digests();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let sections = if cpus > 1 { "reactors = [0, 1]\n\n" } else { "" }.to_owned()
        + &host_section()
        + &multipath_sections(scratch.path(), DISK, &[&uris[0], &uris[1]], None, 4);
    let mut serve = Daemon::start("serve", &lab.hawser, scratch.path(), &sections)?;
    serve.await_disk(DISK, "listening")?;
    let mut vm = boot(lab, "multi-queue.cfg", Firmware::SeaBios, scratch.path(), &["-smp", "2"])?;
    vm.run(&format!("cat > /run/lib.sh <<'END'\n{LIBRARY}\nEND"))?;
    let mut bench = Bench { vm, serve, target };
    for path in 0..2 {
        bench.await_path(path, "live", "optimized")?;
    }
    bench.vm("load vda3; busy vda")?;
    states(&mut bench)?;
    ports(&mut bench)?;
    let grown = grows(&mut bench)?;
    bench.vm("loaded; verify vda3; sync")?;
    // What was discarded is given back on the way down; nvmet does not promise zeroes.
    bench.vm("blkdiscard -o 1048576 -l 4194304 /dev/vda3")?;
    expect_no_trace(&mut bench.vm)?;
    let Bench { vm, mut serve, .. } = bench;
    vm.sync_and_quit()?;
    serve.terminate()?;
    let reservations = match lab.image.kernel_version.as_str() {
        version @ ("6.1" | "6.12") => {
            format!("its reservations not tried: {version} has none, they came with 6.13")
        }
        version => return Err(format!("{version} has reservations, and this test does not try them")),
    };
    Ok(Outcome::Passed(format!(
        "digests, 4 queues, 10 ANA changes, a port gone and back, {grown} MiB more; {reservations}"
    )))
}

/// What nvmet's discovery says, a referral too.
fn discovery(lab: &Lab, target: &mut KernelTarget) -> Result<()> {
    target.run(
        "mkdir ports/1/referrals/other; cd ports/1/referrals/other
        echo tcp > addr_trtype; echo ipv4 > addr_adrfam; echo 192.0.2.7 > addr_traddr; echo 8009 > addr_trsvcid
        echo 1 > enable",
    )?;
    let at = format!("tcp://127.0.0.1:{}", target.port());
    let found = output(Command::new(&lab.hawser).args(["device", "discover", &at]))?;
    target.run("rmdir ports/1/referrals/other")?;
    match found.contains(NQN) && found.contains("192.0.2.7") {
        true => Ok(()),
        false => Err(format!("device discover: {found}")),
    }
}

fn states(bench: &mut Bench) -> Result<()> {
    for (port, state) in [
        (1, "inaccessible"),
        (1, "non-optimized"),
        (2, "persistent-loss"),
        (2, "optimized"),
        (1, "change"),
        (1, "optimized"),
    ] {
        bench
            .set_ana(port, state)
            .and_then(|()| bench.busy())
            .map_err(|e| format!("port {port} {state}: {e}"))?;
    }
    // No path: the VM waits, and sees no error.
    bench.set_ana(1, "inaccessible")?;
    bench.set_ana(2, "inaccessible")?;
    bench.waits()?;
    bench.set_ana(2, "optimized")?;
    bench.busy()?;
    bench.set_ana(1, "optimized")
}

/// A port is taken away under load, with its associations, and comes back; then the other one.
fn ports(bench: &mut Bench) -> Result<()> {
    for port in 1..=2 {
        bench.target.run(&format!("rm ports/{port}/subsystems/{NQN}"))?;
        bench.await_path(port - 1, "connecting", "")?;
        bench.busy()?;
        bench
            .target
            .run(&format!("ln -s /sys/kernel/config/nvmet/subsystems/{NQN} ports/{port}/subsystems/"))?;
        bench.await_path(port - 1, "live", "optimized")?;
    }
    Ok(())
}

/// The namespace grows; the VM sees it and uses its new end.
fn grows(bench: &mut Bench) -> Result<u64> {
    let bytes = DISK_BYTES + 16 * MIB;
    bench.target.guest()?.monitor("block_resize", &format!("{{\"device\":\"data\",\"size\":{bytes}}}"))?;
    bench.target.run(&format!("echo 1 > subsystems/{NQN}/namespaces/1/revalidate_size"))?;
    bench.vm(&format!(
        "grown() {{ [ $(cat /sys/block/vda/size) = {} ]; }}; within 30 grown
        dd if=/dev/urandom of=/run/new bs=1M count=1 2> /dev/null
        dd if=/run/new of=/dev/vda bs=1M seek={last} oflag=direct conv=notrunc 2> /dev/null
        dd if=/dev/vda bs=1M skip={last} iflag=direct 2> /dev/null | cmp - /run/new",
        bytes / 512,
        last = bytes / MIB - 1
    ))?;
    Ok(16)
}
