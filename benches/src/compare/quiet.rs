//! Whether a sample was disturbed by other load on the machine.
//!
//! Three witnesses: CPU time of processes that are not ours on the two CPUs; time stolen by the hypervisor; and a
//! fixed loop that takes longer than it did at its best. The client adds a fourth: its own time spent waiting for
//! its CPU. A disturbed sample is measured again; if the machine stays busy it is kept and counted as disturbed.
//!
//! Owns: the verdict on a sample. Must not know: what was measured.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use crate::sys;

/// Share of the two CPUs that others may use.
const OTHERS_SHARE_MAX: f64 = 0.03;
/// Share of the two CPUs that may be stolen.
const STOLEN_SHARE_MAX: f64 = 0.01;
/// How much longer than at its best the fixed loop may take.
const SLOWER_MAX: f64 = 1.08;

/// The two CPUs, and what they can do when nobody disturbs.
pub struct Guard {
    cpus: [usize; 2],
    best_loop_ns: [u64; 2],
    /// How often a disturbed sample is measured again.
    retries: u32,
    /// Longest time to wait for the machine to become quiet, for all samples together.
    patience: Duration,
}

/// A value and how it was obtained.
pub struct Sample<T> {
    /// The measurement.
    pub value: T,
    /// Attempts that were thrown away.
    pub repeated: u32,
    /// Why the kept one is doubtful too, if it is.
    pub disturbed: Option<String>,
}

struct Moment {
    at: Instant,
    census: sys::Census,
    stolen: f64,
}

impl Guard {
    /// A guard over the server's and the client's CPU.
    pub fn new(cpus: [usize; 2], retries: u32, patience: Duration) -> Self {
        Guard { cpus, best_loop_ns: [u64::MAX; 2], retries, patience }
    }

    /// Runs `measure` until a run was not disturbed. `ours` are the processes whose time is not a disturbance, and
    /// `judge` may find another reason in the value.
    pub fn run<T>(
        &mut self,
        ours: &[u32],
        mut measure: impl FnMut() -> Result<T, String>,
        judge: impl Fn(&T) -> Option<String>,
    ) -> Result<Sample<T>, String> {
        let mut repeated = 0;
        loop {
            let before = self.moment(ours)?;
            let slow = self.slow_loop()?;
            let value = measure()?;
            let after = self.moment(ours)?;
            let disturbed = slow.or_else(|| self.compare(&before, &after)).or_else(|| judge(&value));
            if disturbed.is_none() || repeated >= self.retries {
                return Ok(Sample { value, repeated, disturbed });
            }
            repeated += 1;
            // Longer each time, as long as there is patience left.
            let pause = Duration::from_millis(500 * u64::from(repeated)).min(self.patience);
            self.patience -= pause;
            std::thread::sleep(pause);
        }
    }

    fn moment(&self, ours: &[u32]) -> Result<Moment, String> {
        let failed = |e: io::Error| format!("/proc: {e}");
        let times = sys::cpu_times().map_err(failed)?;
        let stolen = self.cpus.iter().filter_map(|&cpu| times.get(cpu)).map(|t| t.stolen).sum();
        let mut ours: HashSet<u32> = ours.iter().copied().collect();
        ours.insert(std::process::id());
        let census = sys::Census::take(&ours).map_err(failed)?;
        Ok(Moment { at: Instant::now(), census, stolen })
    }

    fn compare(&self, before: &Moment, after: &Moment) -> Option<String> {
        let available = (after.at - before.at).as_secs_f64() * 2.0;
        let others = after.census.used_since(&before.census, &self.cpus);
        Self::verdict(others / available, (after.stolen - before.stolen) / available)
    }

    fn verdict(others: f64, stolen: f64) -> Option<String> {
        if others > OTHERS_SHARE_MAX {
            return Some(format!("other processes used {:.0} % of the two CPUs", others * 100.0));
        }
        (stolen > STOLEN_SHARE_MAX)
            .then(|| format!("the hypervisor took {:.0} % of the two CPUs", stolen * 100.0))
    }

    fn slow_loop(&mut self) -> Result<Option<String>, String> {
        for (&cpu, best) in self.cpus.iter().zip(&mut self.best_loop_ns) {
            let now = std::thread::spawn(move || {
                sys::pin_to(cpu)
                    .map(|()| (0..3).map(|_| sys::calibration_loop_ns()).min().unwrap_or(u64::MAX))
            });
            let now = now
                .join()
                .map_err(|_| "the calibration loop died")?
                .map_err(|e| format!("CPU {cpu}: {e}"))?;
            *best = now.min(*best);
            let slower = crate::to_f64(now) / crate::to_f64(*best);
            if slower > SLOWER_MAX {
                return Ok(Some(format!(
                    "CPU {cpu} was {:.0} % slower than at its best",
                    (slower - 1.0) * 100.0
                )));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disturbed_sample_is_repeated_and_then_kept_with_the_reason() {
        // CPUs that do not exist have no other load; the loop needs real ones, so the first CPU twice.
        let mut guard = Guard::new([0, 0], 2, Duration::ZERO);
        let mut runs = 0;
        let judge = |run: &u32| (*run < 2).then(|| "too early".to_owned());
        let sample = guard
            .run(
                &[],
                || {
                    runs += 1;
                    Ok(runs)
                },
                judge,
            )
            .expect("a sample");
        assert!(sample.value >= 2 && sample.repeated >= 1);

        let mut guard = Guard::new([0, 0], 2, Duration::ZERO);
        let sample = guard.run(&[], || Ok(()), |()| Some("always".to_owned())).expect("a sample");
        assert_eq!(sample.repeated, 2);
        assert!(sample.disturbed.is_some());
    }

    #[test]
    fn others_load_and_stolen_time_are_seen() {
        assert_eq!(Guard::verdict(0.005, 0.0), None);
        assert!(Guard::verdict(0.25, 0.0).expect("busy").contains("other processes used 25 %"));
        assert!(Guard::verdict(0.0, 0.05).expect("stolen").contains("hypervisor took 5 %"));
    }
}
