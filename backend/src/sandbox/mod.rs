//! What the daemon takes away from itself before it talks to anybody: files that it has no business with (Landlock), system
//! calls that it never makes (seccomp), and new privileges.
//!
//! Owns: `[daemon] sandbox` and `allow_paths`. Must not know: what layers do with files and calls.
//!
//! Both hold for the thread that asks and for the threads that it starts, so [`enter`] is called while there is one.
//! A path of the configuration that the sandbox would refuse is refused by name before anything is made: who reads "permission
//! denied" much later would not know why.

mod paths;
mod seccomp;
mod user;

pub(crate) use paths::{AllowedPaths, resolved, uses_state};
pub(crate) use user::become_configured;

use hawser_config::Config;

/// Gives up what is not needed from here on; the paths in which files may still be opened.
///
/// # Errors
/// When the kernel has what is asked for and refuses it: one line. A kernel that does not have it is only logged.
pub(crate) fn enter(config: &Config, allowed: &AllowedPaths) -> Result<(), String> {
    if !config.daemon.sandbox {
        log::warn!(
            "sandbox = false: this process may open every file and make every system call that its user may"
        );
        return Ok(());
    }
    paths::restrict(allowed)?;
    seccomp::restrict()
}
