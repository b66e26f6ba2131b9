//! `cargo xtask test` and `cargo xtask guest`: runs and counts.

use guest_tests::lab::{Lab, cargo};
use guest_tests::process::run_and_look;
use guest_tests::suite::{self, Counts};
use guest_tests::{Result, progress};

/// Every test of the workspace and the guest tests; the last line counts them. `false` if one failed.
pub(crate) fn all() -> Result<bool> {
    progress("tests of the workspace");
    let mut counts = Counts::default();
    let mut command = cargo();
    // Tests add a line for each thing that they could not do here.
    let skips = std::env::temp_dir().join(format!("hawser-skips-{}", std::process::id()));
    command.env(skips::FILE, &skips);
    // One binary after the other, whatever fails: the count is of all of them.
    let status = run_and_look(command.args(["test", "--workspace", "--no-fail-fast"]), |line| {
        if let Some(result) = parse_result(line) {
            counts += result;
        }
    })?;
    let skipped = std::fs::read_to_string(&skips).unwrap_or_default();
    // Nobody wrote it if nothing was skipped.
    let _ = std::fs::remove_file(&skips);
    for line in skipped.lines() {
        println!("test {line}");
    }
    counts = move_skipped(counts, &skipped);
    if !status.success() && counts.failed == 0 {
        println!("cargo test ... FAILED (it did not build, or a test ended its process)");
        counts.failed += 1;
    }
    progress("guest tests");
    match Lab::open().and_then(|mut lab| suite::run(&mut lab, "")) {
        Ok(guests) => counts += guests,
        Err(error) => {
            println!("guest tests ... FAILED\n    {error}");
            counts.failed += 1;
        }
    }
    println!("{counts}");
    Ok(counts.failed == 0)
}

/// The guest tests whose names contain `filter`.
pub(crate) fn guests(filter: &str) -> Result<bool> {
    let counts = suite::run(&mut Lab::open()?, filter)?;
    println!("{counts}");
    Ok(counts.failed == 0)
}

/// Who returned early has passed, for cargo: moves each such test once.
fn move_skipped(mut counts: Counts, lines: &str) -> Counts {
    let tests: std::collections::BTreeSet<&str> =
        lines.lines().filter_map(|line| Some(line.split_once(" ... skipped (")?.0)).collect();
    let skipped = u64::try_from(tests.len()).unwrap_or(u64::MAX).min(counts.passed);
    counts.passed -= skipped;
    counts.skipped += skipped;
    counts
}

/// `test result: ok. 9 passed; 0 failed; 1 ignored; 0 measured; …`
fn parse_result(line: &str) -> Option<Counts> {
    let (_, numbers) = line.trim().strip_prefix("test result: ")?.split_once(". ")?;
    let mut counts = Counts::default();
    for part in numbers.split("; ") {
        let (number, word) = part.split_once(' ')?;
        let field = match word {
            "passed" => &mut counts.passed,
            "failed" => &mut counts.failed,
            "ignored" => &mut counts.skipped,
            _ => continue,
        };
        *field = number.parse().ok()?;
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests that returned early, where they lacked something, were counted as passed, and what they printed was swallowed.
    #[test]
    fn a_test_that_says_so_is_skipped_and_not_passed() {
        let counts = Counts { passed: 9, failed: 1, skipped: 1 };
        let lines =
            "a::b ... skipped (b.rs:1: no x)\na::b ... skipped (b.rs:2: no y)\nc ... skipped (c.rs:3: z)\n";
        assert_eq!(move_skipped(counts, lines), Counts { passed: 7, failed: 1, skipped: 3 });
        assert_eq!(move_skipped(counts, ""), counts);
    }

    #[test]
    fn cargo_result_line_is_counted_and_others_are_not() {
        let line = "test result: FAILED. 9 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(parse_result(line), Some(Counts { passed: 9, failed: 2, skipped: 1 }));
        assert_eq!(parse_result("test some::test ... ok"), None);
    }
}
