//! Pools whose members are slower than our CPU: all of them are behind links.
//!
//! ```text
//!   p ── RAID 5 ── m0  m1  ·   n0        each by NVMe/TCP, behind a link of its own
//!                  │   │       └─ link ─┐
//!                  │   └─ link ─────────┤
//!                  └─ link ─────────────┴─ target: mem:, on the other CPU
//! ```
//!
//! A member made anew: while two are read, and what was read of them before is computed and written to the third, each link is as busy as it can be.
//! Writes of whole stripes: data goes to as many members as those of a RAID 0 get it, at the same time, and the parities go beside it.
//!
//! Owns: these stories. Must not know: how a table looks.

use std::path::PathBuf;

use super::rebuild::{All, await_written, begin, candidate};
use super::server::{PoolServer, TABLES_BYTES, members, rate};
use super::{Case, Found, Outcome, Pool, link};
use crate::client::options::Mix;
use crate::compare::cases::Shape;
use crate::compare::load::Load;
use crate::compare::quiet::Guard;
use crate::compare::results::Spread;
use crate::compare::runner::Plan;
use crate::compare::servers::{NQN, Place, Server, bound_address, head, serve, size, write};
use crate::sys::TempDir;
use crate::to_f64;

const MEMBERS: f64 = 3.0;
/// Of each link, each way: little enough for both CPUs.
const LINK_BYTES_PER_SECOND: u64 = 60_000_000;
const VOLUME_BYTES: u64 = 128 << 20;
/// A device that is no member, and the daemon's first disk.
const BARE: &str = "b";

/// Devices of one target.
struct Far {
    target: Server,
    /// Their names, and how they are reached.
    uris: Vec<(String, String)>,
}

/// What a rebuild does, and what its devices do by themselves.
pub(super) fn rebuild(plan: &Plan, place: &Place<'_>) -> Result<All, String> {
    let members = ["m0", "m1", "m2", "n0"].map(str::to_owned);
    let Far { target, uris } = Far::start(plan, &members)?;
    let launch = |folder: TempDir, gone: &str| {
        let there: Vec<_> = uris.iter().filter(|(name, _)| name != gone).cloned().collect();
        let more = "[[pool]]\nname = \"p\"\nassemble_timeout = 1\nsync_rate = \"0\"\n\n";
        PoolServer::launch(
            &plan.hawser,
            plan.poll_us,
            place,
            folder,
            &there,
            more,
            &[(BARE, "device = \"b\"")],
        )
    };
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let healthy = launch(folder, "n0")?;
    let failed = |e: String| format!("{e}: {}", healthy.server.complaint());
    healthy.ask(&["pool", "create", "p", "--raid", "raid5", "m0", "m1", "m2"])?;
    let volume = healthy.add_volume("p", "v", VOLUME_BYTES)?;
    let bare = healthy.server.socket().to_owned();
    for socket in [&bare, &volume] {
        plan.fill_socket(&healthy.server, socket).map_err(failed)?;
    }
    let mut own = [Vec::new(), Vec::new()];
    for _ in 0..plan.rounds {
        for (mix, rates) in [Mix::Read, Mix::Write].into_iter().zip(&mut own) {
            let shape = Shape { mix, kib: 128, depth: 8 };
            let load = plan.load(shape, &candidate(&healthy, shape));
            let done = plan.maker.run(&Load { socket: PathBuf::from(&bare), ..load }).map_err(failed)?;
            rates.push(done.iops * to_f64(shape.kib << 10));
        }
    }
    // Each member is read, or written, beside the others.
    let slowest = own.map(|rates| Spread::of(rates.into_iter()).median).into_iter().fold(f64::MAX, f64::min);

    let rebuilding = launch(healthy.stop()?, "m2")?;
    begin(&rebuilding, "n0").map_err(|e| format!("{e}: {}", rebuilding.server.complaint()))?;
    let rows = to_f64(VOLUME_BYTES / 2);
    let started = await_written(&rebuilding, "n0", rows * 0.1)?;
    let ended = await_written(&rebuilding, "n0", rows * 0.9)?;
    let rebuild = MEMBERS * rate(ended.1 - started.1, ended.0 - started.0);
    drop(rebuilding);
    drop(target);
    Ok(vec![(Case::RebuildFar, Found::Rate { rebuild, most: MEMBERS * slowest }, Vec::new())])
}

/// Writes of whole stripes to pools with parity, and to a RAID 0, in turns.
pub(super) fn writes(
    plan: &Plan,
    cases: &[Case],
    place: &Place<'_>,
    guard: &mut Guard,
) -> Result<Vec<Outcome>, String> {
    let of = |case: &Case| match case {
        Case::SequentialFar(pool) => Some((*case, *pool)),
        _ => None,
    };
    let cases: Vec<(Case, Pool)> = cases.iter().filter_map(of).collect();
    let pools: Vec<Pool> = std::iter::once(Pool::Raid0).chain(cases.iter().map(|(_, pool)| *pool)).collect();
    let all: Vec<String> = pools.iter().flat_map(|pool| members(*pool)).collect();
    let Far { target, uris } = Far::start(plan, &all)?;
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let bare = [(BARE, "device = \"b\"")];
    let server = PoolServer::launch(&plan.hawser, plan.poll_us, place, folder, &uris, "", &bare)?;
    let mut volumes = Vec::new();
    for pool in pools {
        server.create(pool)?;
        let socket = server.add_volume(pool.name(), "v", VOLUME_BYTES)?;
        plan.fill_socket(&server.server, &socket)
            .map_err(|e| format!("{e}: {}", server.server.complaint()))?;
        volumes.push(socket);
    }
    let beside = &volumes[0];
    let loads = cases.iter().zip(&volumes[1..]);
    let found =
        loads.map(|((case, _), volume)| plan.loads(*case, &server, [beside, volume], guard)).collect();
    drop(server);
    drop(target);
    found
}

impl Far {
    /// Starts a target with a bare device and these members, and opens a link for each.
    fn start(plan: &Plan, members: &[String]) -> Result<Far, String> {
        let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
        let socket = folder.path().join("none");
        let mut target = Server { children: Vec::new(), socket, folder };
        let mut text = head(target.folder.path(), "t", 0, &[plan.cpus[1]]);
        text += &format!("[[subsystem]]\nnqn = \"{NQN}\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\n");
        let devices = || (1..).zip(std::iter::once(BARE).chain(members.iter().map(String::as_str)));
        for (nsid, name) in devices() {
            let bytes = if name == BARE { VOLUME_BYTES / 2 } else { VOLUME_BYTES / 2 + TABLES_BYTES };
            text += &format!("[[device]]\nname = \"{name}\"\nuri = \"mem:?size={}\"\n\n", size(bytes));
            text += &format!("[[subsystem.namespace]]\nnsid = {nsid}\ndevice = \"{name}\"\n\n");
        }
        let config = write(target.folder.path(), "target.toml", &text)?;
        target.start_child(serve(&plan.hawser, &config), Some(plan.cpus[1]))?;
        let api = target.folder.path().join("t.api");
        let address = bound_address(&plan.hawser, &api, &mut target.children[0])
            .map_err(|e| format!("{e}: {}", target.complaint()))?;
        let address = address.parse().map_err(|e| format!("{address}: {e}"))?;
        let uris = devices().map(|(nsid, name)| {
            let near = link::open(address, LINK_BYTES_PER_SECOND).map_err(|e| format!("a link: {e}"))?;
            Ok((name.to_owned(), format!("nvme+tcp://{near}/{NQN}?nsid={nsid}")))
        });
        let uris = uris.collect::<Result<Vec<_>, String>>()?;
        Ok(Far { target, uris })
    }
}
