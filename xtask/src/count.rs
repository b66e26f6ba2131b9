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
    // One binary after the other, whatever fails: the count is of all of them.
    let status = run_and_look(command.args(["test", "--workspace", "--no-fail-fast"]), |line| {
        if let Some(result) = parse_result(line) {
            counts += result;
        }
    })?;
    if !status.success() && counts.failed == 0 {
        println!("cargo test ... FAILED (it did not build, or a test ended its process)");
        counts.failed += 1;
    }
    progress("guest tests");
    match Lab::open().and_then(|lab| suite::run(&lab, "")) {
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
    let counts = suite::run(&Lab::open()?, filter)?;
    println!("{counts}");
    Ok(counts.failed == 0)
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

    #[test]
    fn cargo_result_line_is_counted_and_others_are_not() {
        let line = "test result: FAILED. 9 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(parse_result(line), Some(Counts { passed: 9, failed: 2, skipped: 1 }));
        assert_eq!(parse_result("test some::test ... ok"), None);
    }
}
