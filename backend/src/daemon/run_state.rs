//! What the next process on the same API socket needs to know, in `<api socket>.state/`.
//!
//! Owns: the folder; `state.json` with a version, the build that wrote it, the count of crashes and why disks were set
//! aside. Beside it lie the lock and `hawser_virtio::CrashFile`'s record, which decides what a crash is and which disk is set
//! aside for it; this only keeps the words for people. Must not know: sockets, requests.
//!
//! Invariant: a folder of a version that we do not know is never changed.

use crate::durable::{self, Machine};
use hawser_fabric::target::Lineage;
use hawser_virtio::{Crash, CrashFile};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Raised whenever an older binary could misread the file.
const VERSION: u32 = 1;

/// The folder that belongs to an API socket.
pub(crate) fn folder_of(api: &Path) -> PathBuf {
    let mut folder = api.as_os_str().to_owned();
    folder.push(".state");
    PathBuf::from(folder)
}

/// Makes the folder, for us alone.
pub(super) fn make_folder(folder: &Path) -> Result<(), String> {
    durable::make_folder(&Machine, folder, 0o700)
        .map_err(|error| format!("{}: cannot be made: {error}", folder.display()))
}

/// The run state: loaded once, written at each change.
pub(super) struct RunState {
    file: PathBuf,
    data: Data,
    /// The build before this one, if there was any.
    pub(super) previous: Option<String>,
    /// The process before this one did not end in order: what it asked of targets may still be under way.
    pub(super) had_predecessor: bool,
    /// Which disks are set aside.
    pub(super) crash_file: Arc<CrashFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Data {
    version: u32,
    /// The build that wrote this last.
    build_id: String,
    /// Its process ended in order.
    ended: bool,
    /// Deaths by our own fault, since the folder was made.
    crashes: u64,
    /// Why disks were set aside.
    suspended: BTreeMap<String, String>,
    /// What this process and those before it are known by to hosts: not there before there was a target.
    #[serde(default)]
    targets: Targets,
}

/// Numbers of processes, the newest last.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Targets {
    /// The kernel's boot that they ran in: in another one, this may be a copy of another machine's.
    boot: String,
    processes: Vec<u32>,
}

/// A host that comes back after more restarts than this waits as for a stranger's.
const TARGETS_MAX: usize = 64;

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl RunState {
    /// Takes the folder over from the process before, logs how that one ended, and installs the handler that notes how
    /// this one does.
    ///
    /// # Errors
    /// When something in it is of another version, or cannot be read or written: one line.
    pub(super) fn take_over(folder: &Path, build_id: &str) -> Result<RunState, String> {
        let file = folder.join("state.json");
        let before = read(&file, folder)?;
        let (crash_file, crash) =
            CrashFile::open(&folder.join("crash")).map_err(|error| error.to_string())?;
        let previous = before.as_ref().map(|data| data.build_id.clone());
        let mut data = before.unwrap_or(Data {
            version: VERSION,
            build_id: String::new(),
            ended: true,
            crashes: 0,
            suspended: BTreeMap::new(),
            targets: Targets::default(),
        });
        let had_predecessor = !data.ended;
        build_id.clone_into(&mut data.build_id);
        if let Some(crash) = &crash {
            data.note(crash);
        }
        let state = RunState { file, data, previous, had_predecessor, crash_file: Arc::new(crash_file) };
        state.write()?;
        Ok(state)
    }

    /// Takes down that from now on we ask things of devices, and by what our target's controllers are known. Called with the
    /// lock held, which the process before us had as long as it ran.
    pub(super) fn begin(&mut self) -> Result<Lineage, String> {
        self.data.ended = false;
        let lineage = self.data.targets.next(&boot());
        self.write()?;
        Ok(lineage)
    }

    /// Takes down that we never did: the start failed.
    pub(super) fn never_begun(&mut self) {
        self.data.ended = !self.had_predecessor;
        if let Err(error) = self.write() {
            log::error!("{error}");
        }
    }

    /// Takes down that everything has been drained.
    pub(super) fn end(&mut self) -> Result<(), String> {
        self.crash_file.end_in_order();
        self.data.ended = true;
        self.write()
    }

    /// How often a process died by its own fault since the folder was made.
    pub(super) fn crashes(&self) -> u64 {
        self.data.crashes
    }

    /// Why `disk` is set aside, if it is.
    pub(super) fn suspended(&self, disk: &str) -> Option<String> {
        let why = || {
            self.data.suspended.get(disk).map_or("a request of it crashed the daemon twice", String::as_str)
        };
        self.crash_file.is_set_aside(disk).then(|| why().to_owned())
    }

    /// Gives `disk` another chance.
    pub(super) fn resume(&mut self, disk: &str) -> Result<(), String> {
        self.crash_file.resume(disk);
        self.data.suspended.remove(disk);
        self.write()
    }

    fn write(&self) -> Result<(), String> {
        let text = serde_json::to_vec_pretty(&self.data).map_err(|error| error.to_string())?;
        durable::replace(&Machine, &self.file, &text, 0o600)
            .map_err(|error| format!("{}: cannot be written: {error}", self.file.display()))
    }
}

/// Whether the process that used the folder last has ended in order, or there was none.
pub(crate) fn has_ended(folder: &Path) -> bool {
    !matches!(read(&folder.join("state.json"), folder), Ok(Some(Data { ended: false, .. })) | Err(_))
}

/// The kernel's boot; empty where it does not say.
fn boot() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

impl Targets {
    /// A new process in this boot, after those that are there.
    fn next(&mut self, boot: &str) -> Lineage {
        if boot.is_empty() || self.boot != boot {
            self.processes.clear();
        }
        boot.clone_into(&mut self.boot);
        let ended = self.processes.clone();
        let random = || u32::try_from(RandomState::new().hash_one(boot) >> 32).unwrap_or(0);
        let own = std::iter::repeat_with(random).find(|own| !ended.contains(own)).unwrap_or(0);
        self.processes.push(own);
        let over = self.processes.len().saturating_sub(TARGETS_MAX);
        self.processes.drain(..over);
        Lineage { own, ended }
    }
}

impl Data {
    fn note(&mut self, crash: &Crash) {
        self.crashes += 1;
        let signal = signal_name(crash.signal);
        let Some(request) = &crash.request else {
            log::error!("the process before this one died by {signal}, on no request: all disks are served");
            return;
        };
        let (from, to) = request.counters;
        let numbers = if from == to { format!("number {from}") } else { format!("numbers {from} to {to}") };
        let what =
            format!("{signal} on a request (queue {}, head {}, {numbers})", request.queue, request.head);
        log::error!("the process before this one died by {what} of disk {}", request.disk);
        if request.again {
            self.suspended.insert(request.disk.clone(), format!("the daemon died twice by {what}"));
        }
    }
}

fn read(file: &Path, folder: &Path) -> Result<Option<Data>, String> {
    let cannot = |error: &dyn std::fmt::Display| format!("{}: cannot be read: {error}", file.display());
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(&error)),
    };
    let VersionOnly { version } = serde_json::from_slice(&text).map_err(|error| cannot(&error))?;
    if version != VERSION {
        return Err(format!(
            "{}: run state of version {version}, want {VERSION}: start the binary that wrote it, or remove {} once no VM uses its disks",
            file.display(),
            folder.display()
        ));
    }
    serde_json::from_slice(&text).map(Some).map_err(|error| cannot(&error))
}

fn signal_name(signal: u32) -> String {
    let names = [
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGILL, "SIGILL"),
        (libc::SIGABRT, "SIGABRT"),
    ];
    let known = names.iter().find(|(number, _)| u32::try_from(*number) == Ok(signal));
    known.map_or_else(|| format!("signal {signal}"), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_virtio::CrashedRequest;

    fn crash(again: bool) -> Crash {
        let disk = "d".to_owned();
        let request = CrashedRequest { disk, queue: 1, head: 7, counters: (5, 5), again };
        Crash { signal: 11, request: Some(request) }
    }

    #[test]
    fn another_version_is_refused_and_the_folder_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("state.json");
        for (text, want) in [
            (
                r#"{"version": 2, "something": "new"}"#,
                "state.json: run state of version 2, want 1: start the binary",
            ),
            ("no json", "state.json: cannot be read"),
        ] {
            fs::write(&file, text).unwrap();
            let error = RunState::take_over(folder.path(), "b1").err().unwrap();
            assert!(error.contains(want), "{error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else was made");
        }
    }

    #[test]
    fn the_build_before_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let previous = |build: &str| RunState::take_over(folder.path(), build).unwrap().previous;
        assert_eq!(previous("b1"), None);
        assert_eq!(previous("b2"), Some("b1".to_owned()));
        assert_eq!(previous("b2"), Some("b2".to_owned()));
    }

    #[test]
    fn an_end_in_order_leaves_no_predecessor() {
        let folder = tempfile::tempdir().unwrap();
        let take_over = || RunState::take_over(folder.path(), "b").unwrap();
        assert!(!take_over().had_predecessor, "there was none");
        take_over().begin().unwrap();
        let mut state = take_over();
        assert!(state.had_predecessor, "it never said that it ended");
        state.begin().unwrap();
        state.never_begun();
        let mut state = take_over();
        assert!(state.had_predecessor, "a start that failed changes nothing");
        state.begin().unwrap();
        state.end().unwrap();
        assert!(!take_over().had_predecessor);
    }

    #[test]
    fn processes_before_this_one_are_known_in_the_same_boot_only() {
        let mut targets = Targets::default();
        let first = targets.next("b1");
        let second = targets.next("b1");
        assert_eq!((first.ended.len(), &second.ended), (0, &vec![first.own]));
        assert_ne!(first.own, second.own);
        for _ in 0..2 * TARGETS_MAX {
            targets.next("b1");
        }
        assert_eq!(targets.next("b1").ended.len(), TARGETS_MAX);
        assert!(targets.next("b2").ended.is_empty());
        assert!(targets.next("").ended.is_empty());
        assert!(targets.next("").ended.is_empty(), "no boot, no proof");
    }

    #[test]
    fn the_second_crash_on_a_request_says_why() {
        let (suspended, targets) = (BTreeMap::new(), Targets::default());
        let mut data =
            Data { version: 1, build_id: String::new(), ended: true, crashes: 0, suspended, targets };
        data.note(&crash(false));
        assert!(data.suspended.is_empty());
        data.note(&crash(true));
        data.note(&Crash { signal: 6, request: None });
        assert_eq!(data.crashes, 3);
        assert_eq!(
            data.suspended["d"],
            "the daemon died twice by SIGSEGV on a request (queue 1, head 7, number 5)"
        );
    }
}
