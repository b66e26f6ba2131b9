//! A namespace of a subsystem: its device, and who may use it.

use super::reservations::{Access, Effect, HostId, Reservations};
use super::{NamespaceConfig, uuid};
use crate::nvme::StatusCode;
use crate::nvme::reservation::{ReservationCommand, ReservationStatus};
use hawser_block::Device;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One namespace of a subsystem.
pub(super) struct Namespace {
    pub(super) nsid: u32,
    pub(super) device: Arc<dyn Device>,
    pub(super) uuid: [u8; 16],
    /// Bits of feature 82h: of which notices nobody is told.
    pub(super) notice_mask: AtomicU32,
    /// The ANA group that it is in.
    pub(super) ana_group: u32,
    reservations: Mutex<Reservations>,
    /// Counts changes of reservations: what connections know of them holds while it is the same. 0: there never was any.
    pub(super) reservation_epoch: AtomicU64,
    /// The epoch whose reservations are on disk.
    kept_epoch: AtomicU64,
}

impl Namespace {
    pub(super) fn new(config: NamespaceConfig, nqn: &str, ana_group: u32) -> Namespace {
        let NamespaceConfig { nsid, device, uuid } = config;
        Namespace {
            nsid,
            device,
            uuid: uuid.unwrap_or_else(|| uuid::of_namespace(nqn, nsid)),
            notice_mask: AtomicU32::new(0),
            ana_group,
            reservations: Mutex::default(),
            reservation_epoch: AtomicU64::new(0),
            kept_epoch: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Reservations> {
        // Whoever panicked did it in the midst of plain assignments; the process is on its way down then.
        self.reservations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries a reservation command of `host` out.
    ///
    /// # Errors
    /// The status to answer with.
    pub(super) fn reserve(&self, host: &HostId, command: ReservationCommand) -> Result<Effect, StatusCode> {
        let mut reservations = self.lock();
        let effect = reservations.apply(host, command)?;
        if effect.changed {
            self.reservation_epoch.fetch_add(1, Ordering::Release);
        }
        Ok(effect)
    }

    /// Sets whether reservations outlive a reboot; whether that is new.
    pub(super) fn set_reservations_persist(&self, persist: bool) -> bool {
        let changed = self.lock().set_persists(persist);
        if changed {
            self.reservation_epoch.fetch_add(1, Ordering::Release);
        }
        changed
    }

    /// A preemption of `host` is done, and it is told so.
    pub(super) fn reservation_answered(&self, host: &HostId) {
        self.lock().answered(host);
    }

    /// Whether what is in force is on disk, where it is kept at all.
    pub(super) fn reservations_are_kept(&self) -> bool {
        self.kept_epoch.load(Ordering::Acquire) == self.reservation_epoch.load(Ordering::Acquire)
    }

    /// What reservations let `host` do.
    pub(super) fn access(&self, host: &HostId) -> Access {
        self.lock().access(host)
    }

    pub(super) fn reservation_status(&self) -> ReservationStatus {
        self.lock().status()
    }

    /// What is in force, to be kept, with its epoch.
    pub(super) fn reservations_as_text(&self, boot: &str) -> (u64, String) {
        let reservations = self.lock();
        (self.reservation_epoch.load(Ordering::Relaxed), reservations.to_text(boot))
    }

    /// What was in force at this epoch is on disk.
    pub(super) fn reservations_were_kept(&self, epoch: u64) {
        self.kept_epoch.store(epoch, Ordering::Release);
    }

    /// Takes over what was kept.
    pub(super) fn restore_reservations(&self, state: Reservations) {
        *self.lock() = state;
        let before = self.reservation_epoch.fetch_add(1, Ordering::Release);
        self.reservations_were_kept(before + 1);
    }
}
