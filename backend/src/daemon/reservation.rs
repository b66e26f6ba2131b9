//! Reservations of a device, for people: from what the API says to commands and back.

use super::api::view::{ChangeReservation, Key, RegistrantView, ReservationView};
use super::{ChangeError, Daemon};
use hawser_block::Device;
use hawser_block::reservation::{
    AcquireAction, RegisterAction, ReleaseAction, ReservationCommand, ReservationType, ReserveError,
};
use hawser_config::value::Uuid;
use std::sync::Arc;

impl Daemon {
    /// Who is registered with a device, and who has it. It may take a minute.
    ///
    /// # Errors
    /// When there is no such device, or it does not say.
    pub fn reservation(&self, device: &str) -> Result<ReservationView, ChangeError> {
        let found = self.reservable(device)?;
        let status = found.reservations().map_err(|error| failed(device, error))?;
        let registrants = status.registrants.iter();
        Ok(ReservationView {
            generation: status.generation,
            rtype: status.kind.map(|kind| kind.name().to_owned()),
            ptpl: status.persists,
            registrants: registrants
                .map(|registrant| RegistrantView {
                    hostid: Uuid(registrant.host).to_string(),
                    rkey: Key(registrant.key),
                    holds: registrant.holds,
                })
                .collect(),
        })
    }

    /// Changes it. It may take a minute.
    ///
    /// # Errors
    /// When there is no such device, or it was refused, or may have been.
    pub fn reserve(&self, device: &str, change: &ChangeReservation) -> Result<ReservationView, ChangeError> {
        let command = command(change).map_err(ChangeError::Wrong)?;
        let found = self.reservable(device)?;
        let pool = device.parse().ok().and_then(|name| self.pools.user_of(&name));
        if let Some(pool) = pool {
            return Err(ChangeError::Conflict(format!(
                "device {device} is a member of pool {pool}, which has reserved it while it is open"
            )));
        }
        found.reserve(command).map_err(|error| failed(device, error))?;
        // Keys are their hosts' secrets.
        log::info!("device {device}: reservation {}", change.name());
        self.reservation(device)
    }

    fn reservable(&self, name: &str) -> Result<Arc<dyn Device>, ChangeError> {
        let devices = self.lock_devices();
        let found = devices.iter().find(|(config, _)| config.name.as_str() == name);
        found.map(|(_, device)| Arc::clone(device)).ok_or_else(|| {
            let names: Vec<&str> = devices.iter().map(|(config, _)| config.name.as_str()).collect();
            ChangeError::Unknown(format!("device {name:?} is not there; there are {}", names.join(", ")))
        })
    }
}

fn failed(device: &str, error: ReserveError) -> ChangeError {
    let what = format!("device {device}: {error}");
    match error {
        ReserveError::Conflict => ChangeError::Conflict(what),
        ReserveError::Unsupported => ChangeError::Wrong(format!("{what}, want an nvme+tcp: one")),
        ReserveError::Refused(_) | ReserveError::NotSent(_) | ReserveError::Unanswered(_) => {
            ChangeError::Failed(what)
        }
    }
}

fn command(change: &ChangeReservation) -> Result<ReservationCommand, String> {
    let register = |action, crkey: &Option<Key>, nrkey: Key, iekey, persist| {
        let current = crkey.map_or(0, |key| key.0);
        ReservationCommand::Register { action, current, new: nrkey.0, ignore_key: iekey, persist }
    };
    let acquire = |action, crkey: Key, prkey: Key, rtype: &str| {
        let kind: ReservationType = rtype.parse()?;
        Ok(ReservationCommand::Acquire { action, current: crkey.0, preempted: prkey.0, kind })
    };
    Ok(match change {
        ChangeReservation::Register { nrkey, cptpl } => {
            register(RegisterAction::Register, &None, *nrkey, false, *cptpl)
        }
        ChangeReservation::Replace { nrkey, crkey, iekey, cptpl } => {
            register(RegisterAction::Replace, crkey, *nrkey, *iekey, *cptpl)
        }
        ChangeReservation::Unregister { crkey, iekey } => {
            register(RegisterAction::Unregister, crkey, Key(0), *iekey, None)
        }
        ChangeReservation::Acquire { crkey, rtype } => {
            return acquire(AcquireAction::Acquire, *crkey, Key(0), rtype);
        }
        ChangeReservation::Preempt { crkey, prkey, rtype, abort } => {
            let action = if *abort { AcquireAction::PreemptAndAbort } else { AcquireAction::Preempt };
            return acquire(action, *crkey, *prkey, rtype);
        }
        ChangeReservation::Release { crkey, rtype } => ReservationCommand::Release {
            action: ReleaseAction::Release,
            current: crkey.0,
            kind: Some(rtype.parse()?),
        },
        ChangeReservation::Clear { crkey } => {
            ReservationCommand::Release { action: ReleaseAction::Clear, current: crkey.0, kind: None }
        }
    })
}
