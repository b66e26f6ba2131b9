//! The clients against a back end written by others: qemu-storage-daemon. Skipped, with the reason, where there is none.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hawser_benches::client::options::{Options, Verify};
use hawser_benches::client::{self};
use hawser_benches::frontend::{Config, F_EVENT_IDX, Op, STATUS_OK, STATUS_UNSUPP, Session, segment};
use hawser_benches::sys::{Child, TempDir, find_program, spawn_group};

const DISK_BYTES: u64 = 8 << 20;

struct Peer {
    server: Child,
    socket: PathBuf,
    image: PathBuf,
    _folder: TempDir,
}

#[track_caller]
fn start() -> Option<Peer> {
    let Some(program) = find_program("qemu-storage-daemon") else {
        skips::skip("no qemu-storage-daemon on PATH (Debian: qemu-system-common)");
        return None;
    };
    let folder = TempDir::new(None).expect("a temporary folder");
    let image = folder.path().join("disk");
    std::fs::File::create(&image).and_then(|f| f.set_len(DISK_BYTES)).expect("an image");
    let socket = folder.path().join("s");
    let mut command = Command::new(program);
    command.arg("--blockdev").arg(format!("file,node-name=d,filename={}", image.display()));
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},writable=on,num-queues=2",
        socket.display()
    ));
    let mut server = spawn_group(command, None).expect("qemu-storage-daemon starts");
    server.wait_for_socket(&socket, Duration::from_secs(30)).expect("it listens");
    Some(Peer { server, socket, image, _folder: folder })
}

fn config(socket: &Path) -> Config {
    Config { inflight: false, limit: Duration::from_secs(60), ..Config::new(socket) }
}

fn options(socket: &Path, line: &str) -> Options {
    let path = format!("--path={}", socket.display());
    let words = ["blkclient", path.as_str(), "--stall_timeout=60"].into_iter();
    <Options as clap::Parser>::try_parse_from(words.chain(line.split_ascii_whitespace()))
        .expect("known options")
}

#[test]
fn the_front_end_reads_back_what_it_wrote() {
    let Some(peer) = start() else { return };
    for features in [u64::MAX, !F_EVENT_IDX] {
        let mut session =
            Session::connect(Config { features, queues: 2, ..config(&peer.socket) }).expect("a session");
        assert_eq!(session.device().sectors, DISK_BYTES / 512);
        for queue in 0..2 {
            let mut data = vec![0x5a_u8 ^ u8::try_from(queue).expect("0 or 1"); 64 << 10];
            let sector = 128 * u64::from(queue);
            let done = session.request(queue, Op::Write, sector, &mut data).expect("an answer");
            assert_eq!(done.status, STATUS_OK);
            let mut back = vec![0; data.len()];
            let done = session.request(queue, Op::Read, sector, &mut back).expect("an answer");
            assert_eq!((done.status, back == data), (STATUS_OK, true));
        }
        assert_eq!(session.request(0, Op::Flush, 0, &mut []).expect("an answer").status, STATUS_OK);
        let done = session.request(0, Op::WriteZeroes, 0, &mut segment(0, 8, true)).expect("an answer");
        assert_eq!(done.status, STATUS_OK);
        let mut back = vec![1; 8192];
        session.request(0, Op::Read, 0, &mut back).expect("an answer");
        assert!(back[..4096].iter().all(|&b| b == 0) && back[4096..].iter().all(|&b| b == 0x5a));
        let done = session.request(0, Op::Other(99), 0, &mut [0; 512]).expect("an answer");
        assert_eq!(done.status, STATUS_UNSUPP);
        assert_eq!(session.stop().expect("bases").len(), 2);
    }
}

#[test]
fn the_front_end_restarts_its_rings_and_connects_again() {
    let Some(peer) = start() else { return };
    let mut session = Session::connect(config(&peer.socket)).expect("a session");
    for (round, size) in [128_u16, 4, 1024, 8, 256].into_iter().enumerate() {
        session.restart_queues(size).expect("new rings");
        // More requests than the ring has entries, so that the indices go round.
        for i in 0..20_u64 {
            let mut data = vec![u8::try_from(i).expect("small"); 4096];
            let write = session.request(0, Op::Write, i * 8, &mut data).expect("an answer");
            assert_eq!(write.status, STATUS_OK, "round {round}, size {size}");
        }
        session.reconnect().expect("a new connection");
        let mut back = vec![0xee; 4096];
        let read = session.request(0, Op::Read, 5 * 8, &mut back).expect("an answer");
        assert_eq!((read.status, back[0], back[4095]), (STATUS_OK, 5, 5));
    }
}

#[test]
fn a_server_that_goes_away_or_stops_is_an_error() {
    let Some(mut peer) = start() else { return };
    let mut session = Session::connect(config(&peer.socket)).expect("a session");
    assert!(peer.server.terminate(Duration::from_secs(60)));
    let error = session.request(0, Op::Read, 0, &mut [0; 512]).expect_err("nobody answers");
    assert!(error.to_string().contains("closed the connection"), "{error}");

    // A listener that never answers: accepted by the kernel, and then silence.
    let folder = TempDir::new(None).expect("a temporary folder");
    let silent = folder.path().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).expect("a listener");
    let limit = Duration::from_millis(50);
    let error = Session::connect(Config { limit, ..config(&silent) }).err().expect("nobody answers");
    assert!(error.to_string().contains("no answer within"), "{error}");
    let mut options = options(&silent, "--rw=read");
    options.stall_timeout = limit;
    let error = client::run(&options).expect_err("nobody answers");
    assert!(error.contains("not answered the handshake"), "{error}");
}

#[test]
fn the_client_verifies_what_it_wrote() {
    let Some(peer) = start() else { return };
    let blocks = DISK_BYTES / 4096;
    for mode in ["eventfd", "block", "loop"] {
        for rw in ["write", "randwrite"] {
            let line = format!("--rw={rw} --bs=4k --iodepth=32 --verify=crc32c --wait_mode={mode}");
            let report = client::run(&options(&peer.socket, &line)).expect("a report");
            assert_eq!(report.verified, blocks, "{mode} {rw}");
            assert!(report.write_ns.p50 > 0 && report.write_ns.p50 <= report.write_ns.p999);
        }
    }
    let line = "--rw=randrw --bs=4k --iodepth=16 --verify=crc32c --numjobs=2 --num_queues=2";
    let report = client::run(&options(&peer.socket, line)).expect("a report");
    assert!(report.verified > 0 && report.read_ns.count > 0);

    let line = "--rw=write --bs=4k --iodepth=4 --verify=crc32c --do_verify=0 --iodepth_batch_complete_max=1";
    let report = client::run(&options(&peer.socket, line)).expect("a report");
    assert_eq!((report.verified, report.batch_mean.round()), (0, 1.0));
    let mut check = options(&peer.socket, "--rw=randread --bs=4k --iodepth=8 --verify=crc32c");
    assert_eq!(client::run(&check).expect("a report").verified, blocks);

    // One changed byte behind the server's back.
    let mut bytes = std::fs::read(&peer.image).expect("the image");
    bytes[70_000] ^= 1;
    std::fs::write(&peer.image, &bytes).expect("the image");
    let error = client::run(&check).expect_err("a wrong block");
    assert!(error.contains("block 17: the CRC"), "{error}");
    check.verify = Verify::None;
    client::run(&check).expect("nothing is checked");
}

#[test]
fn the_client_refuses_what_does_not_fit() {
    let Some(peer) = start() else { return };
    for (line, named) in [
        ("--bs=100", "--bs=100"),
        ("--size=1t", "--size"),
        ("--offset=1g", "--size"),
        ("--numjobs=3", "num_queues"),
        ("--time_based", "--runtime"),
        ("--queue_size=100", "--queue_size"),
        ("--rw=write --bs=512 --verify=crc32c --size=512 --server_pid=4194305", "--server_pid"),
    ] {
        let error = client::run(&options(&peer.socket, line)).expect_err(line);
        assert!(error.contains(named), "{line}: {error}");
    }
}
