//! A member of a RAID 5 made anew where members are slower than our CPU: all of them are behind links.
//!
//! ```text
//!   p ── RAID 5 ── m0  m1  ·   n0        each by NVMe/TCP, behind a link of its own
//!                  │   │       └─ link ─┐
//!                  │   └─ link ─────────┤
//!                  └─ link ─────────────┴─ target: mem:, on the other CPU
//! ```
//!
//! While two members are read, and what was read of them before is computed and written to the third, each link is as busy as it can be.
//!
//! Owns: this one story. Must not know: how a table looks.

use std::path::PathBuf;

use super::rebuild::{All, await_written, begin, candidate};
use super::server::{PoolServer, TABLES_BYTES, rate};
use super::{Case, Found, link};
use crate::client::options::Mix;
use crate::compare::cases::Shape;
use crate::compare::load::Load;
use crate::compare::results::Spread;
use crate::compare::runner::Plan;
use crate::compare::servers::{NQN, Place, Server, bound_address, head, serve, size, write};
use crate::sys::TempDir;
use crate::to_f64;

const MEMBERS: f64 = 3.0;
/// Of each link, each way: little enough for both CPUs.
const LINK_BYTES_PER_SECOND: u64 = 60_000_000;
const VOLUME_BYTES: u64 = 128 << 20;
/// By namespace, from 1 on.
const DEVICES: [&str; 5] = ["b", "m0", "m1", "m2", "n0"];

/// What a rebuild does, and what its devices do by themselves.
pub(super) fn measure(plan: &Plan, place: &Place<'_>) -> Result<All, String> {
    let (target, address) = target(plan)?;
    let uris = (1..).zip(DEVICES).map(|(nsid, name)| {
        let near = link::open(address, LINK_BYTES_PER_SECOND).map_err(|e| format!("a link: {e}"))?;
        Ok((name.to_owned(), format!("nvme+tcp://{near}/{NQN}?nsid={nsid}")))
    });
    let uris = uris.collect::<Result<Vec<_>, String>>()?;
    let launch = |folder: TempDir, gone: &str| {
        let there: Vec<_> = uris.iter().filter(|(name, _)| name != gone).cloned().collect();
        let more = "[[pool]]\nname = \"p\"\nassemble_timeout = 1\nsync_rate = \"0\"\n\n";
        let bare = [("b", "device = \"b\"")];
        PoolServer::launch(&plan.hawser, plan.poll_us, place, folder, &there, more, &bare)
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

/// Starts a target with all devices; where it listens.
fn target(plan: &Plan) -> Result<(Server, std::net::SocketAddr), String> {
    let folder = TempDir::new(None).map_err(|e| format!("a temporary folder: {e}"))?;
    let socket = folder.path().join("none");
    let mut target = Server { children: Vec::new(), socket, folder };
    let mut text = head(target.folder.path(), "t", 0, &[plan.cpus[1]]);
    for name in DEVICES {
        let bytes = VOLUME_BYTES / 2 + if name == "b" { 0 } else { TABLES_BYTES };
        text += &format!("[[device]]\nname = \"{name}\"\nuri = \"mem:?size={}\"\n\n", size(bytes));
    }
    text += &format!("[[subsystem]]\nnqn = \"{NQN}\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\n");
    for (nsid, name) in (1..).zip(DEVICES) {
        text += &format!("[[subsystem.namespace]]\nnsid = {nsid}\ndevice = \"{name}\"\n\n");
    }
    let config = write(target.folder.path(), "target.toml", &text)?;
    target.start_child(serve(&plan.hawser, &config), Some(plan.cpus[1]))?;
    let api = target.folder.path().join("t.api");
    let address = bound_address(&plan.hawser, &api, &mut target.children[0])
        .map_err(|e| format!("{e}: {}", target.complaint()))?;
    let address = address.parse().map_err(|e| format!("{address}: {e}"))?;
    Ok((target, address))
}
