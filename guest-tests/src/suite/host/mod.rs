//! The kernel's NVMe/TCP host against our target: one guest, one target, many checks.
//!
//! Owns: what the checks work with, and the line that each of them prints. Their shell functions are `guest/lib.sh`.
//! Invariants: a check begins without connections and with every path optimized; one that fails does not end the others.

#![forbid(unsafe_code)]

mod commands;
mod discovery;
mod paths;
mod reservations;

use super::Outcome;
use super::pieces::{LIBRARY, expect_no_trace};
use crate::Result;
use crate::daemon::Daemon;
use crate::lab::{Lab, NQN};
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

/// The subsystem that reservations are tried on, at two addresses.
const RESERVED: &str = "nqn.2026-11.io.hawser:reserved";
/// Host b's alone.
const CLOSED: &str = "nqn.2026-11.io.hawser:closed";
/// At the daemon that the first one refers hosts to.
const OTHER: &str = "nqn.2026-11.io.hawser:other";

const MIB: u64 = 1 << 20;
/// Size of the first namespace at the start.
const SIZE: u64 = 64 * MIB;

/// What a check works with. Field order is drop order.
struct Bench {
    guest: Qemu,
    target: Daemon,
    other: Daemon,
    /// Shell text that says NQNs and ports, and the library.
    prelude: String,
    scratch: Scratch,
}

type Check = (&'static str, fn(&mut Bench) -> Result<String>);

fn subsystem(nqn: &str, addresses: &[&str], devices: &[&str], more: &str) -> String {
    let listen: Vec<String> = addresses.iter().map(|address| format!("\"tcp://{address}:0\"")).collect();
    let mut text = format!("[[subsystem]]\nnqn = \"{nqn}\"\nlisten = [{}]\n{more}\n", listen.join(", "));
    for (nsid, device) in (1..).zip(devices) {
        text += &format!("[[subsystem.namespace]]\nnsid = {nsid}\ndevice = \"{device}\"\n\n");
    }
    text
}

fn device(name: &str, uri: &str, more: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\nuri = \"{uri}\"\n{more}\n")
}

fn file(path: &Path, bytes: u64) -> Result<String> {
    let made = File::create(path).and_then(|file| file.set_len(bytes));
    made.map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(format!("file://{}", path.display()))
}

impl Bench {
    fn start(lab: &Lab) -> Result<Bench> {
        let scratch = Scratch::new()?;
        let sections = device("n0", "mem:?size=32MiB", "") + &subsystem(OTHER, &["127.0.0.1"], &["n0"], "");
        let other = Daemon::start("other", &lab.hawser, scratch.path(), &sections)?;
        let sections = format!("[discovery]\nreferrals = [\"tcp://{}\"]\n\n", other.listener(OTHER)?)
            + &device("n0", &file(&scratch.file("n0.raw"), SIZE)?, "")
            + &device("n1", "mem:?size=64MiB", "block_size = 4096\n")
            + &device("r0", &file(&scratch.file("r0.raw"), 16 * MIB)?, "")
            + &device("c0", "mem:?size=16MiB", "")
            + &subsystem(NQN, &["127.0.0.1", "127.0.0.2"], &["n0", "n1"], "")
            + &subsystem(RESERVED, &["127.0.0.1", "127.0.0.2"], &["r0"], "")
            + &subsystem(
                CLOSED,
                &["127.0.0.1"],
                &["c0"],
                "allowed_hosts = [\"nqn.2014-08.org.nvmexpress:uuid:22222222-bbbb-4bbb-8bbb-222222222222\"]\n",
            );
        let target = Daemon::start("target", &lab.hawser, scratch.path(), &sections)?;
        for nqn in [NQN, RESERVED, CLOSED] {
            target.keep_ports(nqn)?;
        }

        let mut prelude = String::from("set -e\n");
        for (name, nqn, daemon) in
            [("N", NQN, &target), ("R", RESERVED, &target), ("C", CLOSED, &target), ("O", OTHER, &other)]
        {
            prelude += &format!("{name}={nqn}\n");
            for (number, listener) in (1..).zip(daemon.listeners(nqn)?) {
                let port = listener.rsplit_once(':').map(|(_, port)| port).unwrap_or_default();
                prelude += &format!("{name}{number}={port}\n");
            }
        }
        prelude += ". /run/lib.sh\n";

        let mut guest =
            Qemu::from_kernel("host", &lab.image, scratch.path(), lab.accel, &[], &["-smp", "2"])?;
        // Discovery names the addresses that the target listens at, 127.0.0.1 and 127.0.0.2: the guest sends what is for them
        // out, where QEMU connects to the same ones of this machine.
        guest.run(&format!(
            "set -e; cat > /run/lib.sh <<'END'\n{LIBRARY}\nEND
            ip addr del 127.0.0.1/8 dev lo; echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet
            ip route add 127.0.0.0/8 via 10.0.2.2; modprobe nvme-tcp"
        ))?;
        Ok(Bench { guest, target, other, prelude, scratch })
    }

    /// Runs a script with the library, within `seconds` as [`Qemu::run_for`] counts them.
    fn run_for(&mut self, script: &str, seconds: u64) -> Result<String> {
        let started = self.guest.shell().start(&format!("{}{script}", self.prelude))?;
        let deadline = crate::process::Deadline::new(seconds * self.guest.patience(), "a check's script");
        let finished = self.guest.shell().finish(started, &deadline).map_err(|e| self.guest.explain(&e))?;
        let output = finished.output.trim_end().to_owned();
        if finished.status == 0 { Ok(output) } else { Err(format!("status {}: {output}", finished.status)) }
    }

    fn run(&mut self, script: &str) -> Result<String> {
        self.run_for(script, 20)
    }

    /// How well the first subsystem's namespaces are reached at its address number `port`.
    fn set_ana(&mut self, port: u32, state: &str) -> Result<()> {
        let path = format!("/v1/subsystems/{NQN}/ports/{port}/ana_groups/1");
        self.target.put(&path, &format!("{{\"ana_state\":\"{state}\"}}"))
    }

    fn check(&mut self, check: fn(&mut Bench) -> Result<String>) -> Result<String> {
        self.run("nvme disconnect-all; dmesg -c > /dev/null")?;
        for port in 0..2 {
            self.set_ana(port, "optimized")?;
        }
        let result = check(self);
        self.target.must_live()?;
        self.other.must_live()?;
        result
    }
}

/// All checks; one line for each.
pub(super) fn checks(lab: &Lab) -> Result<Outcome> {
    let mut bench = Bench::start(lab)?;
    let (mut passed, mut failed) = (0, Vec::new());
    for (name, check) in [discovery::CHECKS, commands::CHECKS, paths::CHECKS, reservations::CHECKS].concat() {
        let started = Instant::now();
        match bench.check(check) {
            Ok(what) => {
                passed += 1;
                println!("    {name} ... ok ({what}; {:.1} s)", started.elapsed().as_secs_f64());
            }
            Err(error) => {
                println!("    {name} ... FAILED: {error}");
                failed.push(name);
                if error.contains("interrupted") {
                    return Err(error);
                }
            }
        }
    }
    bench.run("nvme disconnect-all")?;
    if !failed.is_empty() {
        return Err(bench.target.explain(&bench.guest.explain(&format!("failed: {}", failed.join(", ")))));
    }
    let Bench { guest, mut target, mut other, .. } = bench;
    guest.quit()?;
    target.terminate()?;
    other.terminate()?;
    Ok(Outcome::Passed(format!("{passed} checks")))
}
