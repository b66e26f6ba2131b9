//! Reservations of a namespace, for who may wait: a thread that is no reactor.
#![forbid(unsafe_code)]

use super::device::Shared;
use super::lane::{Ask, Lane, Reply};
use crate::nvme::reservation;
use hawser_block::reservation::{ReservationCommand, ReservationStatus, ReserveError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// How long a command may take: preempting may wait for the commands of others.
const LIMIT: Duration = Duration::from_secs(60);
/// The report that is asked for first: 63 registrants.
const REPORT_LEN: u32 = 4096;
/// The longest, which every target with so many registrants has room for in one command.
const REPORT_LEN_MAX: u32 = 64 << 10;

/// Carries one command out.
pub(super) fn reserve(shared: &Shared, command: ReservationCommand) -> Result<(), ReserveError> {
    ask(shared, Ask::Change(command)).map(drop)
}

/// Who is registered, and who has it.
pub(super) fn report(shared: &Shared) -> Result<ReservationStatus, ReserveError> {
    let data = ask(shared, Ask::Report(REPORT_LEN))?;
    let len = reservation::status_len(&data).min(REPORT_LEN_MAX);
    let data = if len > REPORT_LEN { ask(shared, Ask::Report(len))? } else { data };
    Ok(reservation::status_from_bytes(&data))
}

fn ask(shared: &Shared, what: Ask) -> Result<Vec<u8>, ReserveError> {
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let name = NAMES.fetch_add(1, Ordering::Relaxed);
    let (tell, told) = mpsc::channel();
    // Who asked may have gone.
    let reply: Reply = Box::new(move |result| drop(tell.send(result)));
    shared.on_lane(0, move |lane: &mut Lane| lane.control(name, what, reply));
    match told.recv_timeout(LIMIT) {
        Ok(result) => result,
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(ReserveError::Unanswered("the device was closed".to_owned()))
        }
        Err(mpsc::RecvTimeoutError::Timeout) => {
            shared.on_lane(0, move |lane| lane.give_up_control(name));
            Err(ReserveError::Unanswered(format!("no answer in {} s", LIMIT.as_secs())))
        }
    }
}
