//! Progress of long work: a bar on a terminal, a line every tenth elsewhere.

use super::{Failure, table, warn};
use crate::daemon::api::pool_view::{PoolState, PoolView};
use crate::image::Progress;
use hawser_volume::pool::MemberState;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::io::IsTerminal;
use std::time::Duration;

/// A bar on a terminal, a line every tenth elsewhere.
pub(super) struct Bar {
    bar: ProgressBar,
    plain: bool,
    part: Cell<&'static str>,
    tenths: Cell<u64>,
}

impl Bar {
    pub(super) fn new() -> Bar {
        let plain = !std::io::stderr().is_terminal();
        Bar { bar: ProgressBar::hidden(), plain, part: Cell::new(""), tenths: Cell::new(0) }
    }
}

impl Progress for Bar {
    fn begin(&self, part: &'static str, bytes: u64) {
        self.part.set(part);
        self.tenths.set(0);
        self.bar.reset();
        self.bar.set_length(bytes);
        self.bar.set_message(part);
        if !self.plain {
            self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template(
                "{msg:>9} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
            ) {
                self.bar.set_style(style);
            }
        }
    }

    fn done(&self, bytes: u64) {
        self.bar.inc(bytes);
        let all = self.bar.length().unwrap_or(0).max(1);
        let tenths = self.bar.position() * 10 / all;
        if self.plain && tenths > self.tenths.get() {
            self.tenths.set(tenths);
            warn(&format!("{} {}0 % of {}", self.part.get(), tenths, table::bytes(all)));
        }
    }
}

/// How often a pool is asked how far it is.
const EVERY: Duration = Duration::from_millis(200);

impl Bar {
    /// Away with it.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn set(&self, part: &'static str, done: u64, total: u64) {
        // Work that has just begun does not know yet how much there is: a bar would be full.
        if total == 0 {
            return;
        }
        if self.part.get() != part || self.bar.length() != Some(total) {
            self.begin(part, total);
        }
        self.done(done.saturating_sub(self.bar.position()));
    }
}

/// Whether somebody looks.
pub(super) fn is_watched() -> bool {
    std::io::stderr().is_terminal()
}

/// Shows the work on a pool until all of it has ended and nobody lacks anything that can be had; how the pool is then.
pub(super) fn watch(mut look: impl FnMut() -> Result<PoolView, Failure>) -> Result<PoolView, Failure> {
    let bar = Bar::new();
    loop {
        let pool = look()?;
        let task = pool.tasks.iter().find(|task| !task.done);
        // Between a member's coming and the work that brings it up to date, and between two parts of that, there is no task.
        let comes = [MemberState::Syncing.name(), MemberState::Replacing.name()];
        let lacks = pool.members.iter().any(|member| comes.contains(&member.state.as_str()));
        if task.is_none() && (!lacks || pool.state == PoolState::Failed) {
            bar.clear();
            return Ok(pool);
        }
        if let Some(task) = task {
            let part = match task.kind.as_str() {
                "resync" => "resync",
                "rebuild" => "rebuild",
                "replace" => "replace",
                "scrub" => "scrub",
                _ => "work",
            };
            bar.set(part, task.done_bytes, task.total_bytes);
        }
        std::thread::sleep(EVERY);
    }
}
