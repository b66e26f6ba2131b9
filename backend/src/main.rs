//! The binary `hawser`: logging, and what happens when we are wrong; the rest is the library's.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    // A command says what it has done itself.
    let serves = std::env::args().nth(1).is_some_and(|command| command == "serve");
    let filter = env_logger::Env::default().default_filter_or(if serves { "info" } else { "warn" });
    env_logger::Builder::from_env(filter).format_timestamp_millis().init();
    // A panic is our bug: it is logged, then the process aborts, and the in-flight log makes the restart safe.
    std::panic::set_hook(Box::new(|info| {
        let backtrace = std::backtrace::Backtrace::force_capture();
        log::error!("{info}, on thread {:?}\n{backtrace}", std::thread::current().name().unwrap_or("?"));
    }));
    hawser::cli::run()
}
