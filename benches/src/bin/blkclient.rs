//! `blkclient`: a load on a vhost-user-blk socket, with fio's option names. See `hawser_benches::client`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use hawser_benches::client::{self, options::Options};

fn main() -> ExitCode {
    let options = Options::parse();
    match client::run(&options) {
        Ok(report) => {
            if options.json {
                let text = serde_json::to_string(&report).expect("numbers and strings only");
                println!("{text}");
            } else {
                print!("{report}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("blkclient: {error}");
            ExitCode::FAILURE
        }
    }
}
