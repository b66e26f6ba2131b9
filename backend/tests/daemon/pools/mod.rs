//! Pools from outside: made and looked at without a daemon, served by one, killed with it, and refused where they must be.

mod answers;
mod commands;
mod progress;
mod serving;

use crate::common::{Place, Serving};
use crate::frontend::{Guest, T_IN, T_OUT, Wish};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;

/// A folder with `count` files `d0`… of `mib` MiB as devices.
struct Rig {
    place: Place,
    config: String,
    count: usize,
}

impl Rig {
    fn new(count: usize, mib: u64, rest: &str) -> Rig {
        let place = Place::new();
        for index in 0..count {
            let file = fs::File::create(place.path(&format!("d{index}"))).unwrap();
            file.set_len(mib * MIB).unwrap();
        }
        let mut rig = Rig { place, config: String::new(), count };
        rig.configure(rest);
        rig
    }

    /// Writes the configuration anew: the devices, and `rest`.
    fn configure(&mut self, rest: &str) {
        let device = |index| format!("[[device]]\nname = \"d{index}\"\nuri = \"file://@/d{index}\"\n");
        let devices: String = (0..self.count).map(device).collect();
        self.config = self.place.configure(&format!("{devices}{rest}")).display().to_string();
    }

    /// Runs a command without a daemon; what it printed.
    fn offline(&self, line: &str) -> String {
        let args = [line.split(' ').collect(), vec!["--config", &self.config]].concat();
        self.place.ok(&args)
    }

    /// One that must fail.
    fn refused(&self, line: &str, code: i32) -> String {
        let args = [line.split(' ').collect(), vec!["--config", &self.config]].concat();
        self.place.fails(&args, code)
    }

    /// Runs a command of the daemon's; what it printed.
    fn online(&self, line: &str) -> String {
        self.place.ok(&line.split(' ').collect::<Vec<_>>())
    }

    fn online_refused(&self, line: &str, code: i32) -> String {
        self.place.fails(&line.split(' ').collect::<Vec<_>>(), code)
    }

    fn socket(&self, disk: &str) -> PathBuf {
        self.place.path(&format!("{disk}.sock"))
    }

    fn tails(&self) -> Vec<String> {
        let names = fs::read_dir(self.place.path("api.state")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("pool-") && name.ends_with(".tail")).collect()
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn disk(name: &str, volume: &str, more: &str) -> String {
    format!("[[disk]]\nname = \"{name}\"\nvolume = \"{volume}\"\nsocket = \"@/{name}.sock\"\n{more}\n")
}

fn wish() -> Wish {
    Wish { inflight: true, ..Wish::default() }
}

/// 4 KiB at a byte offset.
fn write(guest: &mut Guest, at: u64, fill: u8) {
    assert_eq!(guest.request(T_OUT, at / 512, &[fill; 4096], 0).0, 0, "write at {at}");
}

fn read(guest: &mut Guest, at: u64) -> Vec<u8> {
    let (status, data) = guest.request(T_IN, at / 512, &[], 4096);
    assert_eq!(status, 0, "read at {at}");
    data
}

fn holds(guest: &mut Guest, at: u64, fill: u8) {
    let data = read(guest, at);
    assert!(data.iter().all(|byte| *byte == fill), "at {at}: {:?} instead of {fill}", &data[..16]);
}

fn pool_state(daemon: &Serving, name: &str) -> String {
    let pools = daemon.status()["pools"].clone();
    let pool = pools.as_array().unwrap().iter().find(|pool| pool["name"] == name);
    pool.map_or("none".to_owned(), |pool| pool["state"].as_str().unwrap().to_owned())
}

fn slow(daemon: &Serving, volume: &str, class: &str) -> u64 {
    let volumes = daemon.status()["volumes"].clone();
    let volume = volumes.as_array().unwrap().iter().find(|it| it["name"] == volume).unwrap();
    volume["slow"][class].as_u64().unwrap_or_else(|| panic!("{volume}"))
}
