//! The binary `hawser` from outside: real processes in folders of their own, one test program for all of it.

mod api;
mod cli;
mod common;
mod fabric;
#[allow(dead_code, unreachable_pub, reason = "virtio's tests use all of it")]
#[path = "../../virtio/tests/support/frontend.rs"]
mod frontend;
mod ghosts;
mod import;
mod load;
mod permissions;
mod pools;
mod pools_two_daemons;
mod restart;
mod sandbox;
mod serve;
mod two_hosts;
mod user;
