//! What is wrong with a pool, each fault with its place. Nothing is written.

use super::found::Found;
use super::leaves_of;
use super::parity_log;
use super::tables::{read_intents_of, read_tables_helped};
use crate::format::{Layout, PAGE_BYTES, Root, Superblock};
use crate::pool::lanes::{Lanes, Leaf};
use crate::pool::{Ask, CheckReport, PoolError};
use hawser_block::Device;
use hawser_runtime::ReactorHandle;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

pub(in crate::pool) fn check(reactor: &ReactorHandle, devices: Vec<Arc<dyn Device>>) -> Ask<CheckReport> {
    Ask::of(reactor, move |runtime| async move {
        let lanes = Lanes::new(&runtime);
        let report = look(&lanes, devices).await;
        lanes.close();
        report
    })
}

async fn look(lanes: &Rc<Lanes>, devices: Vec<Arc<dyn Device>>) -> Result<CheckReport, PoolError> {
    let mut report = CheckReport::default();
    let leaves = leaves_of(devices.clone())?;
    for leaf in &leaves {
        for offset in Layout::SUPERBLOCKS {
            let what = match lanes.read_bytes(leaf, offset, PAGE_BYTES).await {
                Err(status) => status.name().to_owned(),
                Ok(page) => match Superblock::decode(page.bytes(0, PAGE_BYTES)) {
                    Ok(Some(_)) => continue,
                    Ok(None) => "none".to_owned(),
                    Err(error) => error.0,
                },
            };
            // After a crash too, which may leave one of the two copies: the next opening writes both.
            report.faults.push(format!("{}: superblock at {offset}: {what}", leaf.name()));
        }
    }
    let found = Found::read(lanes, devices).await?;
    found.set_modes(true)?;
    for (number, record) in found.book.members.iter().enumerate() {
        match &found.members[number] {
            None => match found.unfit.get(&number) {
                Some(what) => report.faults.push(what.clone()),
                None => report.missing.push(format!("member {number} is missing")),
            },
            Some((leaf, _)) if !record.in_sync => {
                report.faults.push(format!("member {number} ({}) is stale", leaf.name()))
            }
            Some(_) => {}
        }
    }
    for (number, (_, leaf)) in found.spares.iter().enumerate() {
        if leaf.is_none() {
            report.missing.push(format!("spare {number} is missing"));
        }
    }
    if let Some(replacement) = found.book.replacement.filter(|_| found.replacement.is_none()) {
        report.missing.push(format!("the replacement of member {} is missing", replacement.member));
    }
    let mut best: BTreeMap<&'static str, u64> = BTreeMap::new();
    // Each by itself: a fault of one may be hidden by another.
    let with_tables = found.with_tables();
    for leaf in &with_tables {
        let mut alone = Found {
            book: found.book.clone(),
            array: found.array.clone(),
            members: vec![None; found.members.len()],
            spares: Vec::new(),
            replacement: None,
            unfit: BTreeMap::new(),
        };
        let place =
            found.members.iter().position(|other| other.as_ref().is_some_and(|(other, _)| other.same(leaf)));
        let Some(place) = place else { continue };
        alone.members[place].clone_from(&found.members[place]);
        for slot in [0, 1] {
            // One that cannot be read is told below, if it is needed.
            let Ok(page) = lanes.read_bytes(leaf, found.book.layout.page_offset(slot), PAGE_BYTES).await
            else {
                continue;
            };
            let page = page.bytes(0, PAGE_BYTES);
            let is_empty = page.iter().all(|byte| *byte == 0);
            if !is_empty && Root::decode(page, &found.book.pool_uuid).is_none() {
                // After a crash too, which may come while it is written: the other one counts, and the next checkpoint writes this one.
                report.faults.push(format!(
                    "{}: page {slot} of its tables, a root, is torn, or none of this pool's",
                    leaf.name()
                ));
            }
        }
        // What hangs on a page that is bad here is looked at all the same, where somebody else has that page.
        let others: Vec<Leaf> = with_tables.iter().filter(|other| !other.same(leaf)).cloned().collect();
        let mut bad_pages = Vec::new();
        let tables = read_tables_helped(lanes, &alone, &others, &mut bad_pages).await;
        let mut own: Vec<String> =
            bad_pages.into_iter().filter(|(other, _)| other.same(leaf)).map(|(_, what)| what).collect();
        if let Err(PoolError::Failed(what)) = &tables {
            let what = what.strip_prefix(&format!("pool {}: ", found.book.name)).unwrap_or(what);
            own.retain(|other| other != what);
            own.push(format!("{what}; the rest of its tables and log is not checked"));
        }
        report.faults.extend(own.into_iter().map(|what| format!("{}: {what}", leaf.name())));
        match tables {
            Err(PoolError::Failed(_)) => {}
            Err(error) => return Err(error),
            Ok(tables) => {
                report.faults.extend(
                    tables.meta.verify().into_iter().map(|fault| format!("{}: {fault}", leaf.name())),
                );
                if best.is_empty() {
                    best.insert("pages of tables", tables.pages_read);
                    best.insert("records of the log", tables.replayed);
                    best.insert("volumes", tables.meta.volumes().count() as u64);
                    let mapped = tables.meta.volumes().map(|(_, volume)| volume.mapped_extents()).sum();
                    best.insert("mapped extents", mapped);
                    best.insert("free extents", u64::from(tables.meta.free_extents()));
                }
            }
        }
    }
    let pages = read_intents_of(lanes, &found, &mut report.faults).await;
    // Of those that are whole.
    if pages.iter().any(Option::is_some) {
        let words = pages.iter().flatten().flatten();
        best.insert("marked regions", words.map(|word| u64::from(word.count_ones())).sum());
    }
    if found.array.sets().iter().any(|set| set.parity().is_some()) {
        let (faults, entries) = parity_log::check(lanes, &found).await;
        report.faults.extend(faults);
        best.insert("entries of parity logs", entries);
    }
    report.checked = best.into_iter().collect();
    Ok(report)
}
