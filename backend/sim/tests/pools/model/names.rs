//! Which volumes there are: changes of them, what a crash may undo, and the instants of snapshots.

use super::blocks::{Block, Few};
use super::{Capture, Models, Volume};
use std::collections::BTreeMap;

/// A change of which volumes there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Create(String, u64),
    /// Origins and names.
    Snapshot(Vec<(String, String)>),
    /// Snapshot and name.
    Clone(String, String),
    Delete(String),
    Resize(String, u64),
}

/// Volumes by name: size in blocks, and whether it is a snapshot.
pub(crate) type Names = BTreeMap<String, (u64, bool)>;

pub(super) fn apply(names: &mut Names, op: &Op) {
    match op {
        Op::Create(name, size) => _ = names.insert(name.clone(), (*size, false)),
        Op::Snapshot(items) => {
            for (origin, name) in items {
                let size = names.get(origin).map_or(0, |volume| volume.0);
                names.insert(name.clone(), (size, true));
            }
        }
        Op::Clone(snapshot, name) => {
            let size = names.get(snapshot).map_or(0, |volume| volume.0);
            names.insert(name.clone(), (size, false));
        }
        Op::Delete(name) => _ = names.remove(name),
        Op::Resize(name, size) => {
            if let Some(volume) = names.get_mut(name) {
                volume.0 = *size;
            }
        }
    }
}

impl Models {
    /// Volumes are being changed.
    pub(crate) fn op_begins(&mut self, op: Op) {
        assert!(!self.is_pending, "one at a time");
        match &op {
            Op::Create(name, size) => {
                self.volumes.insert(name.clone(), Volume { size_blocks: *size, ..Volume::default() });
            }
            Op::Snapshot(items) => {
                for (origin, name) in items {
                    let volume = self.volume(origin);
                    let (mut blocks, mut touched) = (volume.blocks.clone(), BTreeMap::new());
                    blocks.change_busy(|at, block| {
                        let block = block.busy();
                        block.possible = block.seen();
                        let under_way: Vec<_> =
                            block.writes.drain(..).map(|write| (write.seq, write.id)).collect();
                        if !under_way.is_empty() {
                            touched.insert(at, under_way);
                        }
                    });
                    let size_blocks = volume.size_blocks;
                    volume.captures.push(Capture { name: name.clone(), touched, has_no_instant: false });
                    let written = volume.written.clone();
                    let snapshot =
                        Volume { blocks, size_blocks, is_snapshot: true, written, ..Volume::default() };
                    self.volumes.insert(name.clone(), snapshot);
                }
            }
            Op::Clone(snapshot, name) => {
                let from = self.volume(snapshot);
                let blocks = from.blocks.clone();
                let (size_blocks, written) = (from.size_blocks, from.written.clone());
                let clone = Volume { blocks, size_blocks, written, ..Volume::default() };
                self.volumes.insert(name.clone(), clone);
            }
            Op::Delete(_) => {}
            Op::Resize(name, size) => {
                let volume = self.volume(name);
                // Guests use what is there in any case.
                volume.size_blocks = volume.size_blocks.min(*size);
            }
        }
        self.ops.push(op);
        self.is_pending = true;
    }

    /// Whether the change that goes on may be refused: what is to become smaller may hold something.
    pub(crate) fn may_be_refused(&self) -> bool {
        let Some(Op::Resize(name, size)) = self.ops.last().filter(|_| self.is_pending) else { return false };
        self.names().get(name).is_some_and(|volume| *size < volume.0)
    }

    /// The change was made, or it was refused.
    pub(crate) fn op_ends(&mut self, ok: bool) -> Result<(), String> {
        self.is_pending = false;
        let group = self.tick();
        let op = self.ops.last().cloned().expect("it has begun");
        if let Op::Snapshot(items) = &op {
            for (origin, name) in items {
                let captures = std::mem::take(&mut self.volume(origin).captures);
                let touched = captures.into_iter().find(|capture| capture.name == *name);
                let snapshot = self.volume(name);
                let whole = touched.filter(|capture| !capture.has_no_instant);
                snapshot.made = whole.map(|capture| (group, capture.touched));
            }
        }
        if !ok {
            self.ops.pop();
            if let Op::Resize(name, _) = &op {
                self.volume(name).size_blocks = self.names().get(name).map_or(0, |volume| volume.0);
            }
            self.forget();
            return Ok(());
        }
        self.take_sizes()?;
        if self.changes_are_durable {
            self.settle(self.done());
        }
        Ok(())
    }

    /// Models have the sizes of their volumes; what is beyond is gone, which only zeroes may be.
    fn take_sizes(&mut self) -> Result<(), String> {
        for (name, (size, _)) in self.names() {
            let volume = self.volume(&name);
            volume.size_blocks = size;
            for (at, block) in volume.blocks.split_off(size) {
                let possible = block.possible();
                if !possible.contains(0) {
                    return Err(format!("{name} was made smaller, and block {at} held {possible:#x?}"));
                }
            }
        }
        Ok(())
    }

    /// The pool was opened again, and these are its volumes. After a loss of power, what was not made durable may be undone, the
    /// last first.
    pub(crate) fn recovered(&mut self, actual: &Names, cut: bool) -> Result<(), String> {
        self.opened_at = self.tick();
        let all = self.ops.len();
        let acknowledged = all - usize::from(self.is_pending);
        let least = if cut && !self.changes_are_durable { 0 } else { acknowledged };
        let mut names = self.base.clone();
        self.ops[..least].iter().for_each(|op| apply(&mut names, op));
        let mut found = (names == *actual).then_some(least);
        for count in least..all {
            apply(&mut names, &self.ops[count]);
            if names == *actual {
                found = Some(count + 1);
            }
        }
        let Some(count) = found else {
            let ops = &self.ops;
            return Err(format!(
                "the volumes are {actual:?} after a restart (cut: {cut}): not {:?} with at least {least} of {ops:?}",
                self.base
            ));
        };
        self.ops.truncate(count);
        self.is_pending = false;
        if cut || self.changes_are_durable {
            self.settle(self.done());
        }
        self.forget();
        self.take_sizes()
    }

    /// Snapshots that were read whole since they were made: all of a group have one instant.
    pub(crate) fn check_instants(&mut self) -> Result<(), String> {
        let mut groups: BTreeMap<u64, (u64, u64, Vec<String>)> = BTreeMap::new();
        for (name, volume) in &mut self.volumes {
            let Some((group, touched)) = volume.made.take() else { continue };
            let instant = groups.entry(group).or_insert((0, u64::MAX, Vec::new()));
            instant.2.push(name.clone());
            for (at, writes) in touched {
                let possible = volume.blocks.get(at).map(Block::possible);
                let Some([id]) = possible.as_ref().map(Few::all) else { continue };
                // Zeroes are of any write.
                let there = writes.iter().find(|(_, other)| other == id);
                if *id == 0 || writes.iter().any(|(_, other)| *other == 0) {
                    continue;
                }
                let (began, ended) = match there {
                    Some((seq, _)) => (*seq, self.ends.get(seq).copied().unwrap_or(u64::MAX)),
                    None => (0, 0),
                };
                instant.0 = instant.0.max(began);
                let later = writes.iter().filter(|(seq, _)| *seq > ended);
                let missed = later.filter_map(|(seq, _)| self.ends.get(seq)).min();
                instant.1 = instant.1.min(missed.copied().unwrap_or(u64::MAX));
            }
        }
        for (from, to, names) in groups.into_values() {
            if from > to {
                return Err(format!(
                    "snapshots {names:?} have a write that began at {from} and lack one that ended at {to}"
                ));
            }
        }
        Ok(())
    }
}
