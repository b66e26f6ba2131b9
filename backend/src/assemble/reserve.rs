//! Members of a pool are reserved for one host while it has the pool open, where they can be.
//!
//! The reservation is Write Exclusive, Registrants Only, under a key made of the host's identifier. It outlives us if we die, so
//! that nobody else opens the pool by chance meanwhile; we ourselves find it ours.
//!
//! Never on a reactor: a target is asked.

use hawser_block::Device;
use hawser_block::reservation::{
    AcquireAction, RegisterAction, ReservationCommand, ReservationStatus, ReservationType, ReserveError,
};
use hawser_config::value::Uuid;
use std::sync::Arc;

const KIND: ReservationType = ReservationType::WriteExclusiveRegistrantsOnly;

/// Whether a device is reserved for us now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reserved {
    Yes,
    /// It knows no reservations.
    Unsupported,
}

/// Our key: never 0, which is none.
fn key_of(host: &[u8; 16]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    host.iter().fold(0xcbf2_9ce4_8422_2325, step).max(1)
}

/// Takes the reservation of `device` for `host`; from another host only with `assume_exclusive`.
///
/// # Errors
/// Why not, and who has it: one line that names the device.
pub(crate) fn take(device: &dyn Device, host: &[u8; 16], assume_exclusive: bool) -> Result<Reserved, String> {
    let named = |error: ReserveError| format!("device {}: {error}", device.name());
    let status = match device.reservations() {
        Ok(status) => status,
        Err(ReserveError::Unsupported) => return Ok(Reserved::Unsupported),
        Err(error) => return Err(named(error)),
    };
    // Before we register: among registrants only, a registrant may write.
    if !assume_exclusive && let Some(other) = holder(&status).filter(|other| other != host) {
        return Err(taken(device, &other));
    }
    let key = key_of(host);
    register(device, &status, host, key).map_err(named)?;
    let status = device.reservations().map_err(named)?;
    let others: Vec<_> = status.registrants.iter().filter(|registrant| registrant.host != *host).collect();
    let result = match (status.kind, holder(&status)) {
        (None, _) => acquire(device, key, AcquireAction::Acquire, 0),
        (Some(KIND), Some(holder)) if holder == *host => Ok(()),
        (Some(_), _) => match others.iter().find(|other| other.holds) {
            Some(other) if assume_exclusive => {
                acquire(device, key, AcquireAction::PreemptAndAbort, other.key)
            }
            // Ours, of another kind; or it went just now.
            None => acquire(device, key, AcquireAction::PreemptAndAbort, key),
            Some(other) => {
                leave(device, host);
                return Err(taken(device, &other.host));
            }
        },
    };
    match result {
        Ok(()) => {}
        Err(ReserveError::Conflict) => {
            // Somebody was quicker.
            leave(device, host);
            let other = device.reservations().ok().and_then(|status| holder(&status));
            return Err(other.map_or_else(|| named(ReserveError::Conflict), |other| taken(device, &other)));
        }
        Err(error) => return Err(named(error)),
    }
    // Hosts that registered and have not got it may write all the same.
    for other in others.iter().filter(|other| !other.holds) {
        // It may have gone by itself.
        let _ = acquire(device, key, AcquireAction::PreemptAndAbort, other.key);
    }
    Ok(Reserved::Yes)
}

/// How the reservation of an open pool's member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    Ours,
    /// The target had lost it, and nobody had it: it is ours again.
    Again,
    /// Another host has it: one line that says who.
    Lost(String),
    /// It cannot be told now: one line.
    Unknown(String),
}

/// Sees that `device` is reserved for `host`, as [`take`] left it. What another host has taken is not taken back.
pub(crate) fn keep(device: &dyn Device, host: &[u8; 16]) -> Kept {
    let lost = |status: &ReservationStatus| {
        let other = holder(status).filter(|other| other != host)?;
        Some(Kept::Lost(format!("device {} is reserved by host {} now", device.name(), Uuid(other))))
    };
    let status = match device.reservations() {
        Ok(status) => status,
        Err(error) => return Kept::Unknown(format!("device {}: {error}", device.name())),
    };
    if status.kind == Some(KIND) && holder(&status) == Some(*host) {
        return Kept::Ours;
    }
    if let Some(lost) = lost(&status) {
        return lost;
    }
    match take(device, host, false) {
        Ok(_) => Kept::Again,
        // Somebody was quicker, or it could not be asked.
        Err(what) => match device.reservations() {
            Ok(status) => lost(&status).unwrap_or(Kept::Unknown(what)),
            Err(_) => Kept::Unknown(what),
        },
    }
}

/// Reserves all of them, or none.
pub(crate) fn take_all(
    devices: Vec<Arc<dyn Device>>,
    host: [u8; 16],
    assume_exclusive: bool,
) -> Result<Vec<Arc<dyn Device>>, String> {
    let mut reserved: Vec<Arc<dyn Device>> = Vec::new();
    for device in devices {
        match take(device.as_ref(), &host, assume_exclusive) {
            Ok(Reserved::Yes) => reserved.push(device),
            Ok(Reserved::Unsupported) => {}
            Err(what) => {
                reserved.iter().for_each(|device| leave(device.as_ref(), &host));
                return Err(what);
            }
        }
    }
    Ok(reserved)
}

/// Lets `device` go. What cannot be told now the next opener finds.
pub(crate) fn leave(device: &dyn Device, host: &[u8; 16]) {
    let command = ReservationCommand::Register {
        action: RegisterAction::Unregister,
        current: key_of(host),
        new: 0,
        ignore_key: true,
        persist: None,
    };
    match device.reserve(command) {
        Ok(()) | Err(ReserveError::Unsupported) => {}
        Err(error) => log::warn!("device {}: its reservation is kept: {error}", device.name()),
    }
}

fn holder(status: &ReservationStatus) -> Option<[u8; 16]> {
    status.kind?;
    status.registrants.iter().find(|registrant| registrant.holds).map(|registrant| registrant.host)
}

fn taken(device: &dyn Device, other: &[u8; 16]) -> String {
    format!(
        "device {} is reserved by host {}, want the pool closed there; or, if that host is gone for good, --assume-exclusive or \
         assume_exclusive = true in [[pool]]",
        device.name(),
        Uuid(*other)
    )
}

fn register(
    device: &dyn Device,
    status: &ReservationStatus,
    host: &[u8; 16],
    key: u64,
) -> Result<(), ReserveError> {
    let action = match status.registrants.iter().find(|registrant| registrant.host == *host) {
        Some(registrant) if registrant.key == key => return Ok(()),
        Some(_) => RegisterAction::Replace,
        None => RegisterAction::Register,
    };
    let command =
        |persist| ReservationCommand::Register { action, current: 0, new: key, ignore_key: true, persist };
    match device.reserve(command(Some(true))) {
        // Not every target can keep them over a loss of its power.
        Err(ReserveError::Refused(_)) => device.reserve(command(None)),
        result => result,
    }
}

fn acquire(device: &dyn Device, key: u64, action: AcquireAction, preempted: u64) -> Result<(), ReserveError> {
    device.reserve(ReservationCommand::Acquire { action, current: key, preempted, kind: KIND })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::reservation::Registrant;
    use hawser_block::{Channel, DeviceState, Geometry, StatsSet};
    use hawser_runtime::{Runtime, SourceId};
    use std::sync::{Arc, Mutex};

    /// A namespace that several hosts share, by the rules of NVMe base 8.19 as far as they are needed here.
    #[derive(Default)]
    struct Shared {
        status: Mutex<ReservationStatus>,
    }

    struct Seen<'a>(&'a Shared, [u8; 16]);

    impl Device for Seen<'_> {
        fn name(&self) -> &str {
            "n0"
        }
        fn geometry(&self) -> Option<Geometry> {
            None
        }
        fn state(&self) -> DeviceState {
            DeviceState::Ready
        }
        fn uuid(&self) -> [u8; 16] {
            [0; 16]
        }
        fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}
        fn channel(&self, _: &Runtime, _: SourceId) -> Box<dyn Channel> {
            unreachable!("no I/O")
        }
        fn stats(&self) -> Arc<StatsSet> {
            Arc::default()
        }
        fn reservations(&self) -> Result<ReservationStatus, ReserveError> {
            Ok(self.0.status.lock().unwrap().clone())
        }
        fn reserve(&self, command: ReservationCommand) -> Result<(), ReserveError> {
            let mut status = self.0.status.lock().unwrap();
            let me = status.registrants.iter().position(|registrant| registrant.host == self.1);
            match command {
                ReservationCommand::Register { action, new, persist, .. } => match (action, me) {
                    (_, _) if persist == Some(true) => {
                        return Err(ReserveError::Refused("no PTPL".to_owned()));
                    }
                    (RegisterAction::Register, None) => {
                        status.registrants.push(Registrant { host: self.1, key: new, holds: false });
                    }
                    (RegisterAction::Replace, Some(me)) => status.registrants[me].key = new,
                    (RegisterAction::Unregister, Some(me)) => {
                        if status.registrants.remove(me).holds {
                            status.kind = None;
                        }
                    }
                    _ => return Err(ReserveError::Conflict),
                },
                ReservationCommand::Acquire { action, current, preempted, kind } => {
                    let me = me
                        .filter(|me| status.registrants[*me].key == current)
                        .ok_or(ReserveError::Conflict)?;
                    if action == AcquireAction::Acquire {
                        if status.kind.is_some() && !status.registrants[me].holds {
                            return Err(ReserveError::Conflict);
                        }
                        (status.kind, status.registrants[me].holds) = (Some(kind), true);
                        return Ok(());
                    }
                    let held = status.registrants.iter().any(|it| it.holds && it.key == preempted);
                    let host = self.1;
                    status.registrants.retain(|it| it.key != preempted || it.host == host);
                    if held {
                        let me = status.registrants.iter_mut().find(|it| it.host == host).unwrap();
                        me.holds = true;
                        status.kind = Some(kind);
                    }
                }
                ReservationCommand::Release { .. } => return Err(ReserveError::Unsupported),
            }
            Ok(())
        }
    }

    #[test]
    fn a_reservation_that_the_target_lost_is_taken_again_and_one_that_another_host_took_is_not() {
        let shared = Shared::default();
        let (one, two) = ([1; 16], [2; 16]);
        let (seen_by_one, seen_by_two) = (Seen(&shared, one), Seen(&shared, two));
        assert_eq!(take(&seen_by_one, &one, false), Ok(Reserved::Yes));
        assert_eq!(keep(&seen_by_one, &one), Kept::Ours);
        *shared.status.lock().unwrap() = ReservationStatus::default();
        assert_eq!(keep(&seen_by_one, &one), Kept::Again);
        assert_eq!(holder(&shared.status.lock().unwrap()), Some(one));
        assert_eq!(keep(&seen_by_one, &one), Kept::Ours);
        assert_eq!(take(&seen_by_two, &two, true), Ok(Reserved::Yes));
        let Kept::Lost(what) = keep(&seen_by_one, &one) else { panic!("it was taken back") };
        assert_eq!(what, "device n0 is reserved by host 02020202-0202-0202-0202-020202020202 now");
        assert_eq!(holder(&shared.status.lock().unwrap()), Some(two), "it still is");
    }

    #[test]
    fn one_host_has_it_until_it_lets_go_or_another_says_it_is_gone() {
        let shared = Shared::default();
        let (one, two) = ([1; 16], [2; 16]);
        let (seen_by_one, seen_by_two) = (Seen(&shared, one), Seen(&shared, two));
        let who = || holder(&shared.status.lock().unwrap());
        assert_eq!(take(&seen_by_one, &one, false), Ok(Reserved::Yes));
        assert_eq!(take(&seen_by_one, &one, false), Ok(Reserved::Yes), "ours from before");
        let error = take(&seen_by_two, &two, false).unwrap_err();
        assert!(error.starts_with("device n0 is reserved by host 01010101-0101-"), "{error}");
        assert_eq!(shared.status.lock().unwrap().registrants.len(), 1, "who is refused may not write");
        assert_eq!(take(&seen_by_two, &two, true), Ok(Reserved::Yes));
        assert_eq!(who(), Some(two));
        assert_eq!(shared.status.lock().unwrap().registrants.len(), 1, "who was preempted may not write");
        take(&seen_by_one, &one, false).unwrap_err();
        leave(&seen_by_two, &two);
        assert_eq!((who(), take(&seen_by_one, &one, false)), (None, Ok(Reserved::Yes)));
    }

    #[test]
    fn a_registrant_that_is_left_over_cannot_write_any_more() {
        let shared = Shared::default();
        let (one, two) = ([1; 16], [2; 16]);
        shared.status.lock().unwrap().registrants.push(Registrant { host: two, key: 9, holds: false });
        assert_eq!(take(&Seen(&shared, one), &one, false), Ok(Reserved::Yes));
        let status = shared.status.lock().unwrap();
        assert_eq!(status.registrants.iter().map(|it| it.host).collect::<Vec<_>>(), [one]);
    }

    #[test]
    fn a_key_of_ours_from_another_program_is_replaced() {
        let shared = Shared::default();
        let one = [1; 16];
        *shared.status.lock().unwrap() = ReservationStatus {
            kind: Some(ReservationType::WriteExclusive),
            registrants: vec![Registrant { host: one, key: 9, holds: true }],
            ..ReservationStatus::default()
        };
        assert_eq!(take(&Seen(&shared, one), &one, false), Ok(Reserved::Yes));
        assert_eq!(shared.status.lock().unwrap().kind, Some(KIND));
    }
}
