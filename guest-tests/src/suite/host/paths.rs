//! Native multipath: the kernel's choice of path follows what our target says, and survives what becomes of a path.

#![forbid(unsafe_code)]

use super::{Bench, Check, expect_no_trace};
use crate::Result;

pub(super) const CHECKS: &[Check] =
    &[("io_follows_ana_states", ana), ("io_survives_a_lost_path_and_the_lack_of_any", lost)];

/// Two paths, and verified load on their disk.
fn begin(bench: &mut Bench) -> Result<()> {
    bench.run(
        "join $N 127.0.0.1 $N1 a -k 2 -c 1; join $N 127.0.0.2 $N2 a -k 2 -c 1; within 10 have_disk $N 1
        two() { [ -n \"$(path $1)\" ] && [ -n \"$(path $2)\" ]; }
        within 10 two $(controller $N 127.0.0.1 $N1 a) $(controller $N 127.0.0.2 $N2 a)
        load $(disk $N 1)",
    )?;
    Ok(())
}

/// The controllers of the first and of the second address, and the disk; the load has found nothing yet.
const NAMES: &str =
    "c=$(controller $N 127.0.0.1 $N1 a); e=$(controller $N 127.0.0.2 $N2 a); d=$(disk $N 1); loading\n";

fn ana(bench: &mut Bench) -> Result<String> {
    begin(bench)?;
    // port, its state, and where I/O goes then
    let steps = [
        (
            0,
            "inaccessible",
            "busy $e; idle $c; has \"$c tcp\" \"$(nvme list-subsys /dev/$d)\"; has 'live inaccessible' \"$(nvme list-subsys /dev/$d)\"",
        ),
        (0, "non-optimized", "busy $e; idle $c"),
        (1, "non-optimized", "loading"),
        (0, "optimized", "busy $c; idle $e"),
        (0, "change", "busy $e; idle $c"),
        (0, "optimized", "busy $c; idle $e"),
        (0, "persistent-loss", "busy $e; idle $c"),
        (0, "optimized", "busy $c"),
        (1, "optimized", "loading"),
    ];
    for (port, state, then) in steps {
        bench.set_ana(port, state)?;
        let path = if port == 0 { "$c" } else { "$e" };
        bench
            .run(&format!("{NAMES}within 10 ana {path} {state}; {then}"))
            .map_err(|e| format!("port {port} {state}: {e}"))?;
    }
    bench.run_for("loaded", 30)?;
    expect_no_trace(&mut bench.guest)?;
    Ok("9 changes of state under load".into())
}

fn lost(bench: &mut Bench) -> Result<String> {
    begin(bench)?;
    // One link dies without a word and comes back; then the other.
    for address in ["127.0.0.1", "127.0.0.2"] {
        let (dead, alive) = if address == "127.0.0.1" { ("$c", "$e") } else { ("$e", "$c") };
        bench.run(&format!(
            "{NAMES}ip route add blackhole {address}/32; within 15 not_live {dead}; busy {alive}"
        ))?;
        bench.run(&format!("{NAMES}ip route del blackhole {address}/32; within 15 live {dead}; within 10 ana {dead} optimized"))?;
    }
    // No path is good for a while: requests wait.
    for port in 0..2 {
        bench.set_ana(port, "inaccessible")?;
    }
    bench.run(&format!(
        "{NAMES}within 10 ana $c inaccessible; within 10 ana $e inaccessible; idle $c; idle $e"
    ))?;
    bench.set_ana(1, "optimized")?;
    bench.run(&format!("{NAMES}busy $e"))?;
    bench.run_for("loaded", 30)?;
    expect_no_trace(&mut bench.guest)?;
    Ok("two dead links, and 0.6 s without any path, under load".into())
}
