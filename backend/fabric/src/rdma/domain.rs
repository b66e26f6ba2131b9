//! An RDMA device in this process: which memory it may use, and by which keys.
//!
//! Owns: the registration of every region that requests may name ([`hawser_block::regions`]), once for each device, on the thread of
//! whoever maps it. Must not know: connections, commands. Invariants:
//! - Memory is registered before a request can name it, and deregistered after the last one that could has ended.
//! - Whoever looks keys up keeps a list that does not change, and asks for a new one when [`Domain::generation`] is another: one load.

use super::{KeyPolicy, driver, pinned, words};
use hawser_block::regions::{Listener, Regions, Span};
use hawser_verbs_abi::{Device, DeviceAttributes, Keys, Region, Table, access};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Registered memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) region: *mut Region,
    pub(crate) keys: Keys,
    /// No other registration of this domain has it: addresses are used again.
    pub(crate) number: u64,
    /// Some of it was taken away since: it is not named any more.
    pub(crate) withdrawn: bool,
}

impl Entry {
    /// Whether it has all of these bytes.
    pub(crate) fn has(&self, start: usize, len: usize) -> bool {
        start >= self.start && len <= self.len && start - self.start <= self.len - len
    }
}

// SAFETY: a region's handle, which all threads may use ([`hawser_verbs_abi`]), and numbers.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

/// By address. A plain value, the same for as long as it is kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entries(Arc<Vec<Entry>>);

impl Entries {
    /// Those that are given.
    pub(crate) fn new(mut entries: Vec<Entry>) -> Entries {
        entries.sort_by_key(|entry| entry.start);
        Entries(Arc::new(entries))
    }

    /// The one that has this byte.
    pub(crate) fn find(&self, start: usize) -> Option<&Entry> {
        let index = self.0.partition_point(|entry| entry.start <= start).checked_sub(1)?;
        Some(&self.0[index]).filter(|entry| entry.has(start, 1))
    }
}

/// See the module's text.
pub(crate) struct Domain {
    table: &'static Table,
    raw: *mut hawser_verbs_abi::Domain,
    pub(crate) name: String,
    pub(crate) attributes: DeviceAttributes,
    purpose: Purpose,
    entries: Mutex<Vec<Entry>>,
    generation: AtomicU64,
    /// The device was removed.
    gone: AtomicBool,
}

// SAFETY: a domain and its regions may be used by all threads ([`hawser_verbs_abi`]); what is ours is behind a mutex.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

/// What a domain's memory is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Requests of ours: all memory that they may name, and targets reach it by such keys.
    Initiator(KeyPolicy),
    /// Those of hosts: connections' own memory, which no peer reaches.
    Target,
}

/// A domain for each device and purpose. They live as long as the process.
static DOMAINS: Mutex<Vec<(usize, Purpose, Arc<Domain>)>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks whether all memory that devices have is still there.
pub(crate) fn look_at_all() {
    let domains: Vec<_> = lock(&DOMAINS).iter().map(|(.., domain)| Arc::clone(domain)).collect();
    let domains = domains.into_iter().filter(|domain| !domain.is_gone());
    domains.for_each(|domain| domain.look());
}

impl Domain {
    /// The domain of a device; the first time all memory that requests may name is registered with it. Slow: never on a reactor's
    /// thread.
    ///
    /// # Errors
    /// One line, when the device cannot do what the policy asks for.
    pub(crate) fn of(
        table: &'static Table,
        device: *mut Device,
        purpose: Purpose,
    ) -> Result<Arc<Domain>, String> {
        // One thread makes it; others wait.
        let mut domains = lock(&DOMAINS);
        let known = domains
            .iter()
            .find(|(known, with, domain)| *known == device as usize && *with == purpose && !domain.is_gone());
        if let Some((_, _, domain)) = known {
            return Ok(Arc::clone(domain));
        }
        let mut attributes = DeviceAttributes::NONE;
        // SAFETY: a device of the driver's, and room for its attributes.
        let result = unsafe { (table.device_attributes)(device, &raw mut attributes) };
        if result < 0 {
            return Err(format!("an RDMA device does not say what it can do: {}", words::errno(result)));
        }
        let name = driver::name(&attributes);
        if purpose == Purpose::Initiator(KeyPolicy::Window)
            && !(attributes.windows_2b && attributes.windows_max > 0)
        {
            return Err(format!(
                "RDMA device {name} has no memory windows of type 2B, which keep a target to the bytes of its command; \
                rdma_keys = \"region\" does without, and lets it reach all of a guest's memory"
            ));
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: a device of the driver's, and room for a handle.
        let result = unsafe { (table.domain_open)(device, &raw mut raw) };
        if result < 0 {
            return Err(format!(
                "RDMA device {name} has no protection domain left: {}",
                words::errno(result)
            ));
        }
        let domain = Arc::new(Domain {
            table,
            raw,
            name,
            attributes,
            purpose,
            entries: Mutex::default(),
            generation: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        });
        if matches!(purpose, Purpose::Initiator(_)) {
            let listener: Arc<dyn Listener> = Arc::clone(&domain) as _;
            Regions::of_process().listen(&listener);
            pinned::start(look_at_all);
        }
        domains.push((device as usize, purpose, Arc::clone(&domain)));
        Ok(domain)
    }

    /// The device was removed: nothing more is registered with it, and one that comes back is another.
    pub(crate) fn device_is_gone(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// For the functions of the table.
    pub(crate) fn raw(&self) -> *mut hawser_verbs_abi::Domain {
        self.raw
    }

    /// Registers memory. Slow: never on a reactor's thread.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn register(&self, start: usize, len: usize) -> Result<(*mut Region, Keys), String> {
        let more = match self.purpose {
            Purpose::Initiator(KeyPolicy::Window) => access::WINDOW_BIND,
            Purpose::Initiator(KeyPolicy::Region) => access::REMOTE_READ | access::REMOTE_WRITE,
            Purpose::Target => 0,
        };
        let (mut region, mut keys) = (std::ptr::null_mut(), Keys::default());
        // SAFETY: a domain of the driver's, and room for the results; whether the memory is there is looked at by the system.
        let result = unsafe {
            let start = start as *mut std::ffi::c_void;
            let access = access::LOCAL_WRITE | more;
            (self.table.register)(self.raw, start, len, access, &raw mut region, &raw mut keys)
        };
        if result == 0 {
            return Ok((region, keys));
        }
        let how = match -result {
            libc::ENOMEM | libc::EPERM => {
                "; want room for locked memory (LimitMEMLOCK=infinity in the daemon's unit, or ulimit -l unlimited)"
            }
            libc::ENOSPC => "; the device has no registrations left",
            _ => "",
        };
        Err(format!(
            "{} KiB of memory cannot be registered with RDMA device {}: {}{how}",
            len >> 10,
            self.name,
            words::errno(result)
        ))
    }

    /// Changes when memory comes or goes.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// What is registered now, and the generation of that.
    pub(crate) fn entries(&self) -> (u64, Entries) {
        let entries = lock(&self.entries);
        let usable = entries.iter().filter(|entry| !entry.withdrawn).copied();
        (self.generation(), Entries::new(usable.collect()))
    }

    /// Does not name memory any more of which some was taken away: what is there now is not what the device has. It stays registered until
    /// it is removed, because commands may be under way.
    fn look(&self) {
        for entry in self.entries().1.0.iter().filter(|entry| !pinned::is_whole(entry.start, entry.len)) {
            let mut entries = lock(&self.entries);
            let Some(known) = entries.iter_mut().find(|known| known.number == entry.number) else { continue };
            known.withdrawn = true;
            self.generation.fetch_add(1, Ordering::Release);
            drop(entries);
            log::error!(
                "{} KiB of a VM's memory that RDMA device {} has: some was taken away by a balloon, or free-page reporting, which cannot be \
                with disks over RDMA; want neither in this VM. From now on its payload is copied, and what the device moved there since is lost",
                entry.len >> 10,
                self.name
            );
        }
    }
}

impl Listener for Domain {
    fn added(&self, span: Span) {
        if self.is_gone() {
            return;
        }
        match self.register(span.start, span.len) {
            Err(why) => log::error!("{why}; until then payload there is copied"),
            Ok((region, keys)) => {
                let mut entries = lock(&self.entries);
                let (start, len) = (span.start, span.len);
                let number = self.generation.fetch_add(1, Ordering::Release);
                entries.push(Entry { start, len, region, keys, number, withdrawn: false });
            }
        }
    }

    fn removed(&self, span: Span) {
        let mut entries = lock(&self.entries);
        let Some(place) = entries.iter().position(|entry| entry.start == span.start) else { return };
        let gone = entries.swap_remove(place);
        self.generation.fetch_add(1, Ordering::Release);
        drop(entries);
        // SAFETY: ours, once. Nobody uses it: the last request that could name it has ended, and its windows are not bound to it
        // any more.
        let result = unsafe { (self.table.deregister)(gone.region) };
        // A device that was removed has nothing any more.
        if result < 0 && !self.is_gone() {
            log::error!("RDMA device {}: memory stays registered: {}", self.name, words::errno(result));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_for_every_byte_and_no_other() {
        let entry = |start, len| Entry {
            start,
            len,
            region: std::ptr::null_mut(),
            number: 0,
            keys: Keys::default(),
            withdrawn: false,
        };
        let entries = Entries::new(vec![entry(0x5000, 0x10), entry(0x1000, 0x1000), entry(0x2000, 7)]);
        for (start, len, want) in [
            (0xfff, 1, None),
            (0x1000, 0x1000, Some(0x1000)),
            (0x1fff, 1, Some(0x1000)),
            (0x2000, 7, Some(0x2000)),
            (0x2007, 1, None),
            (0x500f, 1, Some(0x5000)),
            (0x5010, 1, None),
        ] {
            let found = entries.find(start).filter(|entry| entry.has(start, len));
            assert_eq!(found.map(|entry| entry.start), want, "{start:#x}");
        }
        let found = entries.find(0x1800).unwrap();
        assert!(found.has(0x1800, 0x800) && !found.has(0x1800, 0x801) && !found.has(0x1800, usize::MAX));
        assert!(Entries::default().find(0).is_none());
    }
}
