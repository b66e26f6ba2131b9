//! The binary `hawser` from outside: real processes in folders of their own, one test program for all of it.

mod api;
mod cli;
mod common;
mod fabric;
mod import;
mod load;
mod permissions;
mod sandbox;
mod serve;
