//! Medians, spreads, ratios and verdicts, as a table for people.
//!
//! Owns: statistics and layout. Must not know: how a number came about.

use std::fmt::Write;

use super::cases::{Case, Goal};
use super::fabric;
use super::hot_path;
use super::idle::{DISKS, GOAL_PERCENT, IdleOutcome};
use super::load::Measured;
use super::pools;
use crate::to_f64;

/// All samples of one server in one case.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// The samples, in the order in which they were taken.
    pub samples: Vec<Measured>,
    /// How it was configured: completions at a time, aio.
    pub configuration: String,
    /// Attempts that were thrown away because of other load.
    pub repeated: u32,
    /// Reasons why kept samples are doubtful.
    pub disturbed: Vec<String>,
}

/// A median and the range of what it is a median of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// The smallest sample.
    pub min: f64,
    /// The median.
    pub median: f64,
    /// The largest sample.
    pub max: f64,
}

impl Spread {
    /// Of any samples; all 0 if there are none.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (values.first(), values.last()) else { return Self::default() };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Spread { min, median, max }
    }

    /// Half of the range, in percent of the median.
    pub fn percent(&self) -> f64 {
        if self.median > 0.0 { (self.max - self.min) / 2.0 / self.median * 100.0 } else { 0.0 }
    }
}

impl Series {
    /// Requests per second.
    pub fn iops(&self) -> Spread {
        Spread::of(self.samples.iter().map(|s| s.iops))
    }

    /// CPU seconds per million requests.
    pub fn cpu(&self) -> Spread {
        Spread::of(self.samples.iter().map(|s| s.cpu_per_million))
    }

    fn microseconds(&self, pick: impl Fn(&Measured) -> u64) -> f64 {
        Spread::of(self.samples.iter().map(|s| to_f64(pick(s)))).median / 1000.0
    }
}

/// One case with what both servers did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The case.
    pub case: Case,
    /// Ours.
    pub ours: Series,
    /// qemu-storage-daemon's.
    pub theirs: Series,
}

/// Whether a goal was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Reached,
    /// No.
    Missed,
}

impl Verdict {
    fn of(reached: bool) -> Self {
        if reached { Verdict::Reached } else { Verdict::Missed }
    }

    fn word(self) -> &'static str {
        match self {
            Verdict::Reached => "reached",
            Verdict::Missed => "**missed**",
        }
    }
}

impl Outcome {
    /// Our IOPS over theirs.
    pub fn iops_ratio(&self) -> f64 {
        ratio(self.ours.iops().median, self.theirs.iops().median)
    }

    /// Our CPU time per request over theirs.
    pub fn cpu_ratio(&self) -> f64 {
        ratio(self.ours.cpu().median, self.theirs.cpu().median)
    }

    /// The verdict on each goal of the case: IOPS, CPU.
    pub fn verdicts(&self) -> (Option<Verdict>, Option<Verdict>) {
        let Goal { iops, cpu } = self.case.goal();
        let iops = iops.map(|goal| Verdict::of(self.iops_ratio() >= goal));
        // CPU times are counted in ticks of 10 ms: equal to two digits is equal.
        let cpu = cpu.map(|goal| Verdict::of(self.cpu_ratio() <= goal + 0.005));
        (iops, cpu)
    }
}

fn ratio(ours: f64, theirs: f64) -> f64 {
    if theirs > 0.0 { ours / theirs } else { 0.0 }
}

/// The in-flight log's cost.
#[derive(Clone, Debug, Default)]
pub struct InflightOutcome {
    /// What it was measured on.
    pub name: String,
    /// IOPS with the log.
    pub with: Vec<f64>,
    /// IOPS without.
    pub without: Vec<f64>,
    /// Reasons why kept samples are doubtful.
    pub disturbed: Vec<String>,
}

/// What the ratio with the log over without must reach.
pub const INFLIGHT_GOAL: f64 = 0.9;

impl InflightOutcome {
    /// With over without.
    pub fn ratio(&self) -> f64 {
        ratio(self.with_spread().median, self.without_spread().median)
    }

    fn with_spread(&self) -> Spread {
        Spread::of(self.with.iter().copied())
    }

    fn without_spread(&self) -> Spread {
        Spread::of(self.without.iter().copied())
    }
}

/// Everything that a run has found.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// One per case that ran.
    pub outcomes: Vec<Outcome>,
    /// One per case of hawser beside itself.
    pub fabric: Vec<fabric::Outcome>,
    /// One per case of pools.
    pub pools: Vec<pools::Outcome>,
    /// What Linux md does for a small write, as it was found in a guest: lines `array: counts`.
    pub md: Vec<String>,
    /// Lines about the hot path alone.
    pub hot_path: Vec<hot_path::Line>,
    /// One per device on which the in-flight log was measured.
    pub inflight: Vec<InflightOutcome>,
    /// What an idle daemon used, if that was measured.
    pub idle: Option<IdleOutcome>,
    /// Cases that did not run, and why.
    pub failures: Vec<(String, String)>,
}

fn thousands(iops: f64) -> String {
    if iops >= 99_950.0 { format!("{:.0}k", iops / 1000.0) } else { format!("{:.1}k", iops / 1000.0) }
}

fn iops_cell(series: &Series) -> String {
    let iops = series.iops();
    format!("{} ±{:.0}%", thousands(iops.median), iops.percent())
}

impl Results {
    /// The table as Markdown, which people can also read as it is.
    pub fn tables(&self) -> String {
        let mut rows = vec![
            ["case", "hawser", "qsd", "ratio", "goal", "CPU s/M", "qsd", "ratio", "goal"]
                .map(String::from)
                .to_vec(),
        ];
        for outcome in &self.outcomes {
            let goal = outcome.case.goal();
            let (iops, cpu) = outcome.verdicts();
            let cell = |sign: &str, goal: Option<f64>, verdict: Option<Verdict>| match (goal, verdict) {
                (Some(goal), Some(verdict)) => format!("{sign} {goal} {}", verdict.word()),
                _ => String::new(),
            };
            rows.push(vec![
                outcome.case.name(),
                iops_cell(&outcome.ours),
                iops_cell(&outcome.theirs),
                format!("{:.2}", outcome.iops_ratio()),
                cell("≥", goal.iops, iops),
                format!("{:.3}", outcome.ours.cpu().median),
                format!("{:.3}", outcome.theirs.cpu().median),
                format!("{:.2}", outcome.cpu_ratio()),
                cell("≤", goal.cpu, cpu),
            ]);
        }
        let mut text = table(&rows);
        if !self.fabric.is_empty() {
            let head = ["hawser over nvme+tcp", "", "", "machine", "what", "value", "goal"];
            let mut rows = vec![head.map(String::from).to_vec()];
            for outcome in &self.fabric {
                let [plain, other, machine, meaning] = outcome.words();
                let (goal, more) = outcome.case.goal();
                let sign = if more { "≥" } else { "≤" };
                rows.push(vec![
                    outcome.case.name().to_owned(),
                    plain,
                    other,
                    machine,
                    meaning,
                    format!("{:.2}", outcome.value()),
                    format!("{sign} {goal} {}", Verdict::of(outcome.reached()).word()),
                ]);
            }
            text.push('\n');
            text.push_str(&table(&rows));
        }
        if !self.pools.is_empty() {
            let head = ["thin volumes over mem:", "beside", "", "what", "ratio", "goal"];
            let mut rows = vec![head.map(String::from).to_vec()];
            for outcome in &self.pools {
                let [beside, itself, meaning] = outcome.words();
                let goal = match (outcome.case.goal(), outcome.reached()) {
                    (Some((goal, more)), Some(reached)) => {
                        format!("{} {goal} {}", if more { "≥" } else { "≤" }, Verdict::of(reached).word())
                    }
                    _ => String::new(),
                };
                let name = outcome.case.name();
                rows.push(vec![name, beside, itself, meaning, format!("{:.2}", outcome.value()), goal]);
            }
            text.push('\n');
            text.push_str(&table(&rows));
        }
        if !self.md.is_empty() {
            let mut rows = vec![
                ["Linux md", "members get, for each 4 KiB written at random"].map(String::from).to_vec(),
            ];
            for line in &self.md {
                let (array, counts) = line.split_once(": ").unwrap_or((line, ""));
                rows.push(vec![array.to_owned(), counts.to_owned()]);
            }
            text.push('\n');
            text.push_str(&table(&rows));
        }
        if !self.hot_path.is_empty() {
            let mut rows = vec![["the hot path alone", "", "", "goal"].map(String::from).to_vec()];
            for line in &self.hot_path {
                let [first, second] = line.numbers.clone();
                let goal = format!("{} {}", line.goal, Verdict::of(line.reached).word());
                rows.push(vec![line.name.clone(), first, second, goal]);
            }
            text.push('\n');
            text.push_str(&table(&rows));
        }
        if !self.inflight.is_empty() {
            let mut rows = vec![["in-flight log", "on", "off", "ratio", "goal"].map(String::from).to_vec()];
            for outcome in &self.inflight {
                let (with, without) = (outcome.with_spread(), outcome.without_spread());
                rows.push(vec![
                    outcome.name.clone(),
                    format!("{} ±{:.0}%", thousands(with.median), with.percent()),
                    format!("{} ±{:.0}%", thousands(without.median), without.percent()),
                    format!("{:.2}", outcome.ratio()),
                    format!("≥ {INFLIGHT_GOAL} {}", Verdict::of(outcome.ratio() >= INFLIGHT_GOAL).word()),
                ]);
            }
            text.push('\n');
            text.push_str(&table(&rows));
        }
        if let Some(idle) = &self.idle {
            let rows = [
                ["idle", "% of a CPU", "of its threads", "threads", "for", "goal"].map(String::from).to_vec(),
                vec![
                    format!("{DISKS} disks, connected, rings enabled"),
                    format!("{:.2}", idle.percent_by_ticks),
                    format!("{:.3}", idle.percent_by_threads),
                    idle.threads.to_string(),
                    format!("{:.1} s", idle.seconds),
                    format!("< {GOAL_PERCENT} {}", Self::idle_verdict(idle).word()),
                ],
            ];
            text.push('\n');
            text.push_str(&table(&rows));
        }
        text
    }

    fn idle_verdict(idle: &IdleOutcome) -> Verdict {
        Verdict::of(idle.percent() < GOAL_PERCENT)
    }

    /// Latencies and configurations, as Markdown.
    pub fn details(&self) -> String {
        let mut rows = vec![
            [
                "case",
                "hawser p50/p99/p99.9 µs",
                "reaped",
                "qsd p50/p99/p99.9 µs",
                "configuration",
                "repeated",
                "kept though disturbed",
            ]
            .map(String::from)
            .to_vec(),
        ];
        let latency = |series: &Series| {
            let [p50, p99, p999] = [
                series.microseconds(|m| m.p50),
                series.microseconds(|m| m.p99),
                series.microseconds(|m| m.p999),
            ];
            format!("{p50:.1} / {p99:.1} / {p999:.1}")
        };
        for outcome in &self.outcomes {
            let disturbed: Vec<&str> =
                outcome.ours.disturbed.iter().chain(&outcome.theirs.disturbed).map(String::as_str).collect();
            rows.push(vec![
                outcome.case.name(),
                latency(&outcome.ours),
                outcome.ours.configuration.clone(),
                latency(&outcome.theirs),
                outcome.theirs.configuration.clone(),
                (outcome.ours.repeated + outcome.theirs.repeated).to_string(),
                match disturbed.first() {
                    None => "0".to_owned(),
                    Some(first) => format!("{}, e.g. {first}", disturbed.len()),
                },
            ]);
        }
        let mut text = table(&rows);
        for outcome in &self.pools {
            if let Some(first) = outcome.disturbed.first() {
                let (name, count) = (outcome.case.name(), outcome.disturbed.len());
                let _ = writeln!(text, "\n{name}: {count} samples kept though disturbed, e.g. {first}");
            }
        }
        for (name, reason) in &self.failures {
            let _ = writeln!(text, "\n{name} did not run: {reason}");
        }
        text
    }

    /// Goals that were reached, and all goals that were measured.
    pub fn score(&self) -> (usize, usize) {
        let verdicts = self.outcomes.iter().flat_map(|o| <[_; 2]>::from(o.verdicts())).flatten();
        let inflight = self.inflight.iter().map(|o| Verdict::of(o.ratio() >= INFLIGHT_GOAL));
        let fabric = self.fabric.iter().map(|o| Verdict::of(o.reached()));
        let idle = self.idle.iter().map(Self::idle_verdict);
        let pools = self.pools.iter().filter_map(|o| o.reached().map(Verdict::of));
        let hot_path = self.hot_path.iter().map(|line| Verdict::of(line.reached));
        let all: Vec<Verdict> =
            verdicts.chain(fabric).chain(pools).chain(hot_path).chain(inflight).chain(idle).collect();
        (all.iter().filter(|&&v| v == Verdict::Reached).count(), all.len())
    }
}

/// A Markdown table with aligned columns; the first row is the head.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(3))
        .collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, &width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:width$} ");
        }
        text.push_str("|\n");
        if index == 0 {
            for &width in &widths {
                let _ = write!(text, "|{:-<1$}", "", width + 2);
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::cases::all;

    fn series(iops: &[f64], cpu: f64) -> Series {
        let samples = iops.iter().map(|&iops| Measured { iops, cpu_per_million: cpu, ..Measured::default() });
        Series { samples: samples.collect(), ..Series::default() }
    }

    #[test]
    fn medians_and_spreads() {
        let spread = Spread::of([3.0, 1.0, 2.0].into_iter());
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.0, 3.0));
        assert_eq!(Spread::of([1.0, 2.0, 4.0, 8.0].into_iter()).median, 3.0);
        assert_eq!(Spread::of(std::iter::empty()), Spread::default());
        assert_eq!(spread.percent(), 50.0);
    }

    #[test]
    fn an_idle_daemon_is_judged_by_the_worse_of_both_numbers() {
        let idle = IdleOutcome { seconds: 5.0, threads: 9, percent_by_ticks: 0.2, percent_by_threads: 0.013 };
        let results = Results { idle: Some(idle), ..Results::default() };
        assert_eq!(results.score(), (1, 1));
        assert!(results.tables().contains("| 0.20       | 0.013"), "{}", results.tables());
        let idle = IdleOutcome { percent_by_threads: 1.5, ..idle };
        assert_eq!(Results { idle: Some(idle), ..Results::default() }.score(), (0, 1));
    }

    #[test]
    fn a_goal_is_reached_or_missed_by_the_medians() {
        let case = all(20).into_iter().find(|c| c.name() == "null/randread-4k/qd32/poll20").expect("a case");
        let mut outcome =
            Outcome { case, ours: series(&[4e6, 5e6, 1e6], 0.2), theirs: series(&[8e5, 7e5, 9e5], 0.6) };
        assert_eq!(outcome.verdicts(), (Some(Verdict::Reached), Some(Verdict::Reached)));
        outcome.ours = series(&[3.9e6], 0.3);
        assert_eq!(outcome.verdicts(), (Some(Verdict::Missed), Some(Verdict::Missed)));
        let results = Results { outcomes: vec![outcome], ..Results::default() };
        assert_eq!(results.score(), (0, 2));
        let text = results.tables();
        assert!(text.contains("≥ 5 **missed**") && text.contains("4.88"), "{text}");
        let widths: Vec<usize> = text.lines().map(|l| l.chars().count()).collect();
        assert!(widths.iter().all(|w| *w == widths[0]), "{text}");
    }
}
