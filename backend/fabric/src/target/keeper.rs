//! Keeps reservations over restarts of the target: a file for each namespace.
//!
//! Owns: the folder `reservations` in the state directory, and the thread that writes it, because a reactor may not wait for a
//! disk. Must not know: the rules.
//!
//! Order, so that a power cut at any time leaves the state before or after a command, and the one after once the host has its
//! answer:
//!
//! 1. the command changes the state in memory: from now on it is in force;
//! 2. the whole state is written to `UUID.new`, and that is synced;
//! 3. it is renamed to `UUID`, and the folder is synced;
//! 4. for preempt-and-abort, the commands of the preempted hosts end;
//! 5. the host is answered. If 2 or 3 fail it is told "Internal Error": the state is in force, and may be lost in a restart.
//!
//! What is written is the state at that time, so that files never go back, and one write does for all commands that wait for it.
//! A command that changes nothing is answered at once, unless what it found is not on disk yet.

use super::namespace::Namespace;
use super::registry::Subsystem;
use super::reservations::Reservations;
use super::uuid;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};

/// What is told when a state is on disk, or could not be put there.
pub(super) type Done = Box<dyn FnOnce(bool) + Send>;

struct Job {
    subsystem: Arc<Subsystem>,
    position: usize,
    done: Done,
}

/// The folder and its thread, which ends with us.
pub(super) struct Keeper {
    jobs: Sender<Job>,
}

impl Keeper {
    /// Takes over what is in the folder, and keeps it from now on.
    ///
    /// # Errors
    /// When a file in it cannot be read, or is not ours to understand: one line with its path. A folder that is not there is made
    /// with the first reservation.
    pub(super) fn start(folder: &Path, subsystems: &[Arc<Subsystem>]) -> Result<Keeper, String> {
        let named = |path: &Path, error: String| format!("{}: {error}", path.display());
        let boot = boot();
        for subsystem in subsystems {
            for namespace in &subsystem.namespaces {
                let path = path_of(folder, subsystem, namespace);
                match fs::read_to_string(&path) {
                    Ok(text) => {
                        let state =
                            Reservations::from_text(&text, &boot).map_err(|what| named(&path, what))?;
                        namespace.restore_reservations(state);
                    }
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(named(&path, format!("cannot be read: {error}"))),
                }
            }
        }
        let (jobs, to_do) = mpsc::channel::<Job>();
        let folder = folder.to_owned();
        std::thread::Builder::new()
            .name("reservations".to_owned())
            .spawn(move || {
                while let Ok(first) = to_do.recv() {
                    // What has come meanwhile is in the same state: each namespace is written once for all of it.
                    let mut jobs: Vec<Job> = std::iter::once(first).chain(to_do.try_iter()).collect();
                    while let Some(Job { subsystem, position, .. }) = jobs.first() {
                        let (subsystem, position) = (Arc::clone(subsystem), *position);
                        let kept = keep(&folder, &boot, &subsystem, position);
                        let same =
                            |job: &Job| job.position == position && Arc::ptr_eq(&job.subsystem, &subsystem);
                        let (these, others) = jobs.into_iter().partition(same);
                        jobs = others;
                        these.into_iter().for_each(|job: Job| (job.done)(kept));
                    }
                }
            })
            .map_err(|error| format!("no thread to keep reservations: {error}"))?;
        Ok(Keeper { jobs })
    }

    /// Writes a namespace's state, and then calls `done`.
    pub(super) fn keep(&self, subsystem: Arc<Subsystem>, position: usize, done: Done) {
        if let Err(mpsc::SendError(job)) = self.jobs.send(Job { subsystem, position, done }) {
            (job.done)(false);
        }
    }
}

/// Writes a namespace's state of now; whether that succeeded.
fn keep(folder: &Path, boot: &str, subsystem: &Subsystem, position: usize) -> bool {
    let namespace = &subsystem.namespaces[position];
    let path = path_of(folder, subsystem, namespace);
    let (epoch, text) = namespace.reservations_as_text(boot);
    match write(folder, &path, &text) {
        Ok(()) => {
            namespace.reservations_were_kept(epoch);
            true
        }
        Err(error) => {
            log::error!(
                "{}: cannot be written: {error}; the change of reservations that it was for is refused",
                path.display()
            );
            false
        }
    }
}

/// The host's boot; empty where the kernel does not say.
fn boot() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// The file of a namespace: its NQN and NSID as a UUID, because an NQN may be longer than a file's name.
fn path_of(folder: &Path, subsystem: &Subsystem, namespace: &Namespace) -> PathBuf {
    let uuid = uuid::of_namespace(&subsystem.nqn, namespace.nsid);
    folder.join(format!("{:032x}", u128::from_be_bytes(uuid)))
}

/// The folder, durably in the one above it.
fn make(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    folder.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn write(folder: &Path, path: &Path, text: &str) -> io::Result<()> {
    make(folder)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(folder)?.sync_all()
}
