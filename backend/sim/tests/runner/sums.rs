//! What became of many histories, and the file in which runs add it up.
//!
//! A million histories take hours. Whoever runs them in parts names a file: each stretch of a run is added to it when it has ended, so that what is
//! interrupted loses a stretch at most, and the next run goes on behind the last.
//!
//! ```text
//! # cargo xtask sim pools: …
//! seeds = 40000          histories of all runs
//! failed = 1
//! next = 1040000         where a run goes on that is not told where
//! failed_seeds = [1002983]
//!
//! [scenarios]
//! all = 17824
//!
//! [counts]
//! cuts = 87790
//! ```

use std::collections::BTreeMap;
use std::path::Path;

/// What became of many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sums {
    pub(crate) histories: u64,
    pub(crate) scenarios: BTreeMap<String, u64>,
    pub(crate) counts: BTreeMap<String, u64>,
    /// Seed, scenario, and why.
    pub(crate) failed: Vec<(u64, String, String)>,
}

impl Sums {
    pub(crate) fn add(&mut self, other: Sums) {
        self.histories += other.histories;
        self.failed.extend(other.failed);
        for (name, count) in other.scenarios {
            *self.scenarios.entry(name).or_default() += count;
        }
        for (name, count) in other.counts {
            *self.counts.entry(name).or_default() += count;
        }
    }
}

/// What all runs so far have seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Total {
    pub(crate) sums: Sums,
    /// The seed behind the last; `None`: nothing was run yet.
    pub(crate) next: Option<u64>,
}

impl Total {
    /// What the file says; nothing, if there is none.
    ///
    /// # Errors
    /// It cannot be read, or is of another kind.
    pub(crate) fn read(path: &Path) -> Result<Total, String> {
        match std::fs::read_to_string(path) {
            Ok(text) => Total::parse(&text).map_err(|why| format!("{}: {why}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Total::default()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// Puts the file in place of the one before, whole.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn write(&self, path: &Path, command: &str) -> Result<(), String> {
        let new = path.with_extension("new");
        let written = std::fs::write(&new, self.text(command)).and_then(|()| std::fs::rename(&new, path));
        written.map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Adds a stretch that ends before `next`.
    pub(crate) fn add(&mut self, sums: Sums, next: u64) {
        self.sums.add(sums);
        self.next = Some(next);
    }

    fn parse(text: &str) -> Result<Total, String> {
        let (mut total, mut section) = (Total::default(), "");
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name;
                continue;
            }
            let (name, value) =
                line.split_once('=').ok_or_else(|| format!("`{line}` is no `name = number`"))?;
            let (name, value) = (name.trim(), value.trim());
            let number =
                |text: &str| text.trim().parse::<u64>().map_err(|error| format!("`{line}`: {error}"));
            match (section, name) {
                ("", "seeds") => total.sums.histories = number(value)?,
                // They are told by name.
                ("", "failed") => _ = number(value)?,
                ("", "next") => total.next = Some(number(value)?),
                ("", "failed_seeds") => {
                    let list = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                    let list = list.ok_or_else(|| format!("`{line}` is no list"))?;
                    for seed in list.split(',').filter(|seed| !seed.trim().is_empty()) {
                        total.sums.failed.push((number(seed)?, String::new(), String::new()));
                    }
                }
                ("scenarios", name) => _ = total.sums.scenarios.insert(name.to_owned(), number(value)?),
                ("counts", name) => _ = total.sums.counts.insert(name.to_owned(), number(value)?),
                _ => return Err(format!("`{line}` is not known")),
            }
        }
        Ok(total)
    }

    fn text(&self, command: &str) -> String {
        let Sums { histories, scenarios, counts, failed } = &self.sums;
        let seeds: Vec<String> = failed.iter().map(|(seed, ..)| seed.to_string()).collect();
        let lines = |all: &BTreeMap<String, u64>| -> String {
            all.iter().map(|(name, count)| format!("{name} = {count}\n")).collect()
        };
        format!(
            "# cargo xtask {command} --sums: what all runs with this file have seen\nseeds = {histories}\nfailed = {}\nnext = {}\n\
             failed_seeds = [{}]\n\n[scenarios]\n{}\n[counts]\n{}",
            failed.len(),
            self.next.unwrap_or_default(),
            seeds.join(", "),
            lines(scenarios),
            lines(counts),
        )
    }
}
