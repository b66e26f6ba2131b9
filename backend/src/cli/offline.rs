//! Pools without a daemon: the devices of a configuration, opened by this process for as long as a command takes.
//!
//! Owns: who may do that now, which devices are there, what is left for the next process. Must not know: what a command does with
//! a pool.
//!
//! The daemon of the same configuration must not run: its lock is held meanwhile. If it died, what it had acknowledged is in the
//! tail in its run state, and is taken from there.

use super::unfinished::Unfinished;
use super::{Failure, client, warn};
use crate::assemble::device::{self, OpenError, Opening};
use crate::assemble::host;
use crate::assemble::pool::{self as assemble, Found};
use crate::assemble::reactors::Reactors;
use crate::assemble::reserve;
use crate::daemon::api::pool_view::PoolView;
use crate::daemon::host_lock::{self, HostLock};
use crate::daemon::lock::{Lock, Locked, command_of};
use crate::daemon::pools::past::{self, Past};
use crate::daemon::run_state;
use crate::image;
use crate::tail::{self, FileTail};
use clap::Args;
use hawser_block::Device;
use hawser_config::Config;
use hawser_config::value::{Name, VolumePath};
use hawser_runtime::ReactorHandle;
use hawser_volume::pool::{self, Label, MemoryTail, OpenOptions, Pool, PoolError, Tail};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// With a daemon, or without.
#[derive(Args)]
pub(super) struct WhereArgs {
    /// Without a daemon, on the devices of this configuration file
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// The daemon's API socket [env: HAWSER_API]; with --config, that of the daemon that must not run, instead of the file's
    // Not from the environment by itself: with --config the file says whose run state is looked into.
    #[arg(long, value_name = "SOCK")]
    api: Option<PathBuf>,
    /// Print JSON for scripts instead of a table for people
    #[arg(long)]
    pub(super) json: bool,
    /// With --config: another host that has the pool open is gone for good
    #[arg(long, requires = "config")]
    assume_exclusive: bool,
    /// With --config: start a pool that lacks members although nobody can tell which of its stripes were being written
    #[arg(long, requires = "config")]
    accept_loss: bool,
    /// With --config: start a pool although members are missing
    #[arg(long, requires = "config")]
    degraded: bool,
}

impl WhereArgs {
    /// For a command that is always without a daemon.
    pub(super) fn offline(config: &Path, api: Option<PathBuf>) -> WhereArgs {
        let config = Some(config.to_owned());
        WhereArgs { config, api, json: false, assume_exclusive: false, accept_loss: false, degraded: false }
    }

    /// The daemon, for commands without --config.
    pub(super) fn client(&self) -> client::Client {
        let from_environment = || std::env::var_os("HAWSER_API").map(PathBuf::from);
        let api = self.api.clone().or_else(from_environment);
        client::Client::new(api.as_deref().unwrap_or(Path::new(hawser_config::DEFAULT_API)))
    }
}

impl From<PoolError> for Failure {
    fn from(error: PoolError) -> Failure {
        match error {
            PoolError::Wrong(what) => Failure::Usage(what),
            error => Failure::Failed(assemble::line_of(error)),
        }
    }
}

/// What a command wants of pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Nothing is written.
    Look,
    Change,
}

/// The devices of a configuration, and what is known of them.
pub(super) struct Offline {
    pub(super) config: Config,
    file: PathBuf,
    purpose: Purpose,
    degraded: bool,
    assume_exclusive: bool,
    accept_loss: bool,
    folder: PathBuf,
    host: [u8; 16],
    reactors: Reactors,
    devices: Vec<(Name, Arc<dyn Device>)>,
    labels: Vec<(Name, Label)>,
    /// Devices that are not there, and why.
    away: Vec<(Name, String)>,
    unfinished: Vec<Unfinished>,
    _lock: Option<Lock>,
    _host_lock: Option<HostLock>,
}

/// A pool that this process has open.
pub(super) struct OpenPool {
    pub(super) pool: Pool,
    reserved: Vec<Arc<dyn Device>>,
    tail: Option<PathBuf>,
}

impl Offline {
    /// Opens all devices that no disk and no namespace has for itself, and finds out what pools they belong to.
    pub(super) fn begin(args: &WhereArgs, file: &Path, purpose: Purpose) -> Result<Offline, Failure> {
        let mut config = Config::load(file)?;
        if let Some(api) = &args.api {
            let api =
                api.to_string_lossy().parse().map_err(|what| Failure::Usage(format!("--api: {what}")))?;
            config.set_api(api)?;
        }
        device::check(&config)?;
        let folder = run_state::folder_of(config.daemon.api.as_path());
        let lock = lock(&folder, file, &config)?;
        let identity = match purpose {
            Purpose::Change => host::identity(&config.host, &config.daemon.state_dir),
            Purpose::Look => host::looking(&config.host, &config.daemon.state_dir),
        };
        let identity = identity.map_err(Failure::Failed)?;
        let host_lock = match purpose {
            Purpose::Change if host_lock::is_needed(&config) => {
                Some(HostLock::take(&identity).map_err(Failure::Failed)?)
            }
            _ => None,
        };
        let reactors = Reactors::start(&[None], config.daemon.poll_us).map_err(Failure::Failed)?;
        let mut offline = Offline {
            file: file.to_owned(),
            purpose,
            degraded: args.degraded,
            assume_exclusive: args.assume_exclusive,
            accept_loss: args.accept_loss,
            folder,
            host: identity.id.0,
            reactors,
            devices: Vec::new(),
            labels: Vec::new(),
            away: Vec::new(),
            unfinished: Vec::new(),
            _lock: lock,
            _host_lock: host_lock,
            config,
        };
        offline.open_devices()?;
        offline.probe();
        Ok(offline)
    }

    fn open_devices(&mut self) -> Result<(), Failure> {
        // What the daemon asked targets for when it died may still be carried out, as for its successor.
        let after_death = !run_state::has_ended(&self.folder);
        let free = assemble::free_devices(&self.config);
        let mut openings = Vec::new();
        for placed in self.config.devices.iter().filter(|device| free.contains(&device.value.name)) {
            let name = &placed.value.name;
            let opening = if after_death {
                Opening { had_predecessor: true, offline: true, in_run_state: true }
            } else {
                let unfinished = Unfinished::begin(&self.config, placed);
                let had_predecessor = unfinished.had_predecessor;
                self.unfinished.push(unfinished);
                Opening { had_predecessor, offline: true, in_run_state: false }
            };
            openings.push((name.clone(), placed, opening));
        }
        // All at once: one may wait for whoever has its file, another for its target.
        let (config, handles) = (&self.config, self.reactors.handles());
        let mut opened = std::thread::scope(|scope| {
            let (sender, answers) = mpsc::channel();
            for (number, (name, placed, opening)) in openings.iter().enumerate() {
                let sender = sender.clone();
                scope.spawn(move || {
                    let opened = device::open(placed, config, *opening, handles).and_then(|device| {
                        image::reach(&device)
                            .map_err(|what| OpenError::Failed(format!("device {name}: {what}")))?;
                        Ok(device)
                    });
                    // Somebody waits for it.
                    let _ = sender.send((number, opened));
                });
            }
            drop(sender);
            let names: Vec<&Name> = openings.iter().map(|(name, ..)| name).collect();
            all_of(&names, &answers)
        });
        // As the configuration has them.
        opened.sort_by_key(|(number, _)| *number);
        for (number, opened) in opened {
            let name = openings[number].0.clone();
            match opened {
                Ok(device) => self.devices.push((name, device)),
                Err(OpenError::Config(error)) => return Err(error.into()),
                Err(OpenError::Failed(what)) => self.away.push((name, what)),
            }
        }
        Ok(())
    }

    /// Devices that are not there, so that whoever shows all that there is does not.
    pub(super) fn left_out(&self) -> Vec<String> {
        self.away.iter().map(|(name, _)| format!("device {name}")).collect()
    }

    fn probe(&mut self) {
        let ask = |(name, device): &(Name, Arc<dyn Device>)| {
            (name.clone(), pool::probe(self.reactor(), Arc::clone(device)))
        };
        let asked: Vec<_> = self.devices.iter().map(ask).collect();
        for (name, answer) in asked {
            match answer.wait() {
                Ok(Some(label)) => self.labels.push((name, label)),
                Ok(None) => {}
                Err(error) => self.away.push((name, assemble::line_of(error))),
            }
        }
    }

    /// The file that this is the configuration of.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Whether a daemon of this configuration died, so that its VMs may wait for the next.
    pub(super) fn after_death(&self) -> bool {
        !run_state::has_ended(&self.folder)
    }

    /// The disks and subsystems of the configuration that are on a volume.
    pub(super) fn users_of(&self, path: &VolumePath) -> Vec<String> {
        let disks = self.config.disks.iter().map(|placed| &placed.value);
        assemble::users_of(path, disks, self.config.subsystems.iter().map(|placed| &placed.value))
    }

    /// One of them.
    pub(super) fn user_of(&self, path: &VolumePath) -> Option<String> {
        self.users_of(path).into_iter().next()
    }

    pub(super) fn reactor(&self) -> &ReactorHandle {
        &self.reactors.handles()[0]
    }

    /// A device for a pool: not one that a disk or namespace has for itself, and none that is gone when this ends.
    pub(super) fn device(&self, name: &str) -> Result<Arc<dyn Device>, Failure> {
        let name = assemble::known_device(&self.config, name).map_err(Failure::Usage)?;
        assemble::outlives_commands(&self.config, &name).map_err(Failure::Usage)?;
        if let Some((_, device)) = self.devices.iter().find(|(other, _)| *other == name) {
            return Ok(Arc::clone(device));
        }
        if let Some((_, what)) = self.away.iter().find(|(other, _)| *other == name) {
            return Err(Failure::Failed(what.clone()));
        }
        Err(Failure::Failed(format!("device {name} is a disk's or a subsystem's own, want a free device")))
    }

    /// All pools that there are.
    pub(super) fn found(&self) -> Vec<Found> {
        Found::all(self.labels.iter().map(|(name, label)| (name, label))).into_values().collect()
    }

    /// The pool called `name`.
    pub(super) fn find(&self, name: &str) -> Result<Found, Failure> {
        let all = self.found();
        let same: Vec<&Found> = all.iter().filter(|found| found.label.pool == name).collect();
        match same.as_slice() {
            [one] => Ok((*one).clone()),
            [one, other, ..] => Err(Failure::Failed(assemble::clash_line(name, one, other))),
            [] => {
                let names: Vec<&str> = all.iter().map(|found| found.label.pool.as_str()).collect();
                let there = if names.is_empty() {
                    "there is none".to_owned()
                } else {
                    format!("there are {}", names.join(", "))
                };
                let what = format!("pool {name:?} is on no device of {}; {there}", self.file.display());
                Err(Failure::Failed(self.and_away(what)))
            }
        }
    }

    /// The members of a pool that are there.
    pub(super) fn members(&self, found: &Found) -> Vec<Arc<dyn Device>> {
        let is_member = |name: &Name| found.devices.iter().any(|(member, ..)| member == name);
        self.devices
            .iter()
            .filter(|(name, _)| is_member(name))
            .map(|(_, device)| Arc::clone(device))
            .collect()
    }

    /// An error, and what may be the reason for it.
    fn and_away(&self, what: String) -> String {
        let away: Vec<&str> = self.away.iter().map(|(_, what)| what.as_str()).collect();
        if away.is_empty() { what } else { format!("{what} ({})", away.join("; ")) }
    }

    /// Of a pool that lacks members: the devices that may be they, and are not.
    pub(super) fn and_others(&self, found: &Found, what: String) -> String {
        // A device of a pool that has all of its own is nobody else's.
        let lacking: Vec<[u8; 16]> =
            self.found().iter().filter(|it| !it.missing().is_empty()).map(|it| it.label.pool_uuid).collect();
        let others = self.labels.iter().filter(|(_, label)| {
            label.pool_uuid != found.label.pool_uuid && lacking.contains(&label.pool_uuid)
        });
        let others = others.map(|(name, label)| format!("device {name} belongs to pool {}", label.pool));
        let others: Vec<String> = self.away.iter().map(|(_, what)| what.clone()).chain(others).collect();
        if others.is_empty() { what } else { format!("{what} ({})", others.join("; ")) }
    }

    /// Why something could not be done with a pool.
    pub(super) fn explained(&self, found: &Found, error: PoolError) -> Failure {
        match Failure::from(error) {
            Failure::Failed(what) if found.missing().is_empty() => Failure::Failed(self.and_away(what)),
            Failure::Failed(what) => Failure::Failed(self.and_others(found, what)),
            usage @ Failure::Usage(_) => usage,
        }
    }

    /// Opens a pool, for what the command wants of it.
    pub(super) fn open(&self, name: &str) -> Result<OpenPool, Failure> {
        let found = self.find(name)?;
        self.open_found(&found)
    }

    /// The same.
    pub(super) fn open_found(&self, found: &Found) -> Result<OpenPool, Failure> {
        let name: Name = found.label.pool.parse().map_err(Failure::Failed)?;
        let mut policy = self.config.pool(&name);
        policy.assume_exclusive |= self.assume_exclusive;
        policy.accept_loss |= self.accept_loss;
        let path = tail::file_of(&self.folder, &found.label.pool_uuid);
        let is_there = path.exists();
        let looks = self.purpose == Purpose::Look;
        let tail: Box<dyn Tail> = match (looks, is_there) {
            (_, false) => Box::new(MemoryTail::default()),
            (true, true) => {
                let content = FileTail::look(&path, &found.label.pool_uuid).map_err(Failure::Failed)?;
                Box::new(MemoryTail(Arc::new(Mutex::new(content))))
            }
            (false, true) => {
                Box::new(FileTail::open(&path, &found.label.pool_uuid).map_err(Failure::Failed)?)
            }
        };
        let state_dir = &self.config.daemon.state_dir;
        if !looks
            && !self.degraded
            && let Some(what) = past::is_older(state_dir, &found.label)
        {
            return Err(Failure::Failed(self.and_away(format!("pool {name}: {what}"))));
        }
        let devices = self.members(found);
        let reserved = match looks {
            true => Vec::new(),
            false => reserve::take_all(devices.clone(), self.host, policy.assume_exclusive)
                .map_err(Failure::Failed)?,
        };
        let options = OpenOptions {
            degraded: looks || self.degraded,
            read_only: looks,
            ..assemble::open_options(&policy, self.host, tail)
        };
        match Pool::open(self.reactor(), devices, options).wait() {
            Ok(pool) => {
                if !looks {
                    past::keep(state_dir, &found.label.pool_uuid, Past::of(&pool.view()));
                }
                Ok(OpenPool { pool, reserved, tail: (is_there && !looks).then_some(path) })
            }
            Err(error) => {
                self.leave(&reserved);
                Err(self.explained(found, error))
            }
        }
    }

    fn leave(&self, reserved: &[Arc<dyn Device>]) {
        reserved.iter().for_each(|device| reserve::leave(device.as_ref(), &self.host));
    }

    /// Makes everything durable and lets the pool go.
    pub(super) fn close(&self, open: OpenPool) -> Result<(), Failure> {
        let OpenPool { pool, reserved, tail } = open;
        pool.close().wait()?;
        drop(pool);
        if let Some(tail) = tail {
            // What it holds is on the members now.
            std::fs::remove_file(&tail).map_err(|error| {
                Failure::Failed(format!("{}: cannot be removed: {error}", tail.display()))
            })?;
        }
        self.leave(&reserved);
        Ok(())
    }

    /// Does `work` on an open pool, and closes it.
    pub(super) fn with_pool<T>(
        &self,
        name: &str,
        work: impl FnOnce(&Offline, &Pool) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let open = self.open(name)?;
        let done = work(self, &open.pool);
        let closed = self.close(open);
        let done = done?;
        closed.map(|()| done)
    }

    /// Makes a new pool, and opens it once.
    pub(super) fn create(
        &self,
        devices: &[String],
        options: pool::CreateOptions,
    ) -> Result<PoolView, Failure> {
        let known = |device: &String| assemble::known_device(&self.config, device).map_err(Failure::Usage);
        let names: Vec<Name> = devices.iter().map(known).collect::<Result<_, _>>()?;
        assemble::distinct(&names).map_err(Failure::Usage)?;
        let others =
            self.labels.iter().filter(|(name, label)| !names.contains(name) && label.pool == options.name);
        if let Some((other, _)) = others.into_iter().next() {
            return Err(Failure::Failed(format!(
                "pool {} is there on device {other}, want another name",
                options.name
            )));
        }
        let devices: Vec<Arc<dyn Device>> =
            devices.iter().map(|name| self.device(name)).collect::<Result<_, _>>()?;
        let reserved =
            reserve::take_all(devices.clone(), self.host, self.assume_exclusive).map_err(Failure::Failed)?;
        let uuid = options.uuid;
        let created = pool::create(self.reactor(), devices.clone(), options).wait();
        self.leave(&reserved);
        created?;
        self.show_new(&names, &devices, uuid).map_err(|failure| {
            let (Failure::Usage(what) | Failure::Failed(what)) = failure;
            Failure::Failed(format!("the pool is made, but it cannot be opened and closed: {what}"))
        })
    }

    /// Opens a pool that was just made, and closes it again.
    fn show_new(
        &self,
        names: &[Name],
        devices: &[Arc<dyn Device>],
        uuid: [u8; 16],
    ) -> Result<PoolView, Failure> {
        let asked: Vec<_> = names
            .iter()
            .zip(devices)
            .map(|(name, device)| (name, pool::probe(self.reactor(), Arc::clone(device))))
            .collect();
        let mut labels = Vec::new();
        for (name, answer) in asked {
            if let Some(label) = answer.wait()? {
                labels.push((name, label));
            }
        }
        let found = Found::all(labels.iter().map(|(name, label)| (*name, label))).remove(&uuid);
        let found =
            found.ok_or_else(|| Failure::Failed("the new pool is not found on its devices".to_owned()))?;
        let open = self.open_found(&found)?;
        let view = assemble::pool_view(&open.pool.view());
        self.close(open)?;
        Ok(view)
    }

    /// Ends the process where a command has failed: a reactor that waits for a lost target would keep it.
    pub(super) fn end<T>(self, done: Result<T, Failure>) -> T {
        let devices = self.devices.into_iter().map(|(_, device)| device).collect();
        match done {
            Ok(done) => {
                for (_, what) in &self.away {
                    warn(&format!("hawser: left out: {what}"));
                }
                device::close(devices);
                self.unfinished.into_iter().for_each(Unfinished::end);
                done
            }
            Err(failure) => {
                // In order where that is possible, so that the next one need not wait for what this one has asked for.
                device::close(devices);
                let (line, code) = match failure {
                    Failure::Usage(line) => (line, 2),
                    Failure::Failed(line) => (line, 1),
                };
                warn(&format!("hawser: {line}"));
                std::process::exit(code);
            }
        }
    }
}

/// Who has not answered by then is named.
const WAITING_AFTER: Duration = Duration::from_secs(1);

/// All answers; says who is waited for, if that takes its time.
fn all_of<T>(names: &[&Name], answers: &mpsc::Receiver<(usize, T)>) -> Vec<(usize, T)> {
    let until = Instant::now() + WAITING_AFTER;
    let mut all = Vec::new();
    while all.len() < names.len() {
        match answers.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(answer) => all.push(answer),
            Err(_) => {
                let lacking =
                    (0..).zip(names).filter(|(number, _)| all.iter().all(|(there, _)| there != number));
                let lacking: Vec<&str> = lacking.map(|(_, name)| name.as_str()).collect();
                warn(&format!("hawser: waiting for {}, for half a minute at most", lacking.join(", ")));
                break;
            }
        }
    }
    all.extend(answers.iter());
    all
}

/// The daemon of this configuration must not run, nor start, as long as we have its devices.
fn lock(folder: &Path, file: &Path, config: &Config) -> Result<Option<Lock>, Failure> {
    if !folder.is_dir() {
        // Where there is no run state, there was no daemon.
        return Ok(None);
    }
    // Another command ends soon, most of them.
    let until = Instant::now() + COMMAND_MAX;
    loop {
        let what = match Lock::attempt(&folder.join("lock")) {
            Ok(lock) => return Ok(Some(lock)),
            Err(Locked::Other(what)) => return Err(Failure::Failed(what)),
            Err(Locked::By { pid, what }) => match command_of(&pid) {
                Some(command) if Instant::now() < until => {
                    log::debug!("waiting for `{command}`");
                    std::thread::sleep(Duration::from_millis(50));
                    continue;
                }
                Some(command) => format!("`{command}` works on {} ({what})", file.display()),
                None => format!(
                    "{} is served by a daemon: use --api {} instead of --config ({what})",
                    file.display(),
                    config.daemon.api
                ),
            },
        };
        return Err(Failure::Failed(what));
    }
}

/// Another command is waited for so long.
const COMMAND_MAX: Duration = Duration::from_secs(5);
