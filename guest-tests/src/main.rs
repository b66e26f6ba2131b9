//! `guest-tests list`, `guest-tests [FILTER]`: runs the guest tests and counts them.

#![forbid(unsafe_code)]

use guest_tests::{lab::Lab, process, suite};
use std::process::ExitCode;

fn main() -> ExitCode {
    process::catch_interrupts();
    let filter = std::env::args().nth(1).unwrap_or_default();
    if filter == "list" {
        for test in suite::TESTS {
            println!("{}", test.name);
        }
        return ExitCode::SUCCESS;
    }
    match Lab::open().and_then(|mut lab| suite::run(&mut lab, &filter)) {
        Ok(counts) => {
            println!("{counts}");
            if counts.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("guest-tests: {error}");
            ExitCode::FAILURE
        }
    }
}
