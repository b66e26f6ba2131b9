//! A device that is named before it is there: the volume of a pool that is not open yet.
//!
//! A disk or namespace on it waits as on a target that was not reached yet. Once the volume is known, everything is the volume's
//! own: a channel is opened on it directly, so that nothing of this is on the hot path.

use hawser_block::reservation::{ReservationCommand, ReservationStatus, ReserveError};
use hawser_block::{Channel, Device, DeviceState, Geometry, PathView, StatsSet};
use hawser_runtime::{Runtime, SourceId};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

type Listener = Arc<dyn Fn() + Send + Sync>;

/// A place for a device.
pub(crate) struct LateDevice {
    name: String,
    device: OnceLock<Arc<dyn Device>>,
    waiting: Mutex<Waiting>,
    stats: Arc<StatsSet>,
}

/// What is said and asked while there is none.
#[derive(Default)]
struct Waiting {
    trouble: String,
    listeners: Vec<Listener>,
}

impl LateDevice {
    pub(crate) fn new(name: String) -> LateDevice {
        LateDevice { name, device: OnceLock::new(), waiting: Mutex::default(), stats: Arc::default() }
    }

    fn there(&self) -> Result<&Arc<dyn Device>, ReserveError> {
        self.device.get().ok_or_else(|| ReserveError::NotSent("the device is not there yet".to_owned()))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_there(&self) -> bool {
        self.device.get().is_some()
    }

    /// Why it is not there yet.
    pub(crate) fn set_trouble(&self, trouble: &str) {
        let mut waiting = self.waiting();
        if waiting.trouble != trouble {
            trouble.clone_into(&mut waiting.trouble);
        }
    }

    /// It is there: whoever waits is told. Once.
    pub(crate) fn set(&self, device: Arc<dyn Device>) {
        let listeners = {
            let mut waiting = self.waiting();
            if self.device.set(Arc::clone(&device)).is_err() {
                return;
            }
            std::mem::take(&mut waiting.listeners)
        };
        for listener in &listeners {
            let listener = Arc::clone(listener);
            device.subscribe(Box::new(move || listener()));
        }
        for listener in listeners {
            listener();
        }
    }
}

impl Device for LateDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        self.device.get()?.geometry()
    }

    fn state(&self) -> DeviceState {
        self.device.get().map_or(DeviceState::Connecting, |device| device.state())
    }

    fn trouble(&self) -> String {
        self.device.get().map_or_else(|| self.waiting().trouble.clone(), |device| device.trouble())
    }

    fn uuid(&self) -> [u8; 16] {
        self.device.get().map_or([0; 16], |device| device.uuid())
    }

    fn cache_identity(&self) -> Option<[u8; 16]> {
        self.device.get()?.cache_identity()
    }

    fn cache_losses(&self) -> u64 {
        self.device.get().map_or(0, |device| device.cache_losses())
    }

    fn owes_a_loss(&self) -> bool {
        self.device.get().is_some_and(|device| device.owes_a_loss())
    }

    fn leaves_payload(&self) -> bool {
        self.device.get().is_some_and(|device| device.leaves_payload())
    }

    fn quiesce_time(&self) -> Duration {
        self.device.get().map_or(Duration::ZERO, |device| device.quiesce_time())
    }

    fn has_unknown_writes(&self) -> bool {
        self.device.get().is_some_and(|device| device.has_unknown_writes())
    }

    fn has_left_behind(&self) -> bool {
        self.device.get().is_some_and(|device| device.has_left_behind())
    }

    fn subscribe(&self, listener: Box<dyn Fn() + Send + Sync>) {
        let mut waiting = self.waiting();
        match self.device.get() {
            None => waiting.listeners.push(Arc::from(listener)),
            Some(device) => {
                drop(waiting);
                device.subscribe(listener);
            }
        }
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        let device = self.device.get().expect("a channel is opened once the geometry is known");
        device.channel(runtime, user)
    }

    fn stats(&self) -> Arc<StatsSet> {
        self.device.get().map_or_else(|| Arc::clone(&self.stats), |device| device.stats())
    }

    fn reserve(&self, command: ReservationCommand) -> Result<(), ReserveError> {
        self.there()?.reserve(command)
    }

    fn reservations(&self) -> Result<ReservationStatus, ReserveError> {
        self.there()?.reservations()
    }

    fn paths(&self) -> Vec<PathView> {
        self.device.get().map_or_else(Vec::new, |device| device.paths())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.device.get().map_or_else(Vec::new, |device| device.counters())
    }

    fn settings(&self) -> Vec<(&'static str, &'static str)> {
        self.device.get().map_or_else(Vec::new, |device| device.settings())
    }

    fn set_io_policy(&self, policy: &str) -> Result<(), String> {
        match self.device.get() {
            Some(device) => device.set_io_policy(policy),
            None => Err("io_policy: the device is not there yet".to_owned()),
        }
    }

    fn fail_after(&self, patience: Duration) {
        // Whoever asks for it has seen the geometry.
        if let Some(device) = self.device.get() {
            device.fail_after(patience);
        }
    }

    fn copied_bytes(&self) -> Vec<(&'static str, u64)> {
        self.device.get().map_or_else(Vec::new, |device| device.copied_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::BlockSize;
    use hawser_block::fake::FakeDevice;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn who_waits_is_told_once_it_is_there() {
        let late = LateDevice::new("p/v".to_owned());
        let told = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&told);
        late.subscribe(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        late.set_trouble("pool p is not open");
        assert_eq!((late.state(), late.geometry()), (DeviceState::Connecting, None));
        assert_eq!(late.trouble(), "pool p is not open");
        assert!(matches!(late.reservations(), Err(ReserveError::NotSent(_))), "not: it knows none");
        let device = Arc::new(FakeDevice::new(Geometry::new(BlockSize::B512, 8)));
        late.set(Arc::clone(&device) as Arc<dyn Device>);
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert_eq!((late.state(), late.trouble()), (DeviceState::Ready, String::new()));
        assert_eq!(late.geometry().map(|geometry| geometry.blocks), Some(8));
        assert_eq!(late.reservations(), Err(ReserveError::Unsupported), "the device's own answer");
        late.set(Arc::new(FakeDevice::new(Geometry::new(BlockSize::B512, 16))));
        assert_eq!(late.geometry().map(|geometry| geometry.blocks), Some(8), "the first stays");
    }
}
