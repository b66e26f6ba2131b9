//! The reservation of one namespace (base 8.19): who is registered, who holds what, and who may do what.
//!
//! Owns: the rules. Must not know: connections, files. What changes it is a command of one host; what it answers is a status
//! and whose registrations it has taken away.

use crate::nvme::StatusCode;
use crate::nvme::reservation::{
    AcquireAction, RegisterAction, Registrant, ReleaseAction, ReservationCommand, ReservationNotice,
    ReservationStatus, ReservationType,
};
use std::fmt::Write;

/// A host, as reservations know it: HOSTID.
pub(super) type HostId = [u8; 16];

/// The most hosts that are registered at a time.
const REGISTRANTS_MAX: usize = 1024;
/// The first line of the text form. Another one is not ours to understand.
const MAGIC: &str = "hawser reservations 1";

/// What a host may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Access {
    pub(super) const ALL: Access = Access { read: true, write: true };
}

/// What a command has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// Something has changed.
    pub(super) changed: bool,
    /// The hosts whose commands have to end before the command is answered.
    pub(super) fenced: Vec<HostId>,
    /// Who is to be told what.
    pub(super) notices: Vec<(HostId, ReservationNotice)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reservation {
    kind: ReservationType,
    /// Who took it. Where all registrants hold it nobody asks.
    holder: HostId,
}

/// The state of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reservations {
    generation: u32,
    persists: bool,
    /// In the order in which they came.
    registrants: Vec<(HostId, u64)>,
    reservation: Option<Reservation>,
    /// Preemptions whose hosts have not been told yet that they are done, at most one of each host.
    unanswered: Vec<Preemption>,
}

/// A preemption that its host may ask for again: its first answer was an error, or never came. Nobody is left then to preempt,
/// but whom it has preempted has still to be waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Preemption {
    host: HostId,
    command: ReservationCommand,
    effect: Effect,
    /// What it has led to.
    reservation: Option<Reservation>,
}

impl Reservations {
    /// What `host` may do.
    pub(super) fn access(&self, host: &HostId) -> Access {
        let Some(Reservation { kind, holder }) = self.reservation else { return Access::ALL };
        let full = holder == *host && !kind.is_held_by_all()
            || kind.includes_registrants() && self.key_of(host).is_some();
        if full { Access::ALL } else { Access { read: !kind.excludes_readers(), write: false } }
    }

    /// Carries a command of `host` out.
    ///
    /// # Errors
    /// The status to answer with; nothing has changed then.
    pub(super) fn apply(&mut self, host: &HostId, command: ReservationCommand) -> Result<Effect, StatusCode> {
        match command {
            ReservationCommand::Register { action, current, new, ignore_key, persist } => {
                let key = self.key_of(host);
                let before = self.reservation;
                self.register(host, action, current, new, ignore_key)?;
                let persists = persist.unwrap_or(self.persists);
                let changed = self.key_of(host) != key || self.persists != persists;
                self.persists = persists;
                // It counts every success (base 7.5), and alone is not worth keeping.
                self.generation = self.generation.wrapping_add(1);
                // What registrants shared, and its one holder has left.
                let was_shared = before.is_some_and(|before| before.kind.includes_registrants());
                let notices = if was_shared && self.reservation.is_none() {
                    self.others(host, ReservationNotice::Released)
                } else {
                    Vec::new()
                };
                Ok(Effect { changed, notices, ..Effect::default() })
            }
            ReservationCommand::Acquire { action, current, preempted, kind } => {
                self.check_key(host, current)?;
                if action == AcquireAction::Acquire {
                    return self.acquire(host, kind);
                }
                let mut effect = match self.preempt(host, preempted, kind) {
                    Ok(effect) => effect,
                    Err(code) => return self.preempted_before(host, command).ok_or(code),
                };
                if action == AcquireAction::Preempt {
                    effect.fenced.clear();
                }
                self.answered(host);
                // Who asks again wants to know how it has ended; nobody is told again.
                let effect_then = Effect { notices: Vec::new(), ..effect.clone() };
                let reservation = self.reservation;
                self.unanswered.push(Preemption { host: *host, command, effect: effect_then, reservation });
                Ok(effect)
            }
            ReservationCommand::Release { action, current, kind } => {
                self.check_key(host, current)?;
                match action {
                    ReleaseAction::Release => self.release(host, kind),
                    ReleaseAction::Clear => {
                        let notices = self.others(host, ReservationNotice::Preempted);
                        self.registrants.clear();
                        self.unanswered.clear();
                        self.reservation = None;
                        self.generation = self.generation.wrapping_add(1);
                        Ok(Effect { changed: true, notices, ..Effect::default() })
                    }
                }
            }
        }
    }

    /// A notice for all registrants but `host`.
    fn others(&self, host: &HostId, notice: ReservationNotice) -> Vec<(HostId, ReservationNotice)> {
        let others = self.registrants.iter().map(|(other, _)| *other).filter(|other| other != host);
        others.map(|other| (other, notice)).collect()
    }

    /// Whether it outlives a reboot, from now on; whether that is new.
    pub(super) fn set_persists(&mut self, persists: bool) -> bool {
        std::mem::replace(&mut self.persists, persists) != persists
    }

    /// What the same command of this host has done before, if its host does not know and nobody has changed it since.
    fn preempted_before(&self, host: &HostId, command: ReservationCommand) -> Option<Effect> {
        let then = self.unanswered.iter().find(|then| then.host == *host && then.command == command)?;
        (then.reservation == self.reservation).then(|| then.effect.clone())
    }

    /// The host knows now how its preemption has ended.
    pub(super) fn answered(&mut self, host: &HostId) {
        self.unanswered.retain(|then| then.host != *host);
    }

    /// What there is, for Reservation Report.
    pub(super) fn status(&self) -> ReservationStatus {
        let registrants = self.registrants.iter();
        ReservationStatus {
            generation: self.generation,
            kind: self.reservation.map(|reservation| reservation.kind),
            persists: self.persists,
            registrants: registrants
                .map(|(host, key)| Registrant { host: *host, key: *key, holds: self.holds(host) })
                .collect(),
        }
    }

    fn key_of(&self, host: &HostId) -> Option<u64> {
        self.registrants.iter().find(|(other, _)| other == host).map(|(_, key)| *key)
    }

    fn check_key(&self, host: &HostId, key: u64) -> Result<(), StatusCode> {
        if self.key_of(host) == Some(key) { Ok(()) } else { Err(StatusCode::RESERVATION_CONFLICT) }
    }

    /// Whether `host`, a registrant, holds the reservation.
    fn holds(&self, host: &HostId) -> bool {
        self.reservation
            .is_some_and(|reservation| reservation.kind.is_held_by_all() || reservation.holder == *host)
    }

    fn register(
        &mut self,
        host: &HostId,
        action: RegisterAction,
        current: u64,
        new: u64,
        ignore_key: bool,
    ) -> Result<(), StatusCode> {
        let registered = self.key_of(host);
        match (action, registered) {
            (RegisterAction::Register, Some(key)) if key == new => Ok(()),
            (RegisterAction::Register, Some(_)) => Err(StatusCode::RESERVATION_CONFLICT),
            (RegisterAction::Register, None) => {
                if self.registrants.len() >= REGISTRANTS_MAX {
                    return Err(StatusCode::INTERNAL_ERROR);
                }
                self.registrants.push((*host, new));
                Ok(())
            }
            (_, Some(key)) if key != current && !ignore_key => Err(StatusCode::RESERVATION_CONFLICT),
            (_, None) => Err(StatusCode::RESERVATION_CONFLICT),
            (RegisterAction::Unregister, Some(_)) => {
                self.unregister(|other, _| other == host);
                Ok(())
            }
            (RegisterAction::Replace, Some(_)) => {
                self.registrants.iter_mut().filter(|(other, _)| other == host).for_each(|it| it.1 = new);
                Ok(())
            }
        }
    }

    /// Takes registrants out. What one of them alone holds is released; what all hold, with the last.
    fn unregister(&mut self, mut out: impl FnMut(&HostId, u64) -> bool) -> Vec<HostId> {
        let mut gone = Vec::new();
        self.registrants.retain(|(host, key)| {
            let out = out(host, *key);
            if out {
                gone.push(*host);
            }
            !out
        });
        self.unanswered.retain(|then| !gone.contains(&then.host));
        if let Some(Reservation { kind, holder }) = self.reservation {
            let released =
                if kind.is_held_by_all() { self.registrants.is_empty() } else { gone.contains(&holder) };
            if released {
                self.reservation = None;
            }
        }
        gone
    }

    fn acquire(&mut self, host: &HostId, kind: ReservationType) -> Result<Effect, StatusCode> {
        match self.reservation {
            None => {
                self.reservation = Some(Reservation { kind, holder: *host });
                Ok(Effect { changed: true, ..Effect::default() })
            }
            Some(there) if self.holds(host) && there.kind == kind => Ok(Effect::default()),
            Some(_) => Err(StatusCode::RESERVATION_CONFLICT),
        }
    }

    fn preempt(&mut self, host: &HostId, key: u64, kind: ReservationType) -> Result<Effect, StatusCode> {
        let Some(there) = self.reservation else {
            return self.preempt_registrants(host, key);
        };
        let holder_key = self.key_of(&there.holder);
        let takes_over = if there.kind.is_held_by_all() {
            // Key 0 means all others.
            key == 0
        } else if there.holder == *host && holder_key == Some(key) {
            // The holder changes the type of what it has; others with its key are none any more.
            true
        } else {
            holder_key == Some(key)
        };
        if !takes_over {
            if key == 0 {
                return Err(StatusCode::INVALID_FIELD);
            }
            return self.preempt_registrants(host, key);
        }
        let all = there.kind.is_held_by_all();
        let fenced = self.unregister(|other, theirs| other != host && (all || theirs == key));
        self.reservation = Some(Reservation { kind, holder: *host });
        self.generation = self.generation.wrapping_add(1);
        let mut notices = preempted(&fenced);
        if there.kind != kind {
            notices.extend(self.others(host, ReservationNotice::Released));
        }
        Ok(Effect { changed: true, fenced, notices })
    }

    /// Takes out the other registrants with `key`, of which there is one at least.
    fn preempt_registrants(&mut self, host: &HostId, key: u64) -> Result<Effect, StatusCode> {
        if !self.registrants.iter().any(|(other, theirs)| other != host && *theirs == key) {
            return Err(StatusCode::RESERVATION_CONFLICT);
        }
        let fenced = self.unregister(|other, theirs| other != host && theirs == key);
        self.generation = self.generation.wrapping_add(1);
        let notices = preempted(&fenced);
        Ok(Effect { changed: true, fenced, notices })
    }

    fn release(&mut self, host: &HostId, kind: Option<ReservationType>) -> Result<Effect, StatusCode> {
        match self.reservation {
            Some(there) if self.holds(host) => {
                if kind != Some(there.kind) {
                    return Err(StatusCode::INVALID_FIELD);
                }
                self.reservation = None;
                let notices = if there.kind.includes_registrants() {
                    self.others(host, ReservationNotice::Released)
                } else {
                    Vec::new()
                };
                Ok(Effect { changed: true, notices, ..Effect::default() })
            }
            // A registrant that does not hold it, or nothing to release: no effect.
            _ => Ok(Effect::default()),
        }
    }

    // ---- as text, to be kept ----

    /// The state as lines; `boot` names the host's boot, which what does not persist does not outlive.
    pub(super) fn to_text(&self, boot: &str) -> String {
        let hex = |host: &HostId| format!("{:032x}", u128::from_be_bytes(*host));
        let mut text = String::new();
        // Writing into a string cannot fail.
        let _ = writeln!(text, "{MAGIC}\nboot {boot}\ngeneration {}", self.generation);
        let _ = writeln!(text, "persists {}", u8::from(self.persists));
        if let Some(Reservation { kind, holder }) = &self.reservation {
            let _ = writeln!(text, "reservation {} {}", kind.to_u8(), hex(holder));
        }
        for (host, key) in &self.registrants {
            let _ = writeln!(text, "registrant {} {key:016x}", hex(host));
        }
        text.push_str("end\n");
        text
    }

    /// From lines. What did not persist and is of another boot than `boot` is gone.
    ///
    /// # Errors
    /// The line that is not ours.
    pub(super) fn from_text(text: &str, boot: &str) -> Result<Reservations, String> {
        let mut lines = text.lines();
        if lines.next() != Some(MAGIC) {
            return Err(format!("does not begin with {MAGIC:?}: another version has written it"));
        }
        let host = |word: &str| u128::from_str_radix(word, 16).ok().map(u128::to_be_bytes);
        let mut state = Reservations::default();
        let mut same_boot = true;
        let mut whole = false;
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let understood = match words.as_slice() {
                ["boot", then] => {
                    same_boot = *then == boot;
                    Some(())
                }
                ["generation", count] => count.parse().ok().map(|count| state.generation = count),
                ["persists", on] => on.parse::<u8>().ok().map(|on| state.persists = on == 1),
                ["reservation", kind, holder] => kind
                    .parse()
                    .ok()
                    .and_then(ReservationType::from_u8)
                    .and_then(|kind| Some(Reservation { kind, holder: host(holder)? }))
                    .map(|reservation| state.reservation = Some(reservation)),
                ["registrant", id, key] => u64::from_str_radix(key, 16)
                    .ok()
                    .and_then(|key| Some((host(id)?, key)))
                    .map(|registrant| state.registrants.push(registrant)),
                ["end"] => {
                    whole = true;
                    Some(())
                }
                _ => None,
            };
            understood.ok_or_else(|| format!("{line:?} is no line of it"))?;
        }
        if !whole {
            return Err("it ends too early".to_owned());
        }
        Ok(if same_boot || state.persists { state } else { Reservations::default() })
    }
}

fn preempted(hosts: &[HostId]) -> Vec<(HostId, ReservationNotice)> {
    hosts.iter().map(|host| (*host, ReservationNotice::RegistrationPreempted)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = [1; 16];
    const B: HostId = [2; 16];
    const C: HostId = [3; 16];

    fn register(host: &HostId, state: &mut Reservations, new: u64) -> Result<Effect, StatusCode> {
        let action = RegisterAction::Register;
        let command =
            ReservationCommand::Register { action, current: 0, new, ignore_key: false, persist: None };
        state.apply(host, command)
    }

    fn acquire(
        state: &mut Reservations,
        host: &HostId,
        action: AcquireAction,
        (current, preempted): (u64, u64),
        kind: ReservationType,
    ) -> Result<Effect, StatusCode> {
        state.apply(host, ReservationCommand::Acquire { action, current, preempted, kind })
    }

    /// A has key 1, B key 2, both registered; A has taken a reservation.
    fn held(kind: ReservationType) -> Reservations {
        let mut state = Reservations::default();
        register(&A, &mut state, 1).unwrap();
        register(&B, &mut state, 2).unwrap();
        acquire(&mut state, &A, AcquireAction::Acquire, (1, 0), kind).unwrap();
        state
    }

    #[test]
    fn each_type_lets_in_whom_the_specification_says() {
        use ReservationType::{
            ExclusiveAccess, ExclusiveAccessAllRegistrants, ExclusiveAccessRegistrantsOnly, WriteExclusive,
            WriteExclusiveAllRegistrants, WriteExclusiveRegistrantsOnly,
        };
        let none = Access { read: false, write: false };
        let reads = Access { read: true, write: false };
        assert_eq!(Reservations::default().access(&C), Access::ALL);
        // By type: what a registrant may do, and what others may. The holder may do everything.
        for (kind, registrant, other) in [
            (WriteExclusive, reads, reads),
            (ExclusiveAccess, none, none),
            (WriteExclusiveRegistrantsOnly, Access::ALL, reads),
            (ExclusiveAccessRegistrantsOnly, Access::ALL, none),
            (WriteExclusiveAllRegistrants, Access::ALL, reads),
            (ExclusiveAccessAllRegistrants, Access::ALL, none),
        ] {
            let state = held(kind);
            assert_eq!(
                (state.access(&A), state.access(&B), state.access(&C)),
                (Access::ALL, registrant, other)
            );
        }
    }

    #[test]
    fn keys_are_checked_before_anything_changes() {
        let mut state = held(ReservationType::WriteExclusive);
        let before = state.clone();
        let conflict = Err(StatusCode::RESERVATION_CONFLICT);
        assert_eq!(register(&A, &mut state, 9), conflict);
        let kind = ReservationType::WriteExclusive;
        for (host, keys) in [(&A, (9, 0)), (&C, (0, 0)), (&B, (2, 0))] {
            assert_eq!(acquire(&mut state, host, AcquireAction::Acquire, keys, kind), conflict);
        }
        let release =
            |current, kind| ReservationCommand::Release { action: ReleaseAction::Release, current, kind };
        assert_eq!(state.apply(&A, release(9, Some(kind))), conflict);
        let other = Some(ReservationType::ExclusiveAccess);
        assert_eq!(state.apply(&A, release(1, other)), Err(StatusCode::INVALID_FIELD));
        // B is registered and does not hold it: no effect.
        assert_eq!(state.apply(&B, release(2, Some(kind))), Ok(Effect::default()));
        assert_eq!(acquire(&mut state, &A, AcquireAction::Acquire, (1, 0), kind), Ok(Effect::default()));
        let more = ReservationType::ExclusiveAccess;
        assert_eq!(acquire(&mut state, &A, AcquireAction::Acquire, (1, 0), more), conflict);
        assert_eq!(state, before);
        assert_eq!(state.apply(&A, release(1, Some(kind))).map(|effect| effect.changed), Ok(true));
        assert_eq!(state.access(&C), Access::ALL);
    }

    #[test]
    fn preempting_takes_the_reservation_and_its_holders_registration() {
        let mut state = held(ReservationType::WriteExclusive);
        let kind = ReservationType::ExclusiveAccess;
        let effect = acquire(&mut state, &B, AcquireAction::PreemptAndAbort, (2, 1), kind).unwrap();
        assert_eq!((effect.changed, effect.fenced), (true, vec![A]));
        assert_eq!(effect.notices, [(A, ReservationNotice::RegistrationPreempted)]);
        assert_eq!((state.access(&A).read, state.access(&B)), (false, Access::ALL));
        assert_eq!(state.status().registrants, [Registrant { host: B, key: 2, holds: true }]);
        // Registrants without the reservation lose their registration only; nobody is waited for.
        register(&A, &mut state, 1).unwrap();
        let effect = acquire(&mut state, &B, AcquireAction::Preempt, (2, 1), kind).unwrap();
        assert_eq!((effect.fenced.len(), state.status().registrants.len()), (0, 1));
        let nobody = acquire(&mut state, &B, AcquireAction::Preempt, (2, 77), kind);
        assert_eq!(nobody, Err(StatusCode::RESERVATION_CONFLICT));
        assert_eq!(
            acquire(&mut state, &B, AcquireAction::Preempt, (2, 0), kind),
            Err(StatusCode::INVALID_FIELD)
        );
    }

    #[test]
    fn what_all_registrants_hold_ends_with_the_last_and_key_0_preempts_all_others() {
        let kind = ReservationType::WriteExclusiveAllRegistrants;
        let mut state = held(kind);
        assert!(state.status().registrants.iter().all(|registrant| registrant.holds));
        let unregister = |current| ReservationCommand::Register {
            action: RegisterAction::Unregister,
            current,
            new: 0,
            ignore_key: false,
            persist: None,
        };
        state.apply(&A, unregister(1)).unwrap();
        assert_eq!(state.status().kind, Some(kind));
        register(&A, &mut state, 1).unwrap();
        let effect = acquire(&mut state, &B, AcquireAction::PreemptAndAbort, (2, 0), kind).unwrap();
        assert_eq!(effect.fenced, [A]);
        state.apply(&B, unregister(2)).unwrap();
        assert_eq!(state.status().kind, None);
        // What one host holds ends with its registration.
        let mut state = held(ReservationType::WriteExclusiveRegistrantsOnly);
        state.apply(&A, unregister(1)).unwrap();
        assert_eq!((state.status().kind, state.access(&C)), (None, Access::ALL));
    }

    /// The first answer was an error, because the disk was full, or was lost with its connection. The host asked again, and got a
    /// conflict, because the key that it preempted was gone: it could not learn whether the other's commands had ended.
    #[test]
    fn a_preemption_that_was_not_answered_can_be_asked_for_again() {
        let mut state = held(ReservationType::WriteExclusive);
        let kind = ReservationType::ExclusiveAccess;
        let again = |state: &mut Reservations, action| acquire(state, &B, action, (2, 1), kind);
        let first = again(&mut state, AcquireAction::PreemptAndAbort);
        assert_eq!(first.unwrap().fenced, [A]);
        let second = again(&mut state, AcquireAction::PreemptAndAbort).unwrap();
        assert_eq!((second.fenced, second.notices), (vec![A], vec![]));
        // Not another command, and not once it is answered.
        assert_eq!(again(&mut state, AcquireAction::Preempt), Err(StatusCode::RESERVATION_CONFLICT));
        state.answered(&B);
        let conflict = Err(StatusCode::RESERVATION_CONFLICT);
        assert_eq!(again(&mut state, AcquireAction::PreemptAndAbort), conflict);
        // Nor when somebody has taken it away since.
        let mut state = held(ReservationType::WriteExclusive);
        again(&mut state, AcquireAction::PreemptAndAbort).unwrap();
        register(&C, &mut state, 3).unwrap();
        let more = ReservationType::WriteExclusiveRegistrantsOnly;
        acquire(&mut state, &C, AcquireAction::Preempt, (3, 2), more).unwrap();
        assert_eq!(again(&mut state, AcquireAction::PreemptAndAbort), conflict);
    }

    #[test]
    fn registrants_are_told_what_others_do_to_what_they_share() {
        use ReservationNotice::{Preempted, RegistrationPreempted, Released};
        let shared = ReservationType::WriteExclusiveRegistrantsOnly;
        let release = |state: &mut Reservations, action, kind| {
            let command = ReservationCommand::Release { action, current: 1, kind: Some(kind) };
            state.apply(&A, command).unwrap().notices
        };
        assert_eq!(release(&mut held(shared), ReleaseAction::Release, shared), [(B, Released)]);
        let alone = ReservationType::WriteExclusive;
        assert_eq!(release(&mut held(alone), ReleaseAction::Release, alone), []);
        assert_eq!(release(&mut held(alone), ReleaseAction::Clear, alone), [(B, Preempted)]);
        let leave = ReservationCommand::Register {
            action: RegisterAction::Unregister,
            current: 1,
            new: 0,
            ignore_key: false,
            persist: None,
        };
        assert_eq!(held(shared).apply(&A, leave).unwrap().notices, [(B, Released)]);
        assert_eq!(held(alone).apply(&A, leave).unwrap().notices, []);
        let all = ReservationType::WriteExclusiveAllRegistrants;
        assert_eq!(held(all).apply(&A, leave).unwrap().notices, [], "the others hold it");
        // Taken over with another type: whoever is still registered is told of that, too.
        let mut state = held(shared);
        register(&C, &mut state, 3).unwrap();
        let told = acquire(&mut state, &B, AcquireAction::Preempt, (2, 1), alone).unwrap().notices;
        assert_eq!(told, [(A, RegistrationPreempted), (C, Released)]);
    }

    #[test]
    fn registering_again_with_the_same_key_changes_nothing() {
        let mut state = held(ReservationType::WriteExclusive);
        let before = state.status();
        assert_eq!(register(&A, &mut state, 1), Ok(Effect::default()));
        let status = state.status();
        assert_eq!((status.registrants, status.generation), (before.registrants, before.generation + 1));
    }

    #[test]
    fn clearing_leaves_nobody_and_generations_count_changes() {
        let mut state = held(ReservationType::ExclusiveAccess);
        let before = state.status().generation;
        let clear = ReservationCommand::Release { action: ReleaseAction::Clear, current: 2, kind: None };
        state.apply(&B, clear).unwrap();
        let status = state.status();
        assert_eq!((status.kind, status.registrants.len(), status.generation), (None, 0, before + 1));
    }

    #[test]
    fn the_text_gives_the_state_back_and_what_does_not_persist_ends_with_the_boot() {
        let mut state = held(ReservationType::ExclusiveAccessRegistrantsOnly);
        let text = state.to_text("b1");
        assert_eq!(Reservations::from_text(&text, "b1"), Ok(state.clone()));
        assert_eq!(Reservations::from_text(&text, "b2"), Ok(Reservations::default()));
        let replace = ReservationCommand::Register {
            action: RegisterAction::Replace,
            current: 0,
            new: 0xff00_0000_0000_0001,
            ignore_key: true,
            persist: Some(true),
        };
        state.apply(&A, replace).unwrap();
        let text = state.to_text("b1");
        assert_eq!(Reservations::from_text(&text, "b2"), Ok(state));
        let cut = text.strip_suffix("end\n").unwrap();
        assert!(Reservations::from_text(cut, "b1").unwrap_err().contains("ends too early"));
        assert!(
            Reservations::from_text("hawser reservations 2\n", "b1").unwrap_err().contains("another version")
        );
        assert!(Reservations::from_text(&text.replace("boot", "foot"), "b1").unwrap_err().contains("foot"));
    }
}
