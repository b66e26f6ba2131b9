//! Writes that members have failed, or that were given up: when they have ended, and how.

use super::ask;
use super::channel::Core;
use super::owner::Owner;
use super::place::UnderWay;
use super::shared::{Class, Counted};
use super::slow::{carry_out, finish_fua};
use super::stripes::Begun;
use crate::simulated::is_broken;
use hawser_block::{Operation, Outcome, Request, Status};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long it waits before it tries again while no copy is within reach.
pub(super) const OUT_OF_REACH: Duration = Duration::from_millis(500);

/// No copy is within reach, which may end: as where there is one copy only, requests wait until somebody gives up.
pub(super) fn is_out_of_reach(core: &Core, status: Status) -> bool {
    let is_waited_for = matches!(status, Status::Path | Status::Timeout) && core.shared.view().is_redundant;
    is_waited_for && !core.is_given_up.load(Ordering::Relaxed)
}

/// What becomes of a write that members have failed.
pub(super) async fn after_failure(
    core: Rc<Core>,
    request: Request,
    members: (u64, u64),
    (status, since): (Status, u64),
    under_way: UnderWay,
) -> Outcome {
    let reported = report_failures(&core, members, (status, since), false).await;
    drop(under_way);
    match reported {
        Err(status) if is_out_of_reach(&core, status) => {
            core.runtime.sleep(OUT_OF_REACH).await;
            carry_out(core, request, Counted::under(Class::DeviceFailure)).await
        }
        outcome => outcome,
    }
}

/// The same of one of whole stripes. What is to be done is done also where nobody waits for it any more.
pub(super) async fn after_stripes_failed(
    core: Rc<Core>,
    request: Request,
    members: (u64, u64),
    status: Status,
    begun: Begun,
) -> Outcome {
    let reported = report_failures(&core, members, (status, begun.since), true).await;
    if reported.is_ok() || is_broken("stripe_left_half_written") {
        return reported;
    }
    let (reply, answer) = ask::channel();
    let ways = core.ways();
    core.runtime.spawn(async move {
        let outcome = ways.finish(&begun).await;
        drop(begun);
        reply.send(outcome);
    });
    let mut answer = Box::pin(answer);
    let ended = core.place.bell.until_or(&mut answer, || core.is_given_up.load(Ordering::Relaxed)).await;
    match ended.flatten().unwrap_or(Err(Status::Aborted)) {
        Ok(()) => finish_fua(&core, matches!(request.operation, Operation::Write { fua: true })).await,
        Err(status) if is_out_of_reach(&core, status) => {
            core.runtime.sleep(OUT_OF_REACH).await;
            carry_out(core, request, Counted::under(Class::DeviceFailure)).await
        }
        error => error,
    }
}

/// Members have failed a part of a write that others have: it has ended when that is recorded. `together`: of all of them, or none.
async fn report_failures(
    core: &Core,
    (failed, aborted): (u64, u64),
    (status, since): (Status, u64),
    together: bool,
) -> Outcome {
    let is_given_up = aborted != 0 && core.is_given_up.load(Ordering::Relaxed);
    let (members, status) = match (is_given_up, status) {
        // By who asked: they have not failed. What was marked is made the same again.
        (true, _) if failed == 0 => return Err(Status::Aborted),
        (true, status) => (failed, status),
        // By the pool, which does not wait for a member any more.
        (false, Status::Aborted) => (aborted, Status::Timeout),
        (false, status) => (failed | aborted, status),
    };
    let report = move |owner: Rc<Owner>| async move {
        match together {
            // Who is full is asked once more before it is out.
            true if status != Status::NoSpace => owner.report_together(members, status, since).await,
            true => owner.report(members, status, since).await,
            false => owner.report_beside(members, status, since).await,
        }
    };
    if is_broken("ack_before_stale_recorded") {
        drop(core.shared.ask(report));
        return Ok(());
    }
    let reported = core.shared.request(report).await;
    if is_given_up { Err(Status::Aborted) } else { reported }
}
