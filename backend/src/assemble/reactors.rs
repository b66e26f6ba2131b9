//! The reactors: one thread each, pinned as the configuration says.

use crate::daemon::api::view::ReactorView;
use hawser_config::{Config, ConfigError};
use hawser_runtime::{ReactorConfig, ReactorHandle, ReactorThread};
use std::sync::atomic::Ordering;

/// All reactors of the daemon.
pub struct Reactors {
    threads: Vec<(Option<usize>, ReactorThread)>,
    handles: Vec<ReactorHandle>,
}

impl Reactors {
    /// Where reactors are wanted: `[None]` is one that is not pinned.
    ///
    /// # Errors
    /// When we may not run on one of the CPUs.
    pub fn check(config: &Config) -> Result<Vec<Option<usize>>, ConfigError> {
        let Some(cpus) = &config.daemon.reactors else { return Ok(vec![None]) };
        let allowed = allowed_cpus();
        for cpu in cpus {
            if !allowed.as_deref().is_none_or(|allowed| in_list(allowed, *cpu)) {
                let there = allowed.as_deref().unwrap_or("none");
                return Err(config.daemon_error(
                    "reactors",
                    format!("CPU {cpu} is not ours to use, want some of {there}"),
                ));
            }
        }
        Ok(cpus.iter().copied().map(Some).collect())
    }

    /// Starts one reactor for each place.
    ///
    /// # Errors
    /// When the kernel has no io_uring for us, or too little memory may be locked: one line.
    pub fn start(places: &[Option<usize>], poll_us: u32) -> Result<Reactors, String> {
        let mut threads = Vec::new();
        for (index, cpu) in places.iter().enumerate() {
            let config = ReactorConfig { cpu: *cpu, poll_us };
            let thread = ReactorThread::spawn(&format!("reactor-{index}"), config).map_err(|error| {
                format!("reactor {index} cannot start: {error} (is io_uring allowed here?)")
            })?;
            threads.push((*cpu, thread));
        }
        let handles = threads.iter().map(|(_, thread)| thread.handle().clone()).collect();
        Ok(Reactors { threads, handles })
    }

    /// To reach them.
    #[must_use]
    pub fn handles(&self) -> &[ReactorHandle] {
        &self.handles
    }

    /// What they have done.
    #[must_use]
    pub fn views(&self) -> Vec<ReactorView> {
        let view = |(cpu, thread): &(Option<usize>, ReactorThread)| {
            let stats = thread.handle().stats();
            ReactorView {
                cpu: *cpu,
                passes: stats.passes.load(Ordering::Relaxed),
                busy_passes: stats.busy_passes.load(Ordering::Relaxed),
                sleeps: stats.sleeps.load(Ordering::Relaxed),
            }
        };
        self.threads.iter().map(view).collect()
    }
}

/// `0-3,8`: the CPUs that the scheduler lets us run on.
fn allowed_cpus() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    Some(list.trim().to_owned())
}

fn in_list(list: &str, cpu: usize) -> bool {
    list.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.trim().parse::<usize>(), last.trim().parse::<usize>());
        matches!((first, last), (Ok(first), Ok(last)) if (first..=last).contains(&cpu))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_understood() {
        assert!(in_list("0-3,8", 0) && in_list("0-3,8", 3) && in_list("0-3,8", 8));
        assert!(!in_list("0-3,8", 4) && !in_list("", 0));
        assert!(allowed_cpus().is_some_and(|list| list.starts_with(|c: char| c.is_ascii_digit())));
    }
}
