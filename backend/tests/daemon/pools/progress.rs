//! What long work shows: a bar with an estimate on a terminal, a plain line every tenth elsewhere. What a command prints is the same.

use super::{Rig, json};
use std::fs;
use std::process::Output;

/// A pool whose scrub takes a while, and an image of 32 MiB that has no zeroes.
fn rig() -> Rig {
    let rig = Rig::new(2, 256, "[[pool]]\nname = \"p0\"\nsync_rate = \"64MiB\"\n");
    rig.offline("pool create p0 --raid raid1 d0 d1");
    fs::write(rig.place.path("raw"), vec![7; 32 << 20]).unwrap();
    rig
}

/// Runs a command with its errors on a terminal; what it printed, and what was shown there.
fn at_terminal(rig: &Rig, line: &str, more: &[&str]) -> (String, String) {
    let (output, shown) = rig.place.run_at_terminal(&[&line.split(' ').collect::<Vec<_>>(), more].concat());
    assert!(output.status.success(), "{line}: {shown}");
    (String::from_utf8(output.stdout).unwrap(), shown)
}

/// The same with its errors in a pipe.
fn in_pipe(rig: &Rig, line: &str, more: &[&str]) -> (String, String) {
    let args = [&line.split(' ').collect::<Vec<_>>(), more].concat();
    let Output { status, stdout, stderr } = rig.place.run(&args);
    let (printed, told) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{line}: {told}");
    (printed, told)
}

/// A bar says what is done, how far it is, how fast, and how long it takes yet.
fn is_bar_of(shown: &str, part: &str) -> bool {
    // Drawn anew in its place.
    let drawn = shown.split(['\r', '\n']).filter(|line| line.contains(part));
    drawn.into_iter().any(|line| [" of ", "/s, ", " left"].iter().all(|what| line.contains(what)))
}

/// Lines of log, or as of every tenth: no control characters, no estimate.
fn are_plain(told: &str, parts: &[&str]) -> bool {
    let mut lines = told.lines().filter(|line| !line.starts_with("[20"));
    let is_tenth = |line: &str| parts.iter().any(|part| line.starts_with(part)) && line.contains("0 % of ");
    !told.contains(['\r', '\x1b']) && lines.all(is_tenth)
}

#[test]
fn long_work_shows_a_bar_with_an_estimate_on_a_terminal_and_lines_in_a_pipe() {
    let rig = rig();
    let config = ["--config", &rig.config];
    let (raw, out) = (rig.place.text("raw"), rig.place.text("out"));
    let import = format!("image import {raw} p0/v --verify");
    let parts = ["writing", "verifying"];
    let (printed, shown) = at_terminal(&rig, &import, &config);
    assert_eq!(printed, format!("{raw} imported to p0/v: 32 MiB, verified\n"));
    assert!(parts.iter().all(|part| is_bar_of(&shown, part)), "{shown:?}");
    let (same, told) = in_pipe(&rig, &import, &config);
    assert_eq!(same, printed);
    assert!(are_plain(&told, &parts) && told.contains("verifying 100 % of 32 MiB\n"), "{told:?}");

    for (more, want) in
        [(vec![], format!("p0/v exported to {out}: 32 MiB\n")), (vec!["--json"], "33554432".to_owned())]
    {
        let more = [&config[..], &more].concat();
        let export = format!("volume export p0/v {out}");
        let (printed, shown) = at_terminal(&rig, &export, &more);
        assert!(printed.contains(&want) && is_bar_of(&shown, "reading"), "{printed} {shown:?}");
        fs::remove_file(&out).unwrap();
        let (same, told) = in_pipe(&rig, &export, &more);
        assert_eq!(same, printed);
        assert!(are_plain(&told, &["reading"]) && told.contains("reading 100 % of 32 MiB\n"), "{told:?}");
        fs::remove_file(&out).unwrap();
    }

    let (printed, shown) = at_terminal(&rig, "pool scrub p0", &config);
    assert!(printed.starts_with("pool p0 scrubbed, members do not differ"), "{printed}");
    assert!(is_bar_of(&shown, "scrub"), "{shown:?}");
    // It was a full bar until the scrub knew how much there is.
    assert!(!shown.contains("0 B of 0 B"), "{shown:?}");
    let (same, told) = in_pipe(&rig, "pool scrub p0", &config);
    assert_eq!(same, printed);
    assert!(are_plain(&told, &["scrub"]), "{told:?}");
    // All of what is printed is JSON.
    let (printed, shown) = at_terminal(&rig, "pool scrub p0 --json", &config);
    assert!(json(&printed)["name"] == "p0" && is_bar_of(&shown, "scrub"), "{printed} {shown:?}");
}

/// A daemon does the work whoever looks: at a terminal it is shown to its end, in a script the command returns at once.
#[test]
fn the_work_of_a_daemon_is_shown_on_a_terminal_and_not_waited_for_in_a_script() {
    let rig = rig();
    rig.offline(&format!("image import {} p0/v", rig.place.text("raw")));
    let daemon = rig.place.serve();
    crate::common::until("the pool is there", || super::pool_state(&daemon, "p0") == "ready");
    let (printed, shown) = at_terminal(&rig, "pool scrub p0", &[]);
    assert!(printed.starts_with("pool p0 scrubbed, members do not differ"), "{printed}");
    assert!(is_bar_of(&shown, "scrub"), "{shown:?}");
    let (printed, told) = in_pipe(&rig, "pool scrub p0 --json --wait", &[]);
    assert_eq!(json(&printed)["name"], "p0");
    assert!(are_plain(&told, &["scrub"]), "{told:?}");
    let (printed, told) = in_pipe(&rig, "pool scrub p0", &[]);
    assert!(printed.starts_with("pool p0 is being scrubbed"), "{printed}");
    assert!(are_plain(&told, &[]), "{told:?}");
    assert_eq!(daemon.end(), Some(0));
}
