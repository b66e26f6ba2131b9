//! SIGTERM and SIGINT, on a thread of their own.
//!
//! The first asks the daemon to drain and end; the second ends it at once. (SIGPIPE is ignored by Rust's own start-up.)

use super::News;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io;
use std::sync::mpsc::Sender;

/// From now on signals are news.
pub(super) fn watch(news: Sender<News>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut stopping = false;
        for signal in signals.forever() {
            let name = if signal == SIGTERM { "SIGTERM" } else { "SIGINT" };
            if stopping {
                log::warn!("{name} again: ending at once");
                std::process::exit(1);
            }
            stopping = true;
            // Without a receiver the daemon is ending already.
            let _ = news.send(News::Stop(name));
        }
    })?;
    Ok(())
}
