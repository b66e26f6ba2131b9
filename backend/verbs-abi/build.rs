//! Computes which build this is: a number over all that a driver and its daemon must have in common.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Where what they have in common is, from this crate's folder.
const SOURCES: [&str; 3] = ["src", "../verbs/src", "../fabric/src/rdma"];

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn main() {
    let mut hasher = DefaultHasher::new();
    for folder in SOURCES {
        println!("cargo::rerun-if-changed={folder}");
        let mut found = Vec::new();
        files(Path::new(folder), &mut found);
        found.sort();
        for path in found {
            (path.to_string_lossy(), fs::read(&path).unwrap_or_default()).hash(&mut hasher);
        }
    }
    for name in ["CARGO_PKG_VERSION", "TARGET", "PROFILE", "RUSTC"] {
        env::var(name).unwrap_or_default().hash(&mut hasher);
    }
    println!("cargo::rustc-env=HAWSER_VERBS_BUILD={:016x}", hasher.finish());
}
