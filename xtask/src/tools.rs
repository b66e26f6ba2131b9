//! Tools of CI that come from crates.io.

use guest_tests::lab::cargo;
use guest_tests::process::{output, run};
use guest_tests::{Result, progress};

/// Installs cargo-deny and cargo-fuzz into cargo's home where they are missing.
pub(crate) fn install() -> Result<()> {
    for tool in ["deny", "fuzz"] {
        if output(cargo().args([tool, "--version"])).is_err() {
            let package = format!("cargo-{tool}");
            progress(&format!("cargo install {package}"));
            // The repository's settings and target folder are not the tool's.
            run(cargo().current_dir("/").args(["install", "--quiet", "--locked", &package]))?;
        }
    }
    Ok(())
}
