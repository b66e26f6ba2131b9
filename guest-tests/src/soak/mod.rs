//! `cargo xtask soak`: a VM and verifying clients for minutes, while everything between them and their blocks is killed, cut,
//! stalled, corrupted, grown and moved, as a seed says. Ends with counts.
//!
//! Must not know: hawser's crates. Invariant: each fault is over before the next begins, but for those of links under a client;
//! and after each the VM gets on.

#![forbid(unsafe_code)]

mod world;

use crate::json::Json;
use crate::lab::{Lab, cargo, target};
use crate::process::{Deadline, Process, run};
use crate::qemu::Cancelled;
use crate::suite::Outcome;
use crate::suite::pieces::DISK;
use crate::{Result, fio, progress};
use faults::{Act, Cut, Door, Pdu, Rule, Way, kind, opcode};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};
use world::{EXTRA, World};

/// What a soak found.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests of the VM and of the clients.
    ios: f64,
    /// By kind.
    faults: BTreeMap<&'static str, u32>,
    /// That the VM or a client has seen, and what did not get on.
    errors: Vec<String>,
    /// Loads that found a block that was not what was written: each ends at its first.
    mismatches: u32,
}

impl Counts {
    /// Whether nothing was lost.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.errors.is_empty() && self.mismatches == 0
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "I/Os verified: {:.0}", self.ios)?;
        let all: u32 = self.faults.values().sum();
        writeln!(f, "faults: {all}")?;
        for (kind, count) in &self.faults {
            writeln!(f, "  {kind:<28} {count}")?;
        }
        writeln!(f, "errors seen by guests: {}", self.errors.len())?;
        for error in &self.errors {
            writeln!(f, "  {error}")?;
        }
        write!(
            f,
            "loads that read other than they wrote (each ends at its first such block): {}",
            self.mismatches
        )
    }
}

/// A seeded stream of numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % bound
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        let at = self.below(of.len() as u64);
        of[usize::try_from(at).unwrap_or(0)]
    }

    /// Between the two, in milliseconds.
    fn between(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// What is done to the VM's world, when no client is there.
#[derive(Clone, Copy)]
enum Blow {
    Link,
    KillDaemon,
    EndDaemon,
    KillTarget,
    KillBoth,
    Client,
    Migrate,
    Grow,
}

/// Half of all are the cheap ones.
const BLOWS: [Blow; 16] = [
    Blow::Link,
    Blow::Link,
    Blow::Link,
    Blow::Link,
    Blow::Link,
    Blow::Link,
    Blow::Link,
    Blow::Link,
    Blow::KillDaemon,
    Blow::EndDaemon,
    Blow::KillTarget,
    Blow::KillBoth,
    Blow::Client,
    Blow::Client,
    Blow::Migrate,
    Blow::Grow,
];

/// How many writes the VM must get done after each blow.
const WRITES: u32 = 20;
/// How long the last blow may last, in which the load goes on.
const LAST_SECONDS: u32 = 60;
/// What the VM writes: from what goes in a capsule to several R2Ts and H2CData, a part of whose digests may be wrong.
const SIZES: &str = "--bssplit=4k/60:64k/25:512k/10:1m/5 --verify_interval=4k";
/// How long a client runs.
const CLIENT_SECONDS: u32 = 6;

struct Soak {
    world: World,
    random: Random,
    counts: Counts,
    clients: u64,
}

/// Runs for `minutes`; the seed says what happens in which order.
///
/// # Errors
/// When the world cannot be set up. What goes wrong later is in the counts.
pub fn soak(lab: &Lab, minutes: u32, seed: u64) -> Result<Counts> {
    progress("build: blkclient");
    run(cargo().args(["build", "--package", "hawser-benches", "--bin", "blkclient"]))?;
    println!("soak: {minutes} min, seed {seed}");
    let world = World::start(lab)?;
    let mut soak = Soak { world, random: Random(seed | 1), counts: Counts::default(), clients: 0 };
    let seconds = minutes * 60;
    let options = crate::suite::verify_options(lab.accel, seconds + LAST_SECONDS).replace("--bs=4k", SIZES);
    let load = fio::start(&mut soak.world.guest, &options)?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(u64::from(seconds)) {
        let mut result = soak.blow();
        // Without a load there is nothing to get on with.
        if result.is_ok() && begun.elapsed() < Duration::from_secs(u64::from(seconds + LAST_SECONDS / 2)) {
            result = soak.world.serve.await_writes(DISK, WRITES);
        }
        if let Err(error) = result {
            soak.failed(&error);
            break;
        }
    }
    soak.world.heal();
    match fio::finish(&mut soak.world.guest, load, u64::from(seconds + LAST_SECONDS)) {
        Ok(report) => soak.counts.ios += report.ios,
        Err(error) => soak.failed(&error),
    }
    if let Err(error) = soak.look() {
        soak.failed(&error);
    }
    if soak.counts.is_good() {
        soak.world.stop()?;
    }
    Ok(soak.counts)
}

/// The guest test: seeds differ from run to run, and are printed.
pub(crate) fn a_minute(lab: &Lab) -> Result<Outcome> {
    let seed = seed_of_now();
    let counts = soak(lab, 1, seed)?;
    let faults: u32 = counts.faults.values().sum();
    match counts.is_good() {
        true => Ok(Outcome::Passed(format!("seed {seed}; {faults} faults, {:.0} I/Os verified", counts.ios))),
        false => Err(format!("seed {seed}\n{counts}")),
    }
}

/// Another one each time.
#[must_use]
pub fn seed_of_now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.as_secs() << 10 | u64::from(now.subsec_millis())
}

impl Soak {
    fn failed(&mut self, error: &str) {
        // fio's words, and blkclient's.
        if ["verify: ", "verify failed", "expected 0x"].iter().any(|words| error.contains(words)) {
            self.counts.mismatches += 1;
        }
        self.counts.errors.push(self.world.serve.explain(&self.world.target.explain(error)));
    }

    fn count(&mut self, kind: &'static str) {
        progress(kind);
        *self.counts.faults.entry(kind).or_default() += 1;
    }

    /// What the guest has seen, once its load has ended.
    fn look(&mut self) -> Result<()> {
        let errors = self.world.guest.io_errors()?;
        if errors != 0 {
            return Err(format!("{errors} I/O errors in the guest's kernel log"));
        }
        let sectors = (self.world.disk_bytes / 512).to_string();
        let deadline = Deadline::new(30, format!("the guest to see {sectors} sectors"));
        while self.world.guest.run("cat /sys/block/vda/size")? != sectors {
            deadline.nap()?;
        }
        Ok(())
    }

    /// One blow.
    fn blow(&mut self) -> Result<()> {
        match self.random.one(&BLOWS) {
            Blow::Link => self.link()?,
            Blow::KillDaemon => {
                self.count("daemon killed");
                self.world.serve.kill()?;
                self.world.serve.launch()?;
            }
            Blow::EndDaemon => {
                self.count("daemon restarted in order");
                self.world.serve.terminate()?;
                self.world.serve.launch()?;
            }
            Blow::KillTarget => {
                self.count("target killed");
                self.world.target.kill()?;
                std::thread::sleep(self.random.between(1, 1000));
                self.world.launch_target()?;
            }
            Blow::KillBoth => {
                self.count("daemon and target killed");
                self.world.serve.kill()?;
                self.world.target.kill()?;
                self.world.launch_target()?;
                self.world.serve.launch()?;
            }
            Blow::Client => self.client()?,
            Blow::Migrate if self.random.below(3) == 0 => {
                self.count("migration cancelled");
                let when = self.random.one(&[Cancelled::WhileCopying, Cancelled::BeforeSwitchover]);
                self.world.guest.migrate_and_cancel(when)?;
            }
            Blow::Migrate => {
                self.count("migration");
                self.world.guest.migrate()?;
            }
            Blow::Grow => {
                self.count("disk grown");
                self.world.grow()?;
            }
        }
        Ok(())
    }

    /// Adds a disk, lets a client write and verify on it under faults of its links, and removes it.
    fn client(&mut self) -> Result<()> {
        self.count("disk added and removed");
        let socket = self.world.socket(EXTRA).display().to_string();
        self.world.serve.command(&["disk", "add", EXTRA, "--device", EXTRA, "--socket", &socket])?;
        self.world.serve.await_disk(EXTRA, "listening")?;
        self.clients += 1;
        let mut client = Command::new(target().join("debug/blkclient"));
        client.arg(format!("--path={socket}")).args([
            "--rw=randrw",
            "--iodepth=16",
            "--verify=crc32c",
            "--time_based",
            "--stall_timeout=100s",
            "--json",
        ]);
        client.arg(format!("--bs={}", self.random.one(&["4k", "64k", "512k", "1m"])));
        client.arg(format!("--runtime={CLIENT_SECONDS}")).arg(format!("--randseed={}", self.clients));
        let log = self.world.log(&format!("client{}", self.clients));
        let mut client = Process::start(client, &log)?;
        while client.poll()?.is_none() {
            if self.random.below(6) == 0 {
                self.count("target killed");
                self.world.target.kill()?;
                self.world.launch_target()?;
            } else {
                self.link()?;
            }
        }
        let status = client.wait(1)?;
        if !status.success() {
            return Err(format!("blkclient: {}{}", crate::process::describe(status), client.log_tail()));
        }
        let text = std::fs::read_to_string(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let report = Json::parse(text.lines().last().unwrap_or_default())?;
        self.counts.ios += report.number("iops")? * report.number("seconds")?;
        self.world.serve.command(&["disk", "remove", EXTRA]).map(drop)
    }

    /// A fault of one link, or of both.
    fn link(&mut self) -> Result<()> {
        let at = usize::from(self.random.below(2) == 0);
        match self.random.below(8) {
            0 => {
                self.count("link cut");
                let cuts =
                    [Cut::Reset, Cut::ResetHost, Cut::ResetTarget, Cut::Fin, Cut::FinHost, Cut::FinTarget];
                let cut = self.random.one(&cuts);
                self.world.proxies[at].cut(cut);
            }
            1 => {
                self.count("link cut within a PDU");
                let (after, cut) = (self.random.below(5000), self.random.one(&[Cut::Reset, Cut::Fin]));
                let after = usize::try_from(after).unwrap_or(0);
                let mut done = false;
                let rule = self.world.proxies[at].rule(move |pdu| {
                    let cuts = !done && pdu.bytes.len() > after;
                    done |= cuts;
                    cuts.then_some(Act::CutAfter(after, cut))
                });
                self.last(rule, 500);
            }
            2 => {
                self.count("link away");
                let door = self.random.one(&[Door::Refuse, Door::Silent]);
                self.world.proxies[at].set_door(door);
                self.world.proxies[at].cut(Cut::Reset);
                std::thread::sleep(self.random.between(100, 3000));
                self.world.heal();
                // Those that were taken in and told nothing.
                self.world.proxies[at].cut(Cut::Reset);
            }
            3 => {
                self.count("both links away");
                for proxy in &self.world.proxies {
                    proxy.set_door(Door::Refuse);
                    proxy.cut(Cut::Reset);
                }
                std::thread::sleep(self.random.between(100, 4000));
                self.world.heal();
            }
            4 => {
                self.count("link stalled");
                let way = self.random.one(&[Way::ToTarget, Way::ToHost]);
                let rule = self.world.proxies[at].rule(move |pdu| (pdu.way == way).then_some(Act::Hold(0)));
                self.last(rule, 6000);
            }
            5 => {
                self.count("link slow");
                let delay = self.random.between(1, 20);
                let rule = self.world.proxies[at].rule(move |_| Some(Act::Delay(delay)));
                self.last(rule, 3000);
            }
            6 => {
                self.count("bits turned");
                let (mut left, mut place) = (1 + self.random.below(3), self.random.below(1 << 20));
                let rule = self.world.proxies[at].rule(move |pdu| {
                    place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let len = pdu.bytes.len() as u64;
                    // Where there are digests, and now and then.
                    let turns = left > 0 && has_digests(pdu) && place >> 32 & 7 == 0;
                    left -= u64::from(turns);
                    turns.then_some(Act::Flip(usize::try_from((place >> 35) % len).unwrap_or(0)))
                });
                self.last(rule, 1000);
            }
            _ if self.random.below(2) == 0 => {
                self.count("ANA state changed");
                let state = self.random.one(&["inaccessible", "non-optimized", "change"]);
                self.world.set_ana(at, state)?;
                std::thread::sleep(self.random.between(100, 3000));
                self.world.set_ana(at, "optimized")?;
            }
            _ => {
                self.count("write held back, path lost");
                let holds: Vec<Rule> = self
                    .world
                    .proxies
                    .iter()
                    .map(|proxy| proxy.hold_one(|pdu| pdu.is(Way::ToTarget, opcode::WRITE)))
                    .collect();
                let caught = |rule: &Rule| rule.wait_caught(1, Duration::from_millis(500));
                for (proxy, _) in self.world.proxies.iter().zip(&holds).filter(|(_, rule)| caught(rule)) {
                    proxy.cut(Cut::ResetHost);
                }
                std::thread::sleep(self.random.between(100, 3000));
                drop(holds);
            }
        }
        Ok(())
    }

    /// Lets a rule last for a while.
    fn last(&mut self, rule: Rule, ms_max: u64) {
        std::thread::sleep(self.random.between(10, ms_max));
        drop(rule);
    }
}

/// ICReq, ICResp and terminate requests have none.
fn has_digests(pdu: &Pdu<'_>) -> bool {
    [kind::CAPSULE_CMD, kind::CAPSULE_RESP, kind::H2C_DATA, kind::C2H_DATA, kind::R2T].contains(&pdu.kind())
}
