//! Which associations are over while their commands may still be executed, and what ends that.
//!
//! Owns: the device's list of them, and what is kept of them for a process after us. Must not know: requests, sockets.
//!
//! An association leaves the list when it is provably quiet: see the text of [`super`].
#![forbid(unsafe_code)]

use super::cache::Inheritance;
use super::config::PathTimers;
use crate::nvme::cross_reset::ControllerInstance;
use hawser_runtime::Instant;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// What names an association of ours to whoever has to wait for its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// `None`: we do not know.
    pub(crate) address: Option<SocketAddr>,
    pub(crate) subsystem_nqn: String,
    /// `None`: it cannot be reset through another controller.
    pub(crate) instance: Option<ControllerInstance>,
    /// How long after its loss its commands may live: until the controller notices, and then CQT or `quiesce_tmo`.
    pub(crate) lives: Duration,
}

impl Record {
    /// It stands for whatever a process before us had, which kept nothing.
    pub(crate) fn is_anybodys(&self) -> bool {
        self.subsystem_nqn.is_empty()
    }
}

/// An association that is over, and whose commands may still be executed.
#[derive(Clone, Debug)]
pub(crate) struct Unquiet {
    pub(crate) association: u64,
    pub(crate) record: Record,
    /// The target has ended it, or has seen its end.
    pub(crate) target_knows: bool,
    /// When it ended.
    pub(crate) since: Instant,
    /// From then on they are not.
    pub(crate) until: Instant,
}

impl Unquiet {
    /// Whether it is quiet after a Connect to where `now` is, of a target where Connect waits for what the subsystem knows to be
    /// over, since this one began; `None`: of another.
    pub(crate) fn is_quiet(&self, now: &Record, connect_waits: Option<Instant>) -> bool {
        let knew = self.target_knows && connect_waits.is_some_and(|began| self.since <= began);
        let there = self.record.address.is_some() && self.record.address == now.address;
        knew && there && self.record.subsystem_nqn == now.subsystem_nqn
    }

    /// What a controller of this subsystem can be asked to reset. Where that is so, and it resets others, its word is better
    /// than [`Unquiet::is_quiet`]: what we took for the target's end of a connection may have been a middle box's.
    pub(crate) fn resettable_in(&self, subsystem_nqn: &str) -> Option<ControllerInstance> {
        self.record.instance.filter(|_| self.record.subsystem_nqn == subsystem_nqn)
    }
}

/// The first line of the file.
const VERSION: &str = "hawser associations 2";

/// What a process leaves to the one after it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) records: Vec<Record>,
    pub(crate) caches: Inheritance,
}

/// Keeps this for a process after us, in place of what was kept before.
pub(crate) fn keep(file: &Path, Kept { records, caches }: &Kept) -> std::io::Result<()> {
    let mut text = format!("{VERSION}\n");
    if caches.lost {
        text += "cache lost\n";
    }
    for (path, identity) in &caches.caches {
        let _ = writeln!(text, "cache {path} {:032x}", u128::from_be_bytes(*identity));
    }
    for Record { address, subsystem_nqn, instance, lives } in records {
        let address = address.map_or("-".to_owned(), |address| address.to_string());
        let (cntlid, uniquifier, random) =
            instance.map_or((0, 0, 0), |instance| (instance.cntlid, instance.uniquifier, instance.random));
        let lives = lives.as_millis();
        let _ = writeln!(text, "{address} {cntlid} {uniquifier} {random} {lives} {subsystem_nqn}");
    }
    let mut new = file.as_os_str().to_owned();
    new.push(".new");
    // Not synced: it is for a process after us, not for a boot after this one.
    std::fs::write(&new, text)?;
    std::fs::rename(&new, file)
}

/// Takes away what is kept: a process after us then knows nothing, and waits. What is out of date it would trust.
pub(crate) fn forget(file: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a process before us has kept; `None` when it is not there or not to be understood.
pub(crate) fn kept(file: &Path) -> Option<Kept> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut lines = text.lines();
    (lines.next() == Some(VERSION)).then_some(())?;
    let mut kept = Kept::default();
    for line in lines {
        match line.strip_prefix("cache ") {
            None => kept.records.push(parse(line)?),
            Some("lost") => kept.caches.lost = true,
            Some(cache) => {
                let (path, identity) = cache.split_once(' ')?;
                let identity = u128::from_str_radix(identity, 16).ok()?;
                kept.caches.caches.push((path.parse().ok()?, identity.to_be_bytes()));
            }
        }
    }
    Some(kept)
}

fn parse(line: &str) -> Option<Record> {
    let mut words = line.splitn(6, ' ');
    let address = words.next()?;
    let address = if address == "-" { None } else { Some(address.parse().ok()?) };
    let (cntlid, uniquifier, random) =
        (words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let instance = (uniquifier != 0).then_some(ControllerInstance { cntlid, uniquifier, random });
    let lives = Duration::from_millis(words.next()?.parse().ok()?);
    Some(Record { address, subsystem_nqn: words.next()?.to_owned(), instance, lives })
}

/// How long after its loss the commands of an association may live, where its controller says CQT in milliseconds, or 0.
pub(crate) fn lives(timers: &PathTimers, quiesce_time_ms: u16) -> Duration {
    let quiesce = match quiesce_time_ms {
        0 => timers.quiesce_tmo,
        ms => Duration::from_millis(u64::from(ms)),
    };
    timers.expiry() + quiesce
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(address: Option<SocketAddr>) -> Record {
        let instance = Some(ControllerInstance { cntlid: 7, uniquifier: 3, random: u64::MAX });
        Record { address, subsystem_nqn: "nqn.x with space".into(), instance, lives: Duration::from_secs(15) }
    }

    /// A name had two addresses, with a target at each. After the first was lost, the second's promise about its own earlier
    /// associations was taken for one about the first's, because both were the same URI. And one address may have several
    /// subsystems, of which each waits for its own.
    #[test]
    fn a_target_speaks_for_its_own_address_and_for_what_it_has_seen() {
        let (here, there): (SocketAddr, SocketAddr) =
            ("127.0.0.1:4420".parse().unwrap(), "[::1]:4420".parse().unwrap());
        let lost = |address, target_knows| {
            let (record, since, until) = (record(address), Instant(500), Instant(1000));
            Unquiet { association: 1, record, target_knows, since, until }
        };
        for (unquiet, address, connect_waits, quiet) in [
            (lost(Some(here), true), here, Some(Instant(500)), true),
            (lost(Some(here), true), here, Some(Instant(499)), false),
            (lost(Some(here), true), there, Some(Instant(500)), false),
            (lost(Some(here), true), here, None, false),
            (lost(Some(here), false), here, Some(Instant(500)), false),
            (lost(None, true), here, Some(Instant(500)), false),
        ] {
            assert_eq!(unquiet.is_quiet(&record(Some(address)), connect_waits), quiet);
            let other = Record { subsystem_nqn: "nqn.y".into(), ..record(Some(address)) };
            assert!(!unquiet.is_quiet(&other, connect_waits));
        }
        assert!(!lost(None, true).is_quiet(&record(None), Some(Instant(500))));
    }

    #[test]
    fn what_is_kept_is_read_again_and_what_is_not_understood_is_not() {
        let folder = std::env::temp_dir().join(format!("hawser-quiet-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("n0");
        assert_eq!(kept(&file), None);
        let records =
            [record(Some("[::1]:4420".parse().unwrap())), Record { instance: None, ..record(None) }];
        let caches = Inheritance { caches: vec![(1, [0xfe; 16])], lost: true };
        let all = Kept { records: records.into(), caches };
        keep(&file, &all).unwrap();
        let again = kept(&file);
        std::fs::write(&file, "hawser associations 3\n").unwrap();
        let newer = kept(&file);
        std::fs::write(&file, format!("{VERSION}\n127.0.0.1:1 2 3\n")).unwrap();
        let short = kept(&file);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!((again.as_ref(), newer, short), (Some(&all), None, None));
    }
}
