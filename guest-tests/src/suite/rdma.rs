//! NVMe over RDMA on real verbs: Soft-RoCE in one guest, with the kernel's target or host and ours beside it.
//!
//! A VM that boots over RDMA would have to run in that guest. So the daemon is driven at its vhost-user socket by the bench's client, on
//! the crate `blkio`: with buffers in one piece, and with buffers that are scattered page by page.

#![forbid(unsafe_code)]

use super::Outcome;
use crate::Result;
use crate::image::{self, Release};
use crate::lab::{Lab, cargo, repository, target};
use crate::process::run;
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use std::path::PathBuf;
use std::time::Duration;

/// Shell functions for the guest.
const LIBRARY: &str = include_str!("../../guest/rdma.sh");
/// Megabytes of the namespace.
const SIZE_MIB: u32 = 128;

/// A guest with our programs, and RDMA's modules.
struct Bench {
    guest: Qemu,
    _scratch: Scratch,
}

/// The programs: the daemon, its verbs driver, the client, and one that tries keys.
fn programs(lab: &Lab) -> Result<Vec<PathBuf>> {
    let clients = ["--bin", "blkclient", "--bin", "replay_client"];
    run(cargo().args(["build", "--quiet", "--package", "hawser-benches"]).args(clients))?;
    run(cargo().args(["build", "--quiet", "--package", "hawser-fabric", "--example", "rdma_keys"]))?;
    let manifest = repository().join("backend/verbs/Cargo.toml");
    let mut driver = cargo();
    driver.args(["build", "--quiet", "--manifest-path"]).arg(manifest).arg("--target-dir").arg(target());
    run(&mut driver)?;
    let built = target().join("debug");
    let mut programs = vec![lab.hawser.clone()];
    programs.extend(
        ["libhawser_verbs.so", "blkclient", "replay_client", "examples/rdma_keys"]
            .map(|name| built.join(name)),
    );
    Ok(programs)
}

/// A cable between two guests: this end's arguments for QEMU, the first that is started first. The guest has `eth1` at it.
fn cable(end: u8) -> [String; 4] {
    let server = if end == 1 { "on" } else { "off" };
    [
        "-netdev".into(),
        format!("stream,id=cable,server={server},addr.type=unix,addr.path=cable.sock"),
        "-device".into(),
        format!("virtio-net-pci,netdev=cable,id=nic1,romfile=,mac=52:54:00:00:03:0{end}"),
    ]
}

/// Makes a guest an end of the cable, with an RDMA device.
fn join(guest: &mut Qemu, end: u8) -> Result<()> {
    let script = format!(
        "cat > /run/rdma.sh <<'END'\n{LIBRARY}\nADDRESS=10.0.3.{end}\nEND\nset -e; . /run/rdma.sh
        ip addr add $ADDRESS/24 dev eth1; ip link set eth1 up; rdma_modules; rdma_up eth1"
    );
    guest.run_for(&script, 20).map(drop)
}

impl Bench {
    fn start(lab: &Lab) -> Result<Bench> {
        Bench::start_in(lab, Scratch::new()?, &[])
    }

    fn start_in(lab: &Lab, scratch: Scratch, more: &[String]) -> Result<Bench> {
        let image = scratch.file("programs.ext4");
        image::of_programs(&programs(lab)?, &scratch.file("programs"), &image)?;
        let drive = format!("file={},format=raw,if=none,id=programs,readonly=on", image.display());
        let disk = ["-drive", &drive, "-device", "virtio-blk-pci,drive=programs,serial=programs"];
        let more: Vec<&str> = ["-m", "768M", "-smp", "2"]
            .into_iter()
            .chain(disk)
            .chain(more.iter().map(String::as_str))
            .collect();
        let mut guest = Qemu::from_kernel("rdma", &lab.image, scratch.path(), lab.accel, &[], &more)?;
        guest
            .run(&format!("cat > /run/rdma.sh <<'END'\n{LIBRARY}\nEND\nset -e; . /run/rdma.sh; programs"))?;
        Ok(Bench { guest, _scratch: scratch })
    }

    /// Runs a script with the library, within `seconds` on KVM and longer elsewhere.
    fn run(&mut self, script: &str, seconds: u64) -> Result<String> {
        self.guest.run_for(&format!("set -e; . /run/rdma.sh\n{script}"), seconds)
    }
}

impl Bench {
    /// Fails when the guest's kernel has seen a bug of its own, or of ours.
    fn expect_no_complaint(&mut self) -> Result<()> {
        let said = self.run("dmesg | grep -E -A 20 'Oops|BUG:|WARNING:' | head -n 40 || true", 5)?;
        if !said.is_empty() {
            return Err(format!("the guest's kernel complains:\n{said}"));
        }
        // No balloon here: memory that is registered stays whole.
        self.run("! grep 'was taken away' /run/h/log", 5).map(drop)
    }
}

/// A disk on a namespace over RDMA.
fn disk_section(more: &str) -> String {
    disk_at("10.0.2.15", more)
}

fn disk_at(address: &str, more: &str) -> String {
    format!(
        "[[device]]
        name = \"d0\"
        uri = \"nvme+rdma://{address}:4420/nqn.2026-11.io.hawser:guest?nsid=1\"
        keep_alive_tmo = 2
        reconnect_delay = 1
        quiesce_tmo = 1
        {more}
        [[disk]]
        name = \"d0\"
        device = \"d0\"
        queues = 2
        socket = \"/run/h/d0.sock\""
    )
}

/// Our initiator and the kernel's target.
pub(super) fn initiator(lab: &Lab) -> Result<Outcome> {
    let mut bench = Bench::start(lab)?;
    // Without a device it says so, and goes on when there is one.
    bench.run(
        &format!(
            "configure '{}'
            rdma_modules
            start
            wait_for 'this host has no RDMA device, want one' /run/h/log
            rdma_up
            wait_for 'nobody listens there, want an address at which an NVMe/RDMA target listens' /run/h/log
            kernel_target {SIZE_MIB}
            wait_for 'd0: listening' /run/h/log",
            disk_section("")
        ),
        40,
    )?;
    // Verified at depths 1 to 128, 4 KiB to 4 MiB; nothing is copied where buffers are in one piece.
    for (depth, bs) in [(1, "4k"), (128, "4k"), (16, "64k"), (4, "1m"), (2, "4m")] {
        bench.run(&format!("client --rw=randrw --bs={bs} --iodepth={depth} --time_based --runtime=1"), 20)?;
    }
    bench.run(
        "[ \"$(copied rdma_unregistered)$(copied rdma_scattered)\" = 00 ] || { hawser device list --json; exit 1; }",
        5,
    )?;
    // Scattered: a few runs have a command each, more are copied and counted.
    for (depth, bs, segment) in [(8, "16k", "4k"), (8, "64k", "4k"), (2, "1m", "8k")] {
        let options = format!("--rw=randrw --bs={bs} --segment={segment} --iodepth={depth}");
        bench.run(&format!("client {options} --time_based --runtime=1"), 20)?;
    }
    bench.run("[ \"$(copied rdma_unregistered)\" = 0 ]; [ \"$(copied rdma_scattered)\" -gt 0 ]", 5)?;
    if lab.image.release == Release::Bookworm {
        // The rest is ours more than the kernel's, and was the same with both.
        bench.expect_no_complaint()?;
        let Bench { guest, .. } = bench;
        guest.quit()?;
        return Ok(Outcome::Passed("5 contiguous and 3 scattered loads verified".into()));
    }
    // The target goes away under load, and comes back.
    let load = "--rw=randrw --bs=16k --iodepth=16 --time_based";
    let said = bench.run(
        &format!(
            "client {load} --runtime=9 > /run/h/client 2>&1 &
            sleep 2; withdraw
            wait_for 'the target closed the connection' /run/h/log
            sleep 1; offer
            wait_for 'again connected' /run/h/log
            wait $! || {{ cat /run/h/client /run/h/log; exit 1; }}
            cat /run/h/client"
        ),
        40,
    )?;
    let requests = said.lines().next().unwrap_or_default().to_owned();
    // Memory regions come and go under load, and are written from and read to in place.
    let churned = bench.run(
        "client --rw=randrw --bs=16k --iodepth=16 --size=64m --churn=1m --time_based --runtime=5
        # All of it was there when it was looked at.
        ! grep 'was taken away' /run/h/log
        [ \"$(copied rdma_unregistered)\" = 0 ]",
        20,
    )?;
    let churned = churned.lines().last().unwrap_or_default().to_owned();
    // The daemon is killed under load: the next one carries out what the in-flight log has, and every block is as it was written last.
    let replayed = bench.run(
        "/run/p/replay_client --path=/run/h/d0.sock --runtime=6 --deaths=2 > /run/h/client 2>&1 &
        client=$!
        for kill in 1 2; do
            sleep 2; kill -9 $(cat /run/h/pid); : > /run/h/log
            start; wait_for 'd0: listening' /run/h/log
        done
        wait $client || { cat /run/h/client /run/h/log; exit 1; }
        cat /run/h/client",
        60,
    )?;
    // A key is refused by the device once it is not bound any more, and for what it is not for.
    bench.run("HAWSER_VERBS=/run/p/libhawser_verbs.so /mnt/rdma_keys $ADDRESS:4500", 20)?;
    // Windows are the rule, a region's own key only where the configuration says so, which is shown. And with two reactors, each of which
    // has a queue pair of its own: two I/O queues.
    let region_keys = format!("reactors = [0, 1]\n{}", disk_section("rdma_keys = \"region\""));
    bench.run(
        &format!(
            "hawser device list --json | grep -q '\"rdma_keys\": \"window\"'
            end /run/h/pid
            configure '{region_keys}'; : > /run/h/log; start
            wait_for 'd0: listening' /run/h/log
            client --rw=randrw --bs=64k --iodepth=8 --numjobs=2 --time_based --runtime=1
            hawser device list --json | grep -q '\"rdma_keys\": \"region\"'"
        ),
        40,
    )?;
    let speed = speed(&mut bench)?;
    bench.expect_no_complaint()?;
    let Bench { guest, .. } = bench;
    guest.quit()?;
    Ok(Outcome::Passed(format!(
        "5 contiguous and 3 scattered loads verified, target away under load: {requests}; {churned}; {replayed}; {speed}"
    )))
}

/// Our initiator beside the kernel's, and beside itself over TCP, on one target: requests per second, and ratios, as they are under
/// emulation. And what scattered requests cost in this guest.
fn speed(bench: &mut Bench) -> Result<String> {
    let over_rdma = disk_section("");
    let over_tcp = over_rdma.replace("nvme+rdma:", "nvme+tcp:").replace(":4420", ":4421");
    let serve = |bench: &mut Bench, section: &str| {
        let again = "end /run/h/pid; : > /run/h/log; start; wait_for 'd0: listening' /run/h/log";
        bench.run(&format!("configure '{section}'; {again}"), 30)
    };
    serve(bench, &over_rdma)?;
    bench.run(
        "offer_tcp; modules nvme-rdma
        echo transport=rdma,traddr=$ADDRESS,trsvcid=4420,nqn=$NQN > /dev/nvme-fabrics
        until [ -b /dev/nvme0n1 ]; do usleep 50000; done",
        30,
    )?;
    let measure = |bench: &mut Bench, how: &str, rw: &str, bs: &str, depth: u32| {
        let said = bench.run(&format!("{how} {rw} {bs} {depth}"), 20)?;
        said.parse::<f64>().map_err(|e| format!("{how}: {said:?}: {e}"))
    };
    let mut ours = Vec::new();
    for (_, rw, bs, depth) in SPEEDS {
        ours.push((measure(bench, "ours", rw, bs, depth)?, measure(bench, "kernel_s", rw, bs, depth)?));
    }
    let costs = costs(bench)?;
    bench.run("echo 1 > /sys/class/nvme/nvme0/delete_controller", 20)?;
    serve(bench, &over_tcp)?;
    let mut told = Vec::new();
    for ((name, rw, bs, depth), (ours, kernel)) in SPEEDS.into_iter().zip(ours) {
        let tcp = measure(bench, "ours", rw, bs, depth)?;
        told.push(format!("{name} {ours:.0}/s, {:.2} and {:.2}", ours / kernel, ours / tcp));
    }
    Ok(format!(
        "ours over RDMA to the kernel's nvme-rdma and to ours over TCP: {}; reads of scattered pages: {costs}",
        told.join("; "),
    ))
}

/// How often each way is measured, of which the best counts; for a number worth choosing by.
const ROUNDS: &str = "HAWSER_RDMA_ROUNDS";

/// What it costs to copy what is in several runs, and to have a command for each, by the number of runs.
fn costs(bench: &mut Bench) -> Result<String> {
    let rounds = std::env::var(ROUNDS).ok().and_then(|said| said.parse::<u32>().ok());
    let counts: &[u32] = if rounds.is_some() { &[2, 3, 4, 6, 8, 16] } else { &[2, 4, 8] };
    bench.run("ways", 30)?;
    // Microseconds and reads per second, of each way, by the number of runs.
    let mut best = vec![[(u32::MAX, 0u32); 2]; counts.len()];
    for _ in 0..rounds.unwrap_or(1) {
        for (best, runs) in best.iter_mut().zip(counts) {
            for (best, way) in best.iter_mut().zip(["copied", "split"]) {
                let said = bench.run(&format!("cost {way} {runs}"), 20)?;
                let numbers =
                    said.split_once(' ').map(|(cpu, rate)| (cpu.trim().parse(), rate.trim().parse()));
                let Some((Ok(cpu), Ok(rate))) = numbers else {
                    return Err(format!("cost {way} {runs}: {said:?}"));
                };
                *best = (best.0.min(cpu), best.1.max(rate));
            }
        }
    }
    bench.run("end /run/h/copied.pid; end /run/h/split.pid", 20)?;
    let told = best.iter().zip(counts).map(|([copied, split], runs)| {
        format!("{runs} runs copied {} us {}/s, split {} us {}/s", copied.0, copied.1, split.0, split.1)
    });
    Ok(told.collect::<Vec<_>>().join(", "))
}

/// What is measured: for people, fio's `rw`, size, depth.
const SPEEDS: [(&str, &str, &str, u32); 4] = [
    ("4k reads QD1", "randread", "4k", 1),
    ("4k reads QD32", "randread", "4k", 32),
    ("128k reads QD8", "read", "128k", 8),
    ("128k writes QD8", "write", "128k", 8),
];

/// How long the cable is unplugged.
const DOWN: Duration = Duration::from_secs(10);

/// Our initiator and the kernel's target in two guests, and the link between them goes down under load: at the target's end, where the
/// host sees nothing but silence, and at the host's own.
pub(super) fn link_down(lab: &Lab) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let (far, near) = (cable(1), cable(2));
    let far: Vec<&str> = far.iter().map(String::as_str).collect();
    let mut target = Qemu::from_kernel("target", &lab.image, scratch.path(), lab.accel, &[], &far)?;
    join(&mut target, 1)?;
    target.run_for(&format!("set -e; . /run/rdma.sh; kernel_target {SIZE_MIB}"), 20)?;
    let mut bench = Bench::start_in(lab, scratch, &near)?;
    join(&mut bench.guest, 2)?;
    bench.run(
        &format!("configure '{}'; start; wait_for 'd0: listening' /run/h/log", disk_at("10.0.3.1", "")),
        40,
    )?;
    let mut told = Vec::new();
    for end in ["target", "host"] {
        bench.run(
            "rm -f /run/h/status; : > /run/h/log
            (status=0; client --rw=randrw --bs=16k --iodepth=16 --time_based --runtime=16 > /run/h/client 2>&1 || status=$?
            echo $status > /run/h/status) > /dev/null 2>&1 &
            sleep 2",
            10,
        )?;
        let unplugged = if end == "target" { &mut target } else { &mut bench.guest };
        unplugged.monitor("set_link", r#"{"name":"nic1","up":false}"#)?;
        std::thread::sleep(DOWN);
        unplugged.monitor("set_link", r#"{"name":"nic1","up":true}"#)?;
        // It was lost, came back, and the load went on and read what it had written.
        let said = bench.run(
            "wait_for 'again connected' /run/h/log 90
            grep -q 'retrying in' /run/h/log
            sed -n 's/.*T\\([0-9:]*\\)\\.[0-9]*Z.*retrying in.*/lost \\1/p' /run/h/log | head -n 1
            sed -n 's/.*T\\([0-9:]*\\)\\.[0-9]*Z.*again connected.*/back \\1/p' /run/h/log | head -n 1
            until [ -f /run/h/status ]; do usleep 100000; done
            [ \"$(cat /run/h/status)\" = 0 ] || { cat /run/h/client /run/h/log; exit 1; }
            cat /run/h/client >&2",
            120,
        );
        let said = match said {
            Ok(said) => said,
            Err(error) => {
                let look = ". /run/rdma.sh; hawser device list; rdma link; rdma resource; ip neigh; ping -c 2 10.0.3.1; ping -c 2 10.0.3.2; dmesg | tail -n 25";
                let (here, there) = (bench.guest.run(look), target.run(look));
                return Err(format!("{error}\nhost: {here:?}\ntarget: {there:?}"));
            }
        };
        let times: Vec<&str> = said.split_whitespace().take(4).collect();
        told.push(format!("at the {end}'s end ({})", times.join(" ")));
    }
    bench.expect_no_complaint()?;
    let Bench { guest, .. } = bench;
    guest.quit()?;
    target.quit()?;
    Ok(Outcome::Passed(format!("{} s without a link {}", DOWN.as_secs(), told.join("; "))))
}

/// The kernel's initiator and our target; then our initiator and our target, in a pool whose members are reached by RDMA, TCP and a file.
pub(super) fn target_of_ours(lab: &Lab) -> Result<Outcome> {
    let mut bench = Bench::start(lab)?;
    bench.run(
        "rdma_modules; modules nvme-rdma; rdma_up; our_target 128
        host=hostnqn=nqn.2014-08.org.nvmexpress:uuid:5c3f0f3a-6a1e-4c58-9d0e-1f2b3c4d5e6f
        host=$host,hostid=5c3f0f3a-6a1e-4c58-9d0e-1f2b3c4d5e6f
        echo transport=rdma,traddr=$ADDRESS,trsvcid=4420,nqn=$NQN,$host,keep_alive_tmo=5,reconnect_delay=1 > /dev/nvme-fabrics
        until [ -b /dev/nvme0n1 ]; do usleep 50000; done
        mkfs.ext4 -q -F /dev/nvme0n1; mkdir -p /run/m; mount -t ext4 /dev/nvme0n1 /run/m",
        40,
    )?;
    // The target is killed under load, and comes back.
    let said = bench.run(
        "fio --name=load --directory=/run/m --ioengine=io_uring --iodepth=8 --rw=randwrite --bs=8k --size=16M \
            --verify=crc32c --verify_backlog=256 --verify_fatal=1 --serialize_overlap=1 --time_based --runtime=10 \
            > /run/h/fio 2>&1 &
        load=$!; sleep 3; kill -9 $(cat /run/h/target.pid); : > /run/h/target.log
        start target; wait_for 'is connected, controller' /run/h/target.log
        wait $load || { tail -n 30 /run/h/fio; exit 1; }
        dmesg | grep -q 'Successfully reconnected'
        umount /run/m; grep -o 'write: IOPS=[^,]*' /run/h/fio
        echo 1 > /sys/class/nvme/nvme0/delete_controller
        e2fsck=$(command -v e2fsck || true); [ -z \"$e2fsck\" ] || e2fsck -f -n /run/h/guest.raw",
        60,
    )?;
    // Members by RDMA, by TCP, and a file, in one mirror.
    bench.run(
        "truncate -s 128M /run/h/file.raw
        configure '[[device]]
            name = \"d0\"
            uri = \"nvme+rdma://10.0.2.15:4420/nqn.2026-11.io.hawser:rdma?nsid=1\"
            [[device]]
            name = \"d1\"
            uri = \"nvme+tcp://127.0.0.1:4421/nqn.2026-11.io.hawser:tcp?nsid=1\"
            [[device]]
            name = \"d2\"
            uri = \"file:///run/h/file.raw\"'
        /run/p/hawser pool create p0 --config /run/h/hawser.toml --raid raid1 d0 d1 d2
        /run/p/hawser volume create p0/v --config /run/h/hawser.toml --size 32MiB
        echo '[[disk]]
        name = \"d0\"
        volume = \"p0/v\"
        socket = \"/run/h/d0.sock\"' >> /run/h/hawser.toml
        start; wait_for 'd0: listening' /run/h/log
        client --rw=randrw --bs=16k --iodepth=16 --time_based --runtime=3
        end /run/h/pid; end /run/h/target.pid",
        60,
    )?;
    bench.expect_no_complaint()?;
    let Bench { guest, .. } = bench;
    guest.quit()?;
    Ok(Outcome::Passed(format!(
        "mkfs, {said} verified, target killed and back; a mirror over RDMA, TCP and a file"
    )))
}
