//! Pools whose superblocks, marks, logs and tables have right CRCs and may say anything: checked, opened and used, or refused with one
//! line. Nothing of it ends in a panic, or does not end.
#![no_main]

mod edits;

use edits::{Input, edit, seal};
use hawser_block::fake::FakeDevice;
use hawser_block::{BlockSize, Device, Geometry, Operation};
use hawser_runtime::Reactor;
use hawser_sim::{Client, World, WorldConfig};
use hawser_volume::format::{Layout, PAGE_BYTES, PagePtr, Root, Superblock, crc_of};
use hawser_volume::pool::{self, Ask, CreateOptions, MemoryTail, OpenOptions, Pool, PoolError};
use hawser_volume::raid::Level;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const HOST: [u8; 16] = [7; 16];
/// What is damaged: a mirror, and one with parity, which has a log of its own.
const LEVELS: [(Level, usize); 2] = [(Level::Raid1, 2), (Level::Raid5, 3)];
const DISK_BYTES: usize = 4 << 20;
const VOLUME_BYTES: u64 = 256 << 10;
/// What volumes' tables take in memory goes by their size.
const SIZE_BYTES_MAX: u64 = 1 << 40;

/// The content of all disks.
type Image = Vec<Vec<u8>>;

/// A reactor with disks.
struct Scene {
    world: World,
    reactors: Vec<Reactor>,
    disks: Vec<Arc<FakeDevice>>,
}

impl Scene {
    fn new(image: Image) -> Scene {
        let world = World::new(WorldConfig::new(1));
        let reactors = vec![world.reactor()];
        let disk = |content| {
            let geometry = Geometry { volatile_cache: true, ..Geometry::new(BlockSize::B512, 1) };
            let disk = FakeDevice::new(Geometry { blocks: DISK_BYTES as u64 / 512, ..geometry });
            disk.state().content = content;
            Arc::new(disk)
        };
        Scene { world, reactors, disks: image.into_iter().map(disk).collect() }
    }

    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.disks.iter().map(|disk| Arc::clone(disk) as Arc<dyn Device>).collect()
    }

    fn run<T: 'static>(&mut self, work: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(RefCell::new(None));
        let place = Rc::clone(&result);
        self.reactors[0].runtime().spawn(async move { *place.borrow_mut() = Some(work.await) });
        let done = || result.borrow().is_some();
        self.world.run(&mut self.reactors, Duration::from_secs(600), done).expect("it ends");
        result.take().expect("it is done")
    }

    fn ask<T: Send + 'static>(&mut self, ask: Ask<T>) -> Result<T, PoolError> {
        let answer = self.run(ask);
        if let Err(error) = &answer {
            is_line(&error.to_string());
        }
        answer
    }

    fn open(&mut self, degraded: bool, read_only: bool) -> Result<Pool, PoolError> {
        let tail = Box::new(MemoryTail::default());
        let options =
            OpenOptions { degraded, read_only, assume_exclusive: true, ..OpenOptions::new(HOST, tail) };
        let opened = Pool::open(&self.reactors[0].runtime().handle(), self.devices(), options);
        self.ask(opened)
    }

    fn check(&mut self) {
        let checked = pool::check(&self.reactors[0].runtime().handle(), self.devices());
        if let Ok(report) = self.ask(checked) {
            report.faults.iter().for_each(|fault| is_line(fault));
        }
    }

    /// Reads and writes all over a volume.
    fn use_volume(&mut self, pool: &Pool, name: &str) {
        let Some(device) = pool.device(name) else { return };
        let size = device.geometry().expect("a volume has one").size_bytes().min(VOLUME_BYTES);
        let client = Client::new(self.reactors[0].runtime(), &device);
        self.run(async move {
            let write = Operation::Write { fua: false };
            for at in (0..size).step_by(16 << 10) {
                let len = usize::try_from((size - at).min(16 << 10)).expect("small");
                let _ = client.io(Operation::Read, at, vec![0; len]).await;
                let _ = client.io(write, at, vec![1; len.min(4096)]).await;
            }
            let _ =
                client.io(Operation::Discard, 0, vec![0; usize::try_from(size / 2).expect("small")]).await;
            let _ = client.io(Operation::Flush, 0, Vec::new()).await;
        });
    }
}

fn is_line(what: &str) {
    assert!(!what.is_empty() && !what.contains('\n'), "not one line: {what:?}");
}

/// A pool with two volumes, a snapshot and a clone: closed, or left as a crash leaves it.
fn real((level, disks): (Level, usize), closed: bool) -> Image {
    let mut scene = Scene::new(vec![vec![0; DISK_BYTES]; disks]);
    let options = CreateOptions {
        strip_bytes: 16 << 10,
        extent_bytes: 64 << 10,
        region_bytes: 256 << 10,
        log_bytes: 16 << 10,
        parity_log_bytes: 256 << 10,
        metadata_bytes: Some(256 << 10),
        ..CreateOptions::new("p0", [9; 16], level)
    };
    let created = pool::create(&scene.reactors[0].runtime().handle(), scene.devices(), options);
    scene.ask(created).expect("good");
    let pool = scene.open(false, false).expect("good");
    scene.ask(pool.create_volume("v", VOLUME_BYTES)).expect("good");
    scene.use_volume(&pool, "v");
    scene.ask(pool.snapshot(vec![("v".to_owned(), "s".to_owned())])).expect("good");
    scene.ask(pool.clone_volume("s", "c")).expect("good");
    scene.use_volume(&pool, "c");
    scene.ask(pool.create_volume("w", VOLUME_BYTES)).expect("good");
    if closed {
        scene.ask(pool.close()).expect("good");
    } else {
        scene.ask(pool.sync()).expect("good");
    }
    scene.disks.iter().map(|disk| disk.state().content.clone()).collect()
}

fn page_of(disk: &[u8], at: u64) -> Vec<u8> {
    let at = usize::try_from(at).expect("within the disk");
    disk[at..at + PAGE_BYTES].to_vec()
}

fn put_at(disk: &mut [u8], at: u64, bytes: &[u8]) {
    let at = usize::try_from(at).expect("within the disk");
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The newest root, and the page that it is in.
fn root_of(disk: &[u8], layout: Layout, pool: &[u8; 16]) -> Option<(u32, Root)> {
    let roots =
        [0, 1].map(|page| Some((page, Root::decode(&page_of(disk, layout.page_offset(page)), pool)?)));
    roots.into_iter().flatten().max_by_key(|(_, root)| root.number)
}

/// Puts other bytes into a page of the tables, and the right CRC into all pointers to it, and so on up to the root.
fn put(disk: &mut [u8], layout: Layout, pool: &[u8; 16], page: u32, bytes: &[u8], depth: u32) {
    let at = layout.page_offset(page);
    let (old, new) = (crc_of(&page_of(disk, at)), crc_of(bytes));
    put_at(disk, at, bytes);
    if old == new || depth > 8 {
        return;
    }
    if let Some((at, mut root)) = root_of(disk, layout, pool)
        && root.volumes == (PagePtr { page, crc: old })
    {
        root.volumes.crc = new;
        put_at(disk, layout.page_offset(at), &root.encode());
    }
    let pointer = |crc: u32| (u64::from(crc) << 32 | u64::from(page)).to_le_bytes();
    for parent in (2..layout.metadata_pages).filter(|parent| *parent != page) {
        let mut bytes = page_of(disk, layout.page_offset(parent));
        let step = if bytes.starts_with(b"HAWSERVL") { 1 } else { 8 };
        let places: Vec<usize> =
            (0..PAGE_BYTES - 7).step_by(step).filter(|at| bytes[*at..at + 8] == pointer(old)).collect();
        if !places.is_empty() {
            places.iter().for_each(|at| bytes[*at..at + 8].copy_from_slice(&pointer(new)));
            put(disk, layout, pool, parent, &bytes, depth + 1);
        }
    }
}

/// Changes something on a disk, whose superblock is `book`.
fn damage(input: &mut Input<'_>, disk: &mut [u8], book: &Superblock) {
    let (layout, pool) = (book.layout, &book.pool_uuid);
    match input.u8() % 9 {
        8 => {
            // A header of the log of stripes, or an entry of it.
            let area = layout.parity_log_offset()..layout.data_offset();
            let starts: Vec<u64> =
                area.step_by(PAGE_BYTES).filter(|at| page_of(disk, *at).starts_with(b"HAWSERP")).collect();
            let Some(&at) = starts.get(input.below(starts.len().max(1))) else { return };
            let mut page = page_of(disk, at);
            edit(input, &mut page);
            seal(&mut page);
            put_at(disk, at, &page);
        }
        0 | 1 => {
            // One copy of the superblock, or both.
            let mut page = page_of(disk, Layout::SUPERBLOCKS[0]);
            edit(input, &mut page);
            seal(&mut page);
            let both = input.u8() % 4 > 0;
            for at in Layout::SUPERBLOCKS.into_iter().take(1 + usize::from(both)) {
                put_at(disk, at, &page);
            }
        }
        2 => {
            let mut page = page_of(disk, layout.intents_offset());
            edit(input, &mut page);
            seal(&mut page);
            put_at(disk, layout.intents_offset(), &page);
        }
        3 => {
            if let Some((at, root)) = root_of(disk, layout, pool) {
                let mut page = root.encode();
                edit(input, &mut page);
                seal(&mut page);
                put_at(disk, layout.page_offset(at), &page);
            }
        }
        4 | 5 => {
            // Some batch of the log.
            let starts: Vec<u64> = (0..layout.log_bytes / 512)
                .map(|block| layout.log_offset() + block * 512)
                .filter(|at| page_of(disk, *at).starts_with(b"HAWSERLG"))
                .collect();
            let Some(&at) = starts.get(input.below(starts.len().max(1))) else { return };
            let header = page_of(disk, at);
            let len = u32::from_le_bytes(header[56..60].try_into().expect("four bytes"));
            let at = usize::try_from(at).expect("within the disk");
            // Its length may have been damaged before.
            let len = usize::try_from(len).expect("four bytes").clamp(PAGE_BYTES, disk.len() - at);
            let batch = &mut disk[at..at + len];
            edit(input, batch);
            seal(batch);
        }
        _ => {
            let used: Vec<u32> = (2..layout.metadata_pages)
                .filter(|page| page_of(disk, layout.page_offset(*page)).iter().any(|byte| *byte != 0))
                .collect();
            let Some(&page) = used.get(input.below(used.len().max(1))) else { return };
            let mut bytes = page_of(disk, layout.page_offset(page));
            edit(input, &mut bytes);
            put(disk, layout, pool, page, &bytes, 0);
        }
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static REAL: OnceLock<Vec<Image>> = OnceLock::new();
    let mut input = Input::new(data);
    let mode = input.u8();
    let all = || LEVELS.iter().flat_map(|level| [real(*level, false), real(*level, true)]).collect();
    let mut image = REAL.get_or_init(all)[usize::from(mode & 1 | mode >> 4 & 2)].clone();
    let first = usize::try_from(Layout::SUPERBLOCKS[0]).expect("small");
    let book = Superblock::decode(&image[0][first..first + PAGE_BYTES]).expect("good").expect("good");
    for _ in 0..input.edits() {
        if mode & 2 == 0 {
            // The same on all: nobody knows better. Only the superblocks say who they are.
            let begin = Input::clone(&input);
            for disk in &mut image {
                input = Input::clone(&begin);
                damage(&mut input, disk, &book);
            }
        } else {
            let disk = input.below(image.len());
            damage(&mut input, &mut image[disk], &book);
        }
    }
    let mut scene = Scene::new(image);
    scene.check();
    let Ok(pool) = scene.open(mode & 4 != 0, mode & 24 == 24) else { return };
    let volumes = pool.volumes();
    for volume in volumes.iter().filter(|volume| volume.size_bytes <= SIZE_BYTES_MAX).take(4) {
        scene.use_volume(&pool, &volume.name);
    }
    let _ = scene.ask(pool.snapshot(vec![("v".to_owned(), "new".to_owned())]));
    let _ = scene.ask(pool.delete_volume("c"));
    let _ = scene.ask(pool.scrub(false));
    let runtime = scene.reactors[0].runtime().clone();
    scene.run(async move { runtime.sleep(Duration::from_secs(3)).await });
    let _ = scene.ask(pool.close());
    drop(pool);
    scene.check();
});
