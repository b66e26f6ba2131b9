//! One history: what its plan says happens, while guests go on; then all is well again, and everything must come to an end.

use crate::cast::{Cast, NQN, REGION};
use crate::plan::{Fault, Plan};
use crate::runner::Seen;
use hawser_block::{Device, DeviceState, Status};
use hawser_fabric::nvme::ana::AnaState;
use hawser_runtime::Instant;
use hawser_sim::{Side, Sides};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// How long everything may take once nothing happens any more: a Connect that waits for commands that hang (600 s), its
/// repetition, the time of lost associations (46 s), and some more.
const CALM: Duration = Duration::from_secs(1000);
/// Connections that a host may ask one address for within a second, and within a minute, for each of its queues: back-off
/// doubles from 50 to 100 ms.
const CONNECTS_IN_A_SECOND: usize = 6;
const CONNECTS_IN_A_MINUTE: usize = 90;

/// Lets the history happen.
///
/// # Errors
/// What was broken.
pub(crate) fn happen(plan: Plan) -> Result<Seen, String> {
    let mut cast = Cast::new(plan);
    let result = catch_unwind(AssertUnwindSafe(|| happen_to(&mut cast)));
    let result = result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    });
    if result.is_err() {
        // Whatever is broken may not come to an end.
        std::mem::forget(cast);
        return result;
    }
    result
}

fn happen_to(cast: &mut Cast) -> Result<Seen, String> {
    // Guests begin at devices that were reached without trouble.
    let until = cast.world.now() + Duration::from_secs(5);
    pass(cast, until, false)?;
    cast.world.lose_ends(cast.plan.lost_ends_permille);
    for _ in 0..cast.plan.count {
        // Any order of magnitude, from what a message takes to longer than a keep-alive.
        let most = if cast.random.chance(150) { 8_000_000_000u64 } else { 300_000_000 };
        let shift = cast.random.below(10);
        let at = cast.world.now() + Duration::from_nanos(20_000 + cast.random.below(most >> shift));
        pass(cast, at, false)?;
        go_on(cast);
        let fault = cast.plan.faults[cast.random.index(cast.plan.faults.len())];
        strike(cast, fault);
        forget_refusals_in_time(cast);
    }
    mend(cast);
    for guest in cast.hosts.iter().flat_map(|host| &host.guests) {
        let mut guest = guest.borrow_mut();
        guest.to_do = guest.to_do.min(12);
        guest.pause_ns_max = 20_000_000;
    }
    let deadline = cast.world.now() + CALM;
    if !pass(cast, deadline, true)? {
        return Err(format!(
            "not everything ends {} s after the last fault: {}",
            CALM.as_secs(),
            cast.state()
        ));
    }
    cast.check_disk()?;
    flush_and_lose_power(cast)?;
    check_storms(cast)?;
    for host in &cast.hosts {
        for client in &host.clients {
            client.borrow_mut().close();
        }
    }
    let verbs = cast.world.verbs_counts();
    if verbs.starved > 0 {
        return Err("an answer found no receive at its host".to_owned());
    }
    let trace = cast.world.trace();
    let guests = cast.hosts.iter().flat_map(|host| &host.guests);
    let counts = [
        ("requests", guests.map(|guest| guest.borrow().ended).sum()),
        ("seconds", cast.world.now().0 / 1_000_000_000),
        ("connects", cast.world.connects().len() as u64),
        ("broken", verbs.breaks),
        ("flushed", verbs.flushed),
        ("ghosts", verbs.ghosts),
    ];
    Ok(Seen { trace, counts: counts.into() })
}

/// Lets time pass until `at`, or until every guest has done what it had to do; says whether that is so.
fn pass(cast: &mut Cast, at: Instant, to_the_end: bool) -> Result<bool, String> {
    loop {
        cast.start_due();
        let until = cast.next_start().map_or(at, |start| start.min(at));
        let Cast { world, reactors, hosts, troubles, .. } = cast;
        let mut over = false;
        let happened = world.run_until(reactors, until, || {
            over = to_the_end
                && hosts.iter().all(|host| {
                    let guests = || host.guests.iter().map(|guest| guest.borrow());
                    !host.clients.is_empty() && guests().all(|guest| guest.to_do == 0 && guest.is_idle())
                });
            let reached = |host: &crate::cast::HostProcess| {
                host.clients.is_empty() && host.device.as_ref().is_some_and(|it| it.geometry().is_some())
            };
            over || !troubles.borrow().is_empty() || hosts.iter().any(reached)
        })?;
        if let Some(trouble) = cast.troubles.borrow().first() {
            return Err(format!("{trouble} ({:?})", cast.world.now()));
        }
        if over {
            return Ok(true);
        }
        if !happened && cast.world.now() >= at {
            return Ok(false);
        }
    }
}

fn duration(cast: &mut Cast) -> Duration {
    let most = [5, 100, 1_500, 9_000][cast.random.index(4)];
    Duration::from_millis(1 + cast.random.below(most))
}

/// How many of an address's connections a fault meets, in 1000.
fn share(cast: &mut Cast) -> u64 {
    [1000, 1000, 500][cast.random.index(3)]
}

fn side(cast: &mut Cast) -> Side {
    if cast.random.chance(700) { Side::Target } else { Side::Host }
}

/// Guests have something to do at the next fault.
fn go_on(cast: &mut Cast) {
    for (runtime, client) in cast.clients() {
        runtime.enter(|| client.borrow_mut().more(&runtime, 16));
    }
}

fn strike(cast: &mut Cast, fault: Fault) {
    let addresses = cast.addresses();
    let address = addresses[cast.random.index(addresses.len())];
    let world = cast.world.clone();
    let now = world.now();
    world.note(&[5, fault as u64, now.0]);
    if std::env::var_os("HAWSER_SIM_TELL").is_some() {
        println!("{now:?} {fault:?} {address}");
    }
    match fault {
        Fault::Reset => world.reset(address, Sides::Both, share(cast), Duration::ZERO),
        Fault::ResetHost => {
            let hold = hold(cast);
            world.reset(address, Sides::One(Side::Host), share(cast), hold);
        }
        Fault::ResetTarget => world.reset(address, Sides::One(Side::Target), share(cast), Duration::ZERO),
        Fault::HalfClose => world.half_close(address, side(cast), share(cast)),
        Fault::Silence => world.silence(address, duration(cast)),
        Fault::OneWay => world.silence_to(address, Sides::One(side(cast)), duration(cast)),
        Fault::Hold => {
            let hold = hold(cast);
            world.hold(address, side(cast), share(cast), hold);
        }
        Fault::Down => {
            world.reset_connections(address);
            world.set_down(address, true);
            let _ = pass(cast, now + Duration::from_millis(1500), false);
            if cast.targets.iter().any(|it| it.process.is_some() && it.addresses.contains(&address)) {
                world.set_down(address, false);
            }
        }
        Fault::Corrupt => {
            world.corrupt(address);
        }
        Fault::TargetKill => {
            let index = cast.random.index(cast.targets.len());
            let starts_at = now + duration(cast);
            cast.kill_target(index, starts_at);
        }
        Fault::PowerLoss => {
            let starts_at = now + duration(cast);
            cast.lose_power(starts_at);
        }
        Fault::HostKill => {
            let index = cast.random.index(cast.hosts.len());
            let (kept, starts_at) = (cast.random.chance(700), now + duration(cast));
            cast.kill_host(index, kept, starts_at);
        }
        Fault::Ana => {
            let index = cast.random.index(cast.targets.len());
            let state = AnaState::ALL[cast.random.index(AnaState::ALL.len())];
            let target = &cast.targets[index];
            let port = cast.random.index(target.addresses.len());
            // Where every path is lost for good, requests fail: one is left.
            let is_last = index == 0 && port == 0;
            let state =
                if is_last && state == AnaState::PersistentLoss { AnaState::Inaccessible } else { state };
            if let Some(process) = &target.process {
                let _ = process.set_ana_state(NQN, port, state);
            }
        }
        Fault::Slow => {
            // A target that is not ours is given 5 s; ours answers minutes late.
            let most: u64 = if cast.plan.foreign { 900_000_000 } else { 600_000_000_000 };
            let disk = Arc::clone(&cast.disk);
            let mut state = disk.state();
            state.latency_ns_max = [50_000, 2_000_000, 400_000_000][cast.random.index(3)];
            state.stuck_permille = [0, 30, 200][cast.random.index(3)];
            let shift = cast.random.below(8);
            state.stuck_ns = cast.random.below(most >> shift);
            // Where two processes have the disk, neither can end or await what the other has under way: a host waits for CQT
            // there, which says nothing of operations that outlive it.
            state.ignores_aborts = !cast.plan.foreign && cast.plan.targets == 1 && cast.random.chance(500);
        }
        Fault::Refuse => {
            let mut state = cast.disk.state();
            // Five in a row for one request would be an error for its guest.
            state.errors_permille = 40;
            state.error = [Status::Timeout, Status::Aborted, Status::Path][cast.random.index(3)];
        }
        Fault::Media => {
            let mut state = cast.disk.state();
            (state.errors_permille, state.error) = (100, Status::Media);
            for guest in cast.hosts.iter().flat_map(|host| &host.guests) {
                guest.borrow_mut().may_fail = true;
            }
        }
        Fault::Ghost => {
            let (hold, share) = (hold(cast), share(cast));
            world.hold(address, Side::Target, share, hold);
            let wait = Duration::from_micros(200 + cast.random.below(30_000));
            let _ = pass(cast, now + wait, false);
            world.reset(address, Sides::One(Side::Host), 1000, Duration::ZERO);
            go_on(cast);
        }
        Fault::Grow => cast.disk.grow(REGION),
    }
}

/// How long the network keeps what it has not delivered. A target that is not ours must have noticed before, with what it is
/// given after the loss of an association.
fn hold(cast: &mut Cast) -> Duration {
    let duration = duration(cast);
    if cast.plan.foreign { duration.min(cast.plan.keep_alive * 4 / 5) } else { duration }
}

/// Nothing more to do where requests could fail and time passed: the disk is well again, sometimes.
fn forget_refusals_in_time(cast: &mut Cast) {
    if cast.random.chance(400) {
        cast.disk.state().errors_permille = 0;
    }
}

/// Everything works again.
fn mend(cast: &mut Cast) {
    cast.world.clear_network();
    {
        let mut state = cast.disk.state();
        (state.errors_permille, state.stuck_permille, state.latency_ns_max) = (0, 0, 50_000);
    }
    for target in &cast.targets {
        let Some(process) = &target.process else { continue };
        for (port, address) in target.addresses.iter().enumerate() {
            cast.world.set_down(*address, false);
            let _ = process.set_ana_state(NQN, port, AnaState::Optimized);
        }
    }
}

/// A FLUSH that ends well, and then the cache is lost: nothing of what was acknowledged is.
fn flush_and_lose_power(cast: &mut Cast) -> Result<(), String> {
    // Disks fail no more; each loss of a cache is told once.
    for guest in cast.hosts.iter().flat_map(|host| &host.guests) {
        guest.borrow_mut().may_fail = false;
    }
    for host in 0..cast.hosts.len() {
        let tries = 3;
        for attempt in 1..=tries {
            let allowed = cast.hosts[host].model.borrow().failures_allowed;
            cast.hosts[host].clients[0].borrow_mut().flush();
            let deadline = cast.world.now() + CALM;
            if !pass(cast, deadline, true)? {
                return Err(format!("the last FLUSH does not end: {}", cast.state()));
            }
            if cast.hosts[host].model.borrow().failures_allowed == allowed {
                break;
            }
            if attempt == tries {
                return Err("every FLUSH fails".to_owned());
            }
        }
        let device = cast.hosts[host].device.clone().ok_or("the device is there")?;
        if device.state() != DeviceState::Ready {
            return Err(format!("the device is not ready at the end: {}", device.trouble()));
        }
    }
    cast.disk.state().lose_cache();
    let content = &cast.disk.state().content;
    cast.hosts.iter().try_for_each(|host| host.model.borrow_mut().cache_lost(content))
}

fn check_storms(cast: &Cast) -> Result<(), String> {
    let mut by_address: BTreeMap<SocketAddr, Vec<Instant>> = BTreeMap::new();
    for (address, at) in cast.world.connects() {
        by_address.entry(address).or_default().push(at);
    }
    // Each process starts with short waits; kills are few.
    let users = cast.plan.hosts * (1 + cast.plan.lanes);
    for (address, times) in by_address {
        for (seconds, most) in [(1, CONNECTS_IN_A_SECOND), (60, CONNECTS_IN_A_MINUTE)] {
            let window = Duration::from_secs(seconds);
            let busiest = (0..times.len())
                .map(|from| times[from..].iter().take_while(|at| **at < times[from] + window).count())
                .max();
            if busiest.unwrap_or(0) > most * users {
                let busiest = busiest.unwrap_or(0);
                return Err(format!("{busiest} connections to {address} in {seconds} s: a storm"));
            }
        }
    }
    Ok(())
}
