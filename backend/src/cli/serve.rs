//! `hawser serve`

use crate::cli::Failure;
use crate::daemon::{self, StartError};
use crate::sys;
use clap::Args;
use hawser_config::Config;
use hawser_config::value::SocketPath;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;

#[derive(Args)]
pub(super) struct ServeArgs {
    /// The configuration file; conf.d/*.toml beside it is read too
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The API socket, instead of the file's [daemon] api
    #[arg(long, value_name = "SOCK", env = "HAWSER_API")]
    api: Option<String>,
    /// Write "ready" to this descriptor and close it once everything that can be reached is served
    #[arg(long, value_name = "N")]
    ready_fd: Option<RawFd>,
}

pub(super) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let ready_fd = args
        .ready_fd
        .map(|fd| sys::inherited(fd).map_err(|what| Failure::Usage(format!("--ready-fd: {what}"))))
        .transpose()?;
    let mut config = Config::load(&args.config)?;
    if let Some(api) = &args.api {
        let api: SocketPath = api.parse().map_err(|what| Failure::Usage(format!("--api: {what}")))?;
        config.set_api(api)?;
    }
    let served = daemon::serve(config, |api| {
        log::info!("serving: api {api}");
        if let Some(mut ready) = ready_fd {
            // Whoever gave us the descriptor may have gone: then nobody waits.
            let _ = ready.write_all(b"ready\n");
        }
    });
    served.map_err(|error| match error {
        StartError::Config(error) => Failure::Usage(error.to_string()),
        StartError::Failed(line) => Failure::Failed(line),
    })
}
