//! Live migration of a guest from one QEMU to another on this machine.
//!
//! The QEMU that takes over is started like the one that has the guest, with `-incoming`; both are connected to the same
//! vhost-user sockets then. The guest's shell goes on: a script that was started in one QEMU is finished in the other.

#![forbid(unsafe_code)]

use super::{QEMU, Qemu};
use crate::Result;
use crate::process::Deadline;
use std::fs;
use std::process::Command;
use std::time::Instant;

/// How a migration went.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moved {
    /// From the start of the new QEMU to the end of the old one, in seconds.
    pub seconds: f64,
    /// For how long the guest did not run, as QEMU says.
    pub downtime_ms: f64,
}

/// When a migration is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// While memory is copied and the guest runs.
    WhileCopying,
    /// When the guest has been stopped, its disks' rings too.
    BeforeSwitchover,
}

impl Qemu {
    /// Moves the guest to a new QEMU of the same configuration; afterwards this is that one, and the old one has ended.
    pub fn migrate(&mut self) -> Result<Moved> {
        let began = Instant::now();
        let mut next = self.successor()?;
        self.set_migration(10 << 30, false)?;
        self.start_migration(&next)?;
        self.await_migration(&mut next, "completed", false)?;
        let deadline = Deadline::new(20 * self.accel.patience(), "the guest to go on in its new QEMU");
        while next.monitor("query-status", "{}")?.text("return.status")? != "running" {
            next.process.must_live()?;
            deadline.nap().map_err(|e| next.explain(&e))?;
        }
        let downtime_ms = self.monitor("query-migrate", "{}")?.number("return.downtime")?;
        self.end()?;
        std::mem::swap(self, &mut next);
        // From here on `next` is the QEMU that has ended.
        std::mem::swap(&mut self.shell, &mut next.shell);
        self.shell.continue_at(&mut next.shell)?;
        self.successors = next.successors;
        self.recipe = std::mem::take(&mut next.recipe);
        Ok(Moved { seconds: began.elapsed().as_secs_f64(), downtime_ms })
    }

    /// Begins to move the guest to a new QEMU, and thinks better of it: the guest goes on here.
    pub fn migrate_and_cancel(&mut self, when: Cancelled) -> Result<()> {
        let mut next = self.successor()?;
        let bytes_per_second = if when == Cancelled::WhileCopying { 4 << 20 } else { 10 << 30 };
        self.set_migration(bytes_per_second, when == Cancelled::BeforeSwitchover)?;
        self.start_migration(&next)?;
        match when {
            Cancelled::WhileCopying => self.await_migration(&mut next, "active", true)?,
            Cancelled::BeforeSwitchover => self.await_migration(&mut next, "pre-switchover", false)?,
        }
        self.monitor("migrate_cancel", "{}")?;
        self.await_migration(&mut next, "cancelled", false)?;
        // It ends by itself; if not, now.
        next.process.kill()?;
        let deadline = Deadline::new(20 * self.accel.patience(), "the guest to go on after the cancel");
        while self.monitor("query-status", "{}")?.text("return.status")? != "running" {
            deadline.nap().map_err(|e| self.explain(&e))?;
        }
        Ok(())
    }

    /// A QEMU of the same configuration that waits for its guest.
    fn successor(&mut self) -> Result<Qemu> {
        if self.recipe.is_empty() {
            return Err(self.explain("it was not started from a configuration file"));
        }
        self.successors += 1;
        let base = self.name.split('+').next().unwrap_or_default();
        let name = format!("{base}+{}", self.successors);
        let _ = fs::remove_file(self.folder.join(format!("{name}.mig")));
        let mut command = Command::new(QEMU);
        command.args(&self.recipe).arg("-incoming").arg(format!("unix:{name}.mig"));
        Qemu::start(&name, command, &self.folder, self.accel)
    }

    fn set_migration(&mut self, bytes_per_second: u64, pause_before_switchover: bool) -> Result<()> {
        self.monitor(
            "migrate-set-parameters",
            &format!(r#"{{"max-bandwidth":{bytes_per_second},"downtime-limit":1000}}"#),
        )?;
        let capability = r#""capability":"pause-before-switchover""#;
        self.monitor(
            "migrate-set-capabilities",
            &format!(r#"{{"capabilities":[{{{capability},"state":{pause_before_switchover}}}]}}"#),
        )
        .map(drop)
    }

    fn start_migration(&mut self, next: &Qemu) -> Result<()> {
        self.monitor("migrate", &format!(r#"{{"uri":"unix:{}.mig"}}"#, next.name)).map(drop)
    }

    /// Waits until QEMU says that the migration is in this state, and some memory was copied if that is wanted.
    fn await_migration(&mut self, next: &mut Qemu, state: &str, copied: bool) -> Result<()> {
        let deadline = Deadline::new(60 * self.accel.patience(), format!("the migration to be {state}"));
        loop {
            let answer = self.monitor("query-migrate", "{}")?;
            let now = answer.text("return.status").unwrap_or("none").to_owned();
            let transferred = answer.number("return.ram.transferred").unwrap_or(0.0);
            if now == state && (!copied || transferred > f64::from(1 << 20)) {
                return Ok(());
            }
            if now == "failed" || (now == "completed" && state != "completed") {
                return Err(next.explain(&self.explain(&format!("the migration is {now}, not {state}"))));
            }
            self.process.must_live()?;
            deadline.nap().map_err(|e| next.explain(&self.explain(&format!("{e}; it is {now}"))))?;
        }
    }
}
